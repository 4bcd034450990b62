"""Files and folders of sentences: which file belongs to which split, and the rows in it."""

import os
import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from config import format_flag
from errors import BadInput
from tables import (
    TABLE_FORMATS,
    Row,
    Rows,
    file_format,
    has_quoted_fields,
    read_lines,
    read_table,
    shorten,
)

SPLITS = ("train", "validation", "test")
FORMATS = ".parquet, or .csv, .tsv, .json, .jsonl, plain or followed by .gz"
# What to do with files that are not read.
CONVERT = dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV in UTF-8")
CONVERT |= dict.fromkeys((".zip", ".bz2", ".xz", ".tar", ".7z"), "unpack it, or compress by gzip")
CONVERT |= dict.fromkeys((".tmx", ".xml"), "write a line of JSON for each pair, as .jsonl")
CONVERT |= dict.fromkeys((".doc", ".docx", ".pdf"), "save the text as .csv or .jsonl")
FILE_ENDINGS = {*TABLE_FORMATS, *CONVERT, ".txt"}
SEPARATOR = " ||| "  # between the texts of two columns a+b

# One table, the source and the target file of parallel text, or .txt files in folders of classes.
FileSet = tuple[Path, ...]


# ------------------------------------------------------------------------------- files become rows


def read_parallel(source: Path, target: Path, columns: tuple[str, str]) -> Rows:
    """The rows of two text files of which line n of one translates line n of the other."""
    for number, pair in enumerate(zip_longest(read_lines(source), read_lines(target)), 1):
        if None in pair:
            n, m = (sum(1 for _ in read_lines(path)) for path in (source, target))
            remedy = "line n of one must translate line n of the other"
            raise BadInput(f"{source} has {n} lines and {target} has {m}; {remedy}")
        yield f"{source}, line {number}", dict(zip(columns, (line for _, line in pair)))


def read_texts(files: FileSet, columns: tuple[str, str]) -> Rows:
    """A row for each file: its text, and the name of its folder, which is its class."""
    for file in files:
        text = " ".join(line.strip() for _, line in read_lines(file))
        yield str(file), dict(zip(columns, (text, file.parent.name)))


def read_files(
    file_sets: list[FileSet],
    columns: tuple[str, str],
    tsv_files: list[Path],
    names: list[str] | None = None,
) -> Rows:
    """The rows of several files. tsv_files: all of the data set, which are quoted alike. names: of
    the columns, if no line names them.

    Raises BadInput if there is no row.
    """
    quoted, empty = has_quoted_fields(tsv_files), True
    for files in file_sets:
        if file_format(files[0]) == ".txt" and not names:
            rows = read_texts(files, columns)
        elif len(files) == 2:
            rows = read_parallel(*files, columns)
        else:
            rows = read_table(files[0], columns, names, quoted=quoted)
        for row in rows:
            empty = False
            yield row
    if empty:
        paths = [str(file) for files in file_sets for file in files]
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        raise BadInput(f"{', '.join(paths[:3])}{more}: no rows; add some or remove the file")


# ------------------------------------------------------------------------------ rows become texts


def column(row: Row, name: str) -> Any:
    """row[name], or for a.b the field b of row["a"]. Raises KeyError."""
    outer, dot, inner = name.partition(".")
    if name in row or not dot:
        return row[name]
    if row[outer] is None:
        return None
    return column(row[outer], inner) if isinstance(row[outer], dict) else row[name]


def column_names(row: Row) -> list[str]:
    """The columns of a row, nested ones as a.b."""
    names = []
    for name, value in row.items():
        inner = column_names(value) if isinstance(value, dict) else []
        names += [f"{name}.{i}" for i in inner] or [name]
    return names


def as_text(value: Any, name: str, place: str) -> str:
    """A value of a column as text: a number as Python writes it, None and NaN as nothing."""
    if value is None or value != value:
        return ""
    if not isinstance(value, str | int | float):
        fields = shorten(column_names({name: value}))
        remedy = f"name a field: {fields}" if isinstance(value, dict) else "store one text per row"
        kind = type(value).__name__
        raise BadInput(f"{place}, column {name}: a value of type {kind}, not text; {remedy}")
    text = str(value).strip()
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise BadInput(f"{place}, column {name}: half of a surrogate pair; fix or remove the row")
    return text


