"""The references that the model is tested against, and small models to test.

The papers' pseudocode in NumPy, the same weights in torch.nn, and every combination of options.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from components import MHAttention
from config import ModelConfig
from data import pad
from models import Transformer, TransformerClassifier

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture
def seeded_float64() -> Iterator[None]:
    """Fixed random numbers, in float64."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------- Formal Algorithms for Transformers (FA)
# As printed: tokens are columns, and Mask[t_z, t_x].


def fa_token_embedding(v, W_e):
    """Algorithm 1."""
    return W_e[:, v]


def fa_position_embedding(t, W_p):
    """Algorithm 2."""
    return W_p[:, t]


def fa_sinusoids(d_e, l_max):
    """W_p of FA's section 4, with AIAYN's base 10,000, exponent from 0 and t from 0."""
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
    """Algorithm 5, with the weights of an MHAttention."""
    heads = range(module.n_heads)
    Y = np.vstack([fa_attention(X, Z, *head_weights(module, h), Mask) for h in heads])
    W_o, b_o = as_numpy(module.W_o.weight), as_numpy(module.W_o.bias)
    return W_o @ Y + np.outer(b_o, np.ones(X.shape[1]))


def fa_layer_norm(e, gamma, beta, eps=1e-5):
    """Algorithm 6, with eps under the root."""
    d_e = len(e)
    m = sum(e[i] for i in range(d_e)) / d_e
    v = sum((e[i] - m) ** 2 for i in range(d_e)) / d_e
    return (e - m) / math.sqrt(v + eps) * gamma + beta


def fa_unembedding(e, W_u):
    """Algorithm 7."""
    return np.exp(W_u @ e) / np.exp(W_u @ e).sum()


def fa_mlp(X, module, activation=lambda a: np.maximum(a, 0.0)):
    """Line 7 of Algorithm 8, with the weights of a FeedForward."""
    W_1, b_1, W_2, b_2 = map(as_numpy, module.parameters())
    ones = np.ones(X.shape[1])
    return W_2 @ activation(W_1 @ X + np.outer(b_1, ones)) + np.outer(b_2, ones)


def fa_transformer(z: list[int], x: list[int], model: Transformer) -> np.ndarray:
    """Algorithm 8 up to W_u X, before the softmax: (n_vocab, length of x).

    Embedding factor and sinusoids are AIAYN's.
    """
    W_e = as_numpy(model.embedding.W_e).T
    d_e = len(W_e)
    W_p = fa_sinusoids(d_e, 11)

    def embed(ids):
        e = [math.sqrt(d_e) * fa_token_embedding(v, W_e) + W_p[:, t] for t, v in enumerate(ids)]
        return np.stack(e, axis=1)

    def norm(X, module):
        gamma, beta = as_numpy(module.gamma), as_numpy(module.beta)
        return np.stack([fa_layer_norm(e, gamma, beta) for e in X.T], axis=1)

    Z = embed(z)
    see_all = np.ones((len(z), len(z)), dtype=bool)
    for layer in model.encoder:
        Z = norm(Z + fa_mhattention(Z, Z, layer.self_attention, see_all), layer.norm_1)
        Z = norm(Z + fa_mlp(Z, layer.feed_forward), layer.norm_2)

    X = embed(x)
    Mask = np.array([[t <= t_x for t_x in range(len(x))] for t in range(len(x))])
    see_all = np.ones((len(z), len(x)), dtype=bool)
    for layer in model.decoder:
        X = norm(X + fa_mhattention(X, X, layer.self_attention, Mask), layer.norm_1)
        X = norm(X + fa_mhattention(X, Z, layer.cross_attention, see_all), layer.norm_2)
        X = norm(X + fa_mlp(X, layer.feed_forward), layer.norm_3)
    return W_e.T @ X


# ----------------------------------------------------------------------------------------- torch.nn


def attention_pairs(ours: MHAttention, theirs: nn.MultiheadAttention):
    """Each parameter of torch's attention with ours, which are the same when stacked."""
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
    """Copies ours to theirs; pairs must name every parameter of both."""
    assert {p for p, _ in pairs} == set(theirs.parameters())
    assert {p for _, stack in pairs for p in stack} == set(ours.parameters())
    with torch.no_grad():
        for p, stack in pairs:
            p.copy_(torch.cat(stack))


def assert_equal_gradients(pairs: list, tolerance: float) -> None:
    for theirs, stack in pairs:
        ours = torch.cat([p.grad for p in stack])
        assert_close(ours, theirs.grad, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------ helpers


def as_numpy(X: Tensor) -> np.ndarray:
    return X.detach().numpy()


def assert_columns(rows: Tensor, columns: np.ndarray) -> None:
    """Our tokens, in rows, equal the paper's, in columns."""
    assert_close(rows.detach().mT, torch.from_numpy(columns), rtol=1e-12, atol=1e-12)


def perturbed(module: nn.Module) -> nn.Module:
    """Moves every parameter off its initial 0 or 1, which could hide an error."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return module


def head_weights(module: MHAttention, head: int) -> list[np.ndarray]:
    """W_q, b_q, W_k, b_k, W_v, b_v of one head: its rows of the stacked matrices."""
    weights = []
    for W in (module.W_q, module.W_k, module.W_v):
        d = W.out_features // module.n_heads
        rows = slice(head * d, (head + 1) * d)
        weights += [as_numpy(W.weight)[rows], as_numpy(W.bias)[rows]]
    return weights


def backward(Y: Tensor) -> None:
    """Backward pass of a fixed random weighting of Y, scaled so that gradients are near 1."""
    weights = torch.randn(Y.shape, generator=torch.Generator().manual_seed(1))
    ((Y * weights).sum() / math.sqrt(Y.numel())).backward()


# ------------------------------------------------------------------------------------- small models

PAD, BOS, EOS, N_VOCAB, N_CLASSES = 0, 1, 2, 17, 5
SMALL = ModelConfig(n_layers=2, d_model=12, d_ff=20, n_heads=3, dropout=0.0)
SRC_LENGTHS, TGT_LENGTHS = (7, 4, 1), (5, 2, 6)


def combinations(*without: str) -> Callable:
    """Parametrizes `choice` over every combination of the options of ModelConfig with choices."""
    values = {
        field.name: field.metadata["choices"]
        for field in fields(ModelConfig)
        if "choices" in field.metadata and field.name not in without
    }
    products = [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]
    return pytest.mark.parametrize("choice", products, ids=lambda choice: "-".join(choice.values()))


def transformer(**changes) -> Transformer:
    config = replace(SMALL, **changes)
    return perturbed(Transformer(config, n_vocab=N_VOCAB, max_len=11, pad_id=PAD))


def classifier(**changes) -> TransformerClassifier:
    sizes = {"n_vocab": N_VOCAB, "n_classes": N_CLASSES, "max_len": 11, "pad_id": PAD}
    return perturbed(TransformerClassifier(replace(SMALL, **changes), **sizes))


each_model = pytest.mark.parametrize("make", [transformer, classifier])


def sentences(lengths: tuple[int, ...]) -> Tensor:
    return pad([torch.randint(EOS + 1, N_VOCAB, (n,)).tolist() for n in lengths], PAD)


def inputs(make) -> tuple[Tensor, Tensor]:
    """src and tgt_in for a model of that kind."""
    start = torch.full((len(SRC_LENGTHS), 1), BOS)
    return sentences(SRC_LENGTHS), sentences(TGT_LENGTHS) if make is transformer else start
