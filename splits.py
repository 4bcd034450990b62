"""Data sets (embedded, files, Hub) become training, validation and test splits in a cache."""

import difflib
import errno
import hashlib
import json
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cache import Table, cache_folder, cache_problem, is_whole, to_table
from comp_utils import digest
from config import ASSETS, DataConfig
from errors import BadInput
from files import (
    FILE_ENDINGS,
    SPLITS,
    check_name,
    find_files,
    name_test_sets,
    pair_of,
    read_files,
    select_columns,
    splits_named,
)
from tables import Row, Rows, delimiter_of, file_format, shorten

if TYPE_CHECKING:  # costs a second to import, so it is imported where it is used
    import datasets


# ------------------------------------------------------------------------------- files and the Hub


@dataclass
class Splits:
    """The splits of a data set by name: "train", "validation" and "test".

    Of several test sets each is a split "test.NAME".
    """

    # columns source and target (text), and line_breaks (1 where a text of the row had one)
    tables: dict[str, Table] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)  # file names, or splits of the Hub
    notes: list[str] = field(default_factory=list)  # what was left out, one line each

    @property
    def summary(self) -> str:
        """Which file went into which split, in one line."""
        return "; ".join(f"{split}: {shorten(names)}" for split, names in self.sources.items())

    def add(
        self, split: str, names: list[str], rows: Rows, columns: dict[str, str], content: list
    ) -> None:
        """Adds a split of the rows; one without any label or translation is left out, and noted.

        columns: arguments of select_columns. content: stands for the rows.
        """
        optional = split != "train"
        rows = select_columns(rows, **columns, optional_targets=optional)
        table = to_table(rows, digest(content, columns, optional))
        targets = (x for batch in table.iter(1000) for x in batch["target"])
        is_held_back = optional and all(x in ("", "-1") for x in targets)
        if is_held_back and "-1" in table.unique("target") and "train" in self.tables:
            is_held_back = "-1" not in self.tables["train"].unique("target")  # else it is a class
        if is_held_back:
            missing = f"no row has a {columns['target_column']}"
            self.notes.append(f"{shorten(names)}: left out of {split}, {missing}")
        else:
            self.tables[split], self.sources[split] = table, names


def checksum(file: Path) -> str:
    """SHA-256 of a file. Raises BadInput if it cannot be read."""
    try:
        with open(file, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror}; give a file that can be read") from None


def load_files(path: Path, columns: dict[str, str], column_names: str | None = None) -> Splits:
    """The splits of a file or folder. A changed file is read again; one that was moved is not.

    column_names: those of files without a line of names, separated by commas.
    """
    sides = (columns["source_column"], columns["target_column"])
    named = column_names.split(",") if column_names else None
    by_split, ignored = find_files(path, sides, named)
    splits = Splits(notes=[f"{shorten(ignored)}: not read"] if ignored else [])
    sums = {file: checksum(file) for sets in by_split.values() for files in sets for file in files}
    tsv = [file for file in sums if file_format(file) == ".tsv"]
    for split, sets in by_split.items():
        files = [file for files in sets for file in files]
        names = [str(file.relative_to(path)) if path.is_dir() else file.name for file in files]
        quoted_alike = tsv if set(files) & set(tsv) else []
        content = [(file_format(file), sums[file]) for file in [*files, *quoted_alike]]
        content += [file.parent.name for file in files if file_format(file) == ".txt"]
        delimiters = {
            file.name: delimiter
            for file in files
            if file_format(file) == ".csv" or (named and file_format(file) == ".txt")
            if (delimiter := delimiter_of(file, sides, named)) != ","
        }
        content += [facts for facts in (named, delimiters) if facts and named]
        rows = read_files(sets, sides, quoted_alike, named)
        splits.add(split, names, rows, columns, content)
        splits.notes += [
            f"{name}: the delimiter is {delimiter!r}, which fits each line"
            for name, delimiter in delimiters.items()
        ]
        delimited = {".csv", ".tsv"} & set(map(file_format, files))
        if delimited and split in splits.tables and (n := count_quoted(splits.tables[split])):
            splits.notes.append(f"{shorten(names)}: {n:,} values begin and end with a quote, kept")
    return splits


def count_quoted(table: Table) -> int:
    """The texts that begin and end with a quote."""
    import pyarrow.compute as pc

    texts = (table.data.column(name) for name in ("source", "target"))
    return sum(pc.sum(pc.match_substring_regex(t, '^".*"$')).as_py() or 0 for t in texts)


def rows_of_hub(table: "datasets.Dataset", name: str, target_column: str) -> Rows:
    """The rows of a table of the Hub, a class's name in place of its number."""
    names = getattr(table.features.get(target_column), "names", None)
    for number, row in enumerate(table, 1):
        if names and (label := row[target_column]) is not None:
            row[target_column] = names[label] if label >= 0 else None  # -1 is "held back"
        yield f"{name}, row {number}", row


