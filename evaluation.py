"""How a model is evaluated: loss, accuracy and confusion on a split, without dropout."""

import torch
from torch import Tensor, nn

from comp_utils import autocast
from data import Plan, TextData
from ddp_utils import rank, sum_across_ranks, world_size
from ensemble import Ensemble
from optimization import explain_out_of_memory, loss_and_counts
from scoring import Evaluation

ROWS = 4096  # of logits that exist at once, of each model of an ensemble


@torch.inference_mode()
def evaluate_split(
    model: nn.Module,
    data: TextData,
    split: str,
    plan: Plan | None = None,
    *,
    device: torch.device,
    precision: str,
) -> Evaluation:
    """Scores of a model, dropout off, on a split or on some batches of it. Raises RunFailed.

    Each rank has every world_size-th batch. The sums of all batches are added in the order of the
    plan, so any number of processes gives the same digits.
    """
    model.eval()
    plan = plan or data.plan(split)
    own = range(rank(), len(plan), world_size())
    sums = torch.zeros(len(plan), 2, device=device)
    n_classes = len(data.classes or ())
    confusion = torch.zeros(n_classes, n_classes, dtype=torch.int64)

    def loss(X: Tensor, output: nn.Module) -> Tensor:
        if data.classes:
            pairs = (batch.tgt_out[:, 0].cpu(), output(X)[:, 0].argmax(dim=-1).cpu())  # (b), (b)
            confusion.index_put_(pairs, torch.tensor(1), accumulate=True)
        rows = zip(X.flatten(0, 1).split(ROWS), batch.tgt_out.flatten().split(ROWS))
        parts = (loss_and_counts(x[None], output, t[None], label_smoothing=0.0) for x, t in rows)
        return sum(torch.stack(part[1:]) for part in parts)

    for i, batch in zip(own, data.load(split, [plan[i] for i in own], device)):
        with explain_out_of_memory(batch), autocast(precision, device):
            sums[i] = model(batch.src, batch.tgt_in, loss)
    nll, n_correct = sum_across_ranks(sums).cpu().double().sum(dim=0).tolist()
    confusion = sum_across_ranks(confusion).numpy() if data.classes else None
    n_targets = int(data.sizes(split, plan).n_targets.sum())
    return Evaluation(nll / n_targets, n_correct / n_targets, confusion)


@torch.no_grad()
def evidence_on(
    model: Ensemble, data: TextData, split: str, *, device: torch.device, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What a classifier's models and naive Bayes say of a split, and its labels, on the CPU: log p
    and evidence (n, n_classes) each, labels (n)."""
    model.eval()
    found = []
    for batch in data.load(split, data.plan(split), device):
        with explain_out_of_memory(batch), autocast(precision, device):
            parts = model.output.parts(model.trunk(batch.src, batch.tgt_in)[:, 0])
        found.append([x.float().cpu() for x in parts] + [batch.tgt_out[:, 0].cpu()])
    log_p, evidence, labels = (torch.cat(x) for x in zip(*found))
    return log_p, evidence, labels
