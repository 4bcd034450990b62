"""How fast a machine trains: timed steps. Also the check that a device matches the CPU."""

import copy
import math
import statistics
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from datetime import date
from functools import cache
from math import comb
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kernels
from comp_utils import autocast, digest, peak_memory, seconds_since_start, synchronize
from config import ModelConfig
from data import Batch, PlanSizes, Step
from ddp_utils import stop_agreed, sum_across_ranks
from errors import RunFailed
from optimization import loss_sums
from procedures import Trainer

REPETITIONS = 5
SAME_WORK = {"attention", "dropout", "naive_bayes"}  # options that do not change it
WARM_UP = 10  # steps before the clock starts: caches, clock rates and allocators settle


# ------------------------------------------------------------------------------------------- timing


def benchmark(trainer: Trainer, n_steps: int) -> dict[str, Any]:
    """Times the first n_steps steps of the first epoch, REPETITIONS times.

    Returns the figures of a record: medians of the repetitions with least and greatest.
    """
    began = time.perf_counter()
    trainer.warm_up()
    compile_seconds = time.perf_counter() - began if trainer.compiled else 0.0
    start_seconds = seconds_since_start() - compile_seconds
    plan = trainer.plan(1)
    all_steps = trainer.steps(plan, epoch=1)
    steps = all_steps[:n_steps]
    whole = len(steps) == len(all_steps)
    seconds = time_steps(trainer, steps)
    # Before anything else: the FLOP count and the matrix product below need memory of their own.
    process_bytes, device_bytes = peak_memory(trainer.device)

    sizes = trainer.data.sizes("train", plan)
    timed = PlanSizes(*(size[: sum(step.n_micro_batches for step in steps)] for size in sizes))
    n_tokens, n_positions = timed.n_tokens.sum(), timed.n_positions.sum()
    n_all_positions = sizes.n_positions.sum()
    shapes: Counter[tuple[int, int]] = Counter()  # sentences by (l_z, l_x)
    for n_rows, l_z, l_x in zip(*(size.tolist() for size in timed[:3])):
        shapes[l_z, l_x] += n_rows * (2 if trainer.config.r_drop else 1)
    flops = 3 * forward_flops(trainer.model, shapes)
    matmul = torch.tensor(matmul_flops_per_second(trainer.device, trainer.precision))
    matmul = sum_across_ranks(matmul.double()).item()
    median = statistics.median(seconds)
    return {
        "date": date.today().isoformat(),
        "steps": len(steps),
        "steps_per_epoch": len(all_steps),
        "repetitions": REPETITIONS,
        "warm_up_steps": min(WARM_UP, len(steps)),
        "seconds_per_step": spread([x / len(steps) for x in seconds]),
        "tokens_per_second": float(n_tokens / median),
        "positions_per_second": float(n_positions / median),
        # By padded positions: the timed steps need not be an average of the epoch.
        "seconds_per_epoch": spread([float(x * n_all_positions / n_positions) for x in seconds]),
        "seconds_per_epoch_is": "measured" if whole else f"extrapolated from {len(steps)} steps",
        "peak_process_bytes": process_bytes,
        "peak_device_bytes": device_bytes,
        "model_flops_per_second": flops / median,
        "matmul_flops_per_second": matmul,
        "share_of_matmul_flops": flops / median / matmul,
        "start_seconds": start_seconds,
        "compile_seconds": compile_seconds,
    }


def time_steps(trainer: Trainer, steps: list[Step]) -> list[float]:
    """Seconds of the steps in each repetition, after a warm-up; the device is idle at both ends."""
    trainer.runner.train()
    run_steps(trainer, steps[:WARM_UP])
    seconds = []
    for _ in range(REPETITIONS):
        wait_for_all_ranks(trainer.device)
        began = time.perf_counter()
        run_steps(trainer, steps)
        wait_for_all_ranks(trainer.device)
        seconds.append(time.perf_counter() - began)
    return seconds


