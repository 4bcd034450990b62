"""How a model is trained and tested. Any model of `models.py` will do.

Source of the training rules: *Attention Is All You Need* (AIAYN, arXiv 1706.03762), section 5.
"""

import hashlib
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from comp_utils import (
    BadInput,
    Diverged,
    Progress,
    RunFailed,
    Stopped,
    StopSignals,
    autocast,
    grad_scaler,
    is_out_of_memory,
    option,
    synchronize,
)
from data import NO_TARGET, Batch, TextData
from ddp_utils import (
    agree_to_stop,
    defer_sync,
    gather,
    is_lost_peer,
    rank,
    sum_across_ranks,
    world_size,
    wrap,
)
from run_folder import RunFolder


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained."""

    epochs: int = option(10, "passes over the training split, in all", low=1)
    max_steps: int | None = option(
        None, "updates, in all", low=1, unset="as many as the epochs have"
    )
    lr: float | None = option(
        None,
        "learning rate at its highest",
        above=0.0,
        below=math.inf,
        unset="the paper's (d-model x warmup-steps)^-0.5",
    )
    schedule: str = option(
        "inverse_sqrt",
        "how the learning rate falls after its warm-up; the first is the paper's",
        choices=("inverse_sqrt", "linear", "cosine", "constant"),
    )
    warmup_steps: int = option(4000, "updates in which the learning rate rises from 0", low=1)
    label_smoothing: float = option(
        0.1, "share of the target spread over all classes", low=0.0, below=1.0
    )
    r_drop: float = option(
        0.0,
        "alpha of R-Drop: each sentence is seen twice, and its two answers are drawn together",
        low=0.0,
        below=math.inf,
    )
    weight_decay: float = option(
        0.0,
        "share of lr by which matrices shrink in an update (AdamW); 0 is Adam",
        low=0.0,
        below=math.inf,
    )
    max_norm: float = option(
        1.0, "longest gradient; a longer one is shortened to it; inf: none is", above=0.0
    )
    accumulate: int = option(1, "micro-batches in an update", low=1)
    patience: int | None = option(
        None, "epochs without a better validation before the run stops", low=1, unset="never stops"
    )
    average_checkpoints: int = option(
        1, "epochs whose weights are averaged, the last ones of the run; 1: the best one", low=1
    )
    checkpoint_every: int | None = option(
        None, "updates from one checkpoint to the next", low=1, unset="one after each epoch"
    )


# ------------------------------------------------------------------------------------ learning rate


def paper_lr(*, d_model: int, warmup_steps: int) -> float:
    """The peak of the paper's learning rate, (d_model * warmup_steps)^-0.5: equation 3 there."""
    return (d_model * warmup_steps) ** -0.5


def lr_at(step: int, *, peak: float, schedule: str, warmup_steps: int, n_steps: int) -> float:
    """Learning rate of an update: peak * step / warmup_steps at first, then falling from the peak.

    With schedule "inverse_sqrt" and peak `paper_lr` this is AIAYN, section 5.3, equation 3:
    d_model^-0.5 * min(step^-0.5, step * warmup_steps^-1.5).
    step: updates, counted from 1. "linear" and "cosine" reach 0 one update after the last.
    Raises ValueError if step or warmup_steps is below 1.
    """
    if step < 1 or warmup_steps < 1:
        raise ValueError(f"lr_at: step {step} and warmup_steps {warmup_steps} must be at least 1")
    if step <= warmup_steps:
        return peak * step / warmup_steps
    done = (step - warmup_steps) / max(1, n_steps + 1 - warmup_steps)  # 0 at the peak, 1 at the end
    factor = {
        "inverse_sqrt": math.sqrt(warmup_steps / step),
        "linear": max(0.0, 1 - done),
        "cosine": (1 + math.cos(math.pi * min(1.0, done))) / 2,
        "constant": 1.0,
    }
    return peak * factor[schedule]


# --------------------------------------------------------------------------------------------- loss


