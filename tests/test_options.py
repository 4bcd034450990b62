"""The command line: options, defaults, help, and what is refused before any work."""

import json
import os
import re
import shlex
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from helpers import as_params, csv_bytes, numbered, refuse, refuse_with, write_files

import main
import settings
from config import SIZES, ModelConfig, format_flag

CONFIGS = [config for group in settings.GROUPS.values() for config in group]
FIELDS = {format_flag(f.name): f for config in CONFIGS for f in fields(config)}
CHOICES = {flag: f.metadata["choices"] for flag, f in FIELDS.items() if "choices" in f.metadata}


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    """A command line that should be refused and is not fails at once."""
    monkeypatch.setattr(main, "prepare", lambda *args, **options: pytest.fail("not refused"))


# --------------------------------------------------------------------------------------------- help


@pytest.fixture(scope="module")
def help_text() -> str:
    return settings.build_parser().format_help()


def help_of(flag: str, help_text: str) -> str:
    """The help of one option, on one line."""
    sections = [" ".join(text.split()) for text in re.split(r"\n\n|\n  (?=-)", help_text)]
    (section,) = [text for text in sections if flag in text.replace(",", "").split()[:2]]
    return section


def test_help_exits_with_0_and_fits_100_columns(help_text, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.splitlines()[1:] == help_text.splitlines()[1:]  # usage: program
    assert max(map(len, help_text.splitlines())) <= 100


def test_help_shows_each_option_with_its_default(help_text):
    assert len(FIELDS) == sum(len(fields(config)) for config in CONFIGS) > 35
    defaults = vars(settings.resolve({})) | {"model": "the values shown below"}
    for flag, field in FIELDS.items():
        text, default = help_of(flag, help_text), defaults[field.name]
        if not isinstance(default, bool | None):
            assert text.endswith(f"(default: {default})")
        assert len(text.split(" (default")[0].split()) > 3, f"{flag} without a description"


def test_help_shows_choices_in_braces_and_the_examples_last(help_text):
    for flag, choices in CHOICES.items():
        assert help_of(flag, help_text).startswith(f"{flag} {{{','.join(choices)}}} ")
    assert "at least 1" not in help_text and "at least 0" not in help_text
    assert help_text.rstrip().endswith(settings.EXAMPLES.rstrip())


def test_the_sizes_in_the_help_are_the_ones_that_model_sets(help_text):
    text = help_of("--model", help_text)
    for name, size in SIZES.items():
        n, numbers = size.n_layers, (size.d_model, size.d_ff, size.n_heads, size.dropout)
        assert f"{name} {n}+{n}, {', '.join(map(str, numbers))}" in text


def test_the_examples_of_the_help_are_valid():
    commands = re.findall(r"python main\.py(.*?)(?:  |$)", settings.EXAMPLES, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        given, problems = settings.parse_args(shlex.split(command))
        commands_given = [name for name in settings.COMMANDS if name in given]
        assert problems + settings.command_problems(given, commands_given) == []


# ------------------------------------------------------------------------------ values and defaults


@pytest.mark.parametrize("flag", FIELDS)
def test_every_field_of_the_settings_is_a_flag(flag):
    kind, limits = settings.type_of(FIELDS[flag]), FIELDS[flag].metadata
    fits = {bool: True, int: limits.get("low"), float: 0.5, str: limits.get("choices", ["a"])[-1]}
    fits[tuple] = ("a", "b")
    values = [] if kind is bool else fits[tuple] if kind is tuple else [str(fits[kind])]
    assert settings.parse_args([flag, *values]) == ({FIELDS[flag].name: fits[kind]}, [])


def test_without_options_the_recipe_is_used():
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


@pytest.mark.parametrize("name", SIZES)
def test_a_named_size_sets_the_whole_size(name):
    options = settings.resolve({"model": name})
    assert settings.extract_config(ModelConfig, options) == SIZES[name]
    assert options.lr == settings.RECIPES["rotten_tomatoes"]["lr"]
    assert settings.resolve({"model": name, "d_ff": 7}).d_ff == 7


def test_other_data_use_the_recipe_of_their_task():
    for task, name in settings.RECIPE_OF_TASK.items():
        ours = vars(settings.resolve({"dataset": "my.csv", "task": task}))
        own = vars(settings.resolve({"dataset": name}))
        assert {k for k in own if own[k] != ours[k]} == {"dataset"}


def test_a_batch_of_a_recipe_holds_the_longest_sentence():
    given = {"dataset": "my.csv", "task": "translation", "max_length": 3000}
    assert settings.resolve(given).batch_tokens == 3000
    assert settings.resolve(given | {"batch_tokens": 5}).batch_tokens == 5  # and is refused


def test_without_a_recipe_the_learning_rate_is_the_papers(monkeypatch):
    recipe = {"warmup_steps": 4000, "model": "base"}
    monkeypatch.setitem(settings.RECIPES, "rotten_tomatoes", recipe)
    assert settings.resolve({}).lr == pytest.approx(512**-0.5 * 4000**-0.5)


# ---------------------------------------------------------------------------------- invalid options

NUMBERS = [flag for flag, f in FIELDS.items() if settings.type_of(f) in (int, float)]
MAY_BE_ZERO = (
    "--seed --pad-to --num-workers --dropout --label-smoothing --weight-decay --length-penalty "
    "--r-drop"
).split()


@pytest.mark.parametrize("flag", NUMBERS)
def test_a_number_out_of_range_or_none_is_refused(flag, capsys):
    for value in ("-1", "nan", "many", "", "1e", *(["0"] if flag not in MAY_BE_ZERO else [])):
        for argv in ([flag, value], [f"{flag}={value}"]):
            (line,) = refuse(argv, capsys)
            assert line.startswith(f"error: {flag} {value}") and ": give " in line


@pytest.mark.parametrize("flag", MAY_BE_ZERO)
def test_zero_is_allowed_where_it_means_something(flag):
    given, problems = settings.parse_args([flag, "0"])
    assert problems + settings.option_problems(settings.resolve(given), {}) == []


@pytest.mark.parametrize("flag, choices", CHOICES.items())
def test_an_invalid_choice_is_refused_with_the_choices(flag, choices, capsys):
    refuse_with([flag, "nosuch"], [f"{flag} nosuch: give", *choices], capsys)


@pytest.mark.parametrize(
    "argv, hint",
    [
        ("--bach-size 3", "did you mean --batch-size?"),
        ("--bach-size=3", "did you mean --batch-size?"),
        ("--d_model=3", "did you mean --d-model?"),
        ("--EPOCHS 3", "did you mean --epochs?"),
        ("--weight=3", "did you mean --weight-decay?"),
        ("--batch 3", "did you mean --batch-size or --batch-tokens?"),
        ("--no-lowercas", "did you mean --no-lowercase?"),
        ("--xyz", "see --help"),
        ("--nope", "see --help"),
        ("--learning-rate 3", "see --help"),
        ("--model-size 3", "see --help"),
    ],
)
def test_an_unknown_option_gets_a_hint_if_one_is_near(argv, hint, capsys):
    (line,) = refuse(argv.split(), capsys)
    name = argv.replace("=", " ").split()[0]
    assert line == f"error: {name}: no such option; {hint}"


@pytest.mark.parametrize(
    "argv, name",
    [
        ("--predict x --run-dri y", "--run-dri"),
        ("--run-dri y --test-only --predict x", "--run-dri"),
        ("--resme --run-dir new", "--resme"),
        ("--resume --rn-dir new --lr 0.1", "--rn-dir"),
        ("--compare r --figre f.png", "--figre"),
        ("--dataset ./missing.csv --run_dir new", "--run_dir"),
    ],
)
def test_an_unknown_option_is_reported_before_what_follows_from_it(argv, name, capsys):
    (line,) = refuse(argv.split(), capsys)
    assert line.startswith(f"error: {name}: no such option; did you mean --")


@pytest.mark.parametrize("argv", ["train", "--epochs 3 train", "--lr=1 train", "train --epochs 3"])
def test_a_bare_word_gets_help(argv, capsys):
    words = ["train: not an option", "run main.py without options to train and test", "--help"]
    refuse_with(argv.split(), words, capsys)


def test_a_bare_file_name_gets_the_option_for_it(capsys):
    write_files({"my reviews.csv": b""})
    refuse_with(["my reviews.csv"], ["my reviews.csv: not an option; to train on it, give"], capsys)


FEW = {"few.csv": csv_bytes(numbered(60))}
A_RUN = {"run/config.json": b"{}"}
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
    "vocab size of an embedded tokenizer": (
        {},
        "--vocab-size 4000",
        ["--vocab-size 4000", "--train-tokenizer"],
    ),
    "two batch limits": (
        {},
        "--batch-size 8 --batch-tokens 999",
        ["--batch-size 8", "--batch-tokens 999", "one of the two"],
    ),
    "batch below a sentence": (
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
    "tf32 on the CPU": ({}, "--device cpu --tf32", ["--tf32", "cuda", "leave it out"]),
    "seed too large": ({}, f"--seed {10**20}", [f"--seed {10**20}: give at least 0 and below"]),
    "value missing": ({}, "--lr", ["--lr", "expected one argument", "--help"]),
    "overwrite without a folder": ({}, "--overwrite", ["--overwrite", "--run-dir"]),
    "folder of a run": (A_RUN, "--run-dir run", ["--run-dir run", "holds a run", "--overwrite"]),
    "a file": ({"run": b"text"}, "--run-dir run", ["--run-dir run", "a file", "folder"]),
    "a file, overwrite": ({"run": b"text"}, "--run-dir run --overwrite", ["--run-dir run"]),
    "below a file": (FEW, "--dataset few.csv --run-dir few.csv/run", ["few.csv/run", "a file"]),
    "other files": (OTHER_FILES, "--run-dir mine", ["--run-dir mine", "other files"]),
    "other files, overwrite": (
        OTHER_FILES,
        "--run-dir mine --overwrite",
        ["--run-dir mine", "other files"],
    ),
    "compare and predict": ({}, "--compare r --predict a", ["--compare and --predict"]),
    "two commands": ({}, "--predict a --test-only --run-dir r", ["--predict", "give one of them"]),
    "resume and predict": ({}, "--resume --predict a --run-dir r", ["--resume and --predict"]),
    "resume and overwrite": ({}, "--resume --overwrite --run-dir r", ["--resume and --overwrite"]),
}


@pytest.mark.parametrize("files, argv, words", as_params(OPTIONS_REFUSED))
def test_options_that_cannot_work_are_refused(files, argv, words, capsys):
    write_files(files)
    refuse_with(argv.split(), words, capsys)


def test_a_device_that_is_not_there_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for kind in ("cuda", "mps"):
        refuse_with(["--device", kind], [f"--device {kind}", "give cpu or auto"], capsys)


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            "--epochs 0 --dropout 1 --schedule steep --run-dir mine --device cpu --precision fp16",
            ["--epochs 0", "--dropout 1", "--schedule steep", "--run-dir mine", "fp16"],
        ),
        ("--nope --epochs x --lr y", ["--nope", "--epochs x", "--lr y"]),
        (
            "--dropout 1 --d-model 129 --n-heads 3 --pad-to 3",
            ["--dropout 1", "--d-model 129", "--pad-to 3"],
        ),
    ],
)
def test_all_problems_are_reported_at_once(argv, words, capsys):
    write_files(OTHER_FILES)
    lines = refuse(argv.split(), capsys, n_lines=len(words))
    assert [sum(word in line for line in lines) for word in words] == [1] * len(words)


