"""What is done with a model: train, evaluate, predict. Any model of `models.py` will do.

Source of the training rules: *Attention Is All You Need* (AIAYN, arXiv 1706.03762), section 5.
"""

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from comp_utils import Progress, RunFailed, RunFolder, autocast, grad_scaler, option, synchronize
from data import NO_TARGET, Batch, TextCodec, TextData, pad


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
    weight_decay: float = option(
        0.0, "share of lr by which matrices shrink in an update (AdamW); 0 is Adam", low=0.0
    )
    max_norm: float = option(1.0, "longest gradient; a longer one is shortened to it", above=0.0)
    accumulate: int = option(1, "micro-batches in an update", low=1)
    patience: int | None = option(
        None, "epochs without a better validation before the run stops", low=1, unset="never stops"
    )
    average_checkpoints: int = option(
        1, "epochs whose weights are averaged, the last ones of the run; 1: the best one", low=1
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
    logits = logits.float()  # a sum of thousands in 16 bits would lose the small ones
    log_z = logits.logsumexp(dim=-1)  # (b, l_x); log p[k] = logits[k] - log_z
    there = tgt_out != NO_TARGET
    chosen = logits.gather(-1, tgt_out.clamp(min=0)[..., None])[..., 0]  # (b, l_x)
    nll = (log_z - chosen) * there
    smoothed = (1 - label_smoothing) * nll + label_smoothing * (log_z - logits.mean(-1)) * there
    return smoothed.sum(), nll.detach().sum()


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


def train_step(
    model: nn.Module,
    micro_batches: list[Batch],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: AbstractContextManager,
    *,
    lr: float,
    max_norm: float,
    label_smoothing: float,
) -> Tensor:
    """One update. Returns (2,), still on the device, so that no step waits for it: the sum over the
    update's targets of the cross-entropy without smoothing, in nats, and how many were right.

    Each micro-batch is divided by the targets of the whole update: several small ones and one large
    one are the same update.
    """
    n_targets = sum(batch.n_targets for batch in micro_batches)
    sums = []
    for batch in micro_batches:
        with precision:
            logits = model(batch.src, batch.tgt_in)  # (b, l_x, n)
        loss_sum, nll_sum = loss_sums(logits, batch.tgt_out, label_smoothing)
        scaler.scale(loss_sum / n_targets).backward()
        sums.append(torch.stack((nll_sum, count_correct(logits, batch.tgt_out))))
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)  # before clipping, or max_norm means nothing
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(sums).sum(dim=0)


def count_correct(logits: Tensor, tgt_out: Tensor) -> Tensor:
    """How many targets have the highest logit, () float32. Shapes as in `loss_sums`."""
    return (logits.detach().argmax(dim=-1) == tgt_out).sum(dtype=torch.float32)


def groups_of(batches: Iterable[Batch], n: int) -> Iterator[list[Batch]]:
    """The micro-batches of each update: n of them, what is left over in the last."""
    batches = iter(batches)
    while group := list(islice(batches, n)):
        yield group


class StepLog:
    """Writes each update to metrics.jsonl and the progress bar, asking the device once a second.

    To ask for a loss is to wait for the device, so losses stay there until enough are together.
    """

    SECONDS_BETWEEN_QUESTIONS = 1.0

    def __init__(self, folder: RunFolder, progress: Progress, epoch: int) -> None:
        self.folder, self.progress, self.epoch = folder, progress, epoch
        self.waiting: list[tuple[int, float, int, int, Tensor]] = []
        self.asked = time.perf_counter()
        self.nll, self.n_correct, self.n_targets, self.n_tokens = 0.0, 0.0, 0, 0

    def add(self, step: int, lr: float, micro_batches: list[Batch], sums: Tensor) -> None:
        """Takes note of an update. Raises RunFailed when a loss turns out not to be finite."""
        n_targets = sum(batch.n_targets for batch in micro_batches)
        n_tokens = sum(batch.n_tokens for batch in micro_batches)
        self.waiting.append((step, lr, n_targets, n_tokens, sums))
        if time.perf_counter() - self.asked > self.SECONDS_BETWEEN_QUESTIONS:
            self.ask()

    def ask(self) -> None:
        """Fetches the losses that wait on the device, and writes them down."""
        if not self.waiting:
            return
        fetched = torch.stack([sums for *_, sums in self.waiting]).tolist()
        now = time.perf_counter()
        speed = sum(n_tokens for *_, n_tokens, _ in self.waiting) / (now - self.asked)
        for (step, lr, n_targets, n_tokens, _), (nll, n_correct) in zip(self.waiting, fetched):
            loss = nll / n_targets
            if not math.isfinite(loss):
                raise RunFailed(
                    f"step {step}: the loss is {loss} at learning rate {lr:.3g}; give a smaller "
                    "--lr or more --warmup-steps"
                )
            facts = {"step": step, "epoch": self.epoch, "loss": loss, "lr": lr}
            self.folder.log(event="step", **facts, tokens_per_second=speed)
            self.nll, self.n_correct = self.nll + nll, self.n_correct + n_correct
            self.n_targets, self.n_tokens = self.n_targets + n_targets, self.n_tokens + n_tokens
        text = f"loss {loss:.3f}, lr {lr:.2e}, {speed:,.0f} tokens/s"
        self.progress.update(len(self.waiting), text)
        self.waiting, self.asked = [], now


