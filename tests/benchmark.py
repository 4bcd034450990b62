"""Speed compared with others on equal work, in turn and in one run, on the same machine.

python tests/benchmark.py train [options of main.py]   one step, with torch.nn.Transformer
python tests/benchmark.py decode RUN_DIR               greedy search, with and without a cache
python tests/benchmark.py generate RUN_DIR             greedy and beam search, with others
python tests/benchmark.py processes [options of main.py]   two processes, with one (on Linux)
Each figure is the median of all rounds, with the least and the greatest.
"""

import json
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from processes import PROJECT, Launched, launched
from torch import Tensor, nn

import decoding
import export
import jobs
import kernels
import prepare
import settings
from comp_utils import autocast, grad_scaler, set_seed
from components import sinusoids
from config import DataConfig, ModelConfig
from data import NO_TARGET, Batch, TextData
from decoding import EXTRA_LENGTH, beam_search, greedy
from measure import forward_flops, matmul_flops_per_second
from optimization import build_optimizer, count_correct, loss_sums, train_step
from run_folder import RunFolder
from splits import load_splits

CPU = torch.device("cpu")
ROUNDS, SENTENCES, TOKENS = 5, 1000, 16_000


class TorchTransformer(nn.Module):
    """The same model out of torch.nn: post-norm, tied embeddings, sinusoidal positions.

    n_classes: for a classifier, whose decoder sees the start token alone.
    """

    def __init__(
        self, config, *, n_vocab: int, max_len: int, pad_id: int, n_classes: int | None
    ) -> None:
        super().__init__()
        self.pad_id, self.scale = pad_id, math.sqrt(config.d_model)
        self.embedding = nn.Embedding(n_vocab, config.d_model, padding_idx=pad_id)
        nn.init.normal_(self.embedding.weight, std=1 / self.scale)
        self.register_buffer("PE", sinusoids(max_len, config.d_model).float())
        sizes = (config.d_model, config.n_heads, config.d_ff, config.dropout)
        n = config.n_layers
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(*sizes, batch_first=True), n, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(*sizes, batch_first=True), n
        )
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.d_model, n_classes or n_vocab, bias=bool(n_classes))
        if not n_classes:
            self.output.weight = self.embedding.weight
        # The paper drops sub-layer outputs alone; torch.nn also drops attention weights and
        # feed-forward activations, which is more work.
        for layer in (*self.encoder.layers, *self.decoder.layers):
            layer.dropout.p = layer.self_attn.dropout = 0.0
        for layer in self.decoder.layers:
            layer.multihead_attn.dropout = 0.0

    def embed(self, ids: Tensor) -> Tensor:
        return self.dropout(self.embedding(ids) * self.scale + self.PE[: ids.shape[1]])

    def forward(self, src: Tensor, tgt_in: Tensor) -> Tensor:
        padding = src == self.pad_id
        memory = self.encoder(self.embed(src), src_key_padding_mask=padding)
        hidden = torch.ones(tgt_in.shape[1], tgt_in.shape[1], dtype=torch.bool).triu(1)
        X = self.decoder(
            self.embed(tgt_in),
            memory,
            tgt_mask=hidden,
            tgt_is_causal=True,
            memory_key_padding_mask=padding,
        )
        return self.output(X)


