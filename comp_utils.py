"""General computation: options, devices, seeds, signals, figures. Knows nothing of models."""

import hashlib
import json
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

IMPORTED = time.perf_counter()


class BadInput(ValueError):
    """What the user gave cannot work. Each of `lines` names what was given, what is allowed and
    what to do."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class RunFailed(RuntimeError):
    """The run was right to start and cannot go on: loss not finite, disk full. One line says what
    is kept."""


class Diverged(RunFailed):
    """A loss that is not finite came of the weights after that update."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


# ------------------------------------------------------------------------------------------ options


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field of a settings class, which is also a flag of the command line.

    limits: `choices`, a tuple; `low`, the least value allowed; `above` and `below`, bounds
    themselves not allowed; `unset`, what holds when the default is None; `negatable`, a switch that
    also has its --no- form; `many`, several values after one flag.
    """
    return field(default=default, metadata={"help": help, **limits})


def flag(name: str) -> str:
    """The flag of a field: d_model -> --d-model."""
    return "--" + name.replace("_", "-")


def allowed(metadata: dict[str, Any]) -> str:
    """The limits of an option in words, "" if it has none."""
    words = {"low": "at least {}", "above": "above {}", "below": "below {}"}
    if "choices" in metadata:
        return "one of " + ", ".join(metadata["choices"])
    text = " and ".join(words[key].format(metadata[key]) for key in words if key in metadata)
    return text.replace("below inf", "finite")


def limit_problem(name: str, value: Any, limits: dict[str, Any], given: str) -> str | None:
    """A line that says why a value lies outside an option's limits, or None if it does not."""
    limits = {"below": 2**31, **limits} if isinstance(value, int) else limits
    fits = (
        ("choices" not in limits or value in limits["choices"])
        and ("low" not in limits or value >= limits["low"])
        and ("above" not in limits or value > limits["above"])
        and ("below" not in limits or value < limits["below"])
    )
    return None if fits else f"{flag(name)} {given}: give {allowed(limits)}"


# ------------------------------------------------------------------------------------------ devices


def available_devices() -> list[str]:
    """Kinds of device that this machine has, the fastest first."""
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    return [kind for kind, there in found.items() if there]


def pick_device(
    kind: str, precision: str = "fp32", *, local_rank: int = 0, local_world_size: int = 1
) -> torch.device:
    """The device of that kind; "auto" is the fastest there is. Raises BadInput if it is not there
    or cannot compute in that precision.

    local_rank, local_world_size: of the processes on this machine, each of which needs its own.
    """
    there, n = available_devices(), local_world_size
    if kind != "auto" and kind not in there:
        has = ", ".join(there)
        raise BadInput(f"--device {kind}: not on this machine, which has {has}; give that, or auto")
    if kind == "mps" and n > 1:
        raise BadInput(
            f"--device mps: {n} processes, but a Mac has one GPU, and torch cannot add up gradients"
            " on it; run python main.py, or give --device cpu"
        )
    if n > 1:
        there = [kind for kind in there if kind != "mps"]
    device = torch.device(there[0] if kind == "auto" else kind)
    if device.type == "cuda" and n > torch.cuda.device_count():
        n_devices = torch.cuda.device_count()
        raise BadInput(
            f"--device {kind}: {n} processes on this machine, which has {n_devices} CUDA devices; "
            f"start at most {n_devices}, or give --device cpu"
        )
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
    if precision == "fp16" and device.type != "cuda":
        # float16 overflows without a loss scaler, which is CUDA's; bfloat16 needs none.
        raise BadInput(
            f"--precision fp16: works on cuda alone, not {device.type}; give bf16 or fp32"
        )
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise BadInput("--precision bf16: this GPU has no bfloat16; give fp16 or fp32")
    return device


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Matrix products in 16 bits inside this context; with fp32 it does nothing."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def grad_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss so that float16 gradients do not vanish; with any other precision it does
    nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had no room left; some allocators have no class for it."""
    words = ("can't allocate memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in words)
    )


def synchronize(device: torch.device) -> None:
    """Waits for the device to finish what it was given, so that a clock read afterwards tells the
    truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def set_up(device: torch.device, *, tf32: bool, deterministic: bool) -> None:
    """Arithmetic of all that follows. Raises BadInput.

    tf32: matrix products with 10 bits of mantissa, which NVIDIA's GPUs since Ampere have.
    deterministic: kernels that give the same digits each time, or an error where there is none.
    """
    if tf32 and device.type != "cuda":
        raise BadInput(f"--tf32: is for cuda, and this run is on {device.type}; leave it out")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
    torch.use_deterministic_algorithms(deterministic)


def peak_memory(device: torch.device) -> tuple[int | None, int | None]:
    """Most bytes that this process held, and that it held on the device, which a CPU has not."""
    if device.type == "cuda":
        on_device = torch.cuda.max_memory_allocated(device)
    elif device.type == "mps":
        on_device = torch.mps.driver_allocated_memory()  # now: MPS keeps no peak
    else:
        on_device = None
    try:
        import resource
    except ImportError:  # Windows has none
        return None, on_device
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, on_device


