"""Answers of a trained model to texts: labels or translations, and attention maps."""

import json
import math
import os
import queue
import re
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from numbers import Integral
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from comp_utils import autocast, set_up_output
from config import DecodingConfig
from data import pad, plan_epoch
from ddp_utils import broadcast_from_rank_zero, gather, rank, world_size
from decoding import beam_search, greedy
from errors import BadInput
from files import text_of
from kernels import packed
from tables import TABLE_FORMATS, Row, file_format, has_quoted_fields, read_lines, read_table
from tokenization import TextCodec

Answers = list[tuple[str, float]]  # labels with probabilities, or translations with scores
PORTION = 4096  # texts sorted by length and answered together
WAIT = 0.02  # seconds; lines of standard input that arrive within it are answered together


@dataclass(frozen=True)
class Predictor:
    """A trained model with everything it needs to answer texts.

    Called with a text it returns its label or translation, with a list of texts a list of them; a
    blank text has "".
    """

    model: nn.Module
    codec: TextCodec
    classes: list[str] | None  # None for a translator
    max_length: int  # tokens of a source, end token included; longer ones are cut
    batch_size: int | None  # sentences in a batch
    batch_tokens: int | None  # source tokens in a batch, padding included
    search: DecodingConfig
    device: torch.device
    precision: str
    n_best: int | None = None  # answers to a text, where more than the best are wanted

    def __call__(self, texts: str | Iterable[str]) -> str | list[str]:
        """The best answer to a text, or to each of several."""
        if isinstance(texts, str):
            return self([texts])[0]
        return [answers[0][0] if answers else "" for answers in self.answer(texts)]

    def probabilities(self, texts: str | Iterable[str]) -> Any:
        """The probability of each label, for a text or for each of several; {} for a blank one."""
        if not self.classes:
            raise ValueError("probabilities: only of a classifier; use best")
        if isinstance(texts, str):
            return self.probabilities([texts])[0]
        return [dict(answers) for answers in self.best(texts, len(self.classes))]

    def best(self, texts: str | Iterable[str], n: int) -> Any:
        """The n best answers to a text, or to each of several, best first: labels with their
        probabilities, or translations with log P / length penalty, n at most the beam size; [] for
        a blank one."""
        if not isinstance(n, Integral) or n < 1:
            raise ValueError(f"best: n is {n}; give a whole number above 0")
        if not self.classes and n > self.search.beam_size:
            raise ValueError(f"best: n is {n}; load with beam_size={n} or more")
        if isinstance(texts, str):
            return self.best([texts], n)[0]
        return replace(self, n_best=n).answer(texts)

    def answer(self, texts: Iterable[str]) -> list[Answers]:
        """The answers to each text."""
        return [answers for _, answers, _ in self.answer_portions(portions(texts))]

    def answer_portions(self, portions: Iterator[list[str]]) -> Iterator[tuple[str, Answers, int]]:
        """Each text in order, its answers, and its tokens before any cut; [] and 0 if it is blank.

        Rank 0 reads a portion, all ranks share its batches. Memory is that of one portion.
        """
        self.model.eval()
        while texts := broadcast_from_rank_zero(next, portions, []):
            ids = self.codec.encode(texts)
            rows = np.flatnonzero([bool(text.strip()) for text in texts])
            lengths = np.array([(min(len(row) + 1, self.max_length), 0) for row in ids])
            size = {"batch_size": self.batch_size, "batch_tokens": self.batch_tokens}
            plan = plan_epoch(lengths[rows], **size, seed=0, epoch=0)
            batches = [rows[batch].tolist() for batch in plan if len(batch)]
            mine = batches[rank() :: world_size()]
            with packed(self.model):
                answered = [(batch, self.answer_batch([ids[i] for i in batch])) for batch in mine]
            answers = [([], 0)] * len(texts)
            for batch, found in chain.from_iterable(gather(answered)):
                for i, answer in zip(batch, found):
                    answers[i] = answer, len(ids[i]) + 1
            yield from ((text, *answer) for text, answer in zip(texts, answers))

    @torch.inference_mode()
    def answer_batch(self, ids: list[list[int]]) -> list[Answers]:
        """The answers to each sentence of a batch."""
        src = [row[: self.max_length - 1] + [self.codec.eos_id] for row in ids]
        src = pad(src, self.codec.pad_id).to(self.device)  # (b, l_z)
        with autocast(self.precision, self.device):
            return self._labels(src) if self.classes else self._translations(src)

    def _labels(self, src: Tensor) -> list[Answers]:
        tgt_in = torch.full((len(src), 1), self.codec.bos_id, device=self.device)
        p = self.model(src, tgt_in)[:, 0].float().softmax(dim=-1)  # (b, n_classes)
        best = p.topk(min(self.n_best or 1, len(self.classes)), dim=1)
        rows = zip(best.indices.tolist(), best.values.tolist())
        return [[(self.classes[i], x) for i, x in zip(*row)] for row in rows]

    def _translations(self, src: Tensor) -> list[Answers]:
        special = {"bos_id": self.codec.bos_id, "eos_id": self.codec.eos_id}
        k, alpha = self.search.beam_size, self.search.length_penalty
        if k == 1 and not self.n_best:  # without a score
            found = [[(math.nan, ids)] for ids in greedy(self.model, src, **special)]
        else:
            beam = {"beam_size": k, "alpha": alpha, "n_best": self.n_best or 1}
            found = beam_search(self.model, src, **special, **beam)
        texts = iter(self.codec.tokenizer.decode_batch([ids for row in found for _, ids in row]))
        one_line = map(join_lines, texts)
        return [[(next(one_line), score) for score, _ in row] for row in found]

    @torch.inference_mode()
    def attention(
        self, source: str, target: str, longest: int = 40
    ) -> tuple[list[str], list[str], np.ndarray]:
        """Source tokens, target tokens, weights[head, target, source] of the last decoder layer.

        Only the first `longest` tokens of each side, as many as a picture can show. Later target
        tokens cannot change the weights, so they are cut before the forward pass.
        """
        if self.classes:
            raise ValueError("attention: only of a translator")
        src, tgt = (row + [self.codec.eos_id] for row in self.codec.encode([source, target]))
        src, tgt = src[: self.max_length], tgt[: min(longest, self.max_length)]
        tgt_in = [self.codec.bos_id, *tgt[:-1]]
        src_ids, tgt_ids = (torch.tensor([row], device=self.device) for row in (src, tgt_in))
        self.model.eval()
        weights = self.model.cross_attention(src_ids, tgt_ids)[0, ..., :longest]  # (h, l_x, l_z)
        decode = self.codec.tokenizer.decode
        sides = ([decode([i], skip_special_tokens=False) for i in row] for row in (src, tgt))
        source, target = (words[:longest] for words in sides)
        return source, target, weights.float().cpu().numpy()

    def attention_maps(
        self, sources: list[str], targets: list[str], n: int = 4
    ) -> list[tuple[list[str], list[str], np.ndarray]]:
        """`attention` of the n pairs nearest to 16 tokens: not trivial, and readable."""
        ids = zip(self.codec.encode(sources), self.codec.encode(targets))
        lengths = np.array([max(map(len, pair)) for pair in ids])
        chosen = np.argsort(abs(lengths - 16), kind="stable")[:n].tolist()
        return [self.attention(sources[i], targets[i]) for i in chosen]


