"""Whole runs: what they leave, print and warn of, and how options change them."""

import json
import math
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from helpers import (
    N_TRAIN,
    PROJECT,
    TINY,
    WAIT_LIMIT,
    csv_bytes,
    events,
    losses,
    refuse_with,
    run_quietly,
    without_times,
    write_files,
)
from processes import Forked, run_main
from safetensors.torch import load_file

import jobs
import main
import prepare
import procedures
import reports
import settings
from checkpoints import TrainingState
from errors import RunFailed
from models import EncoderDecoder
from scoring import Evaluation, format_scores

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


# -------------------------------------------------------------------------------------- a whole run


def test_a_run_leaves_its_folder_and_nothing_else(finished):
    run, _, out = finished
    assert {path.name for path in run.iterdir()} == RUN_FILES
    assert str(run) in out


@pytest.mark.pictures
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


def test_metrics_have_an_event_for_each_step_epoch_and_test(finished):
    run, _, out = finished
    steps, epochs = events(run, "step"), events(run, "epoch")
    n_steps = math.ceil(N_TRAIN / 32)
    assert [event["step"] for event in steps] == list(range(1, 2 * n_steps + 1))
    assert [event["epoch"] for event in steps] == [1] * n_steps + [2] * n_steps
    assert all(
        event.keys() == {"event", "step", "epoch", "loss", "lr", "tokens_per_second"}
        and math.isfinite(event["loss"])
        and event["tokens_per_second"] > 0
        for event in steps
    )
    assert [event["lr"] for event in steps] == pytest.approx(
        [1e-3 * step / 200 for step in range(1, 2 * n_steps + 1)]
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


@pytest.mark.slow
def test_the_epoch_of_the_best_validation_is_kept_and_tested(train, monkeypatch):
    constant = ("--schedule", "constant", "--lr", "1e-2", "--warmup-steps", 1)
    first = train("first", *constant, "--epochs", 1)
    half_right = (0.5, np.ones((2, 2), int))
    worse = iter([half_right, (1.0, np.diag([9, 9])), half_right, half_right])  # first: warm-up
    monkeypatch.setattr(
        procedures, "evaluate_split", lambda *args, **kwargs: Evaluation(1.0, *next(worse))
    )
    run = train("run", *constant, "--epochs", 3)
    weights = "best.safetensors"
    assert (run / weights).read_bytes() == (first / weights).read_bytes()
    (kept,), (only,) = events(run, "test"), events(first, "test")
    assert kept == only | {"step": 15, "checksum": kept["checksum"]}


@pytest.mark.parametrize("name", ["curves.png", "confusion.png"])
def test_figures_are_images_with_something_on_them(name, finished):
    pixels = matplotlib.image.imread(finished[0] / name)
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.05


def test_test_only_gives_the_same_numbers(finished, run_copy, capsys):
    run_before = {p.name: p.read_bytes() for p in run_copy.iterdir()}
    assert main.main(["--run-dir", str(run_copy), "--test-only"]) == 0
    first, again = events(run_copy, "test")
    same = {"step": first["step"], "checksum": first["checksum"]}
    assert again | same == first
    line = next(line for line in finished[2].splitlines() if line.startswith("test of "))
    assert line in capsys.readouterr().out
    for name in ("config.json", "tokenizer.json", "best.safetensors"):
        assert (run_copy / name).read_bytes() == run_before[name]


# ---------------------------------------------------------------------------------- what is printed


def test_the_header_has_no_counts_of_zero(finished):
    header = finished[2].split("epoch 1")[0]
    assert re.search(r"train: 150 sentences, [\d,]+ tokens, \d+\.\d% padding\n", header)
    assert not re.search(r"\b0 \w", header)


@pytest.mark.parametrize("threads, words", [(1, ", 1 thread,"), (2, ", 2 threads,")])
def test_the_header_counts_threads(threads, words, capsys):
    data = SimpleNamespace(codec=SimpleNamespace(n_vocab=9), classes=None, rows={}, report=str)
    facts = dict.fromkeys(("device", "device_name", "torch", "plan_fingerprint"), "x")
    facts |= {"processes": 1, "threads": threads, "parameters": 1}
    options = settings.resolve({})
    job = jobs.Job(options, None, data.codec, data.classes, None, data, facts)
    prepare.say_facts(job, None)
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    "scores",
    [{"loss": 0.6931, "accuracy": 0.5}, {"loss": 7.25, "accuracy": 0.05, "bleu": 3.14159}],
    ids=["classification", "translation"],
)
def test_epoch_lines_align_and_fit_120_columns(scores):
    lines = [
        procedures.epoch_line(TrainingState(epoch=e, seconds=seconds, n_tokens=n), 100, 1.5, scores)
        for e, seconds, n in ((1, 0.04, 99), (9, 9.96, 12_345), (100, 7_200, 9_999_999_999))
    ]
    assert {len(f"{line}, best") for line in lines} <= set(range(121))
    for word in (" s,", "tokens/s;", "loss", "validation", "accuracy"):
        assert len({line.index(word) for line in lines}) == 1
    assert lines[0].endswith("BLEU  3.1" if "bleu" in scores else "accuracy 50.00%")