def seconds_since_start() -> float:
    """Since this process began, where the system tells when; else since this module was read."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.perf_counter() - IMPORTED
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def driver() -> str | None:
    """What stands between torch and the device."""
    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        version = said.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        version = "unknown"  # the record of a figure is not worth the figure
    return f"NVIDIA {version}, CUDA {torch.version.cuda}"


def device_name(device: torch.device) -> str:
    """The maker's name of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What a figure of speed needs to be understood, and nothing that names a person or a host."""
    return {
        "device": device.type,
        "device_name": device_name(device),
        "processor": device_name(torch.device("cpu")),
        "driver": driver() if device.type == "cuda" else None,
        "mps_fallback": os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") == "1",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def set_seed(seed: int) -> None:
    """Seeds every generator that initialisation and libraries draw from. Batch plans have their
    own, and dropout is seeded anew for each micro-batch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


DIGEST_VERSION = 1  # to be raised when rows, ids or plans are made in another way than before


def digest(*parts: Any) -> str:
    """16 hex digits that stand for the parts; what is kept on disk is found by them."""
    text = json.dumps([DIGEST_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ signals


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM asked the run to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """Inside this context Ctrl-C and SIGTERM raise Stopped, and a second one ends the process.

    Inside `held()` the first one waits for its end, so that what is done there is done whole.
    """

    def __init__(self) -> None:
        self.held_back, self.received = False, 0

    def __enter__(self) -> "StopSignals":
        self.before = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, _: Any) -> None:
        if self.received:
            os._exit(128 + signum)
        self.received = signum
        if not self.held_back:
            raise Stopped(signum)

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is done in here is done whole."""
        self.held_back = True
        try:
            yield
        finally:
            self.held_back = False
        if self.received:  # in here, or where Python drops what a signal raises, as in __del__
            raise Stopped(self.received)


# ---------------------------------------------------------------------------------------- progress


class Progress:
    """Training progress on stderr: a bar where it is a terminal, else a line at times."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, n_steps: int, title: str, n_done: int = 0) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=n_steps, initial=n_done, desc=title, unit="step", leave=False, disable=None
        )
        self.title, self.n_steps, self.n_done = title, n_steps, n_done
        self.said = time.perf_counter()

    def update(self, n: int, facts: str) -> None:
        """n steps more are done; facts are shown behind the bar."""
        self.n_done += n
        self.bar.set_postfix_str(facts, refresh=False)
        self.bar.update(n)
        if self.bar.disable and time.perf_counter() - self.said > self.SECONDS_BETWEEN_LINES:
            print(f"{self.title}: step {self.n_done}/{self.n_steps}, {facts}", file=sys.stderr)
            self.said = time.perf_counter()

    def close(self) -> None:
        """Takes the bar away."""
        self.bar.close()


# ------------------------------------------------------------------------------------------ figures

BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart by the colour-blind, and by brightness in print


def draw_curves(metrics: list[dict[str, Any]], out: BinaryIO, title: str) -> None:
    """Loss and accuracy of training and validation by epoch, and BLEU where it was reckoned."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [m for m in metrics if m["event"] == "epoch"]
    if not epochs:
        return
    labels = {"loss": "loss (nats per target)", "accuracy": "accuracy (%)", "bleu": "BLEU"}
    names = [name for name in labels if any(f"validation_{name}" in m for m in epochs)]
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names)), names):
        for split, color, style in (("train", BLUE, "--"), ("validation", ORANGE, "-")):
            points = {m["epoch"]: m.get(f"{split}_{name}") for m in epochs}
            x = [epoch for epoch, value in points.items() if value is not None]
            y = [points[epoch] * (100 if name == "accuracy" else 1) for epoch in x]
            if x:
                legend = {"train": "training, with dropout", "validation": "validation"}[split]
                marker = "o" if len(x) <= 30 else ""
                axes.plot(x, y, style, color=color, marker=marker, label=legend)
        axes.set(xlabel="epoch", ylabel=labels[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(out, dpi=150)


def draw_confusion(counts: np.ndarray, names: list[str], out: BinaryIO, title: str) -> None:
    """counts[true, predicted] as a picture; each row's colour is the share of its class."""
    from matplotlib.figure import Figure

    n = len(names)
    short = [name if len(name) <= 20 else name[:19] + "…" for name in names]
    size = max(4.5, 0.45 * n + 2)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(n), short, rotation=90 if n > 4 else 0)
    axes.set_yticks(range(n), short)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    for i, j in np.ndindex(n, n):
        if n <= 12 or counts[i, j]:
            color = "white" if shares[i, j] > 0.5 else "black"
            text = f"{counts[i, j]:,}" + (f"\n{shares[i, j]:.0%}" if n <= 8 else "")
            axes.text(
                j, i, text, ha="center", va="center", color=color, fontsize=10 if n <= 8 else 7
            )
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    figure.savefig(out, dpi=150)


def draw_attention(
    sentences: list[tuple[list[str], list[str], np.ndarray]], out: BinaryIO, title: str
) -> None:
    """What each target token took of the source: (source, target, weights[target, source]) each."""
    from matplotlib.figure import Figure

    longest = max(max(weights.shape) for *_, weights in sentences)
    n_columns = min(2, len(sentences))
    n_rows = math.ceil(len(sentences) / n_columns)
    size = max(4.0, 0.3 * longest + 2)  # inches
    figure = Figure(figsize=(n_columns * size, n_rows * size), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axes, (source, target, weights) in zip(panels, sentences):
        image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(source)), source, rotation=90)
        axes.set_yticks(range(len(target)), target)
        axes.set(xlabel="source", ylabel="translation")
    for axes in panels[len(sentences) :]:
        axes.remove()
    figure.colorbar(image, ax=figure.axes, label="attention, mean of the heads", shrink=0.6)
    figure.suptitle(title)
    figure.savefig(out, dpi=150)
