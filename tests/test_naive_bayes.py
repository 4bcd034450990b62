import json
import math
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import TINY, csv_bytes, events, refuse_with, run_quietly
from processes import ranks_quietly
from runs import resume

import jobs
from checkpoints import TrainingState
from data import Batch
from naive_bayes import NaiveBayes

PAD = 0
# Three classes of unequal size; a token twice in a sentence, pairs that are shared, and padding.
SENTENCES = [[5, 6, 7, 5], [5, 6, 2, 0], [7, 5, 2, 0], [8, 9, 7, 6], [9, 9, 9, 2], [6, 2, 0, 0]]
LABELS = [0, 0, 0, 1, 1, 2]


def batches(sentences=SENTENCES, labels=LABELS):
    """The sentences in batches of four."""
    src, tgt = torch.tensor(sentences), torch.tensor(labels)[:, None]
    for s, t in zip(src.split(4), tgt.split(4)):
        yield Batch(s, torch.ones_like(t), t, n_targets=len(t), n_tokens=0)


def counted(**data) -> NaiveBayes:
    model = NaiveBayes(3, PAD)
    model.count(batches(**data))
    return model


def features(sentence) -> list:
    ids = [i for i in sentence if i != PAD]
    return [*ids, *pairwise(ids)]


PRIOR = [(LABELS.count(k) + 1) / (len(LABELS) + 3) for k in range(3)]


def expected(sentence, training) -> list[float]:
    """The sum of r of the docstring, written out."""
    counts = [Counter(), Counter(), Counter()]
    for s, label in training:
        counts[label].update(features(s))
    evidence = [0.0] * 3
    for f in features(sentence):
        total = sum(c[f] for c in counts)
        for k in range(3):
            evidence[k] += math.log((counts[k][f] + 1) / (total * PRIOR[k] + 1))
    return evidence


def test_the_evidence_is_the_formula_s():
    model, pairs = counted(), list(zip(SENTENCES, LABELS))
    new = [[9, 6, 2, 0], [3, 4, 5, 6]]  # 3 and 4 are unknown
    wanted = torch.tensor([expected(s, pairs) for s in SENTENCES + new]) + torch.tensor(PRIOR).log()
    torch.testing.assert_close(model(torch.tensor(SENTENCES + new)), wanted)
    torch.testing.assert_close(
        counted(sentences=SENTENCES[::-1], labels=LABELS[::-1]).ratios, model.ratios
    )


def test_padding_and_unknown_tokens_say_nothing():
    model, src = counted(), torch.tensor(SENTENCES)
    wider = torch.nn.functional.pad(src, (0, 3), value=PAD)
    torch.testing.assert_close(model(wider), model(src))
    torch.testing.assert_close(model(torch.tensor([[11, 12, 13]])), torch.tensor([PRIOR]).log())


def test_a_rare_class_loses_little_by_tokens_that_do_not_concern_it():
    model = NaiveBayes(2, PAD)
    model.count(batches([[5, 2, 0, 0]] * 99 + [[6, 2, 0, 0]], [0] * 99 + [1]))
    evidence = model.ratios[model.features(torch.tensor([[5]]))[0, 0]]
    assert -1.2 < evidence[1] < -1 and abs(evidence[0]) < 0.02  # with 2 P(label) for 1: -3.9


def test_the_weights_make_the_labels_most_probable():
    torch.manual_seed(0)
    model, labels = NaiveBayes(3, PAD), torch.arange(600) % 3
    truth = torch.nn.functional.one_hot(labels, 3).float()
    log_p, evidence = ((truth + torch.randn(600, 3)) * scale for scale in (2.0, 0.5))
    model.weigh(log_p, evidence, labels)

    def loss(w) -> float:
        logits = w[0] * log_p + w[1] * evidence
        cross_entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        return cross_entropy + (w[0] - 1) ** 2 + w[1] ** 2

    found = model.weights.tolist()
    for change in ((0.02, 0), (-0.02, 0), (0, 0.02), (0, -0.02)):
        assert loss(found) < loss([w + x for w, x in zip(found, change)])
    assert 0.3 < found[0] < 0.8 and 0.8 < found[1] < 2.5


@pytest.mark.parametrize("n", [1, 3, 300])
def test_evidence_without_worth_has_little_weight_and_certainty_a_finite_one(n):
    torch.manual_seed(0)
    model, labels = NaiveBayes(3, PAD), torch.arange(n) % 3
    right = 5 * torch.nn.functional.one_hot(labels, 3).float().log_softmax(dim=-1)
    model.weigh(right, torch.randn(n, 3), labels)
    assert model.weights.isfinite().all() and model.weights[1] < 0.5
    model.weigh(torch.randn(n, 3).log_softmax(dim=-1), right, labels)
    assert model.weights.isfinite().all()
    model.weigh(-right, -right, labels)
    assert model.weights.min() >= 0 and model.weights[1] == 0


# --------------------------------------------------------------------------------------------- runs

WITH = ["--naive-bayes", "--max-steps", "6"]


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Path:
    """Sentences whose label a word tells."""
    folder, draw = tmp_path_factory.mktemp("told"), random.Random(0)
    for split, n in (("train", 150), ("validation", 20), ("test", 20)):
        labels = [draw.choice("ab") for _ in range(n)]
        rows = [(f"film {draw.randrange(50)} word{label}", label) for label in labels]
        (folder / f"{split}.csv").write_bytes(csv_bytes(rows))
    return folder


def saved_counts(run) -> list[torch.Tensor]:
    naive_bayes = jobs.load(str(run), device="cpu").model.naive_bayes
    return [naive_bayes.ratios, naive_bayes.log_prior]


