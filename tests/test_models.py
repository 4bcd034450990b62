import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_components import (
    FORMS,
    TOLERANCE,
    as_numpy,
    assert_columns,
    assert_equal_gradients,
    attention_pairs,
    backward,
    copy_weights,
    each_dtype,
    fa_layer_norm,
    fa_mhattention,
    fa_mlp,
    fa_sinusoids,
    fa_token_embedding,
    perturbed,
    seeded_float64,  # noqa: F401, used by every test
)
from torch import Tensor, nn
from torch.testing import assert_close

from components import attention_weights
from data import NO_TARGET, Batch, pad
from models import (
    BASE,
    SIZES,
    DecoderLayer,
    EncoderLayer,
    ModelConfig,
    Transformer,
    TransformerClassifier,
    causal_mask,
    count_parameters,
    padding_mask,
)
from procedures import (
    average,
    build_optimizer,
    disagreement_sum,
    loss_sums,
    lr_at,
    paper_lr,
    train_step,
)

PAD, BOS, EOS, N_VOCAB, N_CLASSES = 0, 1, 2, 17, 5
SMALL = ModelConfig(n_layers=2, d_model=12, d_ff=20, n_heads=3, dropout=0.0)
SRC_LENGTHS, TGT_LENGTHS = (7, 4, 1), (5, 2, 6)


def transformer(**changes) -> Transformer:
    config = replace(SMALL, **changes)
    return perturbed(Transformer(config, n_vocab=N_VOCAB, max_len=11, pad_id=PAD))


def classifier(**changes) -> TransformerClassifier:
    sizes = {"n_vocab": N_VOCAB, "n_classes": N_CLASSES, "max_len": 11, "pad_id": PAD}
    return perturbed(TransformerClassifier(replace(SMALL, **changes), **sizes))


each_model = pytest.mark.parametrize("make", [transformer, classifier])


def sentences(lengths: tuple[int, ...]) -> Tensor:
    return pad([torch.randint(EOS + 1, N_VOCAB, (n,)).tolist() for n in lengths], PAD)


def inputs(make) -> tuple[Tensor, Tensor]:
    """src and tgt_in of a model of that kind."""
    start = torch.full((len(SRC_LENGTHS), 1), BOS)
    return sentences(SRC_LENGTHS), sentences(TGT_LENGTHS) if make is transformer else start


def other_token(token: Tensor) -> Tensor:
    return torch.where(token == EOS + 1, EOS + 2, EOS + 1)


def differs(a: Tensor, b: Tensor) -> Tensor:
    """At which positions two (b, l, n) are not the same; rounding does not count."""
    return (a - b).abs().amax(dim=-1) > 1e-9


# -------------------------------------------------------------------------------------------------
# Equality with torch.nn and with the paper


def layer_pairs(ours: nn.Module, theirs: nn.Module):
    """Each parameter of torch's layer, with those of ours which, stacked, are the same."""
    yield from attention_pairs(ours.self_attention, theirs.self_attn)
    norms = [(ours.norm_1, theirs.norm1), (ours.norm_2, theirs.norm2)]
    if isinstance(ours, DecoderLayer):
        yield from attention_pairs(ours.cross_attention, theirs.multihead_attn)
        norms.append((ours.norm_3, theirs.norm3))
    for our_norm, their_norm in norms:
        yield their_norm.weight, [our_norm.gamma]
        yield their_norm.bias, [our_norm.beta]
    for our_W, their_W in [
        (ours.feed_forward.W_1, theirs.linear1),
        (ours.feed_forward.W_2, theirs.linear2),
    ]:
        yield their_W.weight, [our_W.weight]
        yield their_W.bias, [our_W.bias]


def torch_layer(kind: type[nn.Module], activation: str = "relu") -> nn.Module:
    sizes = SMALL.d_model, SMALL.n_heads, SMALL.d_ff
    return kind(*sizes, dropout=0.0, activation=activation, batch_first=True, norm_first=False)


def masks(src: Tensor, tgt_in: Tensor) -> tuple[dict, dict]:
    """torch's arguments of the same meaning, for an encoder and for a decoder: True hides."""
    encoder = {"src_key_padding_mask": src == PAD}
    decoder = {
        "tgt_mask": torch.ones(tgt_in.shape[1], tgt_in.shape[1]).triu(1).bool(),
        "tgt_key_padding_mask": tgt_in == PAD,
        "memory_key_padding_mask": src == PAD,
    }
    return encoder, decoder