def loss_sums(logits: Tensor, tgt_out: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy with smoothed labels, and without, each summed over the targets, in nats.

    The target has probability 1 - label_smoothing, and label_smoothing is spread evenly over all n
    classes: loss = -(1 - s) log p[target] - s / n * sum_k log p[k].
    Source: AIAYN, section 5.4 (after Szegedy et al., arXiv 1512.00567, section 7).
    Shapes: logits (b, l_x, n), tgt_out (b, l_x), NO_TARGET counts nothing; returns two (), float32.
    """
    log_p = logits.float().log_softmax(dim=-1)  # (b, l_x, n); 16 bits would lose the small ones
    there = tgt_out != NO_TARGET  # (b, l_x)
    nll = -log_p.gather(-1, tgt_out.clamp(min=0)[..., None])[..., 0] * there
    smoothed = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(dim=-1) * there
    return smoothed.sum(), nll.detach().sum()


def disagreement_sum(logits: Tensor, tgt_out: Tensor) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2, summed over the targets, in nats.

    p is the first half of the batch and q the second: the same sentences under other dropout.
    Source: R-Drop (arXiv 2106.14448), equation 2.
    Shapes: logits (2 b, l_x, n), tgt_out (2 b, l_x), whose halves are alike; returns (), float32.
    """
    log_p, log_q = logits.float().log_softmax(dim=-1).chunk(2)  # (b, l_x, n)
    both = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)  # (b, l_x)
    return (both * (tgt_out.chunk(2)[0] != NO_TARGET)).sum() / 2


# ----------------------------------------------------------------------------------------- training


def build_optimizer(
    model: nn.Module, *, weight_decay: float, fused: bool = True
) -> torch.optim.Optimizer:
    """Adam with the paper's constants (section 5.3); matrices decay (AdamW), vectors do not.

    fused: one kernel for all parameters, which cpu, cuda and mps have.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-9, fused=fused)


def add_gradients(
    model: nn.Module,
    micro_batches: list[Batch],
    scaler: torch.amp.GradScaler,
    precision: AbstractContextManager,
    *,
    label_smoothing: float,
    r_drop: float = 0.0,
    n_targets: int | None = None,
    seeds: list[int] | None = None,
) -> Tensor:
    """The gradients of one update. Returns (2,), still on the device, so that no step waits for it:
    the sum over the update's targets of the cross-entropy without smoothing, in nats, and how many
    were right.

    micro_batches: this rank's. n_targets: of the whole update, over all ranks; left out, those of
    micro_batches. Each micro-batch is divided by the targets of the whole update: several small
    ones and one large one, on one process or on many, are the same update. seeds: what dropout
    draws from in each. Raises RunFailed.
    """
    n_targets = n_targets or sum(batch.n_targets for batch in micro_batches)
    n_times = 2 if r_drop else 1
    share = world_size() / (n_times * n_targets)  # the mean over ranks takes world_size off again
    sums = []
    for i, batch in enumerate(micro_batches):
        if seeds:
            torch.manual_seed(seeds[i])
        src, tgt_in = batch.src.repeat(n_times, 1), batch.tgt_in.repeat(n_times, 1)
        tgt_out = batch.tgt_out.repeat(n_times, 1)
        with room_for(batch), defer_sync(model, last=batch is micro_batches[-1]):
            with precision:
                logits = model(src, tgt_in)  # (b, l_x, n)
            loss_sum, nll_sum = loss_sums(logits, tgt_out, label_smoothing)
            if r_drop:
                loss_sum = loss_sum + r_drop * disagreement_sum(logits, tgt_out)
            scaler.scale(loss_sum * share).backward()
        sums.append(torch.stack((nll_sum, count_correct(logits, tgt_out))) / n_times)
    return sum_across_ranks(torch.stack(sums).sum(dim=0))


def train_step(
    model: nn.Module,
    micro_batches: list[Batch],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: AbstractContextManager,
    *,
    lr: float,
    max_norm: float,
    **loss: Any,
) -> Tensor:
    """One update. loss: what else `add_gradients` takes. Returns what it does."""
    sums = add_gradients(model, micro_batches, scaler, precision, **loss)
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)  # before clipping, or max_norm means nothing
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return sums


@contextmanager
def room_for(batch: Batch) -> Iterator[None]:
    """Says which batch the memory did not hold. Raises RunFailed."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        (n, l_z), l_x = batch.src.shape, batch.tgt_in.shape[1]
        raise RunFailed(
            f"out of memory at a batch of {n} sentences, {l_z} source and {l_x} target tokens long;"
            " give a smaller --batch-size or --batch-tokens (as much more --accumulate keeps the "
            "update the same), or a smaller --max-length"
        ) from None


