"""Many processes that train one model together. The only file that names torch.distributed.

Every function here does nothing special where there is one process: there `rank` is 0 and
`world_size` 1, a sum over ranks is the number itself, and a broadcast what was put in.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from comp_utils import BadInput, option


@dataclass(frozen=True)
class LaunchConfig:
    """How many processes train."""

    world_size: int | None = option(
        None, "processes to start on this machine", low=1, unset="torchrun has started them"
    )


STORE: list[dist.Store] = []  # of the group, while there is one
UPDATES: list[torch.cuda.Event] = []  # that a CUDA device was given
SILENCE = timedelta(hours=2)  # that a rank may keep, as while it makes ready the data for others


def launched() -> bool:
    """Whether torchrun, or a launcher like it, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_rank() -> int:
    """This process's number among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0)) if dist.is_initialized() else 0


def local_world_size() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def rank() -> int:
    """This process's number among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes in all."""
    return dist.get_world_size() if dist.is_initialized() else 1


def restarts() -> tuple[int, int]:
    """How often the launcher has restarted the group, and how often it would at most."""
    names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
    return tuple(int(os.environ.get(name, 0)) for name in names) if launched() else (0, 0)


THREADS_SET = "RHEA_THREADS_SET"  # in the environment where OMP_NUM_THREADS is as it should be


def threads_of_one(n_processes: int) -> int:
    """Threads for each of several processes on this machine, which share out its cores."""
    affinity = getattr(os, "sched_getaffinity", None)  # the cores we may use, where that is known
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // n_processes)


def launch(n_processes: int, *command: str) -> int:
    """Starts a Python program as so many processes, through torch's launcher.

    Returns the exit status of the first that failed, or 0.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(threads_of_one(n_processes)))
    os.environ[THREADS_SET] = "1"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.disable()  # of the launcher, which tells in twenty lines what the processes tell in one
    try:
        run.run(run.parse_args(["--standalone", f"--nproc-per-node={n_processes}", *command]))
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            reason = f"was ended by signal {-failure.exitcode}"
            print(f"error: process {number} of {n_processes} {reason}", file=sys.stderr)
        return max(1, failure.exitcode)
    except SignalException as error:
        return 128 + error.sigval
    return 0


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """The group that a launcher's environment describes; it is left whatever happens.

    device: its kind, or "auto". NCCL joins CUDA devices, one to each process, and gloo processors.
    Each process gets its share of the cores, for torchrun sets OMP_NUM_THREADS to 1 without a word
    where it starts several; any other number is somebody's wish.
    """
    n_local, uses_cuda = int(os.environ["LOCAL_WORLD_SIZE"]), device in ("auto", "cuda")
    uses_cuda = uses_cuda and n_local <= torch.cuda.device_count()  # else it is refused later
    is_torchruns = n_local > 1 and THREADS_SET not in os.environ
    if is_torchruns and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(threads_of_one(n_local))
    store, number, n = next(dist.rendezvous("env://", timeout=SILENCE))
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if uses_cuda else None
    if own:
        torch.cuda.set_device(own)  # before the group starts, or all would meet on the first
    # A restarted group may find the store of the one before, and must not take its addresses.
    store = dist.PrefixStore(f"start {restarts()[0]}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if uses_cuda else "gloo",
        store=dist.PrefixStore("group", store),
        rank=number,
        world_size=n,
        timeout=SILENCE,
        device_id=own,
    )
    STORE.append(store)
    try:
        yield
    except Exception as error:
        error.add_note(f"in rank {number} of {n}")
        raise
    finally:
        STORE.clear()
        UPDATES.clear()
        dist.destroy_process_group()


def sum_across_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks, in place, the same on each."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def broadcast_weights(model: nn.Module) -> None:
    """Gives every rank the weights of rank 0."""
    if world_size() > 1:
        for p in model.parameters():
            dist.broadcast(p.detach(), 0)


def gather(value: Any) -> list[Any]:
    """The values of all ranks in their order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


class SharedError(BadInput):
    """What is wrong on some rank, raised on all."""


def agreed(function: Callable[[], Any]) -> Any:
    """function() on every rank; what is BadInput to one is raised on all."""
    value, problem = None, None
    try:
        value = function()
    except BadInput as error:
        if world_size() == 1:
            raise
        problem = error.lines
    for number, lines in enumerate(gather(problem)):
        if lines:
            raise SharedError(*(f"rank {number}: {line}" if number else line for line in lines))
    return value


def by_rank_0(function: Callable[[], Any]) -> Any:
    """function() of rank 0, on every rank."""
    return broadcast(agreed(lambda: function() if rank() == 0 else None))


def one_before_others(function: Callable[[], Any]) -> Any:
    """function() on every rank, first on one of each machine, whose files the others then find."""
    first = agreed(lambda: function() if local_rank() == 0 else None)
    rest = agreed(lambda: function() if local_rank() > 0 else None)
    return first if local_rank() == 0 else rest


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model whose backward pass averages the gradients of all ranks while it goes on."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,  # positions are the same everywhere
        gradient_as_bucket_view=True,  # one copy of the gradients, not two
    )


def defer_sync(model: nn.Module, *, last: bool) -> AbstractContextManager:
    """Inside it, forward and backward pass, gradients are added up here alone; not in the last
    micro-batch of an update."""
    return nullcontext() if last or world_size() == 1 else model.no_sync()


def agree_to_stop(wanted: bool, step: int) -> bool:
    """Whether all ranks stop after this update; wanted: whether this one was asked to.

    Who is asked names the second update from here, for others may have begun the next. None can end
    that next one without all, and whoever has ended it can read the name.
    """
    if world_size() == 1:
        return wanted
    if dist.get_backend_config().find("nccl") >= 0:  # a CUDA device may be far behind its process
        UPDATES.append(torch.cuda.Event())
        UPDATES[-1].record()
        if len(UPDATES) > 1:  # the last update stays under way, for the device to have work
            UPDATES.pop(0).synchronize()
    store, key = STORE[0], "stop after update"
    if not store.check([key]):
        if wanted:
            store.compare_set(key, "", str(step + 2))
        return False
    return step >= int(store.get(key))


def is_lost_peer(error: BaseException) -> bool:
    """Whether the reason for an error is that another rank has gone."""
    words = ("gloo", "peer", "NCCL", "Connection reset", "Broken pipe", "store")
    return world_size() > 1 and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    )
