"""Using a finished run: what is refused, and files that are damaged or of another version."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import csv_bytes, numbered, refuse_with, run_quietly, write_files
from safetensors.torch import load_file, save_file

import measure
from config import ModelConfig
from measure import work_fingerprint
from run_folder import json_checksum

USE_REFUSED = {
    "no run": ("--predict in.txt --run-dir mine", ["--run-dir mine", "config.json is missing"]),
    "no folder": ("--predict in.txt --run-dir nowhere", ["--run-dir nowhere", "no such run"]),
    "missing file": ("--predict nowhere.txt --run-dir copy", ["nowhere.txt", "give a file"]),
    "a folder": ("--predict mine --run-dir copy", ["mine", "give a file"]),
    "not UTF-8": ("--predict latin.txt --run-dir copy", ["latin.txt, line 2, byte 4", "UTF-8"]),
    "another model": (
        "--test-only --d-model 32 --run-dir copy",
        ["--d-model 32: not for --test-only; leave it out"],
    ),
    "another seed": ("--predict in.txt --seed 1 --run-dir copy", ["--seed 1", "leave it out"]),
    "other data": (
        "--predict in.txt --dataset few.csv --run-dir copy",
        ["--dataset few.csv", "leave it out"],
    ),
    "unknown label": (
        "--test-only --dataset few.csv --run-dir copy",
        ["test split", "the model knows only negative"],
    ),
    "batch size": ("--predict in.txt --batch-size 0 --run-dir copy", ["--batch-size 0"]),
}


@pytest.mark.parametrize("argv, words", USE_REFUSED.values(), ids=USE_REFUSED.keys())
def test_uses_that_cannot_work_are_refused(argv, words, run_copy, capsys):
    files = {"mine/thesis.txt": b"years of work", "few.csv": csv_bytes(numbered(60))}
    write_files({**files, "in.txt": b"good\n", "latin.txt": b"good\ncaf\xe9\n"})
    refuse_with(argv.split(), words, capsys)


# -------------------------------------------------------------------------------------- config.json

USES = ["--test-only", "--predict=in.txt", "--resume"]


def rewrite_config(run: Path, change) -> None:
    """Changes config.json and its checksum, as another version of rhea would write it."""
    config = json.loads((run / "config.json").read_text())
    change(config)
    config["checksum"] = json_checksum(config)
    (run / "config.json").write_text(json.dumps(config))


def test_a_run_from_before_an_option_existed_has_its_default(run_copy):
    write_files({"in.txt": b"good\na dull film\n"})
    before = run_quietly("--run-dir", run_copy, "--predict", "in.txt")

    def older(config):
        for name in ("positions", "activation", "d_attn", "r_drop", "beam_size", "bleu_tokenize"):
            del config["options"][name]

    r_drop = json.loads((run_copy / "config.json").read_text())["options"]["r_drop"]
    assert r_drop != 0.0
    rewrite_config(run_copy, older)
    assert run_quietly("--run-dir", run_copy, "--predict", "in.txt") == before
    run_quietly("--resume", "--run-dir", run_copy, "--epochs", 3)
    options = json.loads((run_copy / "config.json").read_text())["options"]
    assert options["positions"] == "sinusoidal" and options["r_drop"] == 0.0


@dataclass(frozen=True)
class LaterModelConfig(ModelConfig):
    """The model options of a later version."""

    pre_norm: bool = False


@pytest.mark.parametrize("options", [{}, {"d_model": 16, "activation": "gelu"}])
def test_a_new_model_option_with_its_default_changes_no_fingerprint(options, monkeypatch):
    before = work_fingerprint("plan", ModelConfig(**options), 0.0)
    monkeypatch.setattr(measure, "ModelConfig", LaterModelConfig)
    assert work_fingerprint("plan", LaterModelConfig(**options), 0.0) == before
    assert work_fingerprint("plan", LaterModelConfig(**options, pre_norm=True), 0.0) != before


CONFIGS_REFUSED = {
    "unknown option": (
        lambda config: config["options"].update(d_modle=3),
        ["copy/config.json: unknown option d_modle", "version"],
    ),
    "two unknown options": (
        lambda config: config["options"].update(pre_norm=True, mood="good"),
        ["copy/config.json: unknown option mood, pre_norm"],
    ),
    "other tokenizer": (
        lambda config: config.update(tokenizer_checksum=""),
        ["copy/tokenizer.json: not the tokenizer of this run"],
    ),
    "no tokenizer checksum": (
        lambda config: config.pop("tokenizer_checksum"),
        ["copy/config.json", "tokenizer_checksum"],
    ),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("change, words", CONFIGS_REFUSED.values(), ids=CONFIGS_REFUSED.keys())
def test_a_config_of_another_version_is_refused(change, words, use, run_copy, capsys):
    write_files({"in.txt": b"good\n"})
    rewrite_config(run_copy, change)
    refuse_with(["--run-dir", "copy", use], words, capsys)


@pytest.mark.parametrize("use", USES[:2])
@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["options"].update(d_model=32),
        lambda config: config["options"].update(n_layers=2),
        lambda config: config.update(classes=["a"]),
    ],
    ids=["width", "depth", "classes"],
)
def test_weights_of_another_size_than_the_config_says_are_refused(change, use, run_copy, capsys):
    write_files({"in.txt": b"good\n"})
    rewrite_config(run_copy, change)
    words = ["copy/best.safetensors: not the weights of this run", "names or shapes"]
    refuse_with(["--run-dir", "copy", use], words, capsys)


# ------------------------------------------------------------------------------------ damaged files


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_one_weight(path: Path) -> None:
    weights = load_file(path)
    del weights[sorted(weights)[0]]
    save_file(weights, path)


FILES_REFUSED = {
    "config cut": ("config.json", cut_in_half),
    "config edited": (
        "config.json",
        lambda path: path.write_text(path.read_text().replace('"n_heads": 2', '"n_heads": 4')),
    ),
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


@pytest.mark.parametrize("name, damage", FILES_REFUSED.values(), ids=FILES_REFUSED.keys())
def test_a_run_with_a_damaged_file_is_refused(name, damage, run_copy, capsys):
    write_files({"in.txt": b"good\n"})
    damage(run_copy / name)
    refuse_with(["--run-dir", "copy", "--predict", "in.txt"], ["copy", name], capsys)


@pytest.mark.slow
def test_testing_on_other_data_leaves_the_files_of_the_run(finished_translator):
    run = Path(shutil.copytree(finished_translator[0], "copy"))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    write_files({"test_other.csv": b"in,out\n" + b"a b,b a\n" * 50})
    run_quietly("--test-only", "--run-dir", run, "--dataset", "test_other.csv")
    changed = {p.name for p in run.iterdir() if p.read_bytes() != before.get(p.name)}
    kinds = ("hypotheses", "references")
    assert changed == {"metrics.jsonl", *(f"test.test_other.csv.{kind}.txt" for kind in kinds)}
