"""Records of epoch times: read, selected, named, and compared in a table."""

import json
import math
import os
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from config import ASSETS, format_flag
from errors import BadInput
from measure import spread
from run_folder import RunFolder
from scoring import scores_of_runs
from settings import different_options, resolve, saved_options
from tables import shorten

Record = dict[str, Any]
# What earlier versions wrote.
OLD_KEYS = {
    **{"updates": "steps", "updates_of_an_epoch": "steps_per_epoch"},
    **{"warm_up_updates": "warm_up_steps", "seconds_per_update": "seconds_per_step"},
}
# The options that a record holds, and the types of the facts that are shown.
WORK = (
    *("dataset", "task", "batch_size", "batch_tokens", "pad_to", "max_length", "accumulate"),
    *("r_drop", "n_layers", "d_model", "d_ff", "n_heads", "d_attn", "d_mid", "dropout"),
    *("activation", "positions", "ensemble"),
)
WAY = ("attention", "precision", "compile", "tf32", "deterministic")
OPTIONS = ("workload", *WORK, *WAY, "label")
TEXTS = {"device_name", "work_fingerprint", "workload", "label", "processor_model", "attention"}
NUMBERS = {
    "processes",
    "runs",
    "threads",
    "cores",
    "n_layers",
    "batch_size",
    "batch_tokens",
    "pad_to",
}


# ------------------------------------------------------------------------------ writing and reading


def as_record(figures: Record, facts: Record, options: Record) -> Record:
    """What was measured, on what work and on what machine. No path, no name of a person or host."""
    record = {name: options.get(name) for name in OPTIONS}
    if workload := options.get("workload"):
        named = vars(resolve({"workload": workload}))
        is_changed = any(options[name] != named[name] for name in WORK)
        record["workload"] = workload + ", changed" * is_changed
    is_name = re.fullmatch(r"\w+", options["dataset"])
    if not (is_name and (ASSETS / options["dataset"]).is_dir()):
        record["dataset"] = "own data"
    left_out = ("options", "classes", "files", "data_fingerprint", "checksum", "tokenizer_checksum")
    return record | {k: v for k, v in facts.items() if k not in left_out} | figures


def append_command(record: Path) -> str:
    """The command line that adds a benchmark.json to the records that others compare with."""
    target = ASSETS / "epoch_times.jsonl"
    target = target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target
    if os.name == "nt":
        return f'type "{record}" >> "{target}"'
    return f"cat {shlex.quote(str(record))} >> {shlex.quote(str(target))}"


def read_records(name: str) -> list[Record]:
    """The records of a run folder, a .json or a .jsonl file. Raises BadInput."""
    path = Path(name).expanduser()
    if path.is_dir():
        folder = RunFolder(path)
        path = path / folder.BENCHMARK
        if not path.exists():
            return [record_of_runs(RunFolder.find_all(name, option="--compare"), name)]
    try:
        if path.stat().st_size > 2**26:
            raise ValueError("over 64 MiB")
        text = path.read_text(encoding="utf-8")
        texts = [text] if path.suffix == ".json" else text.splitlines()
        records = [json.loads(text) for text in texts if text.strip()]
    except OSError as error:
        raise BadInput(f"--compare {name}: {error.strerror}; give a run folder or file") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"--compare {name}: not JSON ({error}); give a run folder or file") from None
    for number, record in enumerate(records, 1):
        if problem := problem_of_record(record):
            raise BadInput(f"--compare {name}: record {number}: {problem}; fix or remove it")
    if not records:
        raise BadInput(f"--compare {name}: no records; give a run folder or file that has some")
    return [with_new_keys(record) for record in records]


def problem_of_record(record: Any) -> str | None:
    """Why a value is not a record, or None if it is one."""
    if not isinstance(record, dict):
        return "not an object"
    needed = {"device_name"} if record.get("published") else {"device_name", "work_fingerprint"}
    for name in sorted(TEXTS | NUMBERS):
        value, kind = record.get(name), str if name in TEXTS else int
        if not isinstance(value, kind) and not (value is None and name not in needed):
            return f"{name} is not a {'text' if kind is str else 'whole number'}"
    epoch = record.get("seconds_per_epoch")
    for name in ("median", "least", "greatest"):
        value = epoch.get(name) if isinstance(epoch, dict) else None
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            return f"seconds_per_epoch has no {name} above 0"
    return None


