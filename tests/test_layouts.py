"""Folders of files: which file is which split, which two are parallel."""

import gzip
import itertools
import os
from collections import Counter
from pathlib import Path

import pytest
from helpers import all_rows, csv_text, load, numbered, rows_of, write, write_files

from errors import BadInput
from files import SPLITS

LAYOUTS = [
    ("train.csv", "validation.csv", "test.csv"),
    ("train.csv", "valid.csv.gz", "test.csv"),
    ("Training.csv", "dev.csv", "TEST.csv"),
    ("train_set.csv", "val-set.csv", "test.v2.csv"),
    ("train/a.csv", "val/a.csv", "test/a.csv"),
    ("data/train-00000-of-00001.csv", "data/validation-00000-of-00001.csv", "data/test1.csv"),
    ("X_train.csv", "X_valid.csv", "X_test.csv"),
    ("sst2-train.csv", "sst2.dev.csv", "sst2-test.csv"),
    ("XTrain.csv", "XDev.csv", "XTest.csv"),
    ("trainset.csv", "devset.csv", "testdata.csv"),
    ("train/pos/a.csv", "dev/pos/a.csv", "test/pos/a.csv"),
]


@pytest.mark.parametrize("names", LAYOUTS, ids=lambda names: names[1])
def test_names_tell_the_split(names):
    expected = {split: numbered(4, word=split) for split in SPLITS}
    for name, rows in zip(names, expected.values()):
        write(Path("d", name), csv_text(rows))
    write("d/.hidden.csv", "no data")
    assert rows_of("d") == expected
    splits = load("d")
    assert splits.sources == {split: [name] for split, name in zip(SPLITS, names)}
    assert splits.notes == []


def test_several_files_of_one_split_are_joined():
    for i in range(3):
        write(f"d/train-{i}.csv", csv_text(numbered(4, word=f"part{i}")))
    for split in ("dev", "test"):
        write(f"d/{split}.csv", csv_text(numbered(2)))
    assert rows_of("d")["train"] == [row for i in range(3) for row in numbered(4, word=f"part{i}")]


def test_several_test_sets_are_splits_of_their_own_and_the_parts_of_one_are_not():
    for name in ("train", "dev", "test_2016_flickr", "test/2017"):
        write(f"d/{name}.csv", csv_text(numbered(2, word=name)))
    for i in range(2):
        write(f"d/news-test-0000{i}-of-00002.csv", csv_text(numbered(1, word=f"part{i}")))
    splits = load("d")
    assert splits.sources == {
        "train": ["train.csv"],
        "validation": ["dev.csv"],
        "test.news_test": [f"news-test-0000{i}-of-00002.csv" for i in range(2)],
        "test.2017": ["test/2017.csv"],
        "test.2016_flickr": ["test_2016_flickr.csv"],
    }
    assert splits.tables["test.news_test"]["source"][:] == ["part0 0", "part1 0"]
    assert list(load("d", ["test"]).tables) == list(splits.tables)[2:]


def test_files_without_split_names_are_cut():
    for name in ("testimony", "devices", "trainers"):  # begin like a split, and are none
        write(f"d/{name}.csv", csv_text(numbered(60, word=name)))
    rows = rows_of("d")
    assert sum(map(len, rows.values())) == 180
    assert all(rows.values())
    assert load("d").sources["test"] == ["cut from train"]


@pytest.mark.parametrize(
    "names, words",
    [
        (["train", "more"], "more.csv is neither train, validation nor test by its name"),
        (["train", "test_train"], "test_train.csv is test or train by its name"),
        (["train", "dev/test"], "dev/test.csv is test or validation by its name"),
    ],
    ids=["none", "two", "two with the folder"],
)
def test_a_file_whose_split_is_unclear_beside_named_ones_is_refused(names, words):
    for name in names:
        write(f"d/{name}.csv", csv_text(numbered(60)))
    with pytest.raises(BadInput, match=words):
        load("d")


def test_a_file_alone_is_taken_whole_if_its_name_tells_two_splits():
    write("train_test.csv", csv_text(numbered(60)))
    assert all_rows("train_test.csv") == Counter(numbered(60))


