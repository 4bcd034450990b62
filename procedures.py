"""The training loop, from plan to validation."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints import KeptWeights, TrainingState, capture, restore, trained_part
from comp_utils import Progress, autocast, grad_scaler, say, synchronized_time, warn
from config import TrainingConfig
from data import NO_ROWS, Batch, Plan, Step, TextData
from ddp_utils import (
    broadcast_from_rank_zero,
    broadcast_tensors,
    is_connection_error,
    raise_if_stopped,
    raise_on_all_ranks,
    rank,
    stop_agreed,
    world_size,
    wrap,
)
from errors import Diverged, RunFailed, Stopped, StopSignals
from evaluation import evaluate_split, evidence_on
from naive_bayes import NaiveBayes
from optimization import add_gradients, average_weights, build_optimizer, lr_at, train_step
from run_folder import RunFolder, weights_checksum
from scoring import Evaluation, format_scores
from step_log import StepLog, epoch_line


class Trainer:
    """Trains a model epoch by epoch, with checkpoints and validation.

    model: on its device. After `train` it holds the weights that were chosen: those of the best
    validation, or the average of the last epochs.
    inspect: called after each validation; returns further scores, and lines to print.
    """

    def __init__(
        self,
        model: nn.Module,
        data: TextData,
        config: TrainingConfig,
        folder: RunFolder,
        *,
        device: torch.device,
        precision: str,
        seed: int,
        compiled: bool,
        signals: StopSignals,
        inspect: Callable[[int], tuple[dict[str, float], list[str]]] = lambda epoch: ({}, []),
    ) -> None:
        self.model, self.data, self.config, self.folder = model, data, config, folder
        self.device, self.precision, self.seed = device, precision, seed
        self.compiled, self.signals, self.inspect = compiled, signals, inspect
        self.optimizer = build_optimizer(model, weight_decay=config.weight_decay)
        self.scaler = grad_scaler(precision, device)
        self.runner = wrap(model, device)
        self.runner = torch.compile(self.runner, dynamic=True) if compiled else self.runner
        self.state = TrainingState()
        self.saved_step: int | None = None  # of the last checkpoint
        up_to_best = config.patience is not None
        self.kept = KeptWeights(config.average_checkpoints, up_to_best=up_to_best)
        # Every epoch has batches of the same sizes; only which similar rows meet changes.
        self.n_plan = len(self.plan(1))
        self.n_steps = self.count_steps()

    def plan(self, epoch: int) -> Plan:
        """The micro-batches of an epoch."""
        return self.data.plan("train", seed=self.seed, epoch=epoch)

    def steps(self, plan: Plan, epoch: int, begin: int = 0) -> list[Step]:
        """The steps of an epoch's plan from micro-batch `begin` on, for this rank."""
        return self.data.steps(
            plan,
            seed=self.seed,
            epoch=epoch,
            accumulate=self.config.accumulate,
            rank=rank(),
            world_size=world_size(),
            begin=begin,
        )

    def steps_of(self, n_micro_batches: int) -> int:
        """Number of steps that so many micro-batches make."""
        return math.ceil(n_micro_batches / (self.config.accumulate * world_size()))

    def count_steps(self) -> int:
        """Steps of the whole run: those done, the rest of this epoch, the epochs after it."""
        state, config = self.state, self.config
        rest = self.steps_of(self.n_plan - state.n_micro_batches)
        n_steps = state.step + rest + (config.epochs - state.epoch) * self.steps_of(self.n_plan)
        return min(n_steps, config.max_steps or n_steps)

    @property
    def is_finished(self) -> bool:
        """Whether all epochs or steps are trained and validated, or --patience ran out."""
        state, config = self.state, self.config
        without_better = state.epoch - 1 - state.best_epoch  # epochs
        patience = config.patience if state.best_epoch else None
        return (
            state.epoch > config.epochs
            or (state.step >= (config.max_steps or math.inf) and state.validated_step == state.step)
            or (patience is not None and without_better >= patience)
        )

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step of this run."""
        c = self.config
        shape = {"peak": c.lr, "schedule": c.schedule, "warmup_steps": c.warmup_steps}
        return lr_at(step, **shape, n_steps=self.n_steps)

    def train(self) -> None:
        """Trains from the present state to the end. Raises Stopped and RunFailed."""
        try:
            if not self.is_finished:
                if self.n_steps <= self.config.warmup_steps:
                    warn(
                        f"--warmup-steps {self.config.warmup_steps}: only {self.n_steps} in this "
                        "run, so the learning rate does not reach its peak; give fewer "
                        "--warmup-steps or more --epochs"
                    )
                self.warm_up()
                if self.saved_step is None:
                    with self.signals.held():
                        self.save()
            while not self.is_finished:
                self.train_epoch()
                self.validate()
        except Stopped:
            self.save()
            raise
        except Diverged as error:
            # Finite or not, weights that give such a loss are useless: use the checkpoint before.
            if error.step == self.saved_step:
                self.saved_step = self.folder.drop_last_checkpoint() if rank() == 0 else None
            raise
        except RuntimeError as error:
            if self.signals.received and is_connection_error(error):  # the others stopped as well
                raise Stopped(self.signals.received) from None
            raise
        self.choose_weights()

    def warm_up(self) -> None:
        """Runs the largest batches once, so that what does not fit in memory fails at once.

        With --compile also one batch of each kind that gets kernels of its own. Leaves no trace: no
        gradients, no draws that count.
        """
        began = time.perf_counter()
        # Adam's moments come with the first step: reserve their memory, 8 bytes a parameter.
        trained = [p for p in self.model.parameters() if p.requires_grad]
        reserved = [torch.empty_like(p) for p in trained for _ in range(2)]
        self.runner.train()
        try:
            for batch in self.data.load("train", self.warm_up_plan(), self.device):
                add_gradients(
                    self.runner,
                    [batch],
                    self.scaler,
                    autocast(self.precision, self.device),
                    label_smoothing=self.config.label_smoothing,
                    r_drop=self.config.r_drop,
                    n_targets=max(1, batch.n_targets),
                )
        except torch._dynamo.exc.TorchDynamoException as error:  # no C++ compiler, usually
            reason = str(error).strip().splitlines()[0]
            raise RunFailed(f"--compile: {reason}; install it, or leave it out") from None
        del reserved
        self.optimizer.zero_grad(set_to_none=True)
        self.evaluate(self.data.largest_first("validation", self.data.plan("validation"))[:1])
        if self.compiled:
            say(f"compiled in {time.perf_counter() - began:.1f} s")

    def warm_up_plan(self) -> Plan:
        """The largest batch; with torch.compile, which specializes sizes of 1, one of each kind."""
        plan = self.data.largest_first("train", self.plan(1))
        if not self.compiled:
            return plan[:1]
        sizes = self.data.sizes("train", plan)
        kinds = zip(*((size == 1).tolist() for size in (sizes.n_rows, sizes.l_z, sizes.l_x)))
        first_of_kind = {kind: i for i, kind in reversed([*enumerate(kinds)])}
        chosen = sorted({0, len(plan) - 1, *first_of_kind.values()})  # two sizes make it dynamic
        return [plan[i] for i in chosen] + [NO_ROWS] * (world_size() > 1)

    def evaluate(self, plan: Plan | None = None) -> Evaluation:
        """The model on the validation split, or on some of its batches."""
        where = {"device": self.device, "precision": self.precision}
        return evaluate_split(self.model, self.data, "validation", plan, **where)

    def train_epoch(self) -> None:
        """The remaining steps of the epoch. Raises Stopped and Diverged."""
        state, config = self.state, self.config
        self.n_steps = self.count_steps()
        n_left = max(0, self.n_steps - state.step)
        steps = self.steps(self.plan(state.epoch), state.epoch, state.n_micro_batches)[:n_left]
        n_done = self.steps_of(state.n_micro_batches)
        progress = Progress(f"epoch {state.epoch}/{config.epochs}", n_done + len(steps), n_done)
        log = StepLog(self.folder if rank() == 0 else None, progress, state)
        stop_flag = None  # of the step before, to be read when it has arrived
        self.runner.train()
        began = synchronized_time(self.device)
        with self.signals.held(), log.opened():
            for step, micro_batches in self.data.load_steps(steps, self.device):
                lr = self.learning_rate(state.step + 1)
                sums = self.step(step, micro_batches, lr)
                state.step += 1
                state.n_micro_batches += step.n_micro_batches
                log.add(state.step, lr, step, sums)
                saves = state.step % (config.checkpoint_every or math.inf) == 0
                validates = state.step % (config.validate_every or math.inf) == 0
                if saves or validates:
                    state.seconds += synchronized_time(self.device) - began
                    log.flush()
                    if validates and step is not steps[-1]:  # the epoch's end has its own
                        self.validate_within_epoch()
                    self.save()
                    log.restart_clock()
                    began = synchronized_time(self.device)
                if stop_agreed(self.signals.received, stop_flag):
                    break
                stop_flag = sums[2]
            state.seconds += synchronized_time(self.device) - began
            log.flush()
            raise_if_stopped(self.signals)

    def step(self, step: Step, micro_batches: list[Batch], lr: float) -> Tensor:
        """One optimizer step. Returns the sums of `train_step`."""
        return train_step(
            self.runner,
            micro_batches,
            self.optimizer,
            self.scaler,
            autocast(self.precision, self.device),
            lr=lr,
            max_norm=self.config.max_norm,
            label_smoothing=self.config.label_smoothing,
            r_drop=self.config.r_drop,
            n_targets=step.n_targets,
            seeds=step.seeds,
            signal=self.signals.received,
        )

    def validate(self) -> None:
        """Validates, keeps the weights, logs, saves; prints only what is safe on disk."""
        state = self.state
        result = self.evaluate()
        if not math.isfinite(result.loss):
            raise Diverged(
                f"step {state.step}: the validation loss is {result.loss}; give a smaller --lr",
                state.step,
            )
        more_scores, lines = self.inspect(state.epoch)
        with self.signals.held():
            state.validated_step = state.step
            is_better = self.keep_weights(result)
            lines.insert(0, self.log_epoch(result.scores | more_scores, is_better))
            if state.n_micro_batches == self.n_plan:  # else --max-steps cut the epoch
                state.start_next_epoch()
            self.save()
        say(*lines)
        raise_if_stopped(self.signals)

    def validate_within_epoch(self) -> None:
        """Validates and logs; saves the best weights, unless epochs are averaged."""
        state, result = self.state, self.evaluate()
        self.runner.train()
        if not math.isfinite(result.loss):
            return  # the loss of a training step says so, and where
        is_better = self.config.average_checkpoints == 1 and self.save_if_best(result)
        if rank() == 0:
            scores = {f"validation_{name}": value for name, value in result.scores.items()}
            self.folder.log(event="validation", step=state.step, epoch=state.epoch, **scores)
        scores = format_scores(result.scores, "loss", "accuracy")
        say(f"step {state.step}: validation {scores}{', best' * is_better}")

    def save_if_best(self, result: Evaluation) -> bool:
        """Saves the weights if no validation was better. Returns whether that is so."""
        state, is_better = self.state, not self.state.best_epoch or result.rank > self.state.best
        if is_better:
            state.best, state.best_epoch = result.rank, state.epoch
            if rank() == 0:
                state.best_checksum = self.folder.save_weights(self.model)
        return is_better

    def keep_weights(self, result: Evaluation) -> bool:
        """Saves the weights if they are the best, and keeps them for averaging."""
        is_better = self.save_if_best(result)
        if rank() == 0:
            is_whole = self.state.n_micro_batches == self.n_plan
            self.kept.add(self.model, is_better=is_better, is_whole_epoch=is_whole)
        return is_better

    def log_epoch(self, validation: dict[str, float], is_better: bool) -> str:
        """Writes the epoch to metrics.jsonl. Returns a line about it."""
        state = self.state
        training = {
            "loss": state.nll / state.n_targets,
            "accuracy": state.n_correct / state.n_targets,
        }
        if rank() == 0:
            plan = self.plan(state.epoch)[: state.n_micro_batches]
            self.folder.log(
                event="epoch",
                epoch=state.epoch,
                seconds=state.seconds,
                steps=self.steps_of(len(plan)),
                steps_per_epoch=self.steps_of(self.n_plan),
                tokens=state.n_tokens,
                padding_share=self.data.sizes("train", plan).padding_share,
                **{f"train_{name}": value for name, value in training.items()},
                **{f"validation_{name}": value for name, value in validation.items()},
            )
        line = epoch_line(state, self.config.epochs, training["loss"], validation)
        return f"{line}, best" if is_better else line

    def choose_weights(self) -> None:
        """Leaves the chosen weights in the model and in the folder. Raises BadInput."""
        averages, is_cut = self.config.average_checkpoints > 1, self.state.n_micro_batches > 0
        n_averaged = 0
        with raise_on_all_ranks():
            if rank() == 0 and averages:
                epochs = self.kept.chosen(self.model, is_cut=is_cut)
                averaged = average_weights(epochs)
                self.model.load_state_dict(averaged, strict=False)  # tied weights: once
                self.folder.save_weights(self.model)
                n_averaged = len(epochs)
            elif rank() == 0:
                self.model.load_state_dict(self.folder.read_weights(self.model), strict=False)
        broadcast_tensors(self.model.parameters())
        if averages:
            scores = format_scores(self.evaluate().scores)
            say(f"average of {n_averaged} epoch{'s' * (n_averaged != 1)}: validation {scores}")
        if naive_bayes := getattr(self.model, "naive_bayes", None):
            self.add_naive_bayes(naive_bayes)

    def add_naive_bayes(self, naive_bayes: NaiveBayes) -> None:
        """Counts the training split, and weighs the counts on the validation split."""
        where, cpu = {"device": self.device, "precision": self.precision}, torch.device("cpu")
        with raise_on_all_ranks():
            if rank() == 0:
                naive_bayes.to(cpu).count(self.data.load("train", self.plan(1), cpu))
                naive_bayes.to(self.device)
                naive_bayes.weigh(*evidence_on(self.model, self.data, "validation", **where))
                self.folder.save_weights(self.model)
        broadcast_tensors(self.model.parameters())
        weights = " and ".join(f"{weight:.2f}" for weight in naive_bayes.weights.tolist())
        scores = format_scores(self.evaluate().scores)
        say(f"with naive Bayes, weights {weights}: validation {scores}")

    def save(self) -> None:
        """Writes a checkpoint. Raises RunFailed, and writes none, if the weights are not finite."""
        if not torch.stack([p.isfinite().all() for p in self.model.parameters()]).all():
            lr = self.optimizer.param_groups[0]["lr"]
            raise RunFailed(
                f"step {self.state.step}: weights are not finite after learning rate {lr:.3g}; "
                "give a smaller --lr or more --warmup-steps"
            )
        if rank() == 0:
            parts = (self.state, self.model, self.optimizer, self.scaler, self.kept)
            self.folder.save_checkpoint(capture(*parts))
        self.saved_step = self.state.step

    def resume(self, checkpoint: dict[str, Any] | None) -> None:
        """Restores a checkpoint, which rank 0 gives, on all ranks. Raises BadInput."""
        parts = (self.model, self.optimizer, self.scaler, self.kept)
        state = restore(checkpoint, *parts)
        if not state:
            return
        self.state, self.saved_step = state, state.step
        if state.best_epoch and self.config.average_checkpoints == 1:
            read = self.folder.read_weights
            found = broadcast_from_rank_zero(
                lambda: weights_checksum(trained_part(self.model, read(self.model)))
            )
            if found != state.best_checksum:  # of a later epoch, of a branch that was abandoned
                state.forget_best()
