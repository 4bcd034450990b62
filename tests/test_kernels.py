"""The fast forms on a CPU give what torch's own give, and dropout's masks are random."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import PROJECT
from reference import TOLERANCE, each_dtype
from torch import Tensor
from torch.testing import assert_close

import kernels
from config import ModelConfig
from data import NO_TARGET, Batch
from models import Transformer, TransformerClassifier
from optimization import loss_and_counts, loss_sums


@pytest.fixture(autouse=True)
def onednn(monkeypatch) -> None:
    """oneDNN on any processor, and for the smallest product."""
    if torch.backends.mkldnn.is_available():
        monkeypatch.setattr(kernels, "ONEDNN", True)
    monkeypatch.setattr(kernels, "MIN_PRODUCTS", 0)
    torch.manual_seed(0)


def gradients_of(call, *inputs: Tensor) -> list[Tensor]:
    """The output of a call and the gradients of its inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    Y = call(*inputs)
    return [Y, *torch.autograd.grad((Y * torch.linspace(-1, 1, Y.shape[-1])).sum(), inputs)]


@pytest.mark.parametrize("shape", [(5, 3, 8, 4), (7, 1, 4, 8), (1, 2, 16, 16)], ids=str)
def test_products_and_their_gradients_match_torch(shape):
    b, l_x, d, n = shape
    X, W, bias, W_2, bias_2 = (torch.randn(s) for s in ((b, l_x, d), (n, d), (n,), (d, n), (d,)))
    found = gradients_of(kernels.linear, X, W, bias)
    assert type(found[0].grad_fn).__name__ == "OneDNNLinearBackward"
    assert_close(found, gradients_of(F.linear, X, W, bias), rtol=0, atol=1e-5)
    found = gradients_of(kernels.linear, X.transpose(0, 1), W)
    assert_close(found, gradients_of(F.linear, X.transpose(0, 1), W), rtol=0, atol=1e-5)
    with torch.no_grad():
        assert_close(kernels.linear(X, W, bias), F.linear(X, W, bias), rtol=0, atol=1e-5)

    def plain(X, W_1, b_1, W_2, b_2):
        return F.linear(F.relu(F.linear(X, W_1, b_1)), W_2, b_2)

    inputs = (X, W, bias, W_2, bias_2)
    found = gradients_of(kernels.feed_forward, *inputs)
    assert type(found[0].grad_fn).__name__ == "OneDNNFeedForwardBackward"
    assert_close(found, gradients_of(plain, *inputs), rtol=0, atol=2e-5)


@each_dtype
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("n_rows", [1, 256, 600])
def test_loss_of_logits_in_parts_matches_that_of_all_at_once(dtype, smoothing, n_rows):
    X, W = torch.randn(n_rows, 8, dtype=dtype), torch.randn(11, 8, dtype=dtype)
    targets = torch.randint(11, (n_rows,))

    def in_parts(X, W):
        return kernels.LinearCrossEntropy.apply(X[None], W, targets, smoothing, 0.0)[0][None] * 3

    def at_once(X, W):
        kinds = {"reduction": "sum", "label_smoothing": smoothing}
        return F.cross_entropy(X @ W.T, targets, **kinds)[None] * 3

    atol = TOLERANCE[dtype] * n_rows
    assert_close(gradients_of(in_parts, X, W), gradients_of(at_once, X, W), rtol=1e-5, atol=atol)
    _, nll, n_correct = kernels.LinearCrossEntropy.apply(X[None], W, targets, smoothing, 0.0)
    nll_at_once = loss_sums((X @ W.T)[None], targets[None], smoothing)[1]
    assert_close(nll, nll_at_once, rtol=1e-5, atol=atol)
    assert n_correct == ((X @ W.T).argmax(dim=-1) == targets).sum()


