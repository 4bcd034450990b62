"""The yardstick for the accuracy on rotten_tomatoes: multinomial naive Bayes on binary words.

Run: python assets/naive_bayes.py
"""

import csv
import gzip
import math
import re
from collections import Counter
from pathlib import Path


def read(split: str) -> list[tuple[set[str], str]]:
    """(lower-cased words of two letters or more, label) of each sentence."""
    with gzip.open(Path(__file__).parent / "rotten_tomatoes" / f"{split}.tsv.gz", "rt") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(set(re.findall(r"\w\w+", row["text"].lower())), row["label"]) for row in rows]


def main() -> None:
    """Prints the accuracy on validation and test split, with add-one smoothing."""
    train = read("train")
    labels = Counter(label for _, label in train)
    counts = {
        label: Counter(w for words, x in train if x == label for w in words) for label in labels
    }
    vocabulary = set().union(*counts.values())

    def log_probability(words: set[str], label: str) -> float:
        n = counts[label].total() + len(vocabulary)
        known = words & vocabulary
        return math.log(labels[label]) + sum(math.log((counts[label][w] + 1) / n) for w in known)

    for split in ("validation", "test"):
        rows = read(split)
        hits = sum(max(labels, key=lambda x: log_probability(words, x)) == y for words, y in rows)
        print(f"{split}: {hits / len(rows):.2%} of {len(rows)}")


if __name__ == "__main__":
    main()
