# ruff: noqa: SIM905, a command line reads better in one piece
"""The command line: whole runs, their folders, and what a user is told when something is wrong."""

import csv
import gzip
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict, fields
from pathlib import Path

import datasets
import huggingface_hub
import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import main
import procedures
import settings
from comp_utils import RunFailed
from data import ASSETS
from models import SIZES, ModelConfig
from run_folder import RunFolder

PROJECT = Path(main.__file__).parent
TINY = (
    "--device cpu --n-layers 1 --d-model 16 --d-ff 16 --n-heads 2 --epochs 2 --vocab-size 400 "
    "--batch-size 32 --lr 1e-3 --warmup-steps 200 --schedule linear --average-checkpoints 1"
).split()
N_TRAIN = 150
RUN_FILES = {
    "config.json",
    "tokenizer.json",
    "metrics.jsonl",
    "best.safetensors",
    "curves.png",
    "confusion.png",
    "last.pt",
    "previous.pt",
    ".lock",
}


def csv_bytes(rows) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows([("text", "label"), *rows])
    return out.getvalue().encode()


def numbered(n: int) -> list[tuple[str, str]]:
    return [(f"good film {i}", str(i % 2)) for i in range(n)]


def write_files(files: dict[str, bytes]) -> None:
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


def run_quietly(*argv) -> str:
    """Standard output of a run that must succeed."""
    with redirect_stdout(io.StringIO()) as out:
        assert main.main([*map(str, argv)]) == 0
    return out.getvalue()


def events(run: Path | str, kind: str) -> list[dict]:
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def without_times(run: Path | str) -> list[dict]:
    clock = {"seconds", "tokens_per_second"}
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def losses(run: Path | str) -> list[float]:
    return [event["loss"] for event in events(run, "step")]


@pytest.fixture(scope="module")
def slice_of_reviews(tmp_path_factory) -> Path:
    """A folder with the first embedded reviews as train.csv, validation.csv and test.csv."""
    folder = tmp_path_factory.mktemp("data") / "reviews"
    folder.mkdir()
    for split, n in (("train", N_TRAIN), ("validation", 40), ("test", 40)):
        with gzip.open(ASSETS / "rotten_tomatoes" / f"{split}.tsv.gz", "rt", encoding="utf-8") as f:
            rows = [line.rstrip("\n").split("\t") for line in f][1 : n + 1]
        (folder / f"{split}.csv").write_bytes(csv_bytes(rows))
    return folder


