"""The run of main.py on many processes, which make the same steps as one.

torchrun --nproc-per-node=N ddp_main.py [options]
python ddp_main.py --world-size N [options]      the same, through the same launcher
"""

from errors import exit_on_signals

if __name__ == "__main__":  # as in main.py
    exit_on_signals()

import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from config import LaunchConfig
from ddp_utils import broadcast, check_environment, launch, launched, process_group, rank, restarts
from errors import BadInput
from main import exit_status, run
from run_folder import RunFolder
from settings import COMMANDS, GROUPS, Groups, parse_args

DDP_GROUPS: Groups = {**GROUPS, "processes": (LaunchConfig,)}


def start(argv: list[str]) -> None:
    """Starts the processes, each of which calls `join`, and exits with their status."""
    given, problems = parse_args(argv, DDP_GROUPS)
    if not any(word.startswith("--world-size") for word in argv):
        problems.append("--world-size: missing; give the number of processes, or use torchrun")
    if problems:
        raise BadInput(*problems)
    sys.exit(launch(given["world_size"], __file__, *argv))


def join(argv: list[str]) -> int:
    """The run, in a process that a launcher started. Returns its exit status."""
    status = exit_status(lambda _: check_environment())
    if status:
        return status
    try:
        given, problems = parse_args(argv, DDP_GROUPS)
    except BadInput as error:  # reported once all processes are there, by one of them
        given, problems = {}, list(error.lines)
    n, n_given = int(os.environ["WORLD_SIZE"]), given.pop("world_size", None)
    if n_given not in (None, n):
        problems.append(f"--world-size {n_given}: the launcher started {n}; leave it out")
    if restarts()[1] and "run_dir" not in given:
        problems.append(
            "--max-restarts: give --run-dir, for a restarted run to find its checkpoint"
        )
    with process_group(given.get("device", "auto")), open(os.devnull, "w") as nowhere:
        out, err = (sys.stdout, sys.stderr) if rank() == 0 else (nowhere, nowhere)
        with redirect_stdout(out), redirect_stderr(err):
            given = broadcast(after_restart(given))
            return exit_status(lambda signals: run(given, problems, signals))


def after_restart(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a group that its launcher may have restarted: training is resumed."""
    is_training = not any(name in given for name in COMMANDS)
    if not (is_training and restarts()[0] and Path(given["run_dir"], RunFolder.CONFIG).exists()):
        return given
    return {**{name: given[name] for name in given if name != "overwrite"}, "resume": True}


if __name__ == "__main__":
    sys.exit(join(sys.argv[1:]) if launched() else exit_status(lambda _: start(sys.argv[1:])))
