"""Ranks agree: on what is wrong, on when to stop, on which fails; and any number resumes."""

import json
import os
import pickle
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers import events, run_quietly, without_times
from processes import ranks, ranks_quietly
from runs import RANK_OPTIONS, assert_same_weights, record_plans, recorded_plans
from safetensors.torch import load_file

import ddp_utils
import optimization
import prepare
import procedures
from data import TextData
from errors import BadInput, SharedError
from run_folder import RunFolder
from step_log import StepLog

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
N_STEPS = 8  # of an epoch of reviews, by two processes


# --------------------------------------------------------------------------------- helpers of ranks


def probe(argv: list[str], function: Callable) -> int:
    """The action of a rank that prints what a function returns inside a group."""
    with ddp_utils.process_group("cpu"):
        print(json.dumps(function()))
    return 0


def probed(n: int, function: Callable, **environment) -> list:
    """What a function returned on each of n ranks."""
    ended = ranks(n, prepare=function, action=probe, **environment)
    assert [e.status for e in ended] == [0] * n, ended
    return [json.loads(e.out) for e in ended]


def attempt(action: Callable, *args) -> list[str] | object:
    """The result, or the lines of a BadInput that all ranks raise."""
    try:
        return action(*args)
    except SharedError as error:
        return list(error.lines)


FAILING = ((), (0,), (1,), (2,), (0, 2), (0, 1, 2))  # ranks that raise BadInput


def first_line(failing: tuple[int, ...]) -> list[str] | str:
    """What all ranks raise: often each has the same problem, which is reported once."""
    return [f"rank {r}: bad {r}" if r else "bad 0" for r in failing[:1]] or "no error"


def raise_if_failing(failing: tuple[int, ...]) -> None:
    time.sleep(random.uniform(0, 0.02))
    if ddp_utils.rank() in failing:
        raise BadInput(f"bad {ddp_utils.rank()}")


def raise_on_each_rank() -> list:
    def block(failing) -> str:
        with ddp_utils.raise_on_all_ranks():
            raise_if_failing(failing)
        return "no error"

    return [attempt(block, failing) for failing in FAILING]


def test_raise_on_all_ranks():
    results = probed(3, raise_on_each_rank)
    assert results == [[first_line(failing) for failing in FAILING]] * 3


def broadcast_from_zero() -> list:
    calls = []

    def function(*args):
        calls.append(args)
        raise_if_failing(args)
        return f"of rank {ddp_utils.rank()}"

    results = [attempt(ddp_utils.broadcast_from_rank_zero, function, *args) for args in FAILING]
    return [results, len(calls)]


def test_broadcast_from_rank_zero():
    results = [["bad 0"] if 0 in failing else "of rank 0" for failing in FAILING]
    assert probed(3, broadcast_from_zero) == [[results, len(FAILING)]] + [[results, 0]] * 2


def first_on_each_machine() -> list:
    """Ranks 0 and 1 are on one machine, rank 2 is on another."""
    rank = ddp_utils.rank()
    os.environ["LOCAL_RANK"] = "01"[rank % 2]

    def block(failing) -> str:
        with ddp_utils.local_rank_zero_first(), open("order", "a") as out:
            print(f"{rank} enters", file=out, flush=True)
            time.sleep(random.uniform(0, 0.1))
            print(f"{rank} leaves", file=out, flush=True)
            raise_if_failing(failing)
        return "no error"

    return [attempt(block, failing) for failing in FAILING]


def test_local_rank_zero_first():
    results = probed(3, first_on_each_machine)
    # The first rank of each machine fails before another enters.
    shown = [tuple(r for r in failing if r != 1) or failing for failing in FAILING]
    assert results == [[first_line(failing) for failing in shown]] * 3
    order = Path("order").read_text().splitlines()
    assert order.count("0 enters") == order.count("2 enters") == len(FAILING)
    assert order.count("1 enters") == sum(failing in ((), (1,)) for failing in FAILING)
    for i, line in enumerate(order):
        if line == "1 enters":
            before = order[:i]
            assert before.count("0 leaves") == before.count("0 enters")
            assert before.count("2 leaves") == before.count("2 enters")


def stop_after_random_steps() -> list[int]:
    """Steps until all ranks agree to stop, of 30 trials with delays and a signal to one rank."""
    shared, own, n_done = random.Random(0), random.Random(ddp_utils.rank()), []
    for _ in range(30):
        stopping, last = shared.randrange(ddp_utils.world_size()), shared.randrange(6)
        flag, step, received = None, 0, 0
        while True:
            step += 1
            time.sleep(own.choice((0, 0, 0.003)))
            if step > last and ddp_utils.rank() == stopping:
                received = signal.SIGTERM
            sums = ddp_utils.sum_across_ranks(torch.tensor([float(received)]))
            if ddp_utils.stop_agreed(received, flag):
                break
            flag = sums[0]
        n_done.append(step - last)
    return n_done


