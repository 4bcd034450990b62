"""From token ids to tensors: ids, the plan of an epoch's batches, its steps, padded batches."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache import Table
from comp_utils import digest
from config import DataConfig
from errors import BadInput
from ids import encode
from tokenization import TextCodec

NO_TARGET = -100  # tgt_out where nothing is predicted; 0 is a class like any other
NO_ROWS = np.empty(0, dtype=np.int64)  # stands for a dummy batch in a plan
Plan = Sequence[np.ndarray]  # row numbers of each micro-batch


# -------------------------------------------------------------------------------------------- plans


def plan_epoch(
    lengths: np.ndarray,
    *,
    batch_size: int | None,
    batch_tokens: int | None,
    seed: int,
    epoch: int,
    pad_to: int = 0,
) -> list[np.ndarray]:
    """The micro-batches of an epoch as row numbers: each row once, similar lengths together.

    lengths: (n, 2) tokens of source and target. A micro-batch has at most batch_size rows and, with
    padding, at most batch_tokens tokens on its longer side. Which rows of equal length meet, and
    the order of the batches, change with each epoch. The plan depends on the arguments alone, not
    on the machine, the processes or library versions: NumPy guarantees the stream of PCG64.
    """
    noise = np.random.PCG64([seed, epoch])
    # One sort of numbers: source length, target length, and noise in the bits that are left.
    bits = int(lengths.max(initial=1)).bit_length()
    key = noise.random_raw(len(lengths)) >> np.uint64(2 * bits)
    for column, shift in ((0, 64 - bits), (1, 64 - 2 * bits)):
        key |= lengths[:, column].astype(np.uint64) << np.uint64(shift)
    order = key.argsort()  # faster than a stable sort, and the same unless numbers are equal
    ordered = key.take(order)
    if (ordered[1:] == ordered[:-1]).any():
        order = key.argsort(kind="stable")
    del key, ordered
    longest = np.maximum(np.maximum(lengths[:, 0], lengths[:, 1]), pad_to)[order]
    bounds = [0]
    while bounds[-1] < len(order):
        begin, n = bounds[-1], batch_size or len(order)
        if batch_tokens:
            n = min(n, max(1, batch_tokens // int(longest[begin])))
            widths = np.maximum.accumulate(longest[begin : begin + n])
            fits = np.arange(1, len(widths) + 1) * widths <= batch_tokens
            n = max(1, int(fits.sum()))  # a row that is too long has a batch of its own
        bounds.append(min(begin + n, len(order)))
    batches = [order[begin:end] for begin, end in pairwise(bounds)]
    return [batches[i] for i in np.argsort(noise.random_raw(len(batches)), kind="stable")]


def dropout_seed(seed: int, epoch: int, index: int) -> int:
    """Seed of the dropout in the micro-batch at an index of an epoch's plan.

    It depends on nothing else: not on earlier draws, on the micro-batches per step, or on the
    process. So a resumed run draws the same again without any generator's state.
    """
    name = f"dropout {seed} {epoch} {index}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) >> 1  # torch takes 63 bits


@dataclass(frozen=True)
class Step:
    """What one optimizer step trains on."""

    rows: list[np.ndarray]  # of each micro-batch of this rank; NO_ROWS for a dummy batch
    seeds: list[int]  # of the dropout in each of them
    n_micro_batches: int  # of all ranks
    n_targets: int  # of all ranks; the divisor of the loss
    n_tokens: int  # of all ranks: source and target, without padding


class PlanSizes(NamedTuple):
    """Sizes of each batch of a plan, (n,) int64 each."""

    n_rows: np.ndarray
    l_z: np.ndarray  # source positions of a row, padding included
    l_x: np.ndarray  # target positions of a row, padding included
    n_targets: np.ndarray
    n_tokens: np.ndarray  # source and target tokens of all rows, without padding

    @property
    def n_positions(self) -> np.ndarray:
        """Source and target positions of all rows, padding included."""
        return self.n_rows * (self.l_z + self.l_x)

    @property
    def padding_share(self) -> float:
        """Share of all positions that hold no token."""
        return 1 - float(self.n_tokens.sum() / self.n_positions.sum())


# ------------------------------------------------------------------------------------------ batches


@dataclass
class Batch:
    """A padded micro-batch. Its counts are known on the host, so no step waits for the device."""

    src: Tensor  # (b, l_z) int64, each row ends with eos_id, then pad_id
    tgt_in: Tensor  # (b, l_x) int64, each row begins with bos_id
    tgt_out: Tensor  # (b, l_x) int64, what is to be predicted; NO_TARGET where nothing is
    n_targets: int
    n_tokens: int  # source and target, without padding

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = (change(t) for t in (self.src, self.tgt_in, self.tgt_out))
        return Batch(*tensors, self.n_targets, self.n_tokens)

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device. Only copies from pinned memory to CUDA are asynchronous: on MPS
        the source could be freed too early (pytorch issue 189690)."""
        return self._map(
            lambda t: t.to(device, non_blocking=device.type == "cuda" and t.is_pinned())
        )

    def repeat(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """src, tgt_in and tgt_out of the rows n times, one copy after the other."""
        tensors = (self.src, self.tgt_in, self.tgt_out)
        return tensors if n == 1 else tuple(t.repeat(n, 1) for t in tensors)

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory, which is copied to CUDA asynchronously."""
        return self._map(Tensor.pin_memory)


def pad(rows: Sequence[Sequence[int]], value: int, width: int = 0) -> Tensor:
    """Rows of unequal length as one tensor (b, max(width, longest)), padded on the right."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    ids = np.full((len(rows), max(width, lengths.max())), value, dtype=np.int64)
    here = np.arange(ids.shape[1]) < lengths[:, None]  # (b, l)
    ids[here] = np.concatenate(rows, dtype=np.int64, casting="unsafe")  # an empty list is of floats
    return torch.from_numpy(ids)


def map_ahead(
    function: Callable[[Any], Any], items: Iterable[Any], n_threads: int
) -> Iterator[Any]:
    """function(item) of each item, in order; n_threads compute a few items ahead, if not 0."""
    if not n_threads:
        yield from map(function, items)
        return
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class TextData:
    """Splits as ids, and batches of them.

    Texts, ids and lengths are memory-mapped; plans take memory, 8 bytes a row each.
    classes: names of the labels; None for translation, where the target is text.
    """

    def __init__(
        self,
        config: DataConfig,
        splits: dict[str, Table],
        codec: TextCodec,
        classes: list[str] | None,
    ) -> None:
        self.config, self.texts, self.codec, self.classes = config, splits, codec, classes
        self._plans: dict[str, tuple[tuple[int, int], list[np.ndarray]]] = {}
        self.pad_to = (config.pad_to, 0 if classes else config.pad_to)  # of source, of target
        self.fingerprint = digest({split: texts._fingerprint for split, texts in splits.items()})
        self.rows = {
            split: encode(texts, codec, config.max_length, classes)
            for split, texts in splits.items()
        }
        if "train" in splits and not len(self.usable("train")):
            raise BadInput(
                f"--dataset {config.dataset}: no training pair can be used ({self.counts('train')})"
                "; give other data or a larger --max-length"
            )

    def usable(self, split: str) -> np.ndarray:
        """Row numbers that are used. Training leaves out pairs with an empty or a cut side, which
        would teach a translator to omit text; validation and test use every sentence."""
        lengths = self.rows[split].lengths
        if split != "train" or self.classes:
            return np.arange(len(lengths))
        longer, shorter = (take(*lengths.T) for take in (np.maximum, np.minimum))
        return np.flatnonzero((longer <= self.config.max_length) & (shorter > 1))

    def plan(self, split: str, *, seed: int = 0, epoch: int = 0) -> list[np.ndarray]:
        """The micro-batches of one epoch; training counts epochs from 1. A split's last is kept."""
        if self._plans.get(split, (None, []))[0] != (seed, epoch):
            self._plans[split] = (seed, epoch), self._new_plan(split, seed, epoch)
        return self._plans[split][1]

    def _new_plan(self, split: str, seed: int, epoch: int) -> list[np.ndarray]:
        c, rows = self.config, self.usable(split)
        plan = plan_epoch(
            self._cut_lengths(split, rows),
            batch_size=c.batch_size,
            batch_tokens=c.batch_tokens,
            seed=seed,
            epoch=epoch,
            pad_to=c.pad_to,
        )
        return [rows[batch] for batch in plan]

    def steps(
        self,
        plan: Plan,
        *,
        seed: int,
        epoch: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        begin: int = 0,
    ) -> list[Step]:
        """The steps of an epoch's plan from micro-batch `begin` on.

        A step has accumulate * world_size micro-batches; every world_size-th is one rank's, so
        ranks and accumulation make the same steps. The last step may have fewer.
        """
        sizes, n = self.sizes("train", plan), accumulate * world_size
        steps = []
        for first in range(begin, len(plan), n):
            end = min(first + n, len(plan))
            own = range(first + rank, end, world_size)
            steps.append(
                Step(
                    rows=[plan[i] for i in own] or [NO_ROWS],
                    seeds=[dropout_seed(seed, epoch, i) for i in own or [first]],
                    n_micro_batches=end - first,
                    n_targets=int(sizes.n_targets[first:end].sum()),
                    n_tokens=int(sizes.n_tokens[first:end].sum()),
                )
            )
        return steps

    def _cut_lengths(self, split: str, rows: np.ndarray) -> np.ndarray:
        lengths = self.rows[split].lengths.take(rows, axis=0)  # (n, 2)
        return np.minimum(lengths, self.config.max_length, out=lengths)

    def sizes(self, split: str, plan: Plan) -> PlanSizes:
        """Sizes of each batch of a plan."""
        if not plan:
            return PlanSizes(*np.zeros((5, 0), dtype=np.int64))
        n_rows = np.array([len(rows) for rows in plan])
        begins = np.concatenate(([0], n_rows.cumsum()[:-1]))
        lengths = self._cut_lengths(split, np.concatenate(plan))  # (rows of all batches, 2)
        widths = np.maximum(np.maximum.reduceat(lengths, begins), self.pad_to)  # (batches, 2)
        tokens = np.add.reduceat(lengths, begins)  # (batches, 2)
        return PlanSizes(n_rows, widths[:, 0], widths[:, 1], tokens[:, 1], tokens.sum(axis=1))

    def largest_first(self, split: str, plan: Plan) -> list[np.ndarray]:
        """The batches of a plan in order of their positions, then of their width, largest first."""
        sizes = self.sizes(split, plan)
        order = np.lexsort((sizes.l_z + sizes.l_x, sizes.n_positions))[::-1]
        return [plan[i] for i in order]

    def plan_fingerprint(self, seed: int) -> str:
        """Two runs with the same one train on the same ids in the same batches."""
        plan = self.plan("train", seed=seed, epoch=1)
        numbers = (np.fromiter(map(len, plan), dtype="<i8"), np.concatenate(plan).astype("<i8"))
        plan_digest = hashlib.sha256(b"".join(map(memoryview, numbers))).hexdigest()
        return digest(self.rows["train"].fingerprint, self.config.pad_to, plan_digest)

    def counts(self, split: str) -> str:
        """Sentences and tokens of a split, and how many were not used as they are."""
        from pyarrow import compute

        lengths, longest = self.rows[split].lengths, self.config.max_length
        cut = "left out" if split == "train" and not self.classes else "cut"
        n_joined = compute.sum(self.texts[split].data.column("line_breaks")).as_py()
        numbers = {
            "empty": (lengths == 1)[:, : 1 if self.classes else 2].any(axis=1).sum(),
            f"over {longest} tokens and {cut}": (lengths > longest).any(axis=1).sum(),
            "unknown tokens": self.rows[split].n_unknown.sum(),
            "with line breaks, now spaces": n_joined,
        }
        said = [f"{n:,} {what}" for what, n in numbers.items() if n]
        return ", ".join([f"{len(lengths):,} sentences", f"{lengths.sum():,} tokens", *said])

    def report(self, split: str, seed: int = 0) -> str:
        """One line about a split, so that nothing is cut or left out in silence."""
        plan = self.plan(split, seed=seed, epoch=1) if split == "train" else self.plan(split)
        padding = self.sizes(split, plan).padding_share
        return f"{split}: {self.counts(split)}, {padding:.1%} padding"

    def load(self, split: str, plan: Plan, device: torch.device) -> Iterator[Batch]:
        """The batches of a plan on a device, in order; a dummy batch for NO_ROWS."""
        pairs = self.rows[split].pairs

        def read(rows: np.ndarray) -> Batch:
            batch = self.collate(pairs(rows)) if len(rows) else self.dummy_batch()
            return batch.pin_memory() if device.type == "cuda" else batch

        for batch in map_ahead(read, plan, self.config.num_workers):
            yield batch.to(device)

    def load_steps(
        self, steps: Sequence[Step], device: torch.device
    ) -> Iterator[tuple[Step, list[Batch]]]:
        """Each step with this rank's micro-batches on a device."""
        plan = list(chain.from_iterable(step.rows for step in steps))
        batches = self.load("train", plan, device)
        for step in steps:
            yield step, list(islice(batches, len(step.rows)))

    def dummy_batch(self) -> Batch:
        """A batch without targets, for a rank that has none in a step while others have.

        Two rows and columns: torch.compile makes kernels of their own for sizes of 1.
        """
        pair = ([self.codec.eos_id] * 2, [0] if self.classes else [0, 0])
        batch = self.collate([pair] * 2)
        return replace(batch, tgt_out=batch.tgt_out.fill_(NO_TARGET), n_targets=0, n_tokens=0)

    def collate(self, pairs: list[tuple[Sequence[int], Sequence[int]]]) -> Batch:
        """Pads pairs of source and target to one batch. A classifier's decoder sees the start
        token alone."""
        src, tgt = zip(*pairs)
        bos_id, pad_id, (src_width, tgt_width) = self.codec.bos_id, self.codec.pad_id, self.pad_to
        tgt_in = pad([ids[:-1] for ids in tgt], pad_id, tgt_width - 1)
        n_targets = sum(map(len, tgt))
        return Batch(
            src=pad(src, pad_id, src_width),
            tgt_in=torch.nn.functional.pad(tgt_in, (1, 0), value=bos_id),
            tgt_out=pad(tgt, NO_TARGET, tgt_width),
            n_targets=n_targets,
            n_tokens=sum(map(len, src)) + n_targets,
        )
