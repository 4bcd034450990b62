"""From a command line to options: the parser, recipes and workloads, and what a run fixes."""

import argparse
import difflib
import re
import typing
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from config import (
    SIZES,
    VERSION,
    DataConfig,
    DecodingConfig,
    MeasureConfig,
    ModelConfig,
    RunConfig,
    SizeConfig,
    TokenizerConfig,
    TrainingConfig,
    UseConfig,
    format_flag,
    limit_problem,
)
from errors import BadInput
from optimization import paper_lr
from tokenization import trains_tokenizer

Groups = dict[str, tuple[type, ...]]  # settings classes by the title that --help gives them
GROUPS: Groups = {
    "run": (RunConfig,),
    "data": (DataConfig,),
    "tokenizer": (TokenizerConfig,),
    "model": (SizeConfig, ModelConfig),
    "training": (TrainingConfig,),
    "use a model": (UseConfig, DecodingConfig),
    "measure": (MeasureConfig,),
}

# The best settings known for an embedded data set, chosen on its training and validation splits.
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
        "ensemble": 4,
        "naive_bayes": True,
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
ALONE = {"ensemble": 1, "naive_bayes": False}
# What --workload names: settings that never change, to compare machines by.
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
    "reviews": {"dataset": "rotten_tomatoes", **RECIPES["rotten_tomatoes"], **ALONE},
    "translation": {"dataset": "libreoffice_help", **RECIPES["libreoffice_help"]},
}
RECIPE_OF_TASK = {RECIPES[name]["task"]: name for name in reversed(RECIPES)}
DESCRIPTION = f"""Trains and tests the Transformer of Attention Is All You Need. Without options:
on embedded movie reviews, on the best device of this machine. The defaults below are those of
{DataConfig.dataset}; libreoffice_help and --task translation have others, and for your own data
some follow from its size. The config.json of a run lists all."""
EXAMPLES = """examples:
  python main.py                                                  train on the embedded reviews
  python main.py --dataset reviews.csv --run-dir runs/mine        train on a file of your own
  python main.py --resume --run-dir runs/mine                     continue a run that was stopped
  python main.py --run-dir runs/mine --predict new.txt            use the model
  python main.py --workload original --benchmark 20 --run-dir runs/here"""

# What is done instead of training.
COMMANDS = ("compare", "check_device", "benchmark", "test_only", "predict", "export")
# Options that belong to one command.
ONLY_WITH = {
    "compare": ("figure", "allow_different_work"),
    "benchmark": ("label",),
    "predict": ("n_best", "all_probabilities", "output"),
    "export": ("to",),
}
BATCH_LIMITS = {"batch_size", "batch_tokens"}  # one of the two limits a batch


def field_names(*configs: type) -> set[str]:
    """The options of some settings classes."""
    return {f.name for config in configs for f in fields(config)}


# Options that may be given when a trained model is used; the run has settled all others.
INFERENCE_OPTIONS = {"run_dir", "device", "precision", "num_workers", *BATCH_LIMITS}
INFERENCE_OPTIONS |= field_names(UseConfig, DecodingConfig)
TEST_OPTIONS = {"dataset", "dataset_config", "source_column", "target_column", "columns"}
# Options that cannot change on --resume. The data may move: their fingerprint identifies them.
FIXED_ON_RESUME = field_names(DataConfig, TokenizerConfig, SizeConfig, ModelConfig) | {"seed"}
FIXED_ON_RESUME -= {"dataset", "num_workers", "dropout", "attention"}
# Options in which runs of several seeds may differ: the seed, and what changes no result.
FREE_OF_SEEDS = {"seed", "run_dir", "device", "num_workers", "checkpoint_every"}


