"""The parts of the Transformer, one class or function per equation. Maths only.

Sources: *Formal Algorithms for Transformers* (FA, arXiv 2207.09238), whose algorithm numbers,
letters and signatures are used here, and *Attention Is All You Need* (AIAYN, arXiv 1706.03762). FA
writes tokens as columns and `Mask[t_z, t_x]`; here tokens are rows, so every formula stands
transposed and it is `Mask[t_x, t_z]`.

Letters of the shape comments: b batch, h heads, l_x primary length, l_z context length.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


# ---------------------------------------------------------------------------------------- embedding


class TokenEmbedding(nn.Module):
    """e = sqrt(d_model) * W_e[v]: one learned row for each token of the vocabulary.

    Source: FA, Algorithm 1; the factor is of AIAYN, section 3.4.
    Shapes: ids (...) int64 in [0, n_vocab); returns (..., d_model).
    """

    def __init__(self, n_vocab: int, d_model: int) -> None:
        super().__init__()
        self.W_e = nn.Parameter(torch.empty(n_vocab, d_model))
        # After the factor sqrt(d_model) an embedding has unit variance, like a position; as W_u
        # (Unembedding) the same rows then give logits of unit variance for a layer-normed input.
        nn.init.normal_(self.W_e, std=d_model**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.W_e) * math.sqrt(self.W_e.shape[1])


def sinusoids(max_len: int, d_model: int, *, base: float = 10_000.0) -> Tensor:
    """PE[t, 2i] = sin(t / base^(2i / d_model)) and PE[t, 2i + 1] = cos(t / base^(2i / d_model)).

    Source: AIAYN, section 3.5, with t counted from 0; FA, section 4.
    Returns (max_len, d_model) float64. Raises ValueError if d_model is odd.
    """
    if d_model % 2:
        raise ValueError(f"sinusoids: d_model {d_model} is odd; each wavelength takes two numbers")
    # float64, or a late position is off by 1e-4; on the CPU, for MPS has no float64.
    t = torch.arange(max_len, dtype=torch.float64, device="cpu")
    two_i = torch.arange(0, d_model, 2, dtype=torch.float64, device="cpu")
    angle = t[:, None] / base ** (two_i / d_model)  # (max_len, d_model / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


class SinusoidalPositions(nn.Module):
    """X + PE[start : start + l]. The table follows from its size, so it is in no checkpoint.

    Shapes: X (b, l, d_model), l <= max_len; returns the same.
    """

    def __init__(self, max_len: int, d_model: int) -> None:
        super().__init__()
        PE = sinusoids(max_len, d_model).to(torch.get_default_dtype())
        self.register_buffer("PE", PE, persistent=False)

    def forward(self, X: Tensor, start: int = 0) -> Tensor:
        return X + self.PE[start : start + X.shape[1]]


class LearnedPositions(nn.Module):
    """X + W_p[start : start + l]: one learned row for each position.

    Source: FA, Algorithm 2; AIAYN, Table 3, row E.
    Shapes: X (b, l, d_model), l <= max_len; returns the same.
    """

    def __init__(self, max_len: int, d_model: int) -> None:
        super().__init__()
        self.W_p = nn.Parameter(torch.empty(max_len, d_model))
        nn.init.normal_(self.W_p, std=0.02)  # small beside the embedding: tokens count at first

    def forward(self, X: Tensor, start: int = 0) -> Tensor:
        return X + self.W_p[start : start + X.shape[1]]


POSITIONS = {"sinusoidal": SinusoidalPositions, "learned": LearnedPositions}


class Unembedding(nn.Module):
    """logits = W_u e; softmax(logits) is FA's p, and is left to the loss, which wants its
    logarithm.

    Source: FA, Algorithm 7. W_u is the matrix W_e of the token embedding (AIAYN, section 3.4),
    without its factor.
    Shapes: X (..., d_model); returns (..., n_vocab).
    """

    def __init__(self, embedding: TokenEmbedding) -> None:
        super().__init__()
        self.W_u = embedding.W_e

    def forward(self, X: Tensor) -> Tensor:
        return X @ self.W_u.T


# ---------------------------------------------------------------------------------------- attention


def single_query_attention(q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """v = sum_t alpha_t v_t with alpha = softmax(q K^T / sqrt(d_attn)): what one token takes from
    its context.

    Source: FA, Algorithm 3. It is here for the reader; `attention` does the same for all queries at
    once.
    Shapes: q (d_attn), K (l_z, d_attn), V (l_z, d_mid); returns (d_mid).
    """
    alpha = torch.softmax(K @ q / math.sqrt(q.shape[-1]), dim=-1)  # (l_z)
    return alpha @ V


def attention_weights(Q: Tensor, K: Tensor, Mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d_attn)) over the context, 0 where Mask is False. Source: AIAYN,
    equation 1.

    Shapes: Q (..., l_x, d_attn), K (..., l_z, d_attn), Mask -> (..., l_x, l_z) bool; returns (...,
    l_x, l_z).
    """
    S = Q @ K.transpose(-2, -1) / math.sqrt(Q.shape[-1])  # (..., l_x, l_z)
    if Mask is not None:
        S = S.masked_fill(~Mask, float("-inf"))
    return S.softmax(dim=-1)


