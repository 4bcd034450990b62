"""Search: how a trained model produces a translation, token by token. Greedy and beam search."""

import math

import torch
from torch import Tensor, nn

EXTRA_LENGTH = 50  # tokens that a translation may be longer than its source: AIAYN, section 6.1


def length_penalty(length: Tensor | int, alpha: float) -> Tensor | float:
    """lp(Y) = ((5 + |Y|) / (5 + 1))^alpha, by which log P(Y | X) is divided.

    |Y| includes the end token. Source: Wu et al. (arXiv 1609.08144), section 7, equation 14.
    """
    return ((5 + length) / 6) ** alpha


@torch.inference_mode()
def greedy(model: nn.Module, src: Tensor, *, bos_id: int, eos_id: int) -> list[list[int]]:
    """The most probable token at each step, until eos_id or the length limit. src (b, l_z)."""
    cache = model.start(src)
    limits = cache.src_Mask.sum(dim=-1).flatten() + EXTRA_LENGTH  # (b)
    found: list[list[int]] = [[] for _ in src]
    sentences = torch.arange(len(src), device=src.device)  # (n), the unfinished ones
    tokens = torch.full((len(src), 1), bos_id, device=src.device)  # (n, 1 + t)
    while len(sentences):
        chosen = model.step(tokens[:, -1], cache).max(dim=-1).indices  # (n); faster than argmax
        tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        done = (chosen == eos_id) | (tokens.shape[1] > limits)
        if done.any():
            for i, ids in zip(sentences[done].tolist(), tokens[done, 1:].tolist()):
                found[i] = [token for token in ids if token != eos_id]
            kept = (~done).nonzero()[:, 0]
            tokens, limits, sentences = tokens[kept], limits[kept], sentences[kept]
            cache.select(kept, kept)
    return found


def best_extensions(log_p: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The 2 k most probable extensions of k hypotheses by one token: log P, hypothesis, token.

    At most k of them end, one per hypothesis, so at least k can grow further.
    Shapes: log_p (n, k), logits (n * k, n_vocab); returns (n, 2 k) each.
    """
    n, k = log_p.shape
    log_p = log_p[:, :, None] + logits.float().log_softmax(dim=-1).view(n, k, -1)
    n_vocab = log_p.shape[-1]
    log_p, index = log_p.flatten(1).topk(min(2 * k, k * n_vocab), dim=1)
    return log_p, index // n_vocab, index % n_vocab


def extend(tokens: Tensor, parents: Tensor, chosen: Tensor) -> Tensor:
    """The chosen tokens (n, k) after those of their parents: tokens (n, k, l) -> (n, k, l + 1)."""
    tokens = tokens.gather(1, parents[:, :, None].expand(tokens.shape))
    return torch.cat((tokens, chosen[:, :, None]), dim=2)


@torch.inference_mode()
def beam_search(
    model: nn.Module, src: Tensor, *, bos_id: int, eos_id: int, beam_size: int, alpha: float
) -> list[list[int]]:
    """The hypothesis with the highest log P(Y | X) / lp(Y) that a beam finds. src (b, l_z).

    The beam holds the beam_size most probable hypotheses. One that ends keeps its place, so fewer
    stay open. A sentence is finished when no open hypothesis can overtake the best ended one, or at
    the length limit.
    Source: AIAYN, section 6.1; Wu et al. (arXiv 1609.08144), section 7.
    """
    b, k, device = len(src), beam_size, src.device
    cache = model.start(src)
    limits = cache.src_Mask.sum(dim=-1).flatten() + EXTRA_LENGTH  # (b)
    found: list[list[int]] = [[] for _ in src]
    sentences = torch.arange(b, device=device)  # (n), the unfinished ones
    tokens = torch.full((b, k, 1), bos_id, device=device)  # (n, k, 1 + t)
    log_p = torch.full((b, k), -math.inf, device=device)  # (n, k), -inf: no hypothesis
    log_p[:, 0] = 0.0  # the k empty hypotheses of a sentence are the same one
    n_open = torch.full((b, 1), k, device=device)  # (n, 1), hypotheses that have not ended
    best = torch.full((b,), -math.inf, device=device)  # (n), best score of those that have
    while n := len(sentences):
        length = tokens.shape[2]  # of a hypothesis with its next token
        logits = model.step(tokens[:, :, -1].flatten(), cache)  # (n * k, n_vocab)
        candidates, parents, chosen = best_extensions(log_p, logits)  # (n, 2 k)
        ends, rank = chosen == eos_id, torch.arange(chosen.shape[1], device=device)
        ended = candidates.masked_fill(~ends | (rank >= n_open), -math.inf)  # (n, 2 k)
        n_open = n_open - ended.isfinite().sum(dim=1, keepdim=True)
        score, which = (ended / length_penalty(length, alpha)).max(dim=1)  # (n)
        for i in (score > best).nonzero()[:, 0].tolist():
            found[sentences[i]] = tokens[i, parents[i, which[i]], 1:].tolist()
        best = torch.maximum(best, score)

        log_p, which = candidates.masked_fill(ends, -math.inf).topk(k, dim=1)  # (n, k)
        log_p = log_p.masked_fill(rank[:k] >= n_open, -math.inf)
        parents, chosen = parents.gather(1, which), chosen.gather(1, which)
        tokens = extend(tokens, parents, chosen)
        at_limit = length >= limits
        for i in (at_limit & best.isinf()).nonzero()[:, 0].tolist():
            found[sentences[i]] = tokens[i, 0, 1:].tolist()  # none has ended
        # log P only falls, so no open hypothesis can score more than this.
        reachable = log_p[:, 0] / length_penalty(limits, alpha)
        kept = (~(at_limit | (best >= reachable))).nonzero()[:, 0]
        rows = (torch.arange(n, device=device)[:, None] * k + parents)[kept].flatten()
        cache.select(rows, None if len(kept) == n else kept)
        tokens, log_p, best, n_open = tokens[kept], log_p[kept], best[kept], n_open[kept]
        sentences, limits = sentences[kept], limits[kept]
    return found
