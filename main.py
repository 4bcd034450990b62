"""One run, from a command line to a trained and tested model, or another command in its place.

python main.py           trains and tests a Transformer on the embedded reviews, on the best device
python main.py --help    every option, with its unit and default
"""

from errors import exit_on_signals

if __name__ == "__main__":  # torch takes a second to import, and Ctrl-C must not show a traceback
    exit_on_signals()

import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from comp_utils import is_out_of_memory, say, set_seed, set_up_output, warn
from config import DataConfig, format_flag
from data import TextData
from ddp_utils import (
    broadcast,
    broadcast_from_rank_zero,
    is_connection_error,
    local_rank_zero_first,
    local_world_size,
    raise_if_stopped,
    raise_on_all_ranks,
    rank,
    world_size,
)
from errors import BadInput, RunFailed, SharedError, Stopped, StopSignals
from figures import draw_curves
from jobs import Job, build_model, load_job, own_device, raise_problems
from measure import benchmark, check_device, device_report, record_in_words
from predict import predict
from prepare import (
    changed_options,
    check_same_data,
    first_weights,
    options_of_seeds,
    origin_of,
    prepare,
    resolve_run,
    restore_threads,
    say_facts,
)
from procedures import Trainer
from records import append_command, as_record, compare
from reports import curve_marks, drawing, epoch_seconds, inspect, test, test_splits
from run_folder import RunFolder
from scoring import scores_of_runs, warn_if_not_reversible
from settings import (
    COMMANDS,
    INFERENCE_OPTIONS,
    command_problems,
    extract_config,
    parse_args,
    parse_seeds,
)
from splits import CUT, check_labels, embedded, load_splits
from tables import TABLE_FORMATS, file_format

# ----------------------------------------------------------------------------------- train and test


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Rank 0 holds the lock of the folder in this block. Raises BadInput on all ranks."""
    with ExitStack() as stack:
        with raise_on_all_ranks():
            if rank() == 0:
                stack.enter_context(folder.locked())
        yield


def train_and_test(given: dict[str, Any], problems: list[str], signals: StopSignals) -> None:
    """A new run, from text to test result."""
    origin = origin_of(given, problems)
    options, device, folder = resolve_run(given, problems)
    job = prepare(options, device, origin, given)
    first_weights(job)
    with locked(folder):
        begin(job, folder)
        say_facts(job, folder)
        if rank() == 0 and not job.classes:
            warn_if_not_reversible(job.codec, job.data.texts["validation"][:1000]["target"])
        finish_run(job, job.trainer(folder, signals, partial(inspect, job)), folder, signals)


def begin(job: Job, folder: RunFolder) -> None:
    """Writes what a run begins with."""
    if rank() == 0:
        folder.clear()
        folder.write_text(folder.TOKENIZER, job.codec.tokenizer.to_str(pretty=True))
        folder.write_config({"options": vars(job.options), **job.facts})


def resume(given: dict[str, Any], problems: list[str], signals: StopSignals) -> None:
    """Continues a run from its last checkpoint to its test result."""
    folder = broadcast_from_rank_zero(RunFolder.find, given.get("run_dir"))
    config = broadcast_from_rank_zero(folder.read_config)
    options, changes = changed_options(given, problems, folder, config)
    with raise_on_all_ranks():
        device = own_device(options)
    restore_threads(config)
    set_seed(options.seed)
    job = prepare(options, device, tokenizer_of=folder)
    with raise_on_all_ranks():
        check_same_data(options, config, job.facts)
    with locked(folder):
        trainer, checkpoint, tests = job.trainer(folder, signals, partial(inspect, job)), None, []
        with raise_on_all_ranks():
            if rank() == 0:
                checkpoint = folder.load_checkpoint()
                tests = folder.rewind_metrics(checkpoint)
        trainer.resume(checkpoint)
        if trainer.saved_step is None:  # the run was killed before its first checkpoint
            first_weights(job)
        del checkpoint  # its tensors are mapped from the file, which is about to be replaced
        state = trainer.state
        n_tested = broadcast(sum(event.get("step") == state.step for event in tests))
        is_tested = n_tested >= len(test_splits(job.data))
        if (is_tested and trainer.is_finished) or state.step > (options.max_steps or math.inf):
            say(
                f"nothing to do: the run in {folder.path} has {state.step} steps and "
                f"{state.epoch - 1} whole epochs; give more --epochs or --max-steps to continue"
            )
            return
        if rank() == 0:
            folder.write_config({"options": vars(options), **job.facts})
        say_facts(job, folder)
        say("; ".join([f"resumed from step {state.step}, in epoch {state.epoch}", *changes]))
        finish_run(job, trainer, folder, signals)


def finish_run(job: Job, trainer: Trainer, folder: RunFolder, signals: StopSignals) -> None:
    """Trains from the trainer's state to the end, and tests."""
    title = f"{job.options.dataset}, {job.facts['parameters'] / 1e6:.1f} M parameters"
    signals.hold = world_size() > 1  # ranks stop together, where they agree to
    try:
        trainer.train()
        test(job, folder, step=trainer.state.step)
        raise_if_stopped(signals)
    except (Stopped, RuntimeError) as error:
        if trainer.saved_step is not None and (folder.path / folder.LAST).is_file():
            command = resume_command(folder)
            error.add_note(f"step {trainer.saved_step} is saved; resume with: {command}")
        raise
    finally:
        if rank() == 0:
            with drawing(folder, folder.CURVES) as out:
                draw_curves(folder.read_metrics(), out, title, **curve_marks(job, trainer))
        signals.hold = False
    if rank() == 0:
        say(epoch_seconds(folder), f"run folder: {folder.path}")


