"""Makes assets/rotten_tomatoes/ from movieReviewSnippets_GroundTruth.txt (id, mean human rating,
text; tab-separated).

The file is in the source distribution of the Python package vaderSentiment 3.3.2, inside
additional_resources/hutto_ICWSM_2014.tar.gz. Run: python assets/make_rotten_tomatoes.py FILE
"""

import gzip
import html
import random
import sys
from collections import defaultdict
from pathlib import Path

SEED = 0
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
OUT = Path(__file__).parent / "rotten_tomatoes"


def read_rows(path: str) -> list[tuple[str, str]]:
    """(text, label) of each rated snippet; a rating of exactly zero has no sign and is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        _, rating, text = line.split("\t")
        if float(rating) != 0:
            rows.append(
                (html.unescape(text).strip(), "positive" if float(rating) > 0 else "negative")
            )
    return rows


def split(rows: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Shuffled and stratified by label. Rows that differ in case, spaces and punctuation alone stay
    together."""
    same_text = defaultdict(list)
    for text, label in rows:
        same_text["".join(c for c in text.casefold() if c.isalnum())].append((text, label))
    draw = random.Random(SEED)
    splits = {name: [] for name in SHARES}
    for label in ("negative", "positive"):
        groups = [group for group in same_text.values() if group[0][1] == label]
        draw.shuffle(groups)
        start = 0.0
        for name, share in SHARES.items():
            begin, start = round(start * len(groups)), start + share
            splits[name] += [
                row for group in groups[begin : round(start * len(groups))] for row in group
            ]
    for part in splits.values():
        draw.shuffle(part)
    return splits


def write(splits: dict[str, list[tuple[str, str]]]) -> None:
    """Writes each split as gzip that is the same, byte for byte, whenever it is made."""
    OUT.mkdir(exist_ok=True)
    for name, rows in splits.items():
        text = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)
        with (
            open(OUT / f"{name}.tsv.gz", "wb") as raw,
            gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as out,
        ):
            out.write(text.encode())
        print(f"{name}: {len(rows)} rows, {sum(label == 'positive' for _, label in rows)} positive")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(split(read_rows(sys.argv[1])))
