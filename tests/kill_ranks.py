"""kill -9 of a process of a group at any moment: does the run end by itself as an unbroken one?

python tests/kill_ranks.py [KILLS] [options of main.py]
Trains once unbroken, then KILLS times (10 unless told) with one process killed within two seconds
after a random point: the start, the batch plan, or the end of an epoch. Compares the weights byte
for byte.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROJECT = Path(__file__).parent.parent
MARK = "RHEA_TEST_GROUP"  # in the environment of a group: a name by which its processes are found
WEIGHTS = "best.safetensors"
BEGUN, EPOCH = "batch plan", "\nepoch "  # what a run says as it begins to train, and of each epoch


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
        """Of the processes of that rank, or of all; as Linux tells them."""
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

    def kill(self, rank: int, timeout: float = 30.0) -> None:
        """kill -9, once there is such a process."""
        end = time.monotonic() + timeout
        while not (pids := self.pids(rank)):
            if self.launcher.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no rank {rank}:\n{self.said()}")
            time.sleep(0.05)
        os.kill(pids[0], signal.SIGKILL)

    def said(self) -> str:
        """All that was written to the two streams so far."""
        self.log.flush()
        return Path(self.log.name).read_text(errors="replace")

    def wait_for(self, text: str, timeout: float = 60.0) -> None:
        """Until it has said that."""
        end = time.monotonic() + timeout
        while text not in self.said():
            if self.launcher.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{text!r} was not said:\n{self.said()}")
            time.sleep(0.05)

    def end(self, timeout: float = 60.0) -> int:
        """The exit status, when it has ended."""
        return self.launcher.wait(timeout)

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
    """A launcher in a folder, of whose processes none outlives this."""
    group = Launched([*map(str, command)], folder, **environment)
    try:
        yield group
    finally:
        group.destroy()


def torchrun(n: int, *options: str | int) -> list[str | int]:
    """The command that starts ddp_main.py in n processes, without its own options."""
    program = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}", *options]
    return [*program, str(PROJECT / "ddp_main.py")]


def main(argv: list[str]) -> int:
    """Says of each kill what came of it. Returns how many runs ended in another way."""
    n_kills = int(argv.pop(0)) if argv and argv[0].isdigit() else 10
    command = torchrun(2, "--standalone", "--max-restarts=3")
    command += [*argv, "--checkpoint-every", "5", "--run-dir", "run"]
    draw, n_done, n_bad = random.Random(), 0, 0
    with tempfile.TemporaryDirectory() as folder, launched(command, folder) as group:
        began = time.monotonic()
        if group.end(600):
            sys.exit(group.said())
        seconds, n_epochs = time.monotonic() - began, group.said().count(EPOCH)
        unbroken = Path(folder, "run", WEIGHTS).read_bytes()
    print(f"unbroken: {n_epochs} epochs, {seconds:.1f} s", flush=True)
    while n_done < n_kills:
        rank, epoch, wait = draw.randrange(2), draw.randint(-1, n_epochs), draw.uniform(0, 2)
        with tempfile.TemporaryDirectory() as folder, launched(command, folder) as group:
            try:
                group.wait_for({-1: "", 0: BEGUN}.get(epoch, f"{EPOCH}{epoch}:"))
                time.sleep(wait)
                group.kill(rank)
            except RuntimeError:  # it was over by then: another moment
                continue
            status = group.end(600)
            goes_on = [x for x in group.said().splitlines() if x.startswith("goes on after")]
            path = Path(folder, "run", WEIGHTS)
            same = path.exists() and path.read_bytes() == unbroken
        n_done, n_bad = n_done + 1, n_bad + (status != 0 or not same)
        since = {-1: "its start", 0: "the batch plan"}.get(epoch, f"epoch {epoch}")
        print(
            f"{n_done}: rank {rank} killed {wait:.2f} s after {since}; "
            f"{'; '.join(goes_on) or 'began anew'}; exit status {status}, weights "
            f"{'the same' if same else 'OTHERS'}",
            flush=True,
        )
    print(f"{n_bad} of {n_kills} ended in another way than the unbroken run")
    return n_bad


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
