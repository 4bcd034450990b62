"""The paper's Table 3 at a small scale: python assets/table3.py FOLDER [FIGURE]

Trains each row of *Attention Is All You Need*, Table 3, with an eighth of its width, half of its
layers and three seeds on libreoffice_help, as many runs at once as there are cores, and prints
perplexity and BLEU of the test split beside the paper's. FOLDER/scores.jsonl has a line for each
finished run; these are not repeated, and one that was stopped is resumed. assets/table3.jsonl has
the lines of the table in docs/results.md. Further options of main.py may follow FIGURE.
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
SCORES = "scores.jsonl"
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
    run, options = folder / row.name / f"seed-{seed}", options_of(row, more)
    if any(line["seed"] == seed for line in lines_of(row, folder, more)):
        return
    if not test_of(run):
        argv = ["--run-dir", str(run), "--resume"]
        if not (run / "config.json").exists():
            argv = ["--dataset", "libreoffice_help", *options]
            argv += ["--seed", str(seed), "--run-dir", str(run)]
        command = [sys.executable, str(PROJECT / "main.py"), *argv]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{run}: {done.stderr.strip()}")
    test = test_of(run)
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    scores = {"parameters": config["parameters"], "loss": test["loss"], "bleu": test["bleu"]}
    with open(folder / SCORES, "a", encoding="utf-8") as out:
        name = {"row": row.name, "seed": seed, "options": " ".join(options)}
        out.write(json.dumps(name | scores) + "\n")
    print(f"{row.name} seed {seed}: BLEU {test['bleu']:.1f}", file=sys.stderr, flush=True)


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines, but for one whose writing was cut."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def test_of(run: Path) -> dict | None:
    """The test event of a finished run."""
    events = read_lines(run / "metrics.jsonl")
    return next((event for event in events if event["event"] == "test"), None)


def options_of(row: Row, more: list[str]) -> list[str]:
    """The options of a row's runs, but for data set, seed and folder."""
    return [*BASE.split(), *row.options.split(), *more]


def lines_of(row: Row, folder: Path, more: list[str]) -> list[dict]:
    """The lines of a row's finished runs, if they have the same options."""
    name = {"row": row.name, "options": " ".join(options_of(row, more))}
    return [line for line in read_lines(folder / SCORES) if name.items() <= line.items()]


def scores_of(runs: list[dict]) -> Scores:
    """What the runs of a row reached."""
    perplexity = [math.exp(run["loss"]) for run in runs]
    return Scores(runs[0]["parameters"], perplexity, [run["bleu"] for run in runs])


def difference(values: list[float], base: list[float]) -> tuple[float, float]:
    """Difference of two means, and its standard error."""
    errors = [statistics.variance(x) / len(x) for x in (values, base)]
    return statistics.mean(values) - statistics.mean(base), math.sqrt(sum(errors))


def verdict(ours: float, error: float, paper: float) -> str:
    """Whether two differences have the same sign. One within two standard errors has none."""
    if abs(ours) <= 2 * error or abs(paper) < 0.05:
        return "too small to tell"
    return "yes" if ours * paper > 0 else "no"


def compared(ours: list[float], base: list[float], paper: float, digits: int) -> list[str]:
    """Cells of a row: mean, differences from base with standard error, whether signs agree."""
    mean, (here, error) = f"{statistics.mean(ours):.{digits}f}", difference(ours, base)
    cells = (f"{here:+.{digits}f} ± {error:.{digits}f}", f"{paper:+.{digits}f}")
    return [mean, *cells, verdict(here, error, paper)]


def table(found: dict[str, Scores]) -> list[str]:
    """A Markdown table: the means of each row, its differences from base, and the paper's."""
    names = ("perplexity", "BLEU")
    heads = [f"{name} | from base | the paper's | same sign" for name in names]
    lines = [f"| row | of the paper | here | parameters | {' | '.join(heads)} |", "|---" * 12 + "|"]
    base, paper = found["base"], ROWS[0]
    for row in ROWS:
        n, perplexity, bleu = found[row.name]
        options = f"`{row.options}`" * bool(row.options)
        cells = [row.name, row.paper, options, f"{n / 1e6:.2f} M"]
        if row is paper:
            cells += [f"{statistics.mean(perplexity):.1f} ± {statistics.stdev(perplexity):.1f}"]
            cells += ["", "", "", f"{statistics.mean(bleu):.1f} ± {statistics.stdev(bleu):.1f}"]
            cells += ["", "", ""]
        else:
            change = row.perplexity - paper.perplexity
            cells += compared(perplexity, base.perplexity, change, 2)
            cells += compared(bleu, base.bleu, row.bleu - paper.bleu, 1)
        lines.append(f"| {' | '.join(cells)} |")
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
    found = {row.name: scores_of(lines_of(row, folder, more)) for row in ROWS}
    print(*table(found), sep="\n")
    if figure:
        draw(found, figure)


if __name__ == "__main__":
    main(sys.argv[1:])
