"""Data sets become splits: from files, folders with a card, the Hub; cut, cached, and named."""

import errno
import json
import os
import shutil
import socket
import time
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from helpers import (
    TINY,
    all_rows,
    as_params,
    csv_text,
    json_lines,
    load,
    numbered,
    refuse_with,
    rows_of,
    table,
    write,
    write_parquet,
)

import cache as cache_module
from cache import is_intact
from config import ASSETS, DataConfig
from errors import BadInput
from files import SPLITS
from splits import check_labels, class_names, cut_missing, largest_class, load_splits, share_of

# --------------------------------------------------------------------------------- files to splits


def test_the_summary_says_which_file_is_in_which_split():
    write("d/X_train.csv", csv_text(numbered(60)))
    write("d/X_test.csv", csv_text(numbered(2)))
    splits = load("d")
    assert splits.summary == "train: X_train.csv; validation: cut from train; test: X_test.csv"
    assert json.loads(json.dumps(splits.sources))["validation"] == ["cut from train"]


UNLABELLED = {
    "no column": csv_text([("a", "x"), ("b", "y")], header=("text", "id")),
    "empty labels": csv_text([("a", ""), ("b", "")]),
    "labels of -1": csv_text([("a", "-1"), ("b", "-1")]),
}


@pytest.mark.parametrize("content", UNLABELLED.values(), ids=UNLABELLED.keys())
@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_unlabelled_split_is_left_out_and_noted(split, content):
    write("d/train.csv", csv_text(numbered(60)))
    write(f"d/{split}.csv", content)
    for _ in range(2):  # read anew, and from the cache
        splits = load("d")
        assert splits.notes == [f"{split}.csv: left out of {split}, no row has a label"]
        assert splits.sources[split] == ["cut from train"]
    with pytest.raises(BadInput, match=f"{split}.csv: left out"):
        load(Path("d", f"{split}.csv"), [split])


def test_a_class_named_minus_1_is_a_label_where_training_has_it():
    for split, rows in {
        "train": [(f"film {i}", "1" if i % 2 else "-1") for i in range(60)],
        "test": [("c", "-1")],
    }.items():
        write(f"d/{split}.csv", csv_text(rows))
    splits = load("d")
    assert splits.sources["test"] == ["test.csv"] and splits.tables["test"]["target"] == ["-1"]


def test_labels_that_are_no_classes_are_refused_before_a_split_is_cut():
    write("x.csv", csv_text([(f"film {i}", i / 7) for i in range(300)]))
    with pytest.raises(BadInput, match="300 labels in 300 rows; name a column of classes"):
        load("x.csv")


def test_a_test_set_without_translations_is_left_out():
    write("d/train.csv", csv_text(numbered(60), header=("en", "de")))
    write("d/test.csv", csv_text([("a", ""), ("b", "")], header=("en", "de")))
    columns = {"task": "translation", "source_column": "en", "target_column": "de"}
    assert load("d", **columns).notes == ["test.csv: left out of test, no row has a de"]


def test_a_space_before_a_quote_in_csv_is_noted():
    write("train.csv", csv_text(numbered(60)) + 'good, "1"\n')
    assert "train.csv: 1 values begin and end with a quote, kept" in load("train.csv").notes


def test_an_unlabelled_training_row_is_refused():
    write("d/train.csv", csv_text([*numbered(60), ("a", "")]))
    with pytest.raises(BadInput, match=r"train.csv, line 62: the column label is empty"):
        load("d")


@pytest.mark.parametrize(
    "there", [("test",), ("train", "test")], ids=["test alone", "no validation"]
)
def test_testing_needs_the_test_split_alone(there):
    for split in there:
        write(f"d/{split}.csv", csv_text(numbered(3, word=split)))
    tables = load("d", ["test"]).tables
    assert list(tables) == ["test"]
    assert tables["test"]["source"][:] == [f"test {i}" for i in range(3)]


def test_a_changed_file_is_read_again_and_a_moved_one_gives_the_same():
    path = write("x.csv", csv_text(numbered(60, "old")))
    before = rows_of(path)
    write(path, csv_text(numbered(60, "new")))  # as many bytes, and within the same second
    after = load(path).tables
    assert set(all_rows(path)) == set(numbered(60, "new"))
    moved = path.rename("y.csv")
    assert rows_of(moved) == {s: list(zip(t["source"], t["target"])) for s, t in after.items()}
    assert rows_of(moved) != before
    prints = [[t._fingerprint for t in tables.values()] for tables in (load(moved).tables, after)]
    assert prints[0] == prints[1]


