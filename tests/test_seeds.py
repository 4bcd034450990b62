"""Several seeds in one folder, and runs that other commands touched in between."""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PROJECT, TINY, csv_bytes, events, refuse_with, run_quietly, write_files
from runs import only_error

import main
import procedures
from errors import Stopped
from export import model_card
from files import text_of
from jobs import load_job
from records import as_record
from run_folder import RunFolder
from scoring import scores_of_runs

SHORT = [*TINY, "--max-steps", "2"]


FILMS = csv_bytes([(f"film {i}", ("negative", "positive")[i % 2]) for i in range(90)])


def change_config(run: str, **options) -> None:
    folder = RunFolder(Path(run))
    config = folder.read_config()
    config["options"].update(options)
    del config["checksum"]
    folder.write_config(config)


@pytest.mark.slow
def test_seeds_are_tested_alone_continued_and_overwritten(slice_of_reviews, capsys, monkeypatch):
    argv = [*SHORT, "--dataset", str(slice_of_reviews), "--run-dir", "r", "--seeds"]

    def killed(self):
        raise Stopped(15)

    with monkeypatch.context() as patch:  # before the first checkpoint
        patch.setattr(procedures.Trainer, "warm_up", killed)
        assert main.main([*argv, "0,1"]) == 143
        assert (
            "; seeds left: 1; repeat the --seeds command to continue\n" in capsys.readouterr().err
        )
    run_quietly(*argv, "0,1")
    capsys.readouterr()
    run_quietly(*argv, "2,3")
    assert "averaging the probabilities of 2 runs: seed-2, seed-3\n" in capsys.readouterr().err
    # A test of other data is none of the training's.
    before = events("r/seed-2", "test")[-1]["accuracy"]
    write_files({"test_other.csv": FILMS})
    run_quietly("--run-dir", "r/seed-2", "--test-only", "--dataset", "test_other.csv")
    mean = statistics.mean([before, events("r/seed-3", "test")[-1]["accuracy"]])
    assert f"test accuracy {100 * mean:.2f} ±" in run_quietly(*argv, "2,3")
    capsys.readouterr()
    refuse_with([*argv, "2,4", "--lr", "0.5"], ["r/seed-2 has --lr 0.001", "--overwrite"], capsys)
    steps = [event["step"] for event in events("r/seed-3", "step")]
    run_quietly(*argv, "3", "--overwrite", "--max-steps", "1")
    assert [event["step"] for event in events("r/seed-3", "step")] == steps[:1] == [1]
    assert main.main([*argv[:-2], "r/seed-3", "--seeds", "0,1"]) == 2
    assert "holds a run itself" in capsys.readouterr().err


def test_a_run_with_tf32_is_used_on_a_cpu(run_copy, capsys):
    change_config("copy", tf32=True)
    write_files({"in.txt": b"a good film\n"})
    assert main.main(["--run-dir", "copy", "--predict", "in.txt", "--device", "cpu"]) == 0
    only_error(capsys, main.main("--run-dir copy --test-only --tf32".split()), 2, "--tf32")


@pytest.mark.slow
def test_a_finished_run_is_resumed_with_more_checkpoints_to_average(run_copy):
    lines = Path("copy/metrics.jsonl").read_text().splitlines(True)
    Path("copy/metrics.jsonl").write_text("".join(x for x in lines if '"test"' not in x))
    run_quietly("--resume", "--run-dir", "copy", "--average-checkpoints", 2)
    assert len(events("copy", "test")) == 1


def test_a_seed_without_a_test_result_is_named(finished, slice_of_reviews, capsys, monkeypatch):
    shutil.copytree(finished[0], "r/seed-0")
    metrics = Path("r/seed-0/metrics.jsonl")
    lines = metrics.read_text().splitlines(True)
    metrics.write_text("".join(line for line in lines if '"test"' not in line))
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--run-dir", "r", "--seeds", "0"]
    monkeypatch.setattr(main, "resume", lambda *args: None)
    only_error(capsys, main.main(argv), 2, "--seeds", "no test result")