# ------------------------------------------------------------------------------------------- parser


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises BadInput, as the rest of the program does."""

    def error(self, message: str) -> typing.NoReturn:
        """Called by argparse."""
        raise BadInput(f"{message}; see --help")


def option_fields(groups: Groups = GROUPS) -> dict[str, Any]:
    """The dataclass field of each option, by name."""
    return {f.name: f for group in groups.values() for config in group for f in fields(config)}


def type_of(f: Any) -> type:
    """int for a field of type int or int | None, tuple for one of several values."""
    kind = next(t for t in (typing.get_args(f.type) or (f.type,)) if t is not type(None))
    return typing.get_origin(kind) or kind


def add_option(group: Any, f: Any, default: Any) -> None:
    """Adds the flag of a field to a group of a parser. default: what --help shows."""
    kind, name, limits = type_of(f), format_flag(f.name), f.metadata
    text = limits["help"].replace("%", "%%")
    if kind is bool:
        action = argparse.BooleanOptionalAction if limits.get("negatable") else "store_true"
        shown = f" (default: {'yes' if default else 'no'})" if limits.get("negatable") else ""
        group.add_argument(name, action=action, help=text + shown)
    elif limits.get("many"):
        group.add_argument(name, metavar="RECORD", nargs="+", help=text)
    else:
        metavar = {int: "N", float: "X"}.get(kind, f.name.split("_")[-1].upper())
        metavar = limits.get("metavar", metavar)
        if "choices" in limits:
            metavar = "{" + ",".join(limits["choices"]) + "}"
        default = limits.get("unset") if default is None else default
        shown = f" (default: {default})" if default is not None else ""
        group.add_argument(name, metavar=metavar, help=text + shown)


def build_parser(groups: Groups = GROUPS) -> Parser:
    """One flag for each field of the settings classes; a flag that is not given is absent."""
    parser = Parser(
        usage="%(prog)s [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 30, 100),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"rhea {VERSION}")
    defaults = vars(resolve({})) | {"model": "the values shown below"}
    for title, configs in groups.items():
        group = parser.add_argument_group(title)
        for f in (f for config in configs for f in fields(config)):
            add_option(group, f, defaults.get(f.name))
    return parser


def parse_args(
    argv: list[str] | None = None, groups: Groups = GROUPS
) -> tuple[dict[str, Any], list[str]]:
    """The options given, by field name in their own types, and a line for each that is invalid.

    Raises BadInput at once if there is an option that does not exist: what it meant is unknown.
    """
    known = option_fields(groups)
    namespace, unknown = build_parser(groups).parse_known_args(argv)
    given, problems = {}, []
    for name, text in vars(namespace).items():
        f, kind = known[name], type_of(known[name])
        try:
            value = text if kind is bool else kind(text)  # of several values, a tuple
            if value != value or value == "":
                raise ValueError
        except ValueError:
            wanted = {int: "a whole number", float: "a number", str: "a name"}[kind]
            problems.append(f"{format_flag(name)} {text}: give {wanted}")
            continue
        problem = limit_problem(name, value, f.metadata, text) or encoding_problem(name, value)
        given |= {} if problem else {name: value}
        problems += [problem] if problem else []
    misspelled = unknown_options(unknown, known)
    if misspelled:
        raise BadInput(*misspelled, *problems)
    return given, problems


def value_problems(name: str, value: Any) -> list[str]:
    """What is wrong with an option that Python gives, a line each."""
    f = option_fields().get(name)
    if f is None:
        near = near_flags(format_flag(name), list(map(format_flag, option_fields())))
        hint = f"did you mean {near[0][2:].replace('-', '_')}?" if near else "see main.py --help"
        return [f"{name}: no such option; {hint}"]
    kind = type_of(f)
    if value is None and f.default is None:
        return []
    fits = isinstance(value, int | float if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        return [f"{name}={value!r}: give a value of type {kind.__name__}"]
    return list(filter(None, [limit_problem(name, value, f.metadata, str(value))]))


def encoding_problem(name: str, value: Any) -> str | None:
    """A line about a value that the locale could not decode."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return f"{format_flag(name)} {value!a}: not UTF-8; rename it, or set PYTHONUTF8=1"
    return None


def unknown_options(words: list[str], known: dict[str, Any]) -> list[str]:
    """A line for each option or bare word that argparse did not recognize."""
    flags = [format_flag(name) for name in known]
    flags += [format_flag(f"no_{name}") for name, f in known.items() if f.metadata.get("negatable")]
    lines, before = [], ""
    for word in words:
        name = word.split("=")[0]
        if name.startswith("-"):
            near = near_flags(name, flags)
            hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
            lines.append(f"{name}: no such option; {hint}")
        elif not before.startswith("-") or "=" in before:  # else it is the value of that option
            hint = "run main.py without options to train and test, or see --help"
            if Path(word).exists():
                hint = f"to train on it, give --dataset {word}"
            lines.append(f"{word}: not an option; {hint}")
        before = word
    return lines


def near_flags(name: str, flags: list[str]) -> list[str]:
    """The flags that a misspelled or shortened one may stand for; none if none is near."""
    name = name.lower().replace("_", "-")
    longer = [flag for flag in flags if len(name) > 4 and flag.startswith(name)]
    return longer[:3] or difflib.get_close_matches(name, flags, 1, 0.8)


# ------------------------------------------------------------------------------------------ options


def resolve(given: dict[str, Any]) -> SimpleNamespace:
    """Every option: as given, else by the recipe, else by the model's size, else the default."""
    defaults = {name: f.default for name, f in option_fields().items()}
    workload = WORKLOADS.get(given.get("workload"))
    dataset = given.get("dataset", (workload or defaults)["dataset"])
    task = given.get("task", RECIPES.get(dataset, {}).get("task", defaults["task"]))
    recipe = (
        workload or RECIPES.get(dataset) or RECIPES[RECIPE_OF_TASK.get(task, defaults["dataset"])]
    )
    replaced = set(BATCH_LIMITS) if BATCH_LIMITS & given.keys() else set()
    if "model" in given:  # a size asked for by name is that whole size, without a recipe's changes
        replaced |= asdict(ModelConfig()).keys()
    recipe = {name: value for name, value in recipe.items() if name not in replaced}
    size = SIZES.get(given.get("model", recipe.get("model", defaults["model"])), ModelConfig())
    options = SimpleNamespace(**{**defaults, **asdict(size), **recipe, **given})
    if options.batch_tokens and not BATCH_LIMITS & given.keys():  # a batch holds any sentence
        options.batch_tokens = max(options.batch_tokens, options.max_length)
    if options.lr is None:
        options.lr = paper_lr(d_model=options.d_model, warmup_steps=options.warmup_steps)
    return options


