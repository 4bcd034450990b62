"""The folder of a run on disk. Writes are atomic and checksummed; reads verify.

Files may come from anybody: no code in them is run, and no link is followed.
"""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from checkpoints import trained_part
from comp_utils import warn
from errors import BadInput, one_line, write_failed

START_OVER = "use another run, or train again"


def sha256(*parts: bytes | memoryview) -> str:
    """64 hex digits that identify the bytes."""
    total = hashlib.sha256()
    for data in parts:
        total.update(data)
    return total.hexdigest()


def json_checksum(fields: dict[str, Any]) -> str:
    """64 hex digits that identify an object, its "checksum" left out."""
    rest = {key: value for key, value in fields.items() if key != "checksum"}
    return sha256(json.dumps(rest, sort_keys=True).encode())


def weights_checksum(weights: dict[str, Tensor]) -> str:
    """64 hex digits that identify tensors on the CPU, their names and shapes."""
    parts = []
    for name, tensor in sorted(weights.items()):
        parts.append(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        parts.append(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256(*parts)


class RunFolder:
    """Paths, reads and writes of one run. docs/running.md lists the files."""

    CONFIG, TOKENIZER, METRICS = "config.json", "tokenizer.json", "metrics.jsonl"
    WEIGHTS, LAST, PREVIOUS = "best.safetensors", "last.pt", "previous.pt"
    CURVES, CONFUSION = "curves.png", "confusion.png"
    ATTENTION, ATTENTION_HEADS = "attention.png", "attention_heads.png"
    HYPOTHESES, REFERENCES = "test.hypotheses.txt", "test.references.txt"
    BENCHMARK, LOCK_FILE = "benchmark.json", ".lock"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_is_valid = True  # last.pt, if it exists; else it must not become previous.pt

    # ----------------------------------------------------------------------------------- the folder

    @classmethod
    def choose(cls, run_dir: str | None, dataset: str, overwrite: bool) -> "RunFolder":
        """The folder of a new run; nothing is written. Raises BadInput if it is in use."""
        if run_dir is None:
            name = re.sub(r"[^\w.-]+", "_", Path(dataset).name) or "data"
            path = Path("runs", name, datetime.now().strftime("%Y%m%d-%H%M%S"))
            return cls(path.with_name(f"{path.name}-{os.getpid()}") if path.exists() else path)
        path = Path(run_dir).expanduser()
        ancestor = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not ancestor.is_dir():
            raise BadInput(f"--run-dir {run_dir}: {ancestor} is a file; give a folder")
        if not os.access(ancestor, os.W_OK):
            raise BadInput(f"--run-dir {run_dir}: no permission to write; give another folder")
        names = {p.name for p in path.iterdir()} if path.is_dir() else set()
        # Own files and a lock, but no config.json: a run was killed before it wrote that.
        is_unfinished = cls.LOCK_FILE in names and cls.CONFIG not in names
        if names and not (is_unfinished and all(map(cls._is_own, names))):
            if cls.CONFIG not in names:
                raise BadInput(
                    f"--run-dir {run_dir}: holds other files and no run; give another folder"
                )
            if not overwrite:
                raise BadInput(
                    f"--run-dir {run_dir}: holds a run; give another folder, --overwrite to replace"
                    " it, or --resume to continue it"
                )
        return cls(path)

    @classmethod
    def find(cls, run_dir: str | None, *needed: str, option: str = "--run-dir") -> "RunFolder":
        """The folder of an existing run that has the files needed. Raises BadInput."""
        folder = cls(Path(run_dir or ".").expanduser())
        names = (cls.CONFIG, cls.TOKENIZER, *needed)
        missing = [name for name in names if not (folder.path / name).is_file()]
        if run_dir is not None and not missing:
            return folder
        configs = [p for depth in range(1, 4) for p in Path().glob("*/" * depth + cls.CONFIG)]
        runs = [p.parent for p in configs if all((p.parent / n).is_file() for n in names)]
        latest = max(runs, key=lambda p: p.stat().st_mtime, default=None)
        remedy = f"give the folder of a run{f', such as {latest}' * bool(latest)}"
        if missing == [cls.WEIGHTS]:
            remedy = "train it to its first validation with --resume"
        elif any(folder.path.glob(f"*/{cls.CONFIG}")) and run_dir:
            remedy = "it holds several: give one, or repeat the command that trained them"
        there = f" {run_dir}: no such run, {missing[0]} is missing" if run_dir else ": missing"
        raise BadInput(f"{option}{there}; {remedy}")

    @classmethod
    def find_all(cls, run_dir: str | None, *needed: str, **option: str) -> list["RunFolder"]:
        """The run in a folder, or those in its folders. Raises BadInput."""
        path = Path(run_dir or ".").expanduser()
        below = sorted(config.parent for config in path.glob(f"*/{cls.CONFIG}"))
        if run_dir is None or not below or (path / cls.CONFIG).exists():
            return [cls.find(run_dir, *needed, **option)]
        return [cls.find(str(folder), *needed, **option) for folder in below]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process writes to the folder in this block. The lock dies with its process.

        Creates the folder if needed. Raises BadInput.
        """
        lock = FileLock(self.path / self.LOCK_FILE, blocking=False)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._own(self.LOCK_FILE)
            lock.acquire()
        except Timeout:
            raise BadInput(
                f"--run-dir {self.path}: another process writes to it; wait for it, stop it, or "
                "give another folder"
            ) from None
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise BadInput(f"--run-dir {self.path}: {reason}; give another folder") from None
        try:
            yield
        finally:
            lock.release()

    @classmethod
    def _is_own(cls, name: str) -> bool:
        """Whether a run writes a file of that name, or leaves it as an unfinished write."""
        names = {value for key, value in vars(RunFolder).items() if key.isupper()}
        name = name.removesuffix(".tmp")
        return name in names or bool(re.fullmatch(r"test\..*(hypotheses|references)\.txt", name))

    def clear(self) -> None:
        """Deletes the files of an earlier run. Raises RunFailed."""
        # config.json goes first: a folder without it holds no run, should a kill come now.
        own = sorted(path.name for path in self.path.iterdir() if self._is_own(path.name))
        for name in (self.CONFIG, *(name for name in own if name != self.LOCK_FILE)):
            try:
                (self.path / name).unlink(missing_ok=True)
            except OSError as error:
                raise write_failed(self.path / name, error) from None

    # ----------------------------------------------------------------------- config, text, pictures

    def write_config(self, config: dict[str, Any]) -> None:
        """config.json, with checksums of itself and of the tokenizer, which is already there."""
        config = {**config, "tokenizer_checksum": sha256(self._read(self.TOKENIZER))}
        config["checksum"] = json_checksum(config)
        self.write_text(self.CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def read_config(self) -> dict[str, Any]:
        """config.json. Raises BadInput if it, or the tokenizer, was changed since then."""
        path = self.path / self.CONFIG
        try:
            config = json.loads(self._read(self.CONFIG, 2**24))
            if config["checksum"] != json_checksum(config):
                raise ValueError("its checksum is wrong, so it was changed")
            tokenizer_checksum = config["tokenizer_checksum"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(
                f"{path}: not a valid config ({one_line(error)}); {START_OVER}"
            ) from None
        if tokenizer_checksum != sha256(self._read(self.TOKENIZER, 2**27)):
            raise BadInput(
                f"{self.path / self.TOKENIZER}: not the tokenizer of this run (its checksum is "
                "wrong); restore it, or use another run"
            )
        return config

    def write_text(self, name: str, text: str) -> None:
        """A text file in UTF-8. Raises RunFailed."""
        self._write(name, lambda out: out.write(text.encode()))

    def write_bytes(self, name: str, data: bytes) -> None:
        """A file, such as a picture. Raises RunFailed."""
        self._write(name, lambda out: out.write(data))

    # -------------------------------------------------------------------------------------- metrics

    def log(self, **event: Any) -> None:
        """Appends an event to metrics.jsonl. Raises RunFailed."""
        path = self._own(self.METRICS)
        try:
            with open(path, "a", encoding="utf-8") as out:
                out.write(json.dumps(event) + "\n")
        except OSError as error:
            raise write_failed(path, error) from None

    def log_test(self, **event: Any) -> None:
        """Appends a test event. No checkpoint covers it, so it carries a checksum of its own."""
        event = {"event": "test", **event}
        self.log(**event, checksum=json_checksum(event))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The events of metrics.jsonl. Raises BadInput."""
        try:
            events = [json.loads(line) for line in self._read(self.METRICS).splitlines()]
            if not all(isinstance(event, dict) and "event" in event for event in events):
                raise ValueError("a line is not an event")
            return events
        except (ValueError, RecursionError) as error:
            path = self.path / self.METRICS
            raise BadInput(f"{path}: not valid ({one_line(error)}); restore it") from None

    def read_tests(self) -> list[dict[str, Any]]:
        """The test events of training; those of --test-only, on any data, have no step."""
        return [m for m in self.read_metrics() if m["event"] == "test" and "step" in m]

    def rewind_metrics(self, checkpoint: dict[str, Any] | None) -> list[dict[str, Any]]:
        """Deletes the events after a checkpoint, but keeps and returns later test events.

        Raises BadInput if the events before the checkpoint were changed.
        """
        known = checkpoint["metrics"] if checkpoint else {"n_bytes": 0, "checksum": sha256()}
        data = self._read(self.METRICS)
        head, tail = data[: known["n_bytes"]], data[known["n_bytes"] :]
        if sha256(head) != known["checksum"]:
            path = self.path / self.METRICS
            raise BadInput(f"{path}: changed since the checkpoint; restore it, or train again")
        tests = []
        for line in tail.splitlines(True):
            with suppress(ValueError, TypeError, AttributeError, RecursionError):
                event = json.loads(line)
                if line.endswith(b"\n") and event.get("checksum") == json_checksum(event):
                    tests.append((line, event))
        kept = head + b"".join(line for line, _ in tests)
        if data != kept:
            self.write_bytes(self.METRICS, kept)
        return [event for _, event in tests]

    # -------------------------------------------------------------------------------------- weights

    def save_weights(self, model: nn.Module) -> str:
        """best.safetensors. Returns the checksum of those trained. Raises RunFailed."""
        weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
        self.write_bytes(self.WEIGHTS, save(weights, {"checksum": weights_checksum(weights)}))
        return weights_checksum(trained_part(model, weights))

    def read_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """What best.safetensors holds. Raises BadInput if it is not for this model."""
        path = self._own(self.WEIGHTS)
        try:
            with safe_open(path, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                if shapes != {name: list(p.shape) for name, p in model.named_parameters()}:
                    raise ValueError("other names or shapes than the model has")
                weights = {name: file.get_tensor(name) for name in shapes}
                if (file.metadata() or {}).get("checksum") != weights_checksum(weights):
                    raise ValueError("its checksum is wrong")
        except (SafetensorError, ValueError, TypeError, OSError) as error:
            raise BadInput(
                f"{path}: not the weights of this run ({one_line(error)}); {START_OVER}"
            ) from None
        return weights

    # ---------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """last.pt, written by torch.save; the one before becomes previous.pt. Raises RunFailed.

        It is a zip archive with checksums, which `python -m zipfile -t last.pt` verifies.
        """
        metrics = self._read(self.METRICS)
        recorded = {"n_bytes": len(metrics), "checksum": sha256(metrics)}
        path = self.path / self.METRICS
        if path.exists():  # on disk before the checkpoint that counts its lines
            self._flush(path)
        keep_as = self.PREVIOUS if self.last_is_valid else None
        self._write(
            self.LAST, lambda out: torch.save({**checkpoint, "metrics": recorded}, out), keep_as
        )
        self.last_is_valid = True

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last valid checkpoint; None if the run ended before its first one.

        Raises BadInput if there are checkpoints and none is valid.
        """
        problems: list[str] = []
        for name in (self.LAST, self.PREVIOUS):
            try:
                checkpoint = self._read_checkpoint(name)
            except BadInput as error:
                problems += error.lines
                continue
            for problem in problems:
                warn(f"{problem}; {name} is used instead")
            self.last_is_valid = name == self.LAST
            return checkpoint
        if any((self.path / name).exists() for name in (self.LAST, self.PREVIOUS, self.METRICS)):
            raise BadInput(*problems, f"{self.path}: cannot be resumed; train again")
        return None

    def drop_last_checkpoint(self) -> int:
        """Replaces last.pt by previous.pt, if that is valid. Returns the step of last.pt then.

        Raises BadInput and RunFailed.
        """
        with suppress(BadInput):
            self._read_checkpoint(self.PREVIOUS)
            try:
                os.replace(self.path / self.PREVIOUS, self.path / self.LAST)
            except OSError as error:
                raise write_failed(self.path / self.LAST, error) from None
        return self._read_checkpoint(self.LAST)["state"]["step"]

    def _read_checkpoint(self, name: str) -> dict[str, Any]:
        path = self._own(name)
        if not path.is_file():
            raise BadInput(f"{path}: missing")
        try:
            with zipfile.ZipFile(path) as file:
                if file.testzip() is not None:
                    raise ValueError("its checksum is wrong")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if checkpoint["metrics"].keys() != {"n_bytes", "checksum"}:
                raise ValueError("its metrics have other fields")
            return checkpoint
        except Exception as error:  # torch.load raises many kinds
            raise BadInput(f"{path}: damaged, or not a checkpoint ({one_line(error)})") from None

    # ---------------------------------------------------------------------------------------- files

    def _own(self, name: str) -> Path:
        """The path of a file of the run. Raises BadInput for a link, which may lead elsewhere, and
        for a pipe, which may block for ever."""
        path = self.path / name
        if path.is_symlink():
            raise BadInput(f"{path}: a link; put the file itself there")
        if path.exists() and not path.is_file():
            raise BadInput(f"{path}: not a file; remove it, or use another run")
        return path

    def _read(self, name: str, most_bytes: int = 2**31) -> bytes:
        """The content of a file, empty if it does not exist. Raises BadInput."""
        path = self._own(name)
        try:
            if path.exists() and path.stat().st_size > most_bytes:
                raise BadInput(f"{path}: over {most_bytes:,} bytes; use another run")
            return path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror}); fix that") from None

    def _write(
        self, name: str, write: Callable[[BinaryIO], Any], keep_as: str | None = None
    ) -> None:
        """Replaces a file atomically; the old one is kept as keep_as. Raises RunFailed."""
        path, temporary = self.path / name, self.path / (name + ".tmp")
        try:
            temporary.unlink(missing_ok=True)  # a kill may have left one
            try:
                with open(temporary, "xb") as out:  # x: no link is followed
                    write(out)
                self._flush(temporary)
                if keep_as and path.exists():
                    os.replace(path, self.path / keep_as)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            self._flush(self.path)
        except (OSError, RuntimeError) as error:
            # torch.save raises a RuntimeError about positions while it handles the file's OSError.
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise write_failed(path, reason) from None

    @staticmethod
    def _flush(path: Path) -> None:
        """Has the system write a file, or a folder's list of names, to the disk now."""
        if path.is_dir() and os.name == "nt":
            return  # Windows has no such call for a folder
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
