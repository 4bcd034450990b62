"""Launchers: how processes are started, given their environment, restarted and told apart."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import events, run_quietly, without_times
from processes import (
    PROJECT,
    WAIT_LIMIT,
    free_port,
    group,
    launched,
    ranks,
    ranks_quietly,
    torchrun,
)
from runs import RANK_OPTIONS, assert_same_weights

import comp_utils
import ddp_main
import ddp_utils
import main
from comp_utils import pick_device
from errors import BadInput

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_THREAD = {"OMP_NUM_THREADS": "1", ddp_utils.THREADS_SET: "1"}
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")


# -------------------------------------------------------------------------------- before the start


@pytest.mark.parametrize(
    "argv, words",
    [
        ("", ["--world-size: missing; give the number of processes, or use torchrun"]),
        ("--world-size 0", ["--world-size 0: give at least 1"]),
        ("--world-size two", ["--world-size two: give a whole number"]),
        ("--world-size 2 --epochs 0", ["--epochs 0: give at least 1"]),
    ],
)
def test_a_start_that_cannot_work_is_refused_before_any_process(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(ddp_main, "launch", lambda *_: pytest.fail("started"))
    assert main.exit_status(lambda _: ddp_main.start(argv.split())) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)


def test_the_gpu_of_a_mac_is_refused_to_several_processes(monkeypatch):
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


def test_a_launcher_shares_the_cores_among_its_processes(monkeypatch):
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


# ------------------------------------------------------------------------------------- environment


def six_cores() -> None:
    os.sched_getaffinity = lambda _: set(range(6))


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment, threads",
    [
        ({"OMP_NUM_THREADS": 1}, 3),  # as torchrun sets it
        ({"OMP_NUM_THREADS": 1, ddp_utils.THREADS_SET: 1}, 1),  # as the user sets it
    ],
)
def test_the_one_thread_that_torchrun_sets_is_replaced(environment, threads, corpora):
    argv = [*RANK_OPTIONS, *corpora["classification"], "--max-steps", "1", "--run-dir", "r"]
    out = ranks_quietly(2, *argv, prepare=six_cores, **environment)
    config = json.loads(Path("r/config.json").read_text())
    assert (config["processes"], config["threads"]) == (2, threads)
    assert f"2 processes of {threads} thread" in out


@pytest.mark.slow
def test_without_local_variables_there_is_one_process_per_machine(corpora):
    argv = [*RANK_OPTIONS, *corpora["classification"], "--max-steps", "6", "--run-dir", "r"]
    ended = ranks(2, *argv, LOCAL_RANK=None, LOCAL_WORLD_SIZE=None)
    assert [e.status for e in ended] == [0, 0], ended
    words = "not set, so one process per machine is assumed; torchrun sets it"
    warnings = [e.err for e in ended]
    assert warnings == [f"warning: LOCAL_RANK and LOCAL_WORLD_SIZE: {words}\n", ""]


@pytest.mark.parametrize(
    "environment, lines",
    [
        (
            {"RANK": "0", "WORLD_SIZE": "1"},
            [
                "MASTER_ADDR: not set; start the processes with torchrun",
                "MASTER_PORT: not set; start the processes with torchrun",
            ],
        ),
        (
            {"RANK": "x", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            ["RANK x: not a whole number; start the processes with torchrun"],
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "x"},
            ["MASTER_PORT x: not a whole number; start the processes with torchrun"],
        ),
    ],
)
def test_an_incomplete_environment_is_named(environment, lines, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", environment)
    assert ddp_main.join([]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == len(lines)
    assert all(shown.startswith(f"error: {line}") for shown, line in zip(err, lines))


# ---------------------------------------------------------------------------------------- restarts


@pytest.mark.slow
def test_restarts_need_a_run_folder(corpora):
    argv = [*RANK_OPTIONS, *corpora["classification"]]
    ended = ranks(2, *argv, TORCHELASTIC_MAX_RESTARTS=3)
    assert [e.status for e in ended] == [2, 2]
    assert ended[0].err.startswith("error: --max-restarts: give --run-dir") and not ended[1].err


@pytest.mark.parametrize(
    "given, is_resumed",
    [
        ({}, True),
        ({"overwrite": True, "epochs": 3}, True),
        ({"predict": "in.txt"}, False),
        ({"test_only": True}, False),
        ({"benchmark": 3}, False),
        ({"check_device": True}, False),
    ],
)
def test_a_restart_resumes_training_and_repeats_another_command(given, is_resumed, monkeypatch):
    given = {"run_dir": "run", **given}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert ddp_main.after_restart(given) == given  # it died before there was a run
    Path("run").mkdir()
    Path("run/config.json").touch()
    rest = {name: value for name, value in given.items() if name != "overwrite"}
    assert ddp_main.after_restart(given) == ({**rest, "resume": True} if is_resumed else given)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert ddp_main.after_restart(given) == given


@pytest.mark.slow
def test_a_restarted_test_is_a_test(done):
    """As torchrun --max-restarts starts the processes the second time."""
    ended = ranks(2, "--test-only", "--run-dir", done, TORCHELASTIC_RESTART_COUNT=1)
    assert [e.status for e in ended] == [0, 0], ended
    assert "test of 20 sentences: " in ended[0].out


# --------------------------------------------------------------------------------- real launchers


@pytest.mark.slow
@ON_LINUX
def test_the_launcher_stops_resumes_and_reports_a_killed_process(corpora, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program = [sys.executable, PROJECT / "ddp_main.py", "--world-size", 2]
    argv = [*RANK_OPTIONS, *corpora["classification"], "--epochs", 100000, "--run-dir", "r"]
    with launched([*program, *argv]) as launcher:
        launcher.wait_for("\nepoch ", 2)
        launcher.launcher.send_signal(signal.SIGINT)
        assert launcher.end() == 130
        last = launcher.said().strip().splitlines()[-1]
        command = f"python {program[1]} --world-size 2 --resume --run-dir r"
        assert re.fullmatch(f"stopped; step \\d+ is saved; resume with: {command}", last)
        assert launcher.pids() == []
    config = json.loads(Path("r/config.json").read_text())
    assert config["threads"] == ddp_utils.threads_per_process(2)

    with launched([*program, "--resume", "--run-dir", "r"]) as launcher:
        launcher.wait_for("\nepoch ", 2)
        launcher.kill(1)
        assert launcher.end() == 1
        errors = [line for line in launcher.said().splitlines() if line.startswith("error: ")]
        assert "error: process 1 of 2 was killed by signal 9" in errors
        others = "error: the connection to another process failed, or that process ended: "
        assert all(x.startswith(others) for x in errors if "process 1 of 2" not in x)
        assert f"is saved; resume with: {command}\n" in launcher.said()
        assert "Traceback" not in launcher.said()
        assert launcher.pids() == []
    steps = [event["step"] for event in events("r", "step")]
    assert steps == [*range(1, len(steps) + 1)]


@pytest.mark.slow
@ON_LINUX
def test_a_run_whose_ranks_are_killed_ends_as_an_unbroken_one(corpora):
    argv = [*RANK_OPTIONS, *corpora["classification"], "--epochs", 20, "--dropout", 0.3]
    options = [*argv, "--run-dir", "r", "--checkpoint-every", 5]
    command = torchrun(2, f"--master-port={free_port()}", "--max-restarts=2")
    draw = random.Random()
    with launched([*command, *options], **ONE_THREAD) as launcher:
        for i, rank in enumerate((1, 0)):
            launcher.wait_for("resumed from step " if i else "\nepoch ")
            time.sleep(draw.uniform(0, 0.3))  # a random moment
            launcher.kill(rank)
        assert launcher.end() == 0, launcher.said()
        assert launcher.said().count("resumed from step ") == 2
    run_quietly(*argv, "--run-dir", "unbroken", "--accumulate", 2)
    assert_same_weights("r", "unbroken", exactly=True)
    assert without_times("r") == without_times("unbroken")


@pytest.mark.slow
def test_two_machines_with_folders_of_their_own_make_one_run(corpora):
    """Each has its own caches and files; the run is in the folder of rank 0 alone."""
    argv = [*RANK_OPTIONS, *corpora["classification"], "--epochs", 3, "--dropout", 0.3]
    argv += ["--run-dir", "run", "--checkpoint-every", 1]
    folders = ["node0", "node1"]
    for folder in folders:
        Path(folder).mkdir()
    where = {"folders": folders, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "HF_HOME": "cache"}
    for more in (["--max-steps", 4], ["--resume", "--max-steps", 13]):
        options = more if "--resume" in more else [*argv, *more]
        with group(2, "--run-dir", "run", *options, **where) as processes:
            ended = [process.ended() for process in processes]
        assert [e.status for e in ended] == [0, 0], ended
        assert ended[1].out == ended[1].err == ""
    assert {path.name for path in Path("node1").iterdir()} == {"cache", "out.1", "err.1"}
    run_quietly(*argv, "--accumulate", 2, "--max-steps", 4)
    run_quietly("--resume", "--run-dir", "run", "--max-steps", 13)
    assert_same_weights("node0/run", "run", exactly=True)
    assert without_times("node0/run") == without_times("run")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_sigterm_ends_a_process_that_waits_for_its_group(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        where = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        process = subprocess.Popen(
            [sys.executable, str(PROJECT / "ddp_main.py"), "--device", "cpu"],
            env={**os.environ, **address, **where},
            stderr=subprocess.DEVNULL,
        )
        try:
            server.settimeout(WAIT_LIMIT)
            connection, _ = server.accept()  # it has begun to wait; nobody will answer
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_LIMIT) == -signal.SIGTERM
            connection.close()
        finally:
            process.kill()