def count_correct(logits: Tensor, tgt_out: Tensor) -> Tensor:
    """How many targets have the highest logit, () float32. Shapes as in `loss_sums`."""
    highest = logits.detach().max(dim=-1).indices  # (b, l_x); on a CPU argmax takes twice as long
    return (highest == tgt_out).sum(dtype=torch.float32)


# ------------------------------------------------------------------------------------------ testing


def in_words(scores: dict[str, Any]) -> str:
    """loss 1.2345, accuracy 67.89%, …"""
    words = []
    for name, value in scores.items():
        text = f"{value:.2%}" if name == "accuracy" else value
        text = f"{value:.4f}" if isinstance(text, float) else text
        words.append(f"{name.replace('_', ' ')} {text}")
    return ", ".join(words)


@dataclass(frozen=True)
class Evaluation:
    """What a model does on one split, dropout off."""

    loss: float  # nats per target, without label smoothing
    accuracy: float  # share of the targets that were found; of a translation, given those before
    confusion: np.ndarray | None  # sentences by [true, predicted] class

    @property
    def macro_f1(self) -> float:
        """Mean over the classes of F1 = 2 TP / (2 TP + FP + FN); 0 for one that nowhere occurs."""
        n = self.confusion.sum(axis=0) + self.confusion.sum(axis=1)
        return float(np.mean(2 * self.confusion.diagonal() / np.maximum(n, 1)))

    @property
    def scores(self) -> dict[str, float]:
        """All figures, by name."""
        if self.confusion is None:
            task = {"perplexity": math.exp(min(self.loss, 700.0))}  # above that a float overflows
        else:
            task = {"macro_f1": self.macro_f1}
        return {"loss": self.loss, "accuracy": self.accuracy, **task}

    @property
    def rank(self) -> tuple[float, ...]:
        """The greater, the better: a classifier by accuracy, a translator by loss."""
        return (-self.loss,) if self.confusion is None else (self.accuracy, -self.loss)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: TextData,
    split: str,
    plan: list[np.ndarray] | None = None,
    *,
    device: torch.device,
    precision: str,
) -> Evaluation:
    """The model on every sentence of a split, or of a plan of it. Raises RunFailed.

    Batches are dealt out to the ranks, and their sums added up in the order of the plan: any number
    of processes gives the same digits.
    """
    model.eval()
    plan = plan or data.plan(split)
    mine = range(rank(), len(plan), world_size())
    sums = torch.zeros(len(plan), 2, device=device)
    n_classes = len(data.classes or ())
    confusion = torch.zeros(n_classes, n_classes, dtype=torch.int64)
    for i, batch in zip(mine, data.batches(split, [plan[i] for i in mine], device)):
        with room_for(batch), autocast(precision, device):
            logits = model(batch.src, batch.tgt_in)  # (b, l_x, n)
        nll_sum = loss_sums(logits, batch.tgt_out, 0.0)[1]
        sums[i] = torch.stack((nll_sum, count_correct(logits, batch.tgt_out)))
        if data.classes:
            pairs = (batch.tgt_out[:, 0].cpu(), logits[:, 0].argmax(dim=-1).cpu())  # (b), (b)
            confusion.index_put_(pairs, torch.tensor(1), accumulate=True)
    nll, n_correct = sum_across_ranks(sums).cpu().double().sum(dim=0).tolist()
    confusion = sum_across_ranks(confusion).numpy() if data.classes else None
    n_targets = sum(data.count(split, rows)[0] for rows in plan)
    return Evaluation(nll / n_targets, n_correct / n_targets, confusion)


# ------------------------------------------------------------------------------------------- a run


NO_ROWS = np.empty(0, dtype=np.int64)  # the plan of a filler


