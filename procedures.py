"""What is done with a model: train, evaluate, predict. Any model of `models.py` will do.

Source of the training rules: *Attention Is All You Need* (AIAYN, arXiv 1706.03762), section 5.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

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
    r_drop: float = 0.0,
) -> Tensor:
    """One update. Returns (2,), still on the device, so that no step waits for it: the sum over the
    update's targets of the cross-entropy without smoothing, in nats, and how many were right.

    Each micro-batch is divided by the targets of the whole update: several small ones and one large
    one are the same update.
    """
    n_targets = sum(batch.n_targets for batch in micro_batches)
    n_times = 2 if r_drop else 1
    sums = []
    for batch in micro_batches:
        src, tgt_in = batch.src.repeat(n_times, 1), batch.tgt_in.repeat(n_times, 1)
        tgt_out = batch.tgt_out.repeat(n_times, 1)
        with precision:
            logits = model(src, tgt_in)  # (b, l_x, n)
        loss_sum, nll_sum = loss_sums(logits, tgt_out, label_smoothing)
        if r_drop:
            loss_sum = loss_sum + r_drop * disagreement_sum(logits, tgt_out)
        scaler.scale(loss_sum / (n_times * n_targets)).backward()
        sums.append(torch.stack((nll_sum, count_correct(logits, tgt_out))) / n_times)
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
    inspect: Callable[[int], dict[str, float]] = lambda epoch: {},
) -> None:
    """Trains model, already on its device, and leaves the chosen weights in it and in the folder.

    inspect: called after the validation of each epoch, it returns further scores to write down.

    After each epoch the model is validated, and a better one saved; at the end the average of the
    last epochs, if one was asked for, takes the place of the best.
    """
    n_updates = math.ceil(len(data.plan("train", seed=seed, epoch=1)) / config.accumulate)
    n_steps = min(config.epochs * n_updates, config.max_steps or config.epochs * n_updates)
    if n_steps <= config.warmup_steps:
        print(
            f"warning: {n_steps} updates in all, and --warmup-steps {config.warmup_steps}: the "
            "learning rate never reaches its height; give more --epochs or fewer --warmup-steps",
            file=sys.stderr,
        )
    optimizer = build_optimizer(model, weight_decay=config.weight_decay)
    scaler = grad_scaler(precision, device)
    runner = torch.compile(model, dynamic=True) if compiled else model
    if compiled:
        compile_first(runner, data, device, precision, seed)
    best, best_epoch, step = (), 0, 0
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
                r_drop=config.r_drop,
            )
            log.add(step, lr, micro_batches, sums)
        synchronize(device)
        seconds = time.perf_counter() - began
        log.ask()
        log.progress.close()

        result = evaluate(model, data, "validation", device=device, precision=precision)
        if not math.isfinite(result.loss):
            raise RunFailed(
                f"step {step}: the validation loss is {result.loss}; give a smaller --lr"
            )
        better = best_epoch == 0 or result.rank > best
        if better:
            best, best_epoch = result.rank, epoch
            folder.save_weights(model)
        scores = {**result.scores, **inspect(epoch)}
        trained = {"loss": log.nll / log.n_targets, "accuracy": log.n_correct / log.n_targets}
        folder.log(
            event="epoch",
            epoch=epoch,
            seconds=seconds,
            updates=n_here,
            updates_of_an_epoch=n_updates,
            tokens=log.n_tokens,
            padding_share=data.padding_share("train", plan),
            **{f"train_{name}": value for name, value in trained.items()},
            **{f"validation_{name}": value for name, value in scores.items()},
        )
        print(
            f"epoch {epoch}: {seconds:.1f} s, {log.n_tokens / seconds:,.0f} tokens/s; "
            f"training {in_words(trained)}; validation {in_words(scores)}"
            f"{', the best so far' if better else ''}",
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
        print(f"mean of the last {len(last_epochs)} epochs: validation {in_words(result.scores)}")
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
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for batch in data.batches("train", plan, device):
                with autocast(precision, device):
                    logits = runner(batch.src, batch.tgt_in)
                loss_sums(logits, batch.tgt_out, 0.0)[0].backward()
    except torch._dynamo.exc.TorchDynamoException as error:  # no C++ compiler, most of the time
        reason = str(error).strip().splitlines()[0]
        raise RunFailed(f"--compile: {reason}; install what is missing, or leave it out") from None
    runner.zero_grad(set_to_none=True)
    print(f"compiled in {time.perf_counter() - began:.1f} s")


def average(state_dicts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several models' weights, name by name. Source: AIAYN, section 6.1."""
    state_dicts = list(state_dicts)
    return {
        name: torch.stack([weights[name] for weights in state_dicts]).mean(dim=0)
        for name in state_dicts[0]
    }


def in_words(scores: dict[str, Any]) -> str:
    """loss 1.2345, accuracy 67.89%, …"""
    words = []
    for name, value in scores.items():
        text = f"{value:.2%}" if name == "accuracy" else value
        text = f"{value:.4f}" if isinstance(text, float) else text
        words.append(f"{name.replace('_', ' ')} {text}")
    return ", ".join(words)


# ------------------------------------------------------------------------------------------ testing


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
    model: nn.Module, data: TextData, split: str, *, device: torch.device, precision: str
) -> Evaluation:
    """The model on every sentence of a split."""
    model.eval()
    sums, pairs, n_targets = [], [], 0
    for batch in data.batches(split, data.plan(split), device):
        with autocast(precision, device):
            logits = model(batch.src, batch.tgt_in)  # (b, l_x, n)
        nll_sum = loss_sums(logits, batch.tgt_out, 0.0)[1]
        sums.append(torch.stack((nll_sum, count_correct(logits, batch.tgt_out))))
        n_targets += batch.n_targets
        if data.classes:
            pairs.append(torch.cat((batch.tgt_out, logits.argmax(dim=-1)), dim=1))  # (b, 2)
    nll, n_correct = torch.stack(sums).double().cpu().sum(dim=0).tolist()
    confusion = None
    if data.classes:
        confusion = np.zeros((len(data.classes),) * 2, dtype=np.int64)
        np.add.at(confusion, tuple(torch.cat(pairs).cpu().numpy().T), 1)
    return Evaluation(nll / n_targets, n_correct / n_targets, confusion)


# ----------------------------------------------------------------------------------------- decoding


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
        chosen = logits.argmax(dim=-1)  # (n)
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


# ------------------------------------------------------------------------------------------- using


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

        Memory does not grow with the texts: at_once of them are sorted by length and answered.
        """
        self.model.eval()
        texts = iter(texts)
        while window := list(islice(texts, at_once)):
            ids = self.codec.encode(window)
            rows = sorted((i for i, x in enumerate(window) if x.strip()), key=lambda i: len(ids[i]))
            answers: list[tuple[str, int] | None] = [None] * len(ids)
            for begin in range(0, len(rows), self.batch_size):
                batch = rows[begin : begin + self.batch_size]
                for i, answer in zip(batch, self.answer([ids[i] for i in batch])):
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