@pytest.mark.parametrize("name", ["info.json", "test.txt", "notes/README.md", "link.csv"])
def test_what_is_not_read_is_named(name):
    write("d/train.csv", csv_text(numbered(60)))
    if name == "link.csv":
        Path("d", name).symlink_to("nowhere.csv")
    else:
        write(f"d/{name}", "x")
    splits = load("d")
    assert splits.notes == [f"{name}: not read"]
    assert splits.sources["test"] == ["cut from train"]


def parallel(source: str = "en", target: str = "de") -> dict[str, list[tuple[str, str]]]:
    columns = {"source_column": source, "target_column": target}
    return rows_of("d", task="translation", **columns)


@pytest.mark.parametrize(
    "names",
    [
        ["train.csv", "train.csv.gz"],
        ["train.csv", "train.tsv"],
        ["train.en", "train.en.gz", "train.de"],
    ],
    ids=lambda names: names[1],
)
def test_one_name_twice_is_refused(names):
    for name in names:
        write(f"d/{name}", csv_text(numbered(60)))
    with pytest.raises(BadInput) as refused:
        parallel()
    assert ", ".join(sorted(names)) + " may hold the same rows; keep one" in str(refused.value)


@pytest.mark.parametrize(
    "source, target",
    [
        ("train.en", "train.de"),
        ("Corpus.de-en.en", "Corpus.de-en.de"),
        ("europarl-v7.de-en.en.gz", "europarl-v7.de-en.de"),
        ("a/train.EN", "a/train.De.GZ"),
    ],
)
def test_the_last_suffix_tells_the_side_of_parallel_files(source, target):
    english, german = ([f"{word} {i}" for i in range(60)] for word in ("house", "Haus"))
    for name, lines in ((source, english), (target, german)):
        content = "\n".join(lines).encode()
        write_files(
            {f"d/{name}": gzip.compress(content) if name[-3:].lower() == ".gz" else content}
        )
    assert set(itertools.chain(*parallel().values())) == set(zip(english, german))


def test_parallel_files_are_read_in_either_direction():
    for split in ("train", "val", "test"):
        write(f"d/{split}.en", f"{split} one\n\nthree\n")
        write(f"d/{split}.de.gz", f"{split} eins\nzwei\ndrei \u00df\n")
    pairs = [("val one", "val eins"), ("", "zwei"), ("three", "drei \u00df")]
    assert parallel()["validation"] == pairs
    assert parallel(source="de", target="en")["validation"] == [(t, s) for s, t in pairs]


@pytest.mark.parametrize(
    "english, german, words",
    [
        ("a\na\na\n", "a\na\n", r"train.en has 3 lines and .*train.de has 2"),
        ("a\na\n", "a\na\na\n", r"train.en has 2 lines and .*train.de has 3"),
        ("a\n", None, r"only train.en; there must be train.en and train.de"),
    ],
    ids=["target too short", "target too long", "no target"],
)
def test_parallel_files_that_do_not_match_are_refused(english, german, words):
    write("d/train.en", english)
    if german:
        write("d/train.de", german)
    with pytest.raises(BadInput, match=words):
        parallel()


def test_a_side_is_named_as_the_user_spells_it():
    write("d/train.bn", "\n".join(f"s {i}" for i in range(60)))
    write("d/train.pt_BR", "\n".join(f"t {i}" for i in range(60)))
    pairs = itertools.chain(*parallel("bn", "pt_BR").values())
    assert set(pairs) == {(f"s {i}", f"t {i}") for i in range(60)}


def test_a_line_break_inside_a_line_of_parallel_text_keeps_the_lines_parallel():
    write("d/train.en", "\n".join(f"a\u2028b\r{i}" for i in range(60)))
    write("d/train.de", "\n".join(f"c {i}" for i in range(60)))
    pairs = itertools.chain(*parallel().values())
    assert set(pairs) == {(f"a b {i}", f"c {i}") for i in range(60)}


@pytest.mark.parametrize("inside", [True, False], ids=["file", "folder"])
def test_a_name_that_is_not_utf8_is_refused(inside):
    folder = os.fsdecode(b"d" if inside else b"d\xff")
    name = os.fsdecode(b"caf\xe9.csv") if inside else "train.csv"
    write(f"{folder}/{name}", csv_text(numbered(60)))
    with pytest.raises(BadInput, match=r"udc(e9|ff).*: the name is not UTF-8; rename it"):
        load(folder)
