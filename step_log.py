"""The log of training steps: metrics.jsonl, the progress bar and the sums of an epoch."""

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch
from torch import Tensor

from checkpoints import TrainingState
from comp_utils import Progress
from data import Step
from ddp_utils import is_connection_error
from errors import Diverged
from run_folder import RunFolder
from scoring import format_scores


class StepLog:
    """Collects steps and writes them about once a second.

    Reading a loss synchronizes the device, so losses stay there until several are read at once.
    folder: None on ranks that write nothing.
    """

    SECONDS_BETWEEN_FLUSHES = 1.0

    def __init__(self, folder: RunFolder | None, progress: Progress, state: TrainingState) -> None:
        self.folder, self.progress, self.state = folder, progress, state
        # Number of the step, its learning rate, the step, and the sums of `train_step`.
        self.waiting: list[tuple[int, float, Step, Tensor]] = []
        self.restart_clock()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Closes the progress bar after the block. If the connection to another rank fails in it,
        the losses that wait are read: the other may have ended at a divergence. Raises Diverged."""
        with closing(self.progress):
            try:
                yield
            except RuntimeError as error:
                if is_connection_error(error):
                    self.flush()
                raise

    def restart_clock(self) -> None:
        """The next speed is measured from now on."""
        self.flushed = time.perf_counter()

    def add(self, number: int, lr: float, step: Step, sums: Tensor) -> None:
        """Adds a step. Raises Diverged when a loss that is read now is not finite."""
        self.waiting.append((number, lr, step, sums))
        if time.perf_counter() - self.flushed > self.SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def flush(self) -> None:
        """Reads the losses that wait on the device and writes them. Raises Diverged."""
        if not self.waiting:
            return
        numbers, lrs, steps, sums = zip(*self.waiting)
        sums = torch.stack(sums).tolist()
        speed = sum(step.n_tokens for step in steps) / (time.perf_counter() - self.flushed)
        for number, lr, step, (nll, n_correct, _) in zip(numbers, lrs, steps, sums):
            self._write(number, lr, step, nll, n_correct, speed)
        loss = sums[-1][0] / steps[-1].n_targets
        text = f"loss {loss:.3f}, lr {lrs[-1]:.2e}, {speed:,.0f} tokens/s"
        self.progress.advance(len(steps), text)
        self.waiting = []
        self.restart_clock()

    def _write(
        self, number: int, lr: float, step: Step, nll: float, n_correct: float, speed: float
    ) -> None:
        state, loss = self.state, nll / step.n_targets
        if not math.isfinite(loss):
            raise Diverged(
                f"step {number}: the loss is {loss} at learning rate {lr:.3g}; give a smaller --lr "
                "or more --warmup-steps",
                number - 1,
            )
        state.nll, state.n_correct = state.nll + nll, state.n_correct + n_correct
        state.n_targets += step.n_targets
        state.n_tokens += step.n_tokens
        if self.folder:
            facts = {"step": number, "epoch": state.epoch, "loss": loss, "lr": lr}
            self.folder.log(event="step", **facts, tokens_per_second=speed)


def epoch_line(
    state: TrainingState, n_epochs: int, training_loss: float, validation: dict[str, float]
) -> str:
    """The line that is printed about an epoch, with columns of fixed width."""
    return (
        f"epoch {state.epoch:>{len(str(n_epochs))}}: {state.seconds:6.1f} s, "
        f"{state.n_tokens / state.seconds:>9,.0f} tokens/s; training loss {training_loss:.3f}; "
        f"validation {format_scores(validation, 'loss', 'accuracy', 'bleu')}"
    )
