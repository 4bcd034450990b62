"""Tables in the cache of `datasets`: written once, found by a key, checked when read."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from errors import BadInput
from tables import MAX_LINE_BYTES, Row

if TYPE_CHECKING:  # costs a second to import, so it is imported where it is used
    from datasets import Dataset


def cache_folder() -> Path:
    """Where tables are kept. Raises BadInput if there is no place for them."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE, "rhea")
    try:
        if str(folder).startswith("~"):
            raise OSError("no home folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cache_problem(folder, error) from None
    return folder


def cache_problem(folder: Path, error: OSError) -> BadInput:
    """What to do if the cache cannot be written."""
    reason = os.strerror(error.errno) if error.errno else str(error)[:200]
    return BadInput(f"cache {folder}: {reason}; set HF_HOME=/a/folder with room that you can write")


def is_whole(file: Path | str) -> bool:
    """Whether an Arrow file is neither cut nor overwritten."""
    import pyarrow
    from datasets.table import MemoryMappedTable

    try:
        MemoryMappedTable.from_file(str(file)).validate(full=True)
        with open(file, "rb") as stream:  # Arrow takes a file without its end for a shorter one
            stream.seek(-8, os.SEEK_END)
            return stream.read() == b"\xff\xff\xff\xff\0\0\0\0"
    except (OSError, ValueError, pyarrow.ArrowException):
        return False


def is_intact(file: Path) -> bool:
    """Whether a cache file is the one whose checksum was written beside it."""
    try:
        with open(file, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        return file.with_suffix(".sha256").read_text(encoding="ascii") == found
    except (OSError, ValueError):
        return False


def cached_table(key: str, build: Callable[[str], "Dataset"]) -> "Dataset":
    """The table that build(file) keeps in the cache file of that key; a damaged one is built again.

    Raises BadInput if the cache cannot be written.
    """
    file = cache_folder() / f"{key}.arrow"
    try:
        if is_intact(file):
            return build(str(file))
        file.unlink(missing_ok=True)
        table = build(str(file))
        scratch = Path(f"{file}.{secrets.token_hex(8)}")
        with open(file, "rb") as stream:
            scratch.write_text(hashlib.file_digest(stream, "sha256").hexdigest(), encoding="ascii")
        scratch.replace(file.with_suffix(".sha256"))
        return table
    except OSError as error:
        raise cache_problem(file.parent, error) from None


def write_rows(rows: Iterable[Row], file: str) -> None:
    """Writes rows of source, target and line_breaks to an Arrow file, in flat memory."""
    import pyarrow

    types = {"source": pyarrow.string(), "target": pyarrow.string(), "line_breaks": pyarrow.int8()}
    schema = pyarrow.schema(types)
    with pyarrow.OSFile(file, "wb") as out, pyarrow.ipc.new_stream(out, schema) as stream:
        batch, size = [], 0
        for row in rows:
            batch.append(row)
            size += len(row["source"]) + len(row["target"])
            if len(batch) == 1000 or size > MAX_LINE_BYTES:
                stream.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))
                batch, size = [], 0
        stream.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))


def to_table(rows: Iterable[Row], key: str) -> "Dataset":
    """The rows as a table that is written once, under a key that stands for them."""
    import datasets

    def build(file: str) -> "Dataset":
        scratch = Path(f"{file}.{secrets.token_hex(8)}")
        try:
            if not os.path.exists(file):
                write_rows(rows, str(scratch))
                scratch.replace(file)
        finally:
            scratch.unlink(missing_ok=True)
        return datasets.Dataset(datasets.table.MemoryMappedTable.from_file(file), fingerprint=key)

    return cached_table(key, build)