def run_steps(trainer: Trainer, steps: list[Step]) -> None:
    """Steps as training makes them, from loading the batches to the agreement on stopping.

    Left out: logging, which reads the losses once a second, and checkpoints.
    """
    flag = None
    for step, micro_batches in trainer.data.load_steps(steps, trainer.device):
        # The learning rate of the first step throughout: the time does not depend on it.
        sums = trainer.step(step, micro_batches, trainer.learning_rate(1))
        stop_agreed(0, flag)
        flag = sums[2]


def wait_for_all_ranks(device: torch.device) -> None:
    """Returns when every rank has called it and its device is idle."""
    synchronize(device)
    sum_across_ranks(torch.zeros(1))


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def work_fingerprint(plan_fingerprint: str, model: ModelConfig, r_drop: float) -> str:
    """Equal for two runs that do the same work: the same batches, a model of the same shape.

    How the work is done (attention implementation, precision, processes) is left out, and so are
    options at their default, so that a new option leaves old records comparable.
    """
    default = asdict(ModelConfig())
    shape = {k: v for k, v in asdict(model).items() if k not in SAME_WORK}
    shape = {k: v for k, v in shape.items() if v != default[k]}
    return digest(plan_fingerprint, shape, model.dropout > 0, r_drop > 0)


# ------------------------------------------------------------------------------------------- FLOP/s


def forward_flops(model: nn.Module, shapes: dict[tuple[int, int], int]) -> int:
    """Floating-point operations of the matrix products of a forward pass, counted by torch on the
    meta device; a multiply-add is two. A training step has three times as many.

    shapes: number of sentences by (l_z, l_x), source and target positions with padding.
    """
    on_meta = {id(x): x.detach().to("meta") for x in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, on_meta).eval()

    @cache
    def count(l_z: int, l_x: int) -> int:
        src, tgt_in = (torch.zeros(1, n, dtype=torch.int64, device="meta") for n in (l_z, l_x))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(src, tgt_in)
        return counter.get_total_flops()

    def interpolate(l_z: int, l_x: int) -> int:
        """The polynomial of degree 2 through six counts, in Newton's form: exact in integers."""
        f, z, x = count, l_z - 1, l_x - 1
        total = f(1, 1) + z * (f(2, 1) - f(1, 1)) + x * (f(1, 2) - f(1, 1))
        total += comb(z, 2) * (f(3, 1) - 2 * f(2, 1) + f(1, 1))
        total += comb(x, 2) * (f(1, 3) - 2 * f(1, 2) + f(1, 1))
        return total + z * x * (f(2, 2) - f(2, 1) - f(1, 2) + f(1, 1))

    # A count takes up to half a second, and a plan has hundreds of shapes. The count is quadratic
    # in the lengths. A model for which that is wrong is counted shape by shape.
    flops = interpolate if interpolate(*max(shapes)) == count(*max(shapes)) else count
    return sum(n * flops(*shape) for shape, n in shapes.items())


@torch.no_grad()
def matmul_flops_per_second(device: torch.device, precision: str, size: int | None = None) -> float:
    """Of the product of two square matrices of this precision: the median of five."""
    size = size or (8192 if device.type == "cuda" else 2048)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    A, B = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        synchronize(device)
        began = time.perf_counter()
        kernels.linear(A, B)  # as the model's products are computed
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[1:])


def record_in_words(record: dict[str, Any]) -> str:
    """The figures of one record, a line each."""
    r, epoch = record, record["seconds_per_epoch"]
    ms = {name: f"{seconds * 1000:.1f}" for name, seconds in r["seconds_per_step"].items()}
    memory = {"process": r["peak_process_bytes"], "device": r["peak_device_bytes"]}
    memory = [f"{name} {n / 2**20:,.0f} MiB" for name, n in memory.items() if n]
    return f"""\
work {r["work_fingerprint"]} (batch plan {r["plan_fingerprint"]})
one step: {ms["median"]} ms ({ms["least"]} to {ms["greatest"]}), median of {r["repetitions"]} \
repetitions of {r["steps"]} steps
{r["tokens_per_second"]:,.0f} tokens/s, {r["positions_per_second"]:,.0f} positions/s with padding
model {r["model_flops_per_second"] / 1e9:,.1f} GFLOP/s, {r["share_of_matmul_flops"]:.0%} of a \
large matrix product ({r["matmul_flops_per_second"] / 1e9:,.1f} GFLOP/s)
peak memory: {", ".join(memory) or "unknown"}
start-up {r["start_seconds"]:.1f} s, compilation {r["compile_seconds"]:.1f} s
one training epoch: {epoch["median"]:.2f} s ({epoch["least"]:.2f} to {epoch["greatest"]:.2f}), \
{r["seconds_per_epoch_is"]}"""


