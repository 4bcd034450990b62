"""What a checkpoint holds: training state, weights, optimizer moments, weights to average."""

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddp_utils import broadcast, broadcast_tensors, raise_on_all_ranks
from errors import BadInput, one_line

Weights = dict[str, Tensor]


@dataclass
class TrainingState:
    """How far a training has come, in plain values."""

    step: int = 0  # steps that are done
    epoch: int = 1  # the epoch that is being trained or validated
    n_micro_batches: int = 0  # of its plan that are done
    validated_step: int = -1  # the last step that was validated
    seconds: float = 0.0  # of training in this epoch
    nll: float = 0.0  # sum over the targets of this epoch, in nats
    n_correct: float = 0.0
    n_targets: int = 0
    n_tokens: int = 0  # source and target
    best: tuple[float, ...] = ()  # Evaluation.rank of the best epoch
    best_epoch: int = 0  # 0: none
    best_checksum: str = ""  # of best.safetensors when it was written

    def start_next_epoch(self) -> None:
        """The epoch is trained and validated."""
        best = {name: getattr(self, name) for name in ("best", "best_epoch", "best_checksum")}
        fresh = TrainingState(self.step, self.epoch + 1, validated_step=self.step, **best)
        self.__dict__.update(fresh.__dict__)

    def forget_best(self) -> None:
        """best.safetensors is newer than this state: forget it, so that the next epoch wins."""
        self.best, self.best_epoch, self.best_checksum = (), 0, ""


class KeptWeights:
    """Weights of several epochs, to be averaged at the end (AIAYN, section 6.1): those of the last
    n epochs, or with --patience of the n epochs up to the best one. On the CPU, of rank 0 alone.
    """

    def __init__(self, n: int, *, up_to_best: bool) -> None:
        self.n, self.up_to_best = n, up_to_best
        self.last: deque[Weights] = deque(maxlen=n)
        self.best: list[Weights] = []

    def add(self, model: nn.Module, *, is_better: bool, is_whole_epoch: bool) -> None:
        """Called after each validation. An epoch that --max-steps cut may still be continued."""
        if self.n == 1:
            return
        latest = self._with(model)
        if is_better and self.up_to_best:
            self.best = latest
        if is_whole_epoch:
            self.last.append(latest[-1])

    def chosen(self, model: nn.Module, *, is_cut: bool) -> list[Weights]:
        """The weights to average. is_cut: the last epoch was validated, but is not whole."""
        if self.up_to_best and self.best:  # none yet if a resumed run was given --patience
            return self.best
        if is_cut or not self.last:  # none if a finished run is resumed with more to average
            return self._with(model)
        return list(self.last)

    def _with(self, model: nn.Module) -> list[Weights]:
        weights = trained_part(model, dict(model.named_parameters()))
        now = {name: p.detach().cpu().clone() for name, p in weights.items()}
        return [*self.last, now][-self.n :]


def trained_part(model: nn.Module, weights: Weights) -> Weights:
    """Those of a model's weights that are trained, without what naive Bayes counted."""
    return {name: weights[name] for name, p in model.named_parameters() if p.requires_grad}


def capture(
    state: TrainingState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    kept: KeptWeights,
) -> dict[str, Any]:
    """A checkpoint of a training."""
    return {
        "state": asdict(state),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "scaler": scaler.state_dict(),
        "last_epochs": list(kept.last),
        "best_epochs": kept.best,
    }


def restore(
    checkpoint: dict[str, Any] | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    kept: KeptWeights,
) -> TrainingState | None:
    """Restores a training on all ranks. Returns its state; None if there was no checkpoint.

    checkpoint: of rank 0, which alone reads the file; tensors are sent to the others.
    Raises BadInput if it is not a checkpoint of this model.
    """
    with raise_on_all_ranks():
        if checkpoint:
            load(checkpoint, model, optimizer, kept)
    facts = broadcast(checkpoint and {key: checkpoint[key] for key in ("state", "scaler")})
    if not facts:
        return None
    state = TrainingState(**facts["state"])
    if scaler.is_enabled():
        scaler.load_state_dict(facts["scaler"])
    if state.step:
        if not optimizer.state:
            load_moments(optimizer, zero_moments(optimizer))
        broadcast_tensors(moment_tensors(optimizer))
    broadcast_tensors(model.parameters())
    return state


def load(
    checkpoint: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    kept: KeptWeights,
) -> None:
    """Fills a model, its optimizer and the weights to average. Raises BadInput."""
    try:
        TrainingState(**checkpoint["state"])
        model.load_state_dict(checkpoint["model"])
        load_moments(optimizer, checkpoint["optimizer"])
        kept.last.extend(checkpoint["last_epochs"])
        kept.best = checkpoint["best_epochs"]
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = one_line(error)
        raise BadInput(f"not a checkpoint of this run ({reason}); train again") from None


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters in the order of the optimizer's state."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def load_moments(optimizer: torch.optim.Optimizer, moments: dict[int, dict[str, Any]]) -> None:
    """Loads moments; learning rate and weight decay stay. There are none before the first step.

    Raises ValueError if they are not those of the parameters: torch would fail a step later.
    """
    parameters = parameters_of(optimizer)
    shapes = {
        i: {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape} for i, p in enumerate(parameters)
    }
    found = {i: {k: v.shape for k, v in moments[i].items()} for i in moments}
    if moments and found != shapes:
        raise ValueError("optimizer moments: other names or shapes than the parameters have")
    if moments:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})


def zero_moments(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Moments of 0, for a rank that receives those of rank 0."""
    return {
        i: {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
        for i, p in enumerate(parameters_of(optimizer))
    }


def moment_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All moments in a fixed order."""
    states = (optimizer.state[p] for p in parameters_of(optimizer))
    return [state[name] for state in states for name in ("step", "exp_avg", "exp_avg_sq")]