def train_seeds(given: dict[str, Any], problems: list[str], signals: StopSignals) -> None:
    """A run for each seed, in folders of --run-dir; one that is there is resumed, or is done. Then
    their models are tested together."""
    given, root = dict(given), Path(given["run_dir"]).expanduser()
    seeds = parse_seeds(given.pop("seeds"))
    folders = [RunFolder(root / f"seed-{seed}") for seed in seeds]
    is_there = [
        "overwrite" not in given and broadcast_from_rank_zero((f.path / f.CONFIG).is_file)
        for f in folders
    ]
    with raise_on_all_ranks():
        if (root / RunFolder.CONFIG).exists():
            raise BadInput(f"--run-dir {root}: holds a run itself; give a folder for one a seed")
    given |= options_of_seeds(given, [f for f, there in zip(folders, is_there) if there])
    for i, (seed, folder, there) in enumerate(zip(seeds, folders, is_there)):
        own = {**given, "run_dir": str(folder.path)}
        say(f"seed {seed}")
        try:
            if there:
                resume({**own, "resume": True}, [*problems], signals)
            else:
                train_and_test({**own, "seed": seed}, [*problems], signals)
        except Stopped as error:
            rest = ", ".join(map(str, seeds[i + 1 :])) or "none"
            error.add_note(f"seeds left: {rest}; repeat the --seeds command to continue")
            raise
    with raise_on_all_ranks():
        tests = [folder.read_tests() if rank() == 0 else [{}] for folder in folders]
        if not all(tests):
            raise BadInput(f"--seeds: a run in {root} has no test result; train it to its end")
    if rank() == 0:
        say(f"seeds {', '.join(map(str, seeds))}: mean ± standard deviation (each)")
        say(*scores_of_runs(tests))
    if len(seeds) > 1:
        used = {name: given[name] for name in given.keys() & INFERENCE_OPTIONS}
        test_only({**used, "run_dir": str(root), "test_only": True}, [*problems], signals, folders)


def resume_command(folder: RunFolder) -> str:
    """The command line that resumes a run."""
    more = ["--resume", "--run-dir", str(folder.path)]
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    if world_size() > local_world_size():
        return f"torchrun as before on each machine, with {join(more)}"
    n = ["--world-size", str(world_size())] if world_size() > 1 else []
    return join(["python", sys.argv[0], *n, *more])


# ------------------------------------------------------------------------------------- use a model


def test_only(
    given: dict[str, Any],
    problems: list[str],
    signals: StopSignals,
    folders: list[RunFolder] | None = None,
) -> None:
    """Tests the model of a run folder, or those of several. folders: as `load_job` takes them."""
    job, folder = load_job(given, problems, folders)
    config = extract_config(DataConfig, job.options)
    with local_rank_zero_first():
        splits = load_splits(config, ["test"])
        if job.classes:
            check_labels(splits.tables, job.classes)
    with local_rank_zero_first():
        job.data = TextData(config, splits.tables, job.codec, job.classes)
    notes = [] if config.dataset in embedded() else [splits.summary, *splits.notes]
    if "dataset" in given and splits.sources.get("test") == [CUT]:
        notes.append("only the tenth that training would cut out; to test all, name the file test")
    say(*notes, *map(job.data.report, job.data.rows))
    with locked(folder):
        test(job, folder, is_own="dataset" not in given)


def answer(given: dict[str, Any], problems: list[str], signals: StopSignals) -> None:
    """Answers each line of a file with the model of a run folder."""
    name, source_column = given["predict"], given.get("source_column")
    if name == "-" and "columns" in given:
        problems.append("--columns: standard input has lines, not columns; leave it out")
    elif source_column and not ("columns" in given or file_format(Path(name)) in TABLE_FORMATS):
        remedy = "leave it out" + ", or name the columns with --columns" * (name != "-")
        problems.append(f"--source-column {source_column}: {name} has lines; {remedy}")
    job, _ = load_job(given, problems)
    options, names = job.options, job.options.columns
    predict(
        job.predictor,
        options.predict,
        options.output if rank() == 0 else None,
        source_column=options.source_column,
        names=names.split(",") if names and "columns" in given else None,
    )


