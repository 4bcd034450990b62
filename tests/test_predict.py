"""Answers to texts: Predictor, the command line's --predict, standard input and output."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PROJECT, TINY, csv_bytes, refuse_with, run_quietly, write_files, write_parquet
from processes import ranks

import jobs
import main
import predict
from config import DecodingConfig, ModelConfig, TokenizerConfig
from decoding import EXTRA_LENGTH, beam_search
from errors import BadInput
from models import Transformer, TransformerClassifier
from predict import Predictor, live_portions, portions
from tokenization import train_tokenizer

SENTENCES = [
    "a wonderful , moving film",
    "dull .",
    "",
    "an hour and a half of \u00e9lan",
    "   ",
    "good " * 300,
    "<pad> </s>",
]


def small_predictor(classes=None, *, max_length=64, beam_size=1, positions="learned", **batches):
    """Untrained, with a vocabulary of bytes, so any text has ids."""
    torch.manual_seed(0)
    codec = train_tokenizer([""], TokenizerConfig(vocab_size=270))
    config = ModelConfig(n_layers=1, d_model=8, d_ff=8, n_heads=2, positions=positions)
    sizes = {"n_vocab": codec.n_vocab, "pad_id": codec.pad_id, "max_len": max_length + EXTRA_LENGTH}
    if classes:
        model = TransformerClassifier(config, n_classes=len(classes), **sizes)
    else:
        model = Transformer(config, **sizes)
    return Predictor(
        model,
        codec,
        classes,
        max_length=max_length,
        search=DecodingConfig(beam_size=beam_size),
        device=torch.device("cpu"),
        precision="fp32",
        **{"batch_size": 4, "batch_tokens": None, **batches},
    )


def parse(out: str) -> list[tuple[str, float] | None]:
    lines = out.splitlines()
    return [(x.split("\t")[0], float(x.split("\t")[1])) if x else None for x in lines]


def same_answer(a: tuple[str, float] | None, b: tuple[str, float] | None) -> bool:
    """Whether two answers differ only by rounding, as different batch shapes may cause."""
    return a == b or (a[0] == b[0] and abs(a[1] - b[1]) < 2e-4)


# ------------------------------------------------------------------------------------------ batches


def test_predict_answers_each_line_in_order_for_any_batch_size(run_copy, capsys):
    write_files({"in.txt": "\n".join(SENTENCES).encode()})
    argv = ["--run-dir", str(run_copy), "--predict", "in.txt"]
    assert main.main(argv) == 0
    out, err = capsys.readouterr()
    together = parse(out)
    assert [answer is None for answer in together] == [not text.strip() for text in SENTENCES]
    given = [answer for answer in together if answer]
    assert all(label in ("negative", "positive") and 0.5 <= p <= 1 for label, p in given)
    assert len({p for _, p in given}) > 1
    assert "blank lines: 2" in err and "lines cut to 256 tokens: 1" in err

    for options in (["--batch-size", "1"], ["--batch-tokens", "256"]):
        assert main.main([*argv, *options]) == 0
        for one, many in zip(parse(capsys.readouterr().out), together, strict=True):
            assert same_answer(one, many)

    write_files({"back.txt": "\r\n".join(SENTENCES[::-1]).encode()})
    assert main.main([*argv[:-1], "back.txt"]) == 0
    for back, forth in zip(parse(capsys.readouterr().out), together[::-1], strict=True):
        assert same_answer(back, forth)


@pytest.mark.parametrize("options, largest", [("--batch-tokens 256", 256), ("--batch-size 3", 3)])
def test_a_batch_of_predict_holds_what_its_option_says(options, largest, run_copy, monkeypatch):
    """Padding counts, and sentences of similar length share a batch."""
    write_files({"in.txt": "\n".join("good " * (i % 60 + 1) for i in range(200)).encode()})
    shapes, forward = [], TransformerClassifier.forward

    def record(self, src, tgt_in):
        shapes.append(tuple(src.shape))
        return forward(self, src, tgt_in)

    monkeypatch.setattr(TransformerClassifier, "forward", record)
    run_quietly("--run-dir", run_copy, "--predict", "in.txt", *options.split())
    sizes = [n if options.startswith("--batch-size") else n * width for n, width in shapes]
    assert sum(n for n, _ in shapes) == 200
    assert max(sizes) <= largest and np.mean(sizes) > 0.6 * largest


@pytest.mark.parametrize("beam_size", [1, 3])
def test_translations_do_not_depend_on_the_size_of_batches(beam_size):
    texts = ["abc", "", "a" * 500, "b c", "\n", "d" * 20]
    expected = small_predictor(batch_size=1, beam_size=beam_size)(texts)
    for batches in ({"batch_size": 6}, {"batch_size": None, "batch_tokens": 70}):
        assert small_predictor(beam_size=beam_size, **batches)(texts) == expected
    assert expected[1] == expected[4] == ""


# --------------------------------------------------------------------------------------- long lines


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_text_longer_than_the_position_table_is_translated(beam_size, positions):
    predictor = small_predictor(max_length=8, beam_size=beam_size, positions=positions)
    ((_, answers, n_tokens),) = predictor.answer_portions(iter([["abc" * 100]]))
    assert len(answers) == 1 and n_tokens > 300


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
@pytest.mark.parametrize("source, target", [(300, 5), (5, 300), (300, 300)])
def test_attention_of_texts_longer_than_the_position_table(source, target, positions):
    predictor = small_predictor(max_length=16, positions=positions)
    ((src, tgt, weights),) = predictor.attention_maps(["a" * source], ["b" * target])
    assert weights.shape == (2, len(tgt), len(src))
    assert len(src) == min(source + 2, 16) and len(tgt) == min(target + 2, 16)


def test_attention_is_a_distribution_over_the_source_that_later_target_tokens_do_not_change():
    predictor = small_predictor()
    src, tgt, weights = predictor.attention("abcde", "f" * 39)
    assert weights.shape == (2, 40, 7) and len(src) == 7 and len(tgt) == 40
    np.testing.assert_allclose(weights.sum(axis=2), 1, rtol=1e-5)
    assert src[-1] == "</s>" and tgt[1] == "f"
    short = predictor.attention("abcde", "f" * 9)[2]
    np.testing.assert_allclose(short[:, :10], weights[:, :10], rtol=1e-5)
    short = predictor.attention("abcde", "f" * 39, longest=5)[2]
    np.testing.assert_allclose(short, weights[:, :5, :5], rtol=1e-5)


def test_attention_maps_show_sentences_of_readable_length():
    texts = ["a", "b" * 60, "c" * 16, "d" * 300, "e" * 14]
    maps = small_predictor().attention_maps(texts, texts, n=2)
    assert [src[1] for src, _, _ in maps] == ["c", "e"]


# ------------------------------------------------------------------------------ one line per answer


@pytest.mark.parametrize(
    "mark", ["\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029"]
)
def test_no_answer_has_a_line_break(mark, monkeypatch):
    ids = small_predictor().codec.encode([f"two{mark}lines"])
    monkeypatch.setattr(predict, "greedy", lambda *_, **__: ids)
    monkeypatch.setattr(predict, "beam_search", lambda *_, **__: [[(0.0, ids[0])]])
    for beam_size in (1, 2):
        predictor = small_predictor(beam_size=beam_size)
        assert predictor(["x"]) == ["two lines"]
    assert printed_label(f"two{mark}lines") == "two lines"


def printed_label(label: str) -> str:
    """How the command line prints the only label of a classifier."""
    predictor = small_predictor(classes=[label])
    assert predictor("x") == label
    line = predict.format_answers(predictor, {}, predictor.answer(["x"])[0], as_json=False)
    return line.split("\t")[0]


def test_a_tab_in_a_label_is_not_taken_for_the_end_of_the_label():
    assert printed_label("a\tb") == "a b"


def test_labels_that_differ_in_white_space_keep_their_probabilities():
    p = small_predictor(classes=["a b", "a  b", "a\tb"]).probabilities("x")
    assert [*p] and sum(p.values()) == pytest.approx(1) and len(p) == 3


# -------------------------------------------------------------------------------------------- files


def test_predict_of_an_empty_file_answers_nothing(run_copy, capsys):
    write_files({"in.txt": b""})
    assert main.main(["--run-dir", str(run_copy), "--predict", "in.txt"]) == 0
    assert capsys.readouterr() == ("", "")


# ----------------------------------------------------------------------------------- standard input


class Feed:
    """An iterable that hands out a text only when the test puts one in."""

    def __init__(self):
        self.texts, self.ready = [], threading.Semaphore(0)

    def put(self, *texts):
        for text in texts:
            self.texts.append(text)
            self.ready.release()

    def __iter__(self):
        while True:
            self.ready.acquire()
            text = self.texts.pop(0)
            if isinstance(text, Exception):
                raise text
            if text is None:
                return
            yield text


def test_a_text_is_answered_before_the_next_one_arrives():
    feed = Feed()
    found = live_portions(feed)
    for text in ("one", "two", "three"):
        feed.put(text)
        assert next(found) == [text]
    feed.put(None)
    assert list(found) == []


def test_live_portions_are_all_texts_in_order_and_bounded():
    texts = [str(i) for i in range(3 * predict.PORTION + 5)]
    found = list(live_portions(texts))
    assert [text for portion in found for text in portion] == texts
    assert all(0 < len(portion) <= predict.PORTION for portion in found)


@pytest.mark.parametrize("split", [portions, live_portions])
def test_portions_read_little_ahead_of_the_answers(split):
    n_read = 0

    def texts():
        nonlocal n_read
        while True:
            n_read += 1
            yield "x"

    found, n_taken = split(texts()), 0
    for _ in range(5):
        n_taken += len(next(found))
        assert n_read <= n_taken + predict.PORTION + 1
    found.close()


def test_an_error_in_reading_is_raised_after_the_texts_before_it():
    feed = Feed()
    feed.put("one", "two", ValueError("line 3"))
    found = live_portions(feed)
    assert next(found) == ["one", "two"]
    with pytest.raises(ValueError, match="line 3"):
        next(found)


def start_predict(run: Path, name: str = "-", *, n: int = 1, **how) -> subprocess.Popen:
    script = ["main.py"] if n == 1 else ["ddp_main.py", "--world-size", str(n)]
    command = [sys.executable, str(PROJECT / script[0]), *script[1:]]
    command += ["--run-dir", str(run), "--predict", name]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.Popen(command, **{**pipes, "env": env, **how})


@pytest.fixture
def patience():
    """Kills a process that hangs: a test that waits for it then sees the end of its output."""
    timers = []

    def kill_later(process: subprocess.Popen) -> subprocess.Popen:
        timers.append(threading.Timer(300, process.kill))
        timers[-1].start()
        return process

    yield kill_later
    for timer in timers:
        timer.cancel()


@pytest.mark.slow
def test_a_pipe_that_waits_for_each_answer_gets_it(run_copy, patience):
    with patience(start_predict(run_copy)) as process:
        for text in ("good film 1", "dull"):
            process.stdin.write(text.encode() + b"\n")
            process.stdin.flush()
            assert process.stdout.readline().count(b"\t") == 1
        out, err = process.communicate(b"good\n\xff\n")
    assert process.returncode == 2 and out.count(b"\n") == 1
    assert err.startswith(b"error: -, line 4, byte 1: not UTF-8") and err.count(b"\n") == 1


@pytest.mark.slow
def test_predicting_needs_only_the_run_folder_and_writes_utf_8_whatever_the_locale(
    capsys, patience
):
    rows = [(f"film {i}", label) for i in range(50) for label in ("gro\u00df", "\u4e2d")]
    write_files({"data/train.csv": csv_bytes(rows), "in.txt": b"good film 1\n\nfilm\n"})
    run_quietly(*TINY, "--dataset", "data", "--run-dir", "run", "--max-steps", 2)
    shutil.rmtree("data")
    Path("elsewhere").mkdir()
    moved = Path(shutil.move("run", "elsewhere/moved"))
    capsys.readouterr()
    assert main.main(["--run-dir", str(moved), "--predict", "in.txt"]) == 0
    from_file = capsys.readouterr()
    process = patience(start_predict(moved, env={**os.environ, "PYTHONIOENCODING": "ascii"}))
    out, err = process.communicate(b"good film 1\n\nfilm\n")
    assert process.returncode == 0
    assert (out.decode(), err.decode()) == from_file
    assert from_file.out.count("\n") == 3 and "blank lines: 1" in from_file.err
    assert not from_file.out.isascii()


# ---------------------------------------------------------------------------------- standard output


@pytest.mark.slow
@pytest.mark.parametrize("n_lines, n", [(1, 1), (20_000, 2)])
def test_a_closed_output_ends_predict_quietly(n_lines, n, run_copy, patience):
    write_files({"in.txt": b"good film\n" * n_lines})
    process = patience(start_predict(run_copy, "in.txt", n=n))
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


@pytest.mark.slow
def test_a_closed_output_ends_predict_though_standard_input_is_open(run_copy, patience):
    process = patience(start_predict(run_copy))
    process.stdout.close()
    process.stdin.write(b"good\n")
    process.stdin.flush()
    assert process.wait() == 0
    assert process.stderr.read() == b""


@pytest.mark.slow
def test_sample_translations_never_stop_a_run_on_a_narrow_screen(monkeypatch):
    lines = "".join(f"\u4e2d\u00df {i}\n" for i in range(60)).encode()
    write_files({f"d/{split}.{side}": lines for split in ("train", "val", "test") for side in "xy"})
    sides = "--task translation --source-column x --target-column y --train-tokenizer"
    argv = [*TINY, "--dataset", "d", *sides.split(), "--run-dir", "run", "--max-steps", "1"]
    with open("screen", "w", encoding="ascii") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        assert main.main(argv) == 0
    screen = Path("screen").read_text(encoding="ascii")
    assert "reference   ?? " in screen


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "option", ["--num-workers 2", "--bleu-tokenize char", "--beam-size 2", "--length-penalty 1.0"]
)
def test_an_option_without_effect_is_refused(option, run_copy, capsys):
    write_files({"in.txt": b"a\n"})
    argv = ["--run-dir", str(run_copy), "--predict", "in.txt", *option.split()]
    refuse_with(argv, [f"{option}: ", "leave it out"], capsys)


def test_predicting_does_not_need_the_packages_of_the_bleu_tokenizer(train, monkeypatch):
    for name in ("MeCab", "ipadic"):
        monkeypatch.setitem(sys.modules, name, sys)  # can be imported
    run = train("mecab", "--max-steps", 1, "--bleu-tokenize", "ja-mecab")
    monkeypatch.setitem(sys.modules, "MeCab", None)  # cannot
    write_files({"in.txt": b"good\n"})
    assert run_quietly("--run-dir", run, "--predict", "in.txt").count("\t") == 1
    assert jobs.load(run, device="cpu")("good") in ("negative", "positive")


def test_standard_input_is_refused_for_several_processes(run_copy, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "world_size", lambda: 2)
    argv = ["--run-dir", str(run_copy), "--predict", "-"]
    refuse_with(argv, ["--predict -: only one process", "give a file"], capsys)


# -------------------------------------------------------------------------- several answers, Python


def test_n_best_are_those_of_beam_search():
    predictor, texts = small_predictor(beam_size=3), ["abc", "", "b c"]
    found = predictor.best(texts, 3)
    assert found[1] == [] and predictor(texts) == [row[0][0] if row else "" for row in found]
    ids = [row + [predictor.codec.eos_id] for row in predictor.codec.encode(["abc"])]
    ends = {"bos_id": predictor.codec.bos_id, "eos_id": predictor.codec.eos_id}
    search = {"beam_size": 3, "alpha": predictor.search.length_penalty, "n_best": 3}
    (expected,) = beam_search(predictor.model, torch.tensor(ids), **ends, **search)
    assert [score for _, score in found[0]] == pytest.approx([x for x, _ in expected], abs=1e-5)
    assert expected == sorted(expected, reverse=True)


def test_python_and_the_command_line_give_the_same_answers(run_copy):
    write_files({"in.txt": b"a wonderful , moving film\n\ndull .\n"})
    texts = ["a wonderful , moving film", "", "dull ."]
    argv = ["--run-dir", run_copy, "--predict", "in.txt"]
    model = jobs.load(str(run_copy), device="cpu")
    assert model("dull .") == model(texts)[2] and model("") == ""
    expected = model.best(texts, 2)
    assert [label for label, _ in model.best("dull .", 2)] == [label for label, _ in expected[2]]
    assert model.probabilities("dull .").keys() == {"negative", "positive"}
    assert jobs.load(run_copy, n_best=2, batch_size=8, batch_tokens=None).n_best == 2
    for n in (0, -1, 1.5):
        with pytest.raises(ValueError, match="give a whole number above 0"):
            model.best("dull .", n)
    with pytest.raises(ValueError, match="only of a classifier"):
        small_predictor().probabilities("dull .")
    for row, p in zip(expected, model.probabilities(texts)):
        assert p == dict(row) and (not row or sum(p.values()) == pytest.approx(1))

    lines = run_quietly(*argv).splitlines()
    assert lines == ["\t".join((r[0][0], f"{r[0][1]:.4f}")) if r else "" for r in expected]
    lines = ["\t".join(f"{a}\t{p:.4f}" for a, p in row) for row in expected]
    assert run_quietly(*argv, "--n-best", 2).splitlines() == lines
    assert run_quietly(*argv, "--all-probabilities").splitlines() == lines
    assert run_quietly(*argv, "--all-probabilities", "--output", "out.txt") == ""
    assert Path("out.txt").read_text(encoding="utf-8").splitlines() == lines
    run_quietly(*argv, "--output", "out.jsonl")
    rows = [json.loads(line) for line in Path("out.jsonl").read_bytes().splitlines()]
    assert [row["text"] for row in rows] == texts and rows[1]["answers"] == []
    label, p = expected[0][0]
    assert rows[0]["answers"] == [{"label": label, "probability": round(p, 6)}]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"precision": "int8"}, "--precision int8: give one of fp32"),
        ({"beam_sise": 3}, "beam_sise: no such option; did you mean beam_size"),
        ({"batch_size": "4"}, "batch_size='4': give a value of type int"),
        ({"epochs": 3}, "--epochs 3: not for --predict"),
        ({"resume": True}, "--resume and --predict: give one of the two"),
    ],
)
def test_an_option_that_python_cannot_give_is_refused(options, words, run_copy):
    with pytest.raises(BadInput, match=re.escape(words)):
        jobs.load(run_copy, **options)


def test_output_is_complete_or_does_not_exist(run_copy, monkeypatch, capsys):
    write_files({"in.txt": b"dull .\n", "bad.txt": b"dull .\n\xff\n", "there.txt": b"mine"})
    argv = ["--run-dir", run_copy, "--predict"]
    refuse_with(
        [*argv, "in.txt", "--output", "there.txt"], ["--output there.txt", "exists"], capsys
    )
    assert Path("there.txt").read_bytes() == b"mine"
    folder = ["in.txt", "--output", "nowhere/a.txt"]
    refuse_with([*argv, *folder], ["--output nowhere/a.txt", "folder does not exist"], capsys)
    write_files({"in.jsonl": b'{"text": "a", "answers": 1}\n'})
    taken = ["in.jsonl", "--output", "new.jsonl"]
    refuse_with([*argv, *taken], ["a column answers already", "rename"], capsys)
    monkeypatch.setattr(predict, "PORTION", 1)
    assert main.main([*map(str, argv), "bad.txt", "--output", "new.txt"]) == 2
    assert not Path("new.txt").exists() and not Path("new.txt.part").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ("--n-best 2", ["--n-best 2", "give --beam-size 2"]),
        ("--all-probabilities", ["--all-probabilities", "only of a classifier", "--n-best"]),
    ],
)
def test_more_answers_than_a_translator_has_are_refused(
    options, words, finished_translator, capsys
):
    write_files({"in.txt": b"a\n"})
    argv = [
        "--run-dir",
        finished_translator[0],
        "--predict",
        "in.txt",
        "--beam-size",
        1,
        *options.split(),
    ]
    refuse_with(argv, words, capsys)


def test_the_source_column_of_a_table_is_answered_beside_its_other_columns(run_copy, capsys):
    rows = [{"id": 7, "text": "a wonderful , moving film"}, {"id": 8, "text": "dull .\nyes"}]
    argv = ["--run-dir", run_copy, "--predict"]
    write_files({"in.txt": b"a wonderful , moving film\ndull . yes\n"})
    write_files({"in.json": json.dumps(rows).encode(), "in.csv": csv_bytes([("dull .", "x")])})
    expected = run_quietly(*argv, "in.txt")
    assert run_quietly(*argv, "in.json") == expected
    rows[0]["n"] = [float("nan"), float("inf")]
    write_parquet("in.parquet", {k: [row.get(k) for row in rows] for k in ("id", "text", "n")})
    run_quietly(*argv, "in.parquet", "--output", "out.jsonl")
    assert "NaN" not in Path("out.jsonl").read_text() and "Inf" not in Path("out.jsonl").read_text()
    rows[0]["n"], rows[1]["n"] = [None, None], None
    found = [json.loads(line) for line in Path("out.jsonl").read_bytes().splitlines()]
    assert [{k: v for k, v in row.items() if k != "answers"} for row in found] == rows
    assert [row["answers"][0]["label"] for row in found] == [x for x, _ in parse(expected)]
    capsys.readouterr()
    words = ["no column review", "only"]
    refuse_with([*argv, "in.csv", "--source-column", "review"], words, capsys)
    write_files({"bare.csv": b"7,dull .\n", "bare.txt": b"7\tdull .\n8\tgood, fine\n"})
    for name in ("bare.csv", "bare.txt"):
        (first, *_) = parse(run_quietly(*argv, name, "--columns", "id,text"))
        assert first == parse(expected)[1] or first[0] in ("negative", "positive")
    bare = parse(run_quietly(*argv, "bare.txt", "--columns", "id,text"))
    write_files({"plain.txt": b"dull .\ngood, fine\n"})
    assert bare == parse(run_quietly(*argv, "plain.txt"))
    words = ["--source-column id: plain.txt has lines", "--columns"]
    refuse_with([*argv, "plain.txt", "--source-column", "id"], words, capsys)
    words = ["--columns: standard input has lines", "leave it out"]
    refuse_with([*argv, "-", "--columns", "id,text"], words, capsys)


# ------------------------------------------------------------------------------------------- faults


def test_half_of_a_surrogate_pair_in_another_column_is_written_as_json_has_it(run_copy):
    write_files({"in.jsonl": b'{"text": "fine", "x": "\\ud800", "\\udfff": 1}\n'})
    run_quietly("--run-dir", run_copy, "--predict", "in.jsonl", "--output", "out.jsonl")
    (row,) = map(json.loads, Path("out.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["x"] == "\ud800" and row["\udfff"] == 1 and row["answers"]


@pytest.mark.parametrize("more, name", [(["--columns", "text"], "in.txt"), ([], "in.csv")])
def test_a_blank_line_of_a_table_with_one_column_has_a_blank_answer(more, name, run_copy):
    write_files({name: b"text\ngood\n\nbad\n"[0 if name == "in.csv" else 5 :]})
    lines = run_quietly("--run-dir", run_copy, "--predict", name, *more).split("\n")
    assert [bool(line) for line in lines] == [True, False, True, False]


def test_no_other_file_is_touched_while_answers_are_written(run_copy):
    write_files({"in.txt": b"good\n", "out.txt.part": b"mine"})
    run_quietly("--run-dir", run_copy, "--predict", "in.txt", "--output", "out.txt")
    assert Path("out.txt.part").read_bytes() == b"mine"
    assert sorted(path.name for path in Path().glob("*out*")) == ["out.txt", "out.txt.part"]


@pytest.mark.parametrize("text", [None, float("nan"), 3, b"x"])
def test_what_is_no_text_is_refused_with_its_type(text):
    with pytest.raises(TypeError, match=f"of type {type(text).__name__}; give a str"):
        small_predictor()(["fine", text])


def test_python_s_other_wrong_questions_are_refused():
    translator, classifier = small_predictor(beam_size=2), small_predictor(classes=["a", "b"])
    with pytest.raises(ValueError, match="load with beam_size=3"):
        translator.best("x", 3)
    with pytest.raises(ValueError, match="only of a translator"):
        classifier.attention("x", "y")
    assert len(classifier.best("x", np.int64(2))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("output", ["out.jsonl", "none/out.txt"])
def test_what_rank_0_alone_cannot_write_is_one_error_of_many_processes(output, run_copy):
    write_files({"in.jsonl": b'{"text": "fine", "answers": 1}\n', "none/x": b""})
    Path("none").chmod(0o500)
    if output.startswith("none") and os.access("none", os.W_OK):
        pytest.skip("this user may write anywhere")
    argv = ["--run-dir", run_copy, "--predict", "in.jsonl", "--output", output]
    first, second = ranks(2, *argv)
    assert first.status in (1, 2) and first.err.count("error: ") == 1
    assert (second.status, second.err) == (0, "")
