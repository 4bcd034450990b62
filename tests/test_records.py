"""Records of epoch times: read, selected, named and compared."""

import json
import math
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
from helpers import TINY, events, record, refuse, refuse_with, run_quietly, write_records

import comp_utils
import records
from config import ASSETS
from records import read_records, seconds_text
from settings import resolve

EPOCH_TIMES = ASSETS / "epoch_times.jsonl"


def test_the_published_values_are_those_of_the_original():
    published = [r for r in read_records(str(EPOCH_TIMES)) if r.get("published")]
    seconds = [r["seconds_per_epoch"]["median"] for r in published]
    assert seconds == [3346, 1088, 63, 54, 17, 15]
    assert all(r["workload"] == "original" and "2022" in r["source"] for r in published)


def test_a_training_run_is_a_record_too(finished):
    with open(finished[0] / "metrics.jsonl", encoding="utf-8") as file:
        seconds = [e["seconds"] for e in map(json.loads, file) if e["event"] == "epoch"]
    (found,) = read_records(str(finished[0]))
    assert found["seconds_per_epoch"]["median"] == pytest.approx(sum(seconds) / 2)
    assert found["n_layers"] == 1 and found["dataset"] == "own data"
    assert not {"options", "classes", "checksum"} & found.keys()
    assert seconds_text(sum(seconds) / 2) in run_quietly("--compare", finished[0])


def test_runs_of_several_seeds_are_one_record_with_mean_and_deviation(slice_of_reviews):
    argv = [*TINY, "--dataset", slice_of_reviews, "--run-dir", "two", "--seeds", "0-1"]
    run_quietly(*argv)
    (found,) = read_records("two")
    epochs = [e["seconds"] for i in (0, 1) for e in events(f"two/seed-{i}", "epoch")]
    assert len(epochs) == 4
    assert found["seconds_per_epoch"]["median"] == statistics.median(epochs)
    assert found["seconds_per_epoch"]["greatest"] == max(epochs)
    out = run_quietly("--compare", "two", "two/seed-0").splitlines()
    assert "2 runs" in out[3] or "2 runs" in out[4]
    values = [100 * events(f"two/seed-{i}", "test")[-1]["accuracy"] for i in (0, 1)]
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    assert out[-2].startswith(f"two: test accuracy {mean:.2f} ± {deviation:.2f} (")
    assert out[-1].startswith(f"two/seed-0: test accuracy {values[0]:.2f}; test macro_f1")
    lines = Path("two/seed-1/metrics.jsonl").read_text().splitlines(True)
    Path("two/seed-1/metrics.jsonl").write_text("".join(x for x in lines if '"test"' not in x))
    assert "two: 1 of 2 runs have no test result" in run_quietly("--compare", "two")


def test_a_folder_with_a_record_alone_is_compared():
    Path("alone").mkdir()
    write_records("alone/benchmark.json", record(3))
    assert "3    1.5         6  Some" in run_quietly("--compare", "alone")


@pytest.mark.parametrize("flag, values", [("--d-ff", (16, 32)), ("--lr", (1, 2))])
def test_runs_that_differ_in_more_than_the_seed_are_not_one_record(flag, values, train, capsys):
    Path("both").mkdir()
    for name, value in zip("ab", values):
        shutil.move(train(name, "--max-steps", 1, flag, value), f"both/{name}")
    capsys.readouterr()
    words = ["--compare both", f"differ in more than the seed ({flag} ", "one by one"]
    refuse_with(["--compare", "both"], words, capsys)


def test_records_of_earlier_versions_are_read():
    old = record(updates=3, updates_of_an_epoch=9, seconds_per_update={"median": 1})
    old["seconds_per_epoch_is"] = "reckoned from the updates timed"
    (found,) = read_records(write_records("old.jsonl", old))
    assert (found["steps"], found["steps_per_epoch"]) == (3, 9)
    assert found["seconds_per_step"] == {"median": 1}
    assert found["seconds_per_epoch_is"] == "extrapolated from 3 steps"
    assert "extrapolated" in run_quietly("--compare", "old.jsonl")


