import itertools

import pytest
import torch
from reference import combinations

import decoding
from config import ModelConfig
from decoding import beam_search, greedy, length_penalty
from models import Transformer

PAD, BOS, EOS = 0, 1, 2
ENDS = {"bos_id": BOS, "eos_id": EOS}


def small_model(n_vocab=23, seed=0, **changes):
    """Untrained, in float64, with weights large enough for probabilities far from uniform."""
    torch.manual_seed(seed)
    config = ModelConfig(n_layers=2, d_model=16, d_ff=24, n_heads=4, dropout=0.3, **changes)
    model = Transformer(config, n_vocab=n_vocab, max_len=100, pad_id=PAD).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p *= 2
    return model


def sources(lengths, n_vocab=23, seed=1):
    """Random sentences that end with EOS, padded to the longest."""
    draw = torch.Generator().manual_seed(seed)
    src = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(src, lengths):
        row[:length] = torch.randint(3, n_vocab, (length,), generator=draw)
        row[length - 1] = EOS
    return src


def greedy_without_cache(model, src):
    """Runs the whole prefix through the decoder for each token, one sentence at a time."""
    found = []
    for row in src:
        row = row[row != PAD][None]
        ids = [BOS]
        while ids[-1] != EOS and len(ids) <= row.shape[1] + decoding.EXTRA_LENGTH:
            ids.append(model(row, torch.tensor([ids]))[0, -1].argmax().item())
        found.append([token for token in ids[1:] if token != EOS])
    return found


@combinations()
def test_cached_steps_match_the_logits_of_the_whole_prefix(choice):
    model, src, k = small_model(**choice), sources([7, 4, 5]), 2
    tgt_in = torch.randint(3, 23, (3 * k, 9))  # k hypotheses of each sentence
    cache = model.start(src, k)
    steps = [model.step(tgt_in[:, t].view(3, k), cache).flatten(0, 1) for t in range(9)]
    expected = model(src.repeat_interleave(k, dim=0), tgt_in)
    torch.testing.assert_close(model.output(torch.stack(steps, 1)), expected, rtol=0, atol=1e-10)


