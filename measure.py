"""How fast a machine trains: timed updates, records of them, the figure that compares records.

Also the check that a device computes what the CPU does.
"""

import json
import math
import re
import statistics
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from comp_utils import (
    BLUE,
    ORANGE,
    BadInput,
    autocast,
    digest,
    option,
    peak_memory,
    seconds_since_start,
    synchronize,
)
from data import Batch
from ddp_utils import sum_across_ranks
from models import ModelConfig
from procedures import Trainer, loss_sums
from run_folder import RunFolder


@dataclass(frozen=True)
class MeasureConfig:
    """What to measure, instead of training."""

    benchmark: int | None = option(
        None, "time this many updates, five times over, instead of training", low=1, unset="trains"
    )
    workload: str | None = option(
        None,
        "named settings to compare machines by: 6+6 layers of 16/64 on reviews padded to 512 "
        "tokens, the recipe of rotten_tomatoes, or that of libreoffice_help",
        choices=("original", "reviews", "translation"),
    )
    check_device: bool = option(
        False, "compare one batch, forward and backward, on --device with the CPU"
    )
    compare: tuple[str, ...] | None = option(
        None, "run folders, benchmark.json or .jsonl files to compare", many=True
    )
    figure: str | None = option(None, "draw what is compared: a .png, .svg or .pdf")
    allow_different_work: bool = option(
        False, "compare records of different work too, and say so in the figure"
    )


REPETITIONS = 5
WARM_UP = 10  # updates before the clock starts, for caches, clocks and allocators to settle


# ----------------------------------------------------------------------------------------- counting


def model_flops(config: ModelConfig, *, n: int, l_z: int, l_x: int, n_out: int) -> int:
    """Floating-point operations of the matrix products of one forward pass; two for each
    multiply-add.

    n sentences of l_z source and l_x target positions, padding included. A training step has three
    times as many: the backward pass makes two products for each of the forward pass.
    n_out: logits at a target position.
    """
    d, h = config.d_model, config.n_heads
    d_attn, d_mid = config.d_attn or d // h, config.d_mid or d // h

    def attention(l_q: int, l_k: int) -> int:
        """W_q and W_o at each query, W_k and W_v at each key, S = Q K^T and S V between them."""
        projections = l_q * d * h * (d_attn + d_mid) + l_k * d * h * (d_attn + d_mid)
        return 2 * n * (projections + l_q * l_k * h * (d_attn + d_mid))

    def feed_forward(length: int) -> int:
        return 2 * n * length * 2 * d * config.d_ff

    encoder = attention(l_z, l_z) + feed_forward(l_z)
    decoder = attention(l_x, l_x) + attention(l_x, l_z) + feed_forward(l_x)
    return config.n_layers * (encoder + decoder) + 2 * n * l_x * d * n_out


@torch.no_grad()
def matmul_flops_per_second(device: torch.device, precision: str) -> float:
    """What this device makes of a large matrix product in this precision: the median of five."""
    size = 8192 if device.type == "cuda" else 2048
    A, B = (torch.randn(size, size, device=device) for _ in range(2))
    seconds = []
    with autocast(precision, device):
        for _ in range(6):
            synchronize(device)
            began = time.perf_counter()
            A @ B
            synchronize(device)
            seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[1:])


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def work_fingerprint(plan_fingerprint: str, model: ModelConfig, r_drop: float) -> str:
    """Two runs that show the same one did the same work: the same batches, a model of one shape.

    How it is done, such as the form of attention, the precision or the processes, is left out.
    """
    shape = {k: v for k, v in asdict(model).items() if k not in ("attention", "dropout")}
    return digest(plan_fingerprint, shape, model.dropout > 0, r_drop > 0)


# ------------------------------------------------------------------------------------------- timing


