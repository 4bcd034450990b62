"""assets/table3.py: what it trains, what it does not repeat, and what it says of signs."""

import json
import math
import shutil
import statistics
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
from helpers import PROJECT, TOY, toy_corpus
from processes import Forked, run_main

import settings
from config import ModelConfig
from models import Transformer, count_parameters

sys.path.insert(0, str(PROJECT / "assets"))
import table3

TOY_DATA = "--dataset data --task translation --source-column in --target-column out".split()


def run_forked(command: list[str], **_) -> SimpleNamespace:
    """As subprocess.run, in a warm process."""
    process = Forked(threading.get_ident(), run_main, command[2:])
    status = process.wait()
    return SimpleNamespace(returncode=status, stderr=process.said()[1])


@pytest.mark.slow
def test_rows_are_trained_once_and_compared(monkeypatch, capsys):
    Path("data").mkdir()
    toy_corpus(Path("data"), list, n=100)
    monkeypatch.setattr(table3.subprocess, "run", run_forked)
    monkeypatch.setattr(table3, "usable_cores", lambda: 1)  # starting a process changes the folder
    monkeypatch.setattr(table3, "SEEDS", (0, 1))
    monkeypatch.setattr(table3, "ROWS", table3.ROWS[:3:2])
    argv = ["out", "out.png", *TOY_DATA, *TOY.split(), "--max-steps", "2", "--beam-size", "1"]
    table3.main(argv)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| base |") and lines[3].startswith("| A2 |")
    tests = [
        json.loads(Path(f"out/base/seed-{i}/metrics.jsonl").read_text().splitlines()[-1])
        for i in (0, 1)
    ]
    assert f"{statistics.mean(math.exp(t['loss']) for t in tests):.1f} ±" in lines[2]
    assert len(matplotlib.image.imread("out.png")) > 300
    times = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.safetensors")}
    assert len(times) == 4
    table3.main(argv)
    assert capsys.readouterr().out.splitlines() == lines
    assert {path: path.stat().st_mtime_ns for path in times} == times
    shutil.rmtree("out/base")  # the lines of scores.jsonl are enough
    table3.main(argv)
    assert capsys.readouterr().out.splitlines() == lines
    with pytest.raises(RuntimeError, match="--lr"):  # those of other options are not
        table3.main([*argv, "--lr", "x"])


def test_each_row_changes_what_the_paper_changes():
    """Rows of the same letter share what the paper says they do."""
    models = {}
    for row in table3.ROWS:
        argv = ["--dataset", "libreoffice_help", *table3.BASE.split(), *row.options.split()]
        given, problems = settings.parse_args(argv)
        options = settings.resolve(given)
        assert not problems and not settings.option_problems(options, given)
        config = settings.extract_config(ModelConfig, options)
        models[row.name] = Transformer(config, n_vocab=8000, max_len=306, pad_id=0)
    n = {name: count_parameters(model) for name, model in models.items()}
    assert n["A1"] == n["A2"] == n["A3"] == n["A4"] == n["base"]  # heads at constant cost
    assert n["B1"] < n["B2"] < n["base"]
    assert n["C1"] < n["C2"] < n["base"] < n["C3"] and n["C4"] < n["base"] < n["C5"]
    assert n["C6"] < n["base"] < n["C7"] and n["D1"] == n["D4"] == n["base"]
    assert n["E"] - n["base"] == 306 * 64


@pytest.mark.parametrize(
    "ours, error, paper, expected",
    [
        (1.0, 0.4, 0.5, "yes"),
        (1.0, 0.4, -0.5, "no"),
        (-1.0, 0.4, -0.5, "yes"),
        (1.0, 0.6, 0.5, "too small to tell"),
        (1.0, 0.4, 0.0, "too small to tell"),
    ],
)
def test_signs(ours, error, paper, expected):
    assert table3.verdict(ours, error, paper) == expected


def test_a_difference_has_the_standard_error_of_two_means():
    difference, error = table3.difference([3.0, 5.0, 7.0], [1.0, 2.0, 3.0])
    assert difference == 3.0 and error == pytest.approx(math.sqrt(4 / 3 + 1 / 3))
