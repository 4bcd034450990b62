"""The paper's Table 3 at a small scale: python assets/table3.py FOLDER [FIGURE]

Trains each row of *Attention Is All You Need*, Table 3, with an eighth of its width, half of its
layers and three seeds on libreoffice_help, as many runs at once as there are cores, and prints
perplexity and BLEU of the test split beside the paper's. Runs that are there are not repeated; one
that was stopped is resumed. Further options of main.py may follow FIGURE.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from ddp_utils import usable_cores

PROJECT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)
BASE = (
    "--n-layers 3 --d-model 64 --d-ff 256 --n-heads 8 --dropout 0.1 --label-smoothing 0.1 "
    "--batch-tokens 512 --epochs 2 --warmup-steps 500 --average-checkpoints 1"
)


class Row(NamedTuple):
    """A row of Table 3: the paper's setting, ours, the paper's perplexity and BLEU."""

    name: str
    paper: str
    options: str  # that differ from BASE
    perplexity: float
    bleu: float


ROWS = (
    Row("base", "", "", 4.92, 25.8),
    Row("A1", "h 1, d_k 512", "--n-heads 1", 5.29, 24.9),
    Row("A2", "h 4, d_k 128", "--n-heads 4", 5.00, 25.5),
    Row("A3", "h 16, d_k 32", "--n-heads 16", 4.91, 25.8),
    Row("A4", "h 32, d_k 16", "--n-heads 32", 5.01, 25.4),
    Row("B1", "d_k 16", "--d-attn 2", 5.16, 25.1),
    Row("B2", "d_k 32", "--d-attn 4", 5.01, 25.4),
    Row("C1", "N 2", "--n-layers 1", 6.11, 23.7),
    Row("C2", "N 4", "--n-layers 2", 5.19, 25.3),
    Row("C3", "N 8", "--n-layers 4", 4.88, 25.5),
    Row("C4", "d_model 256, d_k 32", "--d-model 32", 5.75, 24.5),
    Row("C5", "d_model 1024, d_k 128", "--d-model 128", 4.66, 26.0),
    Row("C6", "d_ff 1024", "--d-ff 128", 5.12, 25.4),
    Row("C7", "d_ff 4096", "--d-ff 512", 4.75, 26.2),
    Row("D1", "P_drop 0.0", "--dropout 0.0", 5.77, 24.6),
    Row("D2", "P_drop 0.2", "--dropout 0.2", 4.95, 25.5),
    Row("D3", "eps_ls 0.0", "--label-smoothing 0.0", 4.67, 25.3),
    Row("D4", "eps_ls 0.2", "--label-smoothing 0.2", 5.47, 25.7),
    Row("E", "learned positions", "--positions learned", 4.92, 25.7),
)


class Scores(NamedTuple):
    """Of a row's runs: parameters, and perplexity and BLEU of each."""

    parameters: int
    perplexity: list[float]
    bleu: list[float]


def train(row: Row, seed: int, folder: Path, more: list[str]) -> None:
    """A run, on one thread, unless it is finished."""
    run = folder / row.name / f"seed-{seed}"
    if test_of(run):
        return
    argv = ["--run-dir", str(run), "--resume"]
    if not (run / "last.pt").exists():
        argv = ["--dataset", "libreoffice_help", *BASE.split(), *row.options.split(), *more]
        argv += ["--seed", str(seed), "--run-dir", str(run)]
    command = [sys.executable, str(PROJECT / "main.py"), *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{run}: {done.stderr.strip()}")
    bleu = test_of(run)["bleu"]
    print(f"{row.name} seed {seed}: BLEU {bleu:.1f}", file=sys.stderr, flush=True)


def test_of(run: Path) -> dict | None:
    """The test event of a finished run."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return next((event for event in events if event["event"] == "test"), None)


def scores_of(row: Row, folder: Path) -> Scores:
    """What the runs of a row reached."""
    runs = [folder / row.name / f"seed-{seed}" for seed in SEEDS]
    tests = [test_of(run) for run in runs]
    config = json.loads((runs[0] / "config.json").read_text(encoding="utf-8"))
    perplexity = [math.exp(test["loss"]) for test in tests]
    return Scores(config["parameters"], perplexity, [test["bleu"] for test in tests])


def difference(values: list[float], base: list[float]) -> tuple[float, float]:
    """Difference of two means, and its standard error."""
    errors = [statistics.variance(x) / len(x) for x in (values, base)]
    return statistics.mean(values) - statistics.mean(base), math.sqrt(sum(errors))


def verdict(ours: float, error: float, paper: float) -> str:
    """Whether two differences have the same sign. One within two standard errors has none."""
    if abs(ours) <= 2 * error or abs(paper) < 0.05:
        return "too small to tell"
    return "yes" if ours * paper > 0 else "no"


def table(found: dict[str, Scores]) -> list[str]:
    """A Markdown table: means, standard deviations, differences from base."""
    lines = [
        "| row | of the paper | here | parameters | perplexity | BLEU | difference, here | its "
        "standard error | the paper's | same sign |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        n, *scores = found[row.name]
        both = [f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}" for x in scores]
        cells = [row.name, row.paper, f"`{row.options}`" * bool(row.options), f"{n / 1e6:.2f} M"]
        cells += both
        if row is not ROWS[0]:
            ours, error = difference(scores[1], found["base"].bleu)
            paper = row.bleu - ROWS[0].bleu
            sign = verdict(ours, error, paper)
            cells += [f"{ours:+.2f}", f"{error:.2f}", f"{paper:+.1f}", sign]
        lines.append(f"| {' | '.join(cells + [''] * (10 - len(cells)))} |")
    return lines


def draw(found: dict[str, Scores], path: str) -> None:
    """BLEU differences from base, ours with two standard errors, beside the paper's."""
    from matplotlib.figure import Figure

    rows = ROWS[1:]
    ours = [difference(found[row.name].bleu, found["base"].bleu) for row in rows]
    figure = Figure(figsize=(7.2, 6.5), layout="constrained")
    axes, y = figure.subplots(), range(len(rows))
    bars = {"xerr": [2 * error for _, error in ours], "fmt": "o", "color": "#0072B2", "capsize": 2}
    axes.errorbar([x for x, _ in ours], y, **bars, label="rhea, small, 2 standard errors")
    paper = [row.bleu - ROWS[0].bleu for row in rows]
    axes.plot(paper, y, "D", color="#D55E00", label="the paper, newstest2013")
    axes.axvline(0, color="#666666", linewidth=1)
    axes.set_yticks(y, [f"{row.name}  {row.paper}" for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="BLEU, difference from base", title="Table 3 of Attention Is All You Need")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    """Trains what is missing, and prints the table."""
    if not argv:
        sys.exit(__doc__)
    folder, more = Path(argv[0]), argv[1:]
    figure = more.pop(0) if more and not more[0].startswith("-") else None
    tasks = [(row, seed, folder, more) for seed in SEEDS for row in ROWS]
    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in pool.map(lambda task: train(*task), tasks):
            pass
    found = {row.name: scores_of(row, folder) for row in ROWS}
    print(*table(found), sep="\n")
    if figure:
        draw(found, figure)


if __name__ == "__main__":
    main(sys.argv[1:])