def test_stop_agreed_stops_all_ranks_after_the_same_step():
    # One step has the flag, and the next is under way when it is read.
    assert probed(3, stop_after_random_steps) == [[2] * 30] * 3


def test_without_a_group_every_function_is_the_identity(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of a job whose launcher did not start us
    assert (ddp_utils.rank(), ddp_utils.world_size()) == (0, 1)
    assert (ddp_utils.local_rank(), ddp_utils.local_world_size()) == (0, 1)
    values, model = torch.arange(3), torch.nn.Linear(2, 2)
    before = model.weight.clone()
    assert ddp_utils.sum_across_ranks(values) is values and values.tolist() == [0, 1, 2]
    assert ddp_utils.wrap(model, torch.device("cpu")) is model
    ddp_utils.broadcast_tensors(model.parameters())
    assert torch.equal(model.weight, before)
    box = object()
    assert ddp_utils.broadcast(box) is box and ddp_utils.gather(box) == [box]
    assert ddp_utils.broadcast_from_rank_zero(lambda: box) is box
    for context in (ddp_utils.raise_on_all_ranks, ddp_utils.local_rank_zero_first):
        with pytest.raises(BadInput) as raised, context():
            raise BadInput("bad")
        assert not isinstance(raised.value, SharedError)
    with ddp_utils.defer_sync(model, last=False):
        model(torch.ones(2)).sum().backward()
    assert model.weight.grad is not None
    assert [ddp_utils.stop_agreed(received, None) for received in (15, 0)] == [True, False]
    assert ddp_utils.restarts() == (0, 0)
    assert not ddp_utils.is_connection_error(RuntimeError("Connection reset by peer"))


# ---------------------------------------------------------------------------------- a failing rank


def is_mine() -> bool:
    return os.environ["RANK"] == os.environ["FAILING"]


def fails(error: BaseException) -> Callable:
    """A decorator: the function works six times and then raises."""

    def failing(function: Callable) -> Callable:
        calls = iter(range(6))

        def called(*args, **kwargs):
            if next(calls, None) is None:
                raise error
            return function(*args, **kwargs)

        return called

    return failing


def loses_the_disk() -> None:
    if is_mine():
        TextData.collate = fails(OSError(5, "Input/output error", "rows.arrow"))(TextData.collate)


def runs_out_of_memory() -> None:
    if is_mine():
        error = torch.OutOfMemoryError("CUDA out of memory.")
        optimization.loss_sums = fails(error)(optimization.loss_sums)


def has_a_bug() -> None:
    if is_mine():
        optimization.loss_sums = fails(ZeroDivisionError("half"))(optimization.loss_sums)


def shares_a_gpu() -> None:
    if is_mine():
        error = RuntimeError("NCCL error: Duplicate GPU detected : rank 1 and rank 0 on one device")
        optimization.loss_sums = fails(error)(optimization.loss_sums)


def finds_no_data() -> None:
    if is_mine():
        prepare.load_splits = refuse_data


def refuse_data(*args, **kwargs):
    raise BadInput("--dataset d: not on this machine; copy it there")


@pytest.mark.parametrize(
    "fault, rank, words",
    [
        (loses_the_disk, 1, "error: rank 1: [Errno 5] Input/output error: 'rows.arrow'"),
        (runs_out_of_memory, 1, "error: rank 1: out of memory at a batch of "),
        (runs_out_of_memory, 0, "error: out of memory at a batch of "),
        (has_a_bug, 1, "ZeroDivisionError: half\nin rank 1 of 2\n"),
        (shares_a_gpu, 1, "that process ended: NCCL error: Duplicate GPU detected : rank 1 and"),
        (finds_no_data, 1, "error: rank 1: --dataset d: not on this machine"),
    ],
)
def test_a_rank_that_fails_ends_all_with_its_own_message(fault, rank, words, corpora):
    argv = [*RANK_OPTIONS, *corpora["classification"], "--epochs", "100", "--run-dir", "r"]
    ended = ranks(2, *argv, prepare=fault, FAILING=rank)
    assert all(e.status in (1, 2) for e in ended)
    said = "".join(e.err for e in ended)
    assert said.count(words) == 1, said
    assert said.count("Traceback") == (fault is has_a_bug)


def sees_no_other_run() -> None:
    if os.environ["RANK"] == "1":
        refuse = lambda *_, **__: pytest.fail("read on rank 1")  # noqa: E731
        RunFolder.find = RunFolder.read_config = RunFolder.read_weights = refuse


def test_rank_0_alone_reads_the_run_whose_weights_are_taken(corpora):
    """On several machines without a shared disk the others do not have it."""
    argv = [*RANK_OPTIONS, *corpora["classification"], "--max-steps", "2", "--run-dir"]
    run_quietly(*argv, "first")
    how = [*corpora["classification"], "--batch-tokens", "300", "--warmup-steps", 1, "--lr", 1e-9]
    how += ["--max-steps", 1, "--init-from", "first", "--run-dir", "second"]
    ranks_quietly(2, *how, prepare=sees_no_other_run)
    first, second = (load_file(f"{run}/best.safetensors") for run in ("first", "second"))
    for name, weights in first.items():
        torch.testing.assert_close(second[name], weights, rtol=0, atol=1e-6)


def prepares_for_longer_than_a_collective_may_take() -> None:
    ddp_utils.TIMEOUT = timedelta(seconds=10)
    if os.environ["RANK"] == "0":
        load_splits = prepare.load_splits
        prepare.load_splits = lambda *args: time.sleep(15) or load_splits(*args)


def test_ranks_wait_while_one_prepares_the_data(corpora):
    argv = [*RANK_OPTIONS, *corpora["classification"], "--max-steps", "2", "--run-dir", "r"]
    ranks_quietly(2, *argv, prepare=prepares_for_longer_than_a_collective_may_take)


def diverges() -> None:
    """The third step's loss is NaN; one rank sees that at once and the other not by itself."""
    loss_sums, calls = optimization.loss_sums, iter(range(10**6))

    def nan(logits, *args):
        is_training = logits.requires_grad
        is_bad = is_mine() and is_training and next(calls) > 2  # the first is in the warm-up
        return tuple(x * torch.nan if is_bad else x for x in loss_sums(logits, *args))

    optimization.loss_sums = nan
    StepLog.SECONDS_BETWEEN_FLUSHES = 0.0 if is_mine() else 10**9


@pytest.mark.parametrize("rank", [0, 1])
def test_a_divergence_is_reported_by_all_ranks_and_drops_the_checkpoint(rank, corpora):
    """Each rank has a run folder of its own, as on two machines; only rank 0 writes."""
    for folder in ("a", "b"):
        Path(folder).mkdir()
    argv = [*RANK_OPTIONS, *corpora["classification"], "--epochs", "3", "--run-dir", "r"]
    how = {"prepare": diverges, "FAILING": rank, "folders": ["a", "b"], "LOCAL_WORLD_SIZE": 1}
    ended = ranks(2, *argv, "--checkpoint-every", 2, **how, LOCAL_RANK=0)
    assert [e.status for e in ended] == [1, 1]
    words = "step 3: the loss is nan at learning rate "
    (first,), (second,) = ([x for x in e.err.splitlines() if "error" in x] for e in ended)
    assert first.startswith(f"error: {words}") and "; step 0 is saved; resume with: " in first
    assert second.startswith(f"error: rank 1: {words}") and "saved" not in second
    assert torch.load("a/r/last.pt", weights_only=True)["state"]["step"] == 0
    assert not Path("b/r").exists() or not list(Path("b/r").iterdir())


# ----------------------------------------------------------------------------------------- stopping


def signals_itself() -> None:
    """A signal to one process alone, in a step of its choice."""
    step = procedures.Trainer.step

    def stepped(self, *args):
        if self.state.step + 1 == int(os.environ["STOP_IN"]) and is_mine():
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        return step(self, *args)

    procedures.Trainer.step = stepped


@pytest.mark.parametrize(
    "rank, signum, step", [(0, signal.SIGTERM, N_STEPS + 2), (1, signal.SIGINT, N_STEPS)]
)
def test_a_signal_to_one_stops_all_and_any_number_of_processes_resumes(
    rank, signum, step, corpora, monkeypatch
):
    argv = [*RANK_OPTIONS, *corpora["classification"], "--epochs", "3", "--dropout", "0.3"]
    how = {"prepare": signals_itself, "FAILING": rank, "SIGNAL": int(signum), "STOP_IN": step}
    ended = ranks(2, *argv, "--run-dir", "stopped", **how)
    assert [e.status for e in ended] == [128 + signum] * 2
    n_done = step + (step % N_STEPS > 0)  # the next step had begun, if there is one in the epoch
    command = "python ddp_main.py --world-size 2 --resume --run-dir stopped"
    said = f"stopped; step {n_done} is saved; resume with: {command}"
    assert [e.err.strip() for e in ended] == [said, ""]
    steps = [*range(1, n_done + 1)]
    assert [event["step"] for event in events("stopped", "step")] == steps
    shutil.copytree("stopped", "alone")
    shutil.copytree("stopped", "both")

    run_quietly(*argv, "--run-dir", "unbroken", "--accumulate", 2)
    assert [e["steps"] for e in events("unbroken", "epoch")] == [N_STEPS] * 3
    run_quietly("--run-dir", "stopped", "--resume", "--accumulate", 2)
    ranks_quietly(2, "--run-dir", "both", "--resume", prepare=refuse_tensors_in_objects)
    for run in ("stopped", "both"):
        assert_same_weights(run, "unbroken", exactly=True)
        assert without_times(run) == without_times("unbroken")

    # Alone, without accumulation, it resumes with the micro-batch after those that two had.
    monkeypatch.setattr(TextData, "load", TextData.load)
    record_plans()
    run_quietly(*argv, "--run-dir", "whole", "--max-steps", 32)
    run_quietly("--run-dir", "alone", "--resume", "--max-steps", n_done + 2)
    plans = [plan for split, plan in recorded_plans("one") if split == "train"]
    _, *epochs, _, rest = plans
    n_micro_batches = 2 * n_done
    whole = [rows for plan in epochs for rows in plan]
    assert rest[:2] == whole[n_micro_batches : n_micro_batches + 2]


def refuse_tensors_in_objects() -> None:
    """On resume, tensors are sent as tensors: a pickled checkpoint would need a second copy."""
    send = torch.distributed.broadcast_object_list

    def checked(objects, *args, **kwargs):
        assert b"_rebuild_tensor" not in pickle.dumps(objects)
        return send(objects, *args, **kwargs)

    torch.distributed.broadcast_object_list = checked


def test_a_stopped_run_of_two_machines_says_what_to_do_on_each(corpora):
    argv = [*RANK_OPTIONS, *corpora["classification"], "--run-dir", "r"]
    how = {"prepare": signals_itself, "FAILING": 0, "SIGNAL": int(signal.SIGINT), "STOP_IN": 2}
    ended = ranks(2, *argv, **how, LOCAL_WORLD_SIZE=1)
    assert [e.status for e in ended] == [130, 130]
    command = "torchrun as before on each machine, with --resume --run-dir r"
    assert ended[0].err.strip().endswith(f"is saved; resume with: {command}")
    assert ended[1].err == ""


def signals_itself_in_validation() -> None:
    evaluate = procedures.evaluate_split

    def evaluated(model, data, split, plan=None, **where):
        if plan is None and is_mine():  # else it is the warm-up
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model, data, split, plan, **where)

    procedures.evaluate_split = evaluated


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_during_validation_stops_all(rank, corpora):
    argv = [*RANK_OPTIONS, *corpora["classification"], "--epochs", "2", "--run-dir", "r"]
    ended = ranks(2, *argv, prepare=signals_itself_in_validation, FAILING=rank)
    assert [e.status for e in ended] == [143, 143]
    assert f"stopped; step {N_STEPS} is saved; resume with: " in ended[0].err
    assert len(events("r", "epoch")) == 1 and ended[1].err == ""