def join_lines(text: str) -> str:
    """A text on one line, without tabs."""
    return " ".join(text.replace("\t", " ").splitlines()).strip()


def checked(text: Any) -> str:
    """The text. Raises TypeError if it is something else, such as the NaN of an empty cell."""
    if isinstance(text, str):
        return text
    raise TypeError(f"a text is {text!r:.50}, of type {type(text).__name__}; give a str")


def portions(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts, PORTION at a time, so every run makes the same batches of a file.

    Raises TypeError for what is not a text.
    """
    texts = map(checked, iter(texts))
    while portion := list(islice(texts, PORTION)):
        yield portion


def live_portions(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts as they arrive: at most PORTION at a time, none delayed by more than WAIT.

    A thread reads them, at most PORTION ahead. An exception raised there is raised here.
    """
    arrived: queue.Queue[str | Exception] = queue.Queue(PORTION)

    def read() -> None:
        try:
            for text in texts:
                arrived.put(text)
            arrived.put(EOFError())
        except Exception as error:
            arrived.put(error)

    threading.Thread(target=read, daemon=True).start()
    end = None
    while not end:
        portion, deadline = [arrived.get()], time.monotonic() + WAIT
        with suppress(queue.Empty):
            while isinstance(portion[-1], str) and len(portion) < PORTION:
                portion.append(arrived.get(timeout=max(0.0, deadline - time.monotonic())))
        if isinstance(portion[-1], Exception):
            end = portion.pop()
        if portion:
            yield portion
    if not isinstance(end, EOFError):
        raise end


def read_texts(name: str, source_column: str, names: list[str] | None) -> Iterator[tuple[str, Row]]:
    """Each text of a file, and its row: of a table the source column, else each line."""
    if name != "-" and (names or file_format(Path(name)) in TABLE_FORMATS):
        path = Path(name)
        quoted = file_format(path) == ".tsv" and has_quoted_fields([path])
        for place, row in read_table(path, (source_column,), names, quoted=quoted):
            yield text_of(row, source_column, place, "source")[0], row
    else:
        for _, line in read_lines(name):
            text = line.rstrip("\r\n")
            yield text, {"text": text}


def format_answers(predictor: Predictor, row: Row, answers: Answers, as_json: bool) -> str:
    """The answers to the text of a row on one line: tab-separated with their scores, or as JSON
    beside what else the row has."""
    kind, score = ("label", "probability") if predictor.classes else ("translation", "score")
    has_scores = bool(predictor.classes or predictor.n_best)
    if as_json:
        if "answers" in row:
            raise BadInput("--output: the rows have a column answers already; rename it")
        rows = [{kind: a, score: round(x, 6)} if has_scores else {kind: a} for a, x in answers]
        line = json.dumps({**row, "answers": rows}, ensure_ascii=False, default=str)
        # JSON has no NaN and no Infinity, UTF-8 no half of a surrogate pair.
        if re.search("NaN|Infinity|[\ud800-\udfff]", line):
            line = json.dumps(json.loads(line, parse_constant=lambda _: None))
        return line
    pairs = ((" ".join(answer.split()), x) for answer, x in answers)  # no line break, no tab
    return "\t".join(f"{a}\t{x:.4f}" if has_scores else a for a, x in pairs)


@contextmanager
def new_file(name: str | None) -> Iterator[TextIO]:
    """A file that is complete or does not exist; standard output for None."""
    if name is None:
        yield sys.stdout
        return
    path = Path(name).expanduser()
    made = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(made, "x", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)


def predict(
    predictor: Predictor,
    name: str,
    output: str | None = None,
    *,
    source_column: str = "text",
    names: list[str] | None = None,
) -> None:
    """Prints a line in UTF-8 for each text of a file, in order; a blank one for a blank one.

    name: the file, or "-" for standard input, whose lines are answered as they arrive. output: a
    new file for the answers, JSON lines if it ends in .jsonl. source_column: of a table. names: of
    its columns, if no line names them.
    """
    set_up_output(encoding="utf-8")
    live, as_json = name == "-", bool(output and output.endswith(".jsonl"))
    if live and sys.stdin.isatty():
        print("Type a text and Enter; Ctrl-D ends.", file=sys.stderr)
    rows: deque[Row] = deque()  # read, but not answered yet
    read = read_texts(name, source_column, names)
    texts = (rows.append(row) or text for text, row in read)
    answers = predictor.answer_portions(live_portions(texts) if live else portions(texts))
    hidden = live or sys.stdout.isatty() or None  # a bar would break up answers on a terminal
    n_blank = n_cut = 0
    try:
        with tqdm(unit=" lines", disable=hidden, leave=False) as bar, new_file(output) as file:
            for _, found, n_tokens in answers:
                n_blank += n_tokens == 0
                n_cut += n_tokens > predictor.max_length
                row = rows.popleft() if rows else {}  # rank 0 alone has read any
                print(format_answers(predictor, row, found, as_json), file=file, flush=live)
                bar.update()
            file.flush()
    except (BadInput, OSError) as error:
        if world_size() > 1:  # an empty portion ends the other ranks
            texts.close()
            deque(answers, maxlen=0)
        if not isinstance(error, BrokenPipeError):
            raise
        # The reader of the answers, such as head, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if n_blank:
        print(f"warning: blank lines: {n_blank}, answered with blank lines", file=sys.stderr)
    if n_cut:
        print(f"warning: lines cut to {predictor.max_length} tokens: {n_cut}", file=sys.stderr)
