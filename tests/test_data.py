"""Reading, cutting, encoding and batching: what goes in comes out, once, and always the same."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import main
import settings
from comp_utils import BadInput
from data import (
    ASSETS,
    NO_TARGET,
    SPLITS,
    DataConfig,
    TextCodec,
    TextData,
    TokenizerConfig,
    as_codec,
    class_names,
    cut_missing,
    get_tokenizer,
    load_splits,
    pad,
    plan_epoch,
    read_tokenizer,
    share_of,
    shipped_tokenizer,
    train_tokenizer,
)

PROJECT = Path(main.__file__).parent
Rows = list[tuple[str, str]]


def load(path, **options) -> dict[str, Rows]:
    """The splits of a file or folder, as plain (sentence, label) rows."""
    splits = load_splits(DataConfig(dataset=str(path), **options))
    return {split: list(zip(t["source"], t["target"])) for split, t in splits.items()}


def everything(splits: dict[str, Rows]) -> Counter:
    return Counter(row for rows in splits.values() for row in rows)


def table(rows: Rows) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"source": [s for s, _ in rows], "target": [t for _, t in rows]}
    )


def numbered(n: int, word: str = "sentence") -> Rows:
    return [(f"{word} {i}", str(i % 2)) for i in range(n)]


def csv_text(rows: Rows, header=("text", "label")) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path: Path, columns: dict[str, list], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, **options).to_parquet(path)
    return path


# -------------------------------------------------------------------------------------- batch plans

LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=60)
PLANS = st.fixed_dictionaries(
    {
        "batch_size": st.none() | st.integers(1, 9),
        "batch_tokens": st.none() | st.integers(30, 200),  # no sentence is longer than 30
        "seed": st.integers(0, 2**40),
        "epoch": st.integers(0, 1000),
    }
)


def plan_as_lists(lengths, **arguments) -> list[list[int]]:
    return [rows.tolist() for rows in plan_epoch(np.array(lengths), **arguments)]


def fits(rows, lengths, batch_size, batch_tokens) -> bool:
    width = max(max(lengths[row]) for row in rows)
    return (batch_size is None or len(rows) <= batch_size) and (
        batch_tokens is None or len(rows) * width <= batch_tokens
    )


@given(lengths=LENGTHS, arguments=PLANS)
def test_plan_has_each_row_once_within_the_budgets(lengths, arguments):
    plan = plan_as_lists(lengths, **arguments)
    assert sorted(row for rows in plan for row in rows) == list(range(len(lengths)))
    budget = {k: arguments[k] for k in ("batch_size", "batch_tokens")}
    assert all(rows and fits(rows, lengths, **budget) for rows in plan)


@given(lengths=LENGTHS, arguments=PLANS)
def test_plan_fills_each_batch_with_rows_of_like_length(lengths, arguments):
    budget = {k: arguments[k] for k in ("batch_size", "batch_tokens")}
    plan = plan_as_lists(lengths, **arguments)
    spans = [sorted(lengths[row] for row in rows) for rows in plan]
    by_length = sorted(zip(spans, plan), key=lambda p: (p[0][0], p[0][-1], -len(p[1])))
    for (span, rows), (next_span, next_rows) in pairwise(by_length):
        assert span[-1] <= next_span[0], "like lengths lie together"
        shortest = min(next_rows, key=lambda row: lengths[row])
        assert not fits([*rows, shortest], lengths, **budget), "one more would have fitted"


@given(lengths=LENGTHS, arguments=PLANS)
def test_plan_depends_on_its_arguments_alone_and_keeps_its_number_of_batches(lengths, arguments):
    plan = plan_as_lists(lengths, **arguments)
    np.random.seed(1), torch.manual_seed(1)
    assert plan_as_lists(lengths, **arguments) == plan
    for other in ({"epoch": arguments["epoch"] + 1}, {"seed": arguments["seed"] + 1}):
        assert len(plan_as_lists(lengths, **{**arguments, **other})) == len(plan)


def test_each_epoch_and_seed_has_its_own_order_and_companions():
    lengths = [(i // 20 + 1, 1) for i in range(60)]
    plans = [
        plan_as_lists(lengths, batch_size=4, batch_tokens=None, seed=seed, epoch=epoch)
        for seed, epoch in ((0, 1), (0, 2), (1, 1), (1, 2))
    ]
    companions = [{frozenset(rows) for rows in plan} for plan in plans]
    widths = [[lengths[rows[0]] for rows in plan] for plan in plans]
    for i in range(4):
        for j in range(i):
            assert companions[i] != companions[j], "the same rows meet again"
            assert widths[i] != widths[j], "the batches come in the same order"


def test_plan_is_the_one_that_older_runs_had():
    lengths = [(5, 1), (2, 1), (9, 1), (5, 3), (3, 7), (2, 1), (8, 2), (5, 1), (3, 1), (4, 4)]
    plan = plan_as_lists(lengths, batch_size=None, batch_tokens=16, seed=3, epoch=2)
    assert plan == [[5, 1, 8], [0, 7, 3], [6], [2], [4, 9]]


# What another process must find too: the hash of a large plan, and of a new tokenizer.
FACTS = """
import hashlib, sys
import numpy as np
from data import TokenizerConfig, plan_epoch, train_tokenizer
lengths = np.array([(i * 7 % 40 + 1, i % 3 + 1) for i in range(500)])
plan = plan_epoch(lengths, batch_size=None, batch_tokens=256, seed=1, epoch=1)
texts = [f"w{i % 11} x{i % 7}{i % 5} \\u00e9{i % 3}" for i in range(300)]
tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=300)).tokenizer.to_str()
for fact in (str([rows.tolist() for rows in plan]), tokenizer):
    print(hashlib.sha256(fact.encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def facts_of_other_processes() -> list[list[str]]:
    """FACTS as found by two processes whose sets and dicts of text have another order."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", FACTS],
            cwd=PROJECT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    return [process.communicate(timeout=100)[0].split() for process in running]


@pytest.mark.parametrize("fact", [0, 1], ids=["plan", "tokenizer"])
def test_another_process_finds_the_same(fact, facts_of_other_processes, capsys):
    exec(FACTS, {})
    here = capsys.readouterr().out.split()
    first, second = facts_of_other_processes
    assert here[fact] == first[fact] == second[fact]


# ------------------------------------------------------------------------------------------ batches


@pytest.fixture
def word_codec() -> TextCodec:
    """Ids that a person can follow: <pad> 0, <s> 1, </s> 2, <unk> 3, a 4, b 5, c 6."""
    vocab = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return as_codec(tokenizer)


def text_data(codec: TextCodec, **splits_and_options) -> TextData:
    splits = {k: table(v) for k, v in splits_and_options.items() if k in SPLITS}
    options = {k: v for k, v in splits_and_options.items() if k not in SPLITS}
    return TextData(DataConfig(**{"batch_size": 8, **options}), splits, codec, ["no", "yes"])


def test_pad_fills_up_on_the_right():
    ids = pad([[7], [8, 9], []], value=5)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[7, 5], [8, 9], [5, 5]]
    assert pad([[7], [8, 9]], 0, 4).tolist() == [[7, 0, 0, 0], [8, 9, 0, 0]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_has_the_sentence_the_start_token_and_the_class(word_codec, num_workers):
    rows = [("a b c", "yes"), ("", "no"), ("c a", "yes")]
    data = text_data(word_codec, train=rows, num_workers=num_workers)
    (batch,) = data.batches("train", [np.array([2, 0, 1])], torch.device("cpu"))
    assert batch.src.tolist() == [[6, 4, 2, 0], [4, 5, 6, 2], [2, 0, 0, 0]]
    assert batch.tgt_in.tolist() == [[1], [1], [1]]
    assert batch.tgt_out.tolist() == [[1], [1], [0]]
    assert (batch.n_targets, batch.n_tokens) == (3, 3 + 4 + 1 + 3)
    assert {t.dtype for t in (batch.src, batch.tgt_in, batch.tgt_out)} == {torch.int64}


def test_pad_to_gives_every_batch_the_same_width(word_codec):
    data = text_data(word_codec, train=[("a", "yes"), ("a b", "no")], pad_to=6, max_length=6)
    batches = data.batches("train", [np.array([0]), np.array([1])], torch.device("cpu"))
    assert [batch.src.tolist() for batch in batches] == [[[4, 2, 0, 0, 0, 0]], [[4, 5, 2, 0, 0, 0]]]


def test_missing_targets_are_told_from_class_zero(word_codec):
    data = text_data(word_codec, train=[("a", "no")])
    batch = data.collate([{"src": [4, 2], "tgt": [0, 1]}, {"src": [2], "tgt": [0]}])
    assert batch.tgt_out.tolist() == [[0, 1], [0, NO_TARGET]]
    assert torch.nn.CrossEntropyLoss().ignore_index == NO_TARGET


def test_a_long_sentence_is_cut_and_keeps_its_end_token(word_codec):
    data = text_data(word_codec, train=[("a b c a b c", "yes"), ("a b", "no")], max_length=3)
    (batch,) = data.batches("train", [np.array([0, 1])], torch.device("cpu"))
    assert batch.src.tolist() == [[4, 5, 2], [4, 5, 2]]


def test_report_counts_what_was_empty_cut_unknown_and_padded(word_codec):
    train = [("a b c a", "yes"), ("", "no"), ("a ? b !", "yes"), ("a b c", "no"), ("?", "no")]
    data = text_data(word_codec, train=train, validation=[("b", "yes")], max_length=4)
    # with end tokens 5, 1, 5, 4, 2, cut to 4, 1, 4, 4, 2 of 5 x 4 positions; and 5 start tokens
    assert data.report("train") == (
        "train: 5 sentences, 22 tokens; 1 empty, 2 over 4 tokens and cut, 3 unknown tokens, "
        "20.0% padding"
    )
    assert data.report("validation").startswith("validation: 1 sentences, 3 tokens; 0 empty, 0 ov")


def test_padding_share_counts_pad_to(word_codec):
    data = text_data(word_codec, train=[("a", "yes"), ("a b c", "no")], pad_to=8, max_length=8)
    assert data.padding_share("train", data.plan("train")) == pytest.approx(1 - 8 / 18)


def test_plan_fingerprint_stands_for_ids_and_plan(word_codec):
    rows = [(w, "yes") for w in "abcabc"]

    def fingerprint(seed=0, rows=rows, **options):
        return text_data(word_codec, train=rows, **options).plan_fingerprint(seed)

    changed = [
        fingerprint(seed=1),
        fingerprint(batch_size=2),
        fingerprint(batch_size=None, batch_tokens=4),
        fingerprint(pad_to=256),
        fingerprint(rows=[*rows[:-1], ("a b", "yes")]),
    ]
    assert fingerprint() == fingerprint(num_workers=3)
    assert fingerprint() not in changed


# ------------------------------------------------------------------------------------------ readers

TRICKY = [
    ('She said "no", twice', "1"),
    ("two\nlines", "0"),
    ("caf\u00e9 \u2603 \U0001f600", "1"),
    ("it's 5' 3\"", "0"),
]
PLAIN = [
    ('a "stray quote', "1"),
    ('"begun, not ended', "0"),
    ('"all quoted"', "1"),
    ("c, d", "0"),
    ("'e'", "1"),
    ("caf\u00e9", "0"),
]


def json_lines(rows, ascii_only=False) -> str:
    objects = ({"label": int(label), "text": text} for text, label in rows)
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in objects)


FILES = {
    "csv with quotes, commas and line ends in a field": ("x.csv", csv_text(TRICKY), TRICKY),
    "csv of Windows": ("x.csv", csv_text(PLAIN).replace("\n", "\r\n"), PLAIN),
    "csv with a byte order mark": ("x.csv", "\ufeff" + csv_text(PLAIN), PLAIN),
    "csv without a last line end": ("x.csv", csv_text(PLAIN).rstrip("\n"), PLAIN),
    "csv with blank lines": ("x.csv", csv_text(PLAIN).replace("\n", "\n\n"), PLAIN),
    "csv with a big ending": ("x.CSV", csv_text(PLAIN), PLAIN),
    "tsv keeps stray quotes": (
        "x.tsv",
        "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in PLAIN),
        PLAIN,
    ),
    "tsv of Windows with a byte order mark": (
        "x.tsv",
        "\ufefftext\tlabel\r\n" + "".join(f"{text}\t{label}\r\n" for text, label in PLAIN),
        PLAIN,
    ),
    "jsonl": ("x.jsonl", json_lines(TRICKY), TRICKY),
    "jsonl escaped, of Windows, with a byte order mark and blank lines": (
        "x.jsonl",
        "\ufeff" + json_lines(TRICKY, ascii_only=True).replace("\n", "\r\n\r\n"),
        TRICKY,
    ),
}


@pytest.mark.parametrize("zipped", ["", ".gz"], ids=["plain", "gzip"])
@pytest.mark.parametrize("name, content, expected", FILES.values(), ids=FILES.keys())
def test_reader_gives_every_row(name, content, expected, zipped, tmp_path):
    padding = numbered(60)  # so that each split gets something
    write(tmp_path / "d" / f"train-0.{name}{zipped}".replace("x.", ""), content)
    write(tmp_path / "d" / "train-1.csv", csv_text(padding))
    assert everything(load("d")) == Counter(expected + padding)


def test_parquet_gives_every_row(tmp_path):
    rows = TRICKY + numbered(60)
    columns = {"text": [text for text, _ in rows], "label": [int(label) for _, label in rows]}
    write_parquet(tmp_path / "x.parquet", columns)
    assert everything(load("x.parquet")) == Counter(rows)


@pytest.mark.parametrize(
    "value, label",
    [(1, "1"), (-3, "-3"), (True, "True"), ("gut", "gut"), (" padded ", "padded")],
)
def test_labels_of_any_kind_become_names(value, label, tmp_path):
    values = [value, "other"] if isinstance(value, str) else [value, type(value)(0)]
    columns = {"text": [f"t {i}" for i in range(60)], "label": [values[i % 2] for i in range(60)]}
    write_parquet(tmp_path / "p" / "train.parquet", columns)
    lines = [json.dumps(dict(zip(columns, row))) + "\n" for row in zip(*columns.values())]
    write(tmp_path / "j" / "train.jsonl", "".join(lines))
    for folder in ("p", "j"):
        assert everything(load(folder)) == Counter(
            {(f"t {i}", label if i % 2 == 0 else str(values[1]).strip()): 1 for i in range(60)}
        )


NESTED = [
    {"translation": {"en": f"e {i}", "de": f"d {i % 2}"}, "a.b": f"flat {i}"} for i in range(60)
]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "source_column, word", [("translation.en", "e"), ("a.b", "flat")], ids=["nested", "flat"]
)
def test_a_dot_in_a_column_means_a_field_or_is_part_of_the_name(
    ending, source_column, word, tmp_path
):
    if ending == "jsonl":
        write(tmp_path / "n.jsonl", "".join(json.dumps(row) + "\n" for row in NESTED))
    else:
        write_parquet(tmp_path / "n.parquet", {k: [row[k] for row in NESTED] for k in NESTED[0]})
    columns = {"source_column": source_column, "target_column": "translation.de"}
    expected = {(f"{word} {i}", f"d {i % 2}") for i in range(60)}
    assert set(everything(load(f"n.{ending}", **columns))) == expected


def test_an_unknown_column_names_those_there_and_the_remedy(tmp_path):
    write(tmp_path / "n.jsonl", json.dumps(NESTED[0]))
    expected = r"n.jsonl, line 1: no column text, only translation.en, translation.de, a.b; .*"
    with pytest.raises(BadInput, match=expected + "--source-column"):
        load("n.jsonl")


@pytest.mark.parametrize("absent", ["", "   ", None], ids=["empty", "blank", "null"])
def test_an_absent_sentence_is_an_empty_one(absent, tmp_path):
    rows = [{"text": absent, "label": i % 2} for i in range(40)]
    rows += [{"text": f"t {i}", "label": i % 2} for i in range(60)]
    write(tmp_path / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert sum(n for (text, _), n in everything(load("train.jsonl")).items() if not text) == 40


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("name", ["with space", "caf\u00e9 \u2603", "[a] *?", "a%20b", "train#1"])
def test_any_name_will_do(name, kind, tmp_path):
    path = tmp_path / (f"{name}.csv" if kind == "file" else f"{name}/{name}.csv")
    write(path, csv_text(numbered(60)))
    assert everything(load(path if kind == "file" else path.parent)) == Counter(numbered(60))


# ---------------------------------------------------------------------------------- files to splits

LAYOUTS = [
    ("train.csv", "validation.csv", "test.csv"),
    ("train.csv", "valid.csv.gz", "test.csv"),
    ("Training.csv", "dev.csv", "TEST.csv"),
    ("train_set.csv", "val-set.csv", "test.v2.csv"),
    ("train/a.csv", "val/a.csv", "test/a.csv"),
    ("data/train-00000-of-00001.csv", "data/validation-00000-of-00001.csv", "data/test1.csv"),
]


@pytest.mark.parametrize("names", LAYOUTS, ids=lambda names: names[1])
def test_names_tell_the_split(names, tmp_path):
    expected = {split: numbered(4, word=split) for split in SPLITS}
    for name, rows in zip(names, expected.values()):
        write(tmp_path / "d" / name, csv_text(rows))
    write(tmp_path / "d" / "notes.txt", "no data")
    write(tmp_path / "d" / ".hidden.csv", "no data")
    assert load("d") == expected


def test_hub_like_parquet_folder_without_a_card(tmp_path):
    for split in SPLITS:
        rows = numbered(4, word=split)
        columns = {"text": [t for t, _ in rows], "label": [int(x) for _, x in rows]}
        write_parquet(tmp_path / "d/data" / f"{split}-00000-of-00001.parquet", columns)
    assert load("d") == {split: numbered(4, word=split) for split in SPLITS}


def test_several_files_of_one_split_are_joined(tmp_path):
    for i in range(3):
        write(tmp_path / "d" / f"train-{i}.csv", csv_text(numbered(4, word=f"part{i}")))
    for split in ("dev", "test"):
        write(tmp_path / "d" / f"{split}.csv", csv_text(numbered(2)))
    assert load("d")["train"] == [row for i in range(3) for row in numbered(4, word=f"part{i}")]


def test_files_without_split_names_are_cut(tmp_path):
    for name in ("testimony", "devices", "trainers"):  # begin like a split, and are none
        write(tmp_path / "d" / f"{name}.csv", csv_text(numbered(60, word=name)))
    splits = load("d")
    assert len(everything(splits)) == 180
    assert all(splits.values())


def test_a_file_whose_split_is_unclear_beside_named_ones_is_refused(tmp_path):
    for name in ("train", "more"):
        write(tmp_path / "d" / f"{name}.csv", csv_text(numbered(60)))
    with pytest.raises(BadInput, match=r"more.csv: begin the name with train, validation or test"):
        load("d")


@pytest.mark.parametrize(
    "there, wanted, found",
    [(("test",), ["test"], ["test"]), (("train", "test"), ["test"], ["test"])],
    ids=["test alone", "no validation"],
)
def test_testing_needs_the_test_split_alone(there, wanted, found, tmp_path):
    for split in there:
        write(tmp_path / "d" / f"{split}.csv", csv_text(numbered(3, word=split)))
    splits = load_splits(DataConfig(dataset="d"), wanted)
    assert list(splits) == found
    assert splits["test"]["source"][:] == [f"test {i}" for i in range(3)]


def test_a_changed_file_is_read_anew_and_a_moved_one_gives_the_same(tmp_path):
    path = write(tmp_path / "x.csv", csv_text(numbered(60, "old")))
    before = load(path)
    write(path, csv_text(numbered(60, "new")))  # as many bytes, and within the same second
    after = load(path)
    assert set(everything(after)) == set(numbered(60, "new"))
    moved = path.rename(tmp_path / "y.csv")
    assert load(moved) == after != before


def test_the_same_file_read_by_other_columns_is_other_data(tmp_path):
    rows = [(f"a {i}", f"b {i}", str(i % 2)) for i in range(60)]
    path = write(tmp_path / "x.csv", csv_text(rows, header=("text", "title", "label")))
    assert set(everything(load(path))) == {(a, label) for a, _, label in rows}
    assert set(everything(load(path, source_column="title"))) == {(b, x) for _, b, x in rows}


# ------------------------------------------------------------------------------ folders with a card


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


def write_table(path: Path, word: str, labels: list[int]) -> None:
    columns = {"text": [f"{word} {i}" for i in range(len(labels))], "label": labels}
    write_parquet(path, columns, features=FEATURES)


def test_a_card_tells_the_splits_and_the_names_of_the_classes(tmp_path, capsys):
    write(
        tmp_path / "carded" / "README.md",
        card(("default", {"train": "one.parquet", "dev": "two.parquet", "test": "three.parquet"})),
    )
    write_table(tmp_path / "carded/one.parquet", "t", [0, 1, 1, 0])
    write_table(tmp_path / "carded/two.parquet", "v", [1, 0])
    write_table(tmp_path / "carded/three.parquet", "x", [0, 1])
    assert load("carded") == {
        "train": [("t 0", "bad"), ("t 1", "good"), ("t 2", "good"), ("t 3", "bad")],
        "validation": [("v 0", "good"), ("v 1", "bad")],
        "test": [("x 0", "bad"), ("x 1", "good")],
    }
    assert "left out" not in capsys.readouterr().out


def test_a_split_with_labels_held_back_is_left_out_and_said(tmp_path, capsys):
    files = {s: f"{s}.parquet" for s in ("train", "validation", "test", "unsupervised")}
    write(tmp_path / "held" / "README.md", card(("default", files)))
    write_table(tmp_path / "held/train.parquet", "t", [0, 1] * 40)
    write_table(tmp_path / "held/validation.parquet", "v", [0, 1])
    write_table(tmp_path / "held/test.parquet", "x", [-1, -1])
    write_table(tmp_path / "held/unsupervised.parquet", "u", [-1, -1])
    splits = load("held")
    words = {text.split()[0] for text, _ in everything(splits)}
    assert words == {"t", "v"}, "the test split is cut from training"
    assert splits["test"] and len(splits["validation"]) == 2
    out = capsys.readouterr().out
    assert "split test is left out, for its labels are held back" in out
    assert "split unsupervised is left out" in out


def test_a_row_without_a_label_in_a_table_is_named(tmp_path):
    write(tmp_path / "partly" / "README.md", card(("default", {"train": "x.parquet"})))
    write_table(tmp_path / "partly/x.parquet", "t", [0, 1, -1] * 30)
    with pytest.raises(BadInput, match="row 3"):
        load("partly")


def test_dataset_config_chooses(tmp_path):
    configs = [(name, {"train": f"{name}.parquet"}) for name in ("first", "second")]
    write(tmp_path / "two" / "README.md", card(*configs))
    for name, _ in configs:
        write_table(tmp_path / f"two/{name}.parquet", name, [0, 1] * 40)
    for name, _ in configs:
        texts = {text for text, _ in everything(load("two", dataset_config=name))}
        assert texts == {f"{name} {i}" for i in range(80)}
    for wrong in (None, "third"):
        with pytest.raises(BadInput, match=r"'first', 'second'"):
            load("two", dataset_config=wrong)


@pytest.mark.parametrize("where", ["same place", "another folder of that name"])
def test_a_changed_table_in_a_folder_with_a_card_is_read_anew(where, tmp_path):
    folders = [tmp_path / "a/stale", tmp_path / ("a/stale" if where == "same place" else "b/stale")]
    for folder, word in zip(folders, ("old", "new")):
        write(folder / "README.md", card(("default", {"train": "x.parquet"})))
        write_table(folder / "x.parquet", f"{word} {where}", [0, 1] * 40)
        texts = {text for text, _ in everything(load(folder))}
        assert texts == {f"{word} {where} {i}" for i in range(80)}


# ------------------------------------------------------------------------------------------ the cut


def homes(splits: dict[str, datasets.Dataset]) -> dict[str, str]:
    """The split that each sentence is in."""
    return {text: split for split, texts in splits.items() for text in texts["source"]}


def test_the_cut_is_about_80_10_10():
    cut = cut_missing({"train": table(numbered(5000))})
    assert sum(len(texts) for texts in cut.values()) == 5000
    assert len(cut["test"]) == pytest.approx(500, abs=100)
    assert len(cut["validation"]) == pytest.approx(500, abs=100)


def test_a_sentence_stays_where_it_is_whatever_is_added_or_moved():
    few = homes(cut_missing({"train": table(numbered(300))}))
    rows = numbered(300) + numbered(300, word="other")
    many = homes(cut_missing({"train": table(rows[::-1])}))
    assert {text: many[text] for text in few} == few
    # On every machine and in every version:
    assert [few[f"sentence {i}"] for i in (6, 1, 9)] == ["test", "validation", "train"]
    assert share_of("caf\u00e9") == 0.3416692459009697


def test_equal_sentences_stay_together():
    rows = [(f"s {i % 100}", str(i % 2)) for i in range(1000)]
    cut = cut_missing({"train": table(rows)})
    assert sum(len(set(texts["source"])) for texts in cut.values()) == 100


@pytest.mark.parametrize("there", ["validation", "test"])
def test_a_split_that_is_there_is_left_alone_and_the_other_is_the_same_as_ever(there):
    (missing,) = {"validation", "test"} - {there}
    whole, own = table(numbered(500)), table(numbered(7, word="own"))
    cut = cut_missing({"train": whole, there: own})
    both = cut_missing({"train": whole})
    assert cut[there]["source"][:] == own["source"][:]
    assert cut[missing]["source"][:] == both[missing]["source"][:]
    assert len(cut["train"]) + len(cut[missing]) == 500


def test_nothing_is_cut_when_nothing_is_missing():
    splits = {split: table(numbered(3, word=split)) for split in SPLITS}
    assert cut_missing(splits) == splits


def test_too_few_sentences_for_a_cut_are_refused():
    with pytest.raises(BadInput, match="no sentence of 1 is left for the"):
        cut_missing({"train": table(numbered(1))})


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


@pytest.mark.parametrize(
    "labels, message",
    [(["1"] * 300, "every training sentence is 1"), (list(map(str, range(300))), "300 labels in")],
    ids=["one class", "no classes"],
)
def test_labels_that_will_not_do_as_classes_are_refused(labels, message):
    with pytest.raises(BadInput, match=message):
        class_names({"train": table([("t", label) for label in labels])})


# --------------------------------------------------------------------------------- embedded reviews


@pytest.fixture(scope="module")
def reviews() -> dict[str, datasets.Dataset]:
    return load_splits(DataConfig())


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


def test_no_embedded_review_is_in_two_splits(reviews):
    seen = [
        {"".join(c for c in text.casefold() if c.isalnum()) for text in rows["source"]}
        for rows in reviews.values()
    ]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


@pytest.mark.parametrize(
    "name, words",
    [
        ("LICENSE.MIT", "C.J. Hutto"),
        ("NOTICE", "rotten"),
    ],
)
def test_embedded_reviews_have_licence_and_notice_beside_them(name, words):
    assert words in (ASSETS / "rotten_tomatoes" / name).read_text(encoding="utf-8")


def test_padding_of_the_embedded_reviews_is_small_at_the_default_batch_size(reviews):
    options = settings.resolve({})
    config = settings.part(DataConfig, options)
    codec = get_tokenizer(
        settings.part(TokenizerConfig, options), config.dataset, reviews["train"], ["source"]
    )
    data = TextData(config, {"train": reviews["train"]}, codec, ["negative", "positive"])
    for epoch in (1, 2):
        share = data.padding_share("train", data.plan("train", seed=options.seed, epoch=epoch))
        assert 0 < share < 0.05


# --------------------------------------------------------------------------------------- tokenizers

SENTENCES = ["the good film", "the bad film", "a good, good thing", "Caf\u00e9 <pad> </s>"] * 20


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return train_tokenizer(SENTENCES, TokenizerConfig(vocab_size=300))


def test_special_tokens_of_a_new_tokenizer_are_0_to_3(codec):
    assert (codec.pad_id, codec.bos_id, codec.eos_id, codec.unk_id) == (0, 1, 2, 3)
    tokens = [codec.tokenizer.id_to_token(i) for i in range(4)]
    assert tokens == ["<pad>", "<s>", "</s>", "<unk>"]


@given(text=st.text())
@hypothesis_settings(max_examples=200)
def test_any_text_comes_back_from_its_ids(codec, text):
    (ids,) = codec.encode([text])
    expected = unicodedata.normalize("NFC", text)
    assert codec.tokenizer.decode(ids, skip_special_tokens=False) in (expected, f" {expected}")
    assert not {codec.pad_id, codec.bos_id, codec.eos_id, codec.unk_id} & set(ids)


@pytest.mark.parametrize("text", ["<pad>", "so </s> it ends", "<s><unk>", "<s>"])
def test_special_tokens_in_a_sentence_are_text(text, codec, tmp_path):
    codec.tokenizer.save("tokenizer.json")
    for c in (codec, read_tokenizer("tokenizer.json")):
        (ids,) = c.encode([text])
        assert min(ids) > 3
        assert c.tokenizer.decode(ids, skip_special_tokens=False).strip() == text


def test_composed_and_decomposed_letters_are_the_same(codec):
    composed, decomposed = codec.encode(["caf\u00e9", "cafe\u0301"])
    assert composed == decomposed


@pytest.mark.parametrize("lowercase", [False, True])
def test_lowercase_makes_no_difference_between_capitals_and_small_letters(lowercase):
    codec = train_tokenizer(SENTENCES, TokenizerConfig(vocab_size=300, lowercase=lowercase))
    small, capital = codec.encode(["a good film \u00e9", "A GOOD Film \u00c9"])
    assert (small == capital) == lowercase


@pytest.mark.parametrize("vocab_size", [260, 261, 280])
def test_vocab_size_is_honoured(vocab_size):
    codec = train_tokenizer(SENTENCES, TokenizerConfig(vocab_size=vocab_size))
    assert codec.n_vocab == vocab_size == len(codec.tokenizer.get_vocab())


def test_a_new_tokenizer_stops_when_there_is_nothing_to_merge():
    assert train_tokenizer(["ab"], TokenizerConfig(vocab_size=8000)).n_vocab < 270


def test_a_new_tokenizer_knows_words_of_the_texts_it_was_given_alone():
    train = table([("common common words", "1")] * 50)
    vocab = get_tokenizer(TokenizerConfig(), "some.csv", train, ["source"]).tokenizer.get_vocab()
    assert "\u0120common" in vocab and "\u0120film" not in vocab


def word_piece(path: str) -> None:
    """A tokenizer of other people: other names, other ids, and habits that must not matter."""
    vocab = ["film", "good", "##ish", "[UNK]", "bad", "[SEP]", "[CLS]", "the", "[PAD]"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 5), ("[CLS]", 6))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(pad_id=8, pad_token="[PAD]", length=10)
    tokenizer.save(path)


def test_a_foreign_tokenizer_is_used_with_its_own_ids(capsys):
    word_piece("tokenizer.json")
    codec = get_tokenizer(
        TokenizerConfig(tokenizer="tokenizer.json"), "some.csv", table([]), ["source"]
    )
    assert (codec.pad_id, codec.bos_id, codec.eos_id, codec.unk_id) == (8, 6, 5, 3)
    assert codec.n_vocab == 9
    assert codec.encode(["the goodish film", "dull", ""]) == [[7, 1, 2, 0], [3], []]
    assert "added" not in capsys.readouterr().err
    data = text_data(codec, train=[("good", "yes"), ("the bad film", "no")])
    (batch,) = data.batches("train", [np.array([0, 1])], torch.device("cpu"))
    assert batch.src.tolist() == [[1, 5, 8, 8], [7, 4, 0, 5]]
    assert batch.tgt_in.tolist() == [[6], [6]]


def test_a_tokenizer_without_special_tokens_gets_them(capsys):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.save("tokenizer.json")
    codec = read_tokenizer("tokenizer.json")
    assert sorted((codec.pad_id, codec.bos_id, codec.eos_id, codec.unk_id)) == [3, 4, 5, 6]
    assert codec.n_vocab == 7
    assert codec.encode(["aba"]) == [[2, 0]]
    assert [line.split()[3] for line in capsys.readouterr().err.splitlines()] == [
        "<pad>,",
        "<s>,",
        "</s>,",
        "<unk>,",
    ]


def test_a_tokenizer_that_cannot_read_a_word_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"good": 0}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save("tokenizer.json")
    with pytest.raises(BadInput):
        text_data(read_tokenizer("tokenizer.json"), train=[("good film", "yes")])


def test_an_embedded_tokenizer_is_the_one_its_training_split_gives(reviews):
    path = shipped_tokenizer("rotten_tomatoes")
    if not path.is_file():
        pytest.skip("the embedded reviews have no tokenizer beside them")
    config = replace(settings.part(TokenizerConfig, settings.resolve({})), train_tokenizer=True)
    fresh = get_tokenizer(config, "rotten_tomatoes", reviews["train"], ["source"])
    assert fresh.tokenizer.to_str() == read_tokenizer(str(path)).tokenizer.to_str()