def delays_and_counts() -> None:
    """Random delays in the steps of one rank; each rank records the steps that it has done, and
    one gets a signal at a random moment."""
    step, draw = procedures.Trainer.step, random.Random()
    seconds = float(os.environ["SECONDS"])

    def delayed(self, *args):
        if self.state.step == 0 and is_mine():
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()
        if os.environ["RANK"] == os.environ["SLOW"]:
            time.sleep(draw.choice((0, 0, 0.05)))
        sums = step(self, *args)
        Path(f"steps.{os.environ['RANK']}").write_text(str(self.state.step + 1))
        return sums

    procedures.Trainer.step = delayed


@pytest.mark.parametrize("n, slow, signalled", [(2, 0, 0), (2, 0, 1), (2, 1, 0), (3, 1, 2)])
def test_no_rank_does_a_step_more_than_another(n, slow, signalled, corpora):
    draw = random.Random()
    argv = [*RANK_OPTIONS, *corpora["classification"], "--epochs", "10000", "--run-dir", "r"]
    how = {"SLOW": slow, "FAILING": signalled, "SECONDS": draw.uniform(0, 1)}
    ended = ranks(n, *argv, prepare=delays_and_counts, **how)
    assert [e.status for e in ended] == [143] * n, ended
    saved = torch.load("r/last.pt", weights_only=True)["state"]["step"]
    assert [int(Path(f"steps.{r}").read_text()) for r in range(n)] == [saved] * n
    assert [event["step"] for event in events("r", "step")] == [*range(1, saved + 1)]
