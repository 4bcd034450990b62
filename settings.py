"""What a command line means: options, recipes, workloads, and what a run's folder keeps of them."""

import argparse
import difflib
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any

from comp_utils import BadInput, allowed, flag, limit_problem, option
from data import DataConfig, TokenizerConfig, trains_tokenizer
from decoding import DecodingConfig
from measure import MeasureConfig
from models import SIZES, ModelConfig
from procedures import TrainingConfig, paper_lr
from run_folder import RunFolder


@dataclass(frozen=True)
class RunConfig:
    """Where a run takes place, and where it is kept."""

    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = option(
        "fp32", "of matrix products; weights stay in fp32", choices=("fp32", "bf16", "fp16")
    )
    tf32: bool = option(False, "let CUDA multiply fp32 matrices with 10 bits of mantissa")
    deterministic: bool = option(
        False, "take kernels that give the same digits each time, on CUDA slower ones"
    )
    compile: bool = option(False, "let torch.compile make kernels for this model first")
    seed: int = option(0, "of weights, dropout, batch order", low=0, below=2**63)
    run_dir: str | None = option(None, "folder of the run", unset="runs/DATASET/TIME")
    resume: bool = option(False, "go on with the run in --run-dir from its last checkpoint")
    overwrite: bool = option(False, "take the place of a run that --run-dir holds")


@dataclass(frozen=True)
class UseConfig:
    """What to do with a trained model, instead of training one."""

    test_only: bool = option(False, "test the model of --run-dir again")
    predict: str | None = option(
        None, "file, or - for standard input, of which each line is classified or translated"
    )


@dataclass(frozen=True)
class SizeConfig:
    """The named size that the other model options start from."""

    model: str = option(
        "tiny",
        "; ".join(
            f"{name}: {c.n_layers}+{c.n_layers} layers of {c.d_model}/{c.d_ff}, {c.n_heads} heads"
            for name, c in SIZES.items()
        ),
        choices=tuple(SIZES),
    )


Groups = dict[str, tuple[type, ...]]  # settings classes by the title that --help gives them
GROUPS: Groups = {
    "run": (RunConfig,),
    "data": (DataConfig,),
    "tokenizer": (TokenizerConfig,),
    "model": (SizeConfig, ModelConfig),
    "training": (TrainingConfig,),
    "use": (UseConfig, DecodingConfig),
    "measure": (MeasureConfig,),
}

# The best settings known for an embedded data set, found on its training and validation splits.
# They are also the defaults for other data of the same task.
RECIPES: dict[str, dict[str, Any]] = {
    "rotten_tomatoes": {
        "task": "classification",
        "lowercase": True,
        "batch_size": 64,
        "model": "tiny",
        "n_layers": 1,
        "d_ff": 128,
        "dropout": 0.5,
        "r_drop": 5.0,
        "epochs": 8,
        "lr": 2e-3,
        "schedule": "linear",
        "warmup_steps": 100,
        "weight_decay": 0.01,
        "average_checkpoints": 4,
    },
    "libreoffice_help": {
        "task": "translation",
        "source_column": "en",
        "target_column": "de",
        "batch_tokens": 1024,
        "model": "tiny",
        "epochs": 20,
        "warmup_steps": 1500,
        "average_checkpoints": 5,
    },
}
# What --workload names: settings that do not change, for machines to be compared by.
WORKLOADS: dict[str, dict[str, Any]] = {
    "original": {
        "dataset": "rotten_tomatoes",
        "task": "classification",
        "max_length": 512,
        "pad_to": 512,
        "batch_size": 16,
        "n_layers": 6,
        "d_model": 16,
        "d_ff": 64,
        "n_heads": 8,
        "dropout": 0.1,
    },
    "reviews": {"dataset": "rotten_tomatoes", **RECIPES["rotten_tomatoes"]},
    "translation": {"dataset": "libreoffice_help", **RECIPES["libreoffice_help"]},
}
RECIPE_OF_TASK = {RECIPES[name]["task"]: name for name in reversed(RECIPES)}

