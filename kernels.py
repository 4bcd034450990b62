"""Faster forms, on a CPU, of three things that torch does slowly there: products, dropout, loss.

Each function gives what its plain form in torch gives, and takes that form on other devices, in
other precisions and under torch.compile; with RHEA_PLAIN=1 in the environment, everywhere.
Shapes: n rows, d columns, V vocabulary.
"""

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PLAIN = os.environ.get("RHEA_PLAIN") == "1"
GROUP = 64  # columns
ROWS = 256  # of logits that exist at once: 8 MB for a vocabulary of 8,000, which caches hold


def is_plain(X: Tensor, *, in_16_bits: bool = True) -> bool:
    """Whether torch's own form is taken: on other devices, when compiled, and in 16 bits."""
    on_cpu = X.device.type == "cpu" and not (in_16_bits and torch.is_autocast_enabled("cpu"))
    return PLAIN or not on_cpu or torch.compiler.is_compiling()


# ----------------------------------------------------------------------------------------- products


def onednn_is_faster() -> bool:
    """Whether torch's default library for products, MKL, leaves AVX-512 unused here.

    It does on processors that are not Intel's, and takes twice as long there as oneDNN.
    """
    cpuinfo = Path("/proc/cpuinfo")
    is_intel = cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text("utf-8", "replace")
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not is_intel
    )


ONEDNN = onednn_is_faster()
# oneDNN keeps what it made for each shape of a product, and batches have many: 1,024 of them, its
# default, take GBs. A batch has 22; to make one anew takes less than a millisecond.
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY") if ONEDNN else ():
    os.environ.setdefault(name, "64")
PACKING = threading.Lock()
MIN_PRODUCTS = 1 << 20  # below it, the time of a call to oneDNN is longer than its product saves


