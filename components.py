"""The building blocks of the Transformer: one class or function per equation.

AIAYN: *Attention Is All You Need* (arXiv 1706.03762).
FA: *Formal Algorithms for Transformers* (arXiv 2207.09238), whose letters and signatures are used.
FA writes tokens as columns and `Mask[t_z, t_x]`; here they are rows, and it is `Mask[t_x, t_z]`.
Shapes: b batch, h heads, l_x length of the primary sequence X, l_z length of the context Z.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}
FORMS = ("list", "matmul", "fused")  # one head after the other, all at once, torch's kernel


# ---------------------------------------------------------------------------------------- embedding


class TokenEmbedding(nn.Module):
    """e = sqrt(d_model) * W_e[v]: ids (...) in [0, n_vocab) -> (..., d_model).

    Source: FA, Algorithm 1; AIAYN, section 3.4, for the factor.
    """

    def __init__(self, n_vocab: int, d_model: int) -> None:
        super().__init__()
        self.W_e = nn.Parameter(torch.empty(n_vocab, d_model))
        # Times sqrt(d_model), an embedding has unit variance, similar to a position's. As W_u
        # (Unembedding), the same rows give logits of unit variance for a layer-normed input.
        nn.init.normal_(self.W_e, std=d_model**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.W_e) * math.sqrt(self.W_e.shape[1])


def sinusoids(max_len: int, d_model: int, *, base: float = 10_000.0) -> Tensor:
    """PE[t, 2i] = sin(t / base^(2i / d_model)) and PE[t, 2i + 1] = cos(t / base^(2i / d_model)).

    Source: AIAYN, section 3.5. Returns (max_len, d_model) float64, with t from 0.
    """
    if d_model % 2:
        raise ValueError(f"sinusoids: d_model {d_model} is odd; sine and cosine come in pairs")
    # In float32 a late position would be off by 1e-4. MPS has no float64, hence the CPU.
    t = torch.arange(max_len, dtype=torch.float64, device="cpu")
    two_i = torch.arange(0, d_model, 2, dtype=torch.float64, device="cpu")
    angle = t[:, None] / base ** (two_i / d_model)  # (max_len, d_model / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


class SinusoidalPositions(nn.Module):
    """X + PE[start : start + l], of X (b, l, d_model). PE is a constant, so it is not saved."""

    def __init__(self, max_len: int, d_model: int) -> None:
        super().__init__()
        PE = sinusoids(max_len, d_model).to(torch.get_default_dtype())
        self.register_buffer("PE", PE, persistent=False)

    def forward(self, X: Tensor, start: int = 0) -> Tensor:
        return X + self.PE[start : start + X.shape[1]]


class LearnedPositions(nn.Module):
    """X + W_p[start : start + l], of X (b, l, d_model).

    Source: FA, Algorithm 2; AIAYN, Table 3, row E.
    """

    def __init__(self, max_len: int, d_model: int) -> None:
        super().__init__()
        self.W_p = nn.Parameter(torch.empty(max_len, d_model))
        nn.init.normal_(self.W_p, std=0.02)  # small: at first the token matters most

    def forward(self, X: Tensor, start: int = 0) -> Tensor:
        return X + self.W_p[start : start + X.shape[1]]


POSITIONS = {"sinusoidal": SinusoidalPositions, "learned": LearnedPositions}


class Unembedding(nn.Module):
    """logits = W_u e: X (..., d_model) -> (..., n_vocab), with W_u = W_e of the token embedding.

    Source: FA, Algorithm 7, but for its softmax, which is part of the loss; AIAYN, section 3.4.
    """

    def __init__(self, embedding: TokenEmbedding) -> None:
        super().__init__()
        self.W_u = embedding.W_e

    def forward(self, X: Tensor) -> Tensor:
        return kernels.linear(X, self.W_u)


# -------------------------------------------------------------------------------------------- masks
# A mask is boolean, True = may attend, and broadcasts to (b, h, l_x, l_z).

CAUSAL = "causal"  # a name for causal_mask, which attention builds where its form needs it


def padding_mask(ids: Tensor, pad_id: int) -> Tensor:
    """Mask[t_z] = [ids[t_z] != pad_id], for all heads and queries: (b, l_z) -> (b, 1, 1, l_z)."""
    return (ids != pad_id)[:, None, None, :]


def causal_mask(l_x: int, l_z: int, device: torch.device) -> Tensor:
    """Mask[t_x, t_z] = [t_z <= t_x] where l_x = l_z: no query attends to a later position.

    In general the queries are the last l_x of the l_z positions. Returns (l_x, l_z).
    Source: FA, Algorithm 4 (unidirectional attention); AIAYN, section 3.2.3.
    """
    return torch.ones(l_x, l_z, dtype=torch.bool, device=device).tril(l_z - l_x)


# --------------------------------------------------------------------------------- linear, dropout


class Linear(nn.Linear):
    """W x + b. At the start W is Glorot-uniform times gain, and b = 0; neither paper names one."""

    def __init__(self, d_in: int, d_out: int, *, gain: float = 1.0) -> None:
        self.gain = gain
        super().__init__(d_in, d_out)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight, self.gain)
        nn.init.zeros_(self.bias)

    def forward(self, X: Tensor) -> Tensor:
        return kernels.linear(X, self.weight, self.bias)


class Dropout(nn.Dropout):
    """x / (1 - p) with probability 1 - p, else 0; x unless training."""

    def forward(self, X: Tensor) -> Tensor:
        return kernels.dropout(X, self.p) if self.training and self.p else X


# ---------------------------------------------------------------------------------------- attention


def single_query_attention(q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """v = sum_t alpha_t v_t with alpha = softmax(q K^T / sqrt(d_attn)): one row of `attention`.

    Source: FA, Algorithm 3. For the reader; the model computes all queries at once.
    Shapes: q (d_attn), K (l_z, d_attn), V (l_z, d_mid); returns (d_mid).
    """
    alpha = torch.softmax(K @ q / math.sqrt(q.shape[-1]), dim=-1)  # (l_z)
    return alpha @ V


def attention_weights(Q: Tensor, K: Tensor, Mask: Tensor | None = None) -> Tensor:
    """alpha = softmax(Q K^T / sqrt(d_attn)) over the context, 0 where Mask is False.

    Source: AIAYN, equation 1. A row of Mask without any True gives NaN.
    Shapes: Q (..., l_x, d_attn), K (..., l_z, d_attn), Mask -> (..., l_x, l_z); returns the last.
    """
    S = Q @ K.transpose(-2, -1) / math.sqrt(Q.shape[-1])  # (..., l_x, l_z)
    if Mask is not None:
        S = S.masked_fill(~Mask, float("-inf"))
    return S.softmax(dim=-1)


def attention(Q: Tensor, K: Tensor, V: Tensor, Mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention: softmax(Q K^T / sqrt(d_attn)) V.

    Source: FA, Algorithm 4, after its projections; AIAYN, equation 1.
    Shapes: as in `attention_weights`, V (..., l_z, d_mid); returns (..., l_x, d_mid).
    """
    return attention_weights(Q, K, Mask) @ V