def benchmark(
    trainer: Trainer, model_config: ModelConfig, n_steps: int, *, n_out: int
) -> dict[str, Any]:
    """Times the first n_steps updates of the first epoch's plan, as often as REPETITIONS says.

    Returns figures for a record: medians of the repetitions with least and greatest. Whatever
    training does with a batch is in the time, its making included; compilation and warm-up are not.
    """
    began = time.perf_counter()
    trainer.rehearse()
    compile_seconds = time.perf_counter() - began if trainer.compiled else 0.0
    start_seconds = seconds_since_start() - compile_seconds
    trainer.runner.train()
    plan = trainer.plan(1)
    updates = trainer.deal(plan)
    n_whole = len(updates)
    updates = updates[:n_steps]
    run_updates(trainer, plan, updates[:WARM_UP])
    device, seconds = trainer.device, []
    for _ in range(REPETITIONS):
        wait_for_all(device)
        began = time.perf_counter()
        run_updates(trainer, plan, updates)
        wait_for_all(device)
        seconds.append(time.perf_counter() - began)

    data, n_times = trainer.data, 2 if trainer.config.r_drop else 1
    timed = [plan[place] for places in updates for place in places]
    n_tokens = sum(data.count("train", rows)[1] for rows in timed)
    n_positions, n_all_positions = (positions(trainer, rows) for rows in (timed, plan))
    flops = sum(
        3 * n_times * model_flops(model_config, n=len(rows), l_z=l_z, l_x=l_x, n_out=n_out)
        for rows in timed
        for l_z, l_x in [data.widths("train", rows)]
    )
    matmul = torch.tensor(matmul_flops_per_second(device, trainer.precision), dtype=torch.float64)
    matmul = sum_across_ranks(matmul).item()
    process_bytes, device_bytes = peak_memory(device)
    median, whole = statistics.median(seconds), len(updates) == n_whole
    return {
        "updates": len(updates),
        "updates_of_an_epoch": n_whole,
        "repetitions": REPETITIONS,
        "warm_up_updates": min(WARM_UP, len(updates)),
        "seconds_per_update": spread([x / len(updates) for x in seconds]),
        "tokens_per_second": n_tokens / median,
        "positions_per_second": n_positions / median,
        # By padded positions: the updates timed need not be an epoch's average.
        "seconds_per_epoch": spread([x * n_all_positions / n_positions for x in seconds]),
        "seconds_per_epoch_is": "measured" if whole else "reckoned from the updates timed",
        "peak_process_bytes": process_bytes,
        "peak_device_bytes": device_bytes,
        "model_flops_per_second": flops / median,
        "matmul_flops_per_second": matmul,
        "share_of_matmul_flops": flops / median / matmul,
        "start_seconds": start_seconds,
        "compile_seconds": compile_seconds,
    }


def run_updates(trainer: Trainer, plan: list[Any], updates: list[range]) -> None:
    """Updates as training makes them, at the rate of the first: the figures do not depend on it."""
    for micro_batches, places in trainer.batches(plan, updates):
        trainer.step(micro_batches, plan, places, trainer.lr_of(1))


def positions(trainer: Trainer, plan: list[Any]) -> int:
    """Source and target positions of batches, padding included."""
    return sum(len(rows) * sum(trainer.data.widths("train", rows)) for rows in plan)


def wait_for_all(device: torch.device) -> None:
    """Until every process has come here with its device at rest."""
    synchronize(device)
    sum_across_ranks(torch.zeros(1))


def record_in_words(record: dict[str, Any]) -> str:
    """The figures of one record, a line each."""
    update, epoch = record["seconds_per_update"], record["seconds_per_epoch"]
    ms = {name: f"{seconds * 1000:.1f}" for name, seconds in update.items()}
    memory = {
        "process": record["peak_process_bytes"],
        "device": record["peak_device_bytes"],
    }
    memory = [f"{n / 2**20:,.0f} MiB of the {what}" for what, n in memory.items() if n]
    giga = {name: record[f"{name}_flops_per_second"] / 1e9 for name in ("model", "matmul")}
    lines = [
        f"work {record['work_fingerprint']} (batch plan {record['plan_fingerprint']})",
        f"one update: {ms['median']} ms ({ms['least']} to {ms['greatest']}), the median of "
        f"{record['repetitions']} times {record['updates']} updates",
        f"{record['tokens_per_second']:,.0f} tokens/s, {record['positions_per_second']:,.0f} "
        "with padding",
        f"{giga['model']:,.1f} GFLOP/s of the model, {record['share_of_matmul_flops']:.0%} of the "
        f"{giga['matmul']:,.1f} of a large matrix product",
        f"peak memory: {', '.join(memory) or 'not known here'}",
        f"start-up {record['start_seconds']:.1f} s, compilation {record['compile_seconds']:.1f} s",
        f"one training epoch: {epoch['median']:.2f} s ({epoch['least']:.2f} to "
        f"{epoch['greatest']:.2f}), {record['seconds_per_epoch_is']}",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------- device against CPU

# Largest difference from the reference, as a share of the reference's largest number. Roundings by
# 2^-24, 2^-8 and 2^-11 add up over the layers, and one that turns a sign before a ReLU closes or
# opens a path of the gradient.
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-1, "fp16": 4e-2}
TF32_TOLERANCE = 1e-2