@combinations()
def test_hypotheses_branch_and_sentences_are_removed(choice):
    """As hypotheses are chosen anew after each token, each attends to what it continues."""
    model, src, k = small_model(**choice), sources([7, 4, 5]), 3
    draw = torch.Generator().manual_seed(1)
    cache, tokens = model.start(src, k), torch.full((3, k, 0), BOS)
    for t in range(9):
        ids = torch.randint(3, 23, (len(tokens), k, 1), generator=draw)
        tokens = torch.cat((tokens, ids), dim=2)
        found = model.step(ids[:, :, 0], cache).flatten(0, 1)
        expected = model.trunk(src.repeat_interleave(k, dim=0), tokens.flatten(0, 1))[:, -1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        parents = torch.randint(0, k, (len(tokens), k), generator=draw)
        tokens = tokens.gather(1, parents[:, :, None].expand(tokens.shape))
        cache.branch(parents)
        if t == 4:
            kept = torch.tensor([2, 0])
            tokens, src = tokens[kept], src[kept]
            cache.keep(kept)


def test_greedy_search_matches_decoding_without_a_cache():
    model, src = small_model(), sources([3, 9, 5, 5, 12])
    found = greedy(model, src, **ENDS)
    assert found == greedy_without_cache(model, src)
    assert len(set(map(len, found))) > 1  # some finish before others


def test_a_translation_is_at_most_fifty_tokens_longer_than_its_source():
    src = sources([3, 9])
    model = small_model()
    with torch.no_grad():
        model.embedding.W_e[EOS] = 0  # its logit is 0, never the highest
    for found in (greedy(model, src, **ENDS), beams(model, src, 2)):
        assert [len(ids) for ids in found] == [53, 59]


def beams(model, src, k, alpha=0.6):
    found = beam_search(model, src, **ENDS, beam_size=k, alpha=alpha)
    return [ids for ((_, ids),) in found]


@pytest.mark.parametrize("seed", range(4))
def test_a_beam_of_one_is_greedy_search(seed):
    model, src = small_model(seed=seed), sources([3, 9, 5, 12], seed=seed)
    assert beams(model, src, 1) == greedy(model, src, **ENDS)


@pytest.mark.parametrize("search", [lambda m, s: greedy(m, s, **ENDS), lambda m, s: beams(m, s, 4)])
def test_a_translation_does_not_depend_on_its_batch(search):
    model, src = small_model(seed=3), sources([3, 9, 5, 5, 12])
    alone = [search(model, row[row != PAD][None])[0] for row in src]
    assert search(model, src) == alone
    assert search(model, src.flip(0)) == alone[::-1]


def log_probability(model, row, ids):
    logits = model(row, torch.tensor([[BOS, *ids[:-1]]]))[0]
    return logits.log_softmax(-1)[range(len(ids)), list(ids)].sum().item()


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_an_exhaustive_beam_finds_the_best_of_all_translations(alpha, seed, monkeypatch):
    monkeypatch.setattr(decoding, "EXTRA_LENGTH", 2)
    n_vocab, limit = 5, 4  # source length 2 + EXTRA_LENGTH
    model, src = small_model(n_vocab, seed=seed), sources([2], n_vocab, seed)
    others = [token for token in range(n_vocab) if token != EOS]
    endings = [(*ids, EOS) for n in range(limit) for ids in itertools.product(others, repeat=n)]

    def score(ids):
        return log_probability(model, src, ids) / ((5 + len(ids)) / 6) ** alpha

    best = sorted(endings, key=score, reverse=True)[:5]
    size = {"beam_size": n_vocab**limit, "alpha": alpha}
    (found,) = beam_search(model, src, **ENDS, **size, n_best=5)
    assert [ids for _, ids in found] == [[*ids[:-1]] for ids in best]
    assert [x for x, _ in found] == pytest.approx([score(ids) for ids in best], abs=1e-5)
    assert beam_search(model, src, **ENDS, **size) == [found[:1]]


def test_open_hypotheses_follow_where_too_few_have_ended():
    model, src = small_model(), sources([3, 9])
    with torch.no_grad():
        model.embedding.W_e[EOS] = 0  # its logit is 0, never the highest
    for found in beam_search(model, src, **ENDS, beam_size=3, alpha=0.6, n_best=3):
        assert len(found) == 3 and len({tuple(ids) for _, ids in found}) == 3
        assert found[0][0] > found[1][0] > found[2][0]


def test_a_wider_beam_finds_more_probable_translations():
    model, src = small_model(seed=5), sources([6] * 12)
    score = {}
    for k in (1, 8):
        found = beams(model, src, k, alpha=0.0)
        score[k] = sum(
            log_probability(model, row[None], [*ids, EOS]) for row, ids in zip(src, found)
        )
    assert score[8] > score[1]


def test_length_penalty_matches_the_formula():
    assert length_penalty(1, 0.6) == 1
    assert length_penalty(7, 1.0) == 2
    assert length_penalty(20, 0.6) == pytest.approx(2.35436, abs=1e-5)
    assert length_penalty(20, 0.0) == 1


def test_a_decoding_step_runs_on_the_meta_device():
    model = small_model().to("meta")
    src = torch.empty(3, 7, dtype=torch.long, device="meta")
    cache = model.start(src, 2)
    for _ in range(2):
        ids = torch.empty(3, 2, dtype=torch.long, device="meta")
        assert model.step(ids, cache).shape == (3, 2, 16)


def test_cross_attention_sums_to_one_and_is_zero_on_padding():
    model, src = small_model(), sources([7, 4])
    weights = model.cross_attention(src, torch.randint(3, 23, (2, 5)))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5).double())
    assert (weights[1, ..., 4:] == 0).all() and (weights[1, ..., :4] > 0).all()