def test_the_same_file_read_by_other_columns_is_other_data():
    rows = [(f"a {i}", f"b {i}", str(i % 2)) for i in range(60)]
    path = write("x.csv", csv_text(rows, header=("text", "title", "label")))
    assert set(all_rows(path)) == {(a, label) for a, _, label in rows}
    assert set(all_rows(path, source_column="title")) == {(b, x) for _, b, x in rows}


DATASETS_REFUSED = {
    "unknown name": ("no such data", ["--dataset no such data", "rotten_tomatoes"]),
    "missing file": ("./missing.csv", ["--dataset ./missing.csv", "rotten_tomatoes"]),
    "another kind of file": ("d.txt", ["--dataset d.txt", ".csv", ".parquet"]),
    "folder without data": ("empty", ["--dataset empty", ".csv", "add one"]),
    "file of a Hub's name": ("missing.csv", ["missing.csv", "no such file"]),
    "name almost right": ("rotten-tomatoes", ["did you mean rotten_tomatoes?"]),
    "no training split": ("tests", ["--dataset tests", "only test", "no training split"]),
    "too few rows": ("few.csv", ["no sentence of 2", "give more"]),
    "no rows in the training split": ("void", ["train.csv", "no rows"]),
    "no home of that name": ("~no_such_user/x.csv", ["--dataset ~no_such_user/x.csv"]),
    "a name that is too long": ("x" * 300, ["--dataset xxx"]),
}


@pytest.mark.parametrize("dataset, words", as_params(DATASETS_REFUSED))
def test_a_data_set_that_cannot_work_is_refused(dataset, words):
    some = csv_text(numbered(60))
    files = {"d.txt": some, "empty/x.txt": "", "tests/test.csv": some, "void/train.csv": "\n"}
    for name, content in {**files, "few.csv": csv_text(numbered(2))}.items():
        write(name, content)
    with pytest.raises(BadInput) as refused:
        load(dataset)
    (line,) = refused.value.lines
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"


def test_refused_data_end_a_run_with_one_line_and_change_nothing(capsys):
    write("d.csv", csv_text(numbered(60)) + "a\n")
    refuse_with([*TINY, "--dataset", "d.csv"], ["d.csv, line 62: number of fields is 1"], capsys)


# --------------------------------------------------------------------------------------- the cache


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    middle = len(content) // 2
    spoilt = {
        "end cut off": content[:-8],
        "half": content[:middle],
        "empty": b"",
        "zeros": bytes(len(content)),
        "not UTF-8": content.replace(b"good film 7", b"good fil\xff\xfe7"),
        "other text": content.replace(b"good film 7", b"bad! film 7"),
    }
    assert spoilt[how] != content
    file.write_bytes(spoilt[how])


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "how", ["end cut off", "half", "empty", "zeros", "not UTF-8", "other text"]
)
def test_a_damaged_cache_is_built_again(how, cache):
    write("x.csv", csv_text(numbered(2500)))
    before = rows_of("x.csv")
    files = sorted(cache.rglob("*.arrow"))
    assert len(files) == 4, "all rows, and what each split takes of them"
    texts = ("not UTF-8", "other text")
    whole = [file for file in files if how not in texts or b"good film 7" in file.read_bytes()]
    for file in whole:
        damage(file, how)
        assert not is_intact(file)
    assert rows_of("x.csv") == before
    assert all(map(is_intact, files))


@pytest.mark.parametrize("how", ["end cut off", "half", "empty", "zeros"])
def test_a_damaged_cache_of_a_folder_with_a_card_is_named(how, cache):
    write("carded/README.md", card(("default", {"train": "x.parquet"})))
    write_table("carded/x.parquet", "good film", [0, 1] * 30)
    before = rows_of("carded")
    for file in cache.rglob("*.arrow"):
        damage(file, how)
    with pytest.raises(
        BadInput, match=r"cache .*rhea-\w+: damaged .*; delete the folder"
    ) as refused:
        load("carded")
    shutil.rmtree(str(refused.value).split(":")[0].removeprefix("cache "))
    assert rows_of("carded") == before


def test_a_cache_in_a_read_only_folder_is_refused(cache):
    cache.mkdir()
    cache.chmod(0o500)
    if os.access(cache, os.W_OK):
        pytest.skip("root may write anywhere")
    write("x.csv", csv_text(numbered(60)))
    with pytest.raises(BadInput, match=r"cache .*rhea: Permission denied; set HF_HOME=/a/folder"):
        load("x.csv")


def test_a_cache_that_cannot_be_a_folder_is_refused(cache):
    cache.write_text("a file")
    write("x.csv", csv_text(numbered(60)))
    with pytest.raises(BadInput, match=r"cache .*rhea: .*; set HF_HOME=/a/folder"):
        load("x.csv")


