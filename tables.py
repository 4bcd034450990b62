"""Tables: csv, tsv, json, jsonl and parquet files, and text files with columns, become rows."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from errors import BadInput

MAX_LINE_BYTES = 10_000_000  # a longer line is refused before it is held in memory
csv.field_size_limit(MAX_LINE_BYTES)  # a quoted field may have many lines
TABLE_FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
DELIMITERS = "\t,;|"  # text may have all of them, but hardly a tab

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]  # (place, row); the place names file and line for messages


def file_format(path: Path) -> str:
    """The ending that says how to read a file: Reviews.CSV.gz -> .csv."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


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


def has_column(names: Iterable[str], name: str) -> bool:
    """Whether a column is there, or for a+b both."""
    return name in names or ("+" in name and {*name.split("+")} <= {*names})


def header_problem(names: list[str], columns: tuple[str, ...], delimiter: str) -> str | None:
    """Why the first line of a csv or tsv file does not name its columns, if it does not."""
    others = [d for d in ";|\t," if d in names[0] and len(names) == 1]
    if others and not any(has_column(names[0].split(others[0]), name) for name in columns):
        names, others = names[0].split(others[0]), []
    missing = [name for name in columns if not has_column(names, name)]
    spaced = any(name.strip(" \"'") in missing and name != name.strip() for name in names)
    if missing and (spaced or others):
        found, shown = delimiter + " " if spaced else others[0], shorten(names)
        return f"the delimiter is {found!r}, not {delimiter!r}, in {shown}; convert the file"
    if len(missing) == len(columns):
        data = r"-?[\d.]+|.{31,}|(\S+\s+){3,}.*|.*[.!?]"  # a number, a sentence
        if any(re.fullmatch(data, name.strip(), re.DOTALL) for name in names):
            example = delimiter.join(columns).replace("\t", "<TAB>")
            return f"looks like data ({shorten(names)}): put a line of names on top, e.g. {example}"
        there = f"no column {' or '.join(columns)}, only {shorten(names)}"
        options = " and ".join(("--source-column", "--target-column")[: len(columns)])
        return f"{there}; name them with {options}, or if this is data, put a line of names on top"
    twice = [name for name in names if name and names.count(name) > 1]
    return f"two columns are named {shorten(twice[:1])}; rename one" if twice else None


def delimiter_of(path: Path, columns: tuple[str, ...], names: list[str] | None) -> str:
    """The delimiter of a csv file: the comma if it gives the first line the columns; else the first
    that does, and gives each line as many fields. names: of the columns, if no line has them: then
    each line must have so many fields."""
    if not names and fits(path, ",", columns, names, n_rows=1):
        return ","
    return next((d for d in DELIMITERS if fits(path, d, columns, names)), ",")


def fits(
    path: Path,
    delimiter: str,
    columns: tuple[str, ...],
    names: list[str] | None,
    n_rows: int | None = None,
) -> bool:
    """Whether a delimiter cuts all lines of a file, or the first ones, into the columns."""
    lines = (line for _, line in read_lines(path))
    try:
        rows = filter(None, csv.reader(lines, delimiter=delimiter, strict=True))
        first = next(rows, [])
        if not names and not all(has_column(first, name) for name in columns):
            return False
        n, rows = len(names or first), islice(rows, n_rows and n_rows - 1)
        return len(first) == n and all(len(row) == n for row in rows)
    except csv.Error:
        return False


def read_delimited(
    path: Path, delimiter: str, quoted: bool, columns: tuple[str, ...], names: list[str] | None
) -> Rows:
    """The rows of a csv or tsv file; quoted: fields may be quoted as RFC 4180 has it.

    names: of the columns, if the first line does not name them; "_" is a column to leave out.
    """
    quoting = {"strict": True} if quoted else {"quoting": csv.QUOTE_NONE}
    reader = csv.reader((line for _, line in read_lines(path)), delimiter=delimiter, **quoting)
    header, top, end, n_rows = names or [], 0, 0, 0  # a quoted field may span lines
    try:
        for values in reader:
            begin, end = end + 1, reader.line_num
            values = values or [""] * (len(header) == 1)  # a blank line is a field of one column
            if names and values and len(values) != len(names):
                problem = f"number of fields is {len(values)}, but --columns names {len(names)}"
                raise BadInput(f"{path}, line {begin}: {problem}; fix one of the two")
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


def read_json(path: Path) -> Rows:
    """The rows of a file with one JSON array of objects, or with one object per line."""
    lines = (line for _, line in read_lines(path))
    if not next((line for line in lines if line.strip()), "").lstrip().startswith("["):
        yield from read_jsonl(path)
        return
    try:
        rows = json.loads("".join(line for _, line in read_lines(path)), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error}); fix the file") from None
    for number, row in enumerate(rows, 1):
        place = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise BadInput(f'{place}: not an object such as {{"text": "fine", "label": 1}}')
        yield place, row


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


def read_table(
    path: Path, columns: tuple[str, ...], names: list[str] | None = None, *, quoted: bool = False
) -> Rows:
    """The rows of a table. columns: that it must have. names: of the columns of a file without a
    line that names them. quoted: whether the fields of a tsv file may be."""
    form = file_format(path)
    readers = {".json": read_json, ".jsonl": read_jsonl, ".parquet": read_parquet}
    if form in readers:
        if names:
            raise BadInput(f"--columns: {path} names its columns itself; leave it out")
        return readers[form](path)
    delimiter = "\t" if form == ".tsv" else delimiter_of(path, columns, names)
    return read_delimited(path, delimiter, form != ".tsv" or quoted, columns, names)