class StepLog:
    """Writes each update to metrics.jsonl and the progress bar, asking the device once a second.

    To ask for a loss is to wait for the device, so losses stay there until enough are together.
    """

    SECONDS_BETWEEN_QUESTIONS = 1.0

    def __init__(self, folder: RunFolder, progress: Progress, state: "TrainingState") -> None:
        self.folder, self.progress, self.state = folder, progress, state
        self.waiting: list[tuple[int, float, int, int, Tensor]] = []
        self.asked = time.perf_counter()

    def add(self, step: int, lr: float, n_targets: int, n_tokens: int, sums: Tensor) -> None:
        """Takes note of an update. Raises RunFailed when a loss turns out not to be finite."""
        self.waiting.append((step, lr, n_targets, n_tokens, sums))
        if time.perf_counter() - self.asked > self.SECONDS_BETWEEN_QUESTIONS:
            self.ask()

    def ask(self) -> None:
        """Fetches the losses that wait on the device, and writes them down."""
        if not self.waiting:
            return
        state = self.state
        fetched = torch.stack([sums for *_, sums in self.waiting]).tolist()
        now = time.perf_counter()
        speed = sum(n_tokens for *_, n_tokens, _ in self.waiting) / (now - self.asked)
        for (step, lr, n_targets, n_tokens, _), (nll, n_correct) in zip(self.waiting, fetched):
            loss = nll / n_targets
            if not math.isfinite(loss):
                raise Diverged(
                    f"step {step}: the loss is {loss} at learning rate {lr:.3g}; give a smaller "
                    "--lr or more --warmup-steps",
                    step - 1,
                )
            facts = {"step": step, "epoch": state.epoch, "loss": loss, "lr": lr}
            self.folder.log(event="step", **facts, tokens_per_second=speed)
            state.nll, state.n_correct = state.nll + nll, state.n_correct + n_correct
            state.n_targets, state.n_tokens = state.n_targets + n_targets, state.n_tokens + n_tokens
        text = f"loss {loss:.3f}, lr {lr:.2e}, {speed:,.0f} tokens/s"
        self.progress.update(len(self.waiting), text)
        self.waiting, self.asked = [], now


@dataclass
class TrainingState:
    """How far a training has come, in plain values, for a checkpoint to hold."""

    step: int = 0  # updates that are done
    epoch: int = 1  # the one that is trained on, or validated, now
    n_micro_batches: int = 0  # of its plan that are done
    seconds: float = 0.0  # that they took
    nll: float = 0.0  # over their targets, in nats
    n_correct: float = 0.0
    n_targets: int = 0
    n_tokens: int = 0  # of source and target
    best: tuple[float, ...] = ()  # Evaluation.rank of the best epoch
    best_epoch: int = 0  # 0: none was validated

    def next_epoch(self) -> None:
        """The epoch is trained on and validated."""
        fresh = TrainingState(self.step, self.epoch + 1, best=self.best, best_epoch=self.best_epoch)
        self.__dict__.update(fresh.__dict__)


def dropout_seed(seed: int, epoch: int, index: int) -> int:
    """What dropout draws from in the micro-batch of that place in an epoch's plan.

    It depends on nothing else: not on what was drawn before, the micro-batches in an update, or the
    process that has it. So a run that goes on needs no generator's state to draw the same again.
    """
    name = f"dropout {seed} {epoch} {index}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) >> 1  # torch has 63 bits


