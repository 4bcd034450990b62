"""Naive Bayes beside a classifier: what counted tokens and pairs say about the label."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import Batch

SIZE = 1 << 21  # values of the table, 8 MB; features that share a row are not told apart
FACTOR = 1_000_003  # spreads pairs of ids over the rows
MOST_TO_WEIGH = 10_000  # sentences


class NaiveBayes(nn.Module):
    """log P(label) + sum_f r[f, label]: what the features f of a sentence say about each label.

    Features are tokens and pairs of adjacent tokens. r[f, label] = log((n[f, label] + 1) /
    (n[f] P(label) + 1)) compares how often f occurs in training sentences of a label with how often
    it would if labels did not matter; a feature that is new has 0. As features depend on each
    other, their sum is too sure of itself: weight says how much it counts beside other models.
    Source: the log-count ratios of Wang and Manning (ACL 2012, "Baselines and Bigrams"), section 2.
    """

    def __init__(self, n_classes: int, pad_id: int) -> None:
        super().__init__()
        self.pad_id, self.n_classes = pad_id, n_classes
        self.n_rows = max(1, SIZE // n_classes)  # and one of zeros, for padding
        # Parameters that are counted, not trained: they are saved and sent as all others.
        shapes = {"ratios": (self.n_rows + 1, n_classes), "log_prior": (n_classes,), "weight": ()}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    def features(self, src: Tensor) -> Tensor:
        """The row of each feature: src (b, l) -> (b, 2 l - 1)."""
        first, second = src[:, :-1] + 1, src[:, 1:] + 1
        rows = torch.cat((FACTOR * (src + 1), FACTOR * first + second), dim=1) % self.n_rows
        is_padding = src == self.pad_id
        return rows.masked_fill(torch.cat((is_padding, is_padding[:, 1:]), dim=1), self.n_rows)

    def forward(self, src: Tensor) -> Tensor:
        """src (b, l) -> weight times the formula above, in nats (b, n_classes)."""
        evidence = F.embedding_bag(self.features(src), self.ratios, mode="sum")
        return self.weight * (self.log_prior + evidence)

    @torch.no_grad()
    def fit(self, batches: Iterable[Batch]) -> None:
        """Counts the features of training sentences, on the CPU, and sets the weight: with it the
        labels are the most probable, where the features of each sentence count without itself."""
        counts = torch.zeros(self.n_rows + 1, self.n_classes, dtype=torch.int64)
        n_sentences = torch.ones(self.n_classes)
        sample: list[tuple[Tensor, int]] = []  # features and label
        one = counts.new_ones(())
        for batch in batches:
            rows, labels = self.features(batch.src), batch.tgt_out[:, 0]
            counts.index_put_((rows, labels[:, None]), one, accumulate=True)
            n_sentences += labels.bincount(minlength=self.n_classes)
            sample += zip(rows[: MOST_TO_WEIGH - len(sample)], labels.tolist())
        counts[self.n_rows] = 0
        prior = n_sentences / n_sentences.sum()
        self.log_prior.copy_(prior.log())
        self.ratios.copy_(log_ratios(counts, prior))

        evidence, labels = [], torch.tensor([label for _, label in sample])
        for rows, label in sample:
            rows, which, n_times = rows[rows < self.n_rows].unique(
                return_inverse=True, return_counts=True
            )
            others = counts[rows]
            others[:, label] -= n_times
            evidence.append(log_ratios(others, prior)[which].sum(dim=0))
        weights = torch.linspace(0, 1, 51)
        logits = (self.log_prior + weight * torch.stack(evidence) for weight in weights)
        losses = torch.stack([F.cross_entropy(x, labels) for x in logits])
        self.weight.copy_(weights[losses.argmin()])


def log_ratios(counts: Tensor, prior: Tensor) -> Tensor:
    """r of `NaiveBayes`: counts (f, n_classes), prior (n_classes) -> (f, n_classes)."""
    return ((counts + 1) / (counts.sum(dim=1, keepdim=True) * prior + 1)).log()
