"""All pictures: curves, confusion matrix, attention, epoch times."""

import math
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from errors import BadInput
from records import Record, best_of_each_machine, describe, seconds_text

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # colour-blind safe, and distinct in print
MOST_NAMED, MOST_CELLS = 50, 500  # classes of a confusion matrix with names; rows of its image

# ----------------------------------------------------------------------------------------- any text


@contextmanager
def picture(name: str) -> Iterator[None]:
    """Turns an exception into one warning: no picture costs a result. Stop signals pass."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        print(f"warning: {name}: cannot be drawn ({reason})", file=sys.stderr)


@contextmanager
def literal_text() -> Iterator[None]:
    """In this context $ is a dollar sign, and a missing glyph is no warning."""
    import matplotlib

    plain = {"text.parse_math": False, "text.usetex": False, "font.family": ["DejaVu Sans"]}
    with matplotlib.rc_context(plain), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        yield


def drawable(texts: Iterable[str], longest: int = 20) -> list[str]:
    """The texts with a code point for a character that no font has, cut to `longest` characters.

    Adds the fonts that other characters need to those in use, until `literal_text` ends.
    """
    from matplotlib import font_manager, rcParams
    from matplotlib.ft2font import FT2Font

    texts = list(texts)
    default = FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap()
    missing = {c for c in "".join(texts) if ord(c) not in default or not c.isprintable()}
    wanted = {ord(c) for c in missing if c.isprintable()}
    for entry in font_manager.fontManager.ttflist if wanted else ():
        usual = entry.style == "normal" and entry.weight in (400, "normal", "regular")
        if not usual or entry.name.startswith("Last Resort"):  # that one draws boxes
            continue
        font = None
        with suppress(OSError, RuntimeError):  # a font that was removed, or is broken
            font = FT2Font(entry.fname)
        if (
            font and font.scalable and (found := wanted & font.get_charmap().keys())
        ):  # not bitmap emoji
            rcParams["font.family"] = [*rcParams["font.family"], entry.name]
            wanted -= found
            missing -= set(map(chr, found))
    codes = {ord(c): f"U+{ord(c):04X}" for c in missing}
    texts = [text.translate(codes) for text in texts]
    return [text if len(text) <= longest else text[: longest - 1] + "…" for text in texts]


def fit(title: str, inches: float) -> str:
    """A title with as many lines as the width of its figure needs, three at most."""
    lines = textwrap.wrap(*drawable([title], 300), width=int(inches * 9), max_lines=3)
    return "\n".join(lines)


# -------------------------------------------------------------------------------- pictures of a run


@literal_text()
def draw_curves(
    metrics: list[dict[str, Any]],
    out: BinaryIO,
    title: str,
    *,
    kept: Sequence[int] = (),
    chance: float | None = None,
) -> None:
    """Loss, accuracy and BLEU of training and validation by epoch.

    kept: the epoch whose weights were kept, or those averaged. chance: accuracy of the most
    frequent class.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [m for m in metrics if m["event"] == "epoch"]
    if not epochs:
        return
    labels = {"loss": "loss (nats per target)", "accuracy": "accuracy (%)", "bleu": "BLEU"}
    names = [name for name in labels if any(f"validation_{name}" in m for m in epochs)]
    figure = Figure(figsize=(4.4 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for split, color, style in (("train", BLUE, "--"), ("validation", ORANGE, "-")):
            points = {m["epoch"]: m.get(f"{split}_{name}") for m in epochs}
            x = [epoch for epoch, value in points.items() if value is not None]
            y = [points[epoch] * (100 if name == "accuracy" else 1) for epoch in x]
            if x:
                legend = {"train": "training, with dropout", "validation": "validation"}[split]
                marker = "o" if len(x) <= 30 else ""
                axes.plot(x, y, style, color=color, marker=marker, label=legend)
        if chance is not None and name == "accuracy":
            axes.axhline(100 * chance, color=GREY, ls=":", label="most frequent class")
        if len(kept) > 1:
            label = f"averaged: epochs {min(kept)} to {max(kept)}"
            axes.axvspan(min(kept) - 0.3, max(kept) + 0.3, color=GREY, alpha=0.2, label=label)
        elif kept:
            axes.axvline(kept[0], color=GREY, lw=6, alpha=0.3, label=f"kept: epoch {kept[0]}")
        axes.set(xlabel="epoch", ylabel=labels[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    handles = {
        h.get_label(): h for axes in figure.axes for h in axes.get_legend_handles_labels()[0]
    }
    figure.legend(
        handles=handles.values(), loc="outside lower center", fontsize=9, ncols=2 * len(names)
    )
    figure.suptitle(fit(title, 4.4 * len(names)))
    figure.savefig(out, dpi=150)


@literal_text()
def draw_confusion(counts: np.ndarray, names: list[str], out: BinaryIO, title: str) -> None:
    """counts[true, predicted] as a picture, coloured by the share of the true class.

    Above MOST_NAMED classes without names and numbers, so that time and memory are bounded.
    """
    from matplotlib.figure import Figure

    n, few = len(names), len(names) <= 8
    blocks = np.arange(0, n, math.ceil(n / MOST_CELLS))  # of classes, one in most cases
    cells = np.add.reduceat(np.add.reduceat(counts, blocks, axis=0), blocks, axis=1)
    totals = cells.sum(axis=1)
    shares = cells / np.maximum(totals, 1)[:, None]
    short = drawable(names) if n <= MOST_NAMED else []
    room = 0.09 * max(map(len, short), default=7)  # inches for names
    size = max(2.5, n * (0.8 if few else 0.32)) if short else 6.0  # inches of the matrix
    figure = Figure(figsize=(size + room + 2.3, size + room + 1), layout="compressed")
    axes = figure.subplots()
    frame = (-0.5, n - 0.5, n - 0.5, -0.5)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1 if short else None, extent=frame)
    number = "" if short else " (class number)"
    axes.set(xlabel="predicted" + number, ylabel="true" + number)
    if short:
        axes.set_xticks(range(n), short, rotation=90 if n > 2 else 0)
        axes.set_yticks(range(n), short)
    for i, j in np.ndindex(counts.shape) if short else ():
        if few or counts[i, j]:
            text = f"{counts[i, j]:,}" + (f"/{totals[i]:,}" if few else "")
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=10 if few else 7)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    figure.suptitle(fit(title, size + room + 2.3))
    figure.savefig(out, dpi=150)


@literal_text()
def draw_attention(
    sentences: list[tuple[list[str], list[str], np.ndarray]],
    out: BinaryIO,
    title: str,
    *,
    heads: Sequence[int] | None = None,
) -> None:
    """Attention to the source, a panel for each (source, target, weights).

    weights: (target, source), or (heads, target, source). heads: a panel for each of these heads,
    counted from 0; None: one for their mean.
    """
    from matplotlib.figure import Figure

    panels = []
    for source, target, weights in sentences:
        source, target = drawable(source, 12), drawable(target, 12)
        weights = weights if weights.ndim == 3 else weights[None]
        if heads is None:
            panels.append((source, target, weights.mean(axis=0), ""))
        else:
            panels += [(source, target, weights[i], f"head {i + 1}") for i in heads]
    longest = max(max(weights.shape) for _, _, weights, _ in panels)
    highest = max(weights.max() for _, _, weights, _ in panels)
    n_columns = min(2, len(panels)) if heads is None else min(4, len(heads))
    n_rows = math.ceil(len(panels) / n_columns)
    size = max(4.0, 0.22 * longest + 1.5)  # inches
    figure = Figure(figsize=(n_columns * size, n_rows * size), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axes, (source, target, weights, label) in zip(grid, panels):
        image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
        axes.set_xticks(range(len(source)), source, rotation=90, fontsize=9)
        axes.set_yticks(range(len(target)), target, fontsize=9)
        axes.set(xlabel="column: source token", ylabel="row: token being produced", title=label)
    for axes in grid[len(panels) :]:
        axes.remove()
    legend = "attention" + (", mean of the heads" if heads is None else "")
    figure.colorbar(image, ax=figure.axes, label=legend, shrink=0.6)
    figure.suptitle(fit(title, n_columns * size))
    figure.savefig(out, dpi=150)


# -------------------------------------------------------------------------------------- epoch times


@literal_text()
def draw_epoch_times(records: list[Record], work: str, path: Path) -> None:
    """The fastest record of each machine, and below it what others published: bars, or dots if the
    times differ so much that the axis is logarithmic. Raises BadInput.

    work: the work in words.
    """
    from matplotlib.figure import Figure

    rows = best_of_each_machine(records)
    shared, names = describe(rows)
    medians = [r["seconds_per_epoch"]["median"] for r in rows]
    n_measured = sum(not r.get("published") for r in rows)
    headings = {0: "measured with rhea", n_measured: "published by others"}
    headings = headings if 0 < n_measured < len(rows) else {}
    others = [i for i, r in enumerate(rows) if "other_work" in r and not r.get("published")]
    if len({rows[i]["other_work"] for i in others}) == 1:  # then they have a heading in common
        headings[others[0]] = f"other work: {rows[others[0]]['other_work']}"
        prefix = headings[others[0]]
        names = [(name, way.removeprefix(prefix).removeprefix(", ")) for name, way in names]
    logarithmic = max(medians) > 20 * min(medians)
    lines = [work, f"all measured: {', '.join(shared)}"] if shared else [work]
    lines = [part for line in lines for part in textwrap.wrap(line, 64)]
    top = 0.6 + 0.2 * len(lines)  # inches, for the title
    height = 0.7 + top + 0.42 * (len(rows) + len(headings))
    figure = Figure(figsize=(7.2, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0.01, 0, 0.97, 1 - top / height))
    axes, labels = figure.subplots(), []
    for i, (r, (machine, way)) in enumerate(zip(rows, names)):
        labels += [headings[i]] if i in headings else []
        draw_epoch_time(axes, len(labels), r, logarithmic)
        labels.append("\n".join(drawable(filter(None, (machine, way)), 48)))
    set_seconds(axes, rows, logarithmic)
    axes.set_yticks(range(len(labels)), labels, fontsize=11.5)
    for label in axes.get_yticklabels():
        label.set_color(GREY if label.get_text() in headings.values() else "black")
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.text(0.02, 1 - 0.1 / height, "One training epoch", fontsize=17, weight="bold", va="top")
    subtitle = "\n".join(drawable(lines, 100))
    figure.text(0.02, 1 - 0.45 / height, subtitle, color=GREY, va="top", fontsize=12)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise BadInput(f"--figure {path}: {error.strerror}; give a writable folder") from None


def set_seconds(axes: Any, records: list[Record], logarithmic: bool) -> None:
    """The axis of seconds."""
    seconds = [r["seconds_per_epoch"] for r in records]
    medians = [s["median"] for s in seconds]
    axes.set_xlim(0, max(s["greatest"] for s in seconds) * 1.2)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(min(medians) / 2, max(medians) * 3.5)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.10g}")
    axes.set_xlabel("seconds per epoch" + (", log scale" if logarithmic else ""), fontsize=12)


def draw_epoch_time(axes: Any, y: int, record: Record, logarithmic: bool) -> None:
    """One record: its median as a dot or bar and in words, least and greatest as a line."""
    seconds, published = record["seconds_per_epoch"], bool(record.get("published"))
    edge = ORANGE if published else GREY if "other_work" in record else BLUE
    fill = "white" if published else edge
    if logarithmic:
        marker = "D" if published else "o"
        axes.plot(seconds["median"], y, marker, ms=10, mew=2, mfc=fill, mec=edge, zorder=3)
    else:
        axes.barh(y, seconds["median"], height=0.6, facecolor=fill, edgecolor=edge)
    axes.plot([seconds["least"], seconds["greatest"]], [y, y], color="black", lw=1.5)
    text, place = f"{seconds_text(seconds['median'])} s", (seconds["greatest"], y)
    style = {"va": "center_baseline", "fontsize": 13}
    axes.annotate(text, place, xytext=(10, 0), textcoords="offset points", **style)