def product(X: Tensor, W: Tensor, b: Tensor | None = None, activation: str = "none") -> Tensor:
    """activation(X W^T + b) by oneDNN, without gradients."""
    return torch.ops.mkldnn._linear_pointwise.default(X, W, b, activation, [], "")


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Within it oneDNN keeps a model's matrices in its own layout, or each product would make it.

    For inference: the weights must not change meanwhile. Several threads may use one model.
    """
    Ws = [W for W in model.parameters() if W.ndim == 2 and ONEDNN and W.dtype == torch.float32]
    Ws = [W for W in Ws if W.requires_grad and not is_plain(W)]
    with PACKING:
        for W in Ws:
            if not hasattr(W, "packed"):
                W.packed = torch.ops.mkldnn._reorder_linear_weight(W.detach(), ROWS)
            W.n_uses = getattr(W, "n_uses", 0) + 1
    try:
        yield
    finally:
        with PACKING:
            for W in Ws:
                W.n_uses -= 1
                if not W.n_uses:
                    del W.packed, W.n_uses


def weight_gradient(dY: Tensor, X: Tensor) -> Tensor:
    """dY^T X: dY (..., V), X (..., d) -> (V, d). oneDNN first copies the transposed left factor."""
    dY, X = dY.flatten(0, -2), X.flatten(0, -2)
    if dY.shape[1] > X.shape[1]:
        return product(X.t(), dY.t()).t()
    return product(dY.t(), X.t())


class OneDNNLinear(torch.autograd.Function):
    """`product` with gradients."""

    @staticmethod
    def forward(ctx, X: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(X, W)
        return product(X, W, b)

    @staticmethod
    @once_differentiable
    def backward(ctx, dY: Tensor) -> tuple[Tensor | None, ...]:
        X, W = ctx.saved_tensors
        dX = product(dY, W.t()) if ctx.needs_input_grad[0] else None
        db = dY.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[2] else None
        return dX, weight_gradient(dY, X), db


class OneDNNFeedForward(torch.autograd.Function):
    """W_2 relu(W_1 x + b_1) + b_2, with the ReLU in the same pass as the product before it."""

    @staticmethod
    def forward(ctx, X: Tensor, W_1: Tensor, b_1: Tensor, W_2: Tensor, b_2: Tensor) -> Tensor:
        H = product(X, W_1, b_1, "relu")
        ctx.save_for_backward(X, H, W_1, W_2)
        return product(H, W_2, b_2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dY: Tensor) -> tuple[Tensor | None, ...]:
        X, H, W_1, W_2 = ctx.saved_tensors
        dH = product(dY, W_2.t())
        torch.ops.aten.threshold_backward.grad_input(dH, H, 0.0, grad_input=dH)
        db_1, db_2 = dH.flatten(0, -2).sum(dim=0), dY.flatten(0, -2).sum(dim=0)
        dX = product(dH, W_1.t()) if ctx.needs_input_grad[0] else None
        return dX, weight_gradient(dH, X), db_1, weight_gradient(dY, H), db_2


def uses_onednn(X: Tensor, W: Tensor) -> bool:
    """Whether oneDNN computes X W^T."""
    is_large = X.numel() * len(W) >= MIN_PRODUCTS
    return ONEDNN and is_large and X.dtype == torch.float32 and not is_plain(X)


def linear(X: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """X W^T + b: X (..., d), W (V, d), b (V) -> (..., V). Plain form: `F.linear`."""
    if not uses_onednn(X, W):
        return F.linear(X, W, b)
    if torch.is_grad_enabled():
        return OneDNNLinear.apply(X, W, b)
    return product(X, getattr(W, "packed", W), b)


def add_product(Y: Tensor, X: Tensor, W: Tensor) -> None:
    """Y += X W^T, without gradients."""
    if uses_onednn(X, W):
        Y += product(X, W)
    else:
        Y.addmm_(X, W.t())


def feed_forward(X: Tensor, W_1: Tensor, b_1: Tensor, W_2: Tensor, b_2: Tensor) -> Tensor:
    """W_2 relu(W_1 x + b_1) + b_2: X (..., d_model), W_1 (d_ff, d_model), W_2 (d_model, d_ff)."""
    if not uses_onednn(X, W_1):
        return F.linear(F.linear(X, W_1, b_1).relu(), W_2, b_2)
    if torch.is_grad_enabled():
        return OneDNNFeedForward.apply(X, W_1, b_1, W_2, b_2)
    H = product(X, getattr(W_1, "packed", W_1), b_1, "relu")
    return product(H, getattr(W_2, "packed", W_2), b_2)


# ----------------------------------------------------------------------------------- highest values


def topk(X: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest values of each row of X (n, V), highest first, and their columns: (n, k) each.

    They are in the k groups of columns with the highest maxima, so few are sorted. Plain form:
    `Tensor.topk`.
    """
    V = X.shape[1]
    n_grouped = V // GROUP * GROUP
    if is_plain(X) or n_grouped <= k * GROUP:
        return X.topk(min(k, V), dim=1)
    groups = X[:, :n_grouped].unflatten(1, (-1, GROUP)).amax(dim=2).topk(k, dim=1).indices  # (n, k)
    columns = (groups[:, :, None] * GROUP + torch.arange(GROUP)).flatten(1)
    rest = torch.arange(n_grouped, V).expand(len(X), -1)
    columns = torch.cat((columns, rest), dim=1)
    values, places = X.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, places)


# ------------------------------------------------------------------------------------------ dropout