@pytest.mark.slow
def test_a_long_field_of_a_tsv_is_judged_alike_whatever_was_read_before():
    text = f'text\tlabel\n"{"long " * 30_000}"\t1\n"b"\t0\n'
    write_files({"x.tsv": text.encode()})
    code = "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import tables; "
    code += "print(tables.has_quoted_fields([pathlib.Path('x.tsv')]))"
    done = subprocess.run([sys.executable, "-c", code, PROJECT], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.slow
def test_a_quoted_tsv_is_answered_as_it_was_read_in_training(run_copy, capsys):
    row = 'text\tlabel\n"he said ""good"" film"\t1\n"two\nlines"\t0\n'
    write_files({"q.tsv": row.encode()})
    assert main.main("--run-dir copy --predict q.tsv --output a.jsonl".split()) == 0
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ['he said "good" film', "two\nlines"]


def test_test_only_says_what_it_cut(run_copy):
    write_files({"semi.csv": FILMS.replace(b",", b";")})
    out = run_quietly("--run-dir", "copy", "--test-only", "--dataset", "semi.csv")
    assert "cut from train" in out and "delimiter is ';'" in out
    assert "only the tenth that training would cut out; to test all, name the file test" in out
    write_files({"test_semi.csv": FILMS.replace(b",", b";")})
    out = run_quietly("--run-dir", "copy", "--test-only", "--dataset", "test_semi.csv")
    assert "test of 90 sentences" in out and "tenth" not in out


def test_the_tenth_that_was_cut_from_training_is_tested():
    write_files({"films.csv": FILMS})
    run_quietly(*SHORT, "--dataset", "films.csv", "--run-dir", "r")
    n = events("r", "test")[0]["sentences"]
    use = ["--run-dir", "r", "--test-only"]
    for dataset in ([], ["--dataset", "films.csv"], ["--dataset", Path("films.csv").absolute()]):
        assert f"test of {n} sentences" in run_quietly(*use, *dataset)
    rows = FILMS + b"more,positive\n" * 2
    write_files({"grown.csv": rows})  # what was trained on is not tested on
    out = run_quietly(*use, "--dataset", "grown.csv")
    assert f"test of {n} sentences" in out or f"test of {n + 2} sentences" in out


@pytest.mark.slow
def test_further_seeds_take_what_follows_from_the_data_from_those_that_are_there(capsys):
    write_files({"films.csv": FILMS})
    tiny = [a for a in SHORT if a not in ("--batch-size", "32")]
    argv = [*tiny, "--dataset", "films.csv", "--run-dir", "r", "--seeds"]
    run_quietly(*argv, "0", "--batch-size", "16")
    run_quietly(*argv, "0,1")
    sizes = [RunFolder(Path(f"r/seed-{i}")).read_config()["options"]["batch_size"] for i in (0, 1)]
    assert sizes == [16, 16]
    capsys.readouterr()
    more = ["0,2", "--batch-tokens", "300"]
    refuse_with([*argv, *more], ["r/seed-0 has --batch-size 16, no --batch-tokens"], capsys)
    write_files({"other.csv": FILMS})
    argv[argv.index("films.csv")] = "other.csv"
    refuse_with([*argv, "0,2"], ["r/seed-0 has --dataset films.csv"], capsys)
    config = RunFolder(Path("r/seed-0")).read_config()
    del config["checksum"]
    RunFolder(Path("r/seed-0")).write_config({**config, "processes": 2})
    argv[argv.index("other.csv")] = "films.csv"
    refuse_with([*argv, "0,2"], ["r/seed-0 has 2 processes"], capsys)


def test_columns_are_those_of_the_data_they_were_given_for(slice_of_reviews):
    write_files({"films.txt": FILMS.partition(b"\n")[2], "test.csv": FILMS})
    argv = [*SHORT, "--dataset", "films.txt", "--columns", "text,label", "--run-dir", "r"]
    run_quietly(*argv)
    for dataset in ("test.csv", slice_of_reviews):
        out = run_quietly("--run-dir", "r", "--test-only", "--dataset", dataset)
        assert "error" not in out and "test of" in out


@pytest.mark.slow
def test_runs_that_were_padded_to_different_lengths_answer_together(slice_of_reviews):
    for i, lengths in enumerate((("--max-length", 40, "--pad-to", 90), ("--max-length", 30))):
        run_quietly(*SHORT, "--dataset", slice_of_reviews, "--run-dir", f"r/{i}", *lengths)
    assert "test of 40 sentences" in run_quietly("--run-dir", "r", "--test-only")


def test_the_scores_of_each_test_set_are_summed_up():
    runs = [
        [{"split": "test.a", "accuracy": 0.5}, {"split": "test.b", "accuracy": x}] for x in (0, 1)
    ]
    assert scores_of_runs(runs) == [
        "test.a accuracy 50.00 ± 0.00 (50.00, 50.00)",
        "test.b accuracy 50.00 ± 70.71 (0.00, 100.00)",
    ]


def test_shared_files_name_no_folder(run_copy):
    job, folder = load_job({"run_dir": "copy", "test_only": True, "device": "cpu"}, [])
    job.options.dataset = "/home/alice/x.csv"
    card = model_card(job, folder, "onnx")
    assert card.startswith("# x.csv: ") and "- data: x.csv\n" in card and "alice" not in card
    for name in ("john_smith", "/home/me/x.csv"):
        assert as_record({}, {}, {"dataset": name})["dataset"] == "own data"
    assert as_record({}, {}, {"dataset": "rotten_tomatoes"})["dataset"] == "rotten_tomatoes"


@pytest.mark.parametrize("row, text", [({"a": "", "b": None}, ""), ({"a": "x", "b": ""}, "x ||| ")])
def test_two_empty_columns_are_an_empty_text(row, text):
    assert text_of(row, "a+b", "row 1", "source")[0] == text
