"""Files and folders of sentences: which file belongs to which split, and the rows in it."""

import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from config import format_flag
from errors import BadInput

SPLITS = ("train", "validation", "test")
MAX_LINE_BYTES = 10_000_000  # a longer line is refused before it is held in memory
TABLE_FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
FORMATS = ".parquet, or .csv, .tsv, .jsonl, plain or followed by .gz"
FILE_ENDINGS = {*TABLE_FORMATS, ".json", ".txt", ".zip", ".xlsx", ".xls", ".ods", ".doc", ".docx"}

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]  # (place, row); the place names file and line for messages
FileSet = tuple[Path, ...]  # one table, or the source and the target file of parallel text


# ------------------------------------------------------------------------------- files become rows


def read_lines(name: Path | str) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end) of a UTF-8 file, plain or gzip, in flat memory.

    "-" is standard input. Raises BadInput.
    """
    number = 0
    try:
        with open(0 if name == "-" else name, "rb", closefd=name != "-") as raw:
            zipped = name != "-" and raw.peek(2)[:2] == b"\x1f\x8b"
            file = gzip.GzipFile(fileobj=raw) if zipped else raw
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
                if problem := line_problem(line, number):
                    raise BadInput(f"{name}, line {number}: {problem}")
                text = line.decode()
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except UnicodeDecodeError as error:
        place = f"{name}, line {number}, byte {error.start + 1}"
        raise BadInput(f"{place}: not UTF-8; save the file as UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        place = f"{name}, after line {number}"
        raise BadInput(f"{place}: broken gzip file ({error}); compress it again") from None
    except OSError as error:
        raise BadInput(f"{name}: {error.strerror}; give a file that can be read") from None


def line_problem(line: bytes, number: int) -> str | None:
    """Why a line cannot be read as text, if it cannot."""
    too_long = len(line) > MAX_LINE_BYTES
    if b"\0" in line:  # a binary file, or UTF-16
        return "has NUL bytes; save the file as UTF-8 text"
    if (too_long or number == 1) and b"\r" in line[:-1] and not line.endswith(b"\n"):
        return "the lines end in CR alone; save the file with LF or CRLF line ends"
    return f"longer than {MAX_LINE_BYTES:,} bytes; split or remove it" if too_long else None


def shorten(values: Iterable[str], n: int = 10) -> str:
    """Values for a message: at most n of at most 20 characters."""
    values = list(values)
    cut = [value if len(value) <= 20 else value[:20] + "…" for value in values[:n]]
    return ", ".join(cut + ["…"] * (len(values) > n))


def header_problem(names: list[str], columns: tuple[str, str], delimiter: str) -> str | None:
    """Why the first line of a csv or tsv file does not name its columns, if it does not."""
    missing = [name for name in columns if name not in names]
    spaced = any(name.strip(" \"'") in missing and name != name.strip() for name in names)
    others = [d for d in ";|\t," if d in names[0] and len(names) == 1]
    if missing and (spaced or others):
        found, shown = delimiter + " " if spaced else others[0], shorten(names)
        return f"the delimiter is {found!r}, not {delimiter!r}, in {shown}; convert the file"
    if len(missing) == 2:
        data = r"-?[\d.]+|.{31,}|(\S+\s+){3,}.*|.*[.!?]"  # a number, a sentence
        if any(re.fullmatch(data, name.strip(), re.DOTALL) for name in names):
            example = delimiter.join(columns).replace("\t", "<TAB>")
            return f"looks like data ({shorten(names)}): put a line of names on top, e.g. {example}"
        there = f"no column {columns[0]} or {columns[1]}, only {shorten(names)}"
        options = "--source-column and --target-column"
        return f"{there}; name them with {options}, or if this is data, put a line of names on top"
    twice = [name for name in names if name and names.count(name) > 1]
    return f"two columns are named {shorten(twice[:1])}; rename one" if twice else None


def read_delimited(path: Path, delimiter: str, quoted: bool, columns: tuple[str, str]) -> Rows:
    """The rows of a csv or tsv file; quoted: fields may be quoted as RFC 4180 has it."""
    quoting = {"strict": True} if quoted else {"quoting": csv.QUOTE_NONE}
    reader = csv.reader((line for _, line in read_lines(path)), delimiter=delimiter, **quoting)
    header, top, end, n_rows = [], 0, 0, 0  # a quoted field may span lines
    try:
        for values in reader:
            begin, end = end + 1, reader.line_num
            if values and not header:
                header, top = values, begin
                if problem := header_problem(header, columns, delimiter):
                    raise BadInput(f"{path}, line {top}: {problem}")
            elif len(values) not in (0, len(header)):
                n, m = len(values), len(header)
                if not n_rows and len(next(reader, [])) == n:
                    problem = f"names {m} columns, but the rows have {n} fields; fix the names"
                    raise BadInput(f"{path}, line {top}: {problem}")
                problem = f"number of fields is {n}, but line {top} names {m}; fix or remove it"
                raise BadInput(f"{path}, line {begin}: {problem}")
            elif values:
                n_rows += 1
                yield f"{path}, line {begin}", dict(zip(header, values))
    except csv.Error as error:
        reason = "a lone CR inside the line" if "new-line" in str(error) else error
        raise BadInput(f"{path}, line {end + 1}: broken csv ({reason}); fix the line") from None


def has_quoted_fields(paths: Iterable[Path]) -> bool:
    """Whether quotes delimit fields in tsv files, as RFC 4180 has it, and are not text.

    They do if in all the files every field that begins with a quote is well formed, all rows have
    as many fields as the header, and no field joins lines that could each be a row.
    """
    found = False
    for path in paths:
        lines, n_fields = [], 0  # the lines of one row
        text = (lines.append(line) or line for _, line in read_lines(path))
        try:
            for values in csv.reader(text, delimiter="\t", strict=True):
                found = found or any(line[0] == '"' or '\t"' in line for line in lines)
                n_fields = n_fields or len(values)
                joins = len(lines) > 1 and len({line.count("\t") for line in lines}) == 1
                if joins or len(values) not in (0, n_fields):
                    return False
                lines.clear()
        except csv.Error:
            return False
    return found


def unique(fields: list[tuple[str, Any]]) -> Row:
    """The fields as a dict. Raises ValueError if two have one name."""
    row = dict(fields)
    if len(row) < len(fields):
        raise ValueError("two fields of one name")
    return row


def read_jsonl(path: Path) -> Rows:
    """The rows of a file with one JSON object per line."""
    for number, line in read_lines(path):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                row = json.loads(line, object_pairs_hook=unique)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{place}: not JSON ({error}); fix or remove the line") from None
            if not isinstance(row, dict):
                raise BadInput(f'{place}: not an object such as {{"text": "fine", "label": 1}}')
            yield place, row


def read_parquet(path: Path) -> Rows:
    """The rows of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    n_rows = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            batch.validate(full=True)  # that text is UTF-8
            unique([(name, None) for name in batch.schema.names])
            for row in batch.to_pylist():
                n_rows += 1
                yield f"{path}, row {n_rows}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        if place := re.match(r"In column (\d+): .*UTF8 .* index (\d+)", reason):
            name, row = batch.schema.names[int(place[1])], n_rows + 1 + int(place[2])
            raise BadInput(f"{path}, row {row}, column {name}: not UTF-8; write it again") from None
        raise BadInput(f"{path}: no usable parquet file ({reason}); write it again") from None