class Context:
    """Keys K (b, h, l_z, d_attn) and values V (b, h, l_z, d_mid), kept between decoding steps.

    width: tokens per position, one for each hypothesis, adjacent.
    """

    def __init__(self, width: int = 1) -> None:
        self.width, self.n_tokens = width, 0
        self._kept: list[Tensor] = []  # K and V, with room for further tokens

    @property
    def n_positions(self) -> int:
        """The number of positions."""
        return self.n_tokens // self.width

    def append(self, K: Tensor, V: Tensor) -> None:
        """Adds those of the next tokens."""
        begin, self.n_tokens = self.n_tokens, self.n_tokens + K.shape[2]
        if not self._kept:
            self._kept = [K, V]
            return
        if self.n_tokens > self._kept[0].shape[2]:  # twice the room, or that of 16 positions
            size = max(2 * self.n_tokens, 16 * self.width)
            larger = [kept.new_empty(*kept.shape[:2], size, kept.shape[3]) for kept in self._kept]
            for kept, new in zip(self._kept, larger):
                new[:, :, :begin] = kept[:, :, :begin]
            self._kept = larger
        for kept, new in zip(self._kept, (K, V)):
            kept[:, :, begin : self.n_tokens] = new

    def all(self) -> tuple[Tensor, Tensor]:
        """K and V of all tokens so far."""
        K, V = self._kept
        return K[:, :, : self.n_tokens], V[:, :, : self.n_tokens]

    def keep(self, rows: Tensor) -> None:
        """Keeps these of the b rows, in this order; one that keeps its place is not copied."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for kept in self._kept:
            kept[moved] = kept[rows[moved]]
        self._kept = [kept[: len(rows)] for kept in self._kept]


class MHAttention(nn.Module):
    """MHAttention(X, Z | W_q, W_k, W_v, W_o, Mask) = [Y_1; ...; Y_h] W_o, with Y_i of head i.

    form: one of FORMS. They differ in how they compute, not in weights or results.
    gain: of W_o at the start.
    Source: FA, Algorithms 4 and 5; AIAYN, section 3.2.2.
    """

    def __init__(
        self,
        *,
        d_x: int,
        d_z: int,
        d_attn: int,
        d_mid: int,
        d_out: int,
        n_heads: int,
        form: str,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.n_heads, self.form = n_heads, form
        self.W_q = Linear(d_x, n_heads * d_attn)
        self.W_k = Linear(d_z, n_heads * d_attn)
        self.W_v = Linear(d_z, n_heads * d_mid)
        self.W_o = Linear(n_heads * d_mid, d_out, gain=gain)

    def forward(
        self, X: Tensor, Z: Tensor | None, Mask: Tensor | str | None, past: Context | None = None
    ) -> Tensor:
        """Attention from X (b, l_x, d_x) to Z (b, l_z, d_z); returns (b, l_x, d_out).

        Mask -> (b, h, l_x, l_z), or CAUSAL. past: the context before Z, to which Z is appended
        unless it is None.
        """
        # CUDA's flash kernel takes no explicit mask. The flag is for queries from position 0 on.
        is_causal = isinstance(Mask, str) and self.form == "fused" and not (past and past.n_tokens)
        Q, K, V = self.project(X, Z, past)
        l_x, l_z = Q.shape[2], K.shape[2]
        if isinstance(Mask, str):  # a single query is the last position, and sees everything
            Mask = None if is_causal or l_x == 1 else causal_mask(l_x, l_z, X.device)
        if self.form == "fused":
            Y = F.scaled_dot_product_attention(Q, K, V, Mask, is_causal=is_causal)
        elif self.form == "matmul":
            Y = attention(Q, K, V, Mask)
        else:
            Masks = [None] * self.n_heads
            if Mask is not None:
                Masks = Mask.expand(*Q.shape[:3], l_z).unbind(1)  # h times (b, l_x, l_z)
            heads = zip(Q.unbind(1), K.unbind(1), V.unbind(1), Masks)
            Y = torch.stack([attention(*head) for head in heads], dim=1)
        return self.W_o(Y.transpose(1, 2).flatten(2))  # (b, h, l_x, d_mid) -> (b, l_x, d_out)

    def weights(self, X: Tensor, Z: Tensor, Mask: Tensor | None = None) -> Tensor:
        """How much each position of X attends to each of Z: (b, h, l_x, l_z)."""
        Q, K, _ = self.project(X, Z)
        return attention_weights(Q, K, Mask)

    def project(
        self, X: Tensor, Z: Tensor | None, past: Context | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Q (b, h, l_x, d_attn), K (b, h, l_z, d_attn) and V (b, h, l_z, d_mid)."""
        past = Context() if past is None else past
        if Z is not None:
            K, V = self._heads(Z, self.W_k), self._heads(Z, self.W_v)
            past.append(K, V)
        Q = self._heads(X, self.W_q)
        return Q, *past.all()

    def _heads(self, X: Tensor, W: Linear) -> Tensor:
        """(b, l, d) -> (b, h, l, d_attn or d_mid). W has the rows of head 1, of head 2, ..."""
        if self.form == "list":
            heads = zip(W.weight.chunk(self.n_heads), W.bias.chunk(self.n_heads))
            return torch.stack([F.linear(X, w, c) for w, c in heads], dim=1)
        return W(X).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


