"""The encoder-decoder Transformer, assembled from `components`.

Sources: *Attention Is All You Need* (AIAYN, arXiv 1706.03762) and *Formal Algorithms for
Transformers* (FA, arXiv 2207.09238), Algorithm 8, whose z is our `src` and whose x is our `tgt_in`.

Shapes: b batch, h heads, l_z source length, l_x target length, d d_model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from components import (
    CAUSAL,
    POSITIONS,
    Context,
    Dropout,
    FeedForward,
    LayerNorm,
    Linear,
    MHAttention,
    TokenEmbedding,
    Unembedding,
    padding_mask,
)
from config import ModelConfig

Loss = Callable[[Tensor, nn.Module], Any]  # of the trunk's output (b, l_x, d) and the output layer


class Layer(nn.Module):
    """What encoder and decoder layers share: self-attention and the residual connection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = build_attention(config)
        self.norm_1 = LayerNorm(config.d_model)
        self.dropout = Dropout(config.dropout)

    def residual(self, X: Tensor, norm: LayerNorm, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """norm(X + dropout(sublayer(X))), for each sub-layer.

        Source: AIAYN, sections 3.1 ("Add & Norm" in figure 1) and 5.4 (dropout).
        """
        return norm(X + self.dropout(sublayer(X)))


class EncoderLayer(Layer):
    """Self-attention and feed-forward.

    Source: AIAYN, section 3.1; FA, Algorithm 8, the loop over the encoder's layers.
    Shapes: Z (b, l_z, d), Mask -> (b, h, l_z, l_z) bool; returns (b, l_z, d).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.feed_forward = build_feed_forward(config)
        self.norm_2 = LayerNorm(config.d_model)

    def forward(self, Z: Tensor, Mask: Tensor | None = None) -> Tensor:
        Z = self.residual(Z, self.norm_1, lambda Z: self.self_attention(Z, Z, Mask))
        return self.residual(Z, self.norm_2, self.feed_forward)


class DecoderLayer(Layer):
    """Causal self-attention, attention to the encoder's output, and feed-forward.

    Source: AIAYN, section 3.1; FA, Algorithm 8, the loop over the decoder's layers.
    Shapes: X (b, l_x, d), memory (b, l_z, d), Mask of memory -> (b, h, l_x, l_z); returns
    (b, l_x, d). past, seen: cached keys and values of X and of memory; past_Mask: of past.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.cross_attention = build_attention(config)
        self.norm_2 = LayerNorm(config.d_model)
        self.feed_forward = build_feed_forward(config)
        self.norm_3 = LayerNorm(config.d_model)

    def forward(
        self,
        X: Tensor,
        memory: Tensor | None,
        Mask: Tensor | None,
        past: Context | None = None,
        seen: Context | None = None,
        past_Mask: Tensor | str | None = CAUSAL,
    ) -> Tensor:
        X = self.residual(X, self.norm_1, lambda X: self.self_attention(X, X, past_Mask, past))
        X = self.residual(X, self.norm_2, lambda X: self.cross_attention(X, memory, Mask, seen))
        return self.residual(X, self.norm_3, self.feed_forward)


def build_attention(config: ModelConfig) -> MHAttention:
    """Attention from and to vectors of size d_model."""
    d, d_head = config.d_model, config.d_model // config.n_heads
    sizes = {"d_attn": config.d_attn or d_head, "d_mid": config.d_mid or d_head}
    how = {"n_heads": config.n_heads, "form": config.attention, "gain": residual_gain(config)}
    return MHAttention(d_x=d, d_z=d, d_out=d, **sizes, **how)


def build_feed_forward(config: ModelConfig) -> FeedForward:
    """The feed-forward network of a layer."""
    sizes = (config.d_model, config.d_ff, config.activation)
    return FeedForward(*sizes, gain=residual_gain(config))


def residual_gain(config: ModelConfig) -> float:
    """How much smaller the last matrix of each sub-layer starts: (2 n_layers)^-0.5.

    All sub-layers together then add as much variance as their input has. With a gain of 1, six
    encoder layers make vectors of all positions that are 97 % alike; a gradient through nearly
    uniform attention keeps them so, and the decoder learns to ignore the source.
    Source: GPT-2 (Radford et al. 2019, section 2.3); the collapse: Noci et al. (arXiv 2206.03126).
    """
    return (2 * config.n_layers) ** -0.5


@dataclass
class Cache:
    """What decoding keeps between steps, for k hypotheses of each of b sentences.

    The t * k tokens so far of all hypotheses of a sentence are one context. Their keys and values
    stay where they are while hypotheses branch; Mask says which tokens each of them continues.
    """

    src_Mask: Tensor  # (b, 1, 1, l_z)
    memory: Tensor | None  # (b, l_z, d), until the layers have its keys and values
    layers: list[tuple[Context, Context]]  # of the tokens so far, and of memory
    Mask: Tensor | None  # (b, 1, k, t * k) bool; None if k is 1

    def add_position(self) -> None:
        """Each hypothesis gets a token, which it continues itself."""
        if self.Mask is not None:
            b, _, k, _ = self.Mask.shape
            own = torch.eye(k, dtype=torch.bool, device=self.Mask.device)
            self.Mask = torch.cat((self.Mask, own.expand(b, 1, k, k)), dim=3)

    def branch(self, parents: Tensor) -> None:
        """Hypothesis i of each sentence now continues what its hypothesis parents[:, i] did."""
        if self.Mask is not None:
            self.Mask = self.Mask.gather(2, parents[:, None, :, None].expand(self.Mask.shape))

    def keep(self, sentences: Tensor) -> None:
        """Keeps these of the b sentences."""
        for context in chain.from_iterable(self.layers):
            context.keep(sentences)
        self.src_Mask = self.src_Mask[sentences]
        self.Mask = None if self.Mask is None else self.Mask[sentences]


class EncoderDecoder(nn.Module):
    """The part that both tasks share: embedding, encoder and decoder, without an output layer.

    n_vocab: size of the joint vocabulary. max_len: longest sequence in tokens.
    """

    def __init__(self, config: ModelConfig, *, n_vocab: int, max_len: int, pad_id: int) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.embedding = TokenEmbedding(n_vocab, config.d_model)
        self.positions = POSITIONS[config.positions](max_len, config.d_model)
        self.encoder = nn.ModuleList([EncoderLayer(config) for _ in range(config.n_layers)])
        self.decoder = nn.ModuleList([DecoderLayer(config) for _ in range(config.n_layers)])
        self.dropout = Dropout(config.dropout)

    @property
    def width(self) -> int:
        """The size of the trunk's vectors, d_model."""
        return self.embedding.W_e.shape[1]

    def embed(self, ids: Tensor, start: int = 0) -> Tensor:
        """dropout(embedding + position): ids (b, l), the first at position start -> (b, l, d)."""
        return self.dropout(self.positions(self.embedding(ids), start))

    def encode(self, src: Tensor, src_Mask: Tensor) -> Tensor:
        """src (b, l_z), src_Mask (b, 1, 1, l_z) -> memory (b, l_z, d)."""
        Z = self.embed(src)
        for layer in self.encoder:
            Z = layer(Z, src_Mask)
        return Z

    def decode(
        self, tgt_in: Tensor, memory: Tensor | None, src_Mask: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """tgt_in (b, l_x), memory (b, l_z, d), src_Mask (b, 1, 1, l_z) -> (b, l_x, d).

        Padding of tgt_in must be at the end, where the causal mask hides it from all tokens. With a
        cache, tgt_in (b, k) are the next tokens of k hypotheses.
        """
        if cache:
            X = self.embed(tgt_in.reshape(-1, 1), start=cache.layers[0][0].n_positions)
            X = X.view(*tgt_in.shape, -1)  # (b, k, d)
            contexts = [(past, seen, cache.Mask) for past, seen in cache.layers]
        else:
            X, contexts = self.embed(tgt_in), [()] * len(self.decoder)
        for layer, context in zip(self.decoder, contexts):
            X = layer(X, memory, src_Mask, *context)
        return X

    def forward(self, src: Tensor, tgt_in: Tensor, loss: Loss | None = None) -> Any:
        """Logits (b, l_x, n); or what a loss makes of the trunk's output and the output layer, so
        that it can compute the logits of a translator a part at a time."""
        X = self.trunk(src, tgt_in)
        return self.output(X) if loss is None else loss(X, self.output)

    def trunk(self, src: Tensor, tgt_in: Tensor) -> Tensor:
        """src (b, l_z), tgt_in (b, l_x) -> the decoder's output (b, l_x, d)."""
        src_Mask = padding_mask(src, self.pad_id)  # (b, 1, 1, l_z)
        return self.decode(tgt_in, self.encode(src, src_Mask), src_Mask)


class Transformer(EncoderDecoder):
    """logits = EDTransformer(src, tgt_in): at each position, the scores of the next target token.

    Source: FA, Algorithm 8; AIAYN, figure 1. All embeddings share one matrix (section 3.4).
    Shapes: src (b, l_z), tgt_in (b, l_x) int64; returns (b, l_x, n_vocab).
    """

    def __init__(self, config: ModelConfig, **sizes: int) -> None:
        super().__init__(config, **sizes)
        self.unembedding = Unembedding(self.embedding)

    @property
    def output(self) -> nn.Module:
        """The layer that makes logits."""
        return self.unembedding

    def start(self, src: Tensor, k: int = 1) -> Cache:
        """Encodes src (b, l_z) for `step`, with k hypotheses of each sentence."""
        src_Mask = padding_mask(src, self.pad_id)  # (b, 1, 1, l_z)
        contexts = [(Context(width=k), Context()) for _ in self.decoder]
        Mask = None if k == 1 else src_Mask.new_empty(len(src), 1, k, 0)
        return Cache(src_Mask, self.encode(src, src_Mask), contexts, Mask)

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """The last row of `trunk` for each hypothesis: its next token, ids (b, k) -> (b, k, d)."""
        cache.add_position()
        memory, cache.memory = cache.memory, None
        return self.decode(ids, memory, cache.src_Mask, cache)

    def cross_attention(self, src: Tensor, tgt_in: Tensor) -> Tensor:
        """The last layer's attention to the source: (b, h, l_x, l_z)."""
        found: list[Tensor] = []
        module = self.decoder[-1].cross_attention
        hook = module.register_forward_pre_hook(lambda m, args: found.append(m.weights(*args[:3])))
        self(src, tgt_in)
        hook.remove()
        return found[0]


class TransformerClassifier(EncoderDecoder):
    """logits = W_c trunk(src, tgt_in) + b_c, where tgt_in is the start token alone.

    The trunk is the translator's, but self-attention to one token gives W_q, W_k no gradient.
    Shapes: src (b, l_z), tgt_in (b, 1) int64; returns (b, 1, n_classes).
    """

    def __init__(self, config: ModelConfig, *, n_classes: int, **sizes: int) -> None:
        super().__init__(config, **sizes)
        self.W_c = Linear(config.d_model, n_classes)

    @property
    def output(self) -> nn.Module:
        """The layer that makes logits."""
        return self.W_c


def count_parameters(model: nn.Module) -> int:
    """The number of trained values; a shared matrix counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