class Trainer:
    """A training run: update after update, epoch after epoch, checkpoint after checkpoint.

    model: already on its device. After `train` it holds the weights chosen, as the folder does:
    after each epoch the model is validated, and a better one saved; at the end the average of the
    last epochs, if one was asked for, takes the place of the best.
    inspect: called after the validation of each epoch, it returns further scores to write down.
    """

    def __init__(
        self,
        model: nn.Module,
        data: TextData,
        config: TrainingConfig,
        folder: RunFolder,
        *,
        device: torch.device,
        precision: str,
        seed: int,
        compiled: bool,
        signals: StopSignals,
    ) -> None:
        self.model, self.data, self.config, self.folder = model, data, config, folder
        self.device, self.precision, self.seed = device, precision, seed
        self.compiled, self.signals = compiled, signals
        self.inspect: Callable[[int], dict[str, float]] = lambda epoch: {}
        self.optimizer = build_optimizer(model, weight_decay=config.weight_decay)
        self.scaler = grad_scaler(precision, device)
        self.runner = wrap(model, device)
        self.runner = torch.compile(self.runner, dynamic=True) if compiled else self.runner
        self.state = TrainingState()
        self.last_epochs: deque[dict[str, Tensor]] = deque(maxlen=config.average_checkpoints)
        self.saved_step: int | None = None  # of the last checkpoint
        self.began: float | None = None  # when the clock was started, if it runs
        # Batches have the same sizes in every epoch: only which of the like go together changes.
        self.n_plan = len(self.plan(1))
        self.n_steps = self.plan_steps()

    @property
    def updates_of_an_epoch(self) -> int:
        """Updates of a whole epoch."""
        return self.updates_of(self.n_plan)

    def updates_of(self, n_micro_batches: int) -> int:
        """Updates that so many micro-batches make, over all ranks."""
        return math.ceil(n_micro_batches / (self.config.accumulate * world_size()))

    def plan_steps(self) -> int:
        """Updates of the whole run: those done, the rest of this epoch, the epochs to come."""
        state, config = self.state, self.config
        rest = self.updates_of(self.n_plan - state.n_micro_batches)
        n_steps = state.step + rest + (config.epochs - state.epoch) * self.updates_of_an_epoch
        return min(n_steps, config.max_steps or n_steps)

    @property
    def is_over(self) -> bool:
        """Whether every epoch asked for is trained on and validated, or no better one came."""
        state, config = self.state, self.config
        waited = state.epoch - 1 - state.best_epoch  # epochs without a better one
        return (
            state.epoch > config.epochs
            or (state.n_micro_batches == 0 and state.step >= (config.max_steps or math.inf))
            or (config.patience is not None and state.best_epoch > 0 and waited >= config.patience)
        )

    def train(self) -> None:
        """Trains to the end, from where the state is. Raises Stopped and RunFailed."""
        if not self.is_over:
            if self.n_steps <= self.config.warmup_steps:
                print(
                    f"warning: {self.n_steps} updates in all, and --warmup-steps "
                    f"{self.config.warmup_steps}: the learning rate never reaches its height; give "
                    "more --epochs or fewer --warmup-steps",
                    file=sys.stderr,
                )
            self.rehearse()
        try:
            if not self.is_over and self.saved_step is None:
                with self.signals.held():
                    self.save()
            while not self.is_over:
                self.train_epoch()
                self.validate()
        except Stopped:
            self.save()
            raise
        except Diverged as error:
            if error.step == self.saved_step:  # finite or not, nothing can come of these weights
                self.saved_step = self.folder.drop_last_checkpoint()
            raise
        except RuntimeError as error:
            if self.signals.received and is_lost_peer(error):  # it was asked to stop, too
                raise Stopped(self.signals.received) from None
            raise
        self.finish()

    def rehearse(self) -> None:
        """The longest batches once before any clock runs, so that what cannot fit fails at once.

        torch.compile makes its kernels meanwhile. No trace is left: no gradient, no draw.
        """
        began = time.perf_counter()
        plan = self.data.longest_first("train", self.plan(1))
        plan = [plan[0], plan[-1]] if self.compiled else plan[:1]  # a second size makes it dynamic
        self.runner.train()
        try:
            for batch in self.data.batches("train", plan, self.device):
                add_gradients(
                    self.runner,
                    [batch],
                    self.scaler,
                    autocast(self.precision, self.device),
                    label_smoothing=self.config.label_smoothing,
                    r_drop=self.config.r_drop,
                )
        except torch._dynamo.exc.TorchDynamoException as error:  # no C++ compiler, most of the time
            reason = str(error).strip().splitlines()[0]
            raise RunFailed(f"--compile: {reason}; install it, or leave it out") from None
        self.optimizer.zero_grad(set_to_none=True)
        plan = self.data.longest_first("validation", self.data.plan("validation"))
        self.evaluate(plan[:1])
        if self.compiled:
            print(f"compiled in {time.perf_counter() - began:.1f} s")

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The micro-batches of an epoch."""
        return self.data.plan("train", seed=self.seed, epoch=epoch)

    def evaluate(self, plan: list[np.ndarray] | None = None) -> Evaluation:
        """The model on the validation split."""
        where = {"device": self.device, "precision": self.precision}
        return evaluate(self.model, self.data, "validation", plan, **where)

    def deal(self, plan: list[np.ndarray], begin: int = 0) -> list[range]:
        """The updates of a plan from a place on: the places of their micro-batches, of all ranks.
        Those at every world_size-th place are one rank's."""
        n = self.config.accumulate * world_size()
        return [range(i, min(i + n, len(plan))) for i in range(begin, len(plan), n)]

    def batches(
        self, plan: list[np.ndarray], updates: list[range]
    ) -> Iterator[tuple[list[Batch], range]]:
        """This rank's micro-batches of each update, or a filler; and the places of all ranks'."""
        mine = [
            [plan[i] for i in places[rank() :: world_size()]] or [NO_ROWS] for places in updates
        ]
        batches = self.data.batches("train", list(chain.from_iterable(mine)), self.device)
        for places, rows in zip(updates, mine):
            yield list(islice(batches, len(rows))), places

    def train_epoch(self) -> None:
        """The rest of the epoch's updates."""
        state, config = self.state, self.config
        plan = self.plan(state.epoch)
        updates = self.deal(plan, state.n_micro_batches)[: self.n_steps - state.step]
        n_done = self.updates_of(state.n_micro_batches)
        title = f"epoch {state.epoch}/{config.epochs}"
        progress = Progress(n_done + len(updates), title, n_done)
        self.log = StepLog(self.folder, progress, state)
        self.runner.train()
        self.start_clock()
        try:
            with self.signals.held():  # else ranks would stop after different updates
                for micro_batches, places in self.batches(plan, updates):
                    lr = self.lr_of(state.step + 1)
                    counts, sums = self.step(micro_batches, plan, places, lr)
                    state.step += 1
                    state.n_micro_batches += len(places)
                    self.log.add(state.step, lr, *counts, sums)
                    if config.checkpoint_every and state.step % config.checkpoint_every == 0:
                        self.save()
                        self.start_clock()
                    if agree_to_stop(bool(self.signals.received), state.step):
                        break
                # None goes on to the validation without the others.
                received = max(gather(self.signals.received))
            if received:
                raise Stopped(received)
            self.stop_clock()
        finally:
            progress.close()

    def lr_of(self, step: int) -> float:
        """The learning rate of an update of this run."""
        return lr_at(
            step,
            peak=self.config.lr,
            schedule=self.config.schedule,
            warmup_steps=self.config.warmup_steps,
            n_steps=self.n_steps,
        )

    def step(
        self, micro_batches: list[Batch], plan: list[np.ndarray], places: range, lr: float
    ) -> tuple[tuple[int, int], Tensor]:
        """One update from this rank's micro_batches and all that is at these places of the plan.

        Returns its targets and tokens over all ranks, and what `train_step` returns.
        """
        counts = [self.data.count("train", plan[place]) for place in places]
        n_targets, n_tokens = map(sum, zip(*counts))
        mine = places[rank() :: world_size()] or [0]
        sums = train_step(
            self.runner,
            micro_batches,
            self.optimizer,
            self.scaler,
            autocast(self.precision, self.device),
            lr=lr,
            max_norm=self.config.max_norm,
            label_smoothing=self.config.label_smoothing,
            r_drop=self.config.r_drop,
            n_targets=n_targets,
            seeds=[dropout_seed(self.seed, self.state.epoch, place) for place in mine],
        )
        return (n_targets, n_tokens), sums

    def start_clock(self) -> None:
        """What follows is training, and counts for the seconds of the epoch."""
        synchronize(self.device)
        self.began = self.log.asked = time.perf_counter()

    def stop_clock(self) -> None:
        """Training is done for now. Raises RunFailed when a loss turns out not to be finite."""
        if self.began is not None:
            synchronize(self.device)
            self.state.seconds += time.perf_counter() - self.began
            self.began = None
            self.log.ask()

    def validate(self) -> None:
        """Ends an epoch: validation, the better weights saved, one line, a checkpoint."""
        state, config = self.state, self.config
        result = self.evaluate()
        if not math.isfinite(result.loss):
            raise Diverged(
                f"step {state.step}: the validation loss is {result.loss}; give a smaller --lr",
                state.step,
            )
        scores = {**result.scores, **self.inspect(state.epoch)}
        trained = {"loss": state.nll, "accuracy": state.n_correct}
        trained = {name: value / state.n_targets for name, value in trained.items()}
        plan = self.plan(state.epoch)[: state.n_micro_batches]
        with self.signals.held():
            better = state.best_epoch == 0 or result.rank > state.best
            if better:
                state.best, state.best_epoch = result.rank, state.epoch
                self.folder.save_weights(self.model)
            self.folder.log(
                event="epoch",
                epoch=state.epoch,
                seconds=state.seconds,
                updates=self.updates_of(len(plan)),
                updates_of_an_epoch=self.updates_of_an_epoch,
                tokens=state.n_tokens,
                padding_share=self.data.padding_share("train", plan),
                **{f"train_{name}": value for name, value in trained.items()},
                **{f"validation_{name}": value for name, value in scores.items()},
            )
            print(
                f"epoch {state.epoch}: {state.seconds:.1f} s, "
                f"{state.n_tokens / state.seconds:,.0f} tokens/s; "
                f"training {in_words(trained)}; validation {in_words(scores)}"
                f"{', the best so far' if better else ''}",
                flush=True,
            )
            if config.average_checkpoints > 1:
                weights = self.model.named_parameters()
                self.last_epochs.append({name: p.detach().cpu().clone() for name, p in weights})
            state.next_epoch()
            self.save()

    def finish(self) -> None:
        """Leaves the weights chosen in the model and in the folder."""
        if len(self.last_epochs) > 1:
            self.model.load_state_dict(average(self.last_epochs), strict=False)  # tied ones: once
            self.folder.save_weights(self.model)
            words = in_words(self.evaluate().scores)
            print(f"mean of the last {len(self.last_epochs)} epochs: validation {words}")
        else:
            self.folder.load_weights(self.model)

    def save(self) -> None:
        """Writes a checkpoint. Raises RunFailed, and writes none, if the weights are not finite."""
        self.stop_clock()
        weights = self.model.state_dict()
        if not torch.stack([w.isfinite().all() for w in weights.values()]).all():
            lr = self.optimizer.param_groups[0]["lr"]
            raise RunFailed(
                f"step {self.state.step}: weights are not finite after learning rate {lr:.3g}; "
                "give a smaller --lr or more --warmup-steps"
            )
        self.folder.save_checkpoint(
            {
                "state": asdict(self.state),
                "model": weights,
                "optimizer": self.optimizer.state_dict()["state"],
                "scaler": self.scaler.state_dict(),
                "last_epochs": list(self.last_epochs),
            }
        )
        self.saved_step = self.state.step

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Takes up what `save` wrote. Raises BadInput if it is not this run's."""
        try:
            state = TrainingState(**checkpoint["state"])
            for f in fields(state):
                if type(getattr(state, f.name)) is not type(f.default):
                    raise TypeError(f"{f.name} is {getattr(state, f.name)!r}")
            if not all(isinstance(value, float) for value in state.best):
                raise TypeError(f"best is {state.best!r}")
            if state.epoch < 1 or not 0 <= state.n_micro_batches <= self.n_plan or state.step < 0:
                raise ValueError(f"no place in this run: {state}")
            shapes = {name: (p.shape, p.dtype) for name, p in self.model.named_parameters()}
            for weights in checkpoint["last_epochs"]:
                if {name: (w.shape, w.dtype) for name, w in weights.items()} != shapes:
                    raise ValueError("last_epochs: other names or shapes than the model has")
            self.model.load_state_dict(checkpoint["model"])
            restore_optimizer(self.optimizer, checkpoint["optimizer"])
            if checkpoint["scaler"] and self.scaler.is_enabled():
                self.scaler.load_state_dict(checkpoint["scaler"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            path = self.folder.path / self.folder.LAST
            raise BadInput(f"{path}: not a checkpoint of this run ({reason}); train anew") from None
        self.state, self.saved_step = state, state.step
        self.n_steps = self.plan_steps()
        self.last_epochs.extend(checkpoint["last_epochs"])


def average(state_dicts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several models' weights, name by name. Source: AIAYN, section 6.1."""
    state_dicts = list(state_dicts)
    return {
        name: torch.stack([weights[name] for weights in state_dicts]).mean(dim=0)
        for name in state_dicts[0]
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, moments: dict[int, dict[str, Tensor]]
) -> None:
    """Gives an optimizer the moments of another run; rates and decay stay its own.

    Raises ValueError if they are not those of its parameters: torch would find out an update later.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not moments:  # before the first update there are none
        return
    if moments.keys() != dict(enumerate(parameters)).keys():
        raise ValueError(f"moments of {len(moments)} parameters, not {len(parameters)}")
    for i, p in enumerate(parameters):
        found = {name: tuple(value.shape) for name, value in moments[i].items()}
        wanted = {"step": (), "exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}
        if found != wanted:
            raise ValueError(f"moments of parameter {i}: {found}, not {wanted}")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
