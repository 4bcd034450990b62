"""Several models that answer together: their mean, their gradients, search, and runs."""

import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, events, refuse_with, run_quietly, write_files
from reference import EOS, PAD, each_model, inputs, transformer
from runs import resume, stop_after

import decoding
import evaluation
import export
import jobs
from config import DataConfig
from data import NO_TARGET, Batch, TextData
from decoding import beam_search, greedy
from ensemble import Ensemble
from jobs import load_job
from optimization import loss_and_counts, train_step
from settings import extract_config
from splits import load_splits

SIZES = ({}, {"d_model": 24}, {"n_layers": 1, "n_heads": 2})  # the models may differ
ENDS = {"bos_id": 1, "eos_id": EOS}


def of_three(make) -> Ensemble:
    torch.manual_seed(0)
    return Ensemble(make(**sizes) for sizes in SIZES).double()


def targets(make, tgt_in):
    return tgt_in.masked_fill(tgt_in == PAD, NO_TARGET) % (17 if make is transformer else 5)


@each_model
def test_the_probabilities_are_the_mean_of_those_of_the_models(make):
    model = of_three(make).eval()
    src, tgt_in = inputs(make)
    expected = sum(each(src, tgt_in).softmax(dim=-1) for each in model.models) / 3
    torch.testing.assert_close(model(src, tgt_in).exp(), expected.float(), rtol=0, atol=1e-6)


@each_model
@pytest.mark.parametrize("r_drop", [0.0, 2.0])
def test_each_model_is_trained_as_it_would_be_alone(make, r_drop):
    model = of_three(make).train()
    src, tgt_in = (x.repeat(2, 1) for x in inputs(make))
    how = {"tgt_out": targets(make, tgt_in), "label_smoothing": 0.1, "r_drop": r_drop}
    loss = partial(loss_and_counts, **how)
    sums = model(src, tgt_in, loss)
    sums[0].backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone = [each(src, tgt_in, loss) for each in model.models]
    for each in alone:
        each[0].backward()
    for ours, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(sums[0], sum(each[0] for each in alone))
    for i in (1, 2):  # what is logged is the mean
        torch.testing.assert_close(sums[i], sum(each[i] for each in alone) / 3)


def test_the_gradients_of_each_model_are_clipped_by_its_own_norm():
    src, tgt_in = inputs(transformer)
    batch = Batch(src, tgt_in, targets(transformer, tgt_in), n_targets=13, n_tokens=25)

    def step(model):
        optimizer = torch.optim.SGD(model.parameters())
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        how = {"lr": 1.0, "max_norm": 0.01, "label_smoothing": 0.1}
        train_step(model.train(), [batch], optimizer, scaler, nullcontext(), **how)

    together, alone = of_three(transformer), of_three(transformer)
    step(together)
    for each in alone.models:
        step(each)
    for ours, p in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, p, rtol=0, atol=1e-12)