def outcomes(
    model: nn.Module, batch: Batch, device: torch.device, precision: str, label_smoothing: float
) -> dict[str, Tensor]:
    """Loss in nats per target, logits and every gradient of one batch, on the CPU in float32."""
    batch = batch.to(device)
    with autocast(precision, device) if precision != "fp32" else nullcontext():
        logits = model(batch.src, batch.tgt_in)
    loss = loss_sums(logits, batch.tgt_out, label_smoothing)[0] / batch.n_targets
    loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    found = {"loss": loss, "logits": logits, **gradients}
    return {name: x.detach().float().cpu() for name, x in found.items() if x is not None}


def check_device(
    model: nn.Module,
    reference: nn.Module,
    batch: Batch,
    *,
    device: torch.device,
    precision: str,
    tolerance: float,
    label_smoothing: float,
) -> tuple[list[tuple[str, float]], bool]:
    """What of a model on a device differs from reference, the same model on the CPU, in float32.

    Returns (what, share of the reference's largest number), the greatest first, and whether all
    are within the tolerance.
    """
    reference.load_state_dict(model.state_dict())
    for m in (model, reference):
        for layer in m.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0  # two devices draw differently
    ours = outcomes(model, batch, device, precision, label_smoothing)
    theirs = outcomes(reference, batch, torch.device("cpu"), "fp32", label_smoothing)
    if ours.keys() != theirs.keys():
        raise ValueError(f"gradients of one side alone: {sorted(ours.keys() ^ theirs.keys())}")
    # A gradient that is 0 in theory, as W_k's bias has, is all rounding, of numbers like those of
    # the other gradients in its sub-layer: it is held against a tenth of the largest of these.
    largest: dict[str, float] = {}
    for name, x in theirs.items():
        layer = name.rpartition(".W_")[0]
        largest[layer] = max(largest.get(layer, 0.0), x.abs().max().item())
    shares = []
    for name, x in ours.items():
        scale, layer = theirs[name].abs().max().item(), name.rpartition(".W_")[0]
        scale = max(scale, largest[layer] / 10) if layer else scale
        difference = (x - theirs[name]).abs().max().item()
        shares.append((name, difference / scale if math.isfinite(difference) else math.inf))
    shares.sort(key=lambda pair: -pair[1])
    return shares, shares[0][1] <= tolerance


# ------------------------------------------------------------------------------------------ records


def read_records(name: str) -> list[dict[str, Any]]:
    """The records of a run folder, a .json or a .jsonl file. Raises BadInput."""
    path = Path(name).expanduser()
    if path.is_dir():
        folder = RunFolder(path)
        path = path / folder.BENCHMARK
        if not path.exists():
            return checked([record_of_run(folder)], name)
    try:
        if path.stat().st_size > 2**26:
            raise ValueError("over 64 MiB")
        text = path.read_text(encoding="utf-8")
        records = [json.loads(text)] if path.suffix == ".json" else None
        records = records or [json.loads(line) for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise BadInput(f"--compare {name}: {error.strerror}; give a run folder or file") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"--compare {name}: no JSON ({error}); give a run folder or file") from None
    return checked(records, name)


def checked(records: list[Any], name: str) -> list[dict[str, Any]]:
    """The records of a file, if that is what they are. Raises BadInput."""
    for number, record in enumerate(records, 1):
        problem = problem_of_record(record)
        if problem:
            raise BadInput(f"--compare {name}: record {number}: {problem}; mend or take it out")
    if not records:
        raise BadInput(f"--compare {name}: holds no record; give a run folder or file that does")
    return records


def problem_of_record(record: Any) -> str | None:
    """Why something is no record, or None if it is one."""
    if not isinstance(record, dict):
        return "not an object"
    texts = ["device_name", *(() if record.get("published") else ("work_fingerprint",))]
    for name in texts:
        if not isinstance(record.get(name), str):
            return f"{name} is no text"
    epoch = record.get("seconds_per_epoch")
    for name in ("median", "least", "greatest"):
        value = epoch.get(name) if isinstance(epoch, dict) else None
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            return f"seconds_per_epoch has no {name} above 0"
    return None