def with_new_keys(record: Record) -> Record:
    """A record, or an event of metrics.jsonl, with today's keys and wording."""
    record = {OLD_KEYS.get(key, key): value for key, value in record.items()}
    if str(record.get("seconds_per_epoch_is")).startswith("reckoned"):
        record["seconds_per_epoch_is"] = f"extrapolated from {record.get('steps', 'some')} steps"
    return record


def record_of_runs(folders: list[RunFolder], name: str) -> Record:
    """The epoch times of a training, or of several that differ in their seed. Raises BadInput."""
    configs = [folder.read_config() for folder in folders]
    saved = [saved_options(c, f.path / f.CONFIG) for c, f in zip(configs, folders)]
    facts = ("device_name", "processes", "threads", "data_fingerprint")
    others = {x for options in saved for x in different_options(options, saved[0])}
    others |= {fact for fact in facts if len({c.get(fact) for c in configs}) > 1}
    if others:
        differ = f"its runs differ in more than the seed ({shorten(sorted(others))})"
        raise BadInput(f"--compare {name}: {differ}; name them one by one")
    epochs = [with_new_keys(m) for f in folders for m in f.read_metrics() if m["event"] == "epoch"]
    seconds = [m["seconds"] for m in epochs if m["steps"] == m["steps_per_epoch"]]
    if not seconds:
        raise BadInput(f"--compare {name}: no complete epoch; give another run or file")
    figures = {"seconds_per_epoch": spread(seconds), "seconds_per_epoch_is": "measured"}
    return as_record(figures, configs[0], saved[0]) | {"runs": len(folders)}


def scores_in_words(name: str) -> str | None:
    """The test scores of a run, or of the runs in a folder; None without any."""
    path = Path(name).expanduser()
    if not path.is_dir() or (path / RunFolder.BENCHMARK).exists():
        return None
    tests = [folder.read_tests() for folder in RunFolder.find_all(name, option="--compare")]
    if not any(tests):
        return None
    n = sum(not events for events in tests)
    scores = [f"{n} of {len(tests)} runs have no test result"] if n else scores_of_runs(tests)
    return f"{name}: {'; '.join(scores)}"


# ------------------------------------------------------------------------------------------- naming


def machine_of(record: Record) -> tuple[bool, str, str]:
    """(published?, name, details that tell machines of one name apart)."""
    name = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*|\d+-Core", "", record["device_name"])
    name = record.get("label") or " ".join(name.split()) or record["device_name"]
    n_devices = record.get("processes") or 1 if record.get("device") != "cpu" else 1
    cores = record.get("cores")
    details = (record.get("processor_model"), f"{cores} cores" if cores else None)
    name = (f"{n_devices} x " if n_devices > 1 else "") + name[:40]
    return bool(record.get("published")), name, ", ".join(filter(None, details)) or "no details"


def way_of(record: Record) -> list[str]:
    """How the work was done, a phrase each."""
    if record.get("published"):
        return []
    processes, threads = record.get("processes") or 1, record.get("threads")
    words = [f"other work: {record['other_work']}"] if "other_work" in record else []
    if record.get("device") == "cpu" and threads:
        several = f"{processes} processes of " if processes > 1 else ""
        words.append(f"{several}{threads} thread{'s' if threads != 1 else ''}")
    words.append(str(record.get("precision") or "fp32") + ", TF32" * bool(record.get("tf32")))
    attention = record.get("attention") or "fused"
    words += [f"{attention} attention"] * (attention != "fused")
    words += ["compiled"] * bool(record.get("compile"))
    words += [f"{record.get('runs')} runs"] * ((record.get("runs") or 1) > 1)
    is_whole = "extrapolated" not in str(record.get("seconds_per_epoch_is"))
    return words if is_whole else [*words, "extrapolated from part of the epoch"]


def describe(records: list[Record]) -> tuple[list[str], list[tuple[str, str]]]:
    """What all measured records have in common, and of each record (machine, how it differs)."""
    ways = [way_of(r) for r in records]
    measured = [way for r, way in zip(records, ways) if not r.get("published")]
    shared = [word for word in (measured or [[]])[0] if all(word in way for way in measured)]
    machines, names = {machine_of(r) for r in records}, []
    for r, way in zip(records, ways):
        published, name, details = machine_of(r)
        if sum(machine[:2] == (published, name) for machine in machines) > 1:
            name += f" ({details})"
        names.append((name, ", ".join(word for word in way if word not in shared)))
    return shared, names