def test_bleu_has_one_decimal():
    scores = {"bleu": 27.3456, "chrf": 50.06, "signature": "nrefs:1"}
    assert format_scores(scores) == "BLEU 27.3, chrF 50.1"


@pytest.mark.slow
def test_a_translator_prints_its_signature_once_and_logs_it(finished_translator):
    run, _, out = finished_translator
    (test,) = events(run, "test")
    assert "tok:13a" in test["signature"] and "Unicode NFC" in test["signature"]
    assert out.count(test["signature"]) == 1 == out.count("tok:")
    line = next(line for line in out.splitlines() if line.startswith("test of "))
    assert f"BLEU {test['bleu']:4.1f}," in line
    epochs = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 2 and max(map(len, epochs)) <= 120
    assert len({line.index("validation") for line in epochs}) == 1


@pytest.mark.pictures
def test_scores_are_printed_and_logged_before_anything_is_drawn(
    slice_of_reviews, monkeypatch, capsys
):
    seen = []

    def fail(*args, **options):
        seen.append((capsys.readouterr().out, len(events("r", "test"))))
        raise OverflowError("too large to draw")

    monkeypatch.setattr(reports, "draw_confusion", fail)
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--run-dir", "r", "--epochs", "1"]
    assert main.main(argv) == 0
    ((out, n_tests),) = seen
    assert out.splitlines()[-1].startswith("test of 40 sentences: loss ") and n_tests == 1
    lines = "".join(capsys.readouterr()).splitlines()
    warnings = [line for line in lines if "confusion.png: cannot be drawn" in line]
    assert len(warnings) == 1 and "too large to draw" in warnings[0]
    assert {path.name for path in Path("r").iterdir()} == RUN_FILES - {"confusion.png"}


def test_an_epoch_is_saved_before_it_is_printed(finished, monkeypatch):
    def fail(*lines):
        raise OSError("the screen is gone")

    argv = [*finished[1][:-1], "run"]
    with monkeypatch.context() as patch:
        patch.setattr(procedures, "say", fail)
        assert main.main(argv) == 1
    state = torch.load("run/last.pt", weights_only=True)["state"]
    assert (state["epoch"], state["validated_step"]) == (2, state["step"])
    assert len(events("run", "epoch")) == 1
    run_quietly("--resume", "--run-dir", "run")
    assert without_times("run") == without_times(finished[0])


# ---------------------------------------------------------------------------------- reproducibility


@pytest.mark.slow
def test_one_seed_gives_one_run_and_another_seed_another(finished, train):
    first, again = finished[0], train("again")
    assert without_times(again) == without_times(first)
    weights = "best.safetensors"
    assert (again / weights).read_bytes() == (first / weights).read_bytes()
    other = train("other", "--seed", 1)
    assert losses(other) != losses(first)
    assert (other / weights).read_bytes() != (first / weights).read_bytes()


@pytest.mark.slow
def test_workers_change_nothing(finished, train):
    assert without_times(train("w", "--num-workers", 1)) == without_times(finished[0])


@pytest.mark.slow
def test_overwrite_leaves_nothing_of_the_earlier_run(finished, train):
    run = train("run", "--seed", 1)
    assert without_times(train(run, "--overwrite")) == without_times(finished[0])


# ----------------------------------------------------------------------------------- runs that fail