@each_dtype
@pytest.mark.parametrize("n_rows", [1, 128, 300])
def test_r_drop_in_parts_matches_that_of_all_at_once(dtype, n_rows):
    X, W = torch.randn(2, n_rows, 8, dtype=dtype), torch.randn(11, 8, dtype=dtype)
    targets = torch.randint(11, (n_rows,))

    def in_parts(X, W):
        return kernels.LinearCrossEntropy.apply(X, W, targets, 0.1, 3.0)[0][None]

    def at_once(X, W):
        log_p = (X @ W.T).log_softmax(dim=-1)
        both = sum(
            F.kl_div(log_p[1 - i], log_p[i], log_target=True, reduction="sum") for i in (0, 1)
        )
        loss = F.cross_entropy(
            (X @ W.T).flatten(0, 1), targets.repeat(2), reduction="sum", label_smoothing=0.1
        )
        return (loss + 3.0 * both / 2)[None]

    atol = 10 * TOLERANCE[dtype] * n_rows
    assert_close(gradients_of(in_parts, X, W), gradients_of(at_once, X, W), rtol=1e-5, atol=atol)


def functions_of(loss: Tensor) -> set[str]:
    """Names of the functions that a loss was computed by."""
    found, rest = set(), [loss.grad_fn]
    while rest:
        function = rest.pop()
        if function is not None and function not in found:
            found.add(function)
            rest.extend(parent for parent, _ in function.next_functions)
    return {type(function).__name__ for function in found}


def padded_batch(n_vocab: int) -> Batch:
    ids = torch.randint(3, n_vocab, (4, 9))
    src, tgt_in, tgt_out = ids.clone(), ids.clone(), ids.roll(-1, 1)
    for i, length in enumerate((9, 4, 1, 6)):
        src[i, length:], tgt_in[i, length:], tgt_out[i, length:] = 0, 0, NO_TARGET
    return Batch(src, tgt_in, tgt_out, n_targets=20, n_tokens=40)


@each_dtype
@pytest.mark.parametrize("kind", [Transformer, TransformerClassifier])
@pytest.mark.parametrize("r_drop", [0.0, 4.0])
def test_a_model_has_the_same_loss_and_gradients_in_plain_forms(kind, dtype, r_drop, monkeypatch):
    config = ModelConfig(n_layers=2, d_model=16, d_ff=24, n_heads=2, dropout=0.0)
    sizes = {"n_classes": 5} if kind is TransformerClassifier else {}
    model = kind(config, n_vocab=13, max_len=9, pad_id=0, **sizes).to(dtype)
    batch = padded_batch(13)
    if sizes:
        batch = Batch(batch.src, batch.tgt_in[:, :1], torch.tensor([[4], [0], [2], [1]]), 4, 24)
    if r_drop:  # two copies, whose tokens differ in place of dropout
        src, tgt_in, tgt_out = batch.repeat(2)
        batch = Batch(src, torch.where(tgt_in > 2, tgt_in.roll(1, 0), tgt_in), tgt_out, 40, 80)
    results = []
    for plain in (False, True):
        monkeypatch.setattr(kernels, "PLAIN", plain)
        loss, nll, n_correct = model(
            batch.src,
            batch.tgt_in,
            lambda X, output: loss_and_counts(
                X, output, batch.tgt_out, label_smoothing=0.1, r_drop=r_drop
            ),
        )
        kinds = functions_of(loss)
        assert ("OneDNNFeedForwardBackward" in kinds) == (dtype == torch.float32 and not plain)
        assert ("LinearCrossEntropyBackward" in kinds) == (kind is Transformer and not plain)
        gradients = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
        results.append([loss.double(), nll, n_correct, *(g for g in gradients if g is not None)])
    # The plain form computes the loss of any model in float32.
    atol = {torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
    assert_close(*results, rtol=1e-5, atol=atol)


# ------------------------------------------------------------------------------------------ dropout


def kept(p: float, *shape: int) -> Tensor:
    return kernels.dropout(torch.ones(shape), p) > 0


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9999])
def test_dropout_keeps_the_mean_and_the_rate(p):
    n_dropped = round(p * 2**16)
    Y = kernels.dropout(torch.ones(1001, 999), p)  # not a multiple of the 4 values of a draw
    assert Y.unique().tolist() == pytest.approx([0.0, 2**16 / (2**16 - n_dropped)])
    n, share = Y.numel(), (Y == 0).double().mean().item()
    assert abs(share - n_dropped / 2**16) < 5 * (p * (1 - p) / n) ** 0.5  # standard deviations


def test_dropout_of_all_or_nothing():
    assert not kernels.dropout(torch.ones(9), 1.0).any()
    assert kernels.dropout(torch.ones(9), 1e-6).all()


