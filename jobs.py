"""A job: device, data and model, that a command works on; and that of a finished run."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer

from comp_utils import available_devices, pick_device, set_up
from config import DecodingConfig, ModelConfig, TrainingConfig
from data import TextData
from ddp_utils import (
    broadcast_from_rank_zero,
    broadcast_tensors,
    local_rank,
    local_world_size,
    raise_on_all_ranks,
    rank,
    world_size,
)
from decoding import EXTRA_LENGTH
from ensemble import Ensemble
from errors import BadInput, StopSignals
from models import Transformer, TransformerClassifier
from naive_bayes import NaiveBayes
from predict import Predictor
from procedures import Trainer
from run_folder import RunFolder
from settings import (
    BATCH_LIMITS,
    command_problems,
    extract_config,
    field_names,
    format_option,
    option_problems,
    saved_options,
    value_problems,
)
from tokenization import TextCodec, as_codec, read_tokenizer

Inspect = Callable[[int], tuple[dict[str, float], list[str]]]  # see Trainer
Options = SimpleNamespace  # every option of the command line, by field name
Model = Transformer | TransformerClassifier | Ensemble


@dataclass
class Job:
    """What a command works on: options, device, model, and the data if it needs any."""

    options: Options
    device: torch.device
    codec: TextCodec
    classes: list[str] | None  # None for translation
    model: Model
    data: TextData | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # for config.json and records
    notes: list[str] = field(default_factory=list)  # about the files of the data set

    @property
    def predictor(self) -> Predictor:
        """The model, ready to answer texts."""
        options = self.options
        return Predictor(
            self.model,
            self.codec,
            self.classes,
            max_length=options.max_length,
            batch_size=options.batch_size,
            batch_tokens=options.batch_tokens,
            search=extract_config(DecodingConfig, options),
            n_best=len(self.classes) if options.all_probabilities else options.n_best,
            device=self.device,
            precision=options.precision,
        )

    def trainer(
        self, folder: RunFolder, signals: StopSignals, inspect: Inspect = lambda epoch: ({}, [])
    ) -> Trainer:
        """The trainer of the model."""
        options = self.options
        return Trainer(
            self.model,
            self.data,
            extract_config(TrainingConfig, options),
            folder,
            device=self.device,
            precision=options.precision,
            seed=options.seed,
            compiled=options.compile,
            signals=signals,
            inspect=inspect,
        )


def build_model(options: Options, codec: TextCodec, classes: list[str] | None) -> Model:
    """The model that the options describe, with fresh weights."""
    sizes = {"n_vocab": codec.n_vocab, "pad_id": codec.pad_id}
    sizes["max_len"] = max(options.max_length, options.pad_to) + EXTRA_LENGTH
    kind = Transformer
    if classes is not None:
        kind, sizes["n_classes"] = TransformerClassifier, len(classes)
    config = extract_config(ModelConfig, options)
    uses_counts = config.naive_bayes and classes is not None
    models = [kind(config, **sizes) for _ in range(config.ensemble)]
    naive_bayes = NaiveBayes(len(classes), codec.pad_id) if uses_counts else None
    return Ensemble(models, naive_bayes) if naive_bayes or len(models) > 1 else models[0]


def own_device(options: Options) -> torch.device:
    """The device of this process, set up. Raises BadInput."""
    where = {"local_rank": local_rank(), "local_world_size": local_world_size()}
    device = pick_device(options.device, options.precision, **where)
    set_up(device, tf32=options.tf32, deterministic=options.deterministic)
    return device


@contextmanager
def add_to(problems: list[str]) -> Iterator[None]:
    """A BadInput raised in the block joins the problems, to be reported with all others."""
    try:
        yield
    except BadInput as error:
        problems += error.lines


def raise_problems(problems: list[str]) -> None:
    """Raises BadInput if there are any."""
    if problems:
        raise BadInput(*problems)


def load_job(
    given: dict[str, Any], problems: list[str], folders: list[RunFolder] | None = None
) -> tuple[Job, RunFolder]:
    """The trained model of --run-dir, without data, and its folder; if it is a folder of runs, the
    models of all, or of those given as folders. Raises BadInput."""
    if folders is None:
        names = (given.get("run_dir"), RunFolder.WEIGHTS)
        folders = broadcast_from_rank_zero(RunFolder.find_all, *names)
    configs = [broadcast_from_rank_zero(folder.read_config) for folder in folders]
    folder, config = folders[0], configs[0]
    with raise_on_all_ranks():
        saved = [saved_options(c, f.path / f.CONFIG) for f, c in zip(folders, configs)]
        options, device = options_in_use(given, saved), None
        problems += problems_in_use(options, given, folders, configs)
        with add_to(problems):
            device = own_device(options)
        raise_problems(problems)
    name = str(folder.path / folder.TOKENIZER)
    text = broadcast_from_rank_zero(lambda: read_tokenizer(name).tokenizer.to_str())
    codec, classes = as_codec(Tokenizer.from_str(text)), config["classes"]
    models = [build_model(SimpleNamespace(**own), codec, classes).to(device) for own in saved]
    for f, model in zip(folders, models):
        with raise_on_all_ranks():
            if rank() == 0:
                model.load_state_dict(f.read_weights(model), strict=False)  # tied weights: once
        broadcast_tensors(model.parameters())
    if len(models) == 1:
        return Job(options, device, codec, classes, models[0]), folder
    if rank() == 0:
        names = ", ".join(f.path.name for f in folders)
        print(f"averaging the probabilities of {len(models)} runs: {names}", file=sys.stderr)
    return Job(options, device, codec, classes, Ensemble(models)), RunFolder(folder.path.parent)


def options_in_use(given: dict[str, Any], saved: list[dict[str, Any]]) -> Options:
    """The options of one or more runs, with those given for their use."""
    replaced = BATCH_LIMITS if BATCH_LIMITS & given.keys() else set()
    if given.get("dataset", saved[0]["dataset"]) != saved[0]["dataset"]:
        replaced = {*replaced, "columns", "dataset_config"}
    options = SimpleNamespace(**{**saved[0], **dict.fromkeys(replaced), **given})
    for name in ("max_length", "pad_to"):  # positions that all the models have
        setattr(options, name, min(own[name] for own in saved))
    has_cuda = options.device in ("auto", "cuda") and "cuda" in available_devices()
    options.tf32 = given.get("tf32", options.tf32 and has_cuda)
    if not options.test_only:  # a saved --bleu-tokenize may need a package of its own
        options.bleu_tokenize = None
    return options


def problems_in_use(
    options: Options, given: dict[str, Any], folders: list[RunFolder], configs: list[dict[str, Any]]
) -> list[str]:
    """What cannot work when one or more runs are used, a line each."""
    folder, config = folders[0], configs[0]
    problems = option_problems(options, {})
    if not config["classes"]:
        problems += search_problems(options)
    else:
        problems += [
            f"{format_option(name, given[name])}: has no effect on a classifier; leave it out"
            for name in sorted(field_names(DecodingConfig) & given.keys())
        ]
    if options.predict == "-" and world_size() > 1:
        problems.append("--predict -: only one process can read standard input; give a file")
    return problems + [
        f"--run-dir {given['run_dir']}: {f.path.name} has another tokenizer or other classes than "
        f"{folder.path.name}, so they cannot answer together; give the folder of one run"
        for f, c in zip(folders, configs)
        if any(c[name] != config[name] for name in ("tokenizer_checksum", "classes"))
    ]


def search_problems(options: Options) -> list[str]:
    """What a translator cannot answer, a line each."""
    problems, n = [], options.n_best or 1
    if options.all_probabilities:
        problems.append("--all-probabilities: only of a classifier; give --n-best")
    if n > options.beam_size:
        problems.append(
            f"--n-best {n}: a beam of {options.beam_size} finds no more than {options.beam_size}; "
            f"give --beam-size {n} or more"
        )
    return problems


def load(run_dir: str, **options: Any) -> Predictor:
    """The trained model of a run folder, for use in Python.

    options: of --predict, by field name, such as device="cpu" or beam_size=1. Raises BadInput.
    """
    given = {"run_dir": str(run_dir), "predict": "-", **options}
    raise_problems([line for name, value in given.items() for line in value_problems(name, value)])
    return load_job(given, command_problems(given, ["predict"]))[0].predictor
