"""Several models as one: their probabilities are averaged."""

import math
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from models import Cache, Loss
from naive_bayes import NaiveBayes


class MeanOutput(nn.Module):
    """log p with p = (p_1 + ... + p_m) / m, where p_i are the probabilities of model i's output
    layer. With naive Bayes, which says e: w_1 log p + w_2 e, normalized.

    Shapes: X (..., d_1 + ... + d_m), what the models' trunks give, side by side, and e (..., n) if
    there is any; returns (..., n).
    """

    def __init__(self, models: Iterable[nn.Module], naive_bayes: NaiveBayes | None) -> None:
        super().__init__()
        models = list(models)
        self.naive_bayes = naive_bayes
        self.outputs = nn.ModuleList([model.output for model in models])
        self.widths = [model.width for model in models]

    def forward(self, X: Tensor) -> Tensor:
        log_p, evidence = self.parts(X)
        if not self.naive_bayes:
            return log_p
        weights = self.naive_bayes.weights
        return (weights[0] * log_p + weights[1] * evidence).log_softmax(dim=-1)

    def parts(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """log p, and e or (..., 0)."""
        *parts, evidence = X.tensor_split(list(accumulate(self.widths)), dim=-1)
        pairs = zip(self.outputs, parts)
        log_p = torch.stack([output(part).float().log_softmax(dim=-1) for output, part in pairs])
        return log_p.logsumexp(dim=0) - math.log(len(log_p)), evidence


class EnsembleCache:
    """The `Cache` of each model."""

    def __init__(self, caches: list[Cache]) -> None:
        self.caches, self.src_Mask = caches, caches[0].src_Mask

    def branch(self, parents: Tensor) -> None:
        """As `Cache.branch`."""
        for cache in self.caches:
            cache.branch(parents)

    def keep(self, sentences: Tensor) -> None:
        """As `Cache.keep`."""
        for cache in self.caches:
            cache.keep(sentences)


class Ensemble(nn.Module):
    """Models with the same vocabulary, or the same classes, that answer together.

    Each is trained as it would be alone, with its own initial weights and dropout, on the same
    batches. It is used like a `Transformer` or a `TransformerClassifier`. naive_bayes: takes part
    in the answer, not in training.
    """

    def __init__(self, models: Iterable[nn.Module], naive_bayes: NaiveBayes | None = None) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.output = MeanOutput(self.models, naive_bayes)

    @property
    def naive_bayes(self) -> NaiveBayes | None:
        """What its answer takes into account as well."""
        return self.output.naive_bayes

    @property
    def width(self) -> int:
        """The size of the trunk's vectors."""
        return sum(self.output.widths) + (self.naive_bayes.n_classes if self.naive_bayes else 0)

    def forward(self, src: Tensor, tgt_in: Tensor, loss: Loss | None = None) -> Any:
        """Log probabilities (b, l_x, n), or what a loss makes of them. In training the losses of
        all models are added, of the other sums, which are not minimized, the mean is taken."""
        if self.training and loss is not None:
            losses, *others = zip(*(model(src, tgt_in, loss) for model in self.models))
            return sum(losses), *(sum(values) / len(values) for values in others)
        X = self.trunk(src, tgt_in)
        return self.output(X) if loss is None else loss(X, self.output)

    def trunk(self, src: Tensor, tgt_in: Tensor) -> Tensor:
        """What the models' trunks give, side by side, and the evidence: (b, l_x, width)."""
        parts = [model.trunk(src, tgt_in) for model in self.models]
        if self.naive_bayes:
            parts.append(self.naive_bayes(src)[:, None].expand(-1, tgt_in.shape[1], -1))
        return torch.cat(parts, dim=-1)

    def start(self, src: Tensor, k: int = 1) -> EnsembleCache:
        """As `Transformer.start`."""
        return EnsembleCache([model.start(src, k) for model in self.models])

    def step(self, ids: Tensor, cache: EnsembleCache) -> Tensor:
        """As `Transformer.step`, the models side by side."""
        pairs = zip(self.models, cache.caches)
        return torch.cat([model.step(ids, own) for model, own in pairs], dim=-1)

    def cross_attention(self, src: Tensor, tgt_in: Tensor) -> Tensor:
        """That of the first model."""
        return self.models[0].cross_attention(src, tgt_in)
