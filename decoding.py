"""Search: how a trained model produces a translation, token by token. Greedy and beam search."""

import math
from operator import itemgetter

import torch
from torch import Tensor, nn

import kernels

EXTRA_LENGTH = 50  # tokens that a translation may be longer than its source: AIAYN, section 6.1
ROWS = 64  # of logits that exist at once
MIN_FINISHED = 1 / 8  # share of a batch; fewer finished sentences are not worth a smaller batch


def length_penalty(length: Tensor | int, alpha: float) -> Tensor | float:
    """lp(Y) = ((5 + |Y|) / (5 + 1))^alpha, by which log P(Y | X) is divided.

    |Y| includes the end token. Source: Wu et al. (arXiv 1609.08144), section 7, equation 14.
    """
    return ((5 + length) / 6) ** alpha


def length_limits(src_Mask: Tensor) -> Tensor:
    """The most tokens that each translation may have: src_Mask (b, 1, 1, l_z) -> (b)."""
    return src_Mask.sum(dim=-1).flatten() + EXTRA_LENGTH


@torch.inference_mode()
def greedy(model: nn.Module, src: Tensor, *, bos_id: int, eos_id: int) -> list[list[int]]:
    """The most probable token at each step, until eos_id or the length limit. src (b, l_z)."""
    cache = model.start(src)
    limits = length_limits(cache.src_Mask)  # (b)
    found: list[list[int]] = [[] for _ in src]
    sentences = torch.arange(len(src), device=src.device)  # (n), those still in the batch
    tokens = torch.full((len(src), 1), bos_id, device=src.device)  # (n, 1 + t)
    done = torch.zeros(len(src), dtype=torch.bool, device=src.device)  # (n)
    while len(sentences):
        logits = model.output(model.step(tokens[:, -1:], cache)[:, 0])  # (n, n_vocab)
        chosen = kernels.topk(logits, 1)[1]  # (n, 1)
        tokens = torch.cat((tokens, chosen), dim=1)
        done |= (chosen[:, 0] == eos_id) | (tokens.shape[1] > limits)
        if worth_removing(done):
            ends = zip(sentences[done].tolist(), tokens[done, 1:].tolist(), limits[done].tolist())
            for i, ids, limit in ends:
                found[i] = ids[: [*ids[:limit], eos_id].index(eos_id)]
            kept = unfinished(done)
            tokens, limits, sentences = tokens[kept], limits[kept], sentences[kept]
            done = done[kept]
            cache.keep(kept)
    return found


def worth_removing(done: Tensor) -> bool:
    """Whether so many of a batch's sentences (n) are done that it should go on without them."""
    n_done = int(done.sum())
    return n_done == len(done) or n_done > MIN_FINISHED * len(done)


def unfinished(done: Tensor) -> Tensor:
    """The rows that are not done (n), of which the last take the places of those that are."""
    rows = (~done).nonzero()[:, 0]
    places = done[: len(rows)].nonzero()[:, 0]
    order = torch.arange(len(rows), device=done.device)
    order[places] = rows[len(rows) - len(places) :]
    return order


