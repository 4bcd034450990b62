"""Checks the defaults for a user's own file: python assets/defaults.py FOLDER [DATA SET ...]

Makes data sets of 50 to 30,000 sentences, trains on each with the defaults and with each setting of
a small grid, and prints a table: the default must reach 95 % of the best. Runs that are there are
not repeated. Scores are macro F1 (classification) and BLEU (translation) of the test split.
"""

import csv
import gzip
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parent.parent
GRIDS = {
    "classification": {"batch_size": (8, 32), "max_steps": (400, 1600), "dropout": (0.1, 0.5)},
    "translation": {"batch_tokens": (512, 2048), "max_steps": (1000, 4000), "dropout": (0.1, 0.3)},
}
Rows = list[tuple[str, str]]


def words(draw: random.Random, n: int = 0) -> list[str]:
    """n words (by default 4 to 20), of which the first of 500 are the most frequent."""
    n = n or draw.randint(4, 20)
    return [f"w{int(500 ** draw.random()):03}" for _ in range(n)]


def by_keyword(n: int, n_classes: int, shares: list[float] | None = None) -> Rows:
    """The class is that of the one keyword in a sentence; each class has three."""
    draw, rows = random.Random(n * n_classes), []
    for _ in range(n):
        (label,) = draw.choices(range(n_classes), shares)
        text = words(draw)
        text.insert(draw.randint(0, len(text)), f"key{label}{draw.choice('abc')}")
        rows.append((" ".join(text), f"class {label}"))
    return rows


def by_order(n: int) -> Rows:
    """Each sentence has two markers; the class is which comes first, so counting words fails."""
    draw, rows = random.Random(n), []
    for _ in range(n):
        text, markers = words(draw), draw.sample(["alpha", "beta"], 2)
        for place, marker in zip(sorted(draw.sample(range(len(text)), 2), reverse=True), markers):
            text.insert(place, marker)
        rows.append((" ".join(text), f"{markers[-1]} first"))
    return rows


def by_majority(n: int) -> Rows:
    """Five classes; most of six keywords in a sentence are those of its class."""
    draw, rows = random.Random(n), []
    for _ in range(n):
        label = draw.randrange(5)
        keys = [label if draw.random() < 0.6 else draw.randrange(5) for _ in range(6)]
        text = words(draw) + [f"key{key}{draw.choice('abcdefgh')}" for key in keys]
        draw.shuffle(text)
        rows.append((" ".join(text), f"class {label}"))
    return rows


def embedded(name: str, columns: tuple[str, str], split: str, n: int) -> Rows:
    """The first n rows of an embedded data set."""
    with gzip.open(PROJECT / "assets" / name / f"{split}.tsv.gz", "rt", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [tuple(row[column] for column in columns) for row in itertools.islice(rows, n)]


def made(make: Callable[..., Rows], n: int, *options: Any) -> tuple[Rows, Rows]:
    """n rows to train on and 500 to test on."""
    rows = make(n + 500, *options)
    return rows[:n], rows[n:]


def from_reviews(n: int) -> tuple[Rows, Rows]:
    """n reviews to train on, and the test split."""
    of = ("rotten_tomatoes", ("text", "label"))
    return embedded(*of, "train", n), embedded(*of, "test", 2000)


def from_help(n: int) -> tuple[Rows, Rows]:
    """n sentence pairs to train on, and 300 to test on."""
    of = ("libreoffice_help", ("en", "de"))
    return embedded(*of, "train", n), embedded(*of, "test", 300)


DATA_SETS: dict[str, Callable[[], tuple[Rows, Rows]]] = {
    "keyword-50": lambda: made(by_keyword, 50, 2),
    "keyword-300": lambda: made(by_keyword, 300, 3),
    "keyword-1000-unbalanced": lambda: made(by_keyword, 1000, 2, [95, 5]),
    "keyword-2000-20-classes": lambda: made(by_keyword, 2000, 20),
    "order-2000": lambda: made(by_order, 2000),
    "order-10000": lambda: made(by_order, 10_000),
    "reviews-1000": lambda: from_reviews(1000),
    "reviews-8454": lambda: from_reviews(8454),
    "majority-30000": lambda: made(by_majority, 30_000),
    "help-300": lambda: from_help(300),
    "help-3000": lambda: from_help(3000),
    "help-29050": lambda: from_help(29_050),
}


def write(folder: Path, train: Rows, test: Rows) -> None:
    """train.tsv and test.tsv."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        lines = ["source\ttarget", *map("\t".join, rows)]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def settings(task: str) -> Iterator[list[str]]:
    """The options of each run: none, then each point of the grid."""
    yield []
    grid = GRIDS[task]
    for values in itertools.product(*grid.values()):
        pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in zip(grid, values)]
        yield [*itertools.chain.from_iterable(pairs), "--epochs", "1000000"]


def score(data: Path, task: str, options: list[str]) -> float:
    """The test score of a run, which is trained unless it is there."""
    run = data.parent / "runs" / " ".join([data.name, *options]).replace(" ", "_")
    metrics = run / "metrics.jsonl"
    tests = [json.loads(x) for x in metrics.open()] if metrics.exists() else []
    tests = [event for event in tests if event["event"] == "test"]
    if not tests:
        command = [sys.executable, str(PROJECT / "main.py"), "--dataset", str(data), "--task", task]
        columns = ["--source-column", "source", "--target-column", "target"]
        command += [*columns, "--run-dir", str(run), "--overwrite", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return score(data, task, options)
    return 100 * tests[-1]["macro_f1"] if task == "classification" else tests[-1]["bleu"]


def main() -> None:
    """Prints a line for each data set."""
    root, *names = sys.argv[1:]
    print("data set | default | best of the grid | share | setting of the best")
    for name in names or DATA_SETS:
        task = "translation" if name.startswith("help") else "classification"
        write(Path(root, name), *DATA_SETS[name]())
        default, *others = ((score(Path(root, name), task, o), o) for o in settings(task))
        best, how = max(others)
        share = default[0] / best
        print(f"{name} | {default[0]:.1f} | {best:.1f} | {share:.0%} | {' '.join(how)}", flush=True)


if __name__ == "__main__":
    main()