def export_model(given: dict[str, Any], problems: list[str], signals: StopSignals) -> None:
    """Writes the model of a run folder for another tool."""
    from export import export

    job, folder = load_job({**given, "device": "cpu", "precision": "fp32"}, problems)
    with raise_on_all_ranks():
        if world_size() > 1:
            raise BadInput("--export: not on many processes; use main.py")
    target = Path(job.options.to).expanduser()
    said = export(job, folder, job.options.export, target, needs_data="dataset" in given)
    say(said, f"exported to {target}")


# ----------------------------------------------------------------------------------------- measure


def time_steps(given: dict[str, Any], problems: list[str], signals: StopSignals) -> None:
    """Times training steps and writes a record."""
    options, device, folder = resolve_run(given, problems)
    job = prepare(options, device, given=given)
    say_facts(job, folder)
    with locked(folder):
        begin(job, folder)
        figures = benchmark(job.trainer(folder, signals), options.benchmark)
        record = as_record(figures, job.facts, vars(options))
        if rank() == 0:
            folder.write_text(folder.BENCHMARK, json.dumps(record, ensure_ascii=False) + "\n")
    path = folder.path / folder.BENCHMARK
    say(record_in_words(record), f"record: {path}; to share it: {append_command(path)}")


def check_against_cpu(given: dict[str, Any], problems: list[str], signals: StopSignals) -> None:
    """Compares a device with the CPU on one batch. Raises RunFailed if they differ."""
    options, device, _ = resolve_run(given, problems)
    job = prepare(options, device, given=given)
    say_facts(job, None)
    written_out = SimpleNamespace(**{**vars(options), "attention": "list"})
    reference = build_model(written_out, job.codec, job.classes)
    plan = job.data.largest_first("train", job.data.plan("train", seed=options.seed, epoch=1))
    (batch,) = job.data.load("train", plan[len(plan) // 2 :][:1], torch.device("cpu"))
    how = {"precision": options.precision, "label_smoothing": options.label_smoothing}
    if device.type == "cpu":
        warn("--check-device: the device is the CPU itself; only the attention differs")
    errors = check_device(job.model, reference, batch, device=device, **how)
    say(*device_report(errors, device, options.precision, options.tf32))


def compare_records(given: dict[str, Any], problems: list[str], signals: StopSignals) -> None:
    """Prints records of epoch times as a table, and draws them."""
    with raise_on_all_ranks():
        raise_problems(problems)
        table = compare(given["compare"], given.get("figure"), "allow_different_work" in given)
    say(table)


# ------------------------------------------------------------------------------------ command line

COMMAND_FUNCTIONS = {
    "compare": compare_records,
    "check_device": check_against_cpu,
    "benchmark": time_steps,
    "test_only": test_only,
    "predict": answer,
    "export": export_model,
}


def run(given: dict[str, Any], problems: list[str], signals: StopSignals) -> None:
    """Runs the command that the options ask for. problems: found in them so far."""
    commands = [name for name in COMMANDS if name in given]
    found = command_problems(given, commands)
    meant = [name for name in COMMANDS if any(p.startswith(format_flag(name)) for p in problems)]
    with raise_on_all_ranks():
        if found or commands or meant or {"resume", "seeds"} & given.keys():  # new runs check more
            raise_problems([*problems, *found])
    if "resume" in given:
        resume(given, problems, signals)
    elif "seeds" in given:
        train_seeds(given, problems, signals)
    elif commands:
        COMMAND_FUNCTIONS[commands[0]](given, problems, signals)
    else:
        train_and_test(given, problems, signals)


def with_notes(error: BaseException, message: str = "") -> str:
    """The message of an exception, or another, and its notes, on one line."""
    return "; ".join([message or str(error), *getattr(error, "__notes__", ())])


def say_error(*lines: str) -> None:
    """Errors on standard error; those of other ranks than 0 with their number."""
    who, out = (f"rank {rank()}: ", sys.__stderr__) if rank() > 0 else ("", sys.stderr)
    for line in lines:
        print(f"error: {who}{line}", file=out, flush=True)


def exit_status(action: Callable[[StopSignals], Any]) -> int:
    """Runs a program and reports its errors. Returns 0 for success, 2 for bad input, 1 for a failed
    run, 130 or 143 for one stopped by a signal."""
    set_up_output()
    try:
        with StopSignals() as signals:
            action(signals)
        sys.stdout.flush()
    except BadInput as error:
        if rank() == 0 or not isinstance(error, SharedError):
            say_error(*error.lines)
        return 2
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (RunFailed, OSError) as error:
        say_error(with_notes(error))
        return 1
    except (RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())[:500]
        if is_connection_error(error):
            text = f"the connection to another process failed, or that process ended: {text}"
        elif is_out_of_memory(error):
            text = f"out of memory ({text}); give a smaller --batch-size or --batch-tokens"
        else:
            raise
        say_error(with_notes(error, text))
        return 1
    except KeyboardInterrupt as error:
        error.args = ("stopped",)
        if rank() == 0:
            print(f"\n{with_notes(error)}", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs a command line. Returns the exit status."""
    return exit_status(lambda signals: run(*parse_args(argv), signals))


if __name__ == "__main__":
    sys.exit(main())