def read_parallel(source: Path, target: Path, columns: tuple[str, str]) -> Rows:
    """The rows of two text files of which line n of one translates line n of the other."""
    for number, pair in enumerate(zip_longest(read_lines(source), read_lines(target)), 1):
        if None in pair:
            n, m = (sum(1 for _ in read_lines(path)) for path in (source, target))
            remedy = "line n of one must translate line n of the other"
            raise BadInput(f"{source} has {n} lines and {target} has {m}; {remedy}")
        yield f"{source}, line {number}", dict(zip(columns, (line for _, line in pair)))


def read_files(file_sets: list[FileSet], columns: tuple[str, str], tsv_files: list[Path]) -> Rows:
    """The rows of several files. tsv_files: all of the data set, which are quoted alike.

    Raises BadInput if there is no row.
    """
    csv.field_size_limit(MAX_LINE_BYTES)  # a quoted field may have many lines
    quoted, empty = has_quoted_fields(tsv_files), True
    for files in file_sets:
        form = file_format(files[0])
        if len(files) == 2:
            rows = read_parallel(*files, columns)
        elif form in (".csv", ".tsv"):
            is_csv = form == ".csv"
            rows = read_delimited(files[0], "," if is_csv else "\t", is_csv or quoted, columns)
        else:
            rows = (read_jsonl if form == ".jsonl" else read_parquet)(files[0])
        for row in rows:
            empty = False
            yield row
    if empty:
        names = [str(file) for files in file_sets for file in files]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise BadInput(f"{', '.join(names[:3])}{more}: no rows; add some or remove the file")


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
            try:
                value = column(row, name)
            except KeyError:
                if side == "source" or not optional_targets:
                    remedy = f"name one with {format_flag(side + '_column')}"
                    there = f"no column {name}, only {shorten(column_names(row))}"
                    raise BadInput(f"{place}: {there}; {remedy}") from None
                value = None
            lines = as_text(value, name, place).splitlines()
            selected[side] = " ".join(lines)
            selected["line_breaks"] |= len(lines) > 1
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