def test_a_loss_that_is_not_finite_ends_the_run_and_names_step_and_rate(slice_of_reviews, capsys):
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--run-dir", "r", "--lr", "4e30"]
    assert main.main([*argv, "--warmup-steps", "4"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    # The first step, at 1e30, has a finite loss and ruins the weights.
    assert line.startswith("error: step 2: the loss is nan at learning rate 2e+30; ")
    assert "--lr" in line and "--warmup-steps" in line
    assert [event["step"] for event in events("r", "step")] == [1]


@pytest.mark.slow
def test_ctrl_c_in_training_ends_with_one_line(slice_of_reviews):
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--run-dir", "r", "--epochs", "100000"]
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "main.py"), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert any(re.match("epoch +2:", line) for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT_LIMIT)
    finally:
        process.kill()
    assert process.returncode == 130
    (line,) = err.strip().splitlines()
    command = f"python {PROJECT / 'main.py'} --resume --run-dir r"
    assert re.fullmatch(r"stopped; step \d+ is saved; resume with: " + re.escape(command), line)
    assert {path.name for path in Path("r").iterdir()} >= RUN_FILES - {"confusion.png"}
    run_quietly("--run-dir", "r", "--test-only")


@pytest.mark.slow
def test_a_run_piped_to_head_trains_to_its_end(slice_of_reviews):
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--run-dir", "r"]
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "main.py"), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(WAIT_LIMIT) == 0
    finally:
        process.kill()
    err = process.stderr.read()
    process.stderr.close()
    assert (
        err.count("warning: standard output was closed or is full; the run continues without it")
        == 1
    )
    assert "Traceback" not in err
    assert {path.name for path in Path("r").iterdir()} == RUN_FILES


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


def without_a_compiler() -> None:
    """And with a trunk that is traced in a second."""
    EncoderDecoder.trunk = lambda self, src, tgt_in: self.embedding(tgt_in)
    torch._inductor.config.cpp.cxx = ("/no/compiler",)


@pytest.mark.slow
def test_compile_without_a_compiler_is_one_line(slice_of_reviews):
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--run-dir", "r", "--compile"]
    where = {"TORCHINDUCTOR_CACHE_DIR": "cache"}
    process = Forked("run", run_main, argv, without_a_compiler, **where)
    assert process.wait() == 1
    line = process.said()[1].strip().splitlines()[-1]
    assert line.startswith("error: --compile: ") and "compiler" in line
    assert "Traceback" not in process.said()[1]


@pytest.mark.slow
def test_a_run_shorter_than_its_warm_up_is_warned_of_and_its_epoch_time_extrapolated(
    slice_of_reviews, capsys
):
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--run-dir", "r", "--max-steps", "2"]
    assert main.main(argv) == 0
    out, err = capsys.readouterr()
    assert "warning: --warmup-steps 200: only 2 in this run, so the learning rate" in err
    n_steps = math.ceil(N_TRAIN / 32)
    assert re.search(rf"one training epoch: about .* s, extrapolated from 2 of {n_steps} st", out)
    assert main.main([*argv[:-2], "--overwrite", "--warmup-steps", "3"]) == 0
    out, err = capsys.readouterr()
    assert "warning" not in err
    assert re.search(r"one training epoch: [\d.]+ s, median of 2 \([\d.]+ to [\d.]+\)\n", out)


# ------------------------------------------------------------------------ weights of another run


def test_a_run_begins_with_the_weights_of_another(finished, slice_of_reviews):
    origin = finished[0]
    argv = ["--dataset", slice_of_reviews, "--init-from", origin, "--run-dir", "new"]
    out = run_quietly(*argv, "--max-steps", 1, "--lr", 1e-9)
    assert f"weights of {origin}" in out
    weights, before = (load_file(run / "best.safetensors") for run in (Path("new"), origin))
    for name, tensor in before.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)
    tokenizers = [(run / "tokenizer.json").read_bytes() for run in (Path("new"), origin)]
    assert tokenizers[0] == tokenizers[1]
    assert run_quietly("--resume", "--run-dir", "new", "--max-steps", 2)