def assert_same_training(ours, theirs, pairs, inputs, there, tolerance) -> None:
    """Equal outputs where tokens are, and equal gradients of inputs and weights."""
    gradients = []
    for Y in (ours, theirs):
        for X in inputs:
            X.grad = None
        backward(Y[there])
        gradients.append([X.grad for X in inputs])
    assert_close(ours[there], theirs[there], rtol=tolerance, atol=tolerance)
    assert_close(gradients[0], gradients[1], rtol=tolerance, atol=tolerance)
    assert_equal_gradients(pairs, tolerance)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@each_dtype
def test_encoder_layer_is_torch_encoder_layer(dtype, activation):
    torch.set_default_dtype(dtype)
    ours = perturbed(EncoderLayer(replace(SMALL, activation=activation)))
    theirs = torch_layer(nn.TransformerEncoderLayer, activation)
    pairs = list(layer_pairs(ours, theirs))
    copy_weights(ours, theirs, pairs)
    src = sentences(SRC_LENGTHS)
    Z = torch.randn(*src.shape, SMALL.d_model, requires_grad=True)
    hide, _ = masks(src, src)
    Y = ours(Z, padding_mask(src, PAD))
    assert_same_training(Y, theirs(Z, **hide), pairs, [Z], src != PAD, TOLERANCE[dtype])


@each_dtype
def test_decoder_layer_is_torch_decoder_layer(dtype):
    torch.set_default_dtype(dtype)
    ours, theirs = perturbed(DecoderLayer(SMALL)), torch_layer(nn.TransformerDecoderLayer)
    pairs = list(layer_pairs(ours, theirs))
    copy_weights(ours, theirs, pairs)
    src, tgt_in = inputs(transformer)
    X = torch.randn(*tgt_in.shape, SMALL.d_model, requires_grad=True)
    memory = torch.randn(*src.shape, SMALL.d_model, requires_grad=True)
    _, hide = masks(src, tgt_in)
    Y = ours(X, memory, causal_mask(tgt_in.shape[1], X.device), padding_mask(src, PAD))
    expected = theirs(X, memory, **hide)
    assert_same_training(Y, expected, pairs, [X, memory], tgt_in != PAD, TOLERANCE[dtype])


@each_dtype
def test_trunk_is_torch_transformer(dtype):
    torch.set_default_dtype(dtype)
    ours = transformer()
    encoder_layer = torch_layer(nn.TransformerEncoderLayer)
    decoder_layer = torch_layer(nn.TransformerDecoderLayer)
    # With encoder and decoder of its own making torch would end both in a norm the paper has not.
    theirs = nn.Transformer(
        SMALL.d_model,
        SMALL.n_heads,
        custom_encoder=nn.TransformerEncoder(encoder_layer, 2, enable_nested_tensor=False),
        custom_decoder=nn.TransformerDecoder(decoder_layer, 2),
        batch_first=True,
    )
    our_layers = nn.ModuleList([*ours.encoder, *ours.decoder])
    their_layers = [*theirs.encoder.layers, *theirs.decoder.layers]
    pairs = [pair for layers in zip(our_layers, their_layers) for pair in layer_pairs(*layers)]
    copy_weights(our_layers, theirs, pairs)

    src, tgt_in = inputs(transformer)
    hide_src, hide = masks(src, tgt_in)
    expected = theirs(ours.embed(src), ours.embed(tgt_in), **hide_src, **hide)
    W_e = ours.embedding.W_e
    Y = ours.trunk(src, tgt_in)
    assert_same_training(Y, expected, pairs, [W_e], tgt_in != PAD, TOLERANCE[dtype])


