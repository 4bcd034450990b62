"""One run, from a command line to a trained and tested model, or to what it asks for instead.

python main.py           trains and tests a Transformer on the embedded reviews, on the best device
python main.py --help    every option, with its unit and default
"""

import math
import os
import shlex
import signal
import statistics
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from comp_utils import (
    BadInput,
    RunFailed,
    Stopped,
    StopSignals,
    draw_attention,
    draw_confusion,
    draw_curves,
    flag,
    is_out_of_memory,
    machine_facts,
    pick_device,
    set_seed,
    set_up,
)
from data import (
    READERS,
    Batch,
    DataConfig,
    TextCodec,
    TextData,
    TokenizerConfig,
    as_codec,
    class_names,
    file_format,
    get_tokenizer,
    load_splits,
    read_lines,
    read_tokenizer,
)
from ddp_utils import (
    SharedError,
    agreed,
    broadcast,
    by_rank_0,
    is_lost_peer,
    local_rank,
    local_world_size,
    one_before_others,
    rank,
    world_size,
)
from decoding import EXTRA_LENGTH, DecodingConfig, Predictor, translation_scores
from measure import (
    TF32_TOLERANCE,
    TOLERANCES,
    as_record,
    benchmark,
    check_device,
    compare,
    record_in_words,
    work_fingerprint,
)
from models import ModelConfig, Transformer, TransformerClassifier, count_parameters
from procedures import Trainer, TrainingConfig, evaluate, in_words
from run_folder import RunFolder
from settings import (
    BUDGETS,
    FREE_IN_TEST,
    FREE_IN_USE,
    INSTEAD,
    SETTLED,
    WORKLOADS,
    check,
    parse_args,
    part,
    resolve,
    saved_options,
    spelled,
)

# -------------------------------------------------------------------------------------------- a run


def build_model(
    options: SimpleNamespace, codec: TextCodec, classes: list[str] | None
) -> Transformer | TransformerClassifier:
    """The model that the options describe, with fresh weights."""
    sizes = {"n_vocab": codec.n_vocab, "pad_id": codec.pad_id}
    sizes["max_len"] = max(options.max_length, options.pad_to) + EXTRA_LENGTH
    if classes is None:
        return Transformer(part(ModelConfig, options), **sizes)
    return TransformerClassifier(part(ModelConfig, options), n_classes=len(classes), **sizes)


def predictor_of(
    options: SimpleNamespace,
    model: nn.Module,
    codec: TextCodec,
    classes: list[str] | None,
    device: torch.device,
) -> Predictor:
    """The model, ready to answer texts as the options say."""
    return Predictor(
        model,
        codec,
        classes,
        max_length=options.max_length,
        batch_size=options.batch_size or 64,
        search=part(DecodingConfig, options),
        device=device,
        precision=options.precision,
    )


def trainer_of(
    options: SimpleNamespace,
    model: nn.Module,
    data: TextData,
    folder: RunFolder,
    device: torch.device,
    signals: StopSignals,
) -> Trainer:
    """The trainer of a model, as the options say."""
    return Trainer(
        model,
        data,
        part(TrainingConfig, options),
        folder,
        device=device,
        precision=options.precision,
        seed=options.seed,
        compiled=options.compile,
        signals=signals,
    )


def own_device(options: SimpleNamespace) -> torch.device:
    """The device of this process."""
    mine = {"local_rank": local_rank(), "local_world_size": local_world_size()}
    device = pick_device(options.device, options.precision, **mine)
    set_up(device, tf32=options.tf32, deterministic=options.deterministic)
    return device


def begin(
    given: dict[str, Any], problems: list[str]
) -> tuple[SimpleNamespace, torch.device, RunFolder]:
    """The options, the device and the folder of something new. Nothing is written yet."""
    options = resolve(given)
    questions = [
        lambda: own_device(options),
        lambda: RunFolder.plan(options.run_dir, options.dataset, options.overwrite),
    ]
    device, folder = agreed(lambda: check(options, given, problems, *questions))
    set_seed(options.seed)
    return options, device, broadcast(folder)  # whose name may be the time


