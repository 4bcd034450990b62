"""Defaults that follow from the size of a user's data."""

import json
import re
from pathlib import Path

import pytest
from helpers import csv_bytes, run_quietly, write_files

import settings
from fitting import fit_epochs, fit_sizes


def fitted(n: int, steps_per_epoch: int, **given) -> dict:
    given = {"dataset": "mine.csv", **given}
    options = settings.resolve(given)
    fit_sizes(options, given, n)
    fit_epochs(options, given, steps_per_epoch)
    return vars(options)


@pytest.mark.parametrize("n, size", [(10, 8), (900, 28), (8454, 64), (10**6, 64)])
def test_a_batch_is_a_32nd_of_the_data_within_bounds(n, size):
    assert fitted(n, 10)["batch_size"] == size
    translator = fitted(n, 10, task="translation")
    assert translator["batch_size"] is None
    assert translator["batch_tokens"] == min(1024, max(256, n // 32 * 8))


@pytest.mark.parametrize("n, models", [(50, 4), (10_000, 4), (10_001, 1)])
def test_several_models_are_trained_on_few_sentences(n, models):
    assert fitted(n, 10)["ensemble"] == models
    assert fitted(n, 10, task="translation")["ensemble"] == 1
    assert fitted(n, 10, ensemble=2)["ensemble"] == 2
    assert fitted(n, 10, model="tiny")["ensemble"] == 1


def test_a_batch_holds_the_longest_sentence():
    assert fitted(100, 10, task="translation", max_length=700)["batch_tokens"] == 700


def test_short_epochs_are_repeated_until_there_are_enough_steps():
    assert [fitted(100, n)["epochs"] for n in (1, 20, 100, 5000)] == [60, 50, 10, 8]
    assert [fitted(100, n)["warmup_steps"] for n in (1, 5, 100)] == [7, 37, 100]
    assert fitted(100, 50, task="translation")["epochs"] == 60
    options = fitted(100, 10, task="translation")
    assert options["warmup_steps"] == 75
    assert options["lr"] == pytest.approx((options["d_model"] * 75) ** -0.5)


def test_what_is_given_stays_as_it_is():
    given = {"batch_size": 3, "epochs": 2, "warmup_steps": 9, "lr": 0.5}
    assert fitted(100, 20, **given).items() >= given.items()
    assert fitted(100, 20, batch_tokens=99)["batch_size"] is None
    assert fitted(100, 20, max_steps=16)["warmup_steps"] == 2
    assert fitted(100, 20, max_steps=1000, epochs=2)["warmup_steps"] == 5
    for known in ({"dataset": "rotten_tomatoes"}, {"workload": "original"}):
        options = settings.resolve(known)
        before = dict(vars(options))
        assert fit_sizes(options, known, 50) == fit_epochs(options, known, 3) == []
        assert vars(options) == before


def test_a_run_says_what_was_chosen_and_resumes_with_it():
    write_files({"mine.csv": csv_bytes([(f"w{i} x", "ab"[i % 2]) for i in range(100)])})
    argv = ["--dataset", "mine.csv", "--run-dir", "r", "--device", "cpu", "--d-model", 8]
    out = run_quietly(*argv, "--max-steps", 3)
    assert re.search(
        r"defaults for \d+ sentences: --batch-size 8 --ensemble 4 --epochs \d+ --warmup", out
    )
    chosen = json.loads(Path("r/config.json").read_text(encoding="utf-8"))["options"]
    assert chosen["batch_size"] == 8 and chosen["epochs"] > 8
    run_quietly("--resume", "--run-dir", "r", "--max-steps", 5)
    resumed = json.loads(Path("r/config.json").read_text(encoding="utf-8"))["options"]
    assert {**resumed, "max_steps": 3, "resume": False} == {**chosen, "resume": False}
