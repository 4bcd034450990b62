"""Files become rows: what goes in comes out, once, or is refused with its place."""

import gzip
import io
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers import (
    all_rows,
    as_params,
    csv_text,
    json_lines,
    load,
    numbered,
    write,
    write_files,
    write_parquet,
)

from config import DataConfig
from errors import BadInput
from files import select_columns
from tables import MAX_LINE_BYTES, has_quoted_fields, read_lines

# ------------------------------------------------------------------------------------------ readers

QUOTED = [
    ('She said "no", twice', "1"),
    ("two\nlines", "0"),
    ("caf\u00e9 \u2603 \U0001f600", "1"),
    ("it's 5' 3\"", "0"),
]
AS_READ = [(text.replace("\n", " "), label) for text, label in QUOTED]
PLAIN = [
    ('a "stray quote', "1"),
    ('"begun, not ended', "0"),
    ('"all quoted"', "1"),
    ("c, d", "0"),
    ("'e'", "1"),
    ("caf\u00e9", "0"),
]
RAW_TSV = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in PLAIN)
JSON = [{"label": int(label), "text": text} for text, label in QUOTED]

FILES = {
    "csv with quotes, commas and line breaks in a field": ("csv", csv_text(QUOTED), AS_READ),
    "csv of Windows": ("csv", csv_text(PLAIN).replace("\n", "\r\n"), PLAIN),
    "csv with a byte order mark": ("csv", "\ufeff" + csv_text(PLAIN), PLAIN),
    "csv without a last line end": ("csv", csv_text(PLAIN).rstrip("\n"), PLAIN),
    "csv with blank lines": ("csv", csv_text(PLAIN).replace("\n", "\n\n"), PLAIN),
    "csv with a big ending": ("CSV", csv_text(PLAIN), PLAIN),
    "csv with unnamed columns": ("csv", "text,label,,\na,1,,\nb,0,,\n", [("a", "1"), ("b", "0")]),
    "tsv with stray quotes": ("tsv", RAW_TSV, PLAIN),
    "tsv of Windows with a byte order mark": (
        "tsv",
        "\ufeff" + RAW_TSV.replace("\n", "\r\n"),
        PLAIN,
    ),
    "jsonl": ("jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in JSON), AS_READ),
    "jsonl escaped, of Windows, with a byte order mark and blank lines": (
        "jsonl",
        "\ufeff" + json_lines(JSON).replace("\n", "\r\n\r\n"),
        AS_READ,
    ),
}


@pytest.mark.parametrize("zipped", ["", ".gz"], ids=["plain", "gzip"])
@pytest.mark.parametrize("ending, content, expected", FILES.values(), ids=FILES.keys())
def test_reader_gives_every_row(ending, content, expected, zipped):
    write(f"d/train-0.{ending}{zipped}", content)
    write("d/train-1.csv", csv_text(numbered(60)))  # so that each split gets something
    assert all_rows("d") == Counter(expected + numbered(60))


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_json_array_and_json_lines_give_every_row(ending):
    rows = [{"text": text, "label": int(label)} for text, label in QUOTED + numbered(60)]
    write("x.json", json.dumps(rows, indent=1) if ending == "json" else json_lines(rows))
    assert all_rows("x.json") == Counter(AS_READ + numbered(60))


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_a_delimiter_that_alone_fits_each_line_is_used_and_named(delimiter):
    rows = [("one, two, three", "1"), *numbered(60)]
    write("x.csv", csv_text(rows, delimiter=delimiter))
    assert all_rows("x.csv") == Counter(rows)
    (note,) = load("x.csv").notes
    assert note.startswith(f"x.csv: the delimiter is {delimiter!r}")


def test_a_comma_in_each_text_is_no_delimiter_beside_a_tab():
    rows = [(f"film {i}, fine", str(i % 2)) for i in range(60)]
    write("x.txt", "".join(f"{label}\t{text}\n" for text, label in rows))
    assert all_rows("x.txt", columns="label,text") == Counter(rows)


@pytest.mark.parametrize("name, delimiter", [("x.csv", ","), ("x.txt", "\t"), ("x.tsv", "\t")])
def test_columns_names_what_no_line_names(name, delimiter):
    rows = [(label, text, "id") for text, label in numbered(60)]
    write(name, csv_text(rows, header=rows.pop(0), delimiter=delimiter))
    assert all_rows(name, columns="label,text,_") == Counter(numbered(60))
    with pytest.raises(BadInput, match=r"line 1: number of fields is \d, but --columns names 2"):
        load(name, columns="label,text")
    assert DataConfig(columns="_,text,_").problems() == []
    assert "text is there twice" in DataConfig(columns="text,text").problems()[0]
    write("x.jsonl", json_lines([{"text": "a", "label": 1}]))
    with pytest.raises(BadInput, match=r"x\.jsonl names its columns itself"):
        load("x.jsonl", columns="text,label")


def test_folders_of_classes_give_a_row_for_each_file():
    for split, n in (("train", 60), ("test", 9)):
        for i in range(n):
            write(f"d/{split}/{('neg', 'pos')[i % 2]}/{i}.txt", f"{split} film {i}\nfine\n")
    write("d/train/urls_pos.txt", "x")
    write("d/README", "x")
    splits = load("d")
    assert splits.notes == ["README, train/urls_pos.txt: not read"]
    assert set(splits.tables["test"]["target"]) == {"neg", "pos"}
    expected = [(f"train film {i} fine", ("neg", "pos")[i % 2]) for i in range(60)]
    expected += [(f"test film {i} fine", ("neg", "pos")[i % 2]) for i in range(9)]
    assert all_rows("d") == Counter(expected)


@pytest.mark.parametrize("name", ["d/corpus.en", "d/corpus.de", "d/corpus"])
def test_a_parallel_file_or_a_prefix_finds_its_partner(name):
    pairs = [(f"e {i}", f"d {i}") for i in range(60)]
    for side, texts in zip(("en", "de"), zip(*pairs)):
        write(f"d/corpus.{side}" + ".gz" * (side == "de"), "\n".join(texts) + "\n")
    write("d/other.en", "x")
    name += ".gz" * name.endswith(".de")
    columns = {"source_column": "en", "target_column": "de", "task": "translation"}
    assert all_rows(name, **columns) == Counter(pairs)


def test_two_columns_are_joined():
    rows = [("head", f"body {i}", str(i % 2)) for i in range(60)]
    write("x.csv", csv_text(rows, header=("title", "text", "label")))
    expected = [(f"head ||| body {i}", str(i % 2)) for i in range(60)]
    assert all_rows("x.csv", source_column="title+text") == Counter(expected)
    with pytest.raises(BadInput, match=r"no column title\+missing, only title, text, label"):
        load("x.csv", source_column="title+missing", target_column="label")


@pytest.mark.parametrize(
    "name, words",
    [("x.xlsx", "save the sheet as CSV"), ("x.zip", "unpack it"), ("x.tmx", "a line of JSON")],
)
def test_what_is_out_of_scope_says_what_to_convert_to(name, words):
    write(name, "x")
    with pytest.raises(BadInput, match=words):
        load(name)


def test_other_layouts_of_labels_say_what_to_make_of_them():
    write("x.txt", "".join(f"__label__{'pos' if i % 2 else 'neg'} film {i}\n" for i in range(60)))
    with pytest.raises(BadInput, match=r"put a tab .*, name it .tsv, and give --columns label"):
        load("x.txt")
    text = Path("x.txt").read_text(encoding="utf-8").replace("__label__", "").splitlines()
    write("x.tsv", "".join(line.replace(" ", "\t", 1) + "\n" for line in text))
    found = all_rows("x.tsv", columns="label,text")
    assert len(found) == 60 and found["film 7", "pos"] == 1
    for name in ("pos", "neg"):
        write(f"folder/{name}.txt", "a line\n")
    with pytest.raises(BadInput, match="of a file for each class make one table"):
        load("folder")


def test_parquet_gives_every_row():
    rows = QUOTED + numbered(1500)  # more than one batch
    columns = {"text": [text for text, _ in rows], "label": [int(label) for _, label in rows]}
    write_parquet("x.parquet", columns)
    assert all_rows("x.parquet") == Counter(AS_READ + numbered(1500))


NESTED = [
    {"translation": {"en": f"e {i}", "de": f"d {i % 2}"}, "a.b": f"flat {i}"} for i in range(60)
]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "source_column, word", [("translation.en", "e"), ("a.b", "flat")], ids=["nested", "flat"]
)
def test_a_dot_in_a_column_means_a_field_or_is_part_of_the_name(ending, source_column, word):
    if ending == "jsonl":
        write("n.jsonl", json_lines(NESTED))
    else:
        write_parquet("n.parquet", {k: [row[k] for row in NESTED] for k in NESTED[0]})
    columns = {"source_column": source_column, "target_column": "translation.de"}
    expected = {(f"{word} {i}", f"d {i % 2}") for i in range(60)}
    assert set(all_rows(f"n.{ending}", **columns)) == expected


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("name", ["with space", "caf\u00e9 \u2603", "[a] *?", "a%20b", "train#1"])
def test_any_name_will_do(name, kind):
    path = write(f"{name}.csv" if kind == "file" else f"{name}/{name}.csv", csv_text(numbered(60)))
    assert all_rows(path if kind == "file" else path.parent) == Counter(numbered(60))