@pytest.fixture(scope="module")
def finished(slice_of_reviews, tmp_path_factory) -> tuple[Path, list[str], str]:
    """One run on the slice: its folder, its command line, what it printed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--run-dir", str(run)]
    return run, argv, run_quietly(*argv)


@pytest.fixture
def run_copy(finished) -> Path:
    """The run, to be used or spoilt."""
    return Path(shutil.copytree(finished[0], "copy"))


@pytest.fixture
def train(slice_of_reviews):
    """Trains on the slice with further options; gives the run folder."""

    def train_with(name: str, *options) -> Path:
        run_quietly(*TINY, "--dataset", slice_of_reviews, "--run-dir", name, *options)
        return Path(name)

    return train_with


# -------------------------------------------------------------------------------------- a whole run


def test_a_run_leaves_its_folder_and_nothing_else(finished):
    run, _, out = finished
    assert {path.name for path in run.iterdir()} == RUN_FILES
    assert str(run) in out


def test_without_run_dir_the_folder_is_under_runs(slice_of_reviews):
    run_quietly(*TINY, "--dataset", slice_of_reviews, "--max-steps", "1")
    (run,) = Path("runs", slice_of_reviews.name).iterdir()
    assert {path.name for path in run.iterdir()} == RUN_FILES
    assert [path.name for path in Path().iterdir()] == ["runs"]


def test_config_json_holds_every_option_as_resolved(finished):
    run, argv, _ = finished
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert config["options"] == vars(settings.resolve(settings.parse_args(argv)[0]))
    assert config["options"].keys() == settings.option_fields().keys()
    assert config["classes"] == ["negative", "positive"]
    facts = {"torch", "python", "device_name", "processes", "threads"}
    assert (facts | {"plan_fingerprint", "data_fingerprint"}) <= config.keys()
    weights = load_file(run / "best.safetensors")
    assert config["parameters"] == sum(tensor.numel() for tensor in weights.values())


def test_metrics_have_one_step_event_for_each_update(finished):
    run, _, out = finished
    steps, epochs = events(run, "step"), events(run, "epoch")
    n_updates = math.ceil(N_TRAIN / 32)
    assert [event["step"] for event in steps] == list(range(1, 2 * n_updates + 1))
    assert [event["epoch"] for event in steps] == [1] * n_updates + [2] * n_updates
    assert all(
        event.keys() == {"event", "step", "epoch", "loss", "lr", "tokens_per_second"}
        and math.isfinite(event["loss"])
        and event["tokens_per_second"] > 0
        for event in steps
    )
    assert [event["lr"] for event in steps] == pytest.approx(
        [1e-3 * step / 200 for step in range(1, 2 * n_updates + 1)]
    )
    assert [event["epoch"] for event in epochs] == [1, 2]
    keys = {"seconds", "tokens", "padding_share", "train_loss", "validation_loss"}
    assert all(keys | {"validation_accuracy"} <= event.keys() for event in epochs)
    (test,) = events(run, "test")
    assert 0 <= test["accuracy"] <= 1 and 0 <= test["macro_f1"] <= 1 and test["sentences"] == 40
    assert f"accuracy {test['accuracy']:.2%}, " in out


def test_the_folder_keeps_the_weights_of_the_best_validation(finished, run_copy):
    best = max(event["validation_accuracy"] for event in events(run_copy, "epoch"))
    validation = Path(json.loads((run_copy / "config.json").read_text())["options"]["dataset"])
    write_files({"d/test.csv": (validation / "validation.csv").read_bytes()})
    run_quietly("--run-dir", run_copy, "--test-only", "--dataset", "d")
    assert events(run_copy, "test")[-1]["accuracy"] == best


def test_the_epoch_of_the_best_validation_is_kept_and_tested(train, monkeypatch):
    constant = ("--schedule", "constant", "--lr", "1e-2", "--warmup-steps", 1)
    first = train("first", *constant, "--epochs", 1)
    half_right = (0.5, np.ones((2, 2), int))
    worse = iter([half_right, (1.0, np.diag([9, 9])), half_right, half_right])  # first: rehearsal
    monkeypatch.setattr(
        procedures, "evaluate", lambda *args, **kwargs: procedures.Evaluation(1.0, *next(worse))
    )
    run = train("run", *constant, "--epochs", 3)
    weights = "best.safetensors"
    assert (run / weights).read_bytes() == (first / weights).read_bytes()
    (kept,), (only,) = events(run, "test"), events(first, "test")
    assert kept == only | {"step": 15}


@pytest.mark.parametrize("name", ["curves.png", "confusion.png"])
def test_figures_are_images_with_something_on_them(name, finished):
    pixels = matplotlib.image.imread(finished[0] / name)
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.05


def test_test_only_gives_the_same_numbers(finished, run_copy, capsys):
    run_before = {p.name: p.read_bytes() for p in run_copy.iterdir()}
    assert main.main(["--run-dir", str(run_copy), "--test-only"]) == 0
    first, again = events(run_copy, "test")
    assert again | {"step": first["step"]} == first
    line = next(line for line in finished[2].splitlines() if line.startswith("test of "))
    assert line in capsys.readouterr().out
    for name in ("config.json", "tokenizer.json", "best.safetensors"):
        assert (run_copy / name).read_bytes() == run_before[name]


# --------------------------------------------------------------------------------------- predicting

SENTENCES = [
    "a wonderful , moving film",
    "dull .",
    "",
    "an hour and a half of \u00e9lan",
    "   ",
    "good " * 300,
    "<pad> </s>",
]


def answers(out: str) -> list[tuple[str, float] | None]:
    lines = out.splitlines()
    return [(x.split("\t")[0], float(x.split("\t")[1])) if x else None for x in lines]


def same_answer(a: tuple[str, float], b: tuple[str, float]) -> bool:
    """Whether two answers differ by rounding alone, as batches of another shape may make them."""
    return a[0] == b[0] and abs(a[1] - b[1]) < 2e-4


def test_predict_answers_each_line_in_order_whatever_the_batch_size(run_copy, capsys):
    write_files({"in.txt": "\n".join(SENTENCES).encode()})
    argv = ["--run-dir", str(run_copy), "--predict", "in.txt"]
    assert main.main(argv) == 0
    out, err = capsys.readouterr()
    together = answers(out)
    assert [answer is None for answer in together] == [not text.strip() for text in SENTENCES]
    given = [answer for answer in together if answer]
    assert all(label in ("negative", "positive") and 0.5 <= p <= 1 for label, p in given)
    assert len({p for _, p in given}) > 1
    assert "blank lines: 2" in err and "lines cut to 256 tokens: 1" in err

    assert main.main([*argv, "--batch-size", "1"]) == 0
    alone = answers(capsys.readouterr().out)
    for one, many in zip(alone, together, strict=True):
        assert one == many or same_answer(one, many)

    write_files({"back.txt": "\r\n".join(SENTENCES[::-1]).encode()})
    assert main.main([*argv[:-1], "back.txt"]) == 0
    for back, forth in zip(answers(capsys.readouterr().out), together[::-1], strict=True):
        assert back == forth or same_answer(back, forth)


def test_predicting_needs_the_run_folder_alone_and_reads_standard_input(tmp_path, capsys):
    write_files({"data/train.csv": csv_bytes(numbered(100)), "in.txt": b"good film 1\n\nfilm\n"})
    run_quietly(*TINY, "--dataset", "data", "--run-dir", "run", "--max-steps", 2)
    shutil.rmtree("data")
    Path("elsewhere").mkdir()
    moved = shutil.move("run", "elsewhere/moved")
    capsys.readouterr()
    assert main.main(["--run-dir", moved, "--predict", "in.txt"]) == 0
    from_file = capsys.readouterr()
    piped = subprocess.run(
        [sys.executable, str(PROJECT / "main.py"), "--run-dir", moved, "--predict", "-"],
        input=b"good film 1\n\nfilm\n",
        capture_output=True,
        timeout=60,
    )
    assert piped.returncode == 0
    assert piped.stdout.decode() == from_file.out
    assert piped.stderr.decode() == from_file.err
    assert from_file.out.count("\n") == 3 and "blank lines: 1" in from_file.err


def test_predict_of_an_empty_file_answers_nothing(run_copy, capsys):
    write_files({"in.txt": b""})
    assert main.main(["--run-dir", str(run_copy), "--predict", "in.txt"]) == 0
    assert capsys.readouterr() == ("", "")


def test_predict_says_that_a_table_is_answered_line_by_line(run_copy, capsys):
    table = csv_bytes([("a wonderful film", "1"), ("dull", "0")])
    write_files({"in.csv": table, "in.txt": table})
    said = []
    for name in ("in.txt", "in.csv"):
        assert main.main(["--run-dir", str(run_copy), "--predict", name]) == 0
        said.append(capsys.readouterr())
    text, table = said
    assert text.out == table.out and text.out.count("\n") == 3
    assert text.err == "" and table.err.startswith("warning: in.csv: each line is answered")


# ---------------------------------------------------------------------------------- reproducibility


def test_one_seed_gives_one_run_and_another_seed_another(finished, train):
    first, again = finished[0], train("again")
    assert without_times(again) == without_times(first)
    weights = "best.safetensors"
    assert (again / weights).read_bytes() == (first / weights).read_bytes()
    other = train("other", "--seed", 1)
    assert losses(other) != losses(first)
    assert (other / weights).read_bytes() != (first / weights).read_bytes()


def test_workers_change_nothing(finished, train):
    assert without_times(train("w", "--num-workers", 1)) == without_times(finished[0])


def test_overwrite_leaves_nothing_of_the_run_before(finished, train):
    run = train("run", "--seed", 1)
    assert without_times(train(run, "--overwrite")) == without_times(finished[0])


# ------------------------------------------------------------------------------------------ options


def test_a_word_that_decides_is_learnt():
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
    labels = [a[0] for a in answers(run_quietly("--run-dir", "r", "--predict", "in.txt"))]
    assert labels == ["no", "yes"]


def test_accumulating_halves_the_updates(train):
    plain = train("plain", "--batch-size", 8)
    run = train("accumulated", "--batch-size", 8, "--accumulate", 2)
    n_batches = math.ceil(N_TRAIN / 8)
    assert len(events(plain, "step")) == 2 * n_batches
    assert len(events(run, "step")) == 2 * math.ceil(n_batches / 2)
    assert events(run, "epoch")[0]["tokens"] == events(plain, "epoch")[0]["tokens"]


@pytest.mark.parametrize("max_steps, epochs", [(5, 1), (7, 2)])
def test_max_steps_stops_there(max_steps, epochs, train):
    run = train("r", "--max-steps", max_steps)
    assert len(events(run, "step")) == max_steps
    assert len(events(run, "epoch")) == epochs
    assert len(events(run, "test")) == 1


def test_patience_stops_a_run_that_gets_no_better(train):
    run = train("r", "--patience", 2, "--epochs", 9, "--lr", "1e-30")
    assert len(events(run, "epoch")) == 1 + 2


def test_average_checkpoints_saves_the_mean_of_the_last_epochs(train, monkeypatch):
    averaged, average = [], procedures.average
    monkeypatch.setattr(
        procedures, "average", lambda dicts: averaged.append(list(dicts)) or average(averaged[-1])
    )
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


def test_bfloat16_runs_on_the_cpu(finished, train):
    run = train("r", "--precision", "bf16")
    assert losses(run) != losses(finished[0])
    assert losses(run)[:3] == pytest.approx(losses(finished[0])[:3], rel=0.05)
    assert {t.dtype for t in load_file(run / "best.safetensors").values()} == {torch.float32}


def test_three_classes_with_numbers_for_labels(capsys):
    rows = [(f"w{i % 3} {i}", (10, 9, -1)[i % 3]) for i in range(150)]
    write_files({"made.csv": csv_bytes(rows)})
    run_quietly(*TINY, "--dataset", "made.csv", "--run-dir", "r", "--max-steps", 2)
    assert json.loads(Path("r/config.json").read_text())["classes"] == ["-1", "9", "10"]


def test_pad_to_changes_the_width_and_not_the_losses(train):
    exact = ("--dropout", 0, "--max-steps", 3, "--max-length", 100)
    narrow, wide = train("narrow", *exact), train("wide", *exact, "--pad-to", 200)
    assert losses(wide) == pytest.approx(losses(narrow), rel=1e-5)
    assert events(narrow, "epoch")[0]["padding_share"] < 0.2
    assert events(wide, "epoch")[0]["padding_share"] > 0.6


def test_ways_of_attention_agree(train):
    exact = ("--dropout", 0, "--max-steps", 4)
    ways = ("fused", "matmul", "list")
    fused, matmul, by_list = (losses(train(way, *exact, "--attention", way)) for way in ways)
    assert matmul == pytest.approx(fused, rel=1e-4)
    assert by_list == pytest.approx(fused, rel=1e-4)


@pytest.mark.parametrize("switch, same", [("--lowercase", True), ("--no-lowercase", False)])
def test_lowercase_and_vocab_size_make_the_tokenizer_of_the_run(switch, same, train):
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


# --------------------------------------------------------------------------------- the command line

CONFIGS = [config for group in settings.GROUPS.values() for config in group]
FLAGS = ["--" + f.name.replace("_", "-") for config in CONFIGS for f in fields(config)]


def test_help_mentions_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--help"])
    assert stop.value.code == 0
    words = capsys.readouterr().out.replace(",", " ").split()
    assert set(FLAGS) <= set(words)
    assert len(FLAGS) == len(set(FLAGS)) > 35


@pytest.mark.parametrize("flag", FLAGS)
def test_every_field_of_the_settings_is_a_flag(flag):
    name = flag[2:].replace("-", "_")
    field = settings.option_fields()[name]
    kind, limits = settings.kind_of(field), field.metadata
    fits = {bool: True, int: limits.get("low"), float: 0.5, str: limits.get("choices", ["a"])[-1]}
    fits[tuple] = ("a", "b")
    values = [] if kind is bool else fits[tuple] if kind is tuple else [str(fits[kind])]
    argv = [flag, *values]
    assert settings.parse_args(argv) == ({name: fits[kind]}, [])


def test_without_options_the_recipe_holds():
    options = vars(settings.resolve({}))
    assert options.keys() == settings.option_fields().keys()
    recipe = settings.RECIPES["rotten_tomatoes"]
    assert options.items() >= recipe.items()
    size = {k: v for k, v in asdict(SIZES[recipe["model"]]).items() if k not in recipe}
    assert options.items() >= size.items()


def test_an_option_given_wins_over_recipe_and_size():
    given = {"lr": 0.5, "dropout": 0.25, "n_heads": 2, "lowercase": False, "batch_tokens": 999}
    options = vars(settings.resolve(given))
    assert options.items() >= given.items()
    assert options["batch_size"] is None


def test_a_named_size_is_taken_whole():
    options = settings.resolve({"model": "base"})
    assert settings.part(ModelConfig, options) == ModelConfig() == SIZES["base"]
    assert options.lr == settings.RECIPES["rotten_tomatoes"]["lr"]
    assert settings.resolve({"model": "big", "d_ff": 7}).d_ff == 7


def test_other_data_start_from_the_recipe_of_their_task():
    ours, own = vars(settings.resolve({"dataset": "my.csv"})), vars(settings.resolve({}))
    assert {k for k in own if own[k] != ours[k]} == {"dataset"}


def test_without_a_recipe_the_learning_rate_is_the_papers(monkeypatch):
    monkeypatch.setitem(
        settings.RECIPES, "rotten_tomatoes", {"warmup_steps": 4000, "model": "base"}
    )
    assert settings.resolve({}).lr == pytest.approx(512**-0.5 * 4000**-0.5)


# ---------------------------------------------------------------------------------- what is refused


def tree() -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in Path().rglob("*")}


def refuse(argv, capsys, n_lines: int = 1, status: int = 2) -> list[str]:
    """The lines of a refusal, which must be short and change nothing."""
    before = tree()
    assert main.main([*map(str, argv)]) == status
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert all(line.startswith("error: ") for line in lines), err
    assert len(lines) == n_lines, err
    assert out == ""
    assert tree() == before
    return lines


def refuse_with(argv, words, capsys) -> None:
    (line,) = refuse(argv, capsys)
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"


NUMBERS = [
    "--" + f.name.replace("_", "-")
    for config in CONFIGS
    for f in fields(config)
    if settings.kind_of(f) in (int, float)
]
MAY_BE_ZERO = {
    "--seed",
    "--pad-to",
    "--num-workers",
    "--dropout",
    "--label-smoothing",
    "--weight-decay",
    "--length-penalty",
    "--r-drop",
}


@pytest.mark.parametrize("flag", NUMBERS)
def test_numbers_out_of_range_or_none_are_refused(flag, capsys):
    for value in ("-1", "nan", "many", "", "1e", *(["0"] if flag not in MAY_BE_ZERO else [])):
        for argv in ([flag, value], [f"{flag}={value}"]):
            (line,) = refuse(argv, capsys)
            assert line.startswith(f"error: {flag} {value}") and ": give " in line


@pytest.mark.parametrize("flag", sorted(MAY_BE_ZERO))
def test_zero_is_taken_where_it_means_something(flag):
    given, problems = settings.parse_args([flag, "0"])
    assert settings.check(settings.resolve(given), {}, problems) == []


CHOICES = [
    (f"--{f.name}", f.metadata["choices"])
    for config in CONFIGS
    for f in fields(config)
    if "choices" in f.metadata
]


@pytest.mark.parametrize("flag, choices", CHOICES)
def test_a_choice_that_is_none_names_the_choices(flag, choices, capsys):
    refuse_with([flag, "nosuch"], [f"{flag} nosuch: give", *choices], capsys)


FEW = {"few.csv": csv_bytes(numbered(60))}
RUN_BEGUN = {"run/config.json": b"{}"}
OTHER_FILES = {"mine/thesis.txt": b"years of work"}

# name: (files, command line, words of the one line)
OPTIONS_REFUSED = {
    "dropout 1": ({}, "--dropout 1", ["--dropout 1", "below 1"]),
    "smoothing 1": ({}, "--label-smoothing 1", ["--label-smoothing 1", "below 1"]),
    "vocab size 100": ({}, "--train-tokenizer --vocab-size 100", ["--vocab-size 100", "260"]),
    "heads do not divide": (
        {},
        "--d-model 130 --n-heads 4",
        ["--d-model 130", "--n-heads 4", "--d-attn", "--d-mid"],
    ),
    "odd size": ({}, "--d-model 129 --n-heads 3", ["--d-model 129", "odd", "--positions learned"]),
    "two tokenizers": (
        {},
        "--tokenizer t.json --train-tokenizer",
        ["--tokenizer t.json", "--train-tokenizer", "one of the two"],
    ),
    "two budgets": (
        {},
        "--batch-size 8 --batch-tokens 999",
        ["--batch-size 8", "--batch-tokens 999", "one of the two"],
    ),
    "budget below a sentence": (
        {},
        "--batch-tokens 255",
        ["--batch-tokens 255", "256", "smaller --max-length"],
    ),
    "padding below a sentence": (
        {},
        "--pad-to 20 --max-length 21",
        ["--pad-to 20", "21", "smaller --max-length"],
    ),
    "fp16 on the CPU": ({}, "--device cpu --precision fp16", ["--precision fp16", "cpu", "bf16"]),
    "overwrite what": ({}, "--overwrite", ["--overwrite", "--run-dir"]),
    "a run is there": (
        RUN_BEGUN,
        "--run-dir run",
        ["--run-dir run", "holds a run", "--overwrite"],
    ),
    "a file is there": ({"run": b"text"}, "--run-dir run", ["--run-dir run", "a file", "folder"]),
    "other files are there": (OTHER_FILES, "--run-dir mine", ["--run-dir mine", "other files"]),
    "other files, overwriting": (
        OTHER_FILES,
        "--run-dir mine --overwrite",
        ["--run-dir mine", "other files"],
    ),
    "a file, overwriting": ({"run": b"text"}, "--run-dir run --overwrite", ["--run-dir run"]),
    "misspelt": ({}, "--bach-size=3", ["--bach-size", "did you mean --batch-size?"]),
    "abbreviated": ({}, "--weight=3", ["--weight", "did you mean --weight-decay?"]),
    "underscores": ({}, "--d_model=3", ["--d_model", "did you mean --d-model?"]),
    "nothing like it": ({}, "--xyz", ["--xyz", "--help"]),
    "no option": ({}, "reviews.csv", ["reviews.csv", "--help"]),
    "value missing": ({}, "--lr", ["--lr"]),
    "run-dir below a file": (
        FEW,
        "--dataset few.csv --run-dir few.csv/run",
        ["--run-dir few.csv/run"],
    ),
    "misspelt, with its value behind it": (
        {},
        "--bach-size 3",
        ["--bach-size", "did you mean --batch-size?"],
    ),
    "seed too large": (
        FEW,
        f"--dataset few.csv --seed {10**20}",
        [f"--seed {10**20}"],
    ),
    "vocab-size for the embedded tokenizer": pytest.param(
        {},
        "--vocab-size 4000",
        ["--vocab-size", "--train-tokenizer"],
        marks=[]
        if (ASSETS / "rotten_tomatoes/tokenizer.json").exists()
        else pytest.mark.skip("the embedded reviews have no tokenizer beside them"),
    ),
}


def as_params(cases: dict) -> list:
    return [
        pytest.param(*case.values, marks=case.marks, id=name)
        if isinstance(case, type(pytest.param()))
        else pytest.param(*case, id=name)
        for name, case in cases.items()
    ]


@pytest.mark.parametrize("files, argv, words", as_params(OPTIONS_REFUSED))
def test_options_that_cannot_work_are_refused(files, argv, words, capsys):
    write_files(files)
    refuse_with(argv.split(), words, capsys)


def test_a_device_that_is_not_there_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for kind in ("cuda", "mps"):
        refuse_with(["--device", kind], [f"--device {kind}", "has cpu", "auto"], capsys)


def test_all_problems_are_told_at_once(capsys):
    write_files(OTHER_FILES)
    argv = "--epochs 0 --dropout 1 --schedule steep --run-dir mine --device cpu --precision fp16"
    lines = refuse(argv.split(), capsys, n_lines=5)
    for word in ("--epochs 0", "--dropout 1", "--schedule steep", "--run-dir mine", "fp16"):
        assert sum(word in line for line in lines) == 1
    lines = refuse(["--nope", "--epochs", "x", "--lr", "y"], capsys, n_lines=3)


@pytest.mark.parametrize(
    "argv",
    ["--nope --epochs x --dropout 1", "--dropout 1 --d-model 129 --n-heads 3 --pad-to 3"],
)
def test_problems_of_several_kinds_are_told_at_once(argv, capsys):
    refuse(argv.split(), capsys, n_lines=3)


def parquet(cut: int = 0) -> bytes:
    out = io.BytesIO()
    datasets.Dataset.from_dict({"text": ["a"] * 60, "label": [0, 1] * 30}).to_parquet(out)
    return out.getvalue()[: -cut or None]


def folder(train: bytes = b"", test: bytes = b"", ending: str = "csv") -> dict[str, bytes]:
    some = csv_bytes(numbered(20))
    files = {"d/validation.csv": some}
    return {**files, f"d/train.{ending}": train or some, "d/test.csv": test or some}


SOME = csv_bytes(numbered(60))
DATA_REFUSED = {
    "unknown name": ({}, "no such data", ["--dataset no such data", "rotten_tomatoes"]),
    "missing file": ({}, "./missing.csv", ["--dataset ./missing.csv", "rotten_tomatoes"]),
    "another kind of file": ({"d.txt": SOME}, "d.txt", ["--dataset d.txt", ".csv", ".parquet"]),
    "folder without data": ({"d/x.txt": b""}, "d", ["--dataset d", ".csv", "add one"]),
    "file of a Hub's name": ({}, "missing.csv", ["missing.csv", "no such file"]),
    "semicolons": (
        {"d.csv": SOME.replace(b",", b";")},
        "d.csv",
        ["d.csv", "only text;label", "commas"],
    ),
    "name almost right": ({}, "rotten-tomatoes", ["did you mean rotten_tomatoes?"]),
    "folder without training": (
        {"d/test.csv": SOME},
        "d",
        ["--dataset d", "only test", "no training split"],
    ),
    "no such column": (
        {"d.csv": SOME.replace(b"text,label", b"review,stars")},
        "d.csv",
        ["d.csv", "no column text", "review, stars", "--source-column"],
    ),
    "no such label column": (
        {"d.csv": SOME.replace(b"label", b"stars")},
        "d.csv",
        ["d.csv", "no column label", "text, stars", "--target-column"],
    ),
    "one class": (
        {"d.csv": csv_bytes([(f"t {i}", "good") for i in range(60)])},
        "d.csv",
        ["--target-column", "good", "two classes"],
    ),
    "no classes": (
        {"d.csv": csv_bytes([(f"t {i}", i) for i in range(300)])},
        "d.csv",
        ["--target-column", "labels in", "name a column of classes"],
    ),
    "not UTF-8": (
        {"d.csv": SOME + b"caf\xe9,1\n"},
        "d.csv",
        ["d.csv, line 62, byte 4", "UTF-8"],
    ),
    "not UTF-8, zipped": (
        {"d.tsv.gz": gzip.compress(b"text\tlabel\na\t1\n\xff\t0\n")},
        "d.tsv.gz",
        ["d.tsv.gz, line 3, byte 1", "UTF-8"],
    ),
    "too many fields": (
        {"d.csv": SOME + b"a,b,1\n"},
        "d.csv",
        ["d.csv, line 62", "3 fields", "2", "mend"],
    ),
    "too few fields": ({"d.csv": SOME + b"a\n"}, "d.csv", ["d.csv, line 62", "1 fields"]),
    "broken quotes": (
        {"d.csv": SOME + b'"a" b,1\n'},
        "d.csv",
        ["d.csv, line 62", "csv", "mend"],
    ),
    "open quote": ({"d.csv": SOME + b'"a,1\n'}, "d.csv", ["d.csv, line 62", "csv"]),
    "broken JSON": (
        {"d.jsonl": b'{"text": "a", "label": 1}\n{"text": "a", "label"\n'},
        "d.jsonl",
        ["d.jsonl, line 2", "not JSON", "mend"],
    ),
    "JSON without names": (
        {"d.jsonl": b'{"text": "a", "label": 1}\n["a", 1]\n'},
        "d.jsonl",
        ["d.jsonl, line 2", "not an object"],
    ),
    "half a surrogate pair": (
        {"d.jsonl": b'{"text": "a\\ud800", "label": 1}\n'},
        "d.jsonl",
        ["d.jsonl, line 1", "surrogate"],
    ),
    "no parquet": ({"d.parquet": SOME}, "d.parquet", ["d.parquet", "parquet", "again"]),
    "cut parquet": ({"d.parquet": parquet(cut=20)}, "d.parquet", ["d.parquet", "again"]),
    "cut gzip": (
        {"d.csv.gz": gzip.compress(SOME)[:-20]},
        "d.csv.gz",
        ["d.csv.gz", "gzip", "again"],
    ),
    "empty file": ({"d.csv": b""}, "d.csv", ["d.csv", "no rows"]),
    "header alone": ({"d.csv": b"text,label\n"}, "d.csv", ["d.csv", "no rows"]),
    "empty training split": (folder(train=b"\n"), "d", ["train.csv", "no rows"]),
    "empty test split": (folder(test=b"text,label\n"), "d", ["test.csv", "no rows"]),
    "empty label": (
        {"d.csv": SOME + b"a,\n"},
        "d.csv",
        ["d.csv, line 62", "label is empty", "drop the row"],
    ),
    "absent label": (
        {"d.jsonl": b'{"text": "a", "label": null}\n'},
        "d.jsonl",
        ["d.jsonl, line 1", "label is empty"],
    ),
    "label that training never saw": (
        folder(test=csv_bytes([("a", "maybe")])),
        "d",
        ["maybe", "test split", "0, 1"],
    ),
    "too few rows": ({"d.csv": csv_bytes(numbered(2))}, "d.csv", ["no sentence of 2", "give more"]),
    "JSON nested without end": (
        {"d.jsonl": b"[" * 100_000},
        "d.jsonl",
        ["d.jsonl, line 1", "not JSON"],
    ),
}


@pytest.mark.parametrize("files, dataset, words", as_params(DATA_REFUSED))
def test_data_that_cannot_work_are_refused(files, dataset, words, capsys):
    write_files(files)
    refuse_with([*TINY, "--dataset", dataset], words, capsys)


TOKENIZERS_REFUSED = {
    "no tokenizer": b'{"a": 1}',
    "no JSON": b"hello",
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", TOKENIZERS_REFUSED.values(), ids=TOKENIZERS_REFUSED.keys())
def test_a_file_that_is_no_tokenizer_is_refused(content, capsys):
    write_files({**FEW, "t.json": content})
    argv = ["--dataset", "few.csv", "--tokenizer", "t.json"]
    refuse_with(argv, ["--tokenizer t.json", "tokenizer.json", "--train-tokenizer"], capsys)


def test_a_tokenizer_that_is_not_there_is_refused(capsys):
    write_files(FEW)
    argv = ["--dataset", "few.csv", "--tokenizer", "missing/t.json"]
    refuse_with(argv, ["--tokenizer missing/t.json", "--train-tokenizer"], capsys)


@pytest.fixture
def no_network(monkeypatch):
    """A machine that resolves no name, and a library that has not been told so."""

    def unreachable(*args, **kwargs):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def test_a_hub_id_without_a_network_names_the_command_that_fetches_it(capsys, no_network):
    began = time.perf_counter()
    command = "hf download --repo-type dataset someone/reviews"
    refuse_with(["--dataset", "someone/reviews"], ["--dataset someone/reviews", command], capsys)
    assert time.perf_counter() - began < 10


# ---------------------------------------------------------------------- what is refused of old runs

USE_REFUSED = {
    "predict with what": ("--predict in.txt", ["--run-dir"]),
    "test what": ("--test-only", ["--run-dir"]),
    "no run": ("--predict in.txt --run-dir mine", ["--run-dir mine", "config.json"]),
    "no folder": ("--predict in.txt --run-dir nowhere", ["--run-dir nowhere", "config.json"]),
    "missing file": ("--predict nowhere.txt --run-dir copy", ["nowhere.txt", "give a file"]),
    "a folder": ("--predict mine --run-dir copy", ["mine", "give a file"]),
    "not UTF-8": ("--predict latin.txt --run-dir copy", ["latin.txt, line 2, byte 4", "UTF-8"]),
    "both": ("--predict in.txt --test-only --run-dir copy", ["--predict", "give one of them"]),
    "another model": (
        "--test-only --d-model 32 --run-dir copy",
        ["--d-model 32", "settled by the run", "leave it out"],
    ),
    "another seed": ("--predict in.txt --seed 1 --run-dir copy", ["--seed 1", "leave it out"]),
    "other data": (
        "--predict in.txt --dataset few.csv --run-dir copy",
        ["--dataset few.csv", "leave it out"],
    ),
    "unknown label": (
        "--test-only --dataset few.csv --run-dir copy",
        ["of the test split", "the model knows only negative"],
    ),
    "batch size": ("--predict in.txt --batch-size 0 --run-dir copy", ["--batch-size 0"]),
}


@pytest.mark.parametrize("argv, words", USE_REFUSED.values(), ids=USE_REFUSED.keys())
def test_a_use_that_cannot_work_is_refused(argv, words, run_copy, capsys):
    write_files({**OTHER_FILES, **FEW, "in.txt": b"good\n", "latin.txt": b"good\ncaf\xe9\n"})
    refuse_with(argv.split(), words, capsys)


def without(name):
    return lambda config: config["options"].pop(name)


def changed(name, value):
    return lambda config: config["options"].update({name: value})


CONFIGS_REFUSED = {
    "option missing": (without("d_model"), ["d_model"]),
    "option unknown": (changed("d_modle", 3), ["d_modle"]),
    "text for a number": (changed("d_model", "16"), ["d_model"]),
    "number for a switch": (changed("compile", 1), ["compile"]),
    "switch for a number": (changed("n_layers", True), ["n_layers"]),
    "nothing for a number": (changed("n_heads", None), ["n_heads"]),
    "fraction": (changed("n_heads", 2.5), ["n_heads"]),
    "out of range": (changed("n_heads", 0), ["n_heads"]),
    "no options": (lambda config: config.pop("options"), ["options"]),
    "no classes": (lambda config: config.pop("classes"), ["classes"]),
    "classes in one word": (lambda config: config.update(classes="ab"), ["classes"]),
    "too few classes": (lambda config: config.update(classes=["a"]), ["best.safetensors"]),
    "other width": (changed("d_model", 32), ["best.safetensors", "not the weights"]),
    "other depth": (changed("n_layers", 2), ["best.safetensors", "not the weights"]),
}


@pytest.mark.parametrize("use", ["--test-only", "--predict=in.txt"])
@pytest.mark.parametrize("change, words", CONFIGS_REFUSED.values(), ids=CONFIGS_REFUSED.keys())
def test_a_run_whose_config_does_not_fit_is_refused(change, words, use, run_copy, capsys):
    write_files({"in.txt": b"good\n"})
    config = json.loads((run_copy / "config.json").read_text())
    change(config)
    config["checksum"] = RunFolder._config_checksum(config)
    (run_copy / "config.json").write_text(json.dumps(config))
    refuse_with(["--run-dir", "copy", use], words, capsys)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_one_weight(path: Path) -> None:
    weights = load_file(path)
    del weights[sorted(weights)[0]]
    save_file(weights, path)


FILES_REFUSED = {
    "config cut": ("config.json", cut_in_half),
    "config of another program": ("config.json", lambda path: path.write_text("[1, 2]")),
    "config empty": ("config.json", lambda path: path.write_text("")),
    "config not UTF-8": ("config.json", lambda path: path.write_bytes(b"\xff")),
    "config missing": ("config.json", Path.unlink),
    "weights cut": ("best.safetensors", cut_in_half),
    "weights empty": ("best.safetensors", lambda path: path.write_bytes(b"")),
    "weights of another kind": ("best.safetensors", lambda path: torch.save({}, path)),
    "one weight missing": ("best.safetensors", without_one_weight),
    "weights missing": ("best.safetensors", Path.unlink),
    "tokenizer cut": ("tokenizer.json", cut_in_half),
    "tokenizer missing": ("tokenizer.json", Path.unlink),
}


@pytest.mark.parametrize("name, spoil", FILES_REFUSED.values(), ids=FILES_REFUSED.keys())
def test_a_run_with_a_broken_file_is_refused(name, spoil, run_copy, capsys):
    write_files({"in.txt": b"good\n"})
    spoil(run_copy / name)
    refuse_with(["--run-dir", "copy", "--predict", "in.txt"], ["copy", name], capsys)


# --------------------------------------------------------------------------- runs that come to harm


def test_a_loss_that_is_not_finite_ends_the_run_and_names_step_and_rate(slice_of_reviews, capsys):
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--run-dir", "r", "--lr", "4e30"]
    assert main.main([*argv, "--warmup-steps", "4"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    # The first update, at 1e30, has a finite loss and spoils the weights.
    assert line.startswith("error: step 2: the loss is nan at learning rate 2e+30; ")
    assert "--lr" in line and "--warmup-steps" in line
    assert [event["step"] for event in events("r", "step")] == [1]


def test_ctrl_c_in_training_ends_with_one_line(slice_of_reviews):
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--run-dir", "r", "--epochs", "100000"]
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "main.py"), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert any(line.startswith("epoch 2:") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    (line,) = err.strip().splitlines()
    assert line.startswith("stopped; update ")
    assert line.endswith(f"is kept; go on: python {PROJECT / 'main.py'} --resume --run-dir r")
    assert {path.name for path in Path("r").iterdir()} >= RUN_FILES - {"confusion.png"}
    run_quietly("--run-dir", "r", "--test-only")


@pytest.mark.parametrize(
    "error, status, words",
    [(KeyboardInterrupt(), 130, "stopped"), (RunFailed("full"), 1, "error: full")],
)
def test_a_run_that_ends_before_its_first_loss_says_why(
    error, status, words, slice_of_reviews, monkeypatch, capsys
):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(procedures, "train_step", fails)
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--run-dir", "r"]
    assert main.main(argv) == status
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(words)


def test_compile_without_a_compiler_says_so_in_one_line(slice_of_reviews):
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--run-dir", "r", "--compile"]
    process = subprocess.run(
        [sys.executable, str(PROJECT / "main.py"), *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": "cache"},
    )
    assert process.returncode == 1
    line = process.stderr.strip().splitlines()[-1]
    assert line.startswith("error: --compile: ") and "compiler" in line
    assert "Traceback" not in process.stderr


def test_a_run_too_short_for_its_warm_up_says_so_and_what_an_epoch_would_take(
    slice_of_reviews, capsys
):
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--run-dir", "r", "--max-steps", "2"]
    assert main.main(argv) == 0
    said = capsys.readouterr()
    assert "warning: 2 updates in all, and --warmup-steps 200" in said.err
    assert f"2 of the {math.ceil(N_TRAIN / 32)} updates of a training epoch" in said.out
    assert "one training epoch" not in said.out
    assert main.main([*argv[:-2], "--overwrite", "--warmup-steps", "3"]) == 0
    said = capsys.readouterr()
    assert "warning" not in said.err and "one training epoch: " in said.out
