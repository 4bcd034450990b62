"""What several test modules use."""

import csv
import gzip
import io
import json
import random
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import datasets
import pytest
from processes import WAIT_LIMIT  # noqa: F401, for test modules

import main
from config import DataConfig
from splits import Splits, load_splits

PROJECT = Path(main.__file__).parent


TINY = (
    "--device cpu --n-layers 1 --d-model 16 --d-ff 16 --n-heads 2 --epochs 2 --vocab-size 400 "
    "--batch-size 32 --lr 1e-3 --warmup-steps 200 --schedule linear --average-checkpoints 1 "
    "--ensemble 1 --no-naive-bayes"
).split()


def csv_bytes(rows) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows([("text", "label"), *rows])
    return out.getvalue().encode()


def numbered(n: int, word: str = "good film") -> list[tuple[str, str]]:
    return [(f"{word} {i}", str(i % 2)) for i in range(n)]


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


def as_params(cases: dict) -> list:
    return [
        pytest.param(*case.values, marks=case.marks, id=name)
        if isinstance(case, type(pytest.param()))
        else pytest.param(*case, id=name)
        for name, case in cases.items()
    ]


N_TRAIN = 150


def write_text_lines(path: Path, lines) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


TOY = "--n-layers 1 --d-model 64 --d-ff 128 --n-heads 4 --dropout 0 --label-smoothing 0 --lr 3e-3"
TOY += " --warmup-steps 100 --schedule linear --batch-tokens 512 --max-length 32 --vocab-size 270"


def toy_corpus(folder: Path, change, n: int = 3000) -> None:
    """Parallel files of short random lines and what `change` makes of them."""
    draw = random.Random(0)
    for split, size in (("train", n), ("val", 100), ("test", 100)):
        lines = [draw.choices("abcdefgh", k=draw.randint(2, 6)) for _ in range(size)]
        write_text_lines(folder / f"{split}.in", map(" ".join, lines))
        write_text_lines(folder / f"{split}.out", (" ".join(change(line)) for line in lines))


def translate_toy(folder: Path, *options) -> int:
    """Exit status of training a translator on the toy corpus, in the folder "run"."""
    columns = "--task translation --source-column in --target-column out --train-tokenizer"
    command = ["--dataset", str(folder), "--run-dir", "run", *columns.split(), *TOY.split()]
    return main.main([*command, *options])


# ---------------------------------------------------------------------------------------- data sets

Rows = list[tuple[str, str]]


def write(path: Path | str, content: str | bytes) -> Path:
    """Writes a file and the folders above it; of .gz, compressed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def csv_text(rows: Rows, header=("text", "label"), delimiter=",") -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n", delimiter=delimiter).writerows([header, *rows])
    return out.getvalue()


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_parquet(path: Path | str, columns: dict[str, list], **options) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, **options).to_parquet(path)
    return Path(path)


def table(rows: Rows) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"source": [s for s, _ in rows], "target": [t for _, t in rows]}
    )


def load(path: Path | str, wanted=("train", "validation", "test"), **options) -> Splits:
    return load_splits(DataConfig(dataset=str(path), **options), wanted)


def rows_of(path: Path | str, **options) -> dict[str, Rows]:
    """The splits of a file or folder, as plain (sentence, label) rows."""
    tables = load(path, **options).tables
    return {split: list(zip(t["source"], t["target"])) for split, t in tables.items()}


def all_rows(path: Path | str, **options) -> Counter:
    """How often each (sentence, label) row is in a file or folder."""
    return Counter(row for rows in rows_of(path, **options).values() for row in rows)


def record(seconds: float = 2.0, **facts) -> dict:
    """A record of epoch times."""
    return {
        "workload": "reviews",
        "work_fingerprint": "a" * 16,
        "device": "cpu",
        "device_name": "Some CPU",
        "threads": 2,
        "attention": "fused",
        "precision": "fp32",
        "seconds_per_epoch": {"median": seconds, "least": seconds / 2, "greatest": seconds * 2},
        "seconds_per_epoch_is": "measured",
    } | facts


def write_records(name: str, *records) -> str:
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)
    return name
