# ruff: noqa: SIM905, a command line reads better in one piece
"""Many processes: the update of one, the test result of one, and what happens when one is lost.

Most groups here are forked from a process that has imported everything already, and end in
`ddp_main.join` as those of a launcher do; where the launcher itself is meant, it is a real one.
"""

import gzip
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path

import pytest
import torch
from kill_ranks import launched, torchrun
from safetensors.torch import load_file
from test_main import csv_bytes, events, run_quietly, without_times, write_files

import comp_utils
import ddp_main
import ddp_utils
import main
import procedures
from comp_utils import BadInput, pick_device
from data import ASSETS, TextData

PROJECT = Path(main.__file__).parent
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["ddp_main", "torch._dynamo", "matplotlib.figure", "sacrebleu"])
SOON = 30  # seconds in which all processes must have ended once one has failed
OPTIONS = (
    "--device cpu --n-layers 1 --d-model 16 --d-ff 16 --n-heads 2 --vocab-size 400 --lr 1e-3 "
    "--warmup-steps 5 --average-checkpoints 1 --batch-tokens 300"  # of unequal counts, so
).split()
SIZES = {"train": 150, "validation": 20, "test": 30}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """In this process as in the others: sums of other threads would be rounded in other places."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, list[str]]:
    """The options that name a small data set of each task."""
    folder, texts = tmp_path_factory.mktemp("corpora"), {}
    for split, n in SIZES.items():
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


# --------------------------------------------------------------------------- groups that are forked


@dataclass(frozen=True)
class Ended:
    """What a process left behind."""

    status: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_rank(environment: dict[str, str], prepare: Callable[[], None], argv: list[str]) -> None:
    """The life of one process."""
    os.environ.update(environment)
    for fd, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{kind}.{environment['RANK']}", os.O_WRONLY | os.O_CREAT), fd)
    sys.argv = ["ddp_main.py", *argv]
    torch.set_num_threads(1)
    prepare()
    sys.exit(ddp_main.join(argv))


def nothing() -> None: ...


@contextmanager
def group(n: int, *argv, prepare: Callable[[], None] = nothing, **environment) -> Iterator[list]:
    """n processes with one command line. None of them outlives this."""
    with chdir(PROJECT):
        forkserver.ensure_running()
    for path in [*Path().glob("out.*"), *Path().glob("err.*")]:
        path.unlink()
    shared = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1, **environment}
    processes = []
    for i in range(n):
        own = {"RANK": i, "LOCAL_RANK": i, **shared}
        own = {name: str(value) for name, value in own.items()}
        processes.append(FORK.Process(target=as_rank, args=(own, prepare, [*map(str, argv)])))
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def wait_for(processes: list) -> list[Ended]:
    """What each process left; all must end, and soon after the first."""
    first = connection.wait([p.sentinel for p in processes], timeout=50)
    assert first, "none has ended"
    end = time.monotonic() + SOON
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    assert [i for i, p in enumerate(processes) if p.exitcode is None] == [], "some hang"
    texts = [
        [Path(f"{kind}.{i}").read_text() for kind in ("out", "err")] for i in range(len(processes))
    ]
    return [Ended(p.exitcode, *text) for p, text in zip(processes, texts)]


def ranks(n: int, *argv, **how) -> list[Ended]:
    """What n processes with one command line left."""
    with group(n, *argv, **how) as processes:
        return wait_for(processes)


def ranks_quietly(n: int, *argv, **how) -> str:
    """Standard output of n processes that must succeed, where rank 0 alone speaks."""
    first, *others = ranks(n, *argv, **how)
    assert first.status == 0, first.err
    assert others == [Ended(0, "", "")] * (n - 1)
    return first.out


def is_seen(name: str, classifies: bool) -> bool:
    """Whether the loss depends on a parameter. Softmax takes off what W_k.bias adds to all scores,
    and a classifier's decoder attends to one token alone, whatever its score: the gradient is
    rounding, which Adam makes as large as any other, or on some processors 0."""
    of_one_token = re.search(r"decoder\.\d+\.self_attention\.W_[qk]\.", name)
    return not (name.endswith("W_k.bias") or (classifies and of_one_token))


def assert_same_weights(run: Path | str, other: Path | str, *, exactly: bool = False) -> None:
    """Two numbers have one sum; more have one for each order, and only then rounding may differ."""
    pair = [load_file(Path(folder, "best.safetensors")) for folder in (run, other)]
    if not exactly:
        classifies = bool(json.loads(Path(run, "config.json").read_text())["classes"])
        pair = [{k: w for k, w in weights.items() if is_seen(k, classifies)} for weights in pair]
    torch.testing.assert_close(*pair, rtol=0, atol=0.0 if exactly else 1e-6)


# --------------------------------------------------------------------------------- the same update


@pytest.mark.parametrize(
    "task, n, options",
    [
        ("classification", 2, "--max-steps 50 --dropout 0"),
        ("translation", 2, "--max-steps 50 --dropout 0"),
        ("classification", 4, "--max-steps 10 --dropout 0"),
        ("classification", 2, "--max-steps 10 --dropout 0.3 --r-drop 1 --accumulate 2"),
        ("translation", 3, "--max-steps 10 --dropout 0.3 --average-checkpoints 2"),
    ],
)
def test_processes_make_the_update_of_accumulated_micro_batches(task, n, options, corpora):
    argv = [*OPTIONS, *corpora[task], "--epochs", "30", *options.split()]
    ranks_quietly(n, *argv, "--run-dir", "many")
    together = n * (2 if "--accumulate" in argv else 1)
    run_quietly(*argv, "--run-dir", "one", "--accumulate", together)
    assert_same_weights("many", "one", exactly=together == 2)
    many, one = without_times("many"), without_times("one")
    assert len(many) == len(one)
    for event, other in zip(many, one):
        for name in [name for name, value in event.items() if isinstance(value, str)]:
            assert event.pop(name) == other.pop(name)
        assert event == pytest.approx(other, rel=1e-6, abs=1e-6)
    steps = [event["step"] for event in events("many", "step")]
    assert steps == list(range(1, int(options.split()[1]) + 1))


def record_plans() -> None:
    """Has each process write down which sentences of which split it reads."""
    batches = TextData.batches

    def recorded(self, split, plan, device):
        with open(f"plans.{os.environ.get('RANK', 'one')}", "a") as out:
            out.write(json.dumps([split, [rows.tolist() for rows in plan]]) + "\n")
        return batches(self, split, plan, device)

    TextData.batches = recorded


def recorded_plans(who: int | str) -> list[tuple[str, list[list[int]]]]:
    return [json.loads(line) for line in Path(f"plans.{who}").read_text().splitlines()]


def test_micro_batches_are_dealt_out_by_their_place_in_the_plan(corpora, monkeypatch):
    monkeypatch.setattr(TextData, "batches", TextData.batches)
    argv = [*OPTIONS, *corpora["classification"], "--epochs", "1", "--accumulate", "2"]
    ranks_quietly(3, *argv, "--run-dir", "many", prepare=record_plans)
    record_plans()
    run_quietly(*argv, "--run-dir", "one")
    whole = recorded_plans("one")
    dealt = [recorded_plans(r) for r in range(3)]
    splits = ["train", "validation", "train", "validation", "test"]  # the first two: a rehearsal
    assert all([split for split, _ in plans] == splits for plans in (whole, *dealt))
    for i, split in [*enumerate(splits)][2:]:
        _, plan = whole[i]
        n_last = len(plan) % 6 or 6  # micro-batches in the last update
        assert n_last < 6 or split != "train", "the last update is as large as the others"
        for r in range(3):
            fillers = [[]] if split == "train" and r >= n_last else []
            assert dealt[r][i][1] == plan[r::3] + fillers


def test_more_processes_than_micro_batches(corpora):
    argv = [*OPTIONS, *corpora["classification"], "--batch-tokens", "2500", "--epochs", "2"]
    ranks_quietly(4, *argv, "--run-dir", "many")
    run_quietly(*argv, "--run-dir", "one", "--accumulate", 4)
    run_quietly(*argv, "--run-dir", "single", "--max-steps", 2)
    assert [e["updates_of_an_epoch"] for e in events("many", "epoch")] == [1, 1]
    assert 1 < events("single", "epoch")[0]["updates_of_an_epoch"] < 4
    assert_same_weights("many", "one")


# ----------------------------------------------------------------------------- the same test result


@pytest.fixture(scope="module")
def trained(corpora, tmp_path_factory) -> dict[str, Path]:
    """A trained model of each task, in its folder."""
    folder = tmp_path_factory.mktemp("trained")
    for task, options in corpora.items():
        argv = [*OPTIONS, *options, "--epochs", "3", "--lr", "1e-2", "--max-length", "100"]
        argv += ["--run-dir", str(folder / task)]
        run_quietly(*argv)
    return {task: folder / task for task in corpora}


@pytest.mark.parametrize("task", ["classification", "translation"])
def test_any_number_of_processes_gets_the_same_test_result(task, trained):
    for n in (2, 3):
        shutil.copytree(trained[task], str(n))
        Path(str(n), "test.hypotheses.txt").unlink(missing_ok=True)
        ranks_quietly(n, "--run-dir", n, "--test-only")
    (one,) = events(trained[task], "test")
    del one["step"]
    assert [events(str(n), "test")[1] for n in (2, 3)] == [one, one]
    if task == "translation":
        folders = [trained[task], "2", "3"]
        texts = [Path(folder, "test.hypotheses.txt").read_bytes() for folder in folders]
        assert texts[0] == texts[1] == texts[2]
        assert len(set(texts[0].splitlines())) > 1


@pytest.mark.parametrize("task", ["classification", "translation"])
def test_any_number_of_processes_gives_the_same_answers(task, trained):
    texts = [f"open file {i} and choose the {'very ' * (i % 5)}last page" for i in range(70)]
    write_files({"in.txt": "\n".join([*texts, "", "long " * 99]).encode()})
    argv = ["--run-dir", str(trained[task]), "--predict", "in.txt", "--batch-size", "30"]
    (one,), (two, silent) = ranks(1, *argv), ranks(2, *argv)
    assert one == two and one.status == 0
    assert len(one.out.splitlines()) == 72 and len(one.err.splitlines()) == 2
    assert silent == Ended(0, "", "")


# ---------------------------------------------------------------------------------------- refusals


def refused_once(n: int, *argv, **how) -> str:
    """The one line in which n processes refuse a command line, by the voice of one of them."""
    ended = ranks(n, *argv, **how)
    assert [e.status for e in ended] == [2] * n
    (line,) = "".join(e.err for e in ended).splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--epochs", "--epochs: expected one argument"),
        ("--epoch 3", "--epoch: no such option; did you mean --epochs?"),
        ("--dataset nowhere.csv", "nowhere.csv"),
        ("--world-size 3", "--world-size 3: the launcher started 2"),
        ("--run-dir nowhere --test-only", "--run-dir nowhere: no such run"),
        ("--run-dir TRAINED --predict -", "--predict -: standard input goes to one process"),
        ("--run-dir TRAINED --predict latin.txt", "latin.txt, line 5000"),
    ],
)
def test_what_cannot_work_is_told_once(argv, words, trained):
    write_files({"latin.txt": b"\n" * 4999 + b"\xff\n"})
    argv = argv.replace("TRAINED", str(trained["classification"])).split()
    assert words in refused_once(2, *argv)


def test_fewer_sentences_than_processes_are_refused(corpora):
    write_files({"few.csv": csv_bytes([("good", "a"), ("bad", "b")])})
    argv = [*OPTIONS, *corpora["classification"]]
    write_files({f"d/{split}.csv": Path("few.csv").read_bytes() for split in SIZES})
    line = refused_once(3, *argv, "--dataset", "d", "--run-dir", "r")
    assert "2 training sentences for 3 processes; start at most 2" in line
    assert not Path("r").exists()


def test_restarts_need_a_folder_to_go_on_in(corpora):
    argv = [*OPTIONS, *corpora["classification"]]
    line = refused_once(2, *argv, TORCHELASTIC_MAX_RESTARTS=3)
    assert line.startswith("error: --max-restarts: give --run-dir")


@pytest.mark.parametrize(
    "argv, words",
    [
        ("", ["--world-size: say how many processes, or start with torchrun"]),
        ("--world-size 0", ["--world-size 0: give at least 1"]),
        ("--world-size two", ["--world-size two: give a whole number"]),
        ("--world-size 2 --epochs 0", ["--epochs 0: give at least 1"]),
    ],
)
def test_a_start_that_cannot_be_is_refused_before_any_process(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(ddp_main, "launch", lambda *_: pytest.fail("started"))
    assert main.exit_status(lambda: ddp_main.start(argv.split())) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)


def test_one_gpu_of_a_mac_is_refused_to_many_processes(monkeypatch):
    monkeypatch.setattr(comp_utils, "available_devices", lambda: ["mps", "cpu"])
    assert pick_device("mps").type == pick_device("auto").type == "mps"
    with pytest.raises(BadInput, match=r"^--device mps: 2 processes, but a Mac has one GPU"):
        pick_device("mps", local_world_size=2)
    assert pick_device("auto", local_world_size=2).type == "cpu"


@pytest.mark.parametrize("kind", ["cuda", "auto"])
def test_each_process_gets_a_cuda_device_of_its_own_or_is_refused(kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for i in (0, 1):
        device = pick_device(kind, local_rank=i, local_world_size=2)
        assert (device.type, device.index) == ("cuda", i)
    with pytest.raises(BadInput, match="3 processes on this machine, which has 2 CUDA devices"):
        pick_device(kind, local_rank=2, local_world_size=3)
    assert pick_device("cpu", local_world_size=3).type == "cpu"


# ----------------------------------------------------------------------------- without a group


def test_without_a_group_every_function_is_the_identity(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of a job, whose launcher started others than us
    assert (ddp_utils.rank(), ddp_utils.world_size()) == (0, 1)
    assert (ddp_utils.local_rank(), ddp_utils.local_world_size()) == (0, 1)
    values, model = torch.arange(3), torch.nn.Linear(2, 2)
    before = model.weight.clone()
    assert ddp_utils.sum_across_ranks(values) is values and values.tolist() == [0, 1, 2]
    assert ddp_utils.wrap(model, torch.device("cpu")) is model
    ddp_utils.broadcast_weights(model)
    assert torch.equal(model.weight, before)
    box = object()
    assert ddp_utils.broadcast(box) is box and ddp_utils.gather(box) == [box]
    for once in (ddp_utils.agreed, ddp_utils.by_rank_0, ddp_utils.one_before_others):
        calls = []
        assert once(lambda calls=calls: calls.append(box) or box) is box and calls == [box]
    with pytest.raises(BadInput) as told:
        ddp_utils.agreed(lambda: pick_device("tpu"))
    assert not isinstance(told.value, ddp_utils.SharedError)
    with ddp_utils.defer_sync(model, last=False):
        model(torch.ones(2)).sum().backward()
    assert model.weight.grad is not None
    assert [ddp_utils.agree_to_stop(wanted, 7) for wanted in (True, False)] == [True, False]
    assert ddp_utils.restarts() == (0, 0)
    assert not ddp_utils.is_lost_peer(RuntimeError("Connection reset by peer"))


def test_the_cores_are_shared_out_to_the_processes_that_a_launcher_starts(monkeypatch):
    commands = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    monkeypatch.setattr("torch.distributed.run.run", lambda args: commands.append(args))
    monkeypatch.setattr(ddp_utils.logging, "disable", lambda: None)
    for given, threads in (({}, "3"), ({"OMP_NUM_THREADS": "5"}, "5")):
        monkeypatch.setattr(os, "environ", {**given})
        assert ddp_utils.launch(2, "program.py", "--flag", "7") == 0
        assert os.environ["OMP_NUM_THREADS"] == threads and ddp_utils.THREADS_SET in os.environ
        args = commands.pop()
        assert args.nproc_per_node == "2"
        assert [args.training_script, *args.training_script_args] == ["program.py", "--flag", "7"]


def six_cores() -> None:
    os.sched_getaffinity = lambda _: set(range(6))


@pytest.mark.parametrize(
    "environment, threads",
    [
        ({"OMP_NUM_THREADS": 1}, 3),  # as torchrun has it
        ({"OMP_NUM_THREADS": 1, ddp_utils.THREADS_SET: 1}, 1),  # as it was asked for
    ],
)
def test_torchruns_one_thread_is_not_taken_for_a_wish(environment, threads, corpora):
    argv = [*OPTIONS, *corpora["classification"], "--max-steps", "1", "--run-dir", "r"]
    out = ranks_quietly(2, *argv, prepare=six_cores, **environment)
    config = json.loads(Path("r/config.json").read_text())
    assert (config["processes"], config["threads"]) == (2, threads)
    assert f"2 processes of {threads} threads" in out


# ---------------------------------------------------------------------------------- a failing rank


def fails(error: BaseException) -> Callable:
    """Something that works six times, and then no more."""

    def failing(function: Callable) -> Callable:
        calls = iter(range(6))

        def called(*args, **kwargs):
            if next(calls, None) is None:
                raise error
            return function(*args, **kwargs)

        return called

    return failing


def is_mine() -> bool:
    return os.environ["RANK"] == os.environ["FAILING"]


def loses_the_disk() -> None:
    if is_mine():
        TextData.collate = fails(OSError(5, "Input/output error", "rows.arrow"))(TextData.collate)


def runs_out_of_memory() -> None:
    if is_mine():
        error = torch.OutOfMemoryError("CUDA out of memory.")
        procedures.loss_sums = fails(error)(procedures.loss_sums)


def has_a_bug() -> None:
    if is_mine():
        procedures.loss_sums = fails(ZeroDivisionError("half"))(procedures.loss_sums)


def is_not_finite() -> None:
    if is_mine():
        loss_sums = procedures.loss_sums
        procedures.loss_sums = lambda *args: tuple(x * torch.nan for x in loss_sums(*args))


def finds_no_data() -> None:
    if is_mine():
        main.load_splits = fails_at_once


def fails_at_once(*args, **kwargs):
    raise BadInput("--dataset d: not on this machine; copy it there")


@pytest.mark.parametrize(
    "fault, rank, words",
    [
        (loses_the_disk, 1, "error: rank 1: [Errno 5] Input/output error: 'rows.arrow'"),
        (runs_out_of_memory, 1, "error: rank 1: out of memory at a batch of "),
        (runs_out_of_memory, 0, "error: out of memory at a batch of "),
        (has_a_bug, 1, "ZeroDivisionError: half\nin rank 1 of 2\n"),
        (is_not_finite, 1, "error: rank 1: step 1: the loss is nan at learning rate "),
        (finds_no_data, 1, "error: rank 1: --dataset d: not on this machine"),
    ],
)
def test_a_rank_that_fails_ends_all_with_its_own_message(fault, rank, words, corpora):
    argv = [*OPTIONS, *corpora["classification"], "--epochs", "100", "--run-dir", "r"]
    ended = ranks(2, *argv, prepare=fault, FAILING=rank)
    assert all(e.status in (1, 2) for e in ended)
    said = "".join(e.err for e in ended)
    assert said.count(words) == 1
    assert said.count("Traceback") == (fault is has_a_bug)


# ----------------------------------------------------------------------------------------- stopping


def stops_in_an_update() -> None:
    """A signal to one process alone, in an update of its choice."""
    step = procedures.Trainer.step

    def updated(self, *args):
        if self.state.step + 1 == int(os.environ["STOP_IN"]) and is_mine():
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        return step(self, *args)

    procedures.Trainer.step = updated


N_UPDATES = 8  # of an epoch, by two processes


@pytest.mark.parametrize(
    "rank, signum, step", [(0, signal.SIGTERM, N_UPDATES + 2), (1, signal.SIGINT, N_UPDATES)]
)
def test_a_signal_to_one_stops_all_and_any_number_of_processes_goes_on(
    rank, signum, step, corpora, monkeypatch
):
    argv = [*OPTIONS, *corpora["classification"], "--epochs", "3", "--dropout", "0.3"]
    how = {"prepare": stops_in_an_update, "FAILING": rank, "SIGNAL": int(signum), "STOP_IN": step}
    ended = ranks(2, *argv, "--run-dir", "stopped", **how)
    assert [e.status for e in ended] == [128 + signum] * 2
    n_done = min(
        step + 2, N_UPDATES * math.ceil(step / N_UPDATES)
    )  # others may have begun the next
    command = "python ddp_main.py --world-size 2 --resume --run-dir stopped"
    said = f"stopped; update {n_done} is kept; go on: {command}"
    assert [e.err.strip() for e in ended] == [said, ""]
    steps = [*range(1, n_done + 1)]
    assert [event["step"] for event in events("stopped", "step")] == steps
    shutil.copytree("stopped", "alone")

    run_quietly("--run-dir", "stopped", "--resume", "--accumulate", 2)
    run_quietly(*argv, "--run-dir", "unbroken", "--accumulate", 2)
    assert [e["updates"] for e in events("unbroken", "epoch")] == [N_UPDATES] * 3
    assert_same_weights("stopped", "unbroken", exactly=True)
    assert without_times("stopped") == without_times("unbroken")

    # Alone, without accumulation, it goes on with the micro-batch after those that two had.
    monkeypatch.setattr(TextData, "batches", TextData.batches)
    record_plans()
    run_quietly(*argv, "--run-dir", "whole", "--max-steps", 32)
    run_quietly("--run-dir", "alone", "--resume", "--max-steps", n_done + 2)
    plans = [plan for split, plan in recorded_plans("one") if split == "train"]
    _, *epochs, _, rest = plans
    n_micro_batches = 2 * n_done
    whole = [rows for plan in epochs for rows in plan]
    assert rest[:2] == whole[n_micro_batches : n_micro_batches + 2]


def test_a_stopped_run_of_two_machines_says_what_each_is_to_do(corpora):
    argv = [*OPTIONS, *corpora["classification"], "--run-dir", "r"]
    how = {"prepare": stops_in_an_update, "FAILING": 0, "SIGNAL": int(signal.SIGINT), "STOP_IN": 2}
    ended = ranks(2, *argv, **how, LOCAL_WORLD_SIZE=1)
    assert [e.status for e in ended] == [130, 130]
    command = "torchrun as before on each machine, with --resume --run-dir r"
    assert ended[0].err.strip().endswith(f"is kept; go on: {command}") and ended[1].err == ""


# ------------------------------------------------------------------------------------ the launcher

ONE_THREAD = {"OMP_NUM_THREADS": "1", ddp_utils.THREADS_SET: "1"}
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="asks /proc")


@ON_LINUX
def test_the_launcher_stops_goes_on_and_tells_of_a_killed_process(corpora, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program = [sys.executable, PROJECT / "ddp_main.py", "--world-size", 2]
    argv = [*OPTIONS, *corpora["classification"], "--epochs", 100000, "--run-dir", "r"]
    with launched([*program, *argv]) as group:
        group.wait_for("epoch 2:")
        group.launcher.send_signal(signal.SIGINT)
        assert group.end() == 130
        last = group.said().strip().splitlines()[-1]
        command = f"python {program[1]} --world-size 2 --resume --run-dir r"
        assert re.fullmatch(f"stopped; update \\d+ is kept; go on: {command}", last)
        assert group.pids() == []
    config = json.loads(Path("r/config.json").read_text())
    assert config["threads"] == ddp_utils.threads_of_one(2)
    n_epochs = len(events("r", "epoch"))

    with launched([*program, "--resume", "--run-dir", "r"]) as group:
        group.wait_for(f"epoch {n_epochs + 2}:")
        group.launcher.send_signal(signal.SIGTERM)
        assert group.end() == 143
        assert group.said().strip().splitlines()[-1].endswith(f"go on: {command}")
        n_epochs = len(events("r", "epoch"))

    with launched([*program, "--resume", "--run-dir", "r"]) as group:
        group.wait_for(f"epoch {n_epochs + 2}:")
        group.kill(1)
        assert group.end(SOON) == 1
        errors = [line for line in group.said().splitlines() if line.startswith("error: ")]
        lost = "error: another process of the run has gone, so this one ends as well"
        assert set(errors) - {lost} == {"error: process 1 of 2 was ended by signal 9"}
        assert "Traceback" not in group.said()
        assert group.pids() == []
    steps = [event["step"] for event in events("r", "step")]
    assert steps == [*range(1, len(steps) + 1)]


@ON_LINUX
def test_a_run_whose_ranks_are_killed_ends_as_an_unbroken_one(corpora):
    argv = [*OPTIONS, *corpora["classification"], "--epochs", 100, "--dropout", 0.3]
    options = [*argv, "--run-dir", "r", "--checkpoint-every", 5]
    command = torchrun(2, f"--master-port={free_port()}", "--max-restarts=2")
    draw = random.Random()
    with launched([*command, *options], **ONE_THREAD) as group:
        for i, rank in enumerate((1, 0)):
            group.wait_for("goes on after update " if i else "epoch 1:")
            time.sleep(draw.uniform(0, 1))
            group.kill(rank)
        assert group.end() == 0, group.said()
        assert group.said().count("goes on after update ") == 2
    run_quietly(*argv, "--run-dir", "unbroken", "--accumulate", 2)
    assert_same_weights("r", "unbroken", exactly=True)
    assert without_times("r") == without_times("unbroken")


@ON_LINUX
def test_two_launchers_are_two_machines_of_one_run(corpora):
    argv = [*OPTIONS, *corpora["classification"], "--epochs", 3, "--dropout", 0.3]
    argv += ["--run-dir", "run", "--checkpoint-every", 1]

    def two_machines(*argv) -> None:
        with ExitStack() as stack:
            groups, port = [], free_port()
            for i in (0, 1):
                where = [f"--node-rank={i}", "--master-addr=127.0.0.1", f"--master-port={port}"]
                command = [*torchrun(1, "--nnodes=2", *where), *argv]
                Path(f"node{i}").mkdir(exist_ok=True)
                cache = str(Path(f"node{i}.cache").absolute())
                own = launched(command, f"node{i}", HF_HOME=cache, OMP_NUM_THREADS="1")
                groups.append(stack.enter_context(own))
            assert [group.end() for group in groups] == [0, 0], [g.said() for g in groups]
            assert groups[1].said() == ""

    two_machines(*argv, "--max-steps", 4)
    two_machines("--resume", "--run-dir", "run", "--max-steps", 13)
    assert [path.name for path in Path("node1").iterdir()] == ["log"]
    run_quietly(*argv, "--accumulate", 2, "--max-steps", 4)
    run_quietly("--resume", "--run-dir", "run", "--max-steps", 13)
    assert_same_weights("node0/run", "run", exactly=True)
    assert without_times("node0/run") == without_times("run")