# ------------------------------------------------------------------------------------------- layers


def layer_norm(X: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """(X - m) / sqrt(v + eps) * gamma + beta, with mean m and biased variance v of X's last axis.

    Source: FA, Algorithm 6, which has no eps.
    Shapes: X (..., d), gamma (d), beta (d); returns (..., d).
    """
    m = X.mean(dim=-1, keepdim=True)  # (..., 1)
    v = (X - m).square().mean(dim=-1, keepdim=True)  # (..., 1)
    return (X - m) / torch.sqrt(v + eps) * gamma + beta


class LayerNorm(nn.Module):
    """`layer_norm` with learned gamma and beta, computed by torch's kernel in one pass over X."""

    def __init__(self, d: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(d))
        self.beta = nn.Parameter(torch.zeros(d))

    def forward(self, X: Tensor) -> Tensor:
        return F.layer_norm(X, self.gamma.shape, self.gamma, self.beta, self.eps)


class FeedForward(nn.Module):
    """W_2 act(W_1 x + b_1) + b_2, at each position alike. gain: of W_2 at the start.

    Source: FA, Algorithm 8 (W_mlp1 and W_mlp2, W_mlp3 and W_mlp4); AIAYN, section 3.3, equation 2.
    """

    def __init__(self, d_model: int, d_ff: int, activation: str, *, gain: float = 1.0) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.W_1 = Linear(d_model, d_ff)
        self.W_2 = Linear(d_ff, d_model, gain=gain)

    def forward(self, X: Tensor) -> Tensor:
        if self.activation is F.relu:
            W_1, W_2 = self.W_1, self.W_2
            return kernels.feed_forward(X, W_1.weight, W_1.bias, W_2.weight, W_2.bias)
        return self.W_2(self.activation(self.W_1(X)))  # (..., d_model) -> d_ff -> d_model
