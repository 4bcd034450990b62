"""What options of a training change, and what they must not."""

import json
import math
from pathlib import Path

import matplotlib.image
import pytest
import torch
from helpers import (
    N_TRAIN,
    TINY,
    csv_bytes,
    events,
    losses,
    run_quietly,
    toy_corpus,
    translate_toy,
    write_files,
    write_text_lines,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import main
import procedures
from components import FORMS


@pytest.mark.slow
def test_a_word_that_decides_is_learned():
    words = "the a film story of and with actors plot about year man".split()
    rows = []
    for i in range(400):
        filler = [words[(i * 7 + k * (i % 5 + 1)) % len(words)] for k in range(6)]
        filler.insert(i % 6, ("fine", "awful")[i // 2 % 2])
        rows.append((" ".join([*filler, str(i)]), ("yes", "no")[i // 2 % 2]))
    write_files({"made.csv": csv_bytes(rows)})
    options = "--d-model 32 --d-ff 64 --epochs 6 --lr 5e-3 --warmup-steps 10".split()
    run_quietly(*TINY, *options, "--dataset", "made.csv", "--run-dir", "r")
    assert events("r", "test")[0]["accuracy"] >= 0.95
    write_files({"in.txt": b"the awful story\nthe fine story\n"})
    answers = run_quietly("--run-dir", "r", "--predict", "in.txt").splitlines()
    assert [answer.split("\t")[0] for answer in answers] == ["no", "yes"]


@pytest.mark.slow
@pytest.mark.pictures
def test_reversal_is_learned_to_the_last_sentence_of_the_test_split(tmp_path, capsys):
    toy_corpus(tmp_path, lambda line: line[::-1])
    assert translate_toy(tmp_path, "--epochs", "25", "--average-checkpoints", "1") == 0
    hypotheses = (tmp_path / "run" / "test.hypotheses.txt").read_text()
    assert hypotheses == (tmp_path / "test.out").read_text()
    assert (
        matplotlib.image.imread(tmp_path / "run" / "attention.png").std() > 0.01
    )  # a picture, and not blank
    out = capsys.readouterr().out
    assert "BLEU 100.0" in out
    assert out.count("  hypothesis  ") == 2 * 25

    # Using the model takes its folder alone; a blank line stays one.
    write_text_lines(tmp_path / "new.txt", ["a b c", "", "h g"])
    expected = ["c b a", "", "g h"]
    for beam_size in ("1", "4"):
        use = ["--run-dir", "run", "--predict", "new.txt", "--beam-size", beam_size]
        assert main.main(use) == 0
        assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.slow
def test_accumulating_halves_the_steps(train):
    plain = train("plain", "--batch-size", 8)
    run = train("accumulated", "--batch-size", 8, "--accumulate", 2)
    n_batches = math.ceil(N_TRAIN / 8)
    assert len(events(plain, "step")) == 2 * n_batches
    assert len(events(run, "step")) == 2 * math.ceil(n_batches / 2)
    assert events(run, "epoch")[0]["tokens"] == events(plain, "epoch")[0]["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("max_steps, epochs", [(5, 1), (7, 2)])
def test_max_steps_stops_there(max_steps, epochs, train):
    run = train("r", "--max-steps", max_steps)
    assert len(events(run, "step")) == max_steps
    assert len(events(run, "epoch")) == epochs
    assert len(events(run, "test")) == 1


@pytest.mark.slow
def test_patience_stops_a_run_that_does_not_improve(train):
    run = train("r", "--patience", 2, "--epochs", 9, "--lr", "1e-30")
    assert len(events(run, "epoch")) == 1 + 2


@pytest.mark.slow
def test_average_checkpoints_saves_the_mean_of_the_last_epochs(train, monkeypatch):
    averaged, average = [], procedures.average_weights

    def recorded(dicts):
        averaged.append(list(dicts))
        return average(averaged[-1])

    monkeypatch.setattr(procedures, "average_weights", recorded)
    # With a constant rate the first epochs of a longer run are those of a shorter one.
    constant = ("--schedule", "constant", "--lr", "1e-2", "--warmup-steps", 1)
    first = load_file(train("one", *constant, "--epochs", 1) / "best.safetensors")
    two = train("two", *constant, "--epochs", 2, "--average-checkpoints", 2)
    train("three", *constant, "--epochs", 3, "--average-checkpoints", 2)
    (epoch_1, epoch_2), (again_2, epoch_3) = averaged
    for name, weights in load_file(two / "best.safetensors").items():
        assert epoch_1[name].equal(first[name])
        assert epoch_2[name].equal(again_2[name])
        torch.testing.assert_close(weights, (epoch_1[name] + epoch_2[name]) / 2)
    assert not epoch_1["embedding.W_e"].equal(epoch_2["embedding.W_e"])
    assert not epoch_2["embedding.W_e"].equal(epoch_3["embedding.W_e"])


@pytest.mark.slow
def test_bfloat16_runs_on_the_cpu(finished, train):
    run = train("r", "--precision", "bf16")
    assert losses(run) != losses(finished[0])
    assert losses(run)[:3] == pytest.approx(losses(finished[0])[:3], rel=0.05)
    assert {t.dtype for t in load_file(run / "best.safetensors").values()} == {torch.float32}


def test_three_classes_with_numbers_as_labels():
    rows = [(f"w{i % 3} {i}", (10, 9, -1)[i % 3]) for i in range(150)]
    write_files({"made.csv": csv_bytes(rows)})
    run_quietly(*TINY, "--dataset", "made.csv", "--run-dir", "r", "--max-steps", 2)
    assert json.loads(Path("r/config.json").read_text())["classes"] == ["-1", "9", "10"]


@pytest.mark.slow
def test_pad_to_changes_the_width_and_not_the_losses(train):
    exact = ("--dropout", 0, "--max-steps", 3, "--max-length", 100)
    narrow, wide = train("narrow", *exact), train("wide", *exact, "--pad-to", 200)
    assert losses(wide) == pytest.approx(losses(narrow), rel=1e-5)
    assert events(narrow, "epoch")[0]["padding_share"] < 0.2
    assert events(wide, "epoch")[0]["padding_share"] > 0.6


@pytest.mark.slow
def test_implementations_of_attention_agree(train):
    exact = ("--dropout", 0, "--max-steps", 4)
    first, *others = (losses(train(form, *exact, "--attention", form)) for form in FORMS)
    for other in others:
        assert other == pytest.approx(first, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("switch, same", [("--lowercase", True), ("--no-lowercase", False)])
def test_lowercase_and_vocab_size_are_those_of_the_tokenizer(switch, same, train):
    run = train("r", "--train-tokenizer", switch, "--max-steps", 1)
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    assert (tokenizer.encode("A GOOD film").ids == tokenizer.encode("a good film").ids) == same
    assert tokenizer.get_vocab_size() == 400
    assert load_file(run / "best.safetensors")["embedding.W_e"].shape == (400, 16)


def test_a_new_tokenizer_is_trained_on_the_training_split_alone():
    for split, word in (("train", "common"), ("validation", "valid"), ("test", "tested")):
        rows = [(f"{word} {word} {i}", str(i % 2)) for i in range(60)]
        write_files({f"d/{split}.csv": csv_bytes(rows)})
    run_quietly(*TINY, "--dataset", "d", "--run-dir", "r", "--max-steps", 1)
    vocab = Tokenizer.from_file("r/tokenizer.json").get_vocab()
    assert "\u0120common" in vocab
    assert not any("alid" in token or "est" in token for token in vocab)


def test_a_given_tokenizer_is_the_one_of_the_run(slice_of_reviews):
    vocab = {w: i for i, w in enumerate(["the", "film", "[UNK]", "[PAD]", "[CLS]", "[SEP]"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save("own.json")
    argv = [a for a in TINY if a not in ("--vocab-size", "400")]
    argv += ["--dataset", str(slice_of_reviews), "--run-dir", "r", "--tokenizer", "own.json"]
    out = run_quietly(*argv, "--max-steps", 1)
    assert "tokenizer of 6 tokens" in out
    assert Tokenizer.from_file("r/tokenizer.json").get_vocab() == vocab
    Path("own.json").unlink()
    run_quietly("--run-dir", "r", "--test-only")
