"""Tokenizers: any text becomes ids and comes back, and what is unknown is counted."""

import unicodedata
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from helpers import csv_text, numbered, refuse_with, table, write
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import settings
import tokenization
from config import DataConfig, TokenizerConfig
from data import TextData
from errors import BadInput
from splits import load_splits
from tokenization import (
    TextCodec,
    as_codec,
    get_tokenizer,
    read_tokenizer,
    shipped_tokenizer,
    train_tokenizer,
)

SENTENCES = ["the good film", "the bad film", "a good, good thing", "Caf\u00e9 <pad> </s>"] * 20


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return train_tokenizer(SENTENCES, TokenizerConfig(vocab_size=300))


# ----------------------------------------------------------------------------------- new tokenizers


def test_special_tokens_of_a_new_tokenizer_are_0_to_3(codec):
    assert (codec.pad_id, codec.bos_id, codec.eos_id, codec.unk_id) == (0, 1, 2, 3)
    tokens = [codec.tokenizer.id_to_token(i) for i in range(4)]
    assert tokens == ["<pad>", "<s>", "</s>", "<unk>"]


@pytest.mark.slow
@given(text=st.text())
@hypothesis_settings(max_examples=200)
def test_any_text_comes_back_from_its_ids(codec, text):
    (ids,), n_unknown = codec.encode_and_count([text])
    expected = unicodedata.normalize("NFC", text)
    assert codec.tokenizer.decode(ids, skip_special_tokens=False) in (expected, f" {expected}")
    assert not {codec.pad_id, codec.bos_id, codec.eos_id, codec.unk_id} & set(ids)
    assert n_unknown == [0]


@pytest.mark.parametrize("text", ["<pad>", "so </s> it ends", "<s><unk>", "<s>"])
def test_special_tokens_in_a_sentence_are_text(text, codec):
    codec.tokenizer.save("tokenizer.json")
    for c in (codec, read_tokenizer("tokenizer.json")):
        (ids,), n_unknown = c.encode_and_count([text])
        assert min(ids) > 3 and n_unknown == [0]
        assert c.tokenizer.decode(ids, skip_special_tokens=False).strip() == text


def test_composed_and_decomposed_letters_are_the_same(codec):
    composed, decomposed = codec.encode(["caf\u00e9", "cafe\u0301"])
    assert composed == decomposed


@pytest.mark.parametrize("lowercase", [False, True])
def test_lowercase_makes_no_difference_between_capitals_and_small_letters(lowercase):
    codec = train_tokenizer(SENTENCES, TokenizerConfig(vocab_size=300, lowercase=lowercase))
    small, capital = codec.encode(["a good film \u00e9", "A GOOD Film \u00c9"])
    assert (small == capital) == lowercase


@pytest.mark.parametrize("vocab_size", [260, 261, 280])
def test_vocab_size_is_honoured(vocab_size):
    codec = train_tokenizer(SENTENCES, TokenizerConfig(vocab_size=vocab_size))
    assert codec.n_vocab == vocab_size == len(codec.tokenizer.get_vocab())


def test_a_new_tokenizer_stops_when_there_is_nothing_to_merge():
    assert train_tokenizer(["ab"], TokenizerConfig(vocab_size=8000)).n_vocab < 270


def test_a_new_tokenizer_knows_words_of_the_texts_it_was_given_alone():
    train = table([("common common words", "1")] * 50)
    vocab = get_tokenizer(TokenizerConfig(), "some.csv", train, ["source"]).tokenizer.get_vocab()
    assert "\u0120common" in vocab and "\u0120film" not in vocab


def test_a_new_tokenizer_is_trained_once_for_the_same_texts(monkeypatch):
    train, trained = table([(f"once {i}", "1") for i in range(9)]), []
    monkeypatch.setattr(
        tokenization, "train_tokenizer", lambda *a: trained.append(a) or train_tokenizer(*a)
    )
    first, second, larger = (
        get_tokenizer(TokenizerConfig(vocab_size=n), "some.csv", train, ["source"]).tokenizer
        for n in (260, 260, 270)
    )
    assert first.to_str() == second.to_str() != larger.to_str()
    assert len(trained) == 2


def test_a_new_tokenizer_is_trained_on_evenly_spaced_rows_of_a_large_table(monkeypatch, capsys):
    monkeypatch.setattr(tokenization, "MAX_TRAINING_TEXTS", 1000)
    train = table([("even even" if i % 2 == 0 else "odd odd", "1") for i in range(2000)])
    vocab = get_tokenizer(TokenizerConfig(), "some.csv", train, ["source"]).tokenizer.get_vocab()
    assert "\u0120even" in vocab and "\u0120odd" not in vocab
    assert "trained on one in 2 of 2,000 sentences" in capsys.readouterr().err


# ---------------------------------------------------------------------- tokenizers of other people


def word_piece(path: str) -> None:
    """Other names, other ids, and habits that must not matter."""
    vocab = ["film", "good", "##ish", "[UNK]", "bad", "[SEP]", "[CLS]", "the", "[PAD]"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 5), ("[CLS]", 6))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(pad_id=8, pad_token="[PAD]", length=10)
    tokenizer.save(path)