def dropout(X: Tensor, p: float) -> Tensor:
    """X / (1 - p) with probability 1 - p, else 0, each value for itself. Plain form: `F.dropout`.

    torch draws one value after the other; here one draw of its generator serves four. So p is
    rounded to 16 bits, and so is the scale: the mean stays exactly that of X. The same values are
    dropped in float32 and in bf16.
    """
    n_dropped = round(p * 2**16)  # of the 2^16 values that 16 bits have
    if is_plain(X, in_16_bits=False) or n_dropped == 2**16:
        return F.dropout(X, p)
    bits = torch.empty(math.ceil(X.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: X.numel()].view(X.shape)
    kept = torch.ge(bits, n_dropped - 2**15, out=torch.empty_like(X))  # 0 or 1
    return X * kept.mul_(2**16 / (2**16 - n_dropped))


# --------------------------------------------------------------------------------------------- loss


class LinearCrossEntropy(torch.autograd.Function):
    """The loss of `optimization.loss_and_counts` for logits = X W^T, ROWS at a time.

    All logits and their gradients would take 2 * 4 * n * V bytes, and be written and read several
    times. Here those of ROWS rows stay in the processor's cache, and their gradients are computed
    at once. Takes X (c, n, d), W (V, d), targets (n), label_smoothing, r_drop; c is 2 copies of the
    same rows if r_drop is not 0, else 1. Returns three (): loss, cross-entropy without smoothing,
    correct targets (no logit is higher), summed.
    """

    @staticmethod
    def forward(
        ctx, X: Tensor, W: Tensor, targets: Tensor, label_smoothing: float, r_drop: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        c, V, s = len(X), len(W), label_smoothing
        needs_gradients = any(ctx.needs_input_grad)
        dX = torch.empty_like(X)
        dW = torch.zeros_like(W.t())  # transposed: oneDNN then copies X_c, not dlogits
        sums = X.new_zeros(4)  # of -log p[target], log p, correct targets, disagreement
        parts = (X.split(ROWS // c, dim=1), targets.split(ROWS // c), dX.split(ROWS // c, dim=1))
        for X_c, t_c, dX_c in zip(*parts):  # (c, ROWS / c, d)
            t_c = t_c.expand(c, -1)[:, :, None]  # (c, ROWS / c, 1)
            logits = linear(X_c, W)  # (c, ROWS / c, V)
            logits -= logits.amax(dim=-1, keepdim=True)
            target_logits = logits.gather(2, t_c)
            logit_sum = logits.sum()
            if r_drop:
                ratio = torch.stack((logits[0] - logits[1], logits[1] - logits[0]))
            # log p = logits - log_Z; torch's log_softmax would compute all exponentials twice
            p = logits.exp_()
            Z = p.sum(dim=-1, keepdim=True)  # (c, ROWS / c, 1)
            log_Z = Z.log()
            nll, n_correct = (log_Z - target_logits).sum(), (target_logits == 0).sum()
            sums[:3] += torch.stack((nll, logit_sum - V * log_Z.sum(), n_correct))
            if not (needs_gradients or r_drop):
                continue
            dlogits = p.div_(Z)
            if r_drop:  # the gradient of (KL(p || q) + KL(q || p)) / 2 in the logits of p is
                # (p * (log p - log q - KL(p || q)) + p - q) / 2; p and q may be exchanged
                ratio -= log_Z - log_Z.flip(0)
                kl = (dlogits * ratio).sum(dim=-1, keepdim=True)
                sums[3] += kl.sum() / 2
                ratio = ratio.sub_(kl).mul_(dlogits).add_(dlogits).sub_(dlogits.flip(0))
                dlogits.add_(ratio, alpha=r_drop / 2)
            # dlogits = p - (1 - s) * [target] - s / V, without r_drop
            dlogits.scatter_add_(2, t_c, torch.full_like(target_logits, s - 1))
            dX_c.copy_(linear(dlogits, W.t()))
            add_product(dW, X_c.flatten(0, 1).t(), dlogits.flatten(0, 1).t())
        if needs_gradients and s:  # the last term, alike in all columns
            dX -= s / V * W.sum(dim=0)
            dW -= s / V * X.sum(dim=(0, 1))[:, None]
        ctx.save_for_backward(dX, dW)
        nll, log_p_sum, n_correct, disagreement = sums
        loss = (1 - s) * nll - s / V * log_p_sum + r_drop * disagreement
        nll, n_correct = nll.float(), n_correct.float()
        ctx.mark_non_differentiable(nll, n_correct)
        return loss, nll, n_correct

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dX, dW = ctx.saved_tensors
        return dX * d_loss, (dW * d_loss).t(), None, None, None
