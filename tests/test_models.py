import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from reference import (
    BOS,
    EOS,
    N_CLASSES,
    N_VOCAB,
    PAD,
    SMALL,
    SRC_LENGTHS,
    TGT_LENGTHS,
    TOLERANCE,
    assert_columns,
    assert_equal_gradients,
    attention_pairs,
    backward,
    classifier,
    combinations,
    copy_weights,
    each_dtype,
    each_model,
    fa_transformer,
    inputs,
    perturbed,
    seeded_float64,  # noqa: F401
    sentences,
    transformer,
)
from torch import Tensor, nn
from torch.testing import assert_close

from components import ACTIVATIONS, FORMS, POSITIONS, padding_mask
from config import BASE, SIZES, ModelConfig
from models import DecoderLayer, EncoderLayer, Transformer, count_parameters

pytestmark = pytest.mark.usefixtures("seeded_float64")


def other_token(token: Tensor) -> Tensor:
    return torch.where(token == EOS + 1, EOS + 2, EOS + 1)


def differs(a: Tensor, b: Tensor) -> Tensor:
    """The positions at which two (b, l, n) differ by more than rounding."""
    return (a - b).abs().amax(dim=-1) > 1e-9


# ------------------------------------------------------- compared with torch.nn and with the papers


def layer_pairs(ours: nn.Module, theirs: nn.Module):
    """Each parameter of torch's layer with ours, which are the same when stacked."""
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


def torch_layer(kind: type[nn.Module], activation=F.relu) -> nn.Module:
    sizes = SMALL.d_model, SMALL.n_heads, SMALL.d_ff
    return kind(*sizes, dropout=0.0, activation=activation, batch_first=True, norm_first=False)


def masks(src: Tensor, tgt_in: Tensor) -> tuple[dict, dict]:
    """The masks as torch's encoder and decoder take them: True hides."""
    encoder = {"src_key_padding_mask": src == PAD}
    decoder = {
        "tgt_mask": torch.ones(tgt_in.shape[1], tgt_in.shape[1]).triu(1).bool(),
        "tgt_key_padding_mask": tgt_in == PAD,
        "memory_key_padding_mask": src == PAD,
    }
    return encoder, decoder


