"""What a run shows of itself: sample translations, test scores, pictures, seconds of an epoch."""

import io
import math
import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from comp_utils import say
from data import TextData
from ddp_utils import rank
from evaluation import evaluate_split
from figures import draw_attention, draw_confusion, picture
from jobs import Job
from procedures import Trainer
from run_folder import RunFolder
from scoring import Evaluation, comparable, format_sample, format_scores, translation_scores
from splits import kind_of


def inspect(job: Job, epoch: int) -> tuple[dict[str, float], list[str]]:
    """Translates two validation sentences, to be shown; ten times in a run all of them, for BLEU
    by greedy search."""
    predictor, data, n_epochs = job.predictor, job.data, job.options.epochs
    if data.classes:
        return {}, []
    is_scored = epoch % math.ceil(n_epochs / 10) == 0 or epoch == n_epochs
    rows = data.texts["validation"][: None if is_scored else 2]
    search = replace(predictor.search, beam_size=1)
    hypotheses = replace(predictor, search=search)(rows["source"])
    if rank() > 0:
        return {}, []
    sample = list(zip(rows["source"], rows["target"], hypotheses))[:2]
    lines = [format_sample(source=s, reference=r, hypothesis=h) for s, r, h in sample]
    if not is_scored:
        return {}, lines
    how = {"tokenize": search.bleu_tokenize, "ignore_case": job.codec.ignores_case}
    scores = translation_scores(hypotheses, rows["target"], **how)
    return {"bleu": scores["bleu"]}, lines


def test_splits(data: TextData) -> list[str]:
    """The test sets by name: "test", or "test.NAME" for each of several."""
    return [split for split in data.rows if kind_of(split) == "test"]


def test(job: Job, folder: RunFolder, *, is_own: bool = True, **facts: Any) -> None:
    """Scores of each test set, printed and logged with facts; then a picture of the first.

    is_own: whether it is the run's own data. Other data leaves the run's pictures and files.
    """
    for i, split in enumerate(test_splits(job.data)):
        name = split if is_own else f"{split}.{Path(job.options.dataset).name}"
        score_split(job, folder, split, name, is_drawn=i == 0 and is_own, **facts)


def score_split(
    job: Job, folder: RunFolder, split: str, file: str, *, is_drawn: bool, **facts: Any
) -> None:
    """Scores of a test set, and a picture: scores are safe before anything is drawn.

    file: how the names of files with its translations begin.
    """
    data, predictor, name = job.data, job.predictor, job.options.dataset
    where = {"device": job.device, "precision": job.options.precision}
    result = evaluate_split(job.model, data, split, **where)
    scores, n, sources, hypotheses = result.scores, len(data.texts[split]), [], []
    if not data.classes:
        rows = data.texts[split][:]
        sources, references = rows["source"], comparable(rows["target"])
        hypotheses = comparable(predictor(sources))
    if rank() > 0:
        return
    if not data.classes:
        for kind, texts in (("hypotheses", hypotheses), ("references", references)):
            folder.write_text(f"{file}.{kind}.txt", "".join(f"{text}\n" for text in texts))
        how = {"tokenize": predictor.search.bleu_tokenize, "ignore_case": job.codec.ignores_case}
        scores |= {"beam_size": predictor.search.beam_size}
        scores |= translation_scores(hypotheses, references, **how)
    folder.log_test(dataset=name, split=split, sentences=n, **facts, **scores)
    say(f"{split} of {n:,} sentences: {format_scores(scores)}")
    if not data.classes:
        say(scores["signature"])
    if is_drawn:
        draw_test(job, folder, f"{name}, {split} split", result, sources, hypotheses)


def draw_test(
    job: Job,
    folder: RunFolder,
    title: str,
    result: Evaluation,
    sources: list[str],
    hypotheses: list[str],
) -> None:
    """The confusion matrix of a classifier, or what a translator attends to."""
    if job.classes:
        with drawing(folder, folder.CONFUSION) as out:
            title = f"{title}: accuracy {result.accuracy:.2%}"
            draw_confusion(result.confusion, job.classes, out, title)
        return
    title, heads = f"{title}, last decoder layer", range(job.options.n_heads)
    with drawing(folder, folder.ATTENTION) as out:
        draw_attention(job.predictor.attention_maps(sources, hypotheses), out, title)
    with drawing(folder, folder.ATTENTION_HEADS) as out:
        one = job.predictor.attention_maps(sources, hypotheses, n=1)
        draw_attention(one, out, title, heads=heads)


def curve_marks(job: Job, trainer: Trainer) -> dict[str, Any]:
    """For `draw_curves`: the epochs that were kept, and the share of the most frequent class."""
    state, n = trainer.state, trainer.config.average_checkpoints
    last = state.best_epoch if trainer.config.patience else state.epoch - 1
    kept = [epoch for epoch in range(last - n + 1, last + 1) if epoch > 0]
    targets = job.data.texts["validation"]["target"] if job.classes else []
    chance = max(Counter(targets).values()) / len(targets) if job.classes else None
    return {
        "kept": kept if n > 1 else [state.best_epoch] * bool(state.best_epoch),
        "chance": chance,
    }


@contextmanager
def drawing(folder: RunFolder, name: str) -> Iterator[BinaryIO]:
    """What is drawn into the buffer becomes a picture of the run; a failure is one warning."""
    with picture(name):
        buffer = io.BytesIO()
        yield buffer
        if buffer.tell():
            folder.write_bytes(name, buffer.getvalue())


def epoch_seconds(folder: RunFolder) -> str:
    """How long a training epoch takes: the median of whole ones, or extrapolated from a part."""
    epochs = [m for m in folder.read_metrics() if m["event"] == "epoch"]
    whole = [m["seconds"] for m in epochs if m["steps"] == m["steps_per_epoch"]]
    if whole:
        spread = f", median of {len(whole)} ({min(whole):.2f} to {max(whole):.2f})"
        return f"one training epoch: {statistics.median(whole):.2f} s{spread * (len(whole) > 1)}"
    n, n_whole, seconds = (epochs[0][k] for k in ("steps", "steps_per_epoch", "seconds"))
    return (
        f"one training epoch: about {seconds * n_whole / n:.3g} s, extrapolated from {n} of "
        f"{n_whole} steps"
    )