def torch_step(model: nn.Module, batch: Batch, optimizer, options) -> None:
    """A training step as one writes it with torch: the same loss, clipping and optimizer."""
    src, tgt_in, tgt_out = batch.repeat(2 if options.r_drop else 1)
    logits = model(src, tgt_in)
    loss = F.cross_entropy(
        logits.flatten(0, 1),
        tgt_out.flatten(),
        ignore_index=NO_TARGET,
        label_smoothing=options.label_smoothing,
    )
    if options.r_drop:
        p, q = logits.log_softmax(dim=-1).chunk(2)
        divergence = F.kl_div(p, q, log_target=True, reduction="sum")
        divergence = divergence + F.kl_div(q, p, log_target=True, reduction="sum")
        loss = loss + options.r_drop * divergence / (4 * batch.n_targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), options.max_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def in_turn(
    works: dict[str, Callable[[], float]], unit: str, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Runs each work once to warm up, then all of them ROUNDS times in turn. Returns all speeds."""
    for work in works.values() if warm_up else ():
        work()
    speeds = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            speeds[name].append(work())
    for name, all_of in speeds.items():
        median = statistics.median(all_of)
        print(f"{name}: {median:,.0f} {unit} ({min(all_of):,.0f} to {max(all_of):,.0f})")
    first, *others = speeds.items()
    for name, all_of in others:
        ratio = statistics.median(a / b for a, b in zip(first[1], all_of))
        print(f"{first[0]} / {name}: {ratio:.2f} (median of the ratios, round by round)")
    return speeds


def train(argv: list[str]) -> None:
    """Tokens of source and target in a second of training, ours and others', and of ours without
    each of the fast forms; and the share of the time that the products alone would take."""
    given, problems = settings.parse_args(argv)
    given = {"ensemble": 1, **given}  # the others train one model
    options = settings.resolve(given)
    jobs.raise_problems(problems + settings.option_problems(options, given))
    set_seed(options.seed)
    data, _ = prepare.load_data(options)
    plan = data.plan("train", seed=options.seed, epoch=1)
    n_batches = 1 + int(np.searchsorted(data.sizes("train", plan).n_tokens.cumsum(), TOKENS))
    batches = list(data.load("train", plan[:n_batches], CPU))
    n_tokens = sum(batch.n_tokens for batch in batches)
    scaler, config = grad_scaler("fp32", CPU), settings.extract_config(ModelConfig, options)

    def rhea_step(model: nn.Module, batch: Batch, optimizer, options) -> None:
        how = {"label_smoothing": options.label_smoothing, "r_drop": options.r_drop, "seeds": [1]}
        precision = autocast(options.precision, CPU)
        rates = {"lr": 1e-4, "max_norm": options.max_norm}
        train_step(model, [batch], optimizer, scaler, precision, **rates, **how)

    def work(model: nn.Module, step: Callable, **changes: Any) -> Callable[[], float]:
        model.train()
        optimizer = build_optimizer(model, weight_decay=options.weight_decay)
        for group in optimizer.param_groups:
            group["lr"] = 1e-4

        def epoch() -> float:
            with ExitStack() as stack:
                for name, value in changes.items():
                    stack.enter_context(patch.object(kernels, name, value))
                began = time.perf_counter()
                for batch in batches:
                    step(model, batch, optimizer, options)
                return n_tokens / (time.perf_counter() - began)

        return epoch

    ours = jobs.build_model(options, data.codec, data.classes)
    n_classes = len(data.classes or ())
    length = options.max_length + EXTRA_LENGTH
    sizes = {"n_vocab": data.codec.n_vocab, "max_len": length, "pad_id": data.codec.pad_id}
    theirs = TorchTransformer(config, **sizes, n_classes=n_classes or None)
    works = {"rhea": work(ours, rhea_step), "torch.nn.Transformer": work(theirs, torch_step)}
    job = jobs.Job(options, CPU, data.codec, data.classes, ours)
    if not n_classes and find_spec("transformers"):
        works["transformers' Marian"] = work(Logits(export.as_marian(job)), torch_step)
    works |= {
        "without oneDNN": work(ours, rhea_step, ONEDNN=False),
        "with torch's dropout": work(ours, rhea_step, dropout=F.dropout),
        "with all logits at once": work(ours, rhea_step, LinearCrossEntropy=PlainCrossEntropy),
        "in plain forms": work(ours, rhea_step, PLAIN=True),
    }
    n_threads = torch.get_num_threads()
    print(f"{n_threads} threads, {len(batches)} batches, {n_tokens:,} tokens")
    speeds = in_turn(works, "tokens/s")
    shapes = Counter()
    for batch in batches:
        n_rows = (2 if options.r_drop else 1) * len(batch.src)
        shapes[batch.src.shape[1], batch.tgt_in.shape[1]] += n_rows
    flops = 3 * forward_flops(ours, shapes)
    limit = matmul_flops_per_second(CPU, "fp32")
    share = statistics.median(speeds["rhea"]) / (n_tokens * limit / flops)
    print(f"{share:.0%} of the speed of matrix products, {limit / 1e9:,.0f} GFLOP/s")


class Logits(nn.Module):
    """A model of transformers as a function from ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        model.config.dropout = model.config.attention_dropout = 0.0
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):  # after each sub-layer
                is_attention = hasattr(module, "q_proj")
                module.dropout = 0.0 if is_attention else 0.1

    def forward(self, src: Tensor, tgt_in: Tensor) -> Tensor:
        mask = (src != self.model.config.pad_token_id).long()
        return self.model(src, attention_mask=mask, decoder_input_ids=tgt_in).logits