def facts_of(
    options: SimpleNamespace, data: TextData, model: nn.Module, device: torch.device
) -> dict[str, Any]:
    """What config.json and records say beside the options."""
    plan = data.plan_fingerprint(options.seed)
    return {
        "classes": data.classes,
        "parameters": count_parameters(model),
        "data_fingerprint": data.fingerprint,
        "plan_fingerprint": plan,
        "work_fingerprint": work_fingerprint(plan, part(ModelConfig, options), options.r_drop),
        "processes": world_size(),
        **machine_facts(device),
    }


def train_and_test(given: dict[str, Any], problems: list[str]) -> None:
    """One run, new or resumed, from text to test result."""
    config, changes = None, []
    if given.get("resume"):
        folder, config, options, changes = resumed(given, problems)
        (device,) = agreed(lambda: check(options, {}, [], lambda: own_device(options)))
        set_seed(options.seed)
    else:
        options, device, folder = begin(given, problems)
    data = load_data(options, folder if config else None)
    model = build_model(options, data.codec, data.classes).to(device)
    facts = facts_of(options, data, model, device)
    if config:
        agreed(lambda: check_same_data(options, config, facts))
    with StopSignals() as signals, folder.locked():
        predictor = predictor_of(options, model, data.codec, data.classes, device)
        trainer = trainer_of(options, model, data, folder, device, signals)
        trainer.inspect = partial(inspect, predictor, data, options.epochs)
        if config:
            tested = take_up(trainer, folder)
        else:
            tested = False
            folder.clear()
            folder.write_tokenizer(data.codec.tokenizer.to_str(pretty=True))
        state = trainer.state
        if trainer.is_over and tested:
            print(
                f"nothing to do: the run in {folder.path} is finished, with {state.epoch - 1} "
                f"epochs and {state.step} updates; more --epochs would go on with it"
            )
            return
        folder.write_config({"options": vars(options), **facts})
        print_facts(options, data, facts, folder)
        if config:
            words = f"; {', '.join(changes)}" if changes else ""
            print(f"goes on after update {state.step}, in epoch {state.epoch}{words}", flush=True)
        title = f"{options.dataset}, {facts['parameters'] / 1e6:.1f} M parameters"
        try:
            trainer.train()
            draw_run(folder, title)
            test(predictor, data, folder, step=trainer.state.step)
        except (Stopped, RunFailed) as error:
            if trainer.saved_step is not None and (folder.path / folder.LAST).is_file():
                error.add_note(f"update {trainer.saved_step} is kept; go on: {go_on(folder)}")
            with suppress(BadInput, RunFailed):  # what is to be told is why the run ended
                draw_run(folder, title)
            raise
        if rank() == 0:
            print_epoch_seconds(folder)
    print(f"run folder: {folder.path}")


def load_data(options: SimpleNamespace, folder: RunFolder | None) -> TextData:
    """The data set as ids, by the tokenizer of a run's folder, or by the one the options ask for.

    Of many processes rank 0 trains or reads the tokenizer, and one of each machine makes ready the
    rows that all read.
    """
    config, tokenizer = part(DataConfig, options), part(TokenizerConfig, options)
    classifies = options.task == "classification"
    columns = ["source"] if classifies else ["source", "target"]
    splits = one_before_others(lambda: load_splits(config))

    def get_codec() -> str:
        if folder:
            codec = read_tokenizer(str(folder.path / folder.TOKENIZER))
        else:
            codec = get_tokenizer(tokenizer, options.dataset, splits["train"], columns)
        return codec.tokenizer.to_str()

    def encode() -> TextData:
        if len(splits["train"]) < world_size():
            n = len(splits["train"])
            raise BadInput(
                f"--dataset {options.dataset}: {n} training sentences for {world_size()} "
                f"processes; start at most {n}"
            )
        return TextData(config, splits, codec, class_names(splits) if classifies else None)

    codec = as_codec(Tokenizer.from_str(by_rank_0(get_codec)))
    return one_before_others(encode)