def text_of(
    row: Row, name: str, place: str, side: str, *, is_optional: bool = False
) -> tuple[str, int]:
    """The text of a column, or of two joined, on one line, and how many it had.

    side: "source" or "target". is_optional: "" if there is no such column, else BadInput.
    """
    parts = name.split("+") if name not in row and "+" in name else [name]
    try:
        values = [column(row, part) for part in parts]
    except KeyError:
        if not is_optional:
            remedy = f"name one with {format_flag(side + '_column')}"
            there = f"no column {name}, only {shorten(column_names(row))}"
            raise BadInput(f"{place}: {there}; {remedy}") from None
        values = [None]
    texts = [as_text(value, name, place).splitlines() for value in values]
    text = SEPARATOR.join(" ".join(lines) for lines in texts) if any(texts) else ""
    return text, max(map(len, texts))


def select_columns(
    rows: Rows, source_column: str, target_column: str, task: str, *, optional_targets: bool = False
) -> Iterator[Row]:
    """{"source", "target", "line_breaks"} of each row; a line break in a text becomes a space.

    line_breaks: 1 if a text of the row had one. A missing sentence is empty. A missing label is
    refused; with optional_targets the rows may lack all of them.
    """
    unlabelled, any_label = None, False
    for place, row in rows:
        selected = {"line_breaks": 0}
        for side, name in (("source", source_column), ("target", target_column)):
            is_optional = side == "target" and optional_targets
            text, n_lines = text_of(row, name, place, side, is_optional=is_optional)
            selected[side] = text
            selected["line_breaks"] |= n_lines > 1
        if task == "classification":
            any_label = any_label or bool(selected["target"])
            unlabelled = unlabelled or (None if selected["target"] else place)
            if unlabelled and (any_label or not optional_targets):
                problem = f"the column {target_column} is empty; fill it or remove the row"
                raise BadInput(f"{unlabelled}: {problem}")
        yield selected


# ---------------------------------------------------------------------- which file is which split


def check_name(path: Path | str) -> None:
    """Raises BadInput if a file name cannot be printed and recorded."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise BadInput(f"{str(path)!a}: the name is not UTF-8; rename it") from None


def without_format(path: Path) -> Path:
    """A path without the ending that says how to read it: a/Reviews.csv.gz -> a/Reviews."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).with_suffix("")


SPLIT_WORDS = dict.fromkeys(("train", "training"), "train")
SPLIT_WORDS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SPLIT_WORDS |= dict.fromkeys(("test", "testing"), "test")