def format_option(name: str, value: Any) -> str:
    """An option as on the command line: --lr 0.1, --lowercase or --no-lowercase."""
    if isinstance(value, bool):
        return format_flag(name if value else f"no_{name}")
    return f"no {format_flag(name)}" if value is None else f"{format_flag(name)} {value}"


def extract_config(config: type, options: SimpleNamespace) -> Any:
    """The settings object of one class, from all options."""
    return config(**{f.name: getattr(options, f.name) for f in fields(config)})


def option_problems(options: SimpleNamespace, given: dict[str, Any]) -> list[str]:
    """A line for each combination of options that cannot work."""
    configs = [extract_config(config, options) for group in GROUPS.values() for config in group]
    problems = [line for c in configs if hasattr(c, "problems") for line in c.problems()]
    if options.overwrite and options.run_dir is None:
        problems.append("--overwrite: name the run to replace with --run-dir")
    if given.get("naive_bayes") and options.task != "classification":
        problems.append("--naive-bayes: only for --task classification; leave it out")
    if not trains_tokenizer(extract_config(TokenizerConfig, options), options.dataset):
        problems += [
            f"{format_flag(name)} {given[name]}: applies to a new tokenizer; add --train-tokenizer"
            for name in ("vocab_size", "lowercase")
            if name in given
        ]
    return problems


def command_problems(given: dict[str, Any], commands: list[str]) -> list[str]:
    """A line for each option that does not belong to the command, or for two commands."""
    problems = []
    if len(commands) > 1:
        problems.append(f"{' and '.join(map(format_flag, commands))}: give one of them")
    pairs = [("resume", other) for other in (*commands[:1], "overwrite", "init_from")]
    pairs += [*(("seeds", b) for b in (*commands, "resume", "seed")), ("init_from", "benchmark")]
    problems += [
        f"{format_flag(a)} and {format_flag(b)}: give one of the two"
        for a, b in pairs
        if {a, b} <= given.keys()
    ]
    problems += [
        f"{format_flag(name)}: only with {format_flag(command)}; add it, or leave this out"
        for command, names in ONLY_WITH.items()
        for name in names
        if name in given and command not in given
    ]
    if "seeds" in given and "run_dir" not in given:
        problems.append("--seeds: name the folder of the runs with --run-dir")
    if "export" in given and "to" not in given:
        problems.append(f"--export {given['export']}: name the new folder with --to")
    allowed = {
        "compare": {"compare", "figure", "allow_different_work"},
        "predict": INFERENCE_OPTIONS - {"num_workers", "bleu_tokenize"}
        | {"source_column", "columns"},
        "test_only": INFERENCE_OPTIONS | TEST_OPTIONS,
        "export": {"run_dir", "to", "beam_size", "length_penalty", *TEST_OPTIONS},
        "check_device": option_fields().keys() - {"run_dir", "overwrite", "init_from"},
    }
    for command in commands[:1]:
        problems += [
            f"{format_option(name, given[name])}: not for {format_flag(command)}; leave it out"
            for name in given
            if name not in allowed.get(command, given) and name not in ("resume", *commands)
        ]
    return problems


def parse_seeds(text: str) -> list[int]:
    """0-4 or 0,3,7 -> the seeds. Raises BadInput."""
    parts = [re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip()) for part in text.split(",")]
    if not all(parts):
        raise BadInput(f"--seeds {text}: give numbers, such as 0-4 or 0,3,7")
    seeds = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts]
    found = list(dict.fromkeys(chain.from_iterable(seeds)))
    if not found:
        raise BadInput(f"--seeds {text}: no seed; give the smaller number first")
    return found


def different_options(options: dict[str, Any], others: dict[str, Any]) -> list[str]:
    """The options, as on the command line, of a run that are not those of a run of another seed."""
    names = [name for name in option_fields() if name not in FREE_OF_SEEDS]
    return [format_option(n, options[n]) for n in names if options[n] != others[n]]


def saved_options(config: dict[str, Any], path: Any) -> dict[str, Any]:
    """The options in a run's config.json; an option that is not there has its default.

    Raises BadInput for an option that this version does not have.
    """
    known = option_fields()
    unknown = sorted(config["options"].keys() - known.keys())
    if unknown:
        raise BadInput(
            f"{path}: unknown option {', '.join(unknown)}; use the version of rhea that made the "
            "run, or train again"
        )
    defaults = {name: f.default for name, f in known.items()}
    for_this_call = {"resume", "overwrite", *COMMANDS, *chain.from_iterable(ONLY_WITH.values())}
    return {**defaults, **config["options"], **{name: defaults[name] for name in for_this_call}}
