"""Kills trainings at random moments and compares their results with those of unbroken trainings.

python tests/kill.py --kills 50
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from helpers import without_times
from processes import WAIT_LIMIT, Forked, run_main

SMALL = (
    "--device cpu --model tiny --n-layers 1 --d-model 16 --d-ff 16 --n-heads 2 --vocab-size 300 "
    "--lr 3e-3 --warmup-steps 5 --schedule linear --dropout 0.3 --average-checkpoints 3"
)
# By task; an epoch has 5 steps, not a multiple of the steps between two checkpoints.
COMMANDS = {
    "classification": f"{SMALL} --batch-size 16 --accumulate 2 --r-drop 1 --checkpoint-every 1 "
    "--validate-every 2",
    "translation": f"{SMALL} --task translation --source-column in --target-column out "
    "--batch-tokens 192 --max-length 32 --precision bf16 --checkpoint-every 2 --beam-size 1",
}
DATA = {"classification": "reviews", "translation": "reversed"}


def write_data(folder: Path) -> None:
    """Two small data sets: reviews, and lines with the same letters in reverse."""
    draw = random.Random(0)
    for name in DATA.values():
        (folder / name).mkdir(parents=True)
    words = ["the", "a", "film", "story", "of", "with", "actors", "plot", "year", "man", "house"]
    for split, n in (("train", 150), ("validation", 20), ("test", 20)):
        rows = []
        for _ in range(n):
            label = draw.choice(("fine", "awful"))
            rows.append((" ".join([*draw.choices(words, k=draw.randint(2, 9)), label]), label))
        lines = ["text,label", *map(",".join, rows)]
        (folder / "reviews" / f"{split}.csv").write_text("\n".join(lines) + "\n")
        rows = [draw.choices("abcdefgh", k=draw.randint(2, 9)) for _ in range(n)]
        for side, step in (("in", 1), ("out", -1)):
            text = "".join(" ".join(row[::step]) + "\n" for row in rows)
            (folder / "reversed" / f"{split}.{side}").write_text(text)


def command(task: str, data: Path, run: Path | str, *more: object) -> list[str]:
    """The options of one run."""
    options = [*COMMANDS[task].split(), "--dataset", data / DATA[task], "--run-dir", run, *more]
    return [str(option) for option in options]


def checkpoint_id(run: Path) -> tuple | None:
    """What changes with each checkpoint; None if there is none."""
    try:
        stat = (run / "last.pt").stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def kill_somewhere(process: Forked, run: Path, draw: random.Random) -> str | None:
    """Kills a run: one in ten while it starts, half of the others while a file is written.

    Returns what it was doing then, or None if it had ended before.
    """
    began, seen, n = time.perf_counter(), checkpoint_id(run), 0
    end = began + (draw.uniform(0, 1) if draw.random() < 0.1 else WAIT_LIMIT)
    n_wanted, last_wait = draw.randint(1, 4), draw.uniform(0, 0.06)
    during_write = draw.random() < 0.5
    while time.perf_counter() < end and n < n_wanted and process.poll() is None:
        time.sleep(0.0005)
        if (now := checkpoint_id(run)) != seen:
            seen, n = now, n + 1
    if n and during_write:
        temporary = draw.choice(("last.pt.tmp", "last.pt.tmp", "best.safetensors.tmp"))
        end = time.perf_counter() + 1  # weights are written once in an epoch at most
        while not (run / temporary).exists() and time.perf_counter() < end:
            pass
        last_wait = draw.uniform(0, 0.0015)
    time.sleep(last_wait if n else 0)
    if process.poll() is not None:
        return None
    process.kill()
    process.wait()
    names = {path.name for path in run.iterdir()} if run.exists() else set()
    writing = sorted(name for name in names if name.endswith(".tmp"))
    if "previous.pt" in names and "last.pt" not in names:
        writing.append("last.pt, between its two renamings")
    doing = f"writing {', '.join(writing)}" if writing else "between two writes"
    return f"after {time.perf_counter() - began:.2f} s and {n} checkpoints, {doing}"


def run_with_kills(
    task: str, argv: list[str], run: Path, n_kills: int, draw: random.Random, say=lambda text: None
) -> None:
    """One run that is killed and resumed n times, and then left to finish."""
    for i in range(n_kills + 1):
        # Killed before it wrote config.json, a run is started again, as its user would.
        more = ["--resume"] if (run / "config.json").exists() else []
        process = Forked("run", run_main, [*argv, *more])
        killed = kill_somewhere(process, run, draw) if i < n_kills else None
        if killed:
            kept = run / "last.pt" if (run / "last.pt").exists() else run / "previous.pt"
            step = "no step"
            if kept.exists():
                step = f"step {torch.load(kept, weights_only=True)['state']['step']}"
            say(f"{task}: kill {i + 1} {killed}; {step} is saved")
            continue
        ended = process.ended()
        if ended.status:
            raise AssertionError(f"{task}: exit status {ended.status}: {ended.err}")
        if i < n_kills:
            raise AssertionError(f"{task}: the run ended before kill {i + 1}")


def tensors_of(value, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors in nested dicts and lists, by their path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    nested = [(f"{name}/{k}", v) for k, v in pairs if isinstance(v, dict | list | torch.Tensor)]
    return {k: v for path, inner in nested for k, v in tensors_of(inner, path).items()}


def differences(run: Path, unbroken: Path, ignore: set[str] = frozenset()) -> list[str]:
    """What differs between two runs, bit for bit, except for times."""
    found = []
    files = {"best.safetensors", "tokenizer.json", "test.hypotheses.txt"} - ignore
    for name in sorted(files):
        both = [(r / name).read_bytes() if (r / name).exists() else None for r in (run, unbroken)]
        found += [name] if both[0] != both[1] else []
    ours, theirs = (torch.load(r / "last.pt", weights_only=True) for r in (run, unbroken))
    for checkpoint in (ours, theirs):
        del checkpoint["state"]["seconds"], checkpoint["metrics"]
    found += ["state"] if ours["state"] != theirs["state"] else []
    mine, its = tensors_of(ours), tensors_of(theirs)
    assert len(its) > 50
    found += [] if mine.keys() == its.keys() else ["names in last.pt"]
    found += [
        f"last.pt{name}"
        for name in mine.keys() & its.keys()
        # There is no NaN here, and the sign of a zero would show in the bytes of the weights.
        if mine[name].dtype != its[name].dtype or not torch.equal(mine[name], its[name])
    ]
    if "metrics.jsonl" not in ignore:
        found += ["metrics.jsonl"] if without_times(run) != without_times(unbroken) else []
    return found


def main() -> int:
    """Returns 0 if every run matches the unbroken one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each task (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    folder, draw, n_bad = Path(tempfile.mkdtemp(prefix="rhea-kill-")), random.Random(args.seed), 0
    os.environ |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    os.chdir(folder)
    write_data(folder)
    for task in COMMANDS:
        epochs = ("--epochs", args.kills + 4)  # a kill costs at most four of an epoch's five steps
        unbroken, run = folder / f"{task}-unbroken", folder / f"{task}-killed"
        ended = Forked("unbroken", run_main, command(task, folder, unbroken, *epochs)).ended()
        assert ended.status == 0, ended.err
        argv = command(task, folder, run, *epochs)
        run_with_kills(task, argv, run, args.kills, draw, lambda text: print(text, flush=True))
        found = differences(run, unbroken)
        n_steps = sum(event["event"] == "step" for event in without_times(run))
        verdict = f"DIFFERENT in {', '.join(found)}" if found else "the same, bit for bit"
        print(f"{task}: {args.kills} kills, {n_steps} steps; {verdict}", flush=True)
        n_bad += bool(found)
    if not n_bad:
        shutil.rmtree(folder)
    return 1 if n_bad else 0


if __name__ == "__main__":
    sys.exit(main())
