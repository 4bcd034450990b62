"""Processes that tests start, wait for and kill.

Most are forked from a warm process that has imported everything; a launcher is a real one.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
WAIT_LIMIT = 600  # seconds; ends a test that hangs, and measures nothing
MARK = "RHEA_TEST_GROUP"  # environment variable that identifies the processes of a launcher
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["ddp_main", "torch._dynamo", "matplotlib.figure", "sacrebleu", "pytest"]
)


def wait_until(condition: Callable[[], Any], what: Callable[[], str] = lambda: "") -> Any:
    """The first true value of a condition. what: said when it stays false."""
    end = time.monotonic() + WAIT_LIMIT
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"nothing happened in {WAIT_LIMIT} s: {what()}")
        time.sleep(0.005)
    return value


# ----------------------------------------------------------------------------------------- forked


@dataclass(frozen=True)
class Ended:
    """What a process left behind."""

    status: int
    out: str
    err: str


def nothing() -> None: ...


def live(folder: Path, streams: dict[int, str], environment: dict[str, str], action, args) -> None:
    """The life of a forked process."""
    import torch

    os.chdir(folder)
    os.environ.update(environment)
    for fd, path in streams.items():
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
    # New objects: those of the warm process believe that they can seek, which a pipe cannot.
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", encoding="utf-8") for fd in (1, 2))
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    sys.exit(action(*args))


class Forked:
    """A process that runs action(*args) in a folder, with the methods of Popen that tests use.

    Its streams go to the files out.NAME and err.NAME; an existing pipe is used as it is.
    """

    def __init__(self, name: object, action: Callable, *args, folder=".", **environment) -> None:
        with chdir(PROJECT):
            multiprocessing.forkserver.ensure_running()
        self.paths = [Path(folder, f"{kind}.{name}").absolute() for kind in ("out", "err")]
        for path in self.paths:
            if path.is_file():
                path.unlink()
        streams = {i + 1: str(path) for i, path in enumerate(self.paths)}
        environment = {k: str(v) for k, v in environment.items() if v is not None}
        how = (Path(folder).absolute(), streams, environment, action, args)
        self.process = FORK.Process(target=live, args=how)
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join(WAIT_LIMIT)
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def said(self) -> tuple[str, str]:
        """Standard output and standard error so far."""
        return tuple(path.read_text() if path.is_file() else "" for path in self.paths)

    def ended(self) -> Ended:
        """Waits for its end."""
        return Ended(self.wait(), *self.said())


def skip_pictures(patch: Callable = setattr) -> None:
    """Pictures take most of the time of a small run, above all the first in a process."""
    import main
    import reports

    for module, name in (
        (main, "draw_curves"),
        (reports, "draw_confusion"),
        (reports, "draw_attention"),
    ):
        patch(module, name, lambda *args, **more: None)


def run_main(argv: list[str], prepare: Callable[[], None] = nothing) -> int:
    """The action of a process that runs main.py. prepare: patches what a test needs patched."""
    import main

    sys.argv = ["main.py", *argv]
    skip_pictures()
    prepare()
    return main.main(argv)


def run_rank(argv: list[str], prepare: Callable[[], None] = nothing) -> int:
    """The action of a process of ddp_main.py."""
    import ddp_main

    sys.argv = ["ddp_main.py", *argv]
    skip_pictures()
    prepare()
    return ddp_main.join(argv)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_environment(i: int, n: int, port: int) -> dict[str, object]:
    """What a launcher sets for rank i of n processes on one machine."""
    shared = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {"RANK": i, "LOCAL_RANK": i, **shared}


@contextmanager
def group(
    n: int, *argv, prepare: Callable = nothing, action: Callable = run_rank, folders=None, **more
) -> Iterator[list[Forked]]:
    """n ranks with one command line; none of them outlives this.

    folders: one for each rank, else all share this one. more: of the environment.
    """
    port, processes = free_port(), []
    args = ([str(word) for word in argv], prepare)
    try:
        for i in range(n):
            where = folders[i] if folders else "."
            environment = rank_environment(i, n, port) | more
            processes.append(Forked(i, action, *args, folder=where, **environment))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ranks(n: int, *argv, **how) -> list[Ended]:
    """What n ranks with one command line left; all must end."""
    with group(n, *argv, **how) as processes:
        return [process.ended() for process in processes]


def ranks_quietly(n: int, *argv, **how) -> str:
    """Standard output of n ranks that must succeed, where rank 0 alone prints."""
    first, *others = ranks(n, *argv, **how)
    assert first.status == 0, first.err
    assert others == [Ended(0, "", "")] * (n - 1)
    return first.out


# ---------------------------------------------------------------------------------------- launchers


class Launched:
    """A launcher and its processes."""

    def __init__(self, command: list[str], folder: Path | str = ".", **environment: str) -> None:
        self.name = uuid.uuid4().hex
        environment = {**os.environ, **environment, MARK: self.name}
        self.log = open(Path(folder, "log"), "w+")  # noqa: SIM115, of both streams
        self.launcher = subprocess.Popen(
            command, cwd=folder, stdout=self.log, stderr=self.log, env=environment
        )

    def pids(self, rank: int | None = None) -> list[int]:
        """Processes of a rank, or all of them, as Linux lists them."""
        words = [f"{MARK}={self.name}"] + ([] if rank is None else [f"RANK={rank}"])
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                environment = path.read_bytes().split(b"\0")
            except OSError:  # it has ended, or is another user's
                continue
            if all(word.encode() in environment for word in words):
                found.append(int(path.parent.name))
        return found

    def kill(self, rank: int) -> None:
        """kill -9, once there is such a process. Raises RuntimeError if the launcher has ended."""
        pids = wait_until(lambda: self.pids(rank) or self._has_ended(), self.said)
        if pids is True:
            raise RuntimeError(f"no rank {rank}:\n{self.said()}")
        os.kill(pids[0], signal.SIGKILL)

    def _has_ended(self) -> bool:
        return self.launcher.poll() is not None

    def said(self) -> str:
        """All that was written to the two streams so far."""
        self.log.flush()
        return Path(self.log.name).read_text(errors="replace")

    def wait_for(self, text: str, n: int = 1) -> None:
        """Waits until it has said that n times. Raises RuntimeError if it ends before."""
        is_said = lambda: self.said().count(text) >= n  # noqa: E731
        wait_until(lambda: is_said() or self._has_ended(), self.said)
        if not is_said():
            raise RuntimeError(f"{text!r} was not said:\n{self.said()}")

    def end(self) -> int:
        """The exit status, when it has ended."""
        return self.launcher.wait(WAIT_LIMIT)

    def destroy(self) -> None:
        """Leaves no process."""
        self.launcher.kill()
        self.launcher.wait()
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.log.close()


@contextmanager
def launched(
    command: list[str], folder: Path | str = ".", **environment: str
) -> Iterator[Launched]:
    """A launcher in a folder; none of its processes outlives this."""
    group = Launched([*map(str, command)], folder, **environment)
    try:
        yield group
    finally:
        group.destroy()


def torchrun(n: int, *options: str | int) -> list[str | int]:
    """The command that starts ddp_main.py in n processes, without its own options."""
    program = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}", *options]
    return [*program, str(PROJECT / "ddp_main.py")]