# ------------------------------------------------------------------------------ a missing --run-dir


def write_run(path: str, seconds: int) -> None:
    """The names of a run, last changed at a time."""
    names = ("config.json", "tokenizer.json", "best.safetensors")
    write_files({f"{path}/{name}": b"{}" for name in names})
    os.utime(path, (seconds, seconds))


@pytest.mark.parametrize("command", ["--predict in.txt", "--test-only", "--resume"])
@pytest.mark.parametrize("path", ["runs/reviews/20260101-120000", "mine", "my/best run"])
def test_a_missing_run_dir_is_refused_with_the_latest_run(path, command, capsys):
    write_run("runs/reviews/20250101-120000", 1_000)
    write_run(path, 2_000)
    write_files({"other/config.json": json.dumps({"name": "no run"}).encode()})
    refuse_with(command.split(), ["--run-dir: missing", f"such as {Path(path)}"], capsys)


def test_a_run_that_is_not_there_or_not_usable_yet_is_refused_with_what_to_do(capsys):
    write_run("whole", 1_000)
    refuse_with(["--test-only", "--run-dir", "x"], ["x: no such run", "such as whole"], capsys)
    write_run("begun", 2_000)
    Path("begun/best.safetensors").unlink()
    words = ["begun: no such run, best.safetensors is missing", "first validation with --resume"]
    refuse_with(["--test-only", "--run-dir", "begun"], words, capsys)
    write_run("seeds/seed-0", 3_000)
    words = ["seeds: no such run", "repeat the command that trained them"]
    refuse_with(["--resume", "--run-dir", "seeds"], words, capsys)


def test_a_missing_run_dir_where_there_is_no_run_is_refused(capsys):
    (line,) = refuse(["--predict", "in.txt"], capsys)
    assert line == "error: --run-dir: missing; give the folder of a run"


def test_a_name_that_the_locale_cannot_decode_is_refused(capsys):
    refuse_with(["--run-dir", "w\udcff6"], ["--run-dir 'w\\udcff6'", "not UTF-8", "rename"], capsys)


@pytest.mark.parametrize("name", ["--max-length", "--pad-to"])
def test_lengths_that_no_position_table_can_hold_are_refused(name, capsys):
    refuse_with([name, "100000000"], [f"{name} 100000000", "below 100001"], capsys)


@pytest.mark.parametrize("wrong", [["--predict", ""], ["--benchmark", "0"], ["--n-best", "0"]])
def test_a_command_that_is_wrong_is_not_taken_for_a_new_run(wrong, capsys):
    write_run("mine", 1_000)
    if wrong[0] == "--n-best":
        wrong = [*wrong, "--predict", "in.txt"]
        write_files({"in.txt": b"a"})
    refuse_with([*wrong, "--run-dir", "mine"], [wrong[0]], capsys)