def train(
    model: nn.Module,
    data: TextData,
    config: TrainingConfig,
    folder: RunFolder,
    *,
    device: torch.device,
    precision: str,
    seed: int,
    compiled: bool,
) -> None:
    """Trains model, already on its device, and leaves the chosen weights in it and in the folder.

    After each epoch the model is validated, and a better one saved; at the end the average of the
    last epochs, if one was asked for, takes the place of the best.
    """
    n_updates = math.ceil(len(data.plan("train", seed=seed, epoch=1)) / config.accumulate)
    n_steps = min(config.epochs * n_updates, config.max_steps or config.epochs * n_updates)
    optimizer = build_optimizer(model, weight_decay=config.weight_decay)
    scaler = grad_scaler(precision, device)
    runner = torch.compile(model, dynamic=True) if compiled else model
    if compiled:
        compile_first(runner, data, device, precision, seed)
    best, best_epoch, step = (-math.inf, -math.inf), 0, 0
    last_epochs: deque[dict[str, Tensor]] = deque(maxlen=config.average_checkpoints)
    for epoch in range(1, config.epochs + 1):
        runner.train()
        plan = data.plan("train", seed=seed, epoch=epoch)
        plan = plan[: (n_steps - step) * config.accumulate]
        n_here = math.ceil(len(plan) / config.accumulate)
        log = StepLog(folder, Progress(n_here, f"epoch {epoch}/{config.epochs}"), epoch)
        synchronize(device)
        began = time.perf_counter()
        for micro_batches in groups_of(data.batches("train", plan, device), config.accumulate):
            step += 1
            lr = lr_at(
                step,
                peak=config.lr,
                schedule=config.schedule,
                warmup_steps=config.warmup_steps,
                n_steps=n_steps,
            )
            sums = train_step(
                runner,
                micro_batches,
                optimizer,
                scaler,
                autocast(precision, device),
                lr=lr,
                max_norm=config.max_norm,
                label_smoothing=config.label_smoothing,
            )
            log.add(step, lr, micro_batches, sums)
        synchronize(device)
        seconds = time.perf_counter() - began
        log.ask()
        log.progress.close()

        result = evaluate(model, data, "validation", device=device, precision=precision)
        better = (result.accuracy, -result.loss) > best
        if better:
            best, best_epoch = (result.accuracy, -result.loss), epoch
            folder.save_weights(model)
        event = {
            "epoch": epoch,
            "seconds": seconds,
            "tokens": log.n_tokens,
            "padding_share": data.padding_share("train", plan),
            "train_loss": log.nll / log.n_targets,
            "train_accuracy": log.n_correct / log.n_targets,
            "validation_loss": result.loss,
            "validation_accuracy": result.accuracy,
            "validation_macro_f1": result.macro_f1,
        }
        folder.log(event="epoch", **event)
        print(
            f"epoch {epoch}: {seconds:.1f} s, {log.n_tokens / seconds:,.0f} tokens/s; "
            f"training loss {event['train_loss']:.4f}, accuracy {event['train_accuracy']:.2%}; "
            f"validation loss {result.loss:.4f}, accuracy {result.accuracy:.2%}"
            + ", the best so far"
            * better,
            flush=True,
        )
        if config.average_checkpoints > 1:
            last_epochs.append({k: v.cpu().clone() for k, v in model.state_dict().items()})
        if step == n_steps or (config.patience and epoch - best_epoch >= config.patience):
            break
    if len(last_epochs) > 1:
        model.load_state_dict(average(last_epochs))
        folder.save_weights(model)
        result = evaluate(model, data, "validation", device=device, precision=precision)
        print(
            f"average of the last {len(last_epochs)} epochs: validation loss {result.loss:.4f}, "
            f"accuracy {result.accuracy:.2%}"
        )
    else:
        folder.load_weights(model, device)