class PlainCrossEntropy:
    """`kernels.LinearCrossEntropy` of all logits at once, by torch, without R-Drop."""

    @staticmethod
    def apply(X: Tensor, W: Tensor, targets: Tensor, label_smoothing: float, _: float) -> tuple:
        logits = kernels.linear(X, W)  # (1, n, V)
        return *loss_sums(logits, targets[None], label_smoothing), count_correct(logits, targets)


@torch.inference_mode()
def greedy_without_cache(
    model: nn.Module, src: Tensor, *, bos_id: int, eos_id: int, keeps_memory: bool
) -> list:
    """decoding.greedy with the whole prefix through the decoder for each token.

    keeps_memory: the encoder runs once, and only the last position goes through the unembedding.
    """
    found = [[] for _ in src]
    limits = (src != model.pad_id).sum(dim=1) + EXTRA_LENGTH
    mask = (src != model.pad_id)[:, None, None, :]
    memory, sentences = model.encode(src, mask), torch.arange(len(src))
    tokens = torch.full((len(src), 1), bos_id)
    while len(sentences):
        if keeps_memory:
            logits = model.unembedding(model.decode(tokens, memory, mask)[:, -1])
        else:
            logits = model(src, tokens)[:, -1]
        tokens = torch.cat((tokens, logits.argmax(dim=-1)[:, None]), dim=1)
        done = (tokens[:, -1] == eos_id) | (tokens.shape[1] > limits)
        for i, ids in zip(sentences[done].tolist(), tokens[done, 1:].tolist()):
            found[i] = [token for token in ids if token != eos_id]
        keep = ~done
        tokens, limits, sentences = tokens[keep], limits[keep], sentences[keep]
        src, memory, mask = src[keep], memory[keep], mask[keep]
    return found