def without_network() -> bool:
    """Whether the Hub is out of reach; then the libraries are told, and do not try for a minute."""
    import datasets
    from huggingface_hub import constants

    if not urllib.request.getproxies() and not constants.HF_HUB_OFFLINE:
        try:
            socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return constants.HF_HUB_OFFLINE


def has_card(folder: Path) -> bool:
    """Whether a folder is laid out like one of the Hub, where a card says which file is what."""
    card = folder / "README.md"
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    return re.match(r"---\n(.*\n)*?configs:", text) is not None


def load_tables(
    path: Path, name: str, config_name: str | None
) -> tuple[dict[str, "datasets.Dataset"], str | None]:
    """What `datasets` makes of an id on the Hub, or of a folder with a card, which has a digest.

    No code that comes with the data is run.
    """
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    source, content, cache = name, None, Path(datasets.config.HF_DATASETS_CACHE)
    if path.is_dir():
        if re.search(r"[][*?]", os.path.abspath(path)):  # `datasets` reads the path as a pattern
            problem = "a folder with a card, but one of [ ] * ? in its path"
            raise BadInput(f"--dataset {name}: {problem}; rename it")
        # The library knows a folder by its name and card, and would give what it held before.
        content = digest([[str(f), checksum(f)] for f in sorted(path.rglob("*")) if f.is_file()])
        source, cache = str(path), cache / f"rhea-{content}"
    offline = content is None and without_network()
    try:
        tables = datasets.load_dataset(source, config_name, cache_dir=cache)
        if not all(is_whole(file["filename"]) for t in tables.values() for file in t.cache_files):
            raise pyarrow.ArrowInvalid("file cut or overwritten")
        return tables, content
    except Exception as error:  # a dozen kinds; most mean that it has none
        cause, reason = error.__cause__ or error, " ".join(str(error).split())[:300]
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise cache_problem(cache, cause) from None
        of_arrow = type(error) is OSError and not error.errno
        if of_arrow or isinstance(error, pyarrow.ArrowException | json.JSONDecodeError):
            damaged = cache if content else cache / name.replace("/", "___")
            raise BadInput(f"cache {damaged}: damaged ({reason}); delete the folder") from None
        if content:
            raise BadInput(f"--dataset {name}: {reason}; fix its README.md or files") from None
    reason = "no network, and not fetched before" if offline else reason
    near = difflib.get_close_matches(name, embedded(), 1)
    remedy = f"did you mean {near[0]}?" if near else "check the name, or fetch it with a network:"
    raise BadInput(
        f"--dataset {name}: no file or folder here, not embedded (as {', '.join(embedded())} "
        f"is), not on the Hub ({reason}); {remedy} hf download --repo-type dataset {name}"
    )


def load_hub(path: Path, name: str, config_name: str | None, columns: dict[str, str]) -> Splits:
    """The splits of a data set on the Hub, or of a folder with a card."""
    tables, content = load_tables(path, name, config_name)
    named = {key: splits_named(key) if len(tables) > 1 else {"train"} for key in tables}
    tests = [key for key in tables if named[key] == {"test"}]
    test_names = dict(zip(tests, name_test_sets(tests)))
    splits = Splits()
    for key, table in tables.items():
        split = test_names.get(key) or (*named[key], "")[0]
        if len(named[key]) != 1 or split in splits.tables:
            reason = f"{split} is another" if split in splits.tables else "its name tells no use"
            splits.notes.append(f"split {key}: left out, {reason}")
            continue
        table = table.flatten()  # the fields of a nested column are columns named a.b
        rows = rows_of_hub(table, f"{name}, {key}", columns["target_column"])
        splits.add(split, [f"split {key}"], rows, columns, [table._fingerprint, content])
    return splits


# --------------------------------------------------------------------------------- all the splits


def embedded() -> list[str]:
    """Names of the data sets under assets/."""
    return sorted(path.name for path in ASSETS.iterdir() if path.is_dir())


