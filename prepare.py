"""From options to a job that trains: a new run, a resumed one, or one that begins with weights."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer

from comp_utils import machine_facts, say, set_seed, warn
from config import DataConfig, ModelConfig, SizeConfig, TokenizerConfig
from data import TextData
from ddp_utils import (
    broadcast,
    broadcast_from_rank_zero,
    broadcast_tensors,
    local_rank_zero_first,
    local_world_size,
    raise_on_all_ranks,
    rank,
    usable_cores,
    world_size,
)
from errors import BadInput
from fitting import FITTED, fit_epochs, fit_sizes, has_fitted_defaults
from jobs import Job, Options, add_to, build_model, own_device, raise_problems
from measure import work_fingerprint
from models import count_parameters
from run_folder import RunFolder
from settings import (
    BATCH_LIMITS,
    FIXED_ON_RESUME,
    different_options,
    extract_config,
    field_names,
    format_option,
    option_problems,
    resolve,
    saved_options,
)
from splits import Splits, check_labels, class_names, embedded, largest_class, load_splits
from tokenization import as_codec, get_tokenizer, read_tokenizer


def resolve_run(
    given: dict[str, Any], problems: list[str]
) -> tuple[Options, torch.device, RunFolder]:
    """Options, device and folder of a new run. Nothing is written yet. Raises BadInput."""
    options, device, folder = resolve(given), None, None
    with raise_on_all_ranks():
        problems += option_problems(options, given)
        with add_to(problems):
            device = own_device(options)
        with add_to(problems):
            folder = RunFolder.choose(options.run_dir, options.dataset, options.overwrite)
        raise_problems(problems)
    set_seed(options.seed)
    return options, device, broadcast(folder)  # its name may be the time


def load_data(
    options: Options, tokenizer_of: RunFolder | None = None, given: dict[str, Any] | None = None
) -> tuple[TextData, Splits]:
    """The data set as ids and as text; the tokenizer is a run's, or that of the options.

    given: of a new run, the options on the command line; None on resume.
    Rank 0 trains or reads the tokenizer; one process of each machine prepares the rows for all.
    """
    is_classification, fitted = options.task == "classification", []
    with local_rank_zero_first():
        splits = load_splits(extract_config(DataConfig, options))
    tables = splits.tables
    if given is not None:
        fitted += fit_sizes(options, given, len(tables["train"]))
    config = extract_config(DataConfig, options)

    def tokenizer_text() -> str:
        if tokenizer_of:
            codec = read_tokenizer(str(tokenizer_of.path / RunFolder.TOKENIZER))
        else:
            columns = ["source"] if is_classification else ["source", "target"]
            wanted = extract_config(TokenizerConfig, options)
            codec = get_tokenizer(wanted, options.dataset, tables["train"], columns)
        return codec.tokenizer.to_str()

    codec = as_codec(Tokenizer.from_str(broadcast_from_rank_zero(tokenizer_text)))
    with local_rank_zero_first():
        n = len(tables["train"])
        if n < world_size():
            raise BadInput(
                f"--dataset {options.dataset}: {n} training sentences for {world_size()} "
                f"processes; start at most {n}"
            )
        classes = class_names(tables) if is_classification else None
        if classes:
            check_labels(tables, classes)
        data = TextData(config, tables, codec, classes)
    if given is not None:
        n_batches = len(data.plan("train", seed=options.seed, epoch=1))
        steps_per_epoch = math.ceil(n_batches / (options.accumulate * world_size()))
        fitted += fit_epochs(options, given, steps_per_epoch)
        if fitted:
            splits.notes.append(
                f"defaults for {len(tables['train']):,} sentences: {' '.join(fitted)}"
            )
    return data, splits


def prepare(
    options: Options,
    device: torch.device,
    tokenizer_of: RunFolder | None = None,
    given: dict[str, Any] | None = None,
) -> Job:
    """Data and a fresh model. given: as `load_data` takes it."""
    data, splits = load_data(options, tokenizer_of, given)
    model = build_model(options, data.codec, data.classes).to(device)
    plan, config = data.plan_fingerprint(options.seed), extract_config(ModelConfig, options)
    facts = {
        "classes": data.classes,
        "parameters": count_parameters(model),
        "files": splits.sources,
        "data_fingerprint": data.fingerprint,
        "plan_fingerprint": plan,
        "work_fingerprint": work_fingerprint(plan, config, options.r_drop),
        "processes": world_size(),
        **machine_facts(device),
    }
    notes = splits.notes if options.dataset in embedded() else [splits.summary, *splits.notes]
    return Job(options, device, data.codec, data.classes, model, data, facts, notes)


def say_facts(job: Job, folder: RunFolder | None) -> None:
    """What a run is about to do. folder: None if nothing will be written."""
    options, data, facts = job.options, job.data, job.facts
    classes, n = data.classes, facts["threads"]
    targets = options.target_column
    if classes:
        targets = f"{', '.join(c[:20] for c in classes[:10])}; {largest_class(data.texts['train'])}"
    processes = f"{facts['processes']} processes of " if facts["processes"] > 1 else ""
    say(
        f"{facts['device_name']} ({facts['device']}), {processes}{n} thread{'s' * (n != 1)}, "
        f"torch {facts['torch']}, {options.precision}",
        f"{options.task}, {options.dataset}: {options.source_column} -> {targets}",
        *(
            f"  {line}"
            for line in [*job.notes, *(data.report(split, options.seed) for split in data.rows)]
        ),
        f"tokenizer of {data.codec.n_vocab:,} tokens; model of {facts['parameters']:,} parameters",
        f"batch plan {facts['plan_fingerprint']}{f'; run folder {folder.path}' if folder else ''}",
    )


def changed_options(
    given: dict[str, Any], problems: list[str], folder: RunFolder, config: dict[str, Any]
) -> tuple[Options, list[str]]:
    """The options of a run with those given, and words about each that changed. Raises BadInput."""
    with raise_on_all_ranks():
        saved = saved_options(config, folder.path / folder.CONFIG)
        given = {name: value for name, value in given.items() if name not in ("run_dir", "resume")}
        changed = {name: value for name, value in given.items() if value != saved[name]}
        problems += [
            f"{format_option(name, value)}: the run in {folder.path} has {saved[name]}, and cannot "
            "be resumed with another value; leave it out, or start a new run"
            for name, value in changed.items()
            if name in FIXED_ON_RESUME
        ]
        raise_problems(problems)
        options = SimpleNamespace(**{**saved, **changed, "run_dir": str(folder.path)})
        raise_problems(option_problems(options, {}))
    return options, [f"{format_option(name, v)} (was {saved[name]})" for name, v in changed.items()]


def options_of_seeds(given: dict[str, Any], folders: list[RunFolder]) -> dict[str, Any]:
    """The options that further seeds take from the runs that are there: those that follow from the
    data. Raises BadInput if these runs have other options than those given."""
    given = dict(given)
    origin_of(given, [])
    options, shared = resolve(given), {}
    fitted = FITTED - given.keys() if has_fitted_defaults(options) else set()
    fitted -= BATCH_LIMITS if BATCH_LIMITS & given.keys() else set()
    for folder in folders:
        config = broadcast_from_rank_zero(folder.read_config)
        with raise_on_all_ranks():
            saved = saved_options(config, folder.path / folder.CONFIG)
            shared = shared or {name: saved[name] for name in fitted}
            others = different_options(saved, vars(options) | shared)
            n = config.get("processes", world_size())
            others += [f"{n} process{'es' * (n != 1)}"] if n != world_size() else []
            if others:
                raise BadInput(
                    f"--seeds: the run in {folder.path} has {', '.join(others)}; give the same, or "
                    "another --run-dir, or --overwrite"
                )
    return shared


def origin_of(given: dict[str, Any], problems: list[str]) -> RunFolder | None:
    """The run of --init-from, whose sizes join the options given; None without it."""
    if "init_from" not in given:
        return None
    folder = find_origin(given["init_from"])
    config = broadcast_from_rank_zero(folder.read_config)
    with raise_on_all_ranks():
        saved = saved_options(config, folder.path / folder.CONFIG)
    sizes = field_names(ModelConfig) - {"dropout", "attention"}
    sizes |= {"max_length", "pad_to"} if saved["positions"] == "learned" else set()
    fixed = field_names(TokenizerConfig, SizeConfig) | sizes
    problems += [
        f"{format_option(name, given[name])}: the run of --init-from has its own; leave it out"
        for name in sorted(fixed & given.keys())
        if name not in sizes or given[name] != saved[name]
    ]
    given |= {name: saved[name] for name in sizes}
    given.setdefault("dropout", saved["dropout"])
    return folder


def find_origin(name: str) -> RunFolder:
    """The run of --init-from, which rank 0 alone need see. Raises BadInput."""
    needed = (RunFolder.WEIGHTS,)
    return broadcast_from_rank_zero(lambda: RunFolder.find(name, *needed, option="--init-from"))


def first_weights(job: Job) -> None:
    """Loads the weights of --init-from, if given. Raises BadInput if that run has another model."""
    if not job.options.init_from:
        return
    origin = find_origin(job.options.init_from)
    classes = broadcast_from_rank_zero(origin.read_config)["classes"]
    with raise_on_all_ranks():
        if classes != job.classes:
            task = "translation" if classes is None else "classification"
            remedy = f"--task {task}" if task != job.options.task else "a run with the same"
            raise BadInput(
                f"--init-from {origin.path}: a model of {of_classes(classes)}, not of "
                f"{of_classes(job.classes)}; give {remedy}"
            )
        if rank() == 0:
            job.model.load_state_dict(origin.read_weights(job.model), strict=False)  # tied: once
    broadcast_tensors(job.model.parameters())
    say(f"weights of {origin.path}")


def of_classes(classes: list[str] | None) -> str:
    """What a model gives, in a few words."""
    return f"classes {', '.join(c[:20] for c in classes[:10])}" if classes else "translations"


def restore_threads(config: dict[str, Any]) -> None:
    """Uses the threads of the run so far: with another number, sums are rounded in another order
    and the run ends with other digits."""
    n, n_now = config.get("threads", torch.get_num_threads()), torch.get_num_threads()
    if n * local_world_size() <= max(usable_cores(), n_now * local_world_size()):
        torch.set_num_threads(n)
    elif n != n_now:
        warn(
            f"the run so far used {n} threads a process, and this machine has {usable_cores()} "
            f"cores: with {n_now} threads it will not end with the same digits"
        )


def check_same_data(options: Options, config: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises BadInput if the data of a run changed."""
    for name in ("classes", "data_fingerprint", "plan_fingerprint"):
        if facts[name] != config.get(name):
            raise BadInput(
                f"--resume: {options.dataset} is not the data that the run started with (another "
                f"{name.replace('_', ' ')}); restore the data, or start a new run"
            )
