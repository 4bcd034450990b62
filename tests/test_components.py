import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from components import (
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

FORMS = ("list", "matmul", "fused")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
# All different, so that no wrong axis can pass.
B, L_X, L_Z, N_HEADS = 2, 5, 7, 3
SIZES = {"d_x": 6, "d_z": 10, "d_attn": 4, "d_mid": 11, "d_out": 9}

each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def seeded_float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# -------------------------------------------------------------------------------------------------
# Formal Algorithms for Transformers (FA), as printed: tokens are columns, and Mask[t_z, t_x].


def fa_token_embedding(v, W_e):
    """Algorithm 1."""
    return W_e[:, v]


def fa_position_embedding(t, W_p):
    """Algorithm 2."""
    return W_p[:, t]


def fa_sinusoids(d_e, l_max):
    """W_p of FA's section 4, but as in AIAYN: base 10,000, i - 1 in the exponent, t from 0."""
    W_p = np.empty((d_e, l_max))
    for t in range(l_max):
        for i in range(1, d_e // 2 + 1):
            angle = t / 10_000 ** (2 * (i - 1) / d_e)
            W_p[2 * i - 1 - 1, t] = math.sin(angle)  # rows counted from 1 in FA
            W_p[2 * i - 1, t] = math.cos(angle)
    return W_p


def fa_single_query(e, E, W_q, b_q, W_k, b_k, W_v, b_v):
    """Algorithm 3."""
    l_z, d_attn = E.shape[1], len(b_q)
    q = W_q @ e + b_q
    k = [W_k @ E[:, t] + b_k for t in range(l_z)]
    v = [W_v @ E[:, t] + b_v for t in range(l_z)]
    exps = [math.exp(q @ k[t] / math.sqrt(d_attn)) for t in range(l_z)]
    return sum(exps[t] / sum(exps) * v[t] for t in range(l_z))


def fa_softmax(A):
    P = np.empty_like(A)
    for t_x in range(A.shape[1]):
        P[:, t_x] = np.exp(A[:, t_x]) / np.exp(A[:, t_x]).sum()
    return P


def fa_attention(X, Z, W_q, b_q, W_k, b_k, W_v, b_v, Mask):
    """Algorithm 4."""
    Q = W_q @ X + np.outer(b_q, np.ones(X.shape[1]))
    K = W_k @ Z + np.outer(b_k, np.ones(Z.shape[1]))
    V = W_v @ Z + np.outer(b_v, np.ones(Z.shape[1]))
    S = K.T @ Q
    for t_z in range(Z.shape[1]):
        for t_x in range(X.shape[1]):
            if not Mask[t_z, t_x]:
                S[t_z, t_x] = -np.inf
    return V @ fa_softmax(S / math.sqrt(len(b_q)))


def fa_mhattention(X, Z, module, Mask):
    """Algorithm 5, with the weights of one of our modules."""
    heads = range(module.n_heads)
    Y = np.vstack([fa_attention(X, Z, *head_weights(module, h), Mask) for h in heads])
    W_o, b_o = as_numpy(module.W_o.weight), as_numpy(module.W_o.bias)
    return W_o @ Y + np.outer(b_o, np.ones(X.shape[1]))


def fa_layer_norm(e, gamma, beta, eps=1e-5):
    """Algorithm 6, with the usual eps."""
    d_e = len(e)
    m = sum(e[i] for i in range(d_e)) / d_e
    v = sum((e[i] - m) ** 2 for i in range(d_e)) / d_e
    return (e - m) / math.sqrt(v + eps) * gamma + beta


def fa_unembedding(e, W_u):
    """Algorithm 7."""
    return np.exp(W_u @ e) / np.exp(W_u @ e).sum()


def fa_mlp(X, module, activation=lambda a: np.maximum(a, 0.0)):
    """Line 7 of Algorithm 8, with the weights of one of our modules."""
    W_1, b_1, W_2, b_2 = map(as_numpy, module.parameters())
    ones = np.ones(X.shape[1])
    return W_2 @ activation(W_1 @ X + np.outer(b_1, ones)) + np.outer(b_2, ones)


# -------------------------------------------------------------------------------------------------
# Helpers, which test_models uses too


def as_numpy(X: Tensor) -> np.ndarray:
    return X.detach().numpy()


def assert_columns(rows: Tensor, columns: np.ndarray) -> None:
    """Ours, one token a row, is the paper's, one token a column."""
    assert_close(rows.detach().mT, torch.from_numpy(columns), rtol=1e-12, atol=1e-12)


def perturbed(module: nn.Module) -> nn.Module:
    """With no bias at 0 and no gamma at 1, where an error could hide."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return module


def head_weights(module: MHAttention, head: int) -> list[np.ndarray]:
    """W_q, b_q, W_k, b_k, W_v, b_v of one head: its rows of the joint matrices."""
    weights = []
    for W in (module.W_q, module.W_k, module.W_v):
        d = W.out_features // module.n_heads
        rows = slice(head * d, (head + 1) * d)
        weights += [as_numpy(W.weight)[rows], as_numpy(W.bias)[rows]]
    return weights


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


def backward(Y: Tensor) -> None:
    """Of a loss to which each number of Y has its own weight, the same in every call.

    The root keeps gradients near 1, which the tolerances are meant for.
    """
    weights = torch.randn(Y.shape, generator=torch.Generator().manual_seed(1))
    ((Y * weights).sum() / math.sqrt(Y.numel())).backward()


def attention_pairs(ours: MHAttention, theirs: nn.MultiheadAttention):
    """Each parameter of torch's attention, with those of ours which, stacked, are the same."""
    projections = (ours.W_q, ours.W_k, ours.W_v)
    W = [p.weight for p in projections]
    if theirs.in_proj_weight is not None:
        yield theirs.in_proj_weight, W
    else:
        yield theirs.q_proj_weight, [W[0]]
        yield theirs.k_proj_weight, [W[1]]
        yield theirs.v_proj_weight, [W[2]]
    yield theirs.in_proj_bias, [p.bias for p in projections]
    yield theirs.out_proj.weight, [ours.W_o.weight]
    yield theirs.out_proj.bias, [ours.W_o.bias]


def copy_weights(ours: nn.Module, theirs: nn.Module, pairs: list) -> None:
    """From ours to theirs; pairs must name every parameter of both."""
    assert {p for p, _ in pairs} == set(theirs.parameters())
    assert {p for _, stack in pairs for p in stack} == set(ours.parameters())
    with torch.no_grad():
        for p, stack in pairs:
            p.copy_(torch.cat(stack))


def assert_equal_gradients(pairs: list, tolerance: float) -> None:
    for theirs, stack in pairs:
        ours = torch.cat([p.grad for p in stack])
        assert_close(ours, theirs.grad, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------
# Equality with the paper


def test_token_embedding_is_algorithm_1_times_the_root_of_d_model():
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


def test_sinusoidal_positions_are_the_formula_and_no_parameter():
    positions = SinusoidalPositions(L_Z, 6)
    X = torch.randn(B, L_X, 6)
    for before, after in zip(X, positions(X)):
        assert_columns(after, as_numpy(before).T + fa_sinusoids(6, L_Z)[:, :L_X])
    assert not positions.state_dict()


def test_sinusoids_are_exact_far_out():
    PE = sinusoids(5001, 512)
    assert PE.shape == (5001, 512)
    for t in (0, 1, 777, 5000):
        for two_i in (0, 2, 100, 510):
            angle = t / 10_000 ** (two_i / 512)
            assert PE[t, two_i].item() == pytest.approx(math.sin(angle), abs=1e-9)
            assert PE[t, two_i + 1].item() == pytest.approx(math.cos(angle), abs=1e-9)


def test_an_odd_d_model_has_no_sinusoids():
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


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # with the small one, eps has a say
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


@pytest.mark.parametrize(
    "name, activation",
    [
        ("relu", lambda a: np.maximum(a, 0.0)),
        ("gelu", lambda a: a * (1 + np.vectorize(math.erf)(a / math.sqrt(2))) / 2),
    ],
)
def test_feed_forward_is_the_formula_at_each_position(name, activation):
    module = perturbed(FeedForward(d_model=6, d_ff=14, activation=name))
    X = torch.randn(B, L_X, 6)
    for y, x in zip(module(X), X):
        assert_columns(y, fa_mlp(as_numpy(x).T, module, activation))


# -------------------------------------------------------------------------------------------------
# Equality with torch.nn, and of the forms with one another


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@each_form
@each_dtype
def test_mhattention_is_torch_multihead_attention(dtype, form, padded, causal):
    torch.set_default_dtype(dtype)
    sizes = {"d_x": 12, "d_z": 10, "d_attn": 4, "d_mid": 4, "d_out": 12}
    ours = mhattention(form, **sizes)
    theirs = nn.MultiheadAttention(12, N_HEADS, kdim=10, vdim=10, batch_first=True)
    pairs = list(attention_pairs(ours, theirs))
    copy_weights(ours, theirs, pairs)
    there = torch.arange(L_Z) < torch.tensor([[L_Z], [4]])  # (b, l_z)
    earlier = torch.arange(L_Z) <= torch.arange(L_X)[:, None]  # (l_x, l_z)
    Mask = None
    if padded or causal:
        Mask = (there[:, None, None] | (not padded)) & (earlier | (not causal))

    X, Z = sequences(**sizes)
    Y = ours(X, Z, Mask)
    backward(Y)
    gradients = X.grad.clone(), Z.grad.clone()
    X.grad, Z.grad = None, None
    expected, _ = theirs(
        *(X, Z, Z),
        key_padding_mask=~there if padded else None,
        attn_mask=~earlier if causal else None,
    )
    backward(expected)
    tolerance = TOLERANCE[dtype]
    actual = (Y, *gradients)
    assert_close(actual, (expected, X.grad, Z.grad), rtol=tolerance, atol=tolerance)
    assert_equal_gradients(pairs, tolerance)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("d_mid", [4, 11])
@each_dtype
def test_the_forms_agree_and_share_their_weights(dtype, d_mid, masked):
    torch.set_default_dtype(dtype)
    first = mhattention("list", d_mid=d_mid)
    Mask = random_mask(N_HEADS) if masked else None  # another one for each head
    X, Z = sequences()
    results = []
    for form in FORMS:
        module = mhattention(form, d_mid=d_mid)
        module.load_state_dict(first.state_dict(), strict=True)
        X.grad, Z.grad = None, None
        Y = module(X, Z, Mask)
        backward(Y)
        results.append((Y, X.grad, Z.grad, *(p.grad for p in module.parameters())))
    tolerance = TOLERANCE[dtype]
    assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    assert_close(results[2], results[0], rtol=tolerance, atol=tolerance)


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


# -------------------------------------------------------------------------------------------------
# Gradients against differences


def gradcheck(module: nn.Module, *inputs: Tensor, Mask: tuple[Tensor, ...] = ()) -> bool:
    """Of the inputs and of the weights."""
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
    "make", [lambda: LayerNorm(6), lambda: FeedForward(d_model=6, d_ff=4)], ids=["norm", "ff"]
)
def test_gradcheck_of_layer_norm_and_feed_forward(make):
    X, _ = sequences()
    assert gradcheck(perturbed(make()), X)