def load_run(run_dir: str, batch_size: int) -> tuple[jobs.Job, list[Tensor]]:
    """The translator of a run, and sentences of its test split in batches."""
    given = {"run_dir": run_dir, "test_only": True, "batch_size": batch_size, "device": "cpu"}
    job, _ = jobs.load_job(given, [])
    config = settings.extract_config(DataConfig, job.options)
    data = TextData(config, load_splits(config, ["test"]).tables, job.codec, None)
    batches = [batch.src for batch in data.load("test", data.plan("test"), CPU)]
    job.model.eval()
    return job, batches[: SENTENCES // batch_size + 1]


def decode(run_dir: str) -> None:
    """Sentences in a second of greedy search, with cached keys and values and without."""
    job, batches = load_run(run_dir, 64)
    model, ends = job.model, {"bos_id": job.codec.bos_id, "eos_id": job.codec.eos_id}
    found = {}

    def work(search: Callable) -> Callable[[], float]:
        def all_sentences() -> float:
            began = time.perf_counter()
            found[search] = [search(model, src, **ends) for src in batches]
            return sum(map(len, batches)) / (time.perf_counter() - began)

        return all_sentences

    no_cache = partial(greedy_without_cache, keeps_memory=False)
    memory = partial(greedy_without_cache, keeps_memory=True)
    searches = {"cache": greedy, "no cache": no_cache, "encoder's output kept alone": memory}
    in_turn({name: work(search) for name, search in searches.items()}, "sentences/s")
    print(f"the same tokens: {found[greedy] == found[no_cache] == found[memory]}")


def generate(run_dir: str) -> None:
    """Sentences in a second of greedy and beam search: ours, transformers' and CTranslate2's, with
    the same weights; of the length that the model gives, and of 16 tokens."""
    job, batches = load_run(run_dir, 64)
    n, found = sum(map(len, batches)), {}

    def work(name: str, search: Callable) -> Callable[[], float]:
        def all_sentences() -> float:
            began = time.perf_counter()
            with kernels.packed(job.model):
                found[name] = [row for src in batches for row in search(src)]
            return n / (time.perf_counter() - began)

        return all_sentences

    for length in (None, 16):
        for k in (1, 5):
            searches = {"rhea": our_search(job, k, length)}
            if find_spec("transformers"):
                searches["transformers"] = search_of_transformers(job, k, length)
            if find_spec("ctranslate2"):
                searches["CTranslate2"] = search_of_ctranslate2(job, k, length)
            of = f"{length} tokens" if length else "natural length"
            print(f"beam {k}, {n} sentences of {of}, {torch.get_num_threads()} threads")
            with ExitStack() as stack:
                if length:
                    limits = partial(fixed_limits, length)
                    stack.enter_context(patch.object(decoding, "length_limits", limits))
                in_turn({name: work(name, f) for name, f in searches.items()}, "sentences/s")
            for name in [*searches][1:]:
                same = sum(a == b for a, b in zip(found["rhea"], found[name]))
                print(f"the same tokens as {name}: {same} of {n}")


def fixed_limits(length: int, src_Mask: Tensor) -> Tensor:
    """`decoding.length_limits` that are all the same."""
    return torch.full((len(src_Mask),), length)


Search = Callable[[Tensor], list[list[int]]]


def our_search(job: jobs.Job, k: int, length: int | None) -> Search:
    """rhea's search. length: every translation has it, since none can end."""
    ends = {"bos_id": job.codec.bos_id, "eos_id": -1 if length else job.codec.eos_id}
    if k == 1:
        return lambda src: greedy(job.model, src, **ends)
    beam = partial(beam_search, job.model, **ends, beam_size=k, alpha=0.6)
    return lambda src: [ids for ((_, ids),) in beam(src)]


def search_of_transformers(job: jobs.Job, k: int, length: int | None) -> Search:
    """transformers' generate."""
    theirs, codec = export.as_marian(job), job.codec
    special = (codec.pad_id, codec.bos_id, codec.eos_id)
    how = {"num_beams": k, "do_sample": False, **({"length_penalty": 0.6} if k > 1 else {})}
    how |= {"min_new_tokens": length} if length else {}

    def search(src: Tensor) -> list[list[int]]:
        mask, limit = (src != codec.pad_id).long(), length or src.shape[1] + EXTRA_LENGTH
        ids = theirs.generate(src, attention_mask=mask, max_new_tokens=limit, **how)
        return [[i for i in row if i not in special] for row in ids.tolist()]

    return search


def search_of_ctranslate2(job: jobs.Job, k: int, length: int | None) -> Search:
    """CTranslate2's translate_batch, in float32."""
    import ctranslate2

    tokens, pad_id = export.all_tokens(job), job.codec.pad_id
    ids = {token: i for i, token in enumerate(tokens)}
    with tempfile.TemporaryDirectory() as name:
        export.write_ctranslate2(job, Path(name))
        threads = {"inter_threads": 1, "intra_threads": torch.get_num_threads()}
        translator = ctranslate2.Translator(name, compute_type="float32", **threads)

    def search(src: Tensor) -> list[list[int]]:
        limit = length or src.shape[1] + EXTRA_LENGTH
        results = translator.translate_batch(
            [[tokens[i] for i in row if i != pad_id] for row in src.tolist()],
            beam_size=k,
            length_penalty=0.6,
            max_decoding_length=limit,
            min_decoding_length=length or 1,
        )
        return [[ids[token] for token in result.hypotheses[0]] for result in results]

    return search


def run_speed(events: list[dict], n_tokens: list[int]) -> float:
    """Tokens in a second of a run's steps, without what was measured along with the first.

    events: of the steps, which share a speed where they were measured together.
    n_tokens: of each update.
    """
    groups = [[*group] for _, group in groupby(events, key=itemgetter("tokens_per_second"))]
    done = seconds = 0.0
    for group in groups[1:] or groups:
        n = sum(n_tokens[event["step"] - 1] for event in group)
        done, seconds = done + n, seconds + n / group[0]["tokens_per_second"]
    return done / seconds


def processes(argv: list[str]) -> None:
    """Tokens in a second of two processes, each of whose steps is two micro-batches, and of one
    that makes twice as many steps of one: the same micro-batches.

    --max-steps: steps of the two. Two runs at once that know nothing of each other show what is
    left when none waits for the other: the same processors, memory and caches are shared.
    """
    options = settings.resolve(settings.parse_args(argv)[0])
    data, _ = prepare.load_data(options)
    n = options.max_steps or 6
    plan = data.plan("train", seed=options.seed, epoch=1)[: 2 * n]
    n_tokens = data.sizes("train", plan).n_tokens.tolist()
    of_two = [sum(pair) for pair in zip(n_tokens[::2], n_tokens[1::2])]
    n_parameters: set[int] = set()

    def speed(program: list[str], threads: int, counts: list[int], at_once: int = 1) -> float:
        """The speed of fresh runs, which are ended when the last step is written down."""
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            folders = [Path(name, str(i)) for i in range(at_once)]
            command = [sys.executable, PROJECT / program[0], *program[1:], *argv]
            command += ["--device", "cpu", "--run-dir", "run", "--max-steps", len(counts)]
            groups = []
            for folder in folders:
                folder.mkdir()
                own = launched(command, folder, OMP_NUM_THREADS=str(threads))
                groups.append(stack.enter_context(own))
            found = [steps_of(*pair, len(counts)) for pair in zip(groups, folders)]
            config = RunFolder(folders[0] / "run").read_config()
            n_parameters.add(config["parameters"])
        return sum(run_speed(events, counts) for events in found)

    works = {
        "2 processes of 1 thread": lambda: speed(["ddp_main.py", "--world-size", "2"], 1, of_two),
        "1 process of 1 thread": lambda: speed(["main.py"], 1, n_tokens),
        "1 process of 2 threads": lambda: speed(["main.py"], 2, n_tokens),
        "2 runs of 1 thread at once": lambda: speed(["main.py"], 1, n_tokens, at_once=2),
    }
    print(f"{len(plan)} micro-batches of {min(n_tokens):,} to {max(n_tokens):,} tokens")
    speeds = in_turn(works, "tokens/s", warm_up=False)
    together, _, _, apart = speeds.values()
    share = 1 - statistics.median(a / b for a, b in zip(together, apart))
    n_bytes = 2 * (2 - 1) / 2 * 4 * n_parameters.pop()  # a ring of 2 sends each gradient once
    print(f"gradients that a process sends in a step: {n_bytes / 1e6:,.1f} MB")
    print(f"share of a step for sending, and waiting for the other: {share:.1%}")


def steps_of(group: Launched, folder: Path, n: int) -> list[dict]:
    """The steps that a run wrote down, once there are n."""
    path = folder / "run" / RunFolder.METRICS
    while True:
        lines = path.read_text().splitlines(True) if path.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("}\n")]
        steps = [event for event in events if event["event"] == "step"]
        if len(steps) >= n:
            return steps[:n]
        if group.launcher.poll() is not None:
            sys.exit(group.said())
        time.sleep(0.2)


if __name__ == "__main__":
    modes = {
        "train": train,
        "processes": processes,
        "decode": lambda argv: decode(*argv),
        "generate": lambda argv: generate(*argv),
    }
    if len(sys.argv) < 2 or sys.argv[1] not in modes:
        sys.exit(__doc__)
    modes[sys.argv[1]](sys.argv[2:])
