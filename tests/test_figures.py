"""Pictures: what is on them, any text, bounded size, and that none costs a result."""

import io
import warnings
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from helpers import TINY, csv_bytes, events, record, run_quietly, write_files, write_records
from matplotlib import font_manager

import figures
import main
import reports
from config import ASSETS
from errors import Stopped
from records import seconds_text

pytestmark = pytest.mark.pictures
EPOCH_TIMES = ASSETS / "epoch_times.jsonl"


@pytest.fixture
def drawn(monkeypatch) -> list[matplotlib.figure.Figure]:
    """The figures that are saved."""
    saved, savefig = [], matplotlib.figure.Figure.savefig

    def save(self, *args, **options):
        saved.append(self)
        return savefig(self, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)
    return saved


def texts_of(figure) -> list[str]:
    return [x.get_text() for x in figure.findobj(matplotlib.text.Text) if x.get_text()]


def draw(function, *args, **options) -> bytes:
    """What is drawn, without a warning."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(*args[:-1], out, args[-1], **options)
    return out.getvalue()


# -------------------------------------------------------------------------------------- epoch times


@pytest.mark.parametrize("greatest", [30.0, 4000.0])  # a linear axis, and a logarithmic one
def test_table_and_figure_show_the_same_numbers(greatest, drawn):
    seconds = [2.0, 25.0, greatest]
    records = [record(s, label=f"machine {i}") for i, s in enumerate(seconds, 1)]
    out = run_quietly("--compare", write_records("r.jsonl", *records), "--figure", "f.png")
    (axes,) = drawn[0].axes
    logarithmic = axes.get_xscale() == "log"
    assert logarithmic == (greatest > 100)
    dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    bars = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert (dots, bars) == ((seconds, []) if logarithmic else ([], seconds))
    rows = [line.split() for line in out.splitlines()[3:]]
    assert [f"{row[0]} s" for row in rows] == [text.get_text() for text in axes.texts]
    assert [row[1] for row in rows] == [seconds_text(s / 2) for s in seconds]
    assert [row[2] for row in rows] == [seconds_text(s * 2) for s in seconds]
    ranges = [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert ranges == [[s / 2, s * 2] for s in seconds]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["machine 1", "machine 2", "machine 3"]
    assert "seconds" in axes.get_xlabel()


def test_the_figure_has_the_best_row_of_each_machine_and_no_clutter(drawn):
    run_quietly("--compare", EPOCH_TIMES, "--figure", "f.png")
    (axes,) = drawn[0].axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    amd = [f"AMD EPYC, {i}th generation" for i in (5, 4)]
    machines = ["measured with rhea", "NVIDIA H200", "Intel Xeon with AMX", *amd]
    assert [label.partition("\n")[0] for label in labels[:5]] == machines
    assert [text.get_text() for text in axes.texts][:4] == ["14 s", "152 s", "318 s", "451 s"]
    text = "\n".join(texts_of(drawn[0]))
    assert text.count("extrapolated") == text.count("512") == text.count("fp32") == 1
    assert "workload original" in text and "2 processes of 1 thread" in text
    assert "*" not in text and "93f265c8c9675edf" not in text


def test_published_values_are_apart_and_look_different(drawn):
    out = run_quietly("--compare", EPOCH_TIMES, "--figure", "f.png")
    (axes,) = drawn[0].axes
    markers = [line.get_marker() for line in axes.lines if line.get_marker() in "oD"]
    assert markers == ["o"] * 4 + ["D"] * 6
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels.index("published by others") == 5 and labels[6] == "8 x NVIDIA A100"
    assert out.count("published (README of the original implementation, 2022)") == 6


def test_other_work_is_on_the_figure_only_if_asked_for_and_then_marked(drawn):
    name = write_records("r.jsonl", record(2), record(3, work_fingerprint="b" * 16))
    for flags in ([], ["--allow-different-work"]):
        run_quietly("--compare", name, "--figure", "f.png", *flags)
    without, marked = ([x.get_text() for x in f.axes[0].get_yticklabels()] for f in drawn)
    assert without == ["Some"] and marked == ["Some", "other work: reviews", "Some"]
    colors = [bar.get_facecolor() for bar in drawn[1].axes[0].patches]
    assert colors[0] != colors[1]


@pytest.mark.parametrize(
    "ending, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_a_figure_is_what_its_name_says(ending, start, tmp_path):
    run_quietly("--compare", write_records("r.jsonl", record()), "--figure", f"f.{ending}")
    assert (tmp_path / f"f.{ending}").read_bytes().startswith(start)


# -------------------------------------------------------------------------------- pictures of a run


def epochs(n: int) -> list[dict]:
    numbers = {"train_loss": 0.6, "validation_loss": 0.5, "validation_accuracy": 0.75}
    return [{"event": "epoch", "epoch": i} | numbers for i in range(1, n + 1)]


def test_curves_mark_the_weights_that_were_kept_and_the_most_frequent_class(drawn):
    draw(figures.draw_curves, epochs(5), "title", kept=[3], chance=0.625)
    draw(figures.draw_curves, epochs(5), "title", kept=range(3, 6))
    assert {"kept: epoch 3", "most frequent class"} <= set(texts_of(drawn[0]))
    levels = [list(line.get_ydata()) for line in drawn[0].axes[1].lines]
    assert [62.5, 62.5] in levels
    assert [3, 3] in [list(line.get_xdata()) for line in drawn[0].axes[0].lines]
    assert "averaged: epochs 3 to 5" in texts_of(drawn[1])


@pytest.mark.slow
def test_a_run_draws_the_epoch_that_was_kept(train, monkeypatch):
    seen = []
    monkeypatch.setattr(main, "draw_curves", lambda *args, **options: seen.append(options))
    train("one")
    score = {
        e["epoch"]: (e["validation_accuracy"], -e["validation_loss"])
        for e in events("one", "epoch")
    }
    assert list(seen[0]["kept"]) == [max(score, key=score.get)]
    assert 0.5 <= seen[0]["chance"] < 1
    train("mean", "--average-checkpoints", 2)
    assert list(seen[1]["kept"]) == [1, 2]


def test_cells_of_few_classes_show_counts_of_the_class(drawn):
    draw(figures.draw_confusion, np.array([[17, 16], [0, 9]]), ["no", "yes"], "title")
    texts = texts_of(drawn[0])
    assert {"17/33", "16/33", "0/9", "9/9", "no", "yes"} <= set(texts)
    assert not any("%" in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 6, 40])
def test_names_and_title_fit_on_the_picture(n, drawn):
    names = [f"a class with a long name {i}" for i in range(n)]
    draw(figures.draw_confusion, np.eye(n, dtype=int) * 100, names, "some data set, " * 9)
    figure = drawn[0]
    figure.draw_without_rendering()  # it was saved at another resolution
    width, height = figure.canvas.get_width_height()
    for text in figure.findobj(matplotlib.text.Text):
        box = text.get_window_extent()
        if text.get_text() and text.get_visible() and box.width:
            assert min(box.x0, box.y0) > -2
            assert box.x1 < width + 2 and box.y1 < height + 2
    assert figure.axes[0].get_window_extent().width > 0.35 * width


@pytest.mark.parametrize("n", [300, 1500])
def test_many_classes_are_a_plain_image_of_bounded_size(n, drawn):
    counts = np.zeros((n, n), int)
    counts[:, 0] = 3  # everything is taken for the first class
    png = draw(figures.draw_confusion, counts, [f"$class {i}" for i in range(n)], "title")
    pixels = matplotlib.image.imread(io.BytesIO(png))
    assert pixels.shape[0] < 1500 and pixels.shape[1] < 1500
    assert len(drawn[0].axes[0].texts) == 0 and len(texts_of(drawn[0])) < 60
    image = drawn[0].axes[0].images[0]
    assert max(image.get_array().shape) <= 500 and image.get_array().sum(axis=1).max() == 1
    assert image.get_extent()[1] == n - 0.5


def attention(n_heads: int | None, *sizes: tuple[int, int]) -> list[tuple]:
    heads = () if n_heads is None else (n_heads,)
    shapes = [(*heads, n_target, n_source) for n_target, n_source in sizes]
    return [
        ([f"s{i}" for i in range(x[-1])], [f"t{i}" for i in range(x[-2])], np.random.rand(*x))
        for x in shapes
    ]


def test_attention_panels_are_equal_and_say_what_a_row_is(drawn):
    draw(figures.draw_attention, attention(None, (3, 9), (8, 4), (5, 5)), "title")
    panels = drawn[0].axes[:3]
    boxes = np.array([axes.get_window_extent().size for axes in panels])
    assert np.ptp(boxes, axis=0).max() < 0.05 * boxes.max()
    assert all("token being produced" in axes.get_ylabel() for axes in panels)
    assert [len(axes.get_yticklabels()) for axes in panels] == [3, 8, 5]


def test_attention_shows_the_mean_or_single_heads(drawn):
    sentences = attention(4, (3, 5))
    for heads in (None, [0, 2]):
        draw(figures.draw_attention, sentences, "title", heads=heads)
    mean, single = ([axes for axes in figure.axes if axes.images] for figure in drawn)
    weights = sentences[0][2]
    assert np.allclose(mean[0].images[0].get_array(), weights.mean(axis=0))
    assert [axes.get_title() for axes in single] == ["head 1", "head 3"]
    assert np.allclose(single[1].images[0].get_array(), weights[2])


# ----------------------------------------------------------------------------------------- any text

TEXTS = [
    "US$$",
    "$0_$50",
    "$$ a + b $$",
    "\\frac{",
    "$\\alpha",
    "50 %_^{",
    "a\nb\t\x00",
    "🤖中文",
    "",
]


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_text_is_drawn_literally_and_without_warnings(text, drawn, capfd):
    draw(figures.draw_curves, epochs(2), text, kept=[1])
    draw(figures.draw_confusion, np.eye(2, dtype=int), [text, "other"], text)
    weights = np.ones((1, 2)) / 2
    draw(figures.draw_attention, [([text, text], [text], weights)], text)
    name = write_records("r.jsonl", record(label=text or None), record(3, workload=text or None))
    run_quietly("--compare", name, "--figure", "f.svg")
    if text.isprintable() and text.isascii() and text:
        assert all(any(text in x for x in texts_of(figure)) for figure in drawn)
    assert capfd.readouterr().err == ""


def test_a_character_without_a_font_is_its_code_point(drawn, monkeypatch):
    fonts = font_manager.fontManager.ttflist
    only = [f for f in fonts if f.name in ("DejaVu Sans", "Last Resort High-Efficiency")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", only)
    with figures.literal_text():
        assert figures.drawable(["a中\n", "b" * 30]) == ["aU+4E2DU+000A", "b" * 19 + "…"]
    draw(figures.draw_confusion, np.eye(2, dtype=int), ["中", "b"], "中")
    draw(figures.draw_attention, [(["中"], ["中"], np.ones((1, 1)))], "中")
    run_quietly("--compare", write_records("r.jsonl", record(label="中")), "--figure", "f.svg")
    texts = [texts_of(figure) for figure in drawn]
    assert all("U+4E2D" in x for x in texts) and "中" not in "".join(map("".join, texts))


def test_a_font_that_has_the_character_is_used(monkeypatch):
    fonts = font_manager.fontManager.ttflist
    only = [f for f in fonts if f.name == "DejaVu Sans"]
    stix = [f for f in fonts if f.name == "STIXGeneral"]  # matplotlib brings it along
    gone = font_manager.FontEntry(fname="gone.ttf", name="Gone", weight=400)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*only, gone, *stix])
    before = list(matplotlib.rcParams["font.family"])
    with figures.literal_text():
        assert figures.drawable(["\u1d81中"]) == ["\u1d81U+4E2D"]
        assert "STIXGeneral" in matplotlib.rcParams["font.family"]
    assert matplotlib.rcParams["font.family"] == before


# --------------------------------------------------------------------------------- a picture fails


def test_a_picture_that_fails_is_one_warning_and_stop_signals_pass(capsys):
    with figures.picture("curves.png"):
        raise ValueError("two\nlines")
    assert capsys.readouterr().err == "warning: curves.png: cannot be drawn (two)\n"
    with figures.picture("curves.png"):
        raise MemoryError
    assert capsys.readouterr().err == "warning: curves.png: cannot be drawn (MemoryError)\n"
    for error in (KeyboardInterrupt(), Stopped(15)):
        with pytest.raises(KeyboardInterrupt), figures.picture("curves.png"):
            raise error


def test_a_run_whose_pictures_fail_ends_with_its_result(slice_of_reviews, monkeypatch, capsys):
    logged = []

    def fail(*args, **options):
        logged.append(len(events("r", "test")))
        raise OverflowError("too large")

    monkeypatch.setattr(main, "draw_curves", fail)
    monkeypatch.setattr(reports, "draw_confusion", fail)
    out = run_quietly(*TINY, "--dataset", slice_of_reviews, "--run-dir", "r")
    assert "test of 40 sentences" in out and logged == [1, 1]  # scores come first
    err = [line for line in capsys.readouterr().err.splitlines() if "cannot be drawn" in line]
    assert [line.split()[1] for line in err] == ["confusion.png:", "curves.png:"]
    assert not Path("r/confusion.png").exists()


def test_labels_with_dollar_signs_are_trained_on_and_drawn(capsys):
    rows = [(f"good film {i}", ["US$$", "$0_$50"][i % 2]) for i in range(60)]
    write_files({"d.csv": csv_bytes(rows)})
    run_quietly(*TINY, "--dataset", "d.csv", "--run-dir", "r", "--epochs", 1)
    assert "cannot be drawn" not in capsys.readouterr().err
    assert Path("r/confusion.png").stat().st_size > 5000 and len(events("r", "test")) == 1