def test_weights_of_another_model_are_refused(finished, slice_of_reviews, capsys):
    write_files({"three.csv": csv_bytes([(f"w {i}", str(i % 3)) for i in range(60)])})
    for options, words in {
        "--dataset three.csv": ["--init-from", "classes negative, positive", "classes 0, 1, 2"],
        "--d-model 96": ["--d-model 96", "--init-from", "leave it out"],
        "--vocab-size 500": ["--vocab-size 500", "--init-from", "leave it out"],
        "--resume": ["--resume and --init-from"],
        "--benchmark 1": ["--init-from and --benchmark"],
        "--task translation --source-column text --target-column text": [
            "--init-from",
            "--task classification",
        ],
    }.items():
        argv = ["--run-dir", "new", "--init-from", finished[0], *options.split()]
        if "--dataset" not in options and "--resume" not in options:
            argv += ["--dataset", slice_of_reviews]
        refuse_with(argv, words, capsys)
    refuse_with(["--init-from", "nowhere"], ["--init-from nowhere", "no such run"], capsys)


# --------------------------------------------------------------------- validation within an epoch


@pytest.mark.slow
def test_validation_within_an_epoch_keeps_the_best_weights(train):
    options = ("--epochs", 2, "--average-checkpoints", 1)
    plain, often = train("plain", *options), train("often", *options, "--validate-every", 3)
    assert losses(often) == losses(plain)  # training is the same
    within = events(often, "validation")
    assert [event["step"] for event in within][:2] == [3, 6]
    ranks = [
        (e["validation_macro_f1"], -e["validation_loss"])
        for e in (*within, *events(often, "epoch"))
    ]
    out = run_quietly("--run-dir", often, "--test-only")
    assert "test of" in out and max(ranks) >= max(ranks[len(within) :])

    train("broken", *options, "--validate-every", 3, "--max-steps", 4)
    out = run_quietly("--resume", "--run-dir", "broken", "--max-steps", 10**6)
    best = [Path(run, "best.safetensors").read_bytes() for run in ("broken", "often")]
    assert best[0] == best[1]
    assert events("broken", "validation") == within


# ---------------------------------------------------------------------------------- several seeds


@pytest.mark.slow
def test_seeds_are_trained_each_and_summed_up(slice_of_reviews, finished):
    argv = [*TINY, "--dataset", slice_of_reviews, "--run-dir", "r"]
    out = run_quietly(*argv, "--seeds", "0,2-3")
    tests = [events(f"r/seed-{seed}", "test")[-1] for seed in (0, 2, 3)]
    values = [100 * test["accuracy"] for test in tests]
    mean, sd = statistics.mean(values), statistics.stdev(values)
    each = ", ".join(f"{value:.2f}" for value in values)
    assert f"test accuracy {mean:.2f} ± {sd:.2f} ({each})" in out.splitlines()
    assert without_times("r/seed-0") == without_times(finished[0])
    again = run_quietly(*argv, "--seeds", "0,2-3")
    assert again.splitlines()[-3:] == out.splitlines()[-3:]
    assert len(events("r/seed-0", "test")) == 1  # a finished run is not repeated


@pytest.mark.parametrize(
    "options, words",
    [
        ("--seeds x --run-dir r", ["--seeds x", "such as 0-4"]),
        ("--seeds 4-2 --run-dir r", ["--seeds 4-2", "the smaller number first"]),
        ("--seeds 0-1", ["--seeds", "--run-dir"]),
        ("--seeds 0-1 --seed 1 --run-dir r", ["--seeds and --seed"]),
        ("--seeds 0-1 --resume --run-dir r", ["--seeds and --resume"]),
    ],
)
def test_seeds_that_cannot_be_trained_are_refused(options, words, capsys):
    refuse_with(options.split(), words, capsys)


def test_a_run_keeps_the_learned_positions_of_the_weights_it_takes(slice_of_reviews, capsys):
    argv = ["--dataset", slice_of_reviews, "--run-dir"]
    learned = ["--positions", "learned", "--max-length", 40, "--max-steps", 1]
    run_quietly(*TINY, *learned, *argv, "first")
    how = ["--max-steps", 1, "--warmup-steps", 1]
    run_quietly("--init-from", "first", *how, *argv, "second")
    assert json.loads(Path("second/config.json").read_text())["options"]["max_length"] == 40
    capsys.readouterr()
    refuse_with(
        ["--init-from", "first", "--max-length", 50, *argv, "third"],
        ["--max-length 50", "the run of --init-from has its own"],
        capsys,
    )
