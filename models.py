"""The encoder-decoder Transformer, put together from `components`, and its named sizes.

Sources: *Attention Is All You Need* (AIAYN, arXiv 1706.03762) and *Formal Algorithms for
Transformers* (FA, arXiv 2207.09238), Algorithm 8. FA calls our `src` z and our `tgt_in` x.

Letters of the shape comments: b batch, l_z source length, l_x target length, d d_model.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from comp_utils import option
from components import (
    ACTIVATIONS,
    POSITIONS,
    FeedForward,
    LayerNorm,
    MHAttention,
    TokenEmbedding,
    Unembedding,
    init_linear,
)


@dataclass(frozen=True)
class ModelConfig:
    """What the model is, but for vocabulary and task. The defaults are the paper's base model."""

    n_layers: int = option(6, "layers of the encoder, and as many of the decoder", low=1)
    d_model: int = option(512, "size of a token's vector", low=1)
    d_ff: int = option(2048, "inner size of the feed-forward layers", low=1)
    n_heads: int = option(8, "attention heads", low=1)
    d_attn: int | None = option(
        None, "size of a head's query and key, the paper's d_k", low=1, unset="d-model / n-heads"
    )
    d_mid: int | None = option(
        None, "size of a head's value, the paper's d_v", low=1, unset="d-model / n-heads"
    )
    dropout: float = option(
        0.1, "share set to 0 of sub-layer outputs and of embedding + position", low=0.0, below=1.0
    )
    activation: str = option("relu", "of the feed-forward layers", choices=tuple(ACTIVATIONS))
    attention: str = option(
        "fused",
        "head by head as the paper has it, all heads in one product, or torch's kernel; all agree",
        choices=("list", "matmul", "fused"),
    )
    positions: str = option("sinusoidal", "position encoding", choices=tuple(POSITIONS))

    def problems(self) -> list[str]:
        """What cannot work, a line each."""
        lines, d_model = [], f"--d-model {self.d_model}"
        if (self.d_attn is None or self.d_mid is None) and self.d_model % self.n_heads:
            remedy = "give one that does, or a head's size with --d-attn and --d-mid"
            lines.append(f"{d_model}: does not divide by --n-heads {self.n_heads}; {remedy}")
        if self.positions == "sinusoidal" and self.d_model % 2:
            remedy = "give an even one, or --positions learned"
            lines.append(f"{d_model}: is odd, and sinusoidal positions come in pairs; {remedy}")
        return lines


BASE = ModelConfig()
SIZES = {
    "tiny": replace(BASE, n_layers=2, d_model=128, d_ff=512, n_heads=4),
    "small": replace(BASE, n_layers=3, d_model=256, d_ff=1024, n_heads=4),
    "base": BASE,
    "big": replace(BASE, d_model=1024, d_ff=4096, n_heads=16, dropout=0.3),
}


def padding_mask(ids: Tensor, pad_id: int) -> Tensor:
    """True where a token is, False where padding is. ids (b, l); returns (b, 1, 1, l), for all
    heads and queries."""
    return (ids != pad_id)[:, None, None, :]