@pytest.mark.parametrize("data", ["x.csv", "carded"])
def test_a_full_disk_names_the_cache_and_leaves_nothing(data, cache, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    write("x.csv", csv_text(numbered(60)))
    write("carded/README.md", card(("default", {"train": "x.parquet"})))
    write_table("carded/x.parquet", "t", [0, 1] * 30)
    monkeypatch.setattr(cache_module, "write_rows", full)
    if data == "carded":
        monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(BadInput, match=r"cache .*: No space left on device; set HF_HOME=/a/folder"):
        load(data)
    assert not list(cache.rglob("*.arrow*"))


def test_without_a_home_no_folder_of_that_name_is_made(monkeypatch):
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", "~")  # what expanduser gives where there is none
    write("x.csv", csv_text(numbered(60)))
    with pytest.raises(BadInput, match=r"no home folder; set HF_HOME=/a/folder"):
        load("x.csv")
    assert [path.name for path in Path().iterdir()] == ["x.csv"]


# ------------------------------------------------------------------ folders with a card and the Hub


def card(*configs: tuple[str, dict[str, str]]) -> str:
    """The head of a README.md as the Hub has it: name and {split: files} of each configuration."""
    lines = ["---", "configs:"]
    for name, files in configs:
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, path in files.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    return "\n".join([*lines, "---", "# A data set", ""])


FEATURES = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
)


def write_table(path: str | Path, word: str, labels: list[int]) -> None:
    columns = {"text": [f"{word} {i}" for i in range(len(labels))], "label": labels}
    write_parquet(path, columns, features=FEATURES)


def write_card(folder: str, **tables: list[int]) -> None:
    """A folder with a card; tables: the labels of each split."""
    write(f"{folder}/README.md", card(("default", {s: f"{s}.parquet" for s in tables})))
    for split, labels in tables.items():
        write_table(f"{folder}/{split}.parquet", split, labels)


def test_a_card_tells_the_splits_and_the_names_of_the_classes():
    write_card("carded", train=[0, 1, 1, 0], dev=[1, 0], test=[0, 1])
    splits = load("carded")
    assert rows_of("carded") == {
        "train": [("train 0", "bad"), ("train 1", "good"), ("train 2", "good"), ("train 3", "bad")],
        "validation": [("dev 0", "good"), ("dev 1", "bad")],
        "test": [("test 0", "bad"), ("test 1", "good")],
    }
    assert splits.sources["validation"] == ["split dev"]
    assert splits.notes == []


def test_a_split_with_labels_held_back_is_left_out_and_noted():
    held_back = {"test": [-1, -1], "unsupervised": [-1, -1]}
    write_card("held", train=[0, 1] * 40, validation=[0, 1], **held_back)
    words = {text.split()[0] for text, _ in all_rows("held")}
    assert words == {"train", "validation"}, "the test split is cut from training"
    assert load("held").notes == [
        "split test: left out of test, no row has a label",
        "split unsupervised: left out, its name tells no use",
    ]


def test_several_test_splits_of_the_hub_are_splits_of_their_own():
    write_card("mnli", train=[0, 1], validation=[0, 1], test_matched=[0, 1], test_mismatched=[1, 0])
    assert list(load("mnli").tables) == ["train", "validation", "test.matched", "test.mismatched"]


def test_a_second_validation_split_of_the_hub_is_left_out_and_noted():
    write_card("two", train=[0, 1], validation_a=[0, 1], validation_b=[1, 0], test=[0, 1])
    splits = load("two")
    assert splits.sources["validation"] == ["split validation_a"]
    assert splits.notes == ["split validation_b: left out, validation is another"]


def test_a_row_without_a_label_in_a_table_is_named():
    write_card("partly", train=[0, 1, -1] * 30)
    with pytest.raises(BadInput, match=r"partly, train, row 3: the column label is empty"):
        load("partly")


@pytest.mark.parametrize("mark", ["[a]", "*", "?"])
def test_a_pattern_in_the_path_of_a_folder_with_a_card_is_refused(mark):
    write_card(f"d{mark}", train=[0, 1] * 40)
    with pytest.raises(BadInput, match=r"one of \[ \] \* \? in its path; rename it"):
        load(f"d{mark}")


def test_dataset_config_chooses():
    configs = [(name, {"train": f"{name}.parquet"}) for name in ("first", "second")]
    write("two/README.md", card(*configs))
    for name, _ in configs:
        write_table(f"two/{name}.parquet", name, [0, 1] * 40)
    for name, _ in configs:
        texts = {text for text, _ in all_rows("two", dataset_config=name)}
        assert texts == {f"{name} {i}" for i in range(80)}
    for wrong in (None, "third"):
        with pytest.raises(BadInput, match=r"'first', 'second'"):
            load("two", dataset_config=wrong)