def fa_transformer(z: list[int], x: list[int], model: Transformer) -> np.ndarray:
    """Algorithm 8 up to W_u X, its softmax left out: (n_vocab, length of x).

    The factor of the embedding and the sinusoids are AIAYN's.
    """
    W_e = as_numpy(model.embedding.W_e).T
    d_e = len(W_e)
    W_p = fa_sinusoids(d_e, 11)

    def embed(ids):
        e = [math.sqrt(d_e) * fa_token_embedding(v, W_e) + W_p[:, t] for t, v in enumerate(ids)]
        return np.stack(e, axis=1)

    def norm(X, module):
        gamma, beta = as_numpy(module.gamma), as_numpy(module.beta)
        return np.stack([fa_layer_norm(e, gamma, beta) for e in X.T], axis=1)

    Z = embed(z)
    see_all = np.ones((len(z), len(z)), dtype=bool)
    for layer in model.encoder:
        Z = norm(Z + fa_mhattention(Z, Z, layer.self_attention, see_all), layer.norm_1)
        Z = norm(Z + fa_mlp(Z, layer.feed_forward), layer.norm_2)

    X = embed(x)
    Mask = np.array([[t <= t_x for t_x in range(len(x))] for t in range(len(x))])
    see_all = np.ones((len(z), len(x)), dtype=bool)
    for layer in model.decoder:
        X = norm(X + fa_mhattention(X, X, layer.self_attention, Mask), layer.norm_1)
        X = norm(X + fa_mhattention(X, Z, layer.cross_attention, see_all), layer.norm_2)
        X = norm(X + fa_mlp(X, layer.feed_forward), layer.norm_3)
    return W_e.T @ X


@pytest.mark.parametrize("form", FORMS)
def test_transformer_is_algorithm_8(form):
    model = transformer(attention=form, d_attn=5, d_mid=7)
    src, tgt_in = inputs(transformer)
    rows = zip(model(src, tgt_in), src.tolist(), tgt_in.tolist(), SRC_LENGTHS, TGT_LENGTHS)
    for logits, z, x, l_z, l_x in rows:
        assert_columns(logits[:l_x], fa_transformer(z[:l_z], x[:l_x], model))