def print_facts(
    options: SimpleNamespace, data: TextData, facts: dict[str, Any], folder: RunFolder | None
) -> None:
    """What a run is about to do, and where; folder: None if nothing will be written."""
    classes = data.classes
    targets = ", ".join(c[:20] for c in classes[:10]) if classes else options.target_column
    processes = f"{facts['processes']} processes of " if facts["processes"] > 1 else ""
    print(
        f"{facts['device_name']} ({facts['device']}), {processes}{facts['threads']} threads, "
        f"torch {facts['torch']}, {options.precision}\n"
        f"{options.task}, {options.dataset}: {options.source_column} -> {targets}"
    )
    for split in data.rows:
        print("  " + data.report(split))
    print(
        f"tokenizer of {data.codec.n_vocab:,} tokens; model of {facts['parameters']:,} parameters\n"
        f"batch plan {facts['plan_fingerprint']}{f'; run folder {folder.path}' if folder else ''}",
        flush=True,
    )


def check_same_data(
    options: SimpleNamespace, config: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Raises BadInput if the data of a run are not those that it began with."""
    for name in ("classes", "data_fingerprint", "plan_fingerprint"):
        if facts[name] != config.get(name):
            raise BadInput(
                f"--resume: {options.dataset} is not as it was when the run began (its "
                f"{name.replace('_', ' ')} is another); put the data back, or begin a new run"
            )


def go_on(folder: RunFolder) -> str:
    """The command that goes on with a run."""
    more = ["--resume", "--run-dir", str(folder.path)]
    if world_size() > local_world_size():
        return f"torchrun as before on each machine, with {shlex.join(more)}"
    n = ["--world-size", str(world_size())] if world_size() > 1 else []
    return shlex.join(["python", sys.argv[0], *n, *more])


def draw_run(folder: RunFolder, title: str) -> None:
    """The curves of a run."""
    if rank() == 0:
        with folder.picture(folder.CURVES) as out:
            draw_curves(folder.read_metrics(), out, title)


def resumed(
    given: dict[str, Any], problems: list[str]
) -> tuple[RunFolder, dict[str, Any], SimpleNamespace, list[str]]:
    """The folder of a run, its config.json, its options with those given, and what these change."""
    folder = by_rank_0(lambda: RunFolder.find(given.get("run_dir")))
    config = folder.read_config()
    saved = saved_options(folder, config)
    given = {name: value for name, value in given.items() if name not in ("run_dir", "resume")}
    changed = {name: value for name, value in given.items() if value != saved[name]}
    problems = problems + [
        f"{spelled(name, value)}: the run in {folder.path} has {saved[name]}, and with another it "
        "would be another run; leave it out, or begin a new run"
        for name, value in changed.items()
        if name in SETTLED
    ]
    if "overwrite" in given:
        problems.append("--resume and --overwrite: give one of the two")
    (_,) = agreed(lambda: check(SimpleNamespace(**saved), {}, problems, lambda: None))
    changes = [f"{spelled(name, value)} (was {saved[name]})" for name, value in changed.items()]
    options = SimpleNamespace(**{**saved, **changed, "run_dir": str(folder.path)})
    return folder, config, options, changes


def take_up(trainer: Trainer, folder: RunFolder) -> bool:
    """Brings trainer and folder to the last checkpoint, or to the beginning if there is none.

    Returns whether the model of that checkpoint was tested already.
    """
    checkpoint = folder.load_checkpoint()
    if checkpoint:
        trainer.restore(checkpoint)
        if trainer.state.best_epoch and trainer.config.average_checkpoints == 1:
            # Or it would be found out after the last epoch.
            agreed(lambda: folder.read_weights(trainer.model) if rank() == 0 else None)
    tests = folder.rewind_metrics(checkpoint)
    return any(event.get("step") == trainer.state.step for event in tests)


def print_epoch_seconds(folder: RunFolder) -> None:
    """How long an epoch of training takes: the median of whole ones, or reckoned from a part."""
    epochs = [m for m in folder.read_metrics() if m["event"] == "epoch"]
    whole = [m["seconds"] for m in epochs if m["updates"] == m["updates_of_an_epoch"]]
    if whole:
        print(
            f"one training epoch: {statistics.median(whole):.2f} s, the median of {len(whole)} "
            f"({min(whole):.2f} to {max(whole):.2f})"
        )
    else:
        n, n_whole, seconds = (epochs[0][k] for k in ("updates", "updates_of_an_epoch", "seconds"))
        print(
            f"{n} of the {n_whole} updates of a training epoch: {seconds:.2f} s; a whole one would "
            f"take about {seconds * n_whole / n:.0f} s"
        )


def inspect(predictor: Predictor, data: TextData, n_epochs: int, epoch: int) -> dict[str, float]:
    """Shows two validation sentences translated; ten times in a run, BLEU by greedy search."""
    if data.classes:
        return {}
    scored = epoch % math.ceil(n_epochs / 10) == 0 or epoch == n_epochs
    rows = data.texts["validation"][: None if scored else 2]
    search = replace(predictor.search, beam_size=1)
    answers = replace(predictor, search=search).answers(rows["source"])
    hypotheses = [answer[0] if answer else "" for answer in answers]
    if rank() > 0:
        return {}
    for texts in list(zip(rows["source"], rows["target"], hypotheses))[:2]:
        for name, text in zip(("source", "reference", "hypothesis"), texts):
            print(f"  {name:<11} {textwrap.shorten(text, 200, placeholder=' …')}")
    return {"bleu": translation_scores(hypotheses, rows["target"])["bleu"]} if scored else {}


def test(predictor: Predictor, data: TextData, folder: RunFolder, **facts: Any) -> None:
    """The test split: scores, with facts, to the screen and metrics.jsonl, and a picture."""
    name, device, precision = data.config.dataset, predictor.device, predictor.precision
    result = evaluate(predictor.model, data, "test", device=device, precision=precision)
    scores = result.scores
    if not data.classes:
        scores |= test_translations(predictor, data, folder)
    elif rank() == 0:
        title = f"{name}, test split: accuracy {result.accuracy:.2%}"
        with folder.picture(folder.CONFUSION) as out:
            draw_confusion(result.confusion, data.classes, out, title)
    n = len(data.texts["test"])
    folder.log(event="test", dataset=name, sentences=n, **facts, **scores)
    print(f"test of {n:,} sentences: {in_words(scores)}")


def test_translations(predictor: Predictor, data: TextData, folder: RunFolder) -> dict[str, Any]:
    """Translates the test split, writes it down, draws what the model looked at, and scores it."""
    rows = data.texts["test"][:]
    hypotheses = [answer[0] if answer else "" for answer in predictor.answers(rows["source"])]
    if rank() > 0:
        return {}
    folder.write_lines(folder.HYPOTHESES, hypotheses)
    folder.write_lines(folder.REFERENCES, rows["target"])
    # Four sentences long enough to be of interest and short enough to be read.
    lengths = data.lengths["test"].max(axis=1)
    drawn = np.argsort(abs(lengths - 16), kind="stable")[:4].tolist()
    maps = [predictor.attention(rows["source"][i], hypotheses[i]) for i in drawn]
    title = f"{data.config.dataset}, test split, last decoder layer"
    with folder.picture(folder.ATTENTION) as out:
        draw_attention(maps, out, title)
    scores = translation_scores(hypotheses, rows["target"])
    return {"beam_size": predictor.search.beam_size, **scores}


# ---------------------------------------------------------------------------------- a trained model


def use(given: dict[str, Any], problems: list[str]) -> None:
    """Tests, or predicts with, the model of a run folder."""
    testing = "test_only" in given
    folder = by_rank_0(lambda: RunFolder.find(given.get("run_dir"), RunFolder.WEIGHTS))
    config = folder.read_config()
    budget = dict.fromkeys(BUDGETS) if BUDGETS & given.keys() else {}
    options = SimpleNamespace(**{**saved_options(folder, config), **budget, **given})
    free = FREE_IN_USE | (FREE_IN_TEST if testing else set())
    problems = problems + [
        f"{spelled(name, value)}: is settled by the run in {folder.path}; leave it out"
        for name, value in given.items()
        if name not in free
    ]
    if options.predict == "-" and world_size() > 1:
        problems.append("--predict -: standard input goes to one process; name a file")
    (device,) = agreed(lambda: check(options, {}, problems, lambda: own_device(options)))
    tokenizer = folder.path / folder.TOKENIZER
    text = by_rank_0(lambda: read_tokenizer(str(tokenizer)).tokenizer.to_str())
    codec, classes = as_codec(Tokenizer.from_str(text)), config["classes"]
    model = build_model(options, codec, classes).to(device)
    folder.load_weights(model)
    predictor = predictor_of(options, model, codec, classes, device)
    if testing:
        config = part(DataConfig, options)
        splits = one_before_others(lambda: load_splits(config, ["test"]))
        data = one_before_others(lambda: TextData(config, splits, codec, classes))
        print(data.report("test"))
        with folder.locked():
            test(predictor, data, folder)
    else:
        predict(predictor, options.predict)


def predict(predictor: Predictor, name: str) -> None:
    """A line for each line of a file, in order; a blank one for a blank one."""
    if file_format(Path(name)) in READERS:
        words = "each line is answered as one text, its columns and first line as well"
        print(f"warning: {name}: {words}", file=sys.stderr)
    lines = (line.rstrip("\r\n") for _, line in read_lines(name))
    # A person who types waits for each answer; a file is faster in large portions.
    typed = name == "-" and sys.stdin.isatty()
    n_blank = n_cut = 0
    answers = predictor.answers(lines, at_once=1 if typed else 4096)
    for answer in tqdm(answers, unit=" lines", disable=True if typed else None, leave=False):
        text, length = answer or ("", 0)
        n_blank += answer is None
        n_cut += length > predictor.max_length
        print(text, flush=typed)
    if n_blank:
        print(f"warning: blank lines: {n_blank}, answered with blank lines", file=sys.stderr)
    if n_cut:
        longest = predictor.max_length
        print(f"warning: lines cut to {longest} tokens: {n_cut}", file=sys.stderr)


def run(given: dict[str, Any], problems: list[str]) -> None:
    """What the command line asks for. problems: what is wrong with it already."""
    asked = [name for name in INSTEAD if name in given]
    if len(asked) > 1:
        problems.append(f"{' and '.join(map(flag, asked))}: give one of them")
    if "compare" not in given:
        problems += [
            f"{flag(name)}: is for what --compare names; add it"
            for name in ("figure", "allow_different_work")
            if name in given
        ]
    if "resume" in given and asked:
        problems.append(f"--resume and {flag(asked[0])}: give one of the two")
    if len(asked) > 1 or ("resume" in given and asked):
        agreed(lambda: check(resolve({}), {}, problems))
    if not asked:
        train_and_test(given, problems)
    elif asked[0] in ("test_only", "predict"):
        use(given, problems)
    elif asked[0] == "compare":
        compare_records(given, problems)
    else:
        measure(given, problems)


def compare_records(given: dict[str, Any], problems: list[str]) -> None:
    """Prints the records named, and draws them."""
    free = {"compare", "figure", "allow_different_work"}
    problems = problems + [
        f"{flag(name)}: has no meaning with --compare; leave it out"
        for name in given
        if name not in free
    ]
    rest = (given.get("figure"), "allow_different_work" in given)
    question = partial(compare, given["compare"], *rest)
    (table,) = agreed(lambda: check(resolve({}), {}, problems, question))
    print(table)


def measure(given: dict[str, Any], problems: list[str]) -> None:
    """Times updates, or holds a device against the CPU. Raises RunFailed if they do not agree."""
    if "check_device" in given:
        problems = problems + [
            f"{flag(name)}: --check-device writes nothing; leave it out"
            for name in ("run_dir", "overwrite")
            if name in given
        ]
        given = {k: v for k, v in given.items() if k not in ("run_dir", "overwrite")}
    options, device, folder = begin(given, problems)
    data = load_data(options, None)
    model = build_model(options, data.codec, data.classes).to(device)
    facts = facts_of(options, data, model, device)
    config = part(ModelConfig, options)
    print_facts(options, data, facts, None if options.check_device else folder)
    if options.check_device:
        written_out = SimpleNamespace(**{**vars(options), "attention": "list"})
        reference = build_model(written_out, data.codec, data.classes)
        plan = data.longest_first("train", data.plan("train", seed=options.seed, epoch=1))
        (batch,) = data.batches("train", plan[len(plan) // 2 :][:1], torch.device("cpu"))
        check_against_cpu(options, model, reference, batch, device)
        return
    with StopSignals() as signals, folder.locked():
        folder.clear()
        folder.write_tokenizer(data.codec.tokenizer.to_str(pretty=True))
        folder.write_config({"options": vars(options), **facts})
        trainer = trainer_of(options, model, data, folder, device, signals)
        n_out = len(data.classes) if data.classes else data.codec.n_vocab
        figures = benchmark(trainer, config, options.benchmark, n_out=n_out)
        named = WORKLOADS.get(options.workload, {})
        changed = any(getattr(options, name) != value for name, value in named.items())
        workload = f"{options.workload}, changed" if changed else options.workload
        record = as_record(figures, facts, options, config) | {"workload": workload}
        folder.write_benchmark(record)
    print(f"{record_in_words(record)}\nrecord: {folder.path / folder.BENCHMARK}")


def check_against_cpu(
    options: SimpleNamespace,
    model: nn.Module,
    reference: nn.Module,
    batch: Batch,
    device: torch.device,
) -> None:
    """Prints the largest differences and a verdict. Raises RunFailed."""
    tolerance = TF32_TOLERANCE if options.tf32 else TOLERANCES[options.precision]
    shares, agrees = check_device(
        model,
        reference,
        batch,
        device=device,
        precision=options.precision,
        tolerance=tolerance,
        label_smoothing=options.label_smoothing,
    )
    n, l_z = batch.src.shape
    print(
        f"{n} sentences of {l_z} source and {batch.tgt_in.shape[1]} target tokens, "
        f"{options.attention} attention in {options.precision} on {device}, against list attention "
        "in fp32 on the CPU\nlargest difference, as a share of the reference's largest number:"
    )
    known = [(name, share) for name, share in shares if name in ("loss", "logits")]
    rest = [(name, share) for name, share in shares if name not in ("loss", "logits")]
    for name, share in [*known, *rest[:5]]:
        print(f"  {share:.1e}  {name}")
    print(f"  {len(rest) - 5} more gradients differ less")
    if not agrees:
        name, share = shares[0]
        raise RunFailed(
            f"{device} does not compute what the CPU does: {name} differs by {share:.1e}, and "
            f"{tolerance:.0e} is allowed in {options.precision}"
        )
    print(f"they agree: all within {tolerance:.0e}")


def with_notes(error: BaseException) -> str:
    """What an error says, and what to do about it."""
    return "; ".join([str(error), *getattr(error, "__notes__", ())])


def complain(*lines: str) -> None:
    """To standard error, where other ranks than the first have their number and no other words."""
    who, out = (f"rank {rank()}: ", sys.__stderr__) if rank() > 0 else ("", sys.stderr)
    for line in lines:
        print(f"error: {who}{line}", file=out, flush=True)


def exit_status(action: Callable[[], Any]) -> int:
    """Of a program that does this: 0 done, 2 the command line or data cannot work, 1 failed, 130 or
    143 stopped. What there is to say goes to standard error."""
    try:
        action()
    except BadInput as error:
        if rank() == 0 or not isinstance(error, SharedError):
            complain(*error.lines)
        return 2
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RunFailed, OSError) as error:
        complain(with_notes(error))
        return 1
    except (RuntimeError, MemoryError) as error:
        if is_lost_peer(error):
            complain("another process of the run has gone, so this one ends as well")
        elif is_out_of_memory(error):
            complain(f"out of memory ({error}); give a smaller --batch-size")
        else:
            raise
        return 1
    except KeyboardInterrupt as error:
        error.args = ("stopped",)
        if rank() == 0:
            print(f"\n{with_notes(error)}", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Does what the command line says. Returns the exit status."""
    return exit_status(lambda: run(*parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
