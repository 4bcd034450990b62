"""How the time of a training step grows: python assets/growth.py FIGURE

Times steps of the model `small` on random sentences on this CPU, with one size changed at a time,
and draws seconds against the floating-point operations of their matrix products.
"""

import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from comp_utils import autocast, grad_scaler
from config import SIZES
from data import Batch
from measure import forward_flops, matmul_flops_per_second
from models import Transformer
from optimization import build_optimizer, train_step

CPU, REPETITIONS = torch.device("cpu"), 3
START = {"sentences": 64, "length": 32, "d_model": 256, "layers": 3, "vocabulary": 8000}
CHANGES = {
    "sentences": (4, 16, 256),
    "length": (8, 128, 512),
    "d_model": (64, 128, 512, 1024),
    "layers": (1, 6, 12),
    "vocabulary": (1000, 4000, 32_000),
}


def step_of(sentences: int, length: int, d_model: int, layers: int, vocabulary: int) -> tuple:
    """(FLOPs, seconds) of a training step, forward and backward; the median of some."""
    torch.manual_seed(0)
    config = replace(SIZES["small"], n_layers=layers, d_model=d_model, d_ff=4 * d_model)
    model = Transformer(config, n_vocab=vocabulary, max_len=length, pad_id=0)
    src, tgt = torch.randint(1, vocabulary, (2, sentences, length))
    batch = Batch(src, tgt, tgt, tgt.numel(), 2 * tgt.numel())
    optimizer, scaler = build_optimizer(model, weight_decay=0.0), grad_scaler("fp32", CPU)
    how = {"lr": 1e-4, "max_norm": 1.0, "label_smoothing": 0.1}
    seconds = []
    model.train()
    for _ in range(1 + REPETITIONS):
        began = time.perf_counter()
        train_step(model, [batch], optimizer, scaler, autocast("fp32", CPU), **how)
        seconds.append(time.perf_counter() - began)
    flops = 3 * forward_flops(model, Counter({(length, length): sentences}))
    return flops, statistics.median(seconds[1:])


def main() -> None:
    """Prints a table and draws it."""
    from matplotlib.figure import Figure

    limit = matmul_flops_per_second(CPU, "fp32")
    print(f"matrix products: {limit / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads")
    figure = Figure(figsize=(7.2, 4.5), layout="constrained")
    axes, found = figure.subplots(), [step_of(**START)]
    for name, values in CHANGES.items():
        points = [(START[name], *found[0])]
        points += [(value, *step_of(**START | {name: value})) for value in values]
        for value, flops, seconds in sorted(points):
            share = flops / seconds / limit
            print(f"{name} {value}: {flops / 1e9:.1f} GFLOP, {seconds:.3f} s, {share:.0%}")
        _, x, y = zip(*sorted(points))
        axes.plot([flops / 1e9 for flops in x], y, marker="o", label=name.replace("_", "-"))
        found += [point[1:] for point in points]
    ends = [min(flops for flops, _ in found), max(flops for flops, _ in found)]
    speed = "matrix products alone"
    axes.plot([f / 1e9 for f in ends], [f / limit for f in ends], "--", color="black", label=speed)
    axes.set(xscale="log", yscale="log", xlabel="GFLOP a step", ylabel="seconds a step")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(sys.argv[1], dpi=120)


if __name__ == "__main__":
    main()