def test_the_printed_command_adds_the_record(slice_of_reviews, monkeypatch):
    monkeypatch.setattr("measure.matmul_flops_per_second", lambda *_: 1e9)
    monkeypatch.setattr(records, "ASSETS", Path.cwd())
    write_records("epoch_times.jsonl", record())
    run = "a folder/b"
    out = run_quietly(*TINY, "--dataset", slice_of_reviews, "--run-dir", run, "--benchmark", 1)
    command = out.rpartition("share it: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert len(read_records("epoch_times.jsonl")) == 2
    assert read_records("epoch_times.jsonl")[1] == read_records(run)[0]


@pytest.mark.parametrize(
    "given, name",
    [({"num_workers": 1}, "original"), ({"ensemble": 2}, "original, changed"), ({}, "original")],
)
def test_a_workload_that_was_changed_says_so(given, name):
    options = vars(resolve({"workload": "original", **given}))
    assert records.as_record({}, {}, options)["workload"] == name


# ------------------------------------------------------------------------------------ what is shown


def test_other_work_than_the_first_is_left_out_and_named():
    own = write_records("own.jsonl", record(3, threads=7), record(4, work_fingerprint="b" * 16))
    published = record(5, published=True, source="a paper", workload="original")
    del published["work_fingerprint"]
    others = write_records("others.jsonl", record(6, workload="original"), published)
    out = run_quietly("--compare", own, others)
    # The same work under another name is the same work, and so is what was published of that name.
    assert [line.split()[0] for line in out.splitlines()[3:-1]] == ["3", "6", "5"]
    last = (
        f"other work, left out: reviews {'b' * 16} (records: 1); --allow-different-work includes it"
    )
    assert out.splitlines()[-1] == last
    out = run_quietly("--compare", own, others, "--allow-different-work")
    assert [line.split()[0] for line in out.splitlines()[3:-1]] == ["3", "6", "4", "5"]
    assert "other work: reviews" in out and "other work, included: reviews bbb" in out
    changed = record(7, work_fingerprint="c" * 16, pad_to=9)
    out = run_quietly("--compare", own, write_records("c.jsonl", changed), "--allow-different-work")
    assert "other work: reviews" in out and "other work: --pad-to 9" in out
    (first,) = read_records(write_records("b.jsonl", record(work_fingerprint="b" * 16)))
    out = run_quietly("--compare", "b.jsonl", own)
    assert first["work_fingerprint"] not in out and "a" * 16 in out.splitlines()[-1]


def test_the_readme_command_shows_a_new_machine_beside_the_shipped_ones(tmp_path):
    shipped = read_records(str(EPOCH_TIMES))[0]
    mine = shipped | {"label": "mine", "seconds_per_epoch": record(77)["seconds_per_epoch"]}
    write_records("mine.json", mine)
    out = run_quietly("--compare", "mine.json", EPOCH_TIMES, "--figure", "epoch_times.png")
    assert "77   38.5       154  mine" in out and "NVIDIA A100" in out
    assert (tmp_path / "epoch_times.png").stat().st_size > 10_000


def test_machines_of_one_name_are_told_apart():
    twins = [record(1878, processor_model="family 6, model 85"), record(293, cores=2)]
    named = record(5, label="under the desk", processor_model="family 6, model 85")
    several = record(6, device="cuda", device_name="NVIDIA X", processes=8)
    out = run_quietly("--compare", write_records("r.jsonl", *twins, named, several))
    machines = [line.split("  ")[-1] for line in out.splitlines()[3:]]
    assert machines == [
        "under the desk, 2 threads",
        "8 x NVIDIA X",
        "Some (2 cores), 2 threads",
        "Some (family 6, model 85), 2 threads",
    ]


def test_what_all_records_share_is_said_once():
    rows = [record(1, extra=1), record(2, compile=True, precision="bf16")]
    rows = [r | {"seconds_per_epoch_is": "extrapolated from 3 steps"} for r in rows]
    out = run_quietly("--compare", write_records("r.jsonl", *rows))
    assert out.splitlines()[1] == "all measured: 2 threads, extrapolated from part of the epoch"
    assert out.count("extrapolated") == 1
    assert [line.split("  ")[-1] for line in out.splitlines()[3:]] == [
        "Some, fp32",
        "Some, bf16, compiled",
    ]


def test_the_model_and_clock_of_the_processor_are_read(tmp_path, monkeypatch):
    text = (
        "cpu family\t: 6\nmodel\t\t: 207\nmodel name\t: X\nstepping\t: 2\ncpu MHz\t\t: 2100.005\n"
    )
    (tmp_path / "cpuinfo").write_text(text)
    paths = {"/proc/cpuinfo": tmp_path / "cpuinfo"}
    monkeypatch.setattr(comp_utils, "Path", lambda name: paths.get(name, tmp_path / "missing"))
    assert comp_utils.processor_model() == "family 6, model 207, stepping 2, 2.1 GHz"


# ------------------------------------------------------------------------------------------ refused

BROKEN = {
    "not JSON": b"{",
    "not an object": b"[1]",
    "nothing": b"",
    "not text": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "no device": json.dumps(record(device_name=3)).encode(),
    "no work": json.dumps(record(work_fingerprint=None)).encode(),
    "no seconds": json.dumps(record() | {"seconds_per_epoch": 3}).encode(),
    "seconds below 0": json.dumps(record(-1.0)).encode(),
    "endless seconds": json.dumps(record(math.inf)).encode(),
    "seconds in words": json.dumps(record() | {"seconds_per_epoch": {"median": "3"}}).encode(),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_record_is_refused(content, tmp_path, capsys):
    (tmp_path / "r.jsonl").write_bytes(content)
    (line,) = refuse(["--compare", "r.jsonl"], capsys)
    assert "--compare r.jsonl" in line and "; " in line


ODD_FACTS = [{"threads": "many"}, {"workload": {"a": 1}}, {"label": 7}, {"cores": [2]}]


@pytest.mark.parametrize("facts", ODD_FACTS)
def test_facts_of_other_types_are_refused(facts, capsys):
    name = write_records("r.jsonl", record(), record(3, **facts))
    (line,) = refuse(["--compare", name, "--figure", "f.png"], capsys)
    assert "record 2" in line and " is not a " in line


@pytest.mark.parametrize("name", [*record(), "processes", "cores", "n_layers", "dataset", "source"])
def test_facts_that_are_missing_are_done_without(name):
    shown = record(3, published=name == "source")
    shown[name] = None
    if name in ("device_name", "work_fingerprint", "seconds_per_epoch"):
        return  # these are needed: see above
    out = run_quietly("--compare", write_records("r.jsonl", record(), shown), "--figure", "f.png")
    assert "1.5         6" in out or name == "workload"


REFUSED = {
    "no file": ("--compare nowhere", ["--compare nowhere", "give a run folder or file"]),
    "no run": ("--compare .", ["config.json"]),
    "figure of what": ("--figure f.png", ["--figure", "--compare"]),
    "figure of a kind": ("--compare r.jsonl --figure f.gif", ["--figure f.gif", ".png, .svg"]),
    "figure nowhere": ("--compare r.jsonl --figure no/f.png", ["--figure no/f.png", "folder"]),
    "allowed for what": ("--allow-different-work", ["--allow-different-work", "--compare"]),
    "with training": ("--compare r.jsonl --epochs 3", ["--epochs", "leave it out"]),
    "two at once": ("--benchmark 3 --check-device", ["--check-device and --benchmark", "one"]),
    "a folder for nothing": ("--check-device --run-dir r", ["--run-dir", "leave it out"]),
    "resumed": ("--benchmark 3 --resume --run-dir r", ["--resume and --benchmark", "one"]),
    "no workload": ("--workload mine", ["--workload mine", "one of original, reviews"]),
    "no steps": ("--benchmark 0", ["--benchmark 0", "at least 1"]),
    "label of what": ("--label mine", ["--label", "--benchmark"]),
    "TF32 on a CPU": ("--tf32 --device cpu", ["--tf32", "needs cuda", "leave it out"]),
}


@pytest.mark.parametrize("argv, words", REFUSED.values(), ids=REFUSED.keys())
def test_impossible_measurements_are_refused(argv, words, capsys):
    write_records("r.jsonl", record())
    (line,) = refuse(argv.split(), capsys)
    assert [word for word in words if word not in line] == []