@each_model
@each_dtype
def test_the_forms_agree_and_share_their_weights(dtype, make):
    torch.set_default_dtype(dtype)
    first = make()
    src, tgt_in = inputs(make)
    results = []
    for form in FORMS:
        model = make(attention=form)
        model.load_state_dict(first.state_dict(), strict=True)
        logits = model(src, tgt_in)
        backward(logits)
        results.append((logits, *(p.grad for p in model.parameters())))
    tolerance = TOLERANCE[dtype]
    assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    assert_close(results[2], results[0], rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------
# What depends on what


@each_model
def test_more_padding_changes_nothing(make):
    model, (src, tgt_in) = make(), inputs(make)
    logits = model(src, tgt_in)
    wider = model(F.pad(src, (0, 4), value=PAD), F.pad(tgt_in, (0, 3), value=PAD))
    assert_close(wider[:, : tgt_in.shape[1]], logits, rtol=1e-12, atol=1e-12)


def test_a_target_token_changes_its_own_and_later_logits_only():
    model = transformer()
    src, tgt_in = sentences((7, 4)), sentences((6, 6))
    logits = model(src, tgt_in)
    for t in range(6):
        changed = tgt_in.clone()
        changed[:, t] = other_token(tgt_in[:, t])
        expected = (torch.arange(6) >= t).expand(2, 6)
        assert torch.equal(differs(model(src, changed), logits), expected)


@each_model
def test_every_source_token_changes_all_logits_of_its_sentence(make):
    model, (src, tgt_in) = make(), inputs(make)
    logits = model(src, tgt_in)
    for row, length in enumerate(SRC_LENGTHS):
        for t in range(length):
            changed = src.clone()
            changed[row, t] = other_token(src[row, t])
            expected = (torch.arange(len(src)) == row)[:, None].expand(tgt_in.shape)
            assert torch.equal(differs(model(changed, tgt_in), logits), expected)


@each_model
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_every_parameter_gets_a_gradient(make, positions):
    model = make(positions=positions)
    backward(model(*inputs(make)))

    def can_learn(name):
        # What is added to all keys alike adds the same to all scores of a query: softmax is blind.
        if name.endswith("W_k.bias"):
            return False
        # The classifier's decoder has one token, which attends to itself whatever its score.
        alone = make is classifier and name.startswith("decoder")
        return not (alone and ("self_attention.W_q" in name or "self_attention.W_k" in name))

    largest = {name: p.grad.abs().max().item() for name, p in model.named_parameters()}
    assert {n for n, g in largest.items() if g > 1e-6} == set(filter(can_learn, largest))


# -------------------------------------------------------------------------------------------------
# Weights: tied, counted, begun


def test_one_matrix_embeds_both_sides_and_unembeds():
    model = transformer()
    shapes = [p.shape for p in model.parameters()]
    assert shapes.count((N_VOCAB, SMALL.d_model)) == 1
    model.load_state_dict(transformer().state_dict())  # as after a checkpoint

    in_src, in_tgt, nowhere = 5, 6, 7
    src, tgt_in = torch.tensor([[3, in_src, 4]]), torch.tensor([[BOS, in_tgt]])

    def outputs():
        memory = model.encode(src, padding_mask(src, PAD))
        return memory, model.trunk(src, tgt_in), model(src, tgt_in)

    before = outputs()
    for token in (in_src, in_tgt, nowhere):
        with torch.no_grad():
            model.embedding.W_e[token] += 1
        after = outputs()
        memory, trunk, logits = ((a - b).abs() > 1e-9 for a, b in zip(after, before))
        assert memory.any() == (token == in_src)
        assert trunk.any() == (token != nowhere)
        if token == nowhere:
            assert torch.equal(logits.any(dim=(0, 1)).nonzero(), torch.tensor([[token]]))
        before = after


def paper_size(config: ModelConfig) -> int:
    """Parameters with the vocabulary of AIAYN's English to German."""
    with torch.device("meta"):
        return count_parameters(Transformer(config, n_vocab=37_000, max_len=512, pad_id=PAD))


@pytest.mark.parametrize("size, millions", [("base", 65), ("big", 213)])
def test_the_named_sizes_are_the_papers(size, millions):
    assert paper_size(SIZES[size]) == pytest.approx(millions * 1e6, rel=0.04)


@pytest.mark.parametrize(
    "changes, millions",
    [
        *(({"n_heads": h}, 65) for h in (1, 4, 16, 32)),  # (A)
        ({"d_attn": 16}, 58),  # (B)
        ({"d_attn": 32}, 60),
        ({"n_layers": 2}, 36),  # (C)
        ({"n_layers": 4}, 50),
        ({"n_layers": 8}, 80),
        ({"d_ff": 1024}, 53),
        ({"d_ff": 4096}, 90),
    ],
)
def test_table_3_differs_from_base_as_in_the_paper(changes, millions):
    # Differences, for the count of base itself hangs on a vocabulary the paper tells roughly.
    difference = paper_size(replace(BASE, **changes)) - paper_size(BASE)
    assert difference / 1e6 == pytest.approx(millions - 65, abs=1)  # both were rounded


@pytest.mark.parametrize(
    "changes, millions",
    [
        ({"d_model": 256, "d_attn": 32, "d_mid": 32}, 28),  # (C)
        ({"d_model": 1024, "d_attn": 128, "d_mid": 128}, 168),
    ],
)
def test_table_3_with_another_d_model_has_the_papers_size(changes, millions):
    assert paper_size(replace(BASE, **changes)) == pytest.approx(millions * 1e6, rel=0.05)


def test_learned_positions_add_their_matrix():
    difference = paper_size(replace(BASE, positions="learned")) - paper_size(BASE)
    assert difference == 512 * 512


def test_count_parameters_by_hand():
    # 12 x 12 and a bias, four times; two matrices of 12 x 20; gamma and beta.
    attention, feed_forward, norm = 4 * (144 + 12), 2 * 240 + 20 + 12, 24
    encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
    trunk = N_VOCAB * 12 + 2 * (encoder + decoder)
    assert count_parameters(transformer()) == trunk  # the tied matrix once
    assert count_parameters(classifier()) == trunk + 12 * N_CLASSES + N_CLASSES


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_fresh_weights_give_unit_logits_and_attention_that_is_spread(positions):
    torch.set_default_dtype(torch.float32)
    config = replace(BASE, n_layers=2, d_ff=1024, dropout=0.0, positions=positions)
    model = Transformer(config, n_vocab=1000, max_len=32, pad_id=PAD)
    src, tgt_in = torch.randint(3, 1000, (2, 4, 24))
    with torch.no_grad():
        assert 0.5 < model(src, tgt_in).std() < 2
        X, module = model.embed(src), model.encoder[0].self_attention
        Q, K = (W(X).unflatten(-1, (8, -1)).transpose(1, 2) for W in (module.W_q, module.W_k))
        alpha = attention_weights(Q, K)  # (b, h, l_x, l_z)
    entropy = -(alpha * alpha.log()).sum(dim=-1).mean() / math.log(24)  # 1: uniform, 0: one token
    assert 0.5 < entropy < 0.99


def test_no_two_layers_and_no_two_seeds_begin_alike():
    matrices = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Transformer(SMALL, n_vocab=N_VOCAB, max_len=11, pad_id=PAD)
        matrices += [p.flatten().tolist() for p in model.parameters() if p.ndim > 1]
    first_numbers = [numbers[0] for numbers in matrices]
    assert len(set(first_numbers)) == len(matrices) == 2 * (1 + 2 * 6 + 2 * 10)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, []),
        ({"n_heads": 5}, [("--d-model 12", "does not divide by --n-heads 5")]),
        ({"n_heads": 5, "d_attn": 4}, [("--d-model 12", "--n-heads 5")]),
        ({"n_heads": 5, "d_attn": 4, "d_mid": 7}, []),
        ({"d_model": 9}, [("--d-model 9", "odd")]),
        ({"d_model": 9, "positions": "learned"}, []),
        ({"d_model": 9, "n_heads": 2}, [("--d-model 9", "--n-heads 2"), ("--d-model 9", "odd")]),
    ],
)
def test_problems_name_what_cannot_work_and_what_would(changes, expected):
    config = replace(SMALL, **changes)
    problems = config.problems()
    assert len(problems) == len(expected)
    for problem, words in zip(problems, expected):
        assert all(word in problem for word in words) and "give" in problem
    if not problems:
        model = Transformer(config, n_vocab=N_VOCAB, max_len=11, pad_id=PAD)
        assert model(*inputs(transformer)).isfinite().all()


