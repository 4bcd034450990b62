"""Learning rate, loss, optimizer and one training step.

Source: *Attention Is All You Need* (AIAYN, arXiv 1706.03762), sections 5 and 6.1.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

import kernels
from comp_utils import is_out_of_memory
from components import Unembedding
from data import NO_TARGET, Batch
from ddp_utils import defer_sync, sum_across_ranks, world_size
from errors import RunFailed
from models import EncoderDecoder

# ------------------------------------------------------------------------------------ learning rate


def paper_lr(*, d_model: int, warmup_steps: int) -> float:
    """The peak of the paper's learning rate: (d_model * warmup_steps)^-0.5. AIAYN, equation 3."""
    return (d_model * warmup_steps) ** -0.5


def lr_at(step: int, *, peak: float, schedule: str, warmup_steps: int, n_steps: int) -> float:
    """Learning rate of a step: peak * step / warmup_steps at first, then falling from the peak.

    With schedule "inverse_sqrt" and peak `paper_lr` this is AIAYN, section 5.3, equation 3:
    d_model^-0.5 * min(step^-0.5, step * warmup_steps^-1.5).
    step: counted from 1. "linear" and "cosine" reach 0 one step after the last of n_steps.
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

    loss = -(1 - s) log p[target] - s / n * sum_k log p[k] with s = label_smoothing, n classes.
    Source: AIAYN, section 5.4 (after Szegedy et al., arXiv 1512.00567, section 7).
    Shapes: logits (b, l_x, n), tgt_out (b, l_x) with NO_TARGET where nothing counts; returns two
    (), float32.
    """
    log_p = logits.float().log_softmax(dim=-1)  # (b, l_x, n); 16 bits would lose the small ones
    is_target = tgt_out != NO_TARGET  # (b, l_x)
    nll = -log_p.gather(-1, tgt_out.clamp(min=0)[..., None])[..., 0] * is_target
    smoothed = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(dim=-1) * is_target
    return smoothed.sum(), nll.detach().sum()


def disagreement_sum(logits: Tensor, tgt_out: Tensor) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2, summed over the targets, in nats.

    p is the first half of the batch and q the second: the same sentences under other dropout.
    Source: R-Drop (arXiv 2106.14448), equation 2.
    Shapes: logits (2 b, l_x, n), tgt_out (2 b, l_x) of two equal halves; returns (), float32.
    """
    log_p, log_q = logits.float().log_softmax(dim=-1).chunk(2)  # (b, l_x, n)
    both = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)  # (b, l_x)
    return (both * (tgt_out.chunk(2)[0] != NO_TARGET)).sum() / 2


def count_correct(logits: Tensor, tgt_out: Tensor) -> Tensor:
    """How many targets have the highest logit, () float32. Shapes as in `loss_sums`."""
    highest = logits.detach().max(dim=-1).indices  # (b, l_x); argmax takes twice as long on a CPU
    return (highest == tgt_out).sum(dtype=torch.float32)


def loss_and_counts(
    X: Tensor, output: nn.Module, tgt_out: Tensor, *, label_smoothing: float, r_drop: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss to be minimized, cross-entropy without smoothing, correct targets: sums, () each.

    Takes the trunk's output X (b, l_x, d), and the layer that makes logits of it. On a CPU the
    logits of a translator are computed for the real targets alone, and never all at once.
    """
    if isinstance(output, Unembedding) and not kernels.is_plain(X):
        copies = 2 if r_drop else 1
        rows = (tgt_out.flatten() != NO_TARGET).nonzero()[:, 0]  # (copies * n)
        X, targets = X.flatten(0, 1)[rows], tgt_out.flatten()[rows[: len(rows) // copies]]
        X = X.unflatten(0, (copies, -1))
        return kernels.LinearCrossEntropy.apply(X, output.W_u, targets, label_smoothing, r_drop)
    logits = output(X)  # (b, l_x, n_vocab or n_classes)
    loss_sum, nll_sum = loss_sums(logits, tgt_out, label_smoothing)
    if r_drop:
        loss_sum = loss_sum + r_drop * disagreement_sum(logits, tgt_out)
    return loss_sum, nll_sum, count_correct(logits, tgt_out)


# ---------------------------------------------------------------------------------------- optimizer


def build_optimizer(
    model: nn.Module, *, weight_decay: float, fused: bool = True
) -> torch.optim.Optimizer:
    """Adam with the constants of AIAYN, section 5.3; matrices decay (AdamW), vectors do not.

    fused: one kernel for all parameters, on cpu, cuda and mps.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-9, fused=fused)


def average_weights(state_dicts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several models' weights, name by name. Source: AIAYN, section 6.1."""
    state_dicts = list(state_dicts)
    return {
        name: torch.stack([weights[name] for weights in state_dicts]).mean(dim=0)
        for name in state_dicts[0]
    }


# ----------------------------------------------------------------------------------------- one step


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
    signal: int = 0,
) -> Tensor:
    """The gradients of one step. Returns (3,) on the device, summed over all ranks: cross-entropy
    without smoothing in nats, correct targets, signals received.

    The loss of each micro-batch is divided by n_targets, the targets of the whole step on all ranks
    (by default, those of micro_batches). So many small micro-batches or one large one, on one
    process or on many, make the same step. seeds: of the dropout in each micro-batch. signal: that
    this rank received, for `stop_agreed`. Raises RunFailed when memory is short.
    """
    n_targets = n_targets or sum(batch.n_targets for batch in micro_batches)
    n_times = 2 if r_drop else 1
    weight = world_size() / (n_times * n_targets)  # averaging over ranks divides by world_size
    sums = []
    for i, batch in enumerate(micro_batches):
        if seeds:
            torch.manual_seed(seeds[i])
        src, tgt_in, tgt_out = batch.repeat(n_times)
        loss = partial(
            loss_and_counts, tgt_out=tgt_out, label_smoothing=label_smoothing, r_drop=r_drop
        )
        with explain_out_of_memory(batch), defer_sync(model, last=batch is micro_batches[-1]):
            with precision:
                loss_sum, nll_sum, n_correct = model(src, tgt_in, loss)
            scaler.scale(loss_sum * weight).backward()
        sums.append(torch.stack((nll_sum, n_correct)) / n_times)
    flag = sums[0].new_full((1,), signal)
    return sum_across_ranks(torch.cat((torch.stack(sums).sum(dim=0), flag)))


def train_step(
    model: nn.Module,
    micro_batches: list[Batch],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: AbstractContextManager,
    *,
    lr: float,
    max_norm: float,
    **loss: float | int | list[int] | None,
) -> Tensor:
    """Forward, backward, optimizer step. loss: as `add_gradients` takes it; returns its sums."""
    sums = add_gradients(model, micro_batches, scaler, precision, **loss)
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)  # before clipping, or max_norm means nothing
    for one in [m for m in model.modules() if isinstance(m, EncoderDecoder)] or [model]:
        nn.utils.clip_grad_norm_(one.parameters(), max_norm)  # each model of an ensemble
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return sums


@contextmanager
def explain_out_of_memory(batch: Batch) -> Iterator[None]:
    """Names the batch that did not fit into memory. Raises RunFailed."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        (n, l_z), l_x = batch.src.shape, batch.tgt_in.shape[1]
        raise RunFailed(
            f"out of memory at a batch of {n} sentences, {l_z} source and {l_x} target tokens long;"
            " give a smaller --batch-size or --batch-tokens (more --accumulate keeps the step the "
            "same), or a smaller --max-length"
        ) from None