def share_of(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: a cut puts equal sentences together."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


CUTS = {"test": (0.0, 0.1), "validation": (0.1, 0.2)}  # of share_of; at most
CUT = "cut from train"  # the source of such a split
MOST_CUT = 5000  # sentences of each, about; more take time, and tell no more


def kind_of(split: str) -> str:
    """The kind of a split: test.2016_flickr -> test."""
    return split.partition(".")[0]


def cut_missing(tables: dict[str, Table], classifies: bool) -> dict[str, Table]:
    """Cuts a missing validation or test split out of the training split.

    A sentence stays in its split whatever rows are added, until a split has MOST_CUT: then some go
    back. The sentences of a class that would have no row left in training stay there.
    """
    train, kinds = tables["train"], set(map(kind_of, tables))
    share = min(0.1, MOST_CUT / max(1, len(train)))
    cuts = {split: (begin, begin + share) for split, (begin, _) in CUTS.items()}
    missing = {split: bounds for split, bounds in cuts.items() if split not in kinds}

    def rows_of(split: str, keep: set[str]) -> Iterator[Row]:
        for batch in train.iter(1000):
            for row in zip(*batch.values()):
                row = dict(zip(batch, row))
                share = share_of(row["source"])
                home = next((s for s, (a, b) in missing.items() if a <= share < b), "train")
                if split == ("train" if row["target"] in keep else home):
                    yield row

    def cut(split: str, keep: set[str]) -> Table:
        key = digest(train._fingerprint, split, missing, sorted(keep))
        return to_table(rows_of(split, keep), key)

    if missing:
        rest, keep = cut("train", set()), set()
        if classifies:
            keep = set(train.unique("target")) - set(rest.unique("target"))
        tables = {**tables, **{split: cut(split, keep) for split in ("train", *missing)}}
    for split, table in tables.items():
        if not len(table):
            if classifies and len(train) > 1:
                class_names({"train": train})  # with too many labels, each is kept for training
            n = len(train)
            problem = f"no sentence of {n} is left for the {split} split"
            raise BadInput(f"{problem}; give more, that differ")
    return dict(sorted(tables.items(), key=lambda item: SPLITS.index(kind_of(item[0]))))


def load_splits(config: DataConfig, wanted: Sequence[str] = SPLITS) -> Splits:
    """The splits of the kinds wanted. Raises BadInput."""
    cache_folder()
    name, config_name = config.dataset, config.dataset_config
    columns = {key: getattr(config, key) for key in ("source_column", "target_column", "task")}
    check_name(name)
    try:
        path = ASSETS / name if name in embedded() else Path(name).expanduser()
        exists = path.exists() or pair_of(path, (config.source_column, config.target_column))
        asks_hub = path.is_dir() and (config_name or has_card(path))
    except (OSError, RuntimeError) as error:
        raise BadInput(f"--dataset {name}: {error}; give a file or folder that exists") from None
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and file_format(path) not in FILE_ENDINGS
    if config_name and (path.is_file() or name in embedded()):
        problem = f"is for a data set of the Hub, not {name}"
        raise BadInput(f"--dataset-config {config_name}: {problem}; leave it out")
    if config.columns and (not exists or asks_hub or name in embedded()):
        raise BadInput(f"--columns {config.columns}: only for files of your own; leave it out")
    if exists and not asks_hub:
        splits = load_files(path, columns, config.columns)
    elif exists or is_hub_id:
        splits = load_hub(path, name, config_name, columns)
    else:
        known = ", ".join(embedded())
        raise BadInput(f"--dataset {name}: no such file or folder; embedded data sets are {known}")
    tables = splits.tables
    if not set(wanted) <= set(map(kind_of, tables)):
        if "train" not in tables:
            found = ", ".join([*tables, *splits.notes])
            raise BadInput(f"--dataset {name}: only {found}, no training split; add it")
        tables = cut_missing(tables, config.task == "classification")
    tables = {split: table for split, table in tables.items() if kind_of(split) in wanted}
    sources = {split: splits.sources.get(split, [CUT]) for split in tables}
    return Splits(tables, sources, [] if name in embedded() else splits.notes)


# ---------------------------------------------------------------------------------------- classes


def class_names(tables: dict[str, Table]) -> list[str]:
    """The labels of the training split, numbers in their order, else by alphabet.

    Raises BadInput if they will not do as classes.
    """
    names, n = tables["train"].unique("target"), len(tables["train"])
    are_numbers = all(re.fullmatch(r"-?\d{1,18}", name) for name in names)
    names = sorted(names, key=int if are_numbers else str)
    if len(names) == 1:
        raise BadInput(f"--target-column: every training sentence is {names[0]}; give two classes")
    if len(names) > max(100, n / 2):
        hint = several_in_one(names) or "name a column of classes, or --task translation"
        raise BadInput(f"--target-column: {len(names)} labels in {n} rows; {hint}")
    return names


def largest_class(table: Table) -> str:
    """The most frequent label and its share, which a model reaches that always gives it."""
    counts = table.data.column("target").value_counts().to_pylist()
    largest = max(counts, key=lambda count: count["counts"])
    return f"most frequent {largest['values'][:20]}, {largest['counts'] / len(table):.1%}"


def several_in_one(labels: list[str]) -> str:
    """A hint if labels look like lists of labels."""
    lists = [label for label in labels if re.search("[,;|]", label)]
    return f"{shorten(lists[:1])} looks like several labels, give one per row" if lists else ""


def check_labels(tables: dict[str, Table], classes: list[str]) -> None:
    """Raises BadInput with all the labels of each split that are none of the classes."""
    lines = []
    for split, table in tables.items():
        if unknown := sorted(set(table.unique("target")) - set(classes)):
            hint = several_in_one(unknown) or "remove their rows, or add some to the training split"
            labels = f"{len(unknown)} unknown labels ({shorten(unknown, 100)})"
            known = f"the model knows only {shorten(classes)}"
            lines.append(f"{split} split: {labels}; {known}; {hint}")
    if lines:
        raise BadInput(*lines)