def causal_mask(length: int, device: torch.device) -> Tensor:
    """Mask[t_x, t_z] = [t_z <= t_x]: no position sees a later one. Returns (length, length)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward, each wrapped as layer_norm(Z + dropout(sublayer(Z))).

    Source: AIAYN, section 3.1 and 5.4; FA, Algorithm 8, the encoder's loop.
    Shapes: Z (b, l_z, d), Mask -> (b, h, l_z, l_z) bool; returns (b, l_z, d).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = self_sized_attention(config)
        self.norm_1 = LayerNorm(config.d_model)
        self.feed_forward = FeedForward(
            d_model=config.d_model, d_ff=config.d_ff, activation=config.activation
        )
        self.norm_2 = LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, Z: Tensor, Mask: Tensor | None) -> Tensor:
        Z = self.norm_1(Z + self.dropout(self.self_attention(Z, Z, Mask)))
        return self.norm_2(Z + self.dropout(self.feed_forward(Z)))


class DecoderLayer(nn.Module):
    """Masked self-attention, attention to the encoder's output, feed-forward, each wrapped as in
    the encoder.

    Source: AIAYN, section 3.1 and 5.4; FA, Algorithm 8, the decoder's loop.
    Shapes: X (b, l_x, d), memory (b, l_z, d), Mask -> (b, h, l_x, l_x) and memory_Mask -> (b, h,
    l_x, l_z) bool; returns (b, l_x, d).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = self_sized_attention(config)
        self.norm_1 = LayerNorm(config.d_model)
        self.cross_attention = self_sized_attention(config)
        self.norm_2 = LayerNorm(config.d_model)
        self.feed_forward = FeedForward(
            d_model=config.d_model, d_ff=config.d_ff, activation=config.activation
        )
        self.norm_3 = LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, X: Tensor, memory: Tensor, Mask: Tensor | None, memory_Mask: Tensor | None
    ) -> Tensor:
        X = self.norm_1(X + self.dropout(self.self_attention(X, X, Mask)))
        X = self.norm_2(X + self.dropout(self.cross_attention(X, memory, memory_Mask)))
        return self.norm_3(X + self.dropout(self.feed_forward(X)))

    def step(self, X: Tensor, cache: "LayerCache", memory_Mask: Tensor) -> Tensor:
        """`forward` for the last position alone: what it needs of the others is in the cache.

        Shapes: X (n, 1, d) of n = b * k rows, k hypotheses for each sentence of memory_Mask
        (b, 1, 1, l_z); returns (n, 1, d). There is no dropout, for this is not for training.
        """
        cache.append(*self.self_attention.keys_values(X))
        X = self.norm_1(X + self.self_attention.attend(X, cache.K, cache.V))
        # The hypotheses of one sentence are as many queries to its one memory.
        queries = X.view(memory_Mask.shape[0], -1, X.shape[-1])  # (b, k, d)
        Y = self.cross_attention.attend(queries, cache.memory_K, cache.memory_V, memory_Mask)
        X = self.norm_2(X + Y.view_as(X))
        return self.norm_3(X + self.feed_forward(X))


@dataclass
class LayerCache:
    """Keys and values that a decoder layer needs again at each step of decoding."""

    K: Tensor  # (n, h, t, d_attn), of the t tokens so far
    V: Tensor  # (n, h, t, d_mid)
    memory_K: Tensor  # (b, h, l_z, d_attn), of the encoder's output, computed once a sentence
    memory_V: Tensor  # (b, h, l_z, d_mid)

    def append(self, K: Tensor, V: Tensor) -> None:
        """Adds those of one token more."""
        self.K, self.V = torch.cat((self.K, K), dim=2), torch.cat((self.V, V), dim=2)

    def select(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        """Keeps these hypotheses, and the memory of these sentences (None: of all)."""
        self.K, self.V = self.K[rows], self.V[rows]
        if sentences is not None:
            self.memory_K, self.memory_V = self.memory_K[sentences], self.memory_V[sentences]


def self_sized_attention(config: ModelConfig) -> MHAttention:
    """MHAttention from and to vectors of d_model."""
    d = config.d_model
    return MHAttention(
        d_x=d,
        d_z=d,
        d_attn=config.d_attn or d // config.n_heads,
        d_mid=config.d_mid or d // config.n_heads,
        d_out=d,
        n_heads=config.n_heads,
        form=config.attention,
    )


class EncoderDecoder(nn.Module):
    """The trunk that both tasks share: one embedding for both sides, encoder and decoder; no output
    layer.

    n_vocab: tokens of the joint vocabulary. max_len: longest sequence, in tokens. pad_id: the token
    that is none.
    """

    def __init__(self, config: ModelConfig, *, n_vocab: int, max_len: int, pad_id: int) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.embedding = TokenEmbedding(n_vocab, config.d_model)
        self.positions = POSITIONS[config.positions](max_len, config.d_model)
        self.encoder = nn.ModuleList([EncoderLayer(config) for _ in range(config.n_layers)])
        self.decoder = nn.ModuleList([DecoderLayer(config) for _ in range(config.n_layers)])
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, ids: Tensor, start: int = 0) -> Tensor:
        """dropout(embedding + position): ids (b, l), which stand from start on, -> (b, l, d)."""
        return self.dropout(self.positions(self.embedding(ids), start))

    def encode(self, src: Tensor, src_Mask: Tensor) -> Tensor:
        """src (b, l_z), src_Mask (b, 1, 1, l_z) -> memory (b, l_z, d)."""
        Z = self.embed(src)
        for layer in self.encoder:
            Z = layer(Z, src_Mask)
        return Z

    def decode(self, tgt_in: Tensor, memory: Tensor, src_Mask: Tensor) -> Tensor:
        """tgt_in (b, l_x), memory (b, l_z, d), src_Mask (b, 1, 1, l_z) -> (b, l_x, d).

        Padding stands at the end of tgt_in, so that the causal mask hides it from every token: no
        other mask is due.
        """
        X = self.embed(tgt_in)
        Mask = causal_mask(tgt_in.shape[1], tgt_in.device)  # (l_x, l_x)
        for layer in self.decoder:
            X = layer(X, memory, Mask, src_Mask)
        return X

    def trunk(self, src: Tensor, tgt_in: Tensor) -> Tensor:
        """src (b, l_z), tgt_in (b, l_x) -> the decoder's output (b, l_x, d)."""
        src_Mask = padding_mask(src, self.pad_id)  # (b, 1, 1, l_z)
        return self.decode(tgt_in, self.encode(src, src_Mask), src_Mask)