@pytest.mark.parametrize("where", ["same place", "another folder of that name"])
def test_a_changed_table_in_a_folder_with_a_card_is_read_again(where):
    for folder, word in (("a", "old"), ("a" if where == "same place" else "b", "new")):
        write(f"{folder}/stale/README.md", card(("default", {"train": "x.parquet"})))
        write_table(f"{folder}/stale/x.parquet", f"{word} {where}", [0, 1] * 40)
        texts = {text for text, _ in all_rows(f"{folder}/stale")}
        assert texts == {f"{word} {where} {i}" for i in range(80)}


def test_a_list_of_labels_in_a_table_is_refused():
    write("many/README.md", card(("default", {"train": "x.parquet"})))
    write_parquet("many/x.parquet", {"text": ["a"] * 60, "label": [[0, 1]] * 60})
    with pytest.raises(BadInput, match=r"train, row 1, column label: a value of type list"):
        load("many")


@pytest.fixture
def no_network(monkeypatch):
    """A machine that resolves no name, and a library that has not been told so."""

    def unreachable(*args, **kwargs):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def test_a_hub_id_without_a_network_names_the_command_that_fetches_it(no_network):
    began = time.perf_counter()
    command = "hf download --repo-type dataset someone/reviews"
    with pytest.raises(BadInput, match=f"--dataset someone/reviews: .* {command}"):
        load("someone/reviews")
    assert time.perf_counter() - began < 60, "the libraries would try again for minutes"


# ------------------------------------------------------------------------------------------ the cut


def homes(tables: dict[str, datasets.Dataset]) -> dict[str, str]:
    """The split that each sentence is in."""
    return {text: split for split, texts in tables.items() for text in texts["source"]}


def cut(tables: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    return cut_missing(tables, classifies=True)


def test_the_cut_is_about_80_10_10():
    tables = cut({"train": table(numbered(5000))})
    assert sum(len(texts) for texts in tables.values()) == 5000
    assert len(tables["test"]) == pytest.approx(500, abs=100)
    assert len(tables["validation"]) == pytest.approx(500, abs=100)


def test_a_sentence_stays_where_it_is_whatever_is_added_or_moved():
    few = homes(cut({"train": table(numbered(300, "sentence"))}))
    rows = numbered(300, "sentence") + numbered(300, word="other")
    many = homes(cut({"train": table(rows[::-1])}))
    assert {text: many[text] for text in few} == few
    # On every machine and in every version:
    assert [few[f"sentence {i}"] for i in (6, 1, 9)] == ["test", "validation", "train"]
    assert share_of("caf\u00e9") == 0.3416692459009697


def test_equal_sentences_stay_together():
    rows = [(f"s {i % 100}", str(i % 2)) for i in range(1000)]
    tables = cut({"train": table(rows)})
    assert sum(len(set(texts["source"])) for texts in tables.values()) == 100


@pytest.mark.parametrize("there", ["validation", "test", "test.2016"])
def test_a_split_that_is_there_is_left_alone_and_the_other_is_the_same_as_ever(there):
    (missing,) = {"validation", "test"} - {there.partition(".")[0]}
    whole, own = table(numbered(500)), table(numbered(7, word="own"))
    tables = cut({"train": whole, there: own})
    both = cut({"train": whole})
    assert tables[there]["source"][:] == own["source"][:]
    assert tables[missing]["source"][:] == both[missing]["source"][:]
    assert len(tables["train"]) + len(tables[missing]) == 500


def test_nothing_is_cut_when_nothing_is_missing():
    tables = {split: table(numbered(3, word=split)) for split in SPLITS}
    assert cut(tables) == tables


def test_too_few_sentences_for_a_cut_are_refused():
    with pytest.raises(BadInput, match="no sentence of 1 is left for the"):
        cut({"train": table(numbered(1))})


def test_a_class_whose_only_row_would_be_cut_off_stays_in_training():
    rows = numbered(300, "sentence") + [(f"rare {i}", f"class {i}") for i in range(40)]
    rare = {text for text, split in homes(cut({"train": table(rows[:300])})).items()}
    tables = cut({"train": table(rows)})
    assert {f"rare {i}" for i in range(40)} <= set(tables["train"]["source"])
    assert Counter(homes(tables).values())["test"] > 10
    assert homes(tables).keys() > rare, "no row is lost"
    check_labels(tables, class_names(tables))


# ------------------------------------------------------------------------------------------ classes


@pytest.mark.parametrize(
    "labels, expected",
    [
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["b", "a", "10"], ["10", "a", "b"]),
        (["positive", "negative"], ["negative", "positive"]),
    ],
    ids=["numbers", "mixed", "words"],
)
def test_classes_are_in_the_order_of_numbers_or_of_the_alphabet(labels, expected):
    assert class_names({"train": table([("t", label) for label in labels] * 3)}) == expected