# What may be said anew when a trained model is used; everything else is the run's own.
FREE_IN_USE = {"run_dir", "device", "precision", "num_workers", "batch_size", "batch_tokens"}
FREE_IN_USE |= {f.name for config in (UseConfig, DecodingConfig) for f in fields(config)}
BUDGETS = {"batch_size", "batch_tokens"}  # one of the two says how large a batch is
FREE_IN_TEST = {"dataset", "dataset_config", "source_column", "target_column"}
# What may not be said anew when a run is resumed, for it would be another run. The data may have
# been moved: whether they are the same, their fingerprint tells.
SETTLED = {
    f.name
    for config in (DataConfig, TokenizerConfig, SizeConfig, ModelConfig)
    for f in fields(config)
} | {"seed"}
SETTLED -= {"dataset", "num_workers", "dropout", "attention"}


# The options that ask for something other than to train.
INSTEAD = ("compare", "check_device", "benchmark", "test_only", "predict")


# ------------------------------------------------------------------------------------------ options


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says what is wrong in one line, as all of this program does."""

    def error(self, message: str) -> typing.NoReturn:
        """Called by argparse."""
        raise BadInput(message)


def option_fields(groups: Groups = GROUPS) -> dict[str, Any]:
    """The dataclass field behind each option, by name."""
    return {f.name: f for group in groups.values() for config in group for f in fields(config)}


def kind_of(f: Any) -> type:
    """int for a field of type int or int | None, tuple for one of several values."""
    kind = next(t for t in (typing.get_args(f.type) or (f.type,)) if t is not type(None))
    return typing.get_origin(kind) or kind


def build_parser(groups: Groups = GROUPS) -> Parser:
    """One flag for each field of the settings classes; a flag that is not given is absent."""
    defaults = vars(resolve({}))
    parser = Parser(
        description="Trains the Transformer of Attention Is All You Need, and tests it. Defaults "
        f"are those of {defaults['dataset']}; another data set has its own, or those of its task.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for title, configs in groups.items():
        group = parser.add_argument_group(title)
        for f in (f for config in configs for f in fields(config)):
            text = f.metadata["help"].replace("%", "%%")
            if kind_of(f) is bool:
                negatable = f.metadata.get("negatable")
                action = argparse.BooleanOptionalAction if negatable else "store_true"
                group.add_argument(flag(f.name), action=action, help=text)
                continue
            default = defaults.get(f.name)
            default = f.metadata.get("unset", "none") if default is None else default
            limits = f"; {allowed(f.metadata)}" if allowed(f.metadata) else ""
            kind = kind_of(f).__name__.upper()
            if f.metadata.get("many"):
                group.add_argument(flag(f.name), metavar="RECORD", nargs="+", help=text)
                continue
            metavar = {"INT": "N", "FLOAT": "X", "STR": f.name.split("_")[-1].upper()}[kind]
            group.add_argument(
                flag(f.name), metavar=metavar, help=f"{text}{limits} (default: {default})"
            )
    return parser


def parse_args(
    argv: list[str] | None = None, groups: Groups = GROUPS
) -> tuple[dict[str, Any], list[str]]:
    """The options given, by field name in their own types, and a line for each that cannot be."""
    known = option_fields(groups)
    namespace, unknown = build_parser(groups).parse_known_args(argv)
    given, problems = {}, []
    for i, word in enumerate(unknown):
        name = word.split("=")[0]
        near = difflib.get_close_matches(name, [flag(other) for other in known], 1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        if name.startswith("-") or not unknown[max(0, i - 1)].startswith("-"):
            problems.append(f"{name}: no such option; {hint}")
    for name, text in vars(namespace).items():
        f, kind = known[name], kind_of(known[name])
        try:
            value = text if kind is bool else kind(text)  # of several values, a tuple
            if value != value or value == "":
                raise ValueError
        except ValueError:
            wanted = {int: "a whole number", float: "a number", str: "a name"}[kind]
            problems.append(f"{flag(name)} {text}: give {wanted}")
            continue
        problem = limit_problem(name, value, f.metadata, text)
        given |= {} if problem else {name: value}
        problems += [problem] if problem else []
    return given, problems


def resolve(given: dict[str, Any]) -> SimpleNamespace:
    """Every option: as given, else by the recipe, else by the model's size, else the default."""
    defaults = {name: f.default for name, f in option_fields().items()}
    workload = WORKLOADS.get(given.get("workload"))
    dataset = given.get("dataset", (workload or defaults)["dataset"])
    task = given.get("task", RECIPES.get(dataset, {}).get("task", defaults["task"]))
    recipe = (
        workload or RECIPES.get(dataset) or RECIPES[RECIPE_OF_TASK.get(task, defaults["dataset"])]
    )
    replaced = set(BUDGETS) if BUDGETS & given.keys() else set()
    if "model" in given:  # a size asked for by name is that size whole, without a recipe's changes
        replaced |= asdict(ModelConfig()).keys()
    recipe = {name: value for name, value in recipe.items() if name not in replaced}
    size = SIZES.get(given.get("model", recipe.get("model", defaults["model"])), ModelConfig())
    options = SimpleNamespace(**{**defaults, **asdict(size), **recipe, **given})
    if options.lr is None:
        options.lr = paper_lr(d_model=options.d_model, warmup_steps=options.warmup_steps)
    return options


