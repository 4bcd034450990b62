import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import (
    TOLERANCE,
    as_numpy,
    assert_columns,
    assert_equal_gradients,
    attention_pairs,
    backward,
    copy_weights,
    each_dtype,
    fa_attention,
    fa_layer_norm,
    fa_mhattention,
    fa_mlp,
    fa_position_embedding,
    fa_single_query,
    fa_sinusoids,
    fa_token_embedding,
    fa_unembedding,
    head_weights,
    perturbed,
    seeded_float64,  # noqa: F401
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from components import (
    ACTIVATIONS,
    CAUSAL,
    FORMS,
    Context,
    FeedForward,
    LayerNorm,
    LearnedPositions,
    MHAttention,
    SinusoidalPositions,
    TokenEmbedding,
    Unembedding,
    attention,
    layer_norm,
    single_query_attention,
    sinusoids,
)

pytestmark = pytest.mark.usefixtures("seeded_float64")
# All different, so that no wrong axis can pass.
B, L_X, L_Z, N_HEADS = 2, 5, 7, 3
SIZES = {"d_x": 6, "d_z": 10, "d_attn": 4, "d_mid": 11, "d_out": 9}

each_form = pytest.mark.parametrize("form", FORMS)


def mhattention(form: str, **changes: int) -> MHAttention:
    return perturbed(MHAttention(**{**SIZES, "n_heads": N_HEADS, **changes}, form=form))


def sequences(**changes: int) -> tuple[Tensor, Tensor]:
    sizes = {**SIZES, **changes}
    X = torch.randn(B, L_X, sizes["d_x"], requires_grad=True)
    return X, torch.randn(B, L_Z, sizes["d_z"], requires_grad=True)


def random_mask(*heads: int) -> Tensor:
    Mask = torch.rand(B, *heads, L_X, L_Z) < 0.5
    Mask[..., 3] |= ~Mask.any(dim=-1)  # at least one True
    assert not Mask.all() and Mask.any(dim=-1).all()
    return Mask


# ------------------------------------------------------------------------- compared with the papers


def test_token_embedding_is_algorithm_1_times_sqrt_d_model():
    embedding = TokenEmbedding(13, 6)
    ids = torch.randint(13, (B, L_X))
    for row, vectors in zip(ids.tolist(), embedding(ids)):
        W_e = as_numpy(embedding.W_e).T
        columns = [math.sqrt(6) * fa_token_embedding(v, W_e) for v in row]
        assert_columns(vectors, np.stack(columns, axis=1))


def test_learned_positions_are_algorithm_2():
    positions = LearnedPositions(L_Z, 6)
    X = torch.randn(B, L_X, 6)
    W_p = as_numpy(positions.W_p).T
    columns = np.stack([fa_position_embedding(t, W_p) for t in range(L_X)], axis=1)
    for before, after in zip(X, positions(X)):
        assert_columns(after, as_numpy(before).T + columns)


def test_sinusoidal_positions_match_the_formula_and_are_not_saved():
    positions = SinusoidalPositions(L_Z, 6)
    X = torch.randn(B, L_X, 6)
    for before, after in zip(X, positions(X)):
        assert_columns(after, as_numpy(before).T + fa_sinusoids(6, L_Z)[:, :L_X])
    assert not positions.state_dict()


def test_sinusoids_are_exact_at_late_positions():
    PE = sinusoids(5001, 512)
    assert PE.shape == (5001, 512)
    for t in (0, 1, 777, 5000):
        for two_i in (0, 2, 100, 510):
            angle = t / 10_000 ** (two_i / 512)
            assert PE[t, two_i].item() == pytest.approx(math.sin(angle), abs=1e-9)
            assert PE[t, two_i + 1].item() == pytest.approx(math.cos(angle), abs=1e-9)


def test_sinusoids_refuse_an_odd_d_model():
    with pytest.raises(ValueError, match="d_model 7 is odd"):
        sinusoids(10, 7)


def test_single_query_attention_is_algorithm_3():
    module = mhattention("list", n_heads=1)
    X, Z = sequences()
    for x, z in zip(X, Z):
        v = single_query_attention(module.W_q(x[1]), module.W_k(z), module.W_v(z))
        expected = fa_single_query(as_numpy(x[1]), as_numpy(z).T, *head_weights(module, 0))
        assert_close(v.detach(), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_attention_is_algorithm_4():
    module = mhattention("list", n_heads=1)
    X, Z = sequences()
    Mask = random_mask()
    ours = attention(module.W_q(X), module.W_k(Z), module.W_v(Z), Mask)
    for y, x, z, mask in zip(ours, X, Z, Mask):
        x, z, mask = as_numpy(x).T, as_numpy(z).T, as_numpy(mask).T
        assert_columns(y, fa_attention(x, z, *head_weights(module, 0), mask))


def test_single_query_attention_is_a_row_of_attention():
    Q, K, V = torch.randn(L_X, 4), torch.randn(L_Z, 4), torch.randn(L_Z, 11)
    for q, row in zip(Q, attention(Q, K, V)):
        assert_close(single_query_attention(q, K, V), row, rtol=1e-12, atol=1e-12)


@each_form
def test_mhattention_is_algorithm_5(form):
    module = mhattention(form)
    X, Z = sequences()
    Mask = random_mask(1)
    for y, x, z, mask in zip(module(X, Z, Mask), X, Z, Mask[:, 0]):
        x, z, mask = as_numpy(x).T, as_numpy(z).T, as_numpy(mask).T
        assert_columns(y, fa_mhattention(x, z, module, mask))


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # eps matters with the small one
def test_layer_norm_is_algorithm_6(scale):
    X = scale * (3 + torch.randn(L_X, 6))
    gamma, beta = torch.randn(6), torch.randn(6)
    vectors = [fa_layer_norm(e, as_numpy(gamma), as_numpy(beta)) for e in as_numpy(X)]
    assert_columns(layer_norm(X, gamma, beta, 1e-5), np.stack(vectors, axis=1))


def test_softmax_of_the_unembedding_is_algorithm_7():
    embedding = TokenEmbedding(13, 6)
    X = torch.randn(B, L_X, 6)
    for p, x in zip(Unembedding(embedding)(X).softmax(dim=-1), X):
        columns = [fa_unembedding(e, as_numpy(embedding.W_e)) for e in as_numpy(x)]
        assert_columns(p, np.stack(columns, axis=1))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_feed_forward_matches_the_formula_at_each_position(name):
    module = perturbed(FeedForward(d_model=6, d_ff=14, activation=name))
    X = torch.randn(B, L_X, 6)
    for y, x in zip(module(X), X):
        expected = fa_mlp(
            as_numpy(x).T, module, lambda a: ACTIVATIONS[name](torch.from_numpy(a)).numpy()
        )
        assert_columns(y, expected)


def test_activations_match_their_formulas():
    a = torch.linspace(-3, 3, 13)
    assert_close(ACTIVATIONS["relu"](a), a.clamp(min=0))
    assert_close(ACTIVATIONS["gelu"](a), a * (1 + torch.erf(a / math.sqrt(2))) / 2)


# ----------------------------------------------------- compared with torch.nn, and with one another


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@each_form
@each_dtype
def test_mhattention_matches_torch_multihead_attention(dtype, form, padded, causal):
    torch.set_default_dtype(dtype)
    sizes = {"d_x": 12, "d_z": 10, "d_attn": 4, "d_mid": 4, "d_out": 12}
    ours = mhattention(form, **sizes)
    theirs = nn.MultiheadAttention(12, N_HEADS, kdim=10, vdim=10, batch_first=True)
    pairs = list(attention_pairs(ours, theirs))
    copy_weights(ours, theirs, pairs)
    present = torch.arange(L_Z) < torch.tensor([[L_Z], [4]])  # (b, l_z)
    earlier = torch.arange(L_Z) <= torch.arange(L_X)[:, None]  # (l_x, l_z)
    Mask = None
    if padded or causal:
        Mask = (present[:, None, None] | (not padded)) & (earlier | (not causal))

    X, Z = sequences(**sizes)
    Y = ours(X, Z, Mask)
    backward(Y)
    gradients = X.grad.clone(), Z.grad.clone()
    X.grad, Z.grad = None, None
    expected, _ = theirs(
        *(X, Z, Z),
        key_padding_mask=~present if padded else None,
        attn_mask=~earlier if causal else None,
    )
    backward(expected)
    tolerance = TOLERANCE[dtype]
    actual = (Y, *gradients)
    assert_close(actual, (expected, X.grad, Z.grad), rtol=tolerance, atol=tolerance)
    assert_equal_gradients(pairs, tolerance)


def outputs_and_gradients(module: nn.Module, X: Tensor, Z: Tensor, Mask) -> tuple[Tensor, ...]:
    X.grad, Z.grad = None, None
    module.zero_grad()
    Y = module(X, Z, Mask)
    backward(Y)
    return Y, X.grad, Z.grad, *(p.grad.clone() for p in module.parameters())


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("d_mid", [4, 11])
@each_form
@each_dtype
def test_the_forms_agree_and_share_their_weights(dtype, form, d_mid, masked):
    torch.set_default_dtype(dtype)
    first, second = mhattention("list", d_mid=d_mid), mhattention(form, d_mid=d_mid)
    second.load_state_dict(first.state_dict(), strict=True)
    Mask = random_mask(N_HEADS) if masked else None  # a different one for each head
    X, Z = sequences()
    expected = outputs_and_gradients(first, X, Z, Mask)
    actual = outputs_and_gradients(second, X, Z, Mask)
    assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("d_mid", [4, 11])
@each_form
@each_dtype
def test_causal_attention_matches_attention_with_a_causal_mask(dtype, form, d_mid):
    torch.set_default_dtype(dtype)
    module = mhattention(form, d_z=6, d_mid=d_mid)
    X, Z = sequences()[0], torch.randn(B, L_X, 6, requires_grad=True)
    Mask = torch.tensor([[t_z <= t_x for t_z in range(L_X)] for t_x in range(L_X)])
    expected = outputs_and_gradients(module, X, Z, Mask)
    actual = outputs_and_gradients(module, X, Z, CAUSAL)
    assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_fused_attention_passes_the_kernel_a_flag_and_no_causal_mask(monkeypatch):
    calls = []
    kernel = F.scaled_dot_product_attention

    def spy(Q, K, V, Mask=None, *, is_causal=False):
        calls.append((Mask is None, is_causal))
        return kernel(Q, K, V, Mask, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    module, (X, _), past = mhattention("fused", d_z=6), sequences(), Context()
    module(X, X, CAUSAL)
    module(X[:, :1], X[:, :1], CAUSAL, past)
    module(X[:, 1:2], X[:, 1:2], CAUSAL, past)
    assert calls == [(True, True), (True, True), (True, False)]  # the last query sees everything


@pytest.mark.parametrize("parts", [(1, 1, 1, 1, 1), (3, 2), (1, 3, 1)], ids=str)
@each_form
def test_causal_attention_in_parts_matches_causal_attention_at_once(form, parts):
    module, (X, _), past = mhattention(form, d_z=6), sequences(), Context()
    Y = torch.cat([module(x, x, CAUSAL, past) for x in X.split(parts, dim=1)], dim=1)
    assert_close(Y, module(X, X, CAUSAL), rtol=1e-12, atol=1e-12)
    assert past.n_positions == L_X


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_layer_norm_module_function_and_torch_agree(scale):
    ours, theirs = perturbed(LayerNorm(6)), nn.LayerNorm(6)
    pairs = [(theirs.weight, [ours.gamma]), (theirs.bias, [ours.beta])]
    copy_weights(ours, theirs, pairs)
    X = scale * (3 + torch.randn(B, L_X, 6))
    Y = layer_norm(X, ours.gamma, ours.beta, ours.eps)
    assert_close(Y, ours(X), rtol=1e-12, atol=1e-12)
    assert_close(Y, theirs(X), rtol=1e-12, atol=1e-12)
    backward(Y)
    backward(theirs(X))
    assert_equal_gradients(pairs, 1e-12)


# ------------------------------------------------------- gradients compared with finite differences


def gradcheck(module: nn.Module, *inputs: Tensor, Mask: tuple[Tensor, ...] = ()) -> bool:
    """Checks the gradients of inputs and weights."""
    names, weights = zip(*module.named_parameters())
    n = len(inputs)

    def function(*tensors):
        return functional_call(module, dict(zip(names, tensors[n:])), (*tensors[:n], *Mask))

    return torch.autograd.gradcheck(function, (*inputs, *weights))


@each_form
def test_gradcheck_of_mhattention(form):
    module = mhattention(form, d_x=2, d_z=3, d_attn=2, d_mid=1, d_out=4, n_heads=2)
    X, Z = sequences(d_x=2, d_z=3)
    assert gradcheck(module, X, Z, Mask=(random_mask(1),))


@pytest.mark.parametrize(
    "make", [lambda: LayerNorm(6), lambda: FeedForward(6, 4, "gelu")], ids=["norm", "ff"]
)
def test_gradcheck_of_layer_norm_and_feed_forward(make):
    X, _ = sequences()
    assert gradcheck(perturbed(make()), X)