def test_a_gzip_bomb_of_one_line_is_refused_before_it_is_held_in_memory():
    with gzip.open("x.jsonl.gz", "wb") as out:
        for _ in range(6):
            out.write(b"a" * MAX_LINE_BYTES)
    tracemalloc.start()
    with pytest.raises(BadInput, match=r"x.jsonl.gz, line 1: longer than 10,000,000 bytes"):
        list(read_lines("x.jsonl.gz"))
    assert tracemalloc.get_traced_memory()[1] < 4 * MAX_LINE_BYTES
    tracemalloc.stop()


# ------------------------------------------------------------------------------------------- values


def selected(rows: list[dict], task: str = "classification", **options) -> list[dict]:
    placed = ((f"row {i}", row) for i, row in enumerate(rows, 1))
    return list(select_columns(placed, "text", "label", task, **options))


LINE_BREAKS = ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize("mark", LINE_BREAKS, ids=ascii)
def test_a_line_break_inside_a_text_becomes_a_space_and_is_counted(mark):
    rows = [{"text": f"one{mark}two", "label": "a"}, {"text": f"{mark}one{mark}", "label": "b"}]
    rows += [{"text": "one", "label": f"c{mark}d"}]
    expected = [("one two", "a", 1), ("one", "b", 0), ("one", "c d", 1)]
    assert [(r["source"], r["target"], r["line_breaks"]) for r in selected(rows)] == expected
    assert [len(r["source"].splitlines()) for r in selected(rows)] == [1, 1, 1]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_one_line_per_text(ending):
    rows = [("one\ntwo", "0"), ("one\u2028two", "1"), ("three", "0")] * 20
    records = [dict(zip(("text", "label"), row)) for row in rows]
    if ending == "parquet":
        write_parquet("x.parquet", {k: [r[k] for r in records] for k in ("text", "label")})
    elif ending == "jsonl":
        write("x.jsonl", json_lines(records))
    else:
        write(f"x.{ending}", csv_text(rows, delimiter=dict(csv=",", tsv="\t")[ending]))
    write(f"d/train.{ending}", Path(f"x.{ending}").read_bytes())
    for split in ("validation", "test"):
        write(f"d/{split}.csv", csv_text(numbered(2)))
    train = load("d").tables["train"]
    assert set(train["source"]) == {"one two", "three"}
    assert sum(train["line_breaks"]) == 40
    assert str(train.data.schema.field("line_breaks").type) == "int8"


