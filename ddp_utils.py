"""Many processes that train one model together. The only module that names torch.distributed.

With one process every function is a no-op: rank 0 of 1, a sum is the value itself, a broadcast
returns what it was given.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import BadInput, SharedError, Stopped, StopSignals

TIMEOUT = timedelta(hours=2)  # of a collective
PREPARATION_TIMEOUT = timedelta(days=2)  # while one rank prepares the data for all others
THREADS_SET = "RHEA_THREADS_SET"  # set where OMP_NUM_THREADS is the launcher's or the user's choice


def launched() -> bool:
    """Whether torchrun, or a launcher like it, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Index of this process among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Index of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0)) if dist.is_initialized() else 0


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def restarts() -> tuple[int, int]:
    """How often the launcher has restarted the group, and the most restarts it allows."""
    names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
    return tuple(int(os.environ.get(name, 0)) for name in names) if launched() else (0, 0)


# ------------------------------------------------------------------------------------------- launch


def usable_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def threads_per_process(n_processes: int) -> int:
    """Threads for each of several processes on this machine, which share its cores."""
    return max(1, usable_cores() // n_processes)


def launch(n_processes: int, *command: str) -> int:
    """Starts a Python program as n processes through torch's launcher.

    Returns the exit status of the first that failed, or 0.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(n_processes)))
    os.environ[THREADS_SET] = "1"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.disable()  # the launcher repeats in twenty lines what the processes say in one
    try:
        run.run(run.parse_args(["--standalone", f"--nproc-per-node={n_processes}", *command]))
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            reason = f"was killed by signal {-failure.exitcode}"
            print(f"error: process {number} of {n_processes} {reason}", file=sys.stderr)
        return max(1, failure.exitcode)
    except SignalException as error:
        return 128 + error.sigval
    return 0


def check_environment() -> None:
    """Completes the launcher's variables. Raises BadInput when some are missing or no numbers."""
    local = [name for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if name not in os.environ]
    if local and os.environ["RANK"] == "0" and os.environ["WORLD_SIZE"] != "1":
        words = "not set, so one process per machine is assumed; torchrun sets it"
        print(f"warning: {' and '.join(local)}: {words}", file=sys.stderr)
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    problems = [
        f"{name}: not set; start the processes with torchrun, or set it as torchrun does"
        for name in ("MASTER_ADDR", "MASTER_PORT")
        if name not in os.environ
    ]
    problems += [
        f"{name} {os.environ[name]}: not a whole number; start the processes with torchrun"
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        if not os.environ.get(name, "0").isdecimal()
    ]
    if problems:
        raise BadInput(*problems)


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Joins the group that a launcher's environment variables describe.

    device: its kind, or "auto". NCCL connects CUDA devices, one per process; gloo connects CPUs.
    torchrun sets OMP_NUM_THREADS to 1 when it starts several processes; here each process gets its
    share of the cores instead, unless the variable has another value.
    """
    n_local, uses_cuda = int(os.environ["LOCAL_WORLD_SIZE"]), device in ("auto", "cuda")
    uses_cuda = uses_cuda and n_local <= torch.cuda.device_count()  # else it is refused later
    set_by_torchrun = n_local > 1 and THREADS_SET not in os.environ
    if set_by_torchrun and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(threads_per_process(n_local))
    # Python's handlers do not run while C++ code waits for the other processes.
    before = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTERM)}
    store, number, n = next(dist.rendezvous("env://", timeout=TIMEOUT))
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if uses_cuda else None
    if own:
        torch.cuda.set_device(own)  # before the group starts, or all processes use device 0
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if uses_cuda else "gloo",
        # A restarted group may find the store of the previous one and must not use its addresses.
        store=dist.PrefixStore(f"start {restarts()[0]}", store),
        rank=number,
        world_size=n,
        timeout=TIMEOUT,
        device_id=own,
    )
    for signum, handler in before.items():
        signal.signal(signum, handler)
    try:
        yield
    except Exception as error:
        error.add_note(f"in rank {number} of {n}")
        raise
    finally:
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------- collectives


def sum_across_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks, in place, the same on each."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank. For small objects; use `broadcast_tensors` for tensors."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrites the tensors of every rank with those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks in order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value, group)
    return box


@cache
def patient_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """All ranks again, to wait for preparations: what trains waits no longer than TIMEOUT."""
    return dist.new_group(backend="gloo", timeout=PREPARATION_TIMEOUT)


def share_problem(lines: tuple[str, ...] | None, group: dist.ProcessGroup | None = None) -> None:
    """Raises SharedError on every rank if any has a problem. lines: of this rank's BadInput."""
    for number, problem in enumerate(gather(lines, group)):
        if problem:
            raise SharedError(*(f"rank {number}: {line}" if number else line for line in problem))


@contextmanager
def raise_on_all_ranks(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """A BadInput raised in the block on one rank is raised on all of them."""
    lines = None
    try:
        yield
    except BadInput as error:
        if world_size() == 1:
            raise
        lines = error.lines
    share_problem(lines, group)


def broadcast_from_rank_zero(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), called by rank 0 alone; its result or its BadInput reaches every rank."""
    value = None
    with raise_on_all_ranks():
        if rank() == 0:
            value = function(*args)
    return broadcast(value)


@contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """The block runs on one rank of each machine first, whose files the others then find.

    A BadInput raised in the block on one rank is raised on all of them.
    """
    group = patient_group(dist.group.WORLD) if world_size() > 1 else None
    if local_rank() > 0:
        share_problem(None, group)  # waits for the first to leave the block
    with raise_on_all_ranks(group):
        yield
    if local_rank() == 0:
        share_problem(None, group)  # waits for the others


# ----------------------------------------------------------------------------------------- training


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model whose backward pass averages the gradients of all ranks."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,  # positions are the same everywhere
        gradient_as_bucket_view=True,  # one copy of the gradients, not two
    )


def defer_sync(model: nn.Module, *, last: bool) -> AbstractContextManager:
    """Forward and backward passes in the block add up gradients on this rank alone; not in the last
    micro-batch of a step, whose backward pass sends the sums."""
    return nullcontext() if last or world_size() == 1 else model.no_sync()


def stop_agreed(received: int, flag: Tensor | None) -> bool:
    """Whether all ranks stop after the step that was just started.

    received: the signal that this rank received, or 0. flag: () of the step before, the signals of
    all ranks as summed by that step; None at the first step. All ranks read the same sum after the
    same step, so none takes a step more than another. Reading it waits for the step before, not for
    the one just started, which keeps the device busy. One process needs no agreement.
    """
    if world_size() == 1:
        return bool(received)
    return flag is not None and flag.item() > 0


def raise_if_stopped(signals: StopSignals) -> None:
    """Raises Stopped on all ranks if any of them received a signal."""
    received = max(gather(signals.received))
    if received:
        raise Stopped(received)


def is_connection_error(error: BaseException) -> bool:
    """Whether a collective failed: another rank has ended, or the connection cannot be made."""
    words = ("gloo", "NCCL", "Connection reset by peer", "Connection closed by peer", "Broken pipe")
    return world_size() > 1 and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    )