def test_dropout_depends_on_the_seed_alone():
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(kept(0.5, 64, 64))
    assert masks[0].equal(masks[1]) and not masks[0].equal(masks[2])


def test_dropout_passes_gradients_where_it_keeps_values():
    X = torch.randn(50, 7, requires_grad=True)
    Y = kernels.dropout(X, 0.3)
    (dX,) = torch.autograd.grad(Y.sum(), X)
    assert_close(dX * X.detach(), Y.detach())


def chi_squared(a: Tensor, b: Tensor) -> float:
    """Of the 2 x 2 table of two masks, 1 degree of freedom, if they were independent."""
    n, both = a.numel(), (a & b).double().sum()
    p, q = a.double().mean(), b.double().mean()
    found = torch.stack((both, a.sum() - both, b.sum() - both, n - a.sum() - b.sum() + both))
    expected = n * torch.stack((p * q, p * (1 - q), (1 - p) * q, (1 - p) * (1 - q)))
    return ((found - expected).square() / expected).sum().item()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_of_neighbours_layers_places_and_seeds_are_independent(p):
    """At most 1 of 10^6 tables of independent masks has a chi-squared of 24 or more."""
    torch.manual_seed(3)
    first, second = kept(p, 512, 512), kept(p, 512, 512)  # of two layers
    torch.manual_seed(4)  # as for another place in the plan, or another epoch
    other = kept(p, 512, 512)
    pairs = [(first, second), (first, other)]
    for step in (1, 2, 3, 4, 5, 512):  # columns, 4 values from one draw, rows
        flat = first.flatten()
        pairs.append((flat[:-step], flat[step:]))
    assert max(chi_squared(*pair) for pair in pairs) < 24
    assert chi_squared(first, first) > 1e5  # what dependence would give


@pytest.mark.parametrize("V", [7, 640, 1000])
@pytest.mark.parametrize("k", [1, 10])
def test_the_highest_values_and_their_columns_match_torch(V, k):
    X = torch.randn(5, V)
    X[0] = 0.0  # all alike: any columns will do, each once
    values, columns = kernels.topk(X, k)
    expected = X.topk(min(k, V), dim=1)
    assert torch.equal(values, expected.values)
    assert torch.equal(X.gather(1, columns), values)
    assert torch.equal(columns[1:], expected.indices[1:])
    assert len(set(columns[0].tolist())) == min(k, V)


def test_matrices_stay_packed_until_the_last_thread_is_done():
    W, seen = torch.nn.Linear(64, 64), []
    first, second = kernels.packed(W), kernels.packed(W)
    for enter_or_exit in (first.__enter__, second.__enter__, first.__exit__, second.__exit__):
        enter_or_exit(*(() if "enter" in enter_or_exit.__name__ else (None, None, None)))
        seen.append(hasattr(W.weight, "packed"))
    assert seen == [kernels.ONEDNN] * 3 + [False]
    assert not vars(W.weight)


@pytest.mark.slow
def test_a_model_gives_the_same_logits_when_packed_and_may_change_afterwards():
    model = Transformer(ModelConfig(), n_vocab=300, max_len=20, pad_id=0).eval()
    src, tgt_in = torch.randint(1, 300, (2, 40, 15))
    with torch.inference_mode():
        expected = model(src, tgt_in)
        with kernels.packed(model), kernels.packed(model):
            assert_close(model(src, tgt_in), expected)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
        assert not torch.allclose(model(src, tgt_in), expected)
    assert not any(hasattr(p, "packed") for p in model.parameters())


# ------------------------------------------------------------------------------------------- memory

MANY_SHAPES = """
import torch
import kernels

def used() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * 4096

torch.set_num_threads(1)
W = torch.randn(256, 128)
kernels.product(torch.randn(300, 128), W)
before = used()
for n in range(301, 1000):
    kernels.product(torch.randn(n, 128), W)
print((used() - before) // 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not kernels.onednn_is_faster(), reason="products are not oneDNN's here")
def test_products_of_many_shapes_do_not_fill_the_memory():
    """With oneDNN's own limits 700 shapes take 350 MB."""
    limits = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    env = {name: value for name, value in os.environ.items() if name not in limits}
    command = [sys.executable, "-c", MANY_SHAPES]
    done = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150