def best_extensions(log_p: Tensor, X: Tensor, output: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The 2 k most probable extensions of k hypotheses by one token: log P, hypothesis, token.

    At most k of them end, one per hypothesis, so at least k can grow further.
    Shapes: log_p (n, k), the decoder's output X (n, k, d); returns (n, 2 k) each.
    """
    n, k = log_p.shape
    rows = X.flatten(0, 1).split(ROWS)
    found = [kernels.topk(output(X).float().log_softmax(dim=-1), 2 * k) for X in rows]
    more, tokens = (torch.cat(parts).view(n, k, -1) for parts in zip(*found))  # (n, k, 2 k)
    log_p = (log_p[:, :, None] + more).flatten(1)  # (n, k * 2 k)
    log_p, index = log_p.topk(min(2 * k, log_p.shape[1]), dim=1)
    return log_p, index // more.shape[2], tokens.flatten(1).gather(1, index)


@torch.inference_mode()
def beam_search(
    model: nn.Module,
    src: Tensor,
    *,
    bos_id: int,
    eos_id: int,
    beam_size: int,
    alpha: float,
    n_best: int = 1,
) -> list[list[tuple[float, list[int]]]]:
    """The n_best hypotheses with the highest log P(Y | X) / lp(Y) that a beam finds, best first.

    The beam holds the beam_size most probable hypotheses. An ended one still holds a place, so
    fewer stay open. A sentence is finished when no open hypothesis can overtake the n_best ended
    ones, or at the length limit, where open ones follow if too few have ended.
    Source: AIAYN, section 6.1; Wu et al. (arXiv 1609.08144), section 7.
    Takes src (b, l_z); returns (score, ids) of each, at most beam_size.
    """
    b, k, device = len(src), beam_size, src.device
    cache = model.start(src, k)
    limits = length_limits(cache.src_Mask)  # (b)
    found: list[list[tuple[float, list[int]]]] = [[] for _ in src]
    unended: list[list[tuple[float, list[int]]]] = [[] for _ in src]
    sentences = torch.arange(b, device=device)  # (n), those still in the batch
    tokens = torch.full((b, k, 1), bos_id, device=device)  # (n, k, 1 + t)
    log_p = torch.full((b, k), -math.inf, device=device)  # (n, k), -inf: no open hypothesis
    log_p[:, 0] = 0.0  # the k empty hypotheses of a sentence are the same one
    n_open = torch.full((b, 1), k, device=device)  # (n, 1), hypotheses that have not ended
    best = torch.full((b, n_best), -math.inf, device=device)  # (n, n_best), scores of ended ones
    rank = torch.arange(2 * k, device=device)
    while len(sentences):
        length = tokens.shape[2]  # of a hypothesis with its next token
        X = model.step(tokens[:, :, -1], cache)  # (n, k, d)
        candidates, parents, chosen = best_extensions(log_p, X, model.output)  # (n, 2 k)
        ends = chosen == eos_id
        ended = candidates.masked_fill(~ends | (rank[: ends.shape[1]] >= n_open), -math.inf)
        n_open = n_open - ended.isfinite().sum(dim=1, keepdim=True)
        scores = ended / length_penalty(length, alpha)  # (n, 2 k)
        for i, j in (scores > best[:, -1:]).nonzero().tolist():
            ids = tokens[i, parents[i, j], 1:].tolist()
            found[sentences[i]].append((scores[i, j].item(), ids))
        best = torch.cat((best, scores), dim=1).topk(n_best, dim=1).values

        log_p, which = candidates.masked_fill(ends, -math.inf).topk(k, dim=1)  # (n, k)
        log_p = log_p.masked_fill(rank[:k] >= n_open, -math.inf)
        parents, chosen = parents.gather(1, which), chosen.gather(1, which)
        tokens = tokens.gather(1, parents[:, :, None].expand(tokens.shape))
        tokens = torch.cat((tokens, chosen[:, :, None]), dim=2)
        cache.branch(parents)
        at_limit = length >= limits
        for i, j in (at_limit[:, None] & log_p.isfinite()).nonzero().tolist():
            score = log_p[i, j].item() / length_penalty(length, alpha)
            unended[sentences[i]].append((score, tokens[i, j, 1:].tolist()))
        # log P only falls, so no open hypothesis can score more than this.
        reachable = log_p[:, 0] / length_penalty(limits, alpha)
        done = at_limit | (best[:, -1] >= reachable)
        log_p = log_p.masked_fill(done[:, None], -math.inf)
        if worth_removing(done):
            kept = unfinished(done)
            cache.keep(kept)
            tokens, log_p, best, n_open = tokens[kept], log_p[kept], best[kept], n_open[kept]
            sentences, limits = sentences[kept], limits[kept]
    for ended, cut in zip(found, unended):
        ended.sort(key=itemgetter(0), reverse=True)
        ended[:] = (ended + cut)[:n_best]
    return found