def compile_first(
    runner: nn.Module, data: TextData, device: torch.device, precision: str, seed: int
) -> None:
    """Has torch.compile do its work before any clock runs, and leaves no trace: no gradient, no
    draw."""
    began = time.perf_counter()
    plan = data.plan("train", seed=seed, epoch=1)[
        :2
    ]  # two, for the second shape makes sizes dynamic
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch in data.batches("train", plan, device):
            with autocast(precision, device):
                logits = runner(batch.src, batch.tgt_in)
            loss_sums(logits, batch.tgt_out, 0.0)[0].backward()
    runner.zero_grad(set_to_none=True)
    print(f"compiled in {time.perf_counter() - began:.1f} s")


def average(state_dicts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several models' weights, name by name. Source: AIAYN, section 6.1."""
    state_dicts = list(state_dicts)
    return {
        name: torch.stack([weights[name] for weights in state_dicts]).mean(dim=0)
        for name in state_dicts[0]
    }


# -------------------------------------------------------------------------------- testing, using


@dataclass(frozen=True)
class Evaluation:
    """What a model does on one split. confusion[true, predicted] counts sentences."""

    loss: float  # nats per sentence, without label smoothing
    confusion: np.ndarray

    @property
    def n_sentences(self) -> int:
        """All that were evaluated."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of the sentences whose class was found."""
        return float(self.confusion.trace() / self.confusion.sum())

    @property
    def macro_f1(self) -> float:
        """Mean over the classes of F1 = 2 TP / (2 TP + FP + FN); 0 for a class that nowhere
        occurs."""
        hits = self.confusion.diagonal()
        n = self.confusion.sum(axis=0) + self.confusion.sum(axis=1)
        return float(np.mean(2 * hits / np.maximum(n, 1)))


@torch.inference_mode()
def evaluate(
    model: nn.Module, data: TextData, split: str, *, device: torch.device, precision: str
) -> Evaluation:
    """The model on every sentence of a split, dropout off."""
    model.eval()
    nll, pairs = [], []
    for batch in data.batches(split, data.plan(split, seed=0, epoch=0), device):
        with autocast(precision, device):
            logits = model(batch.src, batch.tgt_in)  # (b, 1, n)
        nll.append(loss_sums(logits, batch.tgt_out, 0.0)[1])
        pairs.append(torch.cat((batch.tgt_out, logits.argmax(dim=-1)), dim=1))  # (b, 2)
    n = len(data.classes)
    confusion = np.zeros((n, n), dtype=np.int64)
    true, predicted = torch.cat(pairs).cpu().numpy().T
    np.add.at(confusion, (true, predicted), 1)
    return Evaluation(float(torch.stack(nll).sum()) / len(true), confusion)


@torch.inference_mode()
def classify(
    model: nn.Module,
    codec: TextCodec,
    texts: Iterable[str],
    *,
    max_length: int,
    batch_size: int,
    device: torch.device,
    precision: str,
    at_once: int = 4096,
) -> Iterator[tuple[int, float, int] | None]:
    """(class, its probability, length in tokens) of each text in order; None for a blank one.

    Memory does not grow with the texts: at_once of them are sorted by length and worked through.
    """
    model.eval()
    texts = iter(texts)
    while window := list(islice(texts, at_once)):
        ids = codec.encode(window)
        rows = sorted((i for i in range(len(ids)) if window[i].strip()), key=lambda i: len(ids[i]))
        answers: list[tuple[int, float, int] | None] = [None] * len(ids)
        for begin in range(0, len(rows), batch_size):
            batch = rows[begin : begin + batch_size]
            cut = [ids[i][: max_length - 1] + [codec.eos_id] for i in batch]
            src, tgt_in = pad(cut, codec.pad_id), torch.full((len(batch), 1), codec.bos_id)
            with autocast(precision, device):
                logits = model(src.to(device), tgt_in.to(device))[:, 0]  # (b, n)
            probability, found = logits.float().softmax(dim=-1).max(dim=-1)  # (b), (b)
            for i, class_id, p in zip(batch, found.tolist(), probability.tolist()):
                answers[i] = class_id, p, len(ids[i]) + 1
        yield from answers
