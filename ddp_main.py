"""The run of main.py on many processes, which make the same updates as one.

torchrun --nproc-per-node=N ddp_main.py [options]
python ddp_main.py --world-size N [options]      the same, through the same launcher
"""

import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from comp_utils import BadInput
from ddp_utils import LaunchConfig, by_rank_0, launch, launched, process_group, rank, restarts
from main import exit_status, run
from run_folder import RunFolder
from settings import GROUPS, Groups, parse_args

DDP_GROUPS: Groups = {**GROUPS, "processes": (LaunchConfig,)}


def start(argv: list[str]) -> None:
    """Starts the processes, each of which comes to `join`."""
    given, problems = parse_args(argv, DDP_GROUPS)
    if not any(word.startswith("--world-size") for word in argv):
        problems.append("--world-size: say how many processes, or start with torchrun")
    if problems:
        raise BadInput(*problems)
    sys.exit(launch(given["world_size"], __file__, *argv))


def join(argv: list[str]) -> int:
    """The run, in a process that a launcher started. Returns its exit status."""
    try:
        given, problems = parse_args(argv, DDP_GROUPS)
    except BadInput as error:  # told once all processes are there, so that one of them tells it
        given, problems = {}, list(error.lines)
    asked, n = given.pop("world_size", None), int(os.environ["WORLD_SIZE"])
    if asked not in (None, n):
        problems.append(f"--world-size {asked}: the launcher started {n}; leave it out")
    if restarts()[1] and "run_dir" not in given:
        problems.append(
            "--max-restarts: give --run-dir, for a restarted run to find its checkpoint"
        )
    with process_group(given.get("device", "auto")), open(os.devnull, "w") as nowhere:
        out, err = (sys.stdout, sys.stderr) if rank() == 0 else (nowhere, nowhere)
        with redirect_stdout(out), redirect_stderr(err):
            return exit_status(lambda: run(by_rank_0(lambda: after_restart(given)), problems))


def after_restart(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a group that its launcher may have restarted: then it goes on."""
    if not restarts()[0] or not (Path(given["run_dir"], RunFolder.CONFIG)).exists():
        return given
    return {**{name: given[name] for name in given if name != "overwrite"}, "resume": True}


if __name__ == "__main__":
    sys.exit(join(sys.argv[1:]) if launched() else exit_status(lambda: start(sys.argv[1:])))
