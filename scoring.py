"""Scores of a model on one split, and of translations against references."""

import math
import statistics
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from config import DecodingConfig
from tokenization import TextCodec

FORMATS = {
    "loss": "loss {:.3f}",
    "accuracy": "accuracy {:6.2%}",
    "macro_f1": "macro F1 {:.3f}",
    "perplexity": "perplexity {:.4g}",
    "beam_size": "beam size {}",
    "bleu": "BLEU {:4.1f}",
    "chrf": "chrF {:4.1f}",
    "bleu_lowercase_13a": "lower-cased 13a BLEU {:4.1f}",
}


def format_scores(scores: dict[str, Any], *names: str) -> str:
    """ "loss 1.235, accuracy 67.89%, …": the scores of these names, or all; no other fields."""
    shown = [name for name in FORMATS if name in (names or scores) and name in scores]
    return ", ".join(FORMATS[name].format(scores[name]) for name in shown)


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on one split, without dropout."""

    loss: float  # nats per target token, without label smoothing
    accuracy: float  # share of target tokens predicted; a translator sees those before each
    confusion: np.ndarray | None  # sentences by [true, predicted] class; None for a translator

    @property
    def macro_f1(self) -> float:
        """Mean over the classes of F1 = 2 TP / (2 TP + FP + FN); 0 for a class never seen."""
        n = self.confusion.sum(axis=0) + self.confusion.sum(axis=1)
        return float(np.mean(2 * self.confusion.diagonal() / np.maximum(n, 1)))

    @property
    def scores(self) -> dict[str, float]:
        """All scores, by name."""
        if self.confusion is None:
            task = {"perplexity": math.exp(min(self.loss, 700.0))}  # a float overflows above that
        else:
            task = {"macro_f1": self.macro_f1}
        return {"loss": self.loss, "accuracy": self.accuracy, **task}

    @property
    def rank(self) -> tuple[float, ...]:
        """Greater is better: a classifier by macro F1, which a class of few sentences counts in as
        much as one of many, then by loss; a translator by loss."""
        return (-self.loss,) if self.confusion is None else (self.macro_f1, -self.loss)


def scores_of_runs(tests: list[list[dict[str, Any]]]) -> list[str]:
    """A line for each score that all runs have: the mean, of several runs also the standard
    deviation and each value; accuracy and macro F1 in per cent. tests: of each run the events."""
    lines = []
    by_split = [{event.get("split", "test"): event for event in events} for events in tests]
    for split in by_split[0]:
        for name in ("accuracy", "macro_f1", "bleu", "chrf", "bleu_lowercase_13a", "loss"):
            values = [splits[split][name] for splits in by_split if name in splits.get(split, {})]
            if len(values) == len(tests):
                scale = 100 if name in ("accuracy", "macro_f1") else 1
                mean = f"{split} {name} {scale * statistics.mean(values):.2f}"
                each = ", ".join(f"{scale * value:.2f}" for value in values)
                deviation = scale * statistics.stdev(values) if len(values) > 1 else 0.0
                lines.append(mean + f" ± {deviation:.2f} ({each})" * (len(values) > 1))
    return lines


def comparable(texts: Iterable[str]) -> list[str]:
    """The texts in Unicode NFC, one line each, as they are scored and written to files."""
    return [" ".join(unicodedata.normalize("NFC", text).splitlines()) for text in texts]


def bleu_tokenizer(references: list[str]) -> str:
    """The sacrebleu tokenizer for the script of the references.

    13a splits at spaces, so a sentence in a script without them would be a single token.
    """
    scripts: Counter[str] = Counter()
    for character, n in Counter("".join(references)).items():
        if character.isalpha():
            scripts[unicodedata.name(character, "").partition(" ")[0]] += n
    # The least shares are small: a Chinese character counts for several Latin letters.
    for least_share, names, choices in (
        (0.1, ("HIRAGANA", "KATAKANA"), ("ja-mecab", "char")),
        (0.2, ("CJK",), ("zh",)),
        (0.2, ("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"), ("char",)),
        (0.2, ("HANGUL",), ("ko-mecab", "13a")),
    ):
        if sum(scripts[name] for name in names) > least_share * scripts.total():
            return next(c for c in choices if not DecodingConfig(bleu_tokenize=c).problems())
    return "13a"


def translation_scores(
    hypotheses: list[str],
    references: list[str],
    tokenize: str | None = None,
    *,
    ignore_case: bool = False,
) -> dict[str, Any]:
    """Corpus scores by sacrebleu of `comparable` texts, with the signature that reproduces them.

    tokenize: sacrebleu's tokenizer for "bleu"; None chooses by the script of the references.
    ignore_case: for a translator that knows lower case alone.
    "bleu_lowercase_13a" is close to the tokenized, lower-cased BLEU of papers on Multi30k.
    """
    from sacrebleu.metrics import BLEU, CHRF

    hypotheses, references = comparable(hypotheses), comparable(references)
    tokenize = tokenize or bleu_tokenizer(references)
    bleu, chrf = BLEU(lowercase=ignore_case, tokenize=tokenize), CHRF(lowercase=ignore_case)
    lowercase = BLEU(lowercase=True, tokenize="13a")
    return {
        "bleu": bleu.corpus_score(hypotheses, [references]).score,
        "chrf": chrf.corpus_score(hypotheses, [references]).score,
        "bleu_lowercase_13a": lowercase.corpus_score(hypotheses, [references]).score,
        "signature": f"BLEU {bleu.get_signature()}; chrF {chrf.get_signature()}; Unicode NFC",
    }


def format_sample(**texts: str) -> str:
    """A line for each text, its name before it, cut to 200 characters."""
    return "\n".join(f"  {name:<11} {cut_text(text, 200)}" for name, text in texts.items())


def cut_text(text: str, longest: int) -> str:
    """The text on one line, cut between characters, since not every script has spaces."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def warn_if_not_reversible(codec: TextCodec, references: list[str]) -> None:
    """One warning on stderr with the number of references that decode(encode(·)) changes.

    Whitespace and Unicode normal form do not count, nor does case if the tokenizer lower-cases.
    """
    case = str.casefold if codec.ignores_case else str
    pairs = zip(references, codec.tokenizer.decode_batch(codec.encode(references)))
    pairs = [[" ".join(text.split()) for text in comparable(pair)] for pair in pairs]
    changed = [(before, after) for before, after in pairs if case(before) != case(after)]
    if changed:
        before, after = (cut_text(text, 60) for text in changed[0])
        print(
            f"warning: tokenizer: {len(changed):,} of {len(references):,} validation references "
            f'change when encoded and decoded, e.g. "{before}" to "{after}": BLEU will be low; '
            "give a tokenizer with a matching decoder, or --train-tokenizer",
            file=sys.stderr,
        )
