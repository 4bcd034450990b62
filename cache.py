"""Files in the cache of `datasets`: written once, found by a key, checked when read."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from errors import BadInput
from tables import MAX_LINE_BYTES, Row


def cache_folder() -> Path:
    """Where tables are kept. Raises BadInput if there is no place for them."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")  # as `datasets` finds its own
    home = os.environ.get("HF_HOME", os.path.join(caches, "huggingface"))
    tables = os.environ.get("HF_DATASETS_CACHE", os.path.join(home, "datasets"))
    folder = Path(os.path.expanduser(tables), "rhea")
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


def cached_file(name: str, write: Callable[[Path], None]) -> Path:
    """The cache file of that name, which write(path) makes; a damaged one is made again.

    Raises BadInput if the cache cannot be written.
    """
    file = cache_folder() / name
    scratch = Path(f"{file}.{secrets.token_hex(8)}")
    try:
        if not is_intact(file):
            write(scratch)
            scratch.replace(file)
            with open(file, "rb") as stream:
                checksum = hashlib.file_digest(stream, "sha256").hexdigest()
            scratch.write_text(checksum, encoding="ascii")
            scratch.replace(file.with_suffix(".sha256"))
    except OSError as error:
        raise cache_problem(file.parent, error) from None
    finally:
        scratch.unlink(missing_ok=True)
    return file


class Table:
    """Columns of an Arrow file, memory-mapped: what is used here of a `datasets.Dataset`, without
    the half second and 100 MB of its import."""

    def __init__(self, file: Path, fingerprint: str) -> None:
        import pyarrow

        self._fingerprint = fingerprint
        self.data = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: str | slice) -> Any:
        """The values of a column, or all columns of some rows."""
        by_name = isinstance(key, str)
        return self.data.column(key).to_pylist() if by_name else self.data[key].to_pydict()

    def iter(self, n: int) -> Iterator[dict[str, list]]:
        """The columns of at most n rows at a time."""
        for batch in self.data.to_batches(n):
            yield batch.to_pydict()

    def unique(self, name: str) -> list:
        """The values of a column, each once, in the order in which they come."""
        return self.data.column(name).unique().to_pylist()


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


def to_table(rows: Iterable[Row], key: str) -> Table:
    """The rows as a table that is written once, under a key that stands for them."""
    return Table(cached_file(f"{key}.arrow", lambda file: write_rows(rows, str(file))), key)
