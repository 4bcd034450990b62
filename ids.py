"""Rows of ids: encoded once, and kept in a memory-mapped file of the cache."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cache import Table, cached_file
from comp_utils import digest
from tokenization import TextCodec


class Ids:
    """Source and target ids of each row of a split, memory-mapped.

    The file begins with (n,) int64 places of the rows, (n, 2) int32 lengths and (n,) int32 counts
    of unknown tokens, so that a plan reads no ids. Those follow, in 16 bits where that suffices.
    longest: ids kept of a side; its length in the file is that before the cut.
    """

    def __init__(self, file: Path, fingerprint: str, n_rows: int, longest: int, dtype: str) -> None:
        self.fingerprint, self.longest, n = fingerprint, longest, n_rows
        data = np.asarray(np.memmap(file, np.uint8, "r"))
        self.begins = data[: 8 * n].view("<i8")
        self.lengths = data[8 * n : 16 * n].view("<i4").reshape(n, 2)
        self.n_unknown = data[16 * n : 20 * n].view("<i4")
        self.ids = data[20 * n :].view(dtype)

    def __len__(self) -> int:
        return len(self.begins)

    def pairs(self, rows: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Source and target of some rows, as views."""
        begins, lengths = self.begins[rows], np.minimum(self.lengths[rows], self.longest)
        middles = begins + lengths[:, 0]
        bounds = zip(begins.tolist(), middles.tolist(), (middles + lengths[:, 1]).tolist())
        return [(self.ids[begin:middle], self.ids[middle:end]) for begin, middle, end in bounds]


def encode(texts: Table, codec: TextCodec, longest: int, classes: list[str] | None) -> Ids:
    """The ids of a table's rows, each side cut to `longest` with its end token.

    classes: names of the labels, which become their index; None where the target is text.
    """
    key = digest(texts._fingerprint, codec.tokenizer.to_str(), longest, classes)
    dtype = "<u2" if max(codec.n_vocab, len(classes or ())) <= 2**16 else "<i4"
    arguments = (texts, codec, longest, classes, dtype)
    file = cached_file(f"{key}.ids", lambda path: write(path, *arguments))
    return Ids(file, key, len(texts), longest, dtype)


def write(
    file: Path, texts: Table, codec: TextCodec, longest: int, classes: list[str] | None, dtype: str
) -> None:
    """Writes the file of an `Ids`, 1000 rows at a time."""
    n, row, n_written = len(texts), 0, 0
    class_ids = {name: [i] for i, name in enumerate(classes or ())}
    with open(file, "wb") as out:
        for batch in texts.iter(1000):
            src, n_unknown = codec.encode_and_count(batch["source"])
            if class_ids:
                tgt, ends = [class_ids[name] for name in batch["target"]], []
            else:
                tgt, more = codec.encode_and_count(batch["target"])
                n_unknown, ends = np.add(n_unknown, more), [codec.eos_id]
            lengths = np.array([(len(s) + 1, len(t) + len(ends)) for s, t in zip(src, tgt)])
            begins = n_written + np.minimum(lengths, longest).sum(axis=1).cumsum()
            ids = []
            for s, t in zip(src, tgt):
                ids += s[: longest - 1]
                ids.append(codec.eos_id)
                ids += t[: longest - len(ends)]
                ids += ends
            width = np.dtype(dtype).itemsize
            for place, values, kind in (
                (8 * row, [n_written, *begins[:-1]], "<i8"),
                (8 * n + 8 * row, lengths, "<i4"),
                (16 * n + 4 * row, n_unknown, "<i4"),
                (20 * n + width * n_written, ids, dtype),
            ):
                out.seek(place)
                out.write(np.asarray(values, kind).tobytes())
            row, n_written = row + len(src), n_written + len(ids)
