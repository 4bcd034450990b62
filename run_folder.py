"""The folder of a run: what is written there is whole, and what is read there is checked first."""

import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from comp_utils import BadInput, RunFailed
from ddp_utils import agreed, broadcast_weights, by_rank_0, rank


def sha256(*parts: bytes | memoryview) -> str:
    """64 hex digits that tell these bytes from any others."""
    total = hashlib.sha256()
    for data in parts:
        total.update(data)
    return total.hexdigest()


def weights_checksum(weights: dict[str, Tensor]) -> str:
    """64 hex digits of the tensors on the CPU, their names and shapes."""
    parts = []
    for name, tensor in sorted(weights.items()):
        parts.append(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        parts.append(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256(*parts)


def not_written(path: Path, error: OSError) -> RunFailed:
    """What to raise when the disk is full, read-only or gone."""
    return RunFailed(f"{path}: cannot be written ({error.strerror}); mend that")


class RunFolder:
    """The folder that alone is enough to test, predict, resume, or compare with: see the README's
    table of its files.

    What is written is whole on the disk or as it was before, and has a checksum that is looked at
    when it is read. Files of a folder may come from anybody: none is run, and no link is followed.
    Of many processes rank 0 alone reads and writes it: the others are told.
    """

    CONFIG, TOKENIZER, METRICS = "config.json", "tokenizer.json", "metrics.jsonl"
    WEIGHTS, LAST, PREVIOUS = "best.safetensors", "last.pt", "previous.pt"
    CURVES, CONFUSION, ATTENTION = "curves.png", "confusion.png", "attention.png"
    HYPOTHESES, REFERENCES = "test.hypotheses.txt", "test.references.txt"
    BENCHMARK, LOCK_FILE = "benchmark.json", ".lock"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_is_whole = True  # last.pt, if there is one; else it must not become previous.pt

    @classmethod
    def plan(cls, run_dir: str | None, dataset: str, overwrite: bool) -> "RunFolder":
        """Chooses the folder of a new run, and writes nothing. Raises BadInput if it is taken."""
        if run_dir is None:
            name = re.sub(r"[^\w.-]+", "_", Path(dataset).name) or "data"
            path = Path("runs", name, datetime.now().strftime("%Y%m%d-%H%M%S"))
            return cls(path.with_name(f"{path.name}-{os.getpid()}") if path.exists() else path)
        path = Path(run_dir).expanduser()
        ancestor = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not ancestor.is_dir():
            raise BadInput(f"--run-dir {run_dir}: {ancestor} is a file; give a folder")
        if not os.access(ancestor, os.W_OK):
            raise BadInput(f"--run-dir {run_dir}: may not be written; give another folder")
        names = {p.name for p in path.iterdir()} if path.is_dir() else set()
        # Files of ours beside a lock, and no config.json: a run was killed before it wrote that.
        if names - (cls._own_names() if cls.LOCK_FILE in names else set()):
            if cls.CONFIG not in names:
                raise BadInput(
                    f"--run-dir {run_dir}: the folder holds no run, but other files; give another"
                )
            if not overwrite:
                raise BadInput(
                    f"--run-dir {run_dir}: holds a run; give another folder, --overwrite, or "
                    "--resume to go on with it"
                )
        return cls(path)

    @classmethod
    def find(cls, run_dir: str | None, *needed: str) -> "RunFolder":
        """The folder of a run that is there, with the files needed. Raises BadInput."""
        if run_dir is None:
            runs = sorted(Path("runs").glob(f"*/*/{cls.CONFIG}"), key=lambda p: p.stat().st_mtime)
            hint = f", for example {runs[-1].parent}" if runs else ""
            raise BadInput(f"--run-dir: say which run to use{hint}")
        folder = cls(Path(run_dir).expanduser())
        for name in (cls.CONFIG, cls.TOKENIZER, *needed):
            if not (folder.path / name).is_file():
                raise BadInput(f"--run-dir {run_dir}: no such run, {name} is missing; give another")
        return folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process writes here meanwhile. The lock dies with its process.

        Makes the folder if need be. Raises BadInput.
        """
        lock = FileLock(self.path / self.LOCK_FILE, blocking=False)

        def acquire() -> None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._own(self.LOCK_FILE)
                lock.acquire()
            except Timeout:
                reason = "another process writes to it"
                remedy = "wait for it, stop it, or give another folder"
                raise BadInput(f"--run-dir {self.path}: {reason}; {remedy}") from None
            except OSError as error:
                reason = f"cannot be written ({error.strerror})"
                raise BadInput(f"--run-dir {self.path}: {reason}; give another folder") from None

        agreed(acquire if rank() == 0 else lambda: None)
        try:
            yield
        finally:
            lock.release()  # does nothing where it was not acquired

    @classmethod
    def _own_names(cls) -> set[str]:
        """Of every file of a run but its config.json, also of those that a kill left unfinished."""
        names = {value for key, value in vars(RunFolder).items() if key.isupper()}
        return (names | {name + ".tmp" for name in names}) - {cls.CONFIG}

    def clear(self) -> None:
        """Of a run that was here before, no file of ours stays."""
        if rank() > 0:
            return
        # config.json goes first: what a kill leaves without it is taken for no run.
        for name in (self.CONFIG, *sorted(self._own_names() - {self.LOCK_FILE})):
            (self.path / name).unlink(missing_ok=True)

    def write_config(self, config: dict[str, Any]) -> None:
        """config.json, with checksums of itself and of the tokenizer, which is there already."""
        if rank() > 0:
            return
        config = {**config, "tokenizer_checksum": sha256(self._read(self.TOKENIZER))}
        config["checksum"] = self._config_checksum(config)
        self._write(self.CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())

    def read_config(self) -> dict[str, Any]:
        """config.json. Raises BadInput if it, or the tokenizer, is not as rhea wrote it."""
        return by_rank_0(self._read_config)

    def _read_config(self) -> dict[str, Any]:
        path = self.path / self.CONFIG
        try:
            config = json.loads(self._read(self.CONFIG, 2**24))
            if not isinstance(config, dict) or not isinstance(config["options"], dict):
                raise TypeError("options: not an object")
            classes = config["classes"]
            if classes is not None and not (
                isinstance(classes, list) and all(isinstance(name, str) for name in classes)
            ):
                raise TypeError("classes: not a list of names")
            if config["checksum"] != self._config_checksum(config):
                raise ValueError("changed since then: its checksum is wrong")
            tokenizer_checksum = config["tokenizer_checksum"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(f"{path}: not as rhea writes it ({error}); take another run") from None
        if tokenizer_checksum != sha256(self._read(self.TOKENIZER, 2**27)):
            raise BadInput(
                f"{self.path / self.TOKENIZER}: not the one of this run (its checksum is wrong); "
                "put it back, or take another run"
            )
        return config

    @staticmethod
    def _config_checksum(config: dict[str, Any]) -> str:
        rest = {key: value for key, value in config.items() if key != "checksum"}
        return sha256(json.dumps(rest, sort_keys=True).encode())

    def write_tokenizer(self, text: str) -> None:
        """tokenizer.json."""
        self._write(self.TOKENIZER, text.encode())

    def write_benchmark(self, record: dict[str, Any]) -> None:
        """benchmark.json."""
        self._write(self.BENCHMARK, (json.dumps(record, ensure_ascii=False) + "\n").encode())

    @contextmanager
    def picture(self, name: str) -> Iterator[io.BytesIO]:
        """What is drawn into the buffer becomes the file of that name. Raises RunFailed."""
        buffer = io.BytesIO()
        yield buffer
        if buffer.tell():  # else there was nothing to draw
            self._write(name, buffer.getbuffer())

    def write_lines(self, name: str, lines: list[str]) -> None:
        """A text file with a line each, for other programs to read."""
        self._write(name, "".join(line + "\n" for line in lines).encode())

    def log(self, **event: Any) -> None:
        """One line more in metrics.jsonl, flushed at once. Raises RunFailed."""
        if rank() > 0:
            return
        path = self._own(self.METRICS)
        try:
            with open(path, "a", encoding="utf-8") as out:
                out.write(json.dumps(event) + "\n")
        except OSError as error:
            raise not_written(path, error) from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl. Raises BadInput."""
        try:
            events = [json.loads(line) for line in self._read(self.METRICS).splitlines()]
            if not all(isinstance(event, dict) and "event" in event for event in events):
                raise ValueError("a line is no event")
            return events
        except (ValueError, RecursionError) as error:
            path = self.path / self.METRICS
            raise BadInput(f"{path}: not as rhea writes it ({error}); put it back") from None

    def save_weights(self, model: nn.Module) -> None:
        """best.safetensors. Raises RunFailed."""
        if rank() > 0:
            return
        weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
        self._write(self.WEIGHTS, save(weights, {"checksum": weights_checksum(weights)}))

    def read_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """What best.safetensors holds. Raises BadInput if it is not for this model."""
        path = self._own(self.WEIGHTS)
        try:
            with safe_open(path, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, it is no dict
                if shapes != {name: list(p.shape) for name, p in model.named_parameters()}:
                    raise ValueError("other names or shapes than the model has")
                weights = {name: file.get_tensor(name) for name in shapes}
                if (file.metadata() or {}).get("checksum") != weights_checksum(weights):
                    raise ValueError("its checksum is wrong")
        except (SafetensorError, ValueError, TypeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            remedy = "take another run, or train anew"
            raise BadInput(f"{path}: not the weights of this run ({reason}); {remedy}") from None
        return weights

    def load_weights(self, model: nn.Module) -> None:
        """Fills a model, on every rank, from best.safetensors. Raises BadInput."""
        weights = agreed(lambda: self.read_weights(model) if rank() == 0 else {})
        model.load_state_dict(weights, strict=False)  # tied weights are there once
        broadcast_weights(model)

    def save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """last.pt; the one before becomes previous.pt. Raises RunFailed.

        The file is one of torch.save, whose zip comment is the checksum of all that is before it.
        """
        if rank() > 0:
            return
        metrics = self._read(self.METRICS)
        recorded = {"n_bytes": len(metrics), "checksum": sha256(metrics)}
        buffer = io.BytesIO()
        torch.save({**checkpoint, "metrics": recorded}, buffer)
        buffer.seek(-2, os.SEEK_END)  # the last field of a zip file is the length of its comment
        buffer.write((64).to_bytes(2, "little"))
        buffer.write(sha256(buffer.getbuffer()).encode())
        path = self.path / self.METRICS
        if path.exists():  # on the disk before the checkpoint that counts its lines
            self._flush(path)
        keep_as = self.PREVIOUS if self.last_is_whole else None
        self._write(self.LAST, buffer.getbuffer(), keep_as=keep_as)
        self.last_is_whole = True

    def load_checkpoint(self) -> dict[str, Any] | None:
        """What the last whole checkpoint holds; None if the run ended before it wrote one.

        Raises BadInput if there was one, and none is whole.
        """
        return by_rank_0(self._load_checkpoint)

    def _load_checkpoint(self) -> dict[str, Any] | None:
        problems: list[str] = []
        for name in (self.LAST, self.PREVIOUS):
            path = self._own(name)
            try:
                checkpoint = self._read_checkpoint(path)
            except BadInput as error:
                problems += error.lines
                continue
            for problem in problems:
                print(f"warning: {problem}; {name} is taken instead", file=sys.stderr)
            self.last_is_whole = name == self.LAST
            return checkpoint
        if any((self.path / name).exists() for name in (self.LAST, self.PREVIOUS, self.METRICS)):
            raise BadInput(*problems, f"{self.path}: cannot be resumed; train anew")
        return None

    def drop_last_checkpoint(self) -> int | None:
        """Has previous.pt take the place of last.pt, if it is there and whole.

        Returns the updates that the last checkpoint knows now. Raises BadInput and RunFailed.
        """
        with suppress(BadInput):
            self._read_checkpoint(self._own(self.PREVIOUS))
            try:
                os.replace(self.path / self.PREVIOUS, self.path / self.LAST)
            except OSError as error:
                raise not_written(self.path / self.LAST, error) from None
        return self._read_checkpoint(self._own(self.LAST))["state"]["step"]

    @staticmethod
    def _read_checkpoint(path: Path) -> dict[str, Any]:
        if not path.is_file():
            raise BadInput(f"{path}: missing")
        data = path.read_bytes()
        if sha256(memoryview(data)[:-64]).encode() != data[-64:]:
            raise BadInput(f"{path}: torn, or none of rhea's (its checksum is wrong)")
        try:
            checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            metrics = checkpoint["metrics"]
            if not isinstance(metrics["n_bytes"], int) or not isinstance(metrics["checksum"], str):
                raise TypeError("metrics")
        except Exception as error:  # of many kinds: whoever can make a checksum can write anything
            reason = " ".join(str(error).split())[:200]
            raise BadInput(f"{path}: not a checkpoint of rhea ({reason})") from None
        return checkpoint

    def rewind_metrics(self, checkpoint: dict[str, Any] | None) -> list[dict[str, Any]]:
        """Takes the updates that a checkpoint does not know out of metrics.jsonl.

        Tests made since then stay, and are returned. Raises BadInput if what the checkpoint knows
        is not there.
        """
        return by_rank_0(lambda: self._rewind_metrics(checkpoint))

    def _rewind_metrics(self, checkpoint: dict[str, Any] | None) -> list[dict[str, Any]]:
        known = checkpoint["metrics"] if checkpoint else {"n_bytes": 0, "checksum": sha256()}
        data = self._read(self.METRICS)
        head, tail = data[: known["n_bytes"]], data[known["n_bytes"] :]
        if sha256(head) != known["checksum"]:
            path = self.path / self.METRICS
            raise BadInput(f"{path}: not as the checkpoint knows it; put it back, or train anew")
        tests = [line for line in tail.splitlines(True) if line.startswith(b'{"event": "test"')]
        tests = [line for line in tests if line.endswith(b"}\n")]  # a kill may have cut the last
        if data != head + b"".join(tests):
            self._write(self.METRICS, head + b"".join(tests))
        return self.read_metrics()[len(head.splitlines()) :]

    def _own(self, name: str) -> Path:
        """The path of one of the files. Raises BadInput if it is a link, a pipe or a folder: what
        is written to a link is written elsewhere, and who reads a pipe may wait for ever."""
        path = self.path / name
        if path.is_symlink():
            raise BadInput(f"{path}: a link; put the file itself there")
        if path.exists() and not path.is_file():
            raise BadInput(f"{path}: not a file; take it away, or take another run")
        return path

    def _read(self, name: str, most_bytes: int = 2**31) -> bytes:
        """The content of a file, empty if there is none. Raises BadInput."""
        path = self._own(name)
        try:
            if path.exists() and path.stat().st_size > most_bytes:
                raise BadInput(f"{path}: over {most_bytes:,} bytes; take another run")
            return path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}; make it a file that can be read") from None

    def _write(self, name: str, data: bytes | memoryview, keep_as: str | None = None) -> None:
        """Puts a file in the place of the one before, which keep_as keeps. Raises RunFailed."""
        if rank() > 0:
            return
        path, temporary = self.path / name, self.path / (name + ".tmp")
        try:
            temporary.unlink(missing_ok=True)  # a kill may have left one
            try:
                with open(temporary, "xb") as out:  # x: nor is a link followed
                    out.write(data)
                self._flush(temporary)
                if keep_as and path.exists():
                    os.replace(path, self.path / keep_as)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            self._flush(self.path)
        except OSError as error:
            raise not_written(path, error) from None

    @staticmethod
    def _flush(path: Path) -> None:
        """Has the system put a file, or a folder's list of names, on the disk now."""
        if path.is_dir() and os.name == "nt":
            return  # Windows has no such call for a folder
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
