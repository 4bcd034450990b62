"""Runs that tests stop, resume and compare."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import run_quietly
from safetensors.torch import load_file

import main
import procedures
from data import TextData

RANK_OPTIONS = (  # tokens: micro-batches of unequal sizes
    "--device cpu --n-layers 1 --d-model 16 --d-ff 16 --n-heads 2 --vocab-size 400 --lr 1e-3 "
    "--warmup-steps 5 --average-checkpoints 1 --ensemble 1 --batch-tokens 300 --no-naive-bayes"
).split()


def affects_loss(name: str, classifies: bool) -> bool:
    """Whether the loss depends on a parameter. Softmax cancels what W_k.bias adds to all scores,
    and a classifier's decoder attends to one token alone, whatever its score: the gradient is
    rounding error, which Adam makes as large as any other, or on some processors 0."""
    of_one_token = re.search(r"decoder\.\d+\.self_attention\.W_[qk]\.", name)
    return not (name.endswith("W_k.bias") or (classifies and of_one_token))


def assert_same_weights(run: Path | str, other: Path | str, *, exactly: bool = False) -> None:
    """Two numbers have one sum; more have one for each order, and only then rounding may differ."""
    pair = [load_file(Path(folder, "best.safetensors")) for folder in (run, other)]
    if not exactly:
        classifies = bool(json.loads(Path(run, "config.json").read_text())["classes"])
        pair = [{k: w for k, w in x.items() if affects_loss(k, classifies)} for x in pair]
    torch.testing.assert_close(*pair, rtol=0, atol=0.0 if exactly else 1e-6)


def raise_own_signal(signum: int) -> None:
    """A signal that a test sends to the training in this process; any other Ctrl-C ends pytest."""
    signal.raise_signal(signum)


def act_after_step(patch: pytest.MonkeyPatch, n: int, act: Callable[[], object]) -> None:
    """Acts after the n-th step from now on, while the training still runs."""
    count, step = iter(range(1, 10**6)), procedures.train_step

    def then_act(*args, **kwargs):
        sums = step(*args, **kwargs)
        if next(count) == n:
            act()
        return sums

    patch.setattr(procedures, "train_step", then_act)


def stop_after(n: int, argv: list[str]) -> None:
    """Trains until Ctrl-C comes in the n-th step."""
    with pytest.MonkeyPatch.context() as patch:
        act_after_step(patch, n, lambda: raise_own_signal(signal.SIGINT))
        assert main.main([*map(str, argv)]) == 130


def resume(run: Path | str, *more) -> str:
    """What a resumed run prints that must succeed."""
    return run_quietly("--resume", "--run-dir", run, *more)


def load_checkpoint(run: Path | str, name: str = "last.pt") -> dict:
    return torch.load(Path(run, name), weights_only=True)


def is_finite(run: Path) -> bool:
    return all(w.isfinite().all() for w in load_checkpoint(run)["model"].values())


def only_error(capsys, status: int, expected: int, *words: str) -> str:
    """The one error line of a run that ended with a status."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == expected and len(lines) == 1 and "Traceback" not in err, err
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"
    return lines[0]


def record_plans() -> None:
    """Each process writes down which sentences of which split it reads."""
    load = TextData.load

    def recorded(self, split, plan, device):
        with open(f"plans.{os.environ.get('RANK', 'one')}", "a") as out:
            out.write(json.dumps([split, [rows.tolist() for rows in plan]]) + "\n")
        return load(self, split, plan, device)

    TextData.load = recorded


def recorded_plans(who: int | str) -> list[tuple[str, list[list[int]]]]:
    return [json.loads(line) for line in Path(f"plans.{who}").read_text().splitlines()]