class Transformer(EncoderDecoder):
    """logits = EDTransformer(src, tgt_in): at each position the next target token.

    Source: FA, Algorithm 8; AIAYN, sections 3.1 to 3.5. Embedding, decoder's embedding and
    unembedding are one matrix.
    Shapes: src (b, l_z), tgt_in (b, l_x) int64; returns (b, l_x, n_vocab).
    """

    def __init__(self, config: ModelConfig, *, n_vocab: int, max_len: int, pad_id: int) -> None:
        super().__init__(config, n_vocab=n_vocab, max_len=max_len, pad_id=pad_id)
        self.unembedding = Unembedding(self.embedding)

    def forward(self, src: Tensor, tgt_in: Tensor) -> Tensor:
        return self.unembedding(self.trunk(src, tgt_in))

    def start(self, src: Tensor, n_beams: int = 1) -> tuple[list[LayerCache], Tensor]:
        """Encodes src (b, l_z) for `step`: empty caches for b * n_beams rows, and src_Mask."""
        src_Mask = padding_mask(src, self.pad_id)
        memory = self.encode(src, src_Mask)
        nothing = memory.new_empty(src.shape[0] * n_beams, 0, memory.shape[-1])
        caches = [
            LayerCache(
                *layer.self_attention.keys_values(nothing),
                *layer.cross_attention.keys_values(memory),
            )
            for layer in self.decoder
        ]
        return caches, src_Mask

    def step(self, ids: Tensor, t: int, caches: list[LayerCache], src_Mask: Tensor) -> Tensor:
        """The last row of `forward`. The caches hold the earlier tokens, and grow by this one.

        Shapes: ids (n), the tokens at position t, counted from 0; returns logits (n, n_vocab).
        """
        X = self.embed(ids[:, None], t)  # (n, 1, d)
        for layer, cache in zip(self.decoder, caches):
            X = layer.step(X, cache, src_Mask)
        return self.unembedding(X[:, 0])

    def cross_attention(self, src: Tensor, tgt_in: Tensor) -> Tensor:
        """What the last decoder layer takes of the source, mean of its heads: (b, l_x, l_z)."""
        seen: list[Tensor] = []
        attend = self.decoder[-1].cross_attention
        hook = attend.register_forward_pre_hook(lambda _, args: seen.append(attend.weights(*args)))
        self(src, tgt_in)
        hook.remove()
        return seen[0].mean(dim=1)


class TransformerClassifier(EncoderDecoder):
    """logits = W_c trunk(src, tgt_in) + b_c, with the start token alone as tgt_in: one vector, so
    one row of logits.

    The decoder's self-attention then has that token alone to look at: its W_q and W_k are there, as
    the trunk is the translator's, but get no gradient.
    Shapes: src (b, l_z), tgt_in (b, 1) int64; returns (b, 1, n_classes).
    """

    def __init__(
        self, config: ModelConfig, *, n_vocab: int, n_classes: int, max_len: int, pad_id: int
    ) -> None:
        super().__init__(config, n_vocab=n_vocab, max_len=max_len, pad_id=pad_id)
        self.W_c = nn.Linear(config.d_model, n_classes)
        init_linear(self.W_c)

    def forward(self, src: Tensor, tgt_in: Tensor) -> Tensor:
        return self.W_c(self.trunk(src, tgt_in))


def count_parameters(model: nn.Module) -> int:
    """Numbers that training changes; a matrix that is used twice counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