CLASSES_REFUSED = {
    "one class": (["1"] * 300, ["every training sentence is 1"]),
    "no classes": (list(map(str, range(300))), ["300 labels in 300 rows", "name a column"]),
    "several labels": ([f"a,{i}" for i in range(300)], ["300 labels", "looks like several labels"]),
}


@pytest.mark.parametrize("labels, words", as_params(CLASSES_REFUSED))
def test_labels_that_will_not_do_as_classes_are_refused(labels, words):
    with pytest.raises(BadInput) as refused:
        class_names({"train": table([("t", label) for label in labels])})
    assert all(word in str(refused.value) for word in ["--target-column", *words])


def test_all_labels_that_training_has_not_are_named_at_once():
    tables = {
        "train": table(numbered(4)),
        "validation": table([("a", "2"), ("b", "1"), ("c", "3")]),
        "test": table([("a", "joy,anger"), ("b", "0")]),
    }
    with pytest.raises(BadInput) as refused:
        check_labels(tables, ["0", "1"])
    validation, test = refused.value.lines
    assert validation.startswith("validation split: 2 unknown labels (2, 3); ")
    assert "knows only 0, 1" in validation and "remove their rows" in validation
    assert "joy,anger looks like several labels" in test


# --------------------------------------------------------------------------------- embedded reviews


@pytest.fixture(scope="module")
def reviews() -> dict[str, datasets.Dataset]:
    return load_splits(DataConfig()).tables


def test_embedded_reviews_have_their_sizes_and_are_stratified(reviews):
    assert {split: len(rows) for split, rows in reviews.items()} == {
        "train": 8454,
        "validation": 1057,
        "test": 1057,
    }
    share = {s: rows["target"][:].count("positive") / len(rows) for s, rows in reviews.items()}
    assert share["validation"] == pytest.approx(share["train"], abs=0.002)
    assert share["test"] == pytest.approx(share["train"], abs=0.002)
    for rows in reviews.values():
        assert set(rows["target"]) == {"negative", "positive"}
        assert all(text.strip() and "\ufffd" not in text for text in rows["source"])
        assert not any(rows["line_breaks"])


def test_no_embedded_review_is_in_two_splits(reviews):
    seen = [
        {"".join(c for c in text.casefold() if c.isalnum()) for text in rows["source"]}
        for rows in reviews.values()
    ]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_embedded_data_need_no_notes():
    assert load_splits(DataConfig()).notes == []
    help_texts = {"task": "translation", "source_column": "en", "target_column": "de"}
    splits = load("libreoffice_help", **help_texts)
    assert splits.notes == []
    assert any(text.endswith('"') for text in splits.tables["train"]["target"]), "quotes are text"


@pytest.mark.parametrize("name, words", [("LICENSE.MIT", "C.J. Hutto"), ("NOTICE", "rotten")])
def test_embedded_reviews_have_licence_and_notice_beside_them(name, words):
    assert words in (ASSETS / "rotten_tomatoes" / name).read_text(encoding="utf-8")


def test_json_lines_of_the_same_rows_are_the_same_data_as_csv():
    write("x.csv", csv_text(numbered(60)))
    write("x.jsonl", json_lines([{"text": t, "label": int(x)} for t, x in numbered(60)]))
    assert rows_of("x.csv") == rows_of("x.jsonl")


def test_a_cut_split_stops_growing(monkeypatch):
    write("x.csv", csv_text(numbered(1000)))
    tenths = {split: set(table["source"]) for split, table in load("x.csv").tables.items()}
    monkeypatch.setattr("splits.MOST_CUT", 20)
    capped = {split: set(table["source"]) for split, table in load("x.csv").tables.items()}
    for split in ("validation", "test"):
        assert 10 <= len(capped[split]) <= 30 and capped[split] < tenths[split]
    assert set.union(*capped.values()) == set.union(*tenths.values())


def test_the_share_of_the_largest_class_is_told():
    write("x.csv", csv_text([(f"a {i}", "yes" if i % 10 else "no") for i in range(200)]))
    table = load("x.csv").tables["train"]
    share = table["target"][:].count("yes") / len(table)
    assert largest_class(table) == f"most frequent yes, {share:.1%}" and share > 0.8