def test_a_cached_step_is_the_last_row_of_the_trunk_as_hypotheses_branch():
    model, k = of_three(transformer).eval(), 2
    src, _ = inputs(transformer)
    cache, tokens = model.start(src, k), torch.empty(len(src), k, 0, dtype=torch.int64)
    for t in range(6):
        ids = torch.randint(3, 17, (len(tokens), k, 1))
        tokens = torch.cat((tokens, ids), dim=2)
        found = model.step(ids[:, :, 0], cache).flatten(0, 1)
        expected = model.trunk(src.repeat_interleave(k, dim=0), tokens.flatten(0, 1))[:, -1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        parents = torch.randint(0, k, (len(tokens), k))
        tokens = tokens.gather(1, parents[:, :, None].expand(tokens.shape))
        cache.branch(parents)
        if t == 2:
            kept = torch.tensor([2, 0])
            cache.keep(kept)
            tokens, src = tokens[kept], src[kept]


def test_a_model_with_itself_finds_what_it_finds_alone(monkeypatch):
    monkeypatch.setattr(decoding, "EXTRA_LENGTH", 3)
    one = of_three(transformer).models[0].eval()
    src, _ = inputs(transformer)
    twice = Ensemble([one, one])
    assert greedy(twice, src, **ENDS) == greedy(one, src, **ENDS)
    how = {**ENDS, "beam_size": 3, "alpha": 0.6, "n_best": 2}
    found, expected = (beam_search(model, src, **how) for model in (twice, one))
    assert [[ids for _, ids in row] for row in found] == [[i for _, i in row] for row in expected]
    for row, wanted in zip(found, expected):
        assert [score for score, _ in row] == pytest.approx([x for x, _ in wanted], abs=1e-5)


# --------------------------------------------------------------------------------------------- runs


@pytest.mark.slow
def test_an_ensemble_stops_resumes_and_answers_as_one_model(slice_of_reviews, capsys):
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--ensemble", "2", "--run-dir"]
    run_quietly(*argv, "whole")
    stop_after(3, [*argv, "run"])
    resume("run")
    weights = [Path(run, "best.safetensors").read_bytes() for run in ("whole", "run")]
    assert weights[0] == weights[1]
    model = jobs.load("run", device="cpu").model
    assert len(model.models) == 2
    assert not torch.equal(*(each.embedding.W_e for each in model.models))
    assert run_quietly("--test-only", "--run-dir", "run").count("accuracy") == 1
    capsys.readouterr()
    argv = ["--run-dir", "run", "--export", "ctranslate2", "--to", "out"]
    refuse_with(argv, ["--export ctranslate2", "no model like this classifier"], capsys)


@pytest.mark.slow
def test_other_tools_have_no_ensembles_of_translators(finished_translator):
    job, _ = load_job({"run_dir": str(finished_translator[0]), "device": "cpu"}, [])
    job.model = Ensemble([job.model, job.model])
    for name in ("transformers", "ctranslate2"):
        (problem,) = export.model_problems(job, name)
        assert f"--export {name}: one model alone" in problem


@pytest.mark.slow
def test_validation_computes_few_logits_at_once(finished_translator, patch):
    job, _ = load_job({"run_dir": str(finished_translator[0]), "device": "cpu"}, [])
    config, codec = extract_config(DataConfig, job.options), job.codec
    data = TextData(config, load_splits(config, ["validation"]).tables, codec, None)
    model, counts = Ensemble([job.model, job.model]), []
    where = {"device": torch.device("cpu"), "precision": "fp32"}
    expected = evaluation.evaluate_split(job.model, data, "validation", **where)
    patch.setattr(evaluation, "ROWS", 7)
    model.output.register_forward_hook(lambda _, args, out: counts.append(out.shape[:-1].numel()))
    found = evaluation.evaluate_split(model, data, "validation", **where)
    assert max(counts) == 7 and sum(counts) > 100
    assert (found.loss, found.accuracy) == pytest.approx((expected.loss, expected.accuracy))


def test_the_runs_of_a_folder_answer_together(slice_of_reviews, capsys):
    argv = [*TINY, "--dataset", slice_of_reviews, "--run-dir", "two", "--seeds", "0-1"]
    out = run_quietly(*argv)
    write_files({"in.txt": b"a wonderful , moving film\ndull .\n"})
    texts = ["a wonderful , moving film", "dull ."]
    each = [jobs.load(f"two/seed-{i}", device="cpu").probabilities(texts) for i in (0, 1)]
    both = jobs.load("two", device="cpu").probabilities(texts)
    for p, q, mean in zip(*each, both):
        for label in mean:
            assert mean[label] == pytest.approx((p[label] + q[label]) / 2, abs=1e-6)
    assert each[0] != each[1]
    run_quietly("--predict", "in.txt", "--run-dir", "two", "--output", "out.jsonl")
    lines = [json.loads(line) for line in Path("out.jsonl").read_bytes().splitlines()]
    assert [line["answers"][0]["label"] for line in lines] == [max(p, key=p.get) for p in both]
    (test,) = events("two", "test")  # after --seeds they are tested together
    assert out.splitlines()[-1].startswith(f"test of 40 sentences: loss {test['loss']:.3f}")
    scores = [events(f"two/seed-{i}", "test")[-1]["loss"] for i in (0, 1)]
    assert test["loss"] <= np.mean(scores)  # the logarithm is concave


def test_runs_of_a_folder_may_be_ensembles(train):
    Path("both").mkdir()
    for i, n in enumerate((2, 1)):
        shutil.move(train(f"r{i}", "--max-steps", 1, "--ensemble", n, "--seed", i), "both")
    text = ["a wonderful , moving film"]
    (one,), (two,) = (jobs.load(f"both/r{i}", device="cpu").probabilities(text) for i in (0, 1))
    predictor = jobs.load("both", device="cpu")
    (both,) = predictor.probabilities(text)
    assert len(predictor.model.models) == 2  # runs count alike, whatever their models
    for label, p in both.items():
        assert p == pytest.approx((one[label] + two[label]) / 2, abs=1e-6)


def test_runs_with_other_tokenizers_cannot_answer_together(train, capsys):
    Path("both").mkdir()
    for name, size in (("a", 300), ("b", 310)):
        shutil.move(train(name, "--max-steps", 1, "--vocab-size", size), f"both/{name}")
    write_files({"in.txt": b"dull .\n"})
    capsys.readouterr()
    argv = ["--run-dir", "both", "--predict", "in.txt"]
    refuse_with(argv, ["--run-dir both: b has another tokenizer", "one run"], capsys)
    shutil.rmtree("both/b")
    (Path("both/a/best.safetensors")).unlink()
    refuse_with(argv, ["both/a", "best.safetensors is missing"], capsys)