def spelled(name: str, value: Any) -> str:
    """An option as the command line has it: --lr 0.1, --lowercase or --no-lowercase."""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return f"{flag(name)} {value}"


def part(config: type, options: SimpleNamespace) -> Any:
    """The settings object of one class, cut out of all options."""
    return config(**{f.name: getattr(options, f.name) for f in fields(config)})


def check(
    options: SimpleNamespace,
    given: dict[str, Any],
    problems: list[str],
    *questions: Callable[[], Any],
) -> list[Any]:
    """The answers to questions, or BadInput with all problems: those there are, and those found.

    problems: of options whose values cannot be; in options they have their defaults.
    """
    configs = [part(config, options) for group in GROUPS.values() for config in group]
    problems = problems + [p for c in configs if hasattr(c, "problems") for p in c.problems()]
    if options.overwrite and options.run_dir is None:
        problems.append("--overwrite: say which run to replace with --run-dir")
    if not trains_tokenizer(part(TokenizerConfig, options), options.dataset):
        problems += [
            f"{flag(name)} {given[name]}: is for a new tokenizer; add --train-tokenizer"
            for name in ("vocab_size", "lowercase")
            if name in given
        ]
    answers = []
    for question in questions:
        try:
            answers.append(question())
        except BadInput as error:
            problems += error.lines
    if problems:
        raise BadInput(*problems)
    return answers


def saved_options(folder: RunFolder, config: dict[str, Any]) -> dict[str, Any]:
    """The options in a run's config.json. Raises BadInput if this version does not write such."""
    saved, known = config["options"], option_fields()
    wrong = sorted(saved.keys() ^ known.keys())
    for name in saved.keys() & known.keys():
        kind, value, limits = kind_of(known[name]), saved[name], known[name].metadata
        if value is None and known[name].default is None:
            continue
        if limits.get("many"):
            wrong.append(name)
            continue
        fits = isinstance(value, (int, float) if kind is float else kind)
        fits = fits and isinstance(value, bool) == (kind is bool)
        fits = fits and not (isinstance(value, int) and abs(value) >= 2**63)
        if not fits or limit_problem(name, value, limits, str(value)):
            wrong.append(name)
    if wrong:
        raise BadInput(
            f"{folder.path / folder.CONFIG}: {', '.join(wrong)} is not as this version of rhea "
            "writes it; use the version that made the run, or train anew"
        )
    anew = {"resume", "overwrite", *INSTEAD}
    return {**saved, **{name: known[name].default for name in anew}}
