"""Devices, precision, seeds and console output. Knows nothing of models."""

import hashlib
import json
import os
import platform
import random
import re
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from errors import BadInput

IMPORTED = time.perf_counter()


# ------------------------------------------------------------------------------------------ devices


def available_devices() -> list[str]:
    """Kinds of device that this machine has, fastest first."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    return [kind for kind, there in available.items() if there]


def pick_device(
    kind: str, precision: str = "fp32", *, local_rank: int = 0, local_world_size: int = 1
) -> torch.device:
    """The device of a kind; "auto" is the fastest available one.

    local_rank, local_world_size: of the processes on this machine; each needs a GPU of its own.
    Raises BadInput if there is no such device, or it does not support the precision.
    """
    kinds, n = available_devices(), local_world_size
    if kind != "auto" and kind not in kinds:
        raise BadInput(
            f"--device {kind}: not available on this machine; give {', '.join(kinds)} or auto"
        )
    if kind == "mps" and n > 1:
        raise BadInput(
            f"--device mps: {n} processes, but a Mac has one GPU and torch cannot average gradients"
            " on it; run python main.py, or give --device cpu"
        )
    if n > 1:
        kinds = [kind for kind in kinds if kind != "mps"]
    device = torch.device(kinds[0] if kind == "auto" else kind)
    if device.type == "cuda":
        n_devices = torch.cuda.device_count()
        if n > n_devices:
            raise BadInput(
                f"--device {kind}: {n} processes on this machine, which has {n_devices} CUDA "
                f"devices; start at most {n_devices}, or give --device cpu"
            )
        device = torch.device("cuda", local_rank)
    check_precision(precision, device)
    return device


def check_precision(precision: str, device: torch.device) -> None:
    """Raises BadInput if a device does not support a precision."""
    if precision == "fp16" and device.type != "cuda":
        # float16 needs a loss scaler, which works on CUDA alone; bfloat16 needs none.
        raise BadInput(f"--precision fp16: needs cuda, not {device.type}; give bf16 or fp32")
    # Emulated bfloat16 would be slower than fp32.
    if (precision, device.type) == ("bf16", "cuda") and not torch.cuda.is_bf16_supported(
        including_emulation=False
    ):
        raise BadInput("--precision bf16: this GPU has no bfloat16; give fp16 or fp32")


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Matrix products in 16 bits inside this context; a no-op with fp32."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def grad_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss so that float16 gradients do not vanish; a no-op in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, is out of memory. Some allocators raise a RuntimeError."""
    words = ("can't allocate memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in words)
    )


def synchronize(device: torch.device) -> None:
    """Waits for the device to finish its work, so that a clock read afterwards is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def synchronized_time(device: torch.device) -> float:
    """A clock in seconds, read when the device has finished its work."""
    synchronize(device)
    return time.perf_counter()


def set_up(device: torch.device, *, tf32: bool, deterministic: bool) -> None:
    """Sets torch's global arithmetic. Raises BadInput.

    tf32: fp32 matrix products with a 10-bit mantissa, on NVIDIA GPUs since Ampere.
    deterministic: kernels that give the same digits each time, or an error where there is none.
    """
    if tf32 and device.type != "cuda":
        raise BadInput(f"--tf32: needs cuda, and this run is on {device.type}; leave it out")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)  # imports torch.compile: 1.3 s


def peak_memory(device: torch.device) -> tuple[int | None, int | None]:
    """Peak bytes of this process, and of its allocations on the device (None for a CPU)."""
    on_device = None
    if device.type == "cuda":
        on_device = torch.cuda.max_memory_allocated(device)
    elif device.type == "mps":
        on_device = torch.mps.driver_allocated_memory()  # at present: MPS keeps no peak
    try:
        import resource
    except ImportError:  # Windows
        return None, on_device
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, on_device


# ------------------------------------------------------------------------------------ machine facts


def seconds_since_start() -> float:
    """Seconds since this process began, where the system says so; else since this import."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.perf_counter() - IMPORTED
    ticks = int(stat.read_text("utf-8", "replace").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def device_name(device: torch.device) -> str:
    """The maker's name of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text("utf-8", "replace"))
        if cpuinfo.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def processor_model() -> str | None:
    """Family, model, stepping and clock rate of the processor, where the system tells them."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or None
    pattern = r"^(?:cpu |CPU )?(family|model|stepping|implementer|part|MHz)\s*:\s*(.+)$"
    facts = dict(re.findall(pattern, cpuinfo.read_text(), flags=re.MULTILINE))
    khz = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    ghz = int(khz.read_text()) / 1e6 if khz.exists() else float(facts.get("MHz", 0)) / 1e3
    words = [f"{name} {value}" for name, value in facts.items() if name != "MHz"]
    return ", ".join(words + [f"{ghz:.1f} GHz"] * (ghz > 0)) or None


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What a time needs to be understood, and nothing that names a person or a host."""
    return {
        "device": device.type,
        "device_name": device_name(device),
        "processor": device_name(torch.device("cpu")),
        "processor_model": processor_model(),
        "driver": f"CUDA {torch.version.cuda}" if device.type == "cuda" else None,
        "mps_fallback": os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") == "1",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


# ------------------------------------------------------------------------------ seeds, fingerprints


def set_seed(seed: int) -> None:
    """Seeds every generator that initialization and libraries draw from. Batch plans have their
    own, and dropout is seeded for each micro-batch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


DIGEST_VERSION = 2  # increase it when rows, tokenizers, ids or plans are made in another way


def digest(*parts: Any) -> str:
    """16 hex digits that identify the parts; caches on disk are found by them."""
    text = json.dumps([DIGEST_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ console


def write_lines(stream: TextIO, *lines: str) -> bool:
    """Prints lines at once. Returns False if they cannot be written, as when the reader, such as
    `head`, has ended; from then on the stream goes nowhere, for a run outlives its output."""
    try:
        print(*lines, sep="\n", file=stream, flush=True)
    except OSError:  # also a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


def say(*lines: str) -> None:
    """Lines on standard output."""
    if not write_lines(sys.stdout, *lines):
        warn("standard output was closed or is full; the run continues without it")


def warn(line: str) -> None:
    """One warning on standard error."""
    write_lines(sys.stderr, f"warning: {line}")


class Progress:
    """Progress of training on standard error: a bar on a terminal, else a line every 10 s."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, title: str, n_steps: int, n_done: int = 0) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=n_steps, initial=n_done, desc=title, unit="step", leave=False, disable=None
        )
        self.title, self.n_steps, self.n_done = title, n_steps, n_done
        self.printed = time.perf_counter()

    def advance(self, n: int, text: str) -> None:
        """n more steps are done; text is shown beside the bar."""
        self.n_done += n
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(n)
        if self.bar.disable and time.perf_counter() - self.printed > self.SECONDS_BETWEEN_LINES:
            write_lines(sys.stderr, f"{self.title}: step {self.n_done}/{self.n_steps}, {text}")
            self.printed = time.perf_counter()

    def close(self) -> None:
        """Removes the bar."""
        self.bar.close()


def set_up_output(encoding: str | None = None) -> None:
    """Makes stdout and stderr replace characters that they cannot encode instead of raising.

    encoding: of stdout, instead of the locale's.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed when the process started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream, name in ((sys.stdout, encoding), (sys.stderr, None)):
        if hasattr(stream, "reconfigure"):  # not io.StringIO, for instance
            stream.reconfigure(encoding=name, errors="replace")