# -------------------------------------------------------------------------------------------------
# Dropout


@each_model
def test_dropout_acts_in_training_only(make):
    model, (src, tgt_in) = make(dropout=0.2), inputs(make)
    assert differs(model(src, tgt_in), model(src, tgt_in)).all()
    model.eval()
    assert torch.equal(model(src, tgt_in), model(src, tgt_in))


def test_dropout_is_on_both_embeddings_and_every_sub_layer():
    model, shares = transformer(dropout=0.2), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, *_: shares.append(module.p))
    model(*inputs(transformer))
    assert shares == [0.2] * (2 + SMALL.n_layers * (2 + 3))


def test_dropout_is_before_the_sum_and_the_norm():
    config = replace(SMALL, dropout=1.0)  # every sub-layer gives 0, and the sum is what went in
    encoder, decoder = perturbed(EncoderLayer(config)), perturbed(DecoderLayer(config))
    X = torch.randn(2, 3, SMALL.d_model)
    assert_close(encoder(X, None), encoder.norm_2(encoder.norm_1(X)))
    norms = decoder.norm_3(decoder.norm_2(decoder.norm_1(X)))
    assert_close(decoder(X, X, None, None), norms)
    model = transformer(dropout=1.0)
    assert not model.embed(sentences(SRC_LENGTHS)).any()


# -------------------------------------------------------------------------------------------------
# Loss and update


def batch_of(make, src_lengths=SRC_LENGTHS, tgt_lengths=TGT_LENGTHS) -> Batch:
    src = sentences(src_lengths)
    if make is transformer:
        tgt = sentences(tgt_lengths)
        tgt_in, tgt_out = tgt, torch.where(tgt == PAD, NO_TARGET, tgt)
    else:
        tgt_in = torch.full((len(src), 1), BOS)
        tgt_out = torch.randint(N_CLASSES, tgt_in.shape)
    n_targets = int((tgt_out != NO_TARGET).sum())
    return Batch(src, tgt_in, tgt_out, n_targets, n_tokens=0)


def concatenated(batches: list[Batch]) -> Batch:
    def rows(name, value):
        return pad([row for b in batches for row in getattr(b, name).tolist()], value)

    n_targets = sum(batch.n_targets for batch in batches)
    tensors = rows("src", PAD), rows("tgt_in", PAD), rows("tgt_out", NO_TARGET)
    return Batch(*tensors, n_targets, n_tokens=0)


def step(model, batches, optimizer, *, lr=1e-3, max_norm=1e9, scaled=False) -> Tensor:
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    rest = {"lr": lr, "max_norm": max_norm, "label_smoothing": 0.1}
    return train_step(model, batches, optimizer, scaler, contextlib.nullcontext(), **rest)