# ------------------------------------------------------------------------------- device against CPU

# Largest difference allowed, relative to the largest absolute value of the reference. Rounding
# errors of 2^-24, 2^-8 and 2^-11 accumulate over the layers, and one that changes a sign before a
# ReLU opens or closes a path of the gradient.
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-1, "fp16": 4e-2}
TF32_TOLERANCE = TOLERANCES["fp16"]  # both have a mantissa of 10 bits


def forward_backward(
    model: nn.Module, batch: Batch, device: torch.device, precision: str, label_smoothing: float
) -> dict[str, Tensor]:
    """Loss in nats per target, logits and every gradient of one batch, on the CPU in float32."""
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # random numbers differ between devices
    batch = batch.to(device)
    with autocast(precision, device) if precision != "fp32" else nullcontext():
        logits = model(batch.src, batch.tgt_in)
    loss = loss_sums(logits, batch.tgt_out, label_smoothing)[0] / batch.n_targets
    loss.backward()
    tensors = {"loss": loss, "logits": logits}
    tensors |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {name: x.detach().float().cpu() for name, x in tensors.items() if x is not None}


def check_device(
    model: nn.Module,
    reference: nn.Module,
    batch: Batch,
    *,
    device: torch.device,
    precision: str,
    label_smoothing: float,
) -> list[tuple[str, float]]:
    """Compares a model on a device with reference, the same model on the CPU, in float32.

    Returns (tensor name, largest difference / largest absolute value of the reference), largest
    first. Gives reference the weights of model, and sets dropout to 0 in both.
    """
    reference.load_state_dict(model.state_dict())
    found = forward_backward(model, batch, device, precision, label_smoothing)
    wanted = forward_backward(reference, batch, torch.device("cpu"), "fp32", label_smoothing)
    if found.keys() != wanted.keys():
        raise ValueError(f"only one model has {sorted(found.keys() ^ wanted.keys())}")
    # A gradient that is 0 in theory, such as that of W_k's bias, consists of rounding errors of the
    # other gradients in its sub-layer: its scale is at least a tenth of the largest of these.
    scales = {name: x.abs().max().item() for name, x in wanted.items()}
    largest: dict[str, float] = {}
    for name, scale in scales.items():
        layer = name.rpartition(".W_")[0]
        largest[layer] = max(largest.get(layer, 0.0), scale)
    errors = []
    for name, x in found.items():
        layer = name.rpartition(".W_")[0]
        scale = max(scales[name], largest[layer] / 10) if layer else scales[name]
        difference = (x - wanted[name]).abs().max().item()
        errors.append((name, difference / scale if math.isfinite(difference) else math.inf))
    return sorted(errors, key=lambda pair: -pair[1])


def device_report(
    errors: list[tuple[str, float]], device: torch.device, precision: str, tf32: bool
) -> list[str]:
    """The result of `check_device`, a line each. Raises RunFailed if the device does not match."""
    tolerance = TF32_TOLERANCE if tf32 else TOLERANCES[precision]
    first = [pair for pair in errors if pair[0] in ("loss", "logits")]
    rest = [pair for pair in errors if pair not in first]
    name, error = errors[0]
    if not error <= tolerance:
        raise RunFailed(
            f"{device} does not match the CPU: {name} differs by {error:.1e} of its largest value, "
            f"and {tolerance:.0e} is allowed in {'tf32' if tf32 else precision}"
        )
    return [
        "largest difference, relative to the largest value on the CPU (list attention, fp32):",
        *(f"  {error:.1e}  {name}" for name, error in [*first, *rest[:5]]),
        f"  {len(rest[5:])} more gradients differ less",
        f"{device} matches the CPU: all within {tolerance:.0e}",
    ]