def record_of_run(folder: RunFolder) -> dict[str, Any]:
    """What a training run tells of an epoch's time. Raises BadInput."""
    config = folder.read_config()
    epochs = [m for m in folder.read_metrics() if m["event"] == "epoch"]
    seconds = [m["seconds"] for m in epochs if m["updates"] == m["updates_of_an_epoch"]]
    if not seconds:
        raise BadInput(
            f"--compare {folder.path}: no whole epoch and no benchmark.json; give another"
        )
    options = config["options"]
    facts = {k: v for k, v in config.items() if k not in ("options", "classes")}
    kept = ("precision", "attention", "compile", "pad_to", "workload", "tf32")
    return {
        **facts,
        **{name: options.get(name) for name in kept},
        "seconds_per_epoch": spread(seconds),
        "seconds_per_epoch_is": "measured",
    }


def labels_of(records: list[dict[str, Any]]) -> list[str]:
    """Names of records in tables and figures: the machine, and how the work was done.

    The form of attention and the padding are named where they are not the same in all records.
    """
    measured = [r for r in records if not r.get("published")]
    varying = {k for k in ("attention", "pad_to") if len({r.get(k) for r in measured}) > 1}
    labels = []
    for r in records:
        words = [short_device(r["device_name"])]
        processes, threads = r.get("processes", 1), r.get("threads")
        if r.get("device") == "cpu" and threads:
            n = f"{processes} processes of " if processes > 1 else ""
            words.append(f"{n}{threads} thread{'s' if threads != 1 else ''}")
        elif processes != 1:
            words.append(f"{processes} processes")
        words += [r["precision"]] if r.get("precision", "fp32") != "fp32" else []
        words += ["TF32"] if r.get("tf32") else []
        words += [f"{r['attention']} attention"] if "attention" in varying & r.keys() else []
        words += ["compiled"] if r.get("compile") else []
        if "pad_to" in varying & r.keys():
            words.append(f"padded to {r['pad_to']}" if r["pad_to"] else "padded to the longest")
        labels.append(", ".join(words))
    return labels


def is_reckoned(record: dict[str, Any]) -> bool:
    """Whether an epoch's seconds were reckoned from a part of it."""
    return str(record.get("seconds_per_epoch_is", "")).startswith("reckoned")


def short_device(name: str) -> str:
    """A processor's name without what every name has."""
    short = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*|\d+-Core", "", name)
    return " ".join(short.split())[:40] or name[:40]


def compare(names: tuple[str, ...], figure: str | None, allow_different_work: bool) -> str:
    """A table of records, and the figure if one is asked for. Raises BadInput."""
    if figure and Path(figure).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise BadInput(f"--figure {figure}: give a name that ends in .png, .svg or .pdf")
    records = [record for name in names for record in read_records(name)]
    works = sorted({r["work_fingerprint"] for r in records if not r.get("published")})
    workloads = {r.get("workload") for r in records}
    if (len(works) > 1 or len(workloads) > 1) and not allow_different_work:
        told = ", ".join(dict.fromkeys(map(work_of, records)))
        raise BadInput(
            f"--compare: not the same work ({told}); compare records of one workload and "
            "fingerprint, or say --allow-different-work"
        )
    if figure:
        draw_epoch_times(records, Path(figure).expanduser(), different=len(works) > 1)
    return table_of(records)


def work_of(record: dict[str, Any]) -> str:
    """Which work was done: the name of the workload, and what tells it from any other."""
    return (
        f"{record.get('workload') or 'own settings'} {record.get('work_fingerprint', '')}".strip()
    )


def seconds_text(seconds: float) -> str:
    """Three digits that count."""
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def table_of(records: list[dict[str, Any]]) -> str:
    """The records as text, the same numbers as in the figure."""
    rows = [("seconds an epoch", "least", "greatest", "work", "")]
    for r, label in zip(records, labels_of(records)):
        numbers = [seconds_text(r["seconds_per_epoch"][k]) for k in ("median", "least", "greatest")]
        reckoned = ", reckoned" if is_reckoned(r) else ""
        source = ", published by others" if r.get("published") else ""
        rows.append((*numbers, work_of(r), label + reckoned + source))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([*(text.rjust(n) for text, n in zip(row, widths)), row[4]]).rstrip()
        for row in rows
    )