def splits_named(name: str) -> set[str]:
    """The splits that the words of a name stand for: X_train.csv, dev/a.csv, TestSet2.csv."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    words = [re.sub("(set|data)$", "", word.lower()) for word in words]
    return {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}


def name_test_sets(names: Iterable[str]) -> list[str]:
    """The split that each test set becomes: "test" if there is one alone, else "test.NAME"."""
    names = [re.sub(r"-\d+-of-\d+$", "", name) for name in names]  # the parts of one set
    short = [re.sub(r"\W+", "_", re.sub(r"^test[\W_]+", "", name)) for name in names]
    if len(set(short)) < len(set(names)):
        raise BadInput(f"{shorten(names)}: test sets of too similar names; rename one")
    return [f"test.{name}" if len(set(names)) > 1 else "test" for name in short]


def is_table(inner: Path, names: list[str] | None) -> bool:
    """Whether a file in a folder is read as a table: of .json files, which may be about the data,
    those that are named after a split."""
    form = file_format(inner)
    if form == ".json":
        return bool(splits_named(str(inner)))
    return form in TABLE_FORMATS or (form == ".txt" and bool(names))


def find_tables(
    folder: Path, columns: tuple[str, str], names: list[str] | None
) -> tuple[dict[Path, FileSet], list[str]]:
    """Tables and parallel files by their place in a folder, and the names of all other files."""
    sides = ["." + name.lower() for name in columns]
    found: dict[Path, list[Path]] = {}
    ignored = []
    for file in sorted(folder.rglob("*")):
        inner = file.relative_to(folder)
        if file.is_dir() or any(part.startswith(".") for part in inner.parts):
            continue
        check_name(file)
        if file.is_file() and (is_table(inner, names) or file_format(file) in sides):
            found.setdefault(without_format(inner), []).append(file)
        else:
            ignored.append(inner.as_posix())
    for key, files in found.items():
        formats = [file_format(file) for file in files]
        if sorted(formats) == sorted(sides):
            files.sort(key=lambda file: sides.index(file_format(file)))
        elif len(files) > 1:
            both = ", ".join(file.name for file in files)
            raise BadInput(f"{files[0].parent}: {both} may hold the same rows; keep one of them")
        elif not is_table(key.with_suffix(formats[0]), names):
            both = " and ".join(f"{key.name}{side}" for side in sides)
            beside = {f.name for f in files[0].parent.glob(f"{key.name}.*")} - {files[0].name}
            other = f"; beside it {shorten(sorted(beside))}" if beside else ""
            raise BadInput(
                f"--dataset {folder}: only {files[0].name}; there must be {both}{other}; name the "
                "suffixes with --source-column and --target-column"
            )
    return {key: tuple(files) for key, files in found.items()}, ignored


def pair_of(path: Path, columns: tuple[str, str]) -> FileSet | None:
    """Two parallel files, given one of them or what their names have in common."""
    sides = ["." + name for name in columns]
    prefix = without_format(path) if file_format(path) in map(str.lower, sides) else path
    found = []
    for side in sides:
        files = [prefix.with_name(prefix.name + side + gz) for gz in ("", ".gz")]
        found += [file for file in files if file.is_file()][:1]
    return tuple(found) if len(found) == 2 else None


def find_class_folders(folder: Path, ignored: list[str]) -> dict[Path, list[Path]]:
    """.txt files in folders that are named after their class, by the folder of the split."""
    found: dict[Path, list[Path]] = {}
    for name in [*ignored]:
        inner = Path(name)
        is_text = file_format(inner) == ".txt" and inner.parent.name
        if is_text and not splits_named(inner.parent.name):
            found.setdefault(inner.parent.parent, []).append(folder / inner)
            ignored.remove(name)
    return found


def remedy_of(path: Path) -> str:
    """What to do with a file whose name does not say how to read it."""
    with open(path, "rb") as file:
        if file.read(9) == b"__label__":  # fastText's format
            remedy = "remove each __label__, put a tab between label and text"
            return f"{remedy}, name it .tsv, and give --columns label,text"
    return f"its name must end in {FORMATS}, or .txt with --columns"


def find_files(
    path: Path, columns: tuple[str, str], names: list[str] | None = None
) -> tuple[dict[str, list[FileSet]], list[str]]:
    """{split: its files} of a file or folder, and the names of the files that are not read.

    names: of the columns, if no line names them. If no name tells a split, all files are "train".
    Raises BadInput where names are unclear.
    """
    if not path.is_dir():
        if pair := pair_of(path, columns):
            return {"train": [pair]}, []
        form = file_format(path)
        if form not in TABLE_FORMATS and not (form == ".txt" and names):
            raise BadInput(f"--dataset {path}: not a table; {CONVERT.get(form) or remedy_of(path)}")
        named = splits_named(path.name)
        return {named.pop() if len(named) == 1 else "train": [(path,)]}, []
    found, ignored = find_tables(path, columns, names)
    if not found:
        found = {key: tuple(files) for key, files in find_class_folders(path, ignored).items()}
    if not found:
        sides = " and ".join("." + name for name in columns)
        remedy = "add one, or name --source-column and --target-column"
        if any(file_format(Path(name)) == ".txt" for name in ignored):
            remedy += "; of a file for each class make one table with a column of labels"
        raise BadInput(
            f"--dataset {path}: a folder without any table ({FORMATS}) or text files that end in "
            f"{sides}; {remedy}"
        )
    named = {key: splits_named(str(key)) for key in found}
    for key, splits in named.items():
        if len(splits) > 1 or (not splits and any(named.values())):
            clear = " or ".join(sorted(splits)) or "neither train, validation nor test"
            remedy = "put one of train, validation and test into the name"
            name = found[key][0].relative_to(path)
            raise BadInput(f"--dataset {path}: {name} is {clear} by its name; {remedy}")
    by_split: dict[str, list[FileSet]] = {}
    for split in SPLITS:
        keys = [key for key in found if (named[key] or {"train"}) == {split}]
        names = name_test_sets(map(Path.as_posix, keys)) if split == "test" else [split] * len(keys)
        for name, key in zip(names, keys):
            by_split.setdefault(name, []).append(found[key])
    return by_split, ignored
