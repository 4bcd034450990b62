"""The loss, the learning rate, the optimizer, one step, and averaged weights."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import (
    BOS,
    N_CLASSES,
    PAD,
    SRC_LENGTHS,
    TGT_LENGTHS,
    as_numpy,
    each_model,
    seeded_float64,  # noqa: F401
    sentences,
    transformer,
)
from torch import Tensor, nn
from torch.testing import assert_close

from config import ModelConfig
from data import NO_TARGET, Batch, pad
from models import Transformer
from optimization import (
    average_weights,
    build_optimizer,
    disagreement_sum,
    loss_sums,
    lr_at,
    paper_lr,
    train_step,
)

pytestmark = pytest.mark.usefixtures("seeded_float64")


def batch_of(make, src_lengths=SRC_LENGTHS, tgt_lengths=TGT_LENGTHS) -> Batch:
    src = sentences(src_lengths)
    if make is transformer:
        tgt = sentences(tgt_lengths)
        tgt_in, tgt_out = tgt, torch.where(tgt == PAD, NO_TARGET, tgt)
    else:
        tgt_in = torch.full((len(src), 1), BOS)
        tgt_out = torch.randint(N_CLASSES, tgt_in.shape)
    n_targets = int((tgt_out != NO_TARGET).sum())
    return Batch(src, tgt_in, tgt_out, n_targets, n_tokens=0)


def concatenated(batches: list[Batch]) -> Batch:
    def rows(name, value):
        return pad([row for b in batches for row in getattr(b, name).tolist()], value)

    n_targets = sum(batch.n_targets for batch in batches)
    tensors = rows("src", PAD), rows("tgt_in", PAD), rows("tgt_out", NO_TARGET)
    return Batch(*tensors, n_targets, n_tokens=0)


def step(model, batches, optimizer, *, lr=1e-3, max_norm=1e9, scaled=False) -> Tensor:
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    rest = {"lr": lr, "max_norm": max_norm, "label_smoothing": 0.1}
    return train_step(model, batches, optimizer, scaler, contextlib.nullcontext(), **rest)


def step_on_meta(make, wrong=None) -> Tensor:
    """On a device without values: reading one, or using a CPU tensor, fails."""
    model = make(dropout=0.1).to("meta")
    if wrong is not None:
        model.output.register_forward_hook(lambda module, args, logits: wrong(logits))
    optimizer = build_optimizer(model, weight_decay=0.01, fused=False)
    batches = [batch_of(make).to(torch.device("meta")) for _ in range(2)]
    return step(model, batches, optimizer, max_norm=1.0)


@each_model
def test_a_step_does_not_synchronize_the_device(make):
    sums = step_on_meta(make)
    assert sums.shape == (3,) and sums.is_meta


@pytest.mark.parametrize(
    "wrong",
    [
        lambda logits: logits * logits.max().item(),
        lambda logits: logits + torch.ones(logits.shape),
        lambda logits: logits[logits > 0],
    ],
    ids=["item", "cpu", "shape"],
)
@each_model
def test_the_meta_device_detects_synchronization(make, wrong):
    with pytest.raises(RuntimeError, match=r"meta"):
        step_on_meta(make, wrong)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_matches_the_formula_and_torch_cross_entropy(smoothing):
    n = 7
    logits = torch.randn(2, 4, n, requires_grad=True)
    tgt_out = torch.tensor([[3, 0, 6, NO_TARGET], [1, NO_TARGET, NO_TARGET, NO_TARGET]])
    loss_sum, nll_sum = loss_sums(logits, tgt_out, smoothing)

    by_hand = {0.0: 0.0, smoothing: 0.0}
    for scores, target in zip(as_numpy(logits).reshape(-1, n), tgt_out.flatten().tolist()):
        if target != NO_TARGET:
            log_p = np.log(np.exp(scores) / np.exp(scores).sum())
            for s in by_hand:
                q = np.full(n, s / n) + (1 - s) * np.eye(n)[target]
                by_hand[s] -= (q * log_p).sum()
    assert loss_sum.item() == pytest.approx(by_hand[smoothing], rel=1e-6)
    assert nll_sum.item() == pytest.approx(by_hand[0.0], rel=1e-6)

    rest = {"reduction": "sum", "label_smoothing": smoothing, "ignore_index": NO_TARGET}
    expected = F.cross_entropy(logits.flatten(0, 1), tgt_out.flatten(), **rest)
    assert loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss_sum, logits)
    assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-6, atol=1e-6)
    assert not nll_sum.requires_grad


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Its step, unlike Adam's, is proportional to the gradient."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@each_model
def test_micro_batches_of_unequal_size_and_one_batch_make_the_same_step(make):
    first, (few, many) = make(), (((3, 5), (2, 1)), ((7, 1, 4, 2), (4, 6, 3, 6)))
    batches = [batch_of(make, *few), batch_of(make, *many)]
    whole = concatenated(batches)

    results = []
    for parts in (batches, [whole]):
        model = make()
        model.load_state_dict(first.state_dict())
        sums = step(model, parts, sgd(model))
        assert all(p.grad is None for p in model.parameters())  # or the next step would add to it
        results.append((weights_of(model), sums))
    (in_parts, sums), (at_once, sums_at_once) = results
    assert_close(in_parts, at_once, rtol=0, atol=1e-10)
    assert_close(sums, sums_at_once)

    logits = first(whole.src, whole.tgt_in)
    flat, targets = logits.flatten(0, 1), whole.tgt_out.flatten()
    F.cross_entropy(flat, targets, label_smoothing=0.1, ignore_index=NO_TARGET).backward()
    descent = torch.cat([p.grad.flatten() for p in first.parameters()])
    # The loss is computed in float32, this one in float64.
    assert_close(in_parts, weights_of(first) - 1e-3 * descent, rtol=0, atol=1e-8)
    nll = F.cross_entropy(flat, targets, reduction="sum", ignore_index=NO_TARGET)
    right = (flat.argmax(dim=-1) == targets).sum()
    assert_close(sums, torch.stack((nll.detach(), right, torch.zeros(()))).float())


@pytest.mark.parametrize("scaled", [False, True])
def test_max_norm_scales_down_a_long_gradient_only(scaled):
    first, batch, steps = transformer(), batch_of(transformer), []
    for max_norm in (1e9, 1e3, 0.1):
        model = transformer()
        model.load_state_dict(first.state_dict())
        step(model, [batch], sgd(model), lr=1.0, max_norm=max_norm, scaled=scaled)
        steps.append(weights_of(model) - weights_of(first))
    long, untouched, short = steps
    assert 0.2 < long.norm() < 1e3
    assert_close(untouched, long, rtol=1e-6, atol=1e-10)
    assert_close(short, long * 0.1 / long.norm(), rtol=1e-5, atol=1e-10)


def test_the_optimizer_is_the_papers_adam_and_decays_matrices_only():
    model = transformer()
    optimizer = build_optimizer(model, weight_decay=0.5)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.98), 1e-9)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    for name, p in model.named_parameters():
        assert_close(p.detach(), before[name] * (0.95 if p.ndim == 2 else 1))


@pytest.mark.parametrize("step", [1, 2000, 4000, 40_000])
def test_learning_rate_matches_equation_3(step):
    size = {"d_model": 512, "warmup_steps": 4000}
    rest = {"schedule": "inverse_sqrt", "warmup_steps": 4000, "n_steps": 100_000}
    expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
    assert lr_at(step, peak=paper_lr(**size), **rest) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule, quarter", [("linear", 0.75), ("cosine", 0.5 + 0.125**0.5)])
def test_learning_rate_falls_from_the_peak_to_0_one_step_after_the_last(schedule, quarter):
    def lr(step):
        return lr_at(step, peak=2.0, schedule=schedule, warmup_steps=100, n_steps=499)

    assert [lr(1), lr(50), lr(100)] == [0.02, 1.0, 2.0]
    assert lr(200) == pytest.approx(2.0 * quarter)
    assert lr(300) == pytest.approx(1.0)
    assert 0 < lr(499) < 0.006
    assert lr(500) == lr(900) == 0


def test_constant_learning_rate_stays_at_its_peak():
    rest = {"schedule": "constant", "warmup_steps": 10, "n_steps": 20}
    assert [lr_at(step, peak=2.0, **rest) for step in (5, 10, 20)] == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("step, warmup_steps", [(0, 10), (1, 0)])
def test_steps_count_from_1(step, warmup_steps):
    with pytest.raises(ValueError, match=f"step {step} and warmup_steps {warmup_steps}"):
        lr_at(step, peak=1.0, schedule="linear", warmup_steps=warmup_steps, n_steps=20)


def test_average_is_the_mean_of_each_weight():
    models = [transformer() for _ in range(3)]
    mean = average_weights(model.state_dict() for model in models)
    assert mean.keys() == models[0].state_dict().keys()
    for name, p in mean.items():
        a, b, c = (model.state_dict()[name] for model in models)
        assert_close(p, (a + b + c) / 3, rtol=1e-12, atol=1e-12)


def test_disagreement_is_the_mean_of_both_divergences_over_the_targets():
    halves = torch.randn(2, 3, 4, 7)
    tgt_out = torch.tensor([[3, 0, 6, 1], [1, 5, NO_TARGET, NO_TARGET], [2] + 3 * [NO_TARGET]])
    p, q = (half.log_softmax(-1)[tgt_out != NO_TARGET] for half in halves)
    one_way, other_way = (
        F.kl_div(a, b, log_target=True, reduction="sum").item() for a, b in ((q, p), (p, q))
    )
    disagreement = disagreement_sum(halves.flatten(0, 1), tgt_out.repeat(2, 1))
    assert disagreement.item() == pytest.approx((one_way + other_way) / 2, rel=1e-5)


@pytest.mark.parametrize("dropout, agree", [(0.0, True), (0.3, False)])
def test_r_drop_without_dropout_makes_the_same_step(dropout, agree):
    weights = []
    for r_drop in (0.0, 5.0):
        torch.manual_seed(0)
        config = ModelConfig(n_layers=1, d_model=16, d_ff=16, n_heads=2, dropout=dropout)
        model = Transformer(config, n_vocab=11, max_len=9, pad_id=0)
        ids = torch.randint(3, 11, (3, 5))
        batch = Batch(ids, ids, ids, n_targets=15, n_tokens=30)
        optimizer = torch.optim.SGD(model.parameters())
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        rates = {"lr": 0.1, "max_norm": 1e9, "label_smoothing": 0.1, "r_drop": r_drop}
        sums = train_step(model, [batch], optimizer, scaler, contextlib.nullcontext(), **rates)
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        assert 0 < sums[0].item() / 15 < 10
    assert torch.allclose(*weights, atol=1e-6) == agree
