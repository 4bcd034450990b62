"""Kills a process of a group at random moments: does the run end by itself as an unbroken one?

python tests/kill_ranks.py [KILLS] [options of main.py]
Trains once unbroken, then KILLS times (default: 10) with one process killed within two seconds
of a random event: the start, the batch plan, or the end of an epoch. Compares the weights byte for
byte.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

from processes import launched, torchrun

WEIGHTS = "best.safetensors"
PLAN, EPOCH = "batch plan", "\nepoch "  # what a run prints when training begins, and per epoch


def main(argv: list[str]) -> int:
    """Prints the result of each kill. Returns how many runs ended differently."""
    n_kills = int(argv.pop(0)) if argv and argv[0].isdigit() else 10
    command = torchrun(2, "--standalone", "--max-restarts=3")
    command += [*argv, "--checkpoint-every", "5", "--run-dir", "run"]
    draw, n_done, n_bad = random.Random(), 0, 0
    with tempfile.TemporaryDirectory() as folder, launched(command, folder) as group:
        began = time.monotonic()
        if group.end():
            sys.exit(group.said())
        seconds, n_epochs = time.monotonic() - began, group.said().count(EPOCH)
        unbroken = Path(folder, "run", WEIGHTS).read_bytes()
    print(f"unbroken: {n_epochs} epochs, {seconds:.1f} s", flush=True)
    while n_done < n_kills:
        rank, epoch, wait = draw.randrange(2), draw.randint(-1, n_epochs), draw.uniform(0, 2)
        with tempfile.TemporaryDirectory() as folder, launched(command, folder) as group:
            try:
                group.wait_for({-1: "", 0: PLAN}.get(epoch, EPOCH), max(1, epoch))
                time.sleep(wait)
                group.kill(rank)
            except RuntimeError:  # it had ended by then: try another moment
                continue
            status = group.end()
            resumed = [x for x in group.said().splitlines() if x.startswith("resumed from")]
            path = Path(folder, "run", WEIGHTS)
            same = path.exists() and path.read_bytes() == unbroken
        n_done, n_bad = n_done + 1, n_bad + (status != 0 or not same)
        since = {-1: "the start", 0: "the batch plan"}.get(epoch, f"epoch {epoch}")
        print(
            f"{n_done}: rank {rank} killed {wait:.2f} s after {since}; "
            f"{'; '.join(resumed) or 'started over'}; exit status {status}, weights "
            f"{'the same' if same else 'DIFFERENT'}",
            flush=True,
        )
    print(f"{n_bad} of {n_kills} ended differently from the unbroken run")
    return n_bad


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