def step_on_meta(make, wrong=None) -> Tensor:
    """Where no tensor has a value: what asks for one, or meets a tensor of the CPU, fails."""
    model = make(dropout=0.1).to("meta")
    if wrong is not None:
        model.register_forward_hook(lambda module, args, logits: wrong(logits))
    optimizer = build_optimizer(model, weight_decay=0.01, fused=False)
    batches = [batch_of(make).to(torch.device("meta")) for _ in range(2)]
    return step(model, batches, optimizer, max_norm=1.0)


@each_model
def test_a_step_asks_the_device_for_nothing(make):
    sums = step_on_meta(make)
    assert sums.shape == (2,) and sums.is_meta


@pytest.mark.parametrize(
    "wrong",
    [
        lambda logits: logits * logits.max().item(),
        lambda logits: logits + torch.ones(logits.shape),
        lambda logits: logits[logits > 0],
    ],
    ids=["item", "cpu", "shape"],
)
@each_model
def test_the_meta_device_would_tell(make, wrong):
    with pytest.raises(RuntimeError, match=r"meta"):
        step_on_meta(make, wrong)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_formula_and_torch_cross_entropy(smoothing):
    n = 7
    logits = torch.randn(2, 4, n, requires_grad=True)
    tgt_out = torch.tensor([[3, 0, 6, NO_TARGET], [1, NO_TARGET, NO_TARGET, NO_TARGET]])
    loss_sum, nll_sum = loss_sums(logits, tgt_out, smoothing)

    by_hand = {0.0: 0.0, smoothing: 0.0}
    for scores, target in zip(as_numpy(logits).reshape(-1, n), tgt_out.flatten().tolist()):
        if target != NO_TARGET:
            log_p = np.log(np.exp(scores) / np.exp(scores).sum())
            for s in by_hand:
                q = np.full(n, s / n) + (1 - s) * np.eye(n)[target]
                by_hand[s] -= (q * log_p).sum()
    assert loss_sum.item() == pytest.approx(by_hand[smoothing], rel=1e-6)
    assert nll_sum.item() == pytest.approx(by_hand[0.0], rel=1e-6)

    rest = {"reduction": "sum", "label_smoothing": smoothing, "ignore_index": NO_TARGET}
    expected = F.cross_entropy(logits.flatten(0, 1), tgt_out.flatten(), **rest)
    assert loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss_sum, logits)
    assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-6, atol=1e-6)
    assert not nll_sum.requires_grad


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Unlike Adam's, its update shows the length of the gradient."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@each_model
def test_micro_batches_of_unequal_size_and_one_batch_are_the_same_update(make):
    first, (few, many) = make(), (((3, 5), (2, 1)), ((7, 1, 4, 2), (4, 6, 3, 6)))
    batches = [batch_of(make, *few), batch_of(make, *many)]
    whole = concatenated(batches)

    results = []
    for parts in (batches, [whole]):
        model = make()
        model.load_state_dict(first.state_dict())
        sums = step(model, parts, sgd(model))
        assert all(p.grad is None for p in model.parameters())  # or the next update has it too
        results.append((weights_of(model), sums))
    (in_parts, sums), (at_once, sums_at_once) = results
    assert_close(in_parts, at_once, rtol=0, atol=1e-10)
    assert_close(sums, sums_at_once)

    logits = first(whole.src, whole.tgt_in)
    flat, targets = logits.flatten(0, 1), whole.tgt_out.flatten()
    F.cross_entropy(flat, targets, label_smoothing=0.1, ignore_index=NO_TARGET).backward()
    descent = torch.cat([p.grad.flatten() for p in first.parameters()])
    # The loss is computed in float32, this one in float64.
    assert_close(in_parts, weights_of(first) - 1e-3 * descent, rtol=0, atol=1e-8)
    nll = F.cross_entropy(flat, targets, reduction="sum", ignore_index=NO_TARGET)
    right = (flat.argmax(dim=-1) == targets).sum()
    assert_close(sums, torch.stack((nll.detach(), right)).float())


@pytest.mark.parametrize("scaled", [False, True])
def test_max_norm_shortens_a_long_gradient_and_leaves_a_short_one(scaled):
    first, batch, updates = transformer(), batch_of(transformer), []
    for max_norm in (1e9, 1e3, 0.1):
        model = transformer()
        model.load_state_dict(first.state_dict())
        step(model, [batch], sgd(model), lr=1.0, max_norm=max_norm, scaled=scaled)
        updates.append(weights_of(model) - weights_of(first))
    long, untouched, short = updates
    assert 0.2 < long.norm() < 1e3
    assert_close(untouched, long, rtol=1e-6, atol=1e-10)
    assert_close(short, long * 0.1 / long.norm(), rtol=1e-5, atol=1e-10)