@pytest.mark.parametrize("n_models", [1, 2])
def test_a_run_answers_with_it_but_trains_as_without(told, n_models):
    argv = [*TINY, "--dataset", str(told), "--max-steps", "6"]
    argv += ["--ensemble", str(n_models), "--run-dir"]
    run_quietly(*argv, "with", "--naive-bayes")
    run_quietly(*argv, "without", "--no-naive-bayes")
    ours, plain = (jobs.load(run, device="cpu").model for run in ("with", "without"))
    plain = list(getattr(plain, "models", [plain]))
    for a, b in zip(ours.models, plain, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q)
    src, tgt_in = torch.randint(3, 200, (4, 9)), torch.full((4, 1), 1)
    w, naive_bayes = ours.naive_bayes.weights.tolist(), ours.naive_bayes
    assert w[1] > 0.1
    with torch.no_grad():
        p = torch.stack([m.eval()(src, tgt_in).softmax(-1)[:, 0] for m in plain]).mean(dim=0)
        mixed = w[0] * p.log() + w[1] * naive_bayes(src)
        torch.testing.assert_close(ours.eval()(src, tgt_in)[:, 0], mixed.log_softmax(-1))
    for name in ("epoch", "step"):  # the models are chosen without it
        keys = ("validation_loss", "loss")
        scores = [[e.get(k) for e in events(r, name) for k in keys] for r in ("with", "without")]
        assert scores[0] == pytest.approx(scores[1])


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_file_and_processes_count_alike(told):
    argv = [*TINY, *WITH, "--dataset", str(told), "--run-dir"]
    run_quietly(*argv, "whole")
    run_quietly(*argv, "cut", "--max-steps", "3")
    resume("cut", "--max-steps", 6)
    assert Path("whole/best.safetensors").read_bytes() == Path("cut/best.safetensors").read_bytes()
    ranks_quietly(2, *argv, "two")
    for a, b in zip(saved_counts("whole"), saved_counts("two"), strict=True):
        assert torch.equal(a, b)


def test_a_run_that_begins_with_other_weights_counts_its_own_data_alone(told):
    run_quietly(*TINY, *WITH, "--dataset", told, "--run-dir", "first")
    how = "--batch-size 32 --max-steps 3 --warmup-steps 2 --epochs 1 --run-dir b".split()
    run_quietly("--init-from", "first", "--dataset", told, *how)
    for a, b in zip(saved_counts("first"), saved_counts("b"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("origin", [[], ["--init-from", "first"]])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_as_it_would_have(told, origin):
    run_quietly(*TINY, *WITH, "--dataset", told, "--run-dir", "first")
    how = "--batch-size 32 --max-steps 3 --warmup-steps 2 --epochs 1".split()
    how = [*origin, *how] if origin else [*TINY, *WITH, "--max-steps", 3]
    for run in ("whole", "cut"):
        run_quietly(*how, "--dataset", told, "--run-dir", run)
    for name in ("last.pt", "previous.pt", "best.safetensors", "metrics.jsonl"):
        Path("cut", name).unlink()
    resume("cut")
    assert Path("whole/best.safetensors").read_bytes() == Path("cut/best.safetensors").read_bytes()


@pytest.mark.slow
def test_it_costs_no_training_step_and_can_be_timed_and_checked(told, capsys):
    argv = [*TINY, "--dataset", told, "--warmup-steps", 1, "--benchmark", 1, "--run-dir"]
    run_quietly(*argv, "without")
    run_quietly(*argv, "with", "--naive-bayes")
    records = [json.loads(Path(run, "benchmark.json").read_text()) for run in ("with", "without")]
    for name in ("work_fingerprint", "plan_fingerprint", "parameters"):
        assert records[0][name] == records[1][name]
    flops = [r["model_flops_per_second"] * r["seconds_per_step"]["median"] for r in records]
    assert flops[0] == pytest.approx(flops[1])
    assert "matches the CPU" in run_quietly(
        *TINY, "--naive-bayes", "--dataset", told, "--check-device"
    )


def test_a_translator_has_none(capsys):
    argv = ["--task", "translation", "--naive-bayes", "--dataset", "x"]
    refuse_with(argv, ["--naive-bayes", "--task classification", "leave it out"], capsys)


def test_a_run_that_ended_goes_on_from_its_best_epoch(told, monkeypatch):
    """Naive Bayes changes best.safetensors, but not which epoch was the best."""
    run_quietly(*TINY, "--naive-bayes", "--dataset", told, "--run-dir", "run")
    forgotten = []
    monkeypatch.setattr(TrainingState, "forget_best", forgotten.append)
    resume("run", "--epochs", 3)
    assert not forgotten


@pytest.mark.slow
def test_onnx_gives_the_same_probabilities(told):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run_quietly(*TINY, *WITH, "--dataset", told, "--run-dir", "run")
    run_quietly("--export", "onnx", "--run-dir", "run", "--to", "out")
    session = onnxruntime.InferenceSession("out/model.onnx")
    model = jobs.load("run", device="cpu").model.eval()
    assert model.naive_bayes.weights[1] > 0.1
    for shape in ((1, 1), (1, 9), (3, 7)):
        src = torch.randint(3, 200, shape)
        src[:, shape[1] // 2 + 1 :] = model.naive_bayes.pad_id
        with torch.no_grad():
            p = model(src, torch.full((shape[0], 1), 1))[:, 0].softmax(-1)
        (found,) = session.run(None, {"src": src.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), p, rtol=1e-4, atol=1e-5)