def file_format(path: Path) -> str:
    """The ending that says how to read a file: Reviews.CSV.gz -> .csv."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


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


def find_tables(folder: Path, columns: tuple[str, str]) -> tuple[dict[Path, FileSet], list[str]]:
    """Tables and parallel files by their place in a folder, and the names of all other files."""
    sides = ["." + name.lower() for name in columns]
    found: dict[Path, list[Path]] = {}
    ignored = []
    for file in sorted(folder.rglob("*")):
        inner = file.relative_to(folder)
        if file.is_dir() or any(part.startswith(".") for part in inner.parts):
            continue
        check_name(file)
        if file.is_file() and file_format(file) in (*TABLE_FORMATS, *sides):
            found.setdefault(without_format(inner), []).append(file)
        else:
            ignored.append(inner.as_posix())
    for key, files in found.items():
        formats = [file_format(file) for file in files]
        if sorted(formats) == sorted(sides):
            files.sort(key=lambda file: sides.index(file_format(file)))
        elif len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise BadInput(f"{files[0].parent}: {names} may hold the same rows; keep one of them")
        elif formats[0] not in TABLE_FORMATS:
            both = " and ".join(f"{key.name}{side}" for side in sides)
            beside = {f.name for f in files[0].parent.glob(f"{key.name}.*")} - {files[0].name}
            other = f"; beside it {shorten(sorted(beside))}" if beside else ""
            raise BadInput(
                f"--dataset {folder}: only {files[0].name}; there must be {both}{other}; name the "
                "suffixes with --source-column and --target-column"
            )
    return {key: tuple(files) for key, files in found.items()}, ignored


def find_files(path: Path, columns: tuple[str, str]) -> tuple[dict[str, list[FileSet]], list[str]]:
    """{split: its files} of a file or folder, and the names of the files that are not read.

    If no name tells a split, all files are "train". Raises BadInput where names are unclear.
    """
    if path.is_file():
        if file_format(path) not in TABLE_FORMATS:
            remedy = f"its name must end in {FORMATS}; for parallel text, give the folder"
            raise BadInput(f"--dataset {path}: not a table; {remedy}")
        named = splits_named(path.name)
        return {named.pop() if len(named) == 1 else "train": [(path,)]}, []
    found, ignored = find_tables(path, columns)
    if not found:
        sides = " and ".join("." + name for name in columns)
        raise BadInput(
            f"--dataset {path}: a folder without any table ({FORMATS}) or text files that end in "
            f"{sides}; add one, or name --source-column and --target-column"
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
