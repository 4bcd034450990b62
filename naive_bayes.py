"""Naive Bayes beside a classifier: what counted tokens and pairs say about the label."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from data import Batch

SIZE = 1 << 21  # counts that are kept, 8 MB; tokens and pairs that share a row are not told apart
FACTOR = 1_000_003  # spreads pairs of ids over the rows
PRIOR = 2  # occurrences of each feature, with the labels' overall shares, that are added
MOST_TO_WEIGH = 10_000  # sentences


class NaiveBayes(nn.Module):
    """Evidence for each label: sum_f log(P(label | f) / P(label)).

    The features f of a sentence are its tokens and its pairs of adjacent tokens. One that occurs
    n[f, label] times in training sentences of a label has P(label | f) = (n[f, label] + 2 P(label))
    / (n[f] + 2), so one that is new says nothing. As features depend on each other, their sum is
    too sure of itself: hence the weight. The prior P(label) is left to the model beside it.
    Source: the log-count ratios of Wang and Manning (ACL 2012, "Baselines and Bigrams"), section 2.
    """

    def __init__(self, n_classes: int, pad_id: int) -> None:
        super().__init__()
        self.pad_id = pad_id
        # Parameters that are counted, not trained: they are saved and sent as all others.
        shapes = {"counts": (max(1, SIZE // n_classes), n_classes), "n_sentences": (n_classes,)}
        for name, shape in {**shapes, "weight": ()}.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    @property
    def prior(self) -> Tensor:
        """P(label), (n_classes)."""
        n = self.n_sentences + 1
        return n / n.sum()

    def features(self, src: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of counts, and which are not of padding: src (b, l) -> (b, f = 2 l - 1) each."""
        first, second = src[:, :-1] + 1, src[:, 1:] + 1
        rows = torch.cat((FACTOR * (src + 1), FACTOR * first + second), dim=1) % len(self.counts)
        is_token = src != self.pad_id
        return rows, torch.cat((is_token, is_token[:, 1:]), dim=1)

    def forward(self, src: Tensor) -> Tensor:
        """src (b, l) -> the evidence for each label, in nats, times weight: (b, n_classes)."""
        rows, is_used = self.features(src)
        return self.weight * self.log_ratios(self.counts[rows], is_used)

    def log_ratios(self, counts: Tensor, is_used: Tensor) -> Tensor:
        """Their sum: counts (b, f, n_classes), is_used (b, f) -> (b, n_classes)."""
        share = (counts + PRIOR * self.prior) / (counts.sum(dim=-1, keepdim=True) + PRIOR)
        return ((share / self.prior).log() * is_used[..., None]).sum(dim=1)

    def without_own(self, src: Tensor, labels: Tensor) -> Tensor:
        """`log_ratios` of training sentences (b, l) with labels (b), had each not been counted."""
        rows, is_used = self.features(src)
        keys = rows + len(self.counts) * torch.arange(len(rows))[:, None]  # (b, f)
        _, which, n_times = keys.unique(return_inverse=True, return_counts=True)
        own = nn.functional.one_hot(labels, len(self.prior))[:, None]  # (b, 1, n_classes)
        counts = self.counts[rows] - own * n_times[which][..., None]
        return self.log_ratios(counts.clamp(min=0), is_used)

    @torch.no_grad()
    def fit(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """Counts training sentences, in addition to those counted before, and sets the weight: it
        makes the labels most probable when no sentence counts for itself. On the CPU."""
        one = torch.ones(())
        for batch in batches():
            labels = batch.tgt_out[:, 0]
            rows, is_used = self.features(batch.src)
            pairs = rows[is_used], labels[:, None].expand(rows.shape)[is_used]
            self.counts.index_put_(pairs, one, accumulate=True)
            self.n_sentences.index_put_((labels,), one, accumulate=True)
        found, n = [], 0
        for batch in batches():
            found.append((self.without_own(batch.src, batch.tgt_out[:, 0]), batch.tgt_out[:, 0]))
            n += len(batch.src)
            if n >= MOST_TO_WEIGH:
                break
        evidence, labels = (torch.cat(parts) for parts in zip(*found))
        weights = torch.linspace(0, 1, 51)
        losses = [
            nn.functional.cross_entropy(self.prior.log() + weight * evidence, labels)
            for weight in weights
        ]
        self.weight.copy_(weights[torch.stack(losses).argmin()])