def work_of(record: Record) -> str:
    """The name of a record's workload."""
    return str(record.get("workload") or "own settings")


def work_in_words(record: Record) -> str:
    """The workload of a record and its sizes."""
    r, words = record, [f"workload {work_of(record)}"]
    n, sizes = r.get("n_layers"), f"{r.get('d_model')}/{r.get('d_ff')}"
    words += [f"{r.get('dataset')}, {n}+{n} layers of {sizes}"] if n else []
    tokens = f"{r.get('batch_tokens')} tokens"
    words += [f"batches of {r.get('batch_size') or tokens}"] if n else []
    return ", ".join(words) + (f" padded to {r['pad_to']}" if r.get("pad_to") else "")


# ---------------------------------------------------------------------------------------- comparing


def compare(names: tuple[str, ...], figure: str | None, allow_different_work: bool) -> str:
    """A table of records, and the figure if one is asked for. Raises BadInput.

    Records of other work than the first are left out and named, or with allow_different_work
    included and marked.
    """
    if figure and Path(figure).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise BadInput(f"--figure {figure}: give a name that ends in .png, .svg or .pdf")
    records = [record for name in names for record in read_records(name)]
    same, other = split_by_work(records)
    marked = [r | {"other_work": difference(r, same[0])} for r in other]
    shown = sorted(
        same + (marked if allow_different_work else []),
        key=lambda r: (
            bool(r.get("published")),
            "other_work" in r,
            r["seconds_per_epoch"]["median"],
        ),
    )
    if figure:
        from figures import draw_epoch_times

        draw_epoch_times(shown, work_in_words(same[0]), Path(figure).expanduser())
    lines = [work_in_words(same[0]), *table_of(shown)]
    if other:
        kinds = Counter(f"{work_of(r)} {r.get('work_fingerprint', '')}".strip() for r in other)
        lines.append("other work, " + ("included: " if allow_different_work else "left out: "))
        lines[-1] += ", ".join(f"{kind} (records: {n})" for kind, n in kinds.items())
        lines[-1] += "" if allow_different_work else "; --allow-different-work includes it"
    lines += filter(None, map(scores_in_words, names))
    return "\n".join(lines)


def split_by_work(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """The records of the same work as the first, and the others."""
    first = next((r for r in records if not r.get("published")), records[0])
    work = first.get("work_fingerprint")
    workloads = {r.get("workload") for r in records if r.get("work_fingerprint") == work}
    split: tuple[list[Record], list[Record]] = ([], [])
    for r in records:
        published = r.get("workload") in workloads and r.get("published")
        split[not (published or r.get("work_fingerprint") == work)].append(r)
    return split


def difference(record: Record, first: Record) -> str:
    """How a record's work differs from that of the first: up to two options, or its name."""
    names = [name for name in WORK if name in record and record[name] != first.get(name)]
    options = [f"{format_flag(name)} {record[name]}" for name in names]
    return " ".join(options) if 0 < len(options) <= 2 else work_of(record)


def best_of_each_machine(records: list[Record]) -> list[Record]:
    """Of each machine and work the first record. The records are in the order of `compare`."""
    best: dict[Any, Record] = {}
    for r in records:
        best.setdefault((machine_of(r), r.get("other_work")), r)
    return list(best.values())


def seconds_text(seconds: float) -> str:
    """Three significant digits."""
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def table_of(records: list[Record]) -> list[str]:
    """The lines of a table: the same numbers as in the figure, but every record."""
    shared, names = describe(records)
    rows = [("seconds/epoch", "least", "greatest", "")]
    for r, (machine, way) in zip(records, names):
        numbers = [seconds_text(r["seconds_per_epoch"][k]) for k in ("median", "least", "greatest")]
        source = f"published ({r.get('source', 'no source')})" if r.get("published") else ""
        rows.append((*numbers, ", ".join(filter(None, (machine, way, source)))))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = ["  ".join([*map(str.rjust, row, widths), row[3]]).rstrip() for row in rows]
    return [f"all measured: {', '.join(shared)}"] * bool(shared) + table
