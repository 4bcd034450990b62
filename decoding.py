"""What a trained model answers: greedy and beam search, predictions for texts, their scores."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from comp_utils import autocast, option
from data import TextCodec, pad
from ddp_utils import by_rank_0, gather, rank, world_size


@dataclass(frozen=True)
class DecodingConfig:
    """How a translation is searched for."""

    beam_size: int = option(4, "hypotheses kept of each sentence; 1: the likeliest token", low=1)
    length_penalty: float = option(
        0.6,
        "alpha of Wu et al.: 0 prefers short translations, 1 long ones",
        low=0.0,
        below=math.inf,
    )


EXTRA_LENGTH = 50  # tokens that a translation may be longer than its source: AIAYN, section 6.1


def length_penalty(length: Tensor | int, alpha: float) -> Tensor | float:
    """lp(Y) = ((5 + |Y|) / (5 + 1))^alpha, a divisor of log P(Y | X). |Y| counts the end token.

    Source: Wu et al. (arXiv 1609.08144), section 7, equation 14.
    """
    return ((5 + length) / 6) ** alpha


@torch.inference_mode()
def greedy(model: nn.Module, src: Tensor, *, bos_id: int, eos_id: int) -> list[list[int]]:
    """The likeliest token at each step, until eos_id or the greatest length: src (b, l_z)."""
    caches, src_Mask = model.start(src)
    limits = src_Mask.sum(dim=-1).flatten() + EXTRA_LENGTH  # (b)
    found: list[list[int]] = [[] for _ in src]
    sentences = torch.arange(len(src), device=src.device)  # which are not finished yet
    tokens = torch.full((len(src), 1), bos_id, device=src.device)  # (n, 1 + t)
    while len(sentences):
        logits = model.step(tokens[:, -1], tokens.shape[1] - 1, caches, src_Mask)
        chosen = logits.max(dim=-1).indices  # (n); on a CPU argmax takes twice as long
        tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        done = (chosen == eos_id) | (tokens.shape[1] > limits)
        if done.any():
            for i, ids in zip(sentences[done].tolist(), tokens[done, 1:].tolist()):
                found[i] = [token for token in ids if token != eos_id]
            rows = (~done).nonzero()[:, 0]
            tokens, limits, sentences = tokens[rows], limits[rows], sentences[rows]
            src_Mask = src_Mask[rows]
            for cache in caches:
                cache.select(rows, rows)
    return found


@torch.inference_mode()
def beam_search(
    model: nn.Module, src: Tensor, *, bos_id: int, eos_id: int, beam_size: int, alpha: float
) -> list[list[int]]:
    """The best translation that a beam of hypotheses comes upon: src (b, l_z).

    The beam holds the likeliest beam_size hypotheses, ranked by log P(Y | X); one that ends keeps
    its place, so the likeliest of all goes on until it ends itself. Those that ended are ranked by
    log P(Y | X) / lp(Y). A sentence is done when its beam holds ended ones alone, when none that
    still grows can overtake the best of them, or at the greatest length.
    Source: AIAYN, section 6.1; Wu et al. (arXiv 1609.08144), section 7.
    """
    k, device = beam_size, src.device
    caches, src_Mask = model.start(src, k)
    limits = src_Mask.sum(dim=-1).flatten() + EXTRA_LENGTH  # (b)
    found: list[list[int]] = [[] for _ in src]
    sentences = torch.arange(len(src), device=device)  # those that are not done: n of b
    tokens = torch.full((len(src), k, 1), bos_id, device=device)  # (n, k, 1 + t)
    log_p = torch.full((len(src), k), -math.inf, device=device)  # (n, k)
    log_p[:, 0] = 0.0  # the k empty hypotheses of a sentence are one and the same
    best = torch.full((len(src),), -math.inf, device=device)  # (n), score of the best that ended
    places = torch.full((len(src), 1), k, device=device)  # in the beam, for those that still grow
    while len(sentences):
        n, _, length = tokens.shape  # length: of a hypothesis that gets its next token now
        logits = model.step(tokens[:, :, -1].flatten(), length - 1, caches, src_Mask)
        grown = log_p[:, :, None] + logits.float().log_softmax(dim=-1).view(n, k, -1)
        n_vocab = grown.shape[-1]
        # Of 2 k candidates at most k end, one for each hypothesis, so that k can go on.
        candidates, index = grown.flatten(1).topk(min(2 * k, k * n_vocab), dim=1)  # (n, 2 k)
        parents, chosen = index // n_vocab, index % n_vocab
        ends = chosen == eos_id

        rank = torch.arange(candidates.shape[1], device=device)
        ended = candidates.masked_fill(~ends | (rank >= places), -math.inf)  # (n, 2 k)
        places = places - ended.isfinite().sum(dim=1, keepdim=True)
        ended = ended / length_penalty(length, alpha)
        score, which = ended.max(dim=1)  # (n)
        for i in (score > best).nonzero()[:, 0].tolist():
            found[sentences[i]] = tokens[i, parents[i, which[i]], 1:].tolist()
        best = torch.maximum(best, score)

        log_p, which = candidates.masked_fill(ends, -math.inf).topk(k, dim=1)  # (n, k)
        log_p = log_p.masked_fill(rank[:k] >= places, -math.inf)
        parents, chosen = parents.gather(1, which), chosen.gather(1, which)
        tokens = torch.cat(
            (tokens.gather(1, parents[:, :, None].expand(n, k, length)), chosen[:, :, None]), dim=2
        )
        at_limit = length >= limits
        for i in (at_limit & best.isinf()).nonzero()[:, 0].tolist():
            found[sentences[i]] = tokens[i, 0, 1:].tolist()  # none has ended: the likeliest, cut
        # A log probability only falls, so at the greatest length it is divided by the most.
        reachable = log_p[:, 0] / length_penalty(limits, alpha)
        kept = (~(at_limit | (best >= reachable))).nonzero()[:, 0]  # of n
        rows = (torch.arange(n, device=device)[:, None] * k + parents)[kept].flatten()
        for cache in caches:
            cache.select(rows, None if len(kept) == n else kept)
        tokens, log_p, best, places = tokens[kept], log_p[kept], best[kept], places[kept]
        sentences, limits, src_Mask = sentences[kept], limits[kept], src_Mask[kept]
    return found


# --------------------------------------------------------------------------------------- answering


@dataclass(frozen=True)
class Predictor:
    """A trained model with all that it takes to answer a text with a text."""

    model: nn.Module
    codec: TextCodec
    classes: list[str] | None  # None: a translator
    max_length: int  # tokens of a source, what is longer is cut
    batch_size: int  # sentences
    search: DecodingConfig
    device: torch.device
    precision: str

    def answers(
        self, texts: Iterable[str], at_once: int = 4096
    ) -> Iterator[tuple[str, int] | None]:
        """(answer, tokens of the text before any cut) to each text in order; None to a blank one.

        Memory does not grow with the texts: at_once of them are sorted by length and answered, the
        batches dealt out to the ranks. The texts are those of rank 0, which alone reads a file.
        """
        self.model.eval()
        texts = iter(texts)
        while window := by_rank_0(lambda: list(islice(texts, at_once))):
            ids = self.codec.encode(window)
            rows = sorted((i for i, x in enumerate(window) if x.strip()), key=lambda i: len(ids[i]))
            answers: list[tuple[str, int] | None] = [None] * len(ids)
            begins = range(0, len(rows), self.batch_size)
            batches = [rows[begin : begin + self.batch_size] for begin in begins]
            mine = batches[rank() :: world_size()]
            answered = [(batch, self.answer([ids[i] for i in batch])) for batch in mine]
            for batch, found in chain.from_iterable(gather(answered)):
                for i, answer in zip(batch, found):
                    answers[i] = answer, len(ids[i]) + 1
            yield from answers

    @torch.inference_mode()
    def answer(self, ids: list[list[int]]) -> list[str]:
        """The answers to one batch: "label<TAB>probability", or the translation."""
        src = [row[: self.max_length - 1] + [self.codec.eos_id] for row in ids]
        src = pad(src, self.codec.pad_id).to(self.device)  # (b, l_z)
        with autocast(self.precision, self.device):
            return self._labels(src) if self.classes else self._translations(src)

    def _labels(self, src: Tensor) -> list[str]:
        tgt_in = torch.full((len(src), 1), self.codec.bos_id, device=self.device)
        p, class_ids = self.model(src, tgt_in)[:, 0].float().softmax(dim=-1).max(dim=-1)  # (b), (b)
        return [f"{self.classes[i]}\t{x:.4f}" for i, x in zip(class_ids.tolist(), p.tolist())]

    def _translations(self, src: Tensor) -> list[str]:
        ends = {"bos_id": self.codec.bos_id, "eos_id": self.codec.eos_id}
        k, alpha = self.search.beam_size, self.search.length_penalty
        if k == 1:
            ids = greedy(self.model, src, **ends)
        else:
            ids = beam_search(self.model, src, **ends, beam_size=k, alpha=alpha)
        return [text.strip() for text in self.codec.tokenizer.decode_batch(ids)]

    def attention(
        self, source: str, target: str, longest: int = 40
    ) -> tuple[list[str], list[str], np.ndarray]:
        """Source tokens, target tokens, and weights[target, source] of the last decoder layer.

        Of each side the first tokens alone, longest at most, or a picture could not be read.
        """
        src, tgt = (row + [self.codec.eos_id] for row in self.codec.encode([source, target]))
        tgt_in = [self.codec.bos_id] + tgt[:-1]
        src_ids, tgt_ids = (torch.tensor([row], device=self.device) for row in (src, tgt_in))
        with torch.inference_mode():
            weights = self.model.cross_attention(src_ids, tgt_ids)[0]  # (l_x, l_z)
        decode = self.codec.tokenizer.decode
        words = [[decode([i], skip_special_tokens=False) for i in row] for row in (src, tgt)]
        source, target = (row[:longest] for row in words)
        return source, target, weights[:longest, :longest].float().cpu().numpy()


def translation_scores(hypotheses: list[str], references: list[str]) -> dict[str, Any]:
    """Corpus scores by sacrebleu, with the signature that says how they were reckoned.

    "bleu" and "chrf" are sacrebleu's defaults. "bleu_lowercase_13a" is BLEU of lower-cased text in
    the 13a tokenisation, near what papers on Multi30k report as tokenised lower-cased BLEU.
    """
    from sacrebleu.metrics import BLEU, CHRF

    bleu, chrf, lowercase = BLEU(), CHRF(), BLEU(lowercase=True, tokenize="13a")
    return {
        "bleu": bleu.corpus_score(hypotheses, [references]).score,
        "chrf": chrf.corpus_score(hypotheses, [references]).score,
        "bleu_lowercase_13a": lowercase.corpus_score(hypotheses, [references]).score,
        "signature": f"BLEU {bleu.get_signature()}; chrF {chrf.get_signature()}",
    }
