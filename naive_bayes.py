"""Naive Bayes beside a classifier: what counted tokens and pairs say about the label."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import Batch

SIZE = 1 << 21  # values of the table, 8 MB; features that share a row are not told apart
FACTOR = 1_000_003  # spreads pairs of ids over the rows


class NaiveBayes(nn.Module):
    """log P(label) + sum_f r[f, label]: what the features f of a sentence say about each label.

    Features are tokens and pairs of adjacent tokens. r[f, label] = log((n[f, label] + 1) /
    (n[f] P(label) + 1)) compares how often f occurs in training sentences of a label with how often
    it would if labels did not matter; a feature that is new has 0.
    weights: how much the models beside it count, and how much this does; see `MeanOutput`.
    Source: the log-count ratios of Wang and Manning (ACL 2012, "Baselines and Bigrams"), section 2.
    """

    def __init__(self, n_classes: int, pad_id: int) -> None:
        super().__init__()
        self.pad_id, self.n_classes = pad_id, n_classes
        self.n_rows = max(1, SIZE // n_classes)  # and one of zeros, for padding
        # Parameters that are counted, not trained: they are saved and sent as all others.
        ratios, log_prior = torch.zeros(self.n_rows + 1, n_classes), torch.zeros(n_classes)
        self.ratios = nn.Parameter(ratios, requires_grad=False)
        self.log_prior = nn.Parameter(log_prior, requires_grad=False)
        self.weights = nn.Parameter(torch.tensor([1.0, 0.0]), requires_grad=False)

    def features(self, src: Tensor) -> Tensor:
        """The row of each feature: src (b, l) -> (b, 2 l - 1)."""
        first, second = src[:, :-1] + 1, src[:, 1:] + 1
        rows = torch.cat((FACTOR * (src + 1), FACTOR * first + second), dim=1) % self.n_rows
        is_padding = src == self.pad_id
        return rows.masked_fill(torch.cat((is_padding, is_padding[:, 1:]), dim=1), self.n_rows)

    def forward(self, src: Tensor) -> Tensor:
        """src (b, l) -> the formula above, in nats (b, n_classes)."""
        return self.log_prior + F.embedding_bag(self.features(src), self.ratios, mode="sum")

    @torch.no_grad()
    def count(self, batches: Iterable[Batch]) -> None:
        """Counts the features of training sentences, on the CPU."""
        counts = torch.zeros(self.n_rows + 1, self.n_classes, dtype=torch.int64)
        n_sentences, one = torch.ones(self.n_classes), counts.new_ones(())
        for batch in batches:
            rows, labels = self.features(batch.src), batch.tgt_out
            counts.index_put_((rows, labels), one, accumulate=True)
            n_sentences += labels[:, 0].bincount(minlength=self.n_classes)
        counts[self.n_rows] = 0
        prior = n_sentences / n_sentences.sum()
        self.log_prior.copy_(prior.log())
        self.ratios.copy_(((counts + 1) / (counts.sum(dim=1, keepdim=True) * prior + 1)).log())

    def weigh(self, log_p: Tensor, evidence: Tensor, labels: Tensor) -> None:
        """Sets the weights that make labels (n) most probable: log_p of the models beside it and
        evidence of `forward`, (n, n_classes) each. The weights (1, 0) are one more observation,
        so that a few sentences do not move them far."""
        initial = torch.tensor([1.0, 0.0], dtype=torch.float64)
        weights = initial.clone().requires_grad_()
        log_p, evidence = log_p.double(), evidence.double()
        optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = weights[0] * log_p + weights[1] * evidence
            penalty = (weights - initial).square().sum()
            total = F.cross_entropy(logits, labels, reduction="sum") + penalty
            total.backward()
            return total

        optimizer.step(loss)
        self.weights.copy_(weights.detach().clamp(min=0))