def test_a_foreign_tokenizer_is_used_with_its_own_ids(capsys):
    word_piece("tokenizer.json")
    codec = get_tokenizer(
        TokenizerConfig(tokenizer="tokenizer.json"), "some.csv", table([]), ["source"]
    )
    assert (codec.pad_id, codec.bos_id, codec.eos_id, codec.unk_id) == (8, 6, 5, 3)
    assert codec.n_vocab == 9
    texts = ["the goodish film", "dull", ""]
    assert codec.encode_and_count(texts) == ([[7, 1, 2, 0], [3], []], [0, 1, 0])
    assert "added" not in capsys.readouterr().err
    rows = {"train": table([("good", "yes"), ("the bad film", "no")])}
    data = TextData(DataConfig(batch_size=8), rows, codec, ["no", "yes"])
    (batch,) = data.load("train", [np.array([0, 1])], torch.device("cpu"))
    assert batch.src.tolist() == [[1, 5, 8, 8], [7, 4, 0, 5]]
    assert batch.tgt_in.tolist() == [[6], [6]]


def test_a_tokenizer_without_special_tokens_gets_them(capsys):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.save("tokenizer.json")
    codec = read_tokenizer("tokenizer.json")
    assert sorted((codec.pad_id, codec.bos_id, codec.eos_id, codec.unk_id)) == [3, 4, 5, 6]
    assert codec.n_vocab == 7
    assert codec.encode(["aba"]) == [[2, 0]]
    added = [line.split()[3] for line in capsys.readouterr().err.splitlines()]
    assert added == ["<pad>,", "<s>,", "</s>,", "<unk>,"]


VOCAB = {"<UNK>": 0, "a": 1, "b": 2, "ab": 3, "##b": 4}
PIECES = [("<UNK>", 0.0), ("a", -1.0), ("b", -1.0), ("ab", -1.5)]
MODELS = {
    "WordLevel": models.WordLevel({"<UNK>": 0, "a": 1, "b": 2}, unk_token="<UNK>"),
    "WordPiece": models.WordPiece(VOCAB, unk_token="<UNK>"),
    "BPE": models.BPE(VOCAB, [("a", "b")], unk_token="<UNK>"),
    "Unigram": models.Unigram(PIECES, unk_id=0),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_the_unknown_token_is_the_one_of_the_model(model):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    codec = as_codec(tokenizer)
    assert codec.unk_id == 0
    ids, n_unknown = codec.encode_and_count(["a b", "a \u2603 b \u2603", ""])
    assert ids == [[1, 2], [1, 0, 2, 0], []]
    assert n_unknown == [0, 2, 0]
    again = as_codec(Tokenizer.from_str(codec.tokenizer.to_str()))
    assert again.unk_id == 0 and again.encode_and_count(["\u2603 a"]) == ([[0, 1]], [1])


DROPPING = {
    "plain": (None, None, {}),
    "words": (None, pre_tokenizers.Whitespace(), {}),
    "pieces with a mark": (None, pre_tokenizers.Metaspace(), {}),
    "a mark put before": (normalizers.Prepend("_"), None, {}),
    "ends of words": (None, pre_tokenizers.Whitespace(), {"end_of_word_suffix": "</w>"}),
}


@pytest.mark.parametrize("normalizer, pre_tokenizer, options", DROPPING.values(), ids=DROPPING)
def test_characters_that_a_model_drops_are_counted(normalizer, pre_tokenizer, options):
    end = options.get("end_of_word_suffix", "")
    tokens = ["a", "b", "ab", "_", "\u2581", " ", "a</w>", "b</w>", "ab</w>"]
    merges = [("a", f"b{end}")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, **options))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    before = [tokenizer.encode(text).ids for text in ("ab", "a\u2603b \u2603\u2603", "")]
    codec = as_codec(tokenizer)
    ids, n_unknown = codec.encode_and_count(["ab", "a\u2603b \u2603\u2603", ""])
    assert ids == before, "the model still sees what it was made for"
    assert n_unknown == [0, 3, 0]
    again = as_codec(Tokenizer.from_str(codec.tokenizer.to_str()))
    assert again.encode_and_count(["<unk> a\u2603b"])[1] == [
        codec.encode_and_count(["<unk>"])[1][0] + 1
    ]


def test_a_tokenizer_that_cannot_read_a_word_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"good": 0}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save("tokenizer.json")
    with pytest.raises(BadInput, match=r"--tokenizer tokenizer.json: not found or not usable"):
        read_tokenizer("tokenizer.json")


TOKENIZERS_REFUSED = {"no tokenizer": b'{"a": 1}', "no JSON": b"hello", "no text": b"\xff\xfe\x00"}


@pytest.mark.parametrize("content", TOKENIZERS_REFUSED.values(), ids=TOKENIZERS_REFUSED.keys())
def test_a_file_that_is_no_tokenizer_is_refused(content):
    write("t.json", content)
    with pytest.raises(
        BadInput, match=r"--tokenizer t.json: .* tokenizer.json .*--train-tokenizer"
    ):
        read_tokenizer("t.json")


@pytest.mark.parametrize("name", ["missing/t.json", "~no_such_user/t.json"])
def test_a_tokenizer_that_is_not_there_is_refused(name, capsys):
    write("few.csv", csv_text(numbered(60)))
    argv = ["--dataset", "few.csv", "--tokenizer", name]
    refuse_with(argv, [f"--tokenizer {name}", "--train-tokenizer"], capsys)


@pytest.mark.slow
def test_an_embedded_tokenizer_is_the_one_its_training_split_gives():
    path = shipped_tokenizer("rotten_tomatoes")
    if not path.is_file():
        pytest.skip("the embedded reviews have no tokenizer beside them")
    train: datasets.Dataset = load_splits(DataConfig(), ["train"]).tables["train"]
    config = replace(
        settings.extract_config(TokenizerConfig, settings.resolve({})), train_tokenizer=True
    )
    fresh = get_tokenizer(config, "rotten_tomatoes", train, ["source"])
    assert fresh.tokenizer.to_str() == read_tokenizer(str(path)).tokenizer.to_str()