def test_the_optimizer_is_the_papers_adam_and_decays_matrices_only():
    model = transformer()
    optimizer = build_optimizer(model, weight_decay=0.5)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.98), 1e-9)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    for name, p in model.named_parameters():
        assert_close(p.detach(), before[name] * (0.95 if p.ndim == 2 else 1))


@pytest.mark.parametrize("step", [1, 2000, 4000, 40_000])
def test_learning_rate_is_equation_3(step):
    size = {"d_model": 512, "warmup_steps": 4000}
    rest = {"schedule": "inverse_sqrt", "warmup_steps": 4000, "n_steps": 100_000}
    expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
    assert lr_at(step, peak=paper_lr(**size), **rest) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule, quarter", [("linear", 0.75), ("cosine", 0.5 + 0.125**0.5)])
def test_learning_rate_falls_from_the_peak_to_0_one_update_after_the_last(schedule, quarter):
    def lr(step):
        return lr_at(step, peak=2.0, schedule=schedule, warmup_steps=100, n_steps=499)

    assert [lr(1), lr(50), lr(100)] == [0.02, 1.0, 2.0]
    assert lr(200) == pytest.approx(2.0 * quarter)
    assert lr(300) == pytest.approx(1.0)
    assert 0 < lr(499) < 0.006
    assert lr(500) == lr(900) == 0


def test_constant_learning_rate_stays_at_its_peak():
    rest = {"schedule": "constant", "warmup_steps": 10, "n_steps": 20}
    assert [lr_at(step, peak=2.0, **rest) for step in (5, 10, 20)] == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("step, warmup_steps", [(0, 10), (1, 0)])
def test_steps_count_from_1(step, warmup_steps):
    with pytest.raises(ValueError, match=f"step {step} and warmup_steps {warmup_steps}"):
        lr_at(step, peak=1.0, schedule="linear", warmup_steps=warmup_steps, n_steps=20)


def test_average_is_the_mean_of_each_weight():
    models = [transformer() for _ in range(3)]
    mean = average(model.state_dict() for model in models)
    assert mean.keys() == models[0].state_dict().keys()
    for name, p in mean.items():
        a, b, c = (model.state_dict()[name] for model in models)
        assert_close(p, (a + b + c) / 3, rtol=1e-12, atol=1e-12)


def test_disagreement_is_the_mean_of_both_divergences_over_the_targets():
    halves = torch.randn(2, 3, 4, 7)
    tgt_out = torch.tensor([[3, 0, 6, 1], [1, 5, NO_TARGET, NO_TARGET], [2] + 3 * [NO_TARGET]])
    p, q = (half.log_softmax(-1)[tgt_out != NO_TARGET] for half in halves)
    there, back = (
        F.kl_div(a, b, log_target=True, reduction="sum").item() for a, b in ((q, p), (p, q))
    )
    said = disagreement_sum(halves.flatten(0, 1), tgt_out.repeat(2, 1))
    assert said.item() == pytest.approx((there + back) / 2, rel=1e-5)


@pytest.mark.parametrize("dropout, agree", [(0.0, True), (0.3, False)])
def test_r_drop_without_dropout_is_the_same_update(dropout, agree):
    weights = []
    for r_drop in (0.0, 5.0):
        torch.manual_seed(0)
        config = ModelConfig(n_layers=1, d_model=16, d_ff=16, n_heads=2, dropout=dropout)
        model = Transformer(config, n_vocab=11, max_len=9, pad_id=0)
        ids = torch.randint(3, 11, (3, 5))
        batch = Batch(ids, ids, ids, n_targets=15, n_tokens=30)
        optimizer = torch.optim.SGD(model.parameters())
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        rates = {"lr": 0.1, "max_norm": 1e9, "label_smoothing": 0.1, "r_drop": r_drop}
        sums = train_step(model, [batch], optimizer, scaler, contextlib.nullcontext(), **rates)
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        assert 0 < sums[0].item() / 15 < 10
    assert torch.allclose(*weights, atol=1e-6) == agree