@pytest.mark.parametrize(
    "value, label",
    [(1, "1"), (-3, "-3"), (2.5, "2.5"), (True, "True"), ("gut", "gut"), (" padded ", "padded")],
)
def test_labels_of_any_kind_become_names(value, label):
    assert selected([{"text": "t", "label": value}])[0]["target"] == label


@pytest.mark.parametrize(
    "absent", ["", "   ", None, float("nan")], ids=["", "blank", "null", "nan"]
)
def test_an_absent_sentence_is_empty_and_an_absent_label_refused(absent):
    assert selected([{"text": absent, "label": "a"}])[0]["source"] == ""
    with pytest.raises(BadInput, match="row 2: the column label is empty; fill it"):
        selected([{"text": "a", "label": "b"}, {"text": "a", "label": absent}])


def test_labels_that_may_be_absent_are_absent_in_all_rows_or_in_none():
    assert [r["target"] for r in selected([{"text": "a"}] * 2, optional_targets=True)] == ["", ""]
    for labels in (["", "b"], ["b", ""]):
        rows = [{"text": "a", "label": label} for label in labels]
        with pytest.raises(
            BadInput, match=f"row {labels.index('') + 1}: the column label is empty"
        ):
            selected(rows, optional_targets=True)


NOT_TEXT = {
    "list": (["a", "b"], ["type list", "store one text per row"]),
    "dict": ({"en": "a", "de": "b"}, ["type dict", "name a field: label.en, label.de"]),
    "bytes": (b"a", ["type bytes"]),
}


