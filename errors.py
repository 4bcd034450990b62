"""How a run ends early: exceptions, their words, and stop signals."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


class BadInput(ValueError):
    """The user's input cannot work. Each of `lines` names what was given, what is allowed and what
    to do. Exit status 2."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class SharedError(BadInput):
    """A BadInput of some rank, raised on all ranks."""


class RunFailed(RuntimeError):
    """The run started and cannot continue, as when the disk is full. Exit status 1."""


class Diverged(RunFailed):
    """The weights after `step` gave a loss that is not finite."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM. Exit status 130 or 143."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """In this context Ctrl-C and SIGTERM raise Stopped; a second one ends the process at once.

    In `held()`, and for as long as `hold` is set, signals are only recorded in `received`.
    """

    def __init__(self) -> None:
        self.hold, self.received = False, 0

    def __enter__(self) -> "StopSignals":
        signals = (signal.SIGINT, signal.SIGTERM)
        self.before = {signum: signal.signal(signum, self._receive) for signum in signals}
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + signum)
        if not self.hold and in_destructor(frame):  # Python would print and drop the exception
            threading.Timer(0.01, signal.raise_signal, (signum,)).start()
            return
        self.received = signum
        if not self.hold:
            raise Stopped(signum)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The block runs to its end; a signal received in it raises Stopped then."""
        before, self.hold = self.hold, True
        try:
            yield
        finally:
            self.hold = before
        if self.received and not self.hold:
            raise Stopped(self.received)


def write_failed(path: Path, error: OSError) -> RunFailed:
    """The exception for a disk that is full, read-only or gone."""
    reason = f"cannot be written ({error.strerror}); fix that, and resume or start again"
    return RunFailed(f"{path}: {reason}")


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of bounded length."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def in_destructor(frame: FrameType | None) -> bool:
    """Whether a frame runs inside a __del__ method."""
    while frame:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def exit_on_signals() -> None:
    """From now until StopSignals, Ctrl-C and SIGTERM end the process with one line."""

    def exit_now(signum: int, _: FrameType | None) -> None:
        os.write(2, b"\nstopped\n")
        os._exit(128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, exit_now)