def assert_same_training(ours, theirs, pairs, inputs, present, tolerance) -> None:
    """Equal outputs where tokens are, and equal gradients of inputs and weights."""
    gradients = []
    for Y in (ours, theirs):
        for X in inputs:
            X.grad = None
        backward(Y[present])
        gradients.append([X.grad for X in inputs])
    assert_close(ours[present], theirs[present], rtol=tolerance, atol=tolerance)
    assert_close(gradients[0], gradients[1], rtol=tolerance, atol=tolerance)
    assert_equal_gradients(pairs, tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_dtype
def test_encoder_layer_matches_torch_encoder_layer(dtype, activation):
    torch.set_default_dtype(dtype)
    ours = perturbed(EncoderLayer(replace(SMALL, activation=activation)))
    theirs = torch_layer(nn.TransformerEncoderLayer, ACTIVATIONS[activation])
    pairs = list(layer_pairs(ours, theirs))
    copy_weights(ours, theirs, pairs)
    src = sentences(SRC_LENGTHS)
    Z = torch.randn(*src.shape, SMALL.d_model, requires_grad=True)
    hide, _ = masks(src, src)
    Y = ours(Z, padding_mask(src, PAD))
    assert_same_training(Y, theirs(Z, **hide), pairs, [Z], src != PAD, TOLERANCE[dtype])


@each_dtype
def test_decoder_layer_matches_torch_decoder_layer(dtype):
    torch.set_default_dtype(dtype)
    ours, theirs = perturbed(DecoderLayer(SMALL)), torch_layer(nn.TransformerDecoderLayer)
    pairs = list(layer_pairs(ours, theirs))
    copy_weights(ours, theirs, pairs)
    src, tgt_in = inputs(transformer)
    X = torch.randn(*tgt_in.shape, SMALL.d_model, requires_grad=True)
    memory = torch.randn(*src.shape, SMALL.d_model, requires_grad=True)
    _, hide = masks(src, tgt_in)
    Y = ours(X, memory, padding_mask(src, PAD))
    expected = theirs(X, memory, **hide)
    assert_same_training(Y, expected, pairs, [X, memory], tgt_in != PAD, TOLERANCE[dtype])


@each_dtype
def test_trunk_matches_torch_transformer(dtype):
    torch.set_default_dtype(dtype)
    ours = transformer()
    encoder_layer = torch_layer(nn.TransformerEncoderLayer)
    decoder_layer = torch_layer(nn.TransformerDecoderLayer)
    # torch's own encoder and decoder end in a norm that the paper does not have.
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


@pytest.mark.parametrize("form", FORMS)
def test_transformer_is_algorithm_8(form):
    model = transformer(attention=form, d_attn=5, d_mid=7)
    src, tgt_in = inputs(transformer)
    rows = zip(model(src, tgt_in), src.tolist(), tgt_in.tolist(), SRC_LENGTHS, TGT_LENGTHS)
    for logits, z, x, l_z, l_x in rows:
        assert_columns(logits[:l_x], fa_transformer(z[:l_z], x[:l_x], model))


@combinations()
@each_model
def test_the_forms_agree_and_share_their_weights(make, choice):
    src, tgt_in = inputs(make)
    results, weights = [], None
    for form in (choice["attention"], "list"):
        model = make(**choice | {"attention": form})
        weights = weights or model.state_dict()
        model.load_state_dict(weights, strict=True)
        logits = model(src, tgt_in)
        backward(logits)
        results.append((logits, *(p.grad for p in model.parameters())))
    assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_model_compiles_to_one_graph_for_changing_lengths(form):
    model = transformer(attention=form, n_layers=1, n_heads=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for lengths in (SRC_LENGTHS, TGT_LENGTHS, (3, 8, 9)):
        ids = sentences(lengths)
        assert_close(compiled(ids, ids), model(ids, ids), rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------- what depends on what


@combinations()
@each_model
def test_more_padding_changes_nothing(make, choice):
    model, (src, tgt_in) = make(**choice), inputs(make)
    logits = model(src, tgt_in)
    wider = model(F.pad(src, (0, 4), value=PAD), F.pad(tgt_in, (0, 3), value=PAD))
    assert_close(wider[:, : tgt_in.shape[1]], logits, rtol=1e-12, atol=1e-12)


@combinations()
def test_a_target_token_changes_its_own_and_later_logits_only(choice):
    model = transformer(**choice)
    src, tgt_in = sentences((7, 4)), sentences((6, 6))
    logits = model(src, tgt_in)
    for t in range(6):
        changed = tgt_in.clone()
        changed[:, t] = other_token(tgt_in[:, t])
        expected = (torch.arange(6) >= t).expand(2, 6)
        assert torch.equal(differs(model(src, changed), logits), expected)


@combinations()
@each_model
def test_every_source_token_changes_all_logits_of_its_sentence(make, choice):
    model, (src, tgt_in) = make(**choice), inputs(make)
    logits = model(src, tgt_in)
    for row, length in enumerate(SRC_LENGTHS):
        for t in range(length):
            changed = src.clone()
            changed[row, t] = other_token(src[row, t])
            expected = (torch.arange(len(src)) == row)[:, None].expand(tgt_in.shape)
            assert torch.equal(differs(model(changed, tgt_in), logits), expected)


@combinations()
@each_model
def test_every_parameter_gets_a_gradient(make, choice):
    model = make(**choice)
    backward(model(*inputs(make)))

    def must_learn(name):
        # Softmax ignores a constant, and this bias adds one to all scores of a query.
        if name.endswith("W_k.bias"):
            return False
        # The classifier's decoder has one token, which attends to itself whatever the score.
        alone = make is classifier and name.startswith("decoder")
        return not (alone and ("self_attention.W_q" in name or "self_attention.W_k" in name))

    largest = {name: p.grad.abs().max().item() for name, p in model.named_parameters()}
    assert [n for n, g in largest.items() if g <= 1e-6 and must_learn(n)] == []


# -------------------------------------------------------------- weights: tied, counted, initialized


def test_one_matrix_embeds_both_sides_and_unembeds():
    model = transformer()
    shapes = [p.shape for p in model.parameters()]
    assert shapes.count((N_VOCAB, SMALL.d_model)) == 1
    model.load_state_dict(transformer().state_dict())  # as when a checkpoint is loaded

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
def test_named_sizes_match_the_paper(size, millions):
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
def test_rows_of_table_3_differ_from_base_as_in_the_paper(changes, millions):
    # Differences, because the size of base depends on a vocabulary that the paper gives roughly.
    difference = paper_size(replace(BASE, **changes)) - paper_size(BASE)
    assert difference / 1e6 == pytest.approx(millions - 65, abs=1)  # the paper rounds both


@pytest.mark.parametrize(
    "changes, millions",
    [
        ({"d_model": 256, "d_attn": 32, "d_mid": 32}, 28),  # (C)
        ({"d_model": 1024, "d_attn": 128, "d_mid": 128}, 168),
    ],
)
def test_rows_of_table_3_with_another_d_model_match_the_paper(changes, millions):
    assert paper_size(replace(BASE, **changes)) == pytest.approx(millions * 1e6, rel=0.05)


def test_learned_positions_add_one_matrix():
    difference = paper_size(replace(BASE, positions="learned")) - paper_size(BASE)
    assert difference == 512 * 512


def test_count_parameters_by_hand():
    # Four times 12 x 12 and a bias; two matrices of 12 x 20 and biases; gamma and beta.
    attention, feed_forward, norm = 4 * (144 + 12), 2 * 240 + 20 + 12, 24
    encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
    trunk = N_VOCAB * 12 + 2 * (encoder + decoder)
    assert count_parameters(transformer()) == trunk  # the tied matrix once
    assert count_parameters(classifier()) == trunk + 12 * N_CLASSES + N_CLASSES


@pytest.mark.parametrize("positions", POSITIONS)
def test_initial_weights_give_unit_logits_and_spread_attention(positions):
    torch.set_default_dtype(torch.float32)
    config = replace(BASE, n_layers=2, d_ff=1024, dropout=0.0, positions=positions)
    model = Transformer(config, n_vocab=1000, max_len=32, pad_id=PAD)
    src, tgt_in = torch.randint(3, 1000, (2, 4, 24))
    with torch.no_grad():
        assert 0.5 < model(src, tgt_in).std() < 2
        X, module = model.embed(src), model.encoder[0].self_attention
        alpha = module.weights(X, X)  # (b, h, l_x, l_z)
    entropy = -(alpha * alpha.log()).sum(dim=-1).mean() / math.log(24)  # 1: uniform, 0: one token
    assert 0.5 < entropy < 0.99


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_initial_vectors_of_different_positions_differ_in_every_layer(size):
    """With a gain of 1 those of base would be 0.97 and 0.999 alike after the last layers."""
    torch.set_default_dtype(torch.float32)
    model = Transformer(replace(SIZES[size], dropout=0.0), n_vocab=1000, max_len=32, pad_id=PAD)
    src, tgt_in = torch.randint(3, 1000, (2, 8, 14))
    with torch.no_grad():
        memory = model.encode(src, padding_mask(src, PAD))
        for X in (memory, model.decode(tgt_in, memory, padding_mask(src, PAD))):
            unit = X / X.norm(dim=-1, keepdim=True)
            cosines = unit @ unit.transpose(1, 2)  # (b, l, l), 1 on the diagonal
            assert (cosines.sum() - 8 * 14) / (8 * 14 * 13) < 0.5


def test_initial_weights_differ_between_layers_and_seeds():
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
        ({"n_heads": 5}, [("--d-model 12", "not a multiple of --n-heads 5")]),
        ({"n_heads": 5, "d_attn": 4}, [("--d-model 12", "--n-heads 5")]),
        ({"n_heads": 5, "d_attn": 4, "d_mid": 7}, []),
        ({"d_model": 9}, [("--d-model 9", "odd")]),
        ({"d_model": 9, "positions": "learned"}, []),
        ({"d_model": 9, "n_heads": 2}, [("--d-model 9", "--n-heads 2"), ("--d-model 9", "odd")]),
    ],
)
def test_problems_name_the_options_and_a_remedy(changes, expected):
    config = replace(SMALL, **changes)
    problems = config.problems()
    assert len(problems) == len(expected)
    for problem, words in zip(problems, expected):
        assert all(word in problem for word in words) and "give" in problem
    if not problems:
        model = Transformer(config, n_vocab=N_VOCAB, max_len=11, pad_id=PAD)
        assert model(*inputs(transformer)).isfinite().all()


# ------------------------------------------------------------------------------------------ dropout


@each_model
def test_dropout_is_active_in_training_only(make):
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
    config = replace(
        SMALL, dropout=1.0
    )  # every sub-layer gives 0, so the residual sum is its input
    encoder, decoder = perturbed(EncoderLayer(config)), perturbed(DecoderLayer(config))
    X = torch.randn(2, 3, SMALL.d_model)
    assert_close(encoder(X, None), encoder.norm_2(encoder.norm_1(X)))
    norms = decoder.norm_3(decoder.norm_2(decoder.norm_1(X)))
    assert_close(decoder(X, X, None), norms)
    model = transformer(dropout=1.0)
    assert not model.embed(sentences(SRC_LENGTHS)).any()