@pytest.mark.parametrize("value, words", as_params(NOT_TEXT))
@pytest.mark.parametrize("task", ["classification", "translation"])
def test_a_value_that_is_not_text_is_refused_with_row_column_and_type(value, words, task):
    with pytest.raises(BadInput) as refused:
        selected([{"text": "a", "label": "b"}, {"text": "a", "label": value}], task)
    (line,) = refused.value.lines
    assert all(word in line for word in ["row 2, column label", *words])


def test_nan_in_a_parquet_file_is_no_class():
    write_parquet("x.parquet", {"text": ["a", "b", "c"], "label": [1.0, float("nan"), 0.0]})
    with pytest.raises(BadInput, match=r"x.parquet, row 2: the column label is empty"):
        load("x.parquet")


# --------------------------------------------------------------------------------------- quoted tsv

QUOTED_ROWS = {
    "all fields": '"good film"\t"1"\n',
    "some fields": 'good film\t1\n"bad film"\t0\n',
    "doubled quotes": '"she said ""no"""\t1\n',
    "a tab": '"a\tb"\t1\n',
    "a line break": '"a\nb"\t1\n',
}
RAW_ROWS = {
    "not ended": '"begun\t1\n"a"\t0\n',
    "begun again": '"a" b\t1\n"c"\t0\n',
    "two rows would be one": '"begun\t1\nended"\t0\n',
    "one field by its quotes": '"a\tb"\n"c"\t0\n',
    "no quote at the start": 'a "b"\t1\n',
}


@pytest.mark.parametrize("rows", QUOTED_ROWS.values(), ids=QUOTED_ROWS.keys())
def test_a_well_quoted_tsv_is_read_without_its_quotes(rows):
    write("d/train.tsv", "text\tlabel\n" + rows)
    for split in ("validation", "test"):
        write(f"d/{split}.tsv", "text\tlabel\na\t1\n")
    texts = load("d").tables["train"]["source"][:]
    assert all(not text.startswith('"') and not text.endswith('"') for text in texts[:-1])
    assert set(texts) <= {"good film", "bad film", 'she said "no"', "a\tb", "a b"}


@pytest.mark.parametrize("rows", RAW_ROWS.values(), ids=RAW_ROWS.keys())
def test_any_other_tsv_is_read_as_it_is(rows):
    write("x.tsv", "text\tlabel\n" + rows)
    assert not has_quoted_fields([Path("x.tsv")])


