import os
import tempfile

import pytest

# Before anything imports `datasets`: no test reads or fills the user's own cache, or asks the Hub.
CACHE = tempfile.TemporaryDirectory(prefix="rhea-tests-")
os.environ["HF_HOME"] = CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"
# Before anything imports torch: runs are compared bit for bit, so all have one number of threads,
# in this process and in those it starts.
os.environ["OMP_NUM_THREADS"] = "1"

import gzip
import shutil
import signal
from pathlib import Path

import torch
from helpers import N_TRAIN, TINY, csv_bytes, run_quietly, toy_corpus, write_files
from kill import COMMANDS, command, write_data
from processes import skip_pictures
from runs import raise_own_signal, stop_after

from config import ASSETS
from errors import StopSignals


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, so that runs/ never lands in the project."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    """They take most of the time of a small run, so a test that needs them says so by its mark."""
    if not request.node.get_closest_marker("pictures"):
        skip_pictures(monkeypatch.setattr)


@pytest.fixture(scope="session")
def slice_of_reviews(tmp_path_factory) -> Path:
    """A folder with the first embedded reviews as train.csv, validation.csv and test.csv."""
    folder = tmp_path_factory.mktemp("data") / "reviews"
    folder.mkdir()
    for split, n in (("train", N_TRAIN), ("validation", 40), ("test", 40)):
        with gzip.open(ASSETS / "rotten_tomatoes" / f"{split}.tsv.gz", "rt", encoding="utf-8") as f:
            rows = [line.rstrip("\n").split("\t") for line in f][1 : n + 1]
        (folder / f"{split}.csv").write_bytes(csv_bytes(rows))
    return folder


@pytest.fixture(scope="session")
def finished(slice_of_reviews, tmp_path_factory) -> tuple[Path, list[str], str]:
    """One run on the slice: its folder, its command line, what it printed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--run-dir", str(run)]
    return run, argv, run_quietly(*argv)


@pytest.fixture(scope="session")
def finished_translator(tmp_path_factory) -> tuple[Path, list[str], str]:
    """One run on a toy corpus: its folder, its command line, what it printed."""
    folder = tmp_path_factory.mktemp("translator")
    (folder / "data").mkdir()
    toy_corpus(folder / "data", list, n=150)
    argv = "--task translation --source-column in --target-column out --batch-tokens 512".split()
    tiny = [a for a in TINY if a not in ("--batch-size", "32")]
    argv += [*tiny, "--dataset", str(folder / "data"), "--run-dir", str(folder / "run")]
    return folder / "run", argv, run_quietly(*argv)


@pytest.fixture
def run_copy(finished) -> Path:
    """The run, to be used or spoilt."""
    return Path(shutil.copytree(finished[0], "copy"))


@pytest.fixture
def train(slice_of_reviews):
    """Trains on the slice with further options; gives the run folder."""

    def train_with(name: str, *options) -> Path:
        run_quietly(*TINY, "--dataset", slice_of_reviews, "--run-dir", name, *options)
        return Path(name)

    return train_with


# ------------------------------------------------- of tests that stop, resume and damage runs


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_stops_pytest(request):
    """A training in this process handles Ctrl-C itself, and the next test would start."""
    receive = StopSignals._receive

    def received(self, signum, frame):
        if signum == signal.SIGINT and frame.f_code is not raise_own_signal.__code__:
            request.session.shouldstop = "Ctrl-C"
        receive(self, signum, frame)

    StopSignals._receive = received
    yield
    StopSignals._receive = receive


@pytest.fixture(scope="module")
def one_thread():
    """In this process as in the others: another number of threads rounds sums differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpora(tmp_path_factory) -> dict[str, list[str]]:
    """The options that name a small data set of each task."""
    sizes = {"train": 150, "validation": 20, "test": 30}
    folder, texts = tmp_path_factory.mktemp("corpora"), {}
    for split, n in sizes.items():
        for dataset in ("rotten_tomatoes", "libreoffice_help"):
            with gzip.open(ASSETS / dataset / f"{split}.tsv.gz", "rt", encoding="utf-8") as lines:
                rows = [line.rstrip("\n").split("\t") for line in lines][1:]
            texts[dataset] = [row for row in rows if len(row[0]) < 80][:n]
        write_files({str(folder / f"reviews/{split}.csv"): csv_bytes(texts["rotten_tomatoes"])})
        for i, language in enumerate(("en", "de")):
            text = "".join(row[i] + "\n" for row in texts["libreoffice_help"])
            write_files({str(folder / f"pairs/{split}.{language}"): text.encode()})
    pairs = ["--dataset", str(folder / "pairs"), "--task", "translation"]
    pairs += "--source-column en --target-column de --beam-size 2".split()
    return {"classification": ["--dataset", str(folder / "reviews")], "translation": pairs}


@pytest.fixture
def patch():
    """Changes that a test can undo before it ends; monkeypatch also holds its folder."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """A folder with a small data set of each task."""
    folder = tmp_path_factory.mktemp("small")
    write_data(folder)
    return folder


@pytest.fixture(scope="session")
def unbroken(small_data, tmp_path_factory) -> dict[str, Path]:
    """By task, the folder of a run of 3 epochs that nothing interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    for task in COMMANDS:
        run_quietly(*command(task, small_data, folder / task, "--epochs", 3))
    return {task: folder / task for task in COMMANDS}


@pytest.fixture(scope="session")
def stopped_run(small_data, tmp_path_factory) -> Path:
    """A classification that was stopped in the middle of its second epoch, after 7 of 15 steps."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    stop_after(7, command("classification", small_data, run, "--epochs", 3))
    return run


@pytest.fixture
def stopped(stopped_run) -> Path:
    return Path(shutil.copytree(stopped_run, "run"))


@pytest.fixture
def done(unbroken) -> Path:
    return Path(shutil.copytree(unbroken["classification"], "run"))