def draw_epoch_times(records: list[dict[str, Any]], path: Path, different: bool) -> None:
    """Seconds of one training epoch, a bar for each record; what others published is hatched, and
    stands apart below."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    records = sorted(records, key=lambda r: bool(r.get("published")))
    places = [i + 0.6 * bool(r.get("published")) for i, r in enumerate(records)]
    labels = labels_of(records)
    usual = Counter(map(work_of, records)).most_common(1)[0][0]
    named = {usual, *(r.get("workload") for r in records if r.get("published"))}
    labels = [
        f"{label}\n{work_of(r)}" if different and work_of(r) not in named else label
        for label, r in zip(labels, records)
    ]
    medians = [r["seconds_per_epoch"]["median"] for r in records]
    below = [m - r["seconds_per_epoch"]["least"] for m, r in zip(medians, records)]
    above = [r["seconds_per_epoch"]["greatest"] - m for m, r in zip(medians, records)]
    logarithmic = max(medians) > 20 * min(medians)
    left = 0.0
    if logarithmic:
        left = 10 ** math.floor(math.log10(min(medians) / 1.5))
    figure = Figure(figsize=(9, 1.9 + 0.4 * len(records)), layout="constrained")
    axes = figure.subplots()
    for i, r in enumerate(records):
        published = bool(r.get("published"))
        style = {"color": "white", "hatch": "///"} if published else {"color": BLUE}
        edge = ORANGE if published else BLUE
        axes.barh(places[i], medians[i] - left, left=left, height=0.7, edgecolor=edge, **style)
        if above[i] or below[i]:
            axes.errorbar(
                medians[i], places[i], xerr=[[below[i]], [above[i]]], color="black", capsize=3, lw=1
            )
        axes.annotate(
            f"{seconds_text(medians[i])} s{' *' if is_reckoned(r) else ''}",
            (medians[i] + above[i], places[i]),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(left, max(m + a for m, a in zip(medians, above)) * 6)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.10g}")
    else:
        axes.set_xlim(0, max(m + a for m, a in zip(medians, above)) * 1.15)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("seconds of one training epoch" + (", logarithmic" if logarithmic else ""))
    works = sorted({r["work_fingerprint"] for r in records if "work_fingerprint" in r})
    workloads = "; ".join(dict.fromkeys(r.get("workload") or "own settings" for r in records))
    figure.suptitle(f"One training epoch, workload {workloads}")
    handles = [Patch(facecolor=BLUE, edgecolor=BLUE, label="measured with rhea")]
    if any(r.get("published") for r in records):
        handles.append(
            Patch(
                facecolor="white",
                edgecolor=ORANGE,
                hatch="///",
                label="published, another implementation's",
            )
        )
    title = f"work {works[0]}" if len(works) == 1 else None
    if different:
        title = f"NOT the same work: {usual}, where a name has no second line"
    if any(map(is_reckoned, records)):
        handles.append(Line2D([], [], ls="", label="* reckoned from a part of the epoch"))
    figure.legend(handles=handles, title=title, loc="outside lower center", ncols=3, fontsize=9)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise BadInput(f"--figure {path}: {error.strerror}; give a place to write to") from None


def as_record(
    figures: dict[str, Any], facts: dict[str, Any], options: Any, model_config: ModelConfig
) -> dict[str, Any]:
    """A record: the figures, what was timed, and on what. No path, no name of a person or host."""
    embedded = options.dataset if re.fullmatch(r"\w+", options.dataset) else "own data"
    sizes = {name: value for name, value in asdict(model_config).items()}
    kept = ("task", "batch_size", "batch_tokens", "pad_to", "max_length", "accumulate", "r_drop")
    return {
        "workload": options.workload,
        "dataset": embedded,
        **{name: getattr(options, name) for name in kept},
        **sizes,
        **{k: v for k, v in facts.items() if k not in ("classes", "data_fingerprint")},
        **{name: getattr(options, name) for name in ("precision", "compile", "tf32")},
        "deterministic": options.deterministic,
        "date": date.today().isoformat(),
        **figures,
    }