def test_all_tsv_files_of_a_data_set_are_quoted_alike_and_kept_quotes_are_counted():
    write("d/train.tsv", 'text\tlabel\n"a" b\t1\n"c"\t0\n"d"\t0\n')
    for split in ("validation", "test"):
        write(f"d/{split}.tsv", 'text\tlabel\n"a"\t1\n')
    splits = load("d")
    assert splits.tables["train"]["source"][:] == ['"a" b', '"c"', '"d"']
    assert splits.tables["test"]["source"][:] == ['"a"']
    assert splits.notes[0] == "train.tsv: 2 values begin and end with a quote, kept"


# ---------------------------------------------------------------------------------- what is refused


def parquet(columns: dict[str, list]) -> bytes:
    return parquet_of(pyarrow.table(columns))


def parquet_of(table: pyarrow.Table) -> bytes:
    pyarrow.parquet.write_table(table, out := io.BytesIO())
    return out.getvalue()


GOOD_PARQUET = parquet({"text": ["a"] * 60, "label": [0, 1] * 30})
TWICE_NAMED = parquet_of(pyarrow.table([["a"]] * 3, names=["text", "text", "label"]))
LATIN = pyarrow.array([b"a"] * 1202 + [b"caf\xe9"] + [b"a"] * 9).view(pyarrow.string())
SOME = csv_text(numbered(60)).encode()
LONG = b"It was a good film that we saw in the cinema of our town on Sunday evening"
FILES_REFUSED = {
    "not UTF-8": ("d.csv", SOME + b"caf\xe9,1\n", ["d.csv, line 62, byte 4", "UTF-8"]),
    "not UTF-8, zipped": (
        "d.tsv.gz",
        gzip.compress(b"text\tlabel\na\t1\n\xff\t0\n"),
        ["d.tsv.gz, line 3, byte 1", "UTF-8"],
    ),
    "UTF-16": ("d.csv", "text,label\na,1\n".encode("utf-16-le"), ["d.csv, line 1", "UTF-8"]),
    "too many fields": (
        "d.csv",
        SOME + b"a,b,1\n",
        ["d.csv, line 62: number of fields is 3, but line 1 names 2", "fix or remove it"],
    ),
    "too few fields": ("d.csv", SOME + b"a\n", ["d.csv, line 62: number of fields is 1, but"]),
    "a row that is odd at once": (
        "d.csv",
        b"text,label\na,b,1\nc,0\n",
        ["d.csv, line 2: number of fields is 3, but line 1"],
    ),
    "names that are odd": (
        "d.csv",
        b"text,label\n1,a,0\n2,b,1\n",
        ["d.csv, line 1: names 2 columns, but the rows have 3 fields"],
    ),
    "broken quotes": ("d.csv", SOME + b'"a" b,1\n', ["d.csv, line 62", "csv", "fix"]),
    "open quote": ("d.csv", SOME + b'"a,1\n', ["d.csv, line 62", "csv"]),
    "two columns of one name": (
        "d.csv",
        b"text,label,label\na,1,0\n",
        ["d.csv, line 1: two columns are named label; rename one"],
    ),
    "two fields of one name": (
        "d.jsonl",
        b'{"text": "a", "label": 1, "text": "b"}\n',
        ["d.jsonl, line 1", "two fields of one name"],
    ),
    "two parquet columns of one name": ("d.parquet", TWICE_NAMED, ["two fields of one name"]),
    "semicolons that do not fit each line": (
        "d.csv",
        SOME.replace(b",", b";") + b"a;b;c\n",
        ["d.csv, line 1: the delimiter is ';'"],
    ),
    "commas in a tsv": ("d.tsv", SOME, ["line 1: the delimiter is ',', not '\\t'"]),
    "commas and spaces": (
        "d.csv",
        SOME.replace(b",", b", "),
        ["line 1: the delimiter is ', ', not"],
    ),
    "commas, spaces and quotes": (
        "d.csv",
        b'"text", "label"\n"a", "b"\n',
        ["line 1: the delimiter is ', ', not"],
    ),
    "CR as line end": ("d.csv", SOME.replace(b"\n", b"\r"), ["d.csv, line 1", "CR alone", "LF"]),
    "CR as line end, long": (
        "d.jsonl",
        (b'{"text": "%s", "label": 1}\r' % LONG) * 120_000,
        ["d.jsonl, line 1", "CR alone"],
    ),
    "no names": (
        "d.csv",
        LONG + b",1\nBad,0\n",
        ["line 1: looks like data (It was a good film t…, 1)", "names on top, e.g. text,label"],
    ),
    "no names in a tsv": ("d.tsv", b"1\tgood\n0\tbad\n", ["looks like data", "text<TAB>label"]),
    "no names, or others": (
        "d.csv",
        b"good,pos\nbad,neg\n",
        ["line 1: no column text or label, only good, pos", "put a line of names on top"],
    ),
    "no such column": (
        "d.csv",
        SOME.replace(b"text", b"review"),
        ["d.csv", "no column text, only review, label", "--source-column"],
    ),
    "no such label column": (
        "d.csv",
        SOME.replace(b"label", b"stars"),
        ["d.csv", "no column label, only text, stars", "--target-column"],
    ),
    "no such column in JSON": (
        "d.jsonl",
        json_lines(NESTED).encode(),
        ["d.jsonl, line 1: no column text, only translation.en, translation.de, a.b; name one"],
    ),
    "broken JSON": (
        "d.jsonl",
        b'{"text": "a", "label": 1}\n{"text": "a", "label"\n',
        ["d.jsonl, line 2", "not JSON", "fix"],
    ),
    "JSON without names": (
        "d.jsonl",
        b'{"text": "a", "label": 1}\n["a", 1]\n',
        ["d.jsonl, line 2", "not an object"],
    ),
    "JSON nested without end": ("d.jsonl", b"[" * 100_000, ["d.jsonl, line 1", "not JSON"]),
    "half a surrogate pair": (
        "d.jsonl",
        b'{"text": "a\\ud800", "label": 1}\n',
        ["d.jsonl, line 1", "surrogate"],
    ),
    "no parquet": ("d.parquet", SOME, ["d.parquet", "parquet", "again"]),
    "cut parquet": ("d.parquet", GOOD_PARQUET[:-20], ["d.parquet", "again"]),
    "parquet that is not UTF-8": (
        "d.parquet",
        parquet({"label": [1] * 1212, "text": LATIN}),
        ["d.parquet, row 1203, column text: not UTF-8"],
    ),
    "bytes in parquet": (
        "d.parquet",
        parquet({"text": [b"a"], "label": [1]}),
        ["d.parquet, row 1, column text: a value of type bytes"],
    ),
    "cut gzip": ("d.csv.gz", gzip.compress(SOME)[:-20], ["d.csv.gz", "gzip", "again"]),
    "empty file": ("d.csv", b"", ["d.csv", "no rows"]),
    "names alone": ("d.csv", b"text,label\n", ["d.csv", "no rows"]),
    "empty label": (
        "d.csv",
        SOME + b"a,\n",
        ["d.csv, line 62", "label is empty", "remove the row"],
    ),
}


@pytest.mark.parametrize("name, content, words", as_params(FILES_REFUSED))
def test_a_file_that_cannot_work_is_refused_in_one_short_line(name, content, words):
    write_files({name: content})
    with pytest.raises(BadInput) as refused:
        load(name)
    (line,) = refused.value.lines
    assert len(line) < 250 and "\n" not in line
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"


def test_a_wide_file_is_not_printed_whole():
    write("d.csv", ",".join(f"column{i}" for i in range(600)) + "\n" + "1," * 599 + "1\n")
    with pytest.raises(BadInput, match=r"column9, …;"):
        load("d.csv")


def test_a_table_with_another_delimiter_and_other_names_is_refused_with_its_names():
    write("x.csv", csv_text([("good", 1), ("bad", 0)], header=("review", "stars"), delimiter=";"))
    with pytest.raises(BadInput, match=r"no column text or label, only review, stars; name them"):
        load("x.csv")