def attention(Q: Tensor, K: Tensor, V: Tensor, Mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention: softmax(Q K^T / sqrt(d_attn)) V.

    Source: FA, Algorithm 4, after its projections; AIAYN, equation 1.
    Shapes: Q (..., l_x, d_attn), K (..., l_z, d_attn), V (..., l_z, d_mid), Mask -> (..., l_x, l_z)
    bool, True = may attend; returns (..., l_x, d_mid). A row of Mask with no True gives NaN:
    callers keep one True.
    """
    return attention_weights(Q, K, Mask) @ V


class MHAttention(nn.Module):
    """MHAttention(X, Z | W_q, W_k, W_v, W_o, Mask) = [Y_1; ...; Y_h] W_o, with Y_i of head i.

    Source: FA, Algorithms 4 and 5; AIAYN, section 3.2.2.
    Shapes: X (b, l_x, d_x), Z (b, l_z, d_z), Mask -> (b, h, l_x, l_z) bool; (b, l_x, d_out) out.
    form: how it is computed, never what. "list" takes one head after the other, as the algorithm is
    written, "matmul" all heads in one product, "fused" leaves `attention` to torch's kernel.
    A row of Mask with no True is not defined: callers keep at least one position visible.
    """

    def __init__(
        self, *, d_x: int, d_z: int, d_attn: int, d_mid: int, d_out: int, n_heads: int, form: str
    ) -> None:
        super().__init__()
        self.n_heads, self.form = n_heads, form
        self.W_q = nn.Linear(d_x, n_heads * d_attn)
        self.W_k = nn.Linear(d_z, n_heads * d_attn)
        self.W_v = nn.Linear(d_z, n_heads * d_mid)
        self.W_o = nn.Linear(n_heads * d_mid, d_out)
        for W in (self.W_q, self.W_k, self.W_v, self.W_o):
            init_linear(W)

    def forward(self, X: Tensor, Z: Tensor, Mask: Tensor | None = None) -> Tensor:
        return self.attend(X, *self.keys_values(Z), Mask)

    def keys_values(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        """K (b, h, l_z, d_attn) and V (b, h, l_z, d_mid) of a context, which decoding keeps."""
        return self._project(Z, self.W_k), self._project(Z, self.W_v)

    def attend(self, X: Tensor, K: Tensor, V: Tensor, Mask: Tensor | None = None) -> Tensor:
        """MHAttention from X to a context whose keys and values are there already."""
        Q = self._project(X, self.W_q)  # (b, h, l_x, d_attn)
        if self.form == "fused":
            Y = F.scaled_dot_product_attention(Q, K, V, Mask)
        elif self.form == "matmul":
            Y = attention(Q, K, V, Mask)
        else:
            Masks = [None] * self.n_heads
            if Mask is not None:
                Masks = Mask.expand(*Q.shape[:3], K.shape[2]).unbind(1)  # each (b, l_x, l_z)
            heads = zip(Q.unbind(1), K.unbind(1), V.unbind(1), Masks)
            Y = torch.stack([attention(*head) for head in heads], dim=1)
        return self.W_o(Y.transpose(1, 2).flatten(2))  # (b, h, l_x, d_mid) -> (b, l_x, d_out)

    def weights(self, X: Tensor, Z: Tensor, Mask: Tensor | None = None) -> Tensor:
        """How much each position of X takes of each position of Z: (b, h, l_x, l_z)."""
        return attention_weights(self._project(X, self.W_q), self._project(Z, self.W_k), Mask)

    def _project(self, X: Tensor, W: nn.Linear) -> Tensor:
        """(b, l, d) -> (b, h, l, d_attn or d_mid): W holds the rows of head 1, then of head 2, …"""
        if self.form == "list":
            heads = zip(W.weight.chunk(self.n_heads), W.bias.chunk(self.n_heads))
            return torch.stack([F.linear(X, w, c) for w, c in heads], dim=1)
        return W(X).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


# ------------------------------------------------------------------------------------------- layers


def init_linear(W: nn.Linear) -> None:
    """Weights by Glorot's uniform rule, bias 0. Neither paper says how to begin; this is the usual
    choice for both."""
    nn.init.xavier_uniform_(W.weight)
    nn.init.zeros_(W.bias)


def layer_norm(X: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """(X - m) / sqrt(v + eps) * gamma + beta, with mean m and biased variance v of each token's
    vector.

    Source: FA, Algorithm 6, with the usual eps inside the root, where FA has none.
    Shapes: X (..., d), gamma (d), beta (d); returns (..., d).
    """
    m = X.mean(dim=-1, keepdim=True)  # (..., 1)
    v = (X - m).square().mean(dim=-1, keepdim=True)  # (..., 1)
    return (X - m) / torch.sqrt(v + eps) * gamma + beta


class LayerNorm(nn.Module):
    """`layer_norm` with learned gamma and beta, by torch's kernel, which does the same in one pass
    over X.

    Shapes: X (..., d); returns the same.
    """

    def __init__(self, d: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(d))
        self.beta = nn.Parameter(torch.zeros(d))

    def forward(self, X: Tensor) -> Tensor:
        return F.layer_norm(X, self.gamma.shape, self.gamma, self.beta, self.eps)


class FeedForward(nn.Module):
    """W_2 act(W_1 x + b_1) + b_2, the same at each position.

    Source: FA, Algorithm 8 (W_mlp1 and W_mlp2, W_mlp3 and W_mlp4); AIAYN, section 3.3, equation 2.
    Shapes: X (..., d_model); returns the same; in between (..., d_ff).
    """

    def __init__(self, *, d_model: int, d_ff: int, activation: str = "relu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.W_1 = nn.Linear(d_model, d_ff)
        self.W_2 = nn.Linear(d_ff, d_model)
        for W in (self.W_1, self.W_2):
            init_linear(W)

    def forward(self, X: Tensor) -> Tensor:
        return self.W_2(self.activation(self.W_1(X)))
