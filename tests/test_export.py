"""Models in the formats of other tools: each is read again and compared with rhea's."""

import json
import math
import re
from contextlib import chdir
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PROJECT, refuse, refuse_with, run_quietly, toy_corpus, translate_toy

import export
import main
from decoding import beam_search
from errors import BadInput
from jobs import load, load_job

TRANSLATOR = ("--epochs", "40", "--warmup-steps", "20", "--beam-size", "3")


def needs(name: str):
    missing = [p for p in export.PACKAGES[name] if not find_spec(p)]
    reason = f"{', '.join(missing)} not installed; see tests/requirements.txt"
    return pytest.mark.skipif(bool(missing), reason=reason)


each_format = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(name)) for name in export.FORMATS]
)


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("translator")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "data").mkdir()
        toy_corpus(folder / "data", list, n=400)
        assert translate_toy(folder / "data", *TRANSLATOR) == 0
    return folder / "run"


@pytest.fixture
def from_there(translator, monkeypatch):
    monkeypatch.chdir(translator.parent)
    return translator


def run_export(run, name, target) -> str:
    return run_quietly("--export", name, "--run-dir", run, "--to", target)


@pytest.fixture(scope="module")
def exported(translator, tmp_path_factory):
    """The folder of the translator in a format, which is made once, and what that printed."""

    @cache
    def export_once(name: str) -> tuple[Path, str]:
        target = tmp_path_factory.mktemp("exported") / "out"
        with chdir(translator.parent):
            return target, run_export(translator, name, target)

    return export_once


def sources(run):
    """Some sentences as ids, padded, and the model with its special tokens."""
    job, _ = load_job({"run_dir": str(run), "device": "cpu", "test_only": True}, [])
    texts = ["a b c", "d e f g h i j", "b"]
    rows = [[*row, job.codec.eos_id] for row in job.codec.encode(texts)]
    src = torch.full((3, max(map(len, rows))), job.codec.pad_id)
    for line, row in zip(src, rows):
        line[: len(row)] = torch.tensor(row)
    return job, texts, rows, src


@pytest.mark.slow
@each_format
def test_an_exported_translator_answers_as_rhea_does(name, exported):
    folder, out = exported(name)
    assert "100 of 100 answers to validation sentences are the same" in out
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "bleu" in card and "licence: fill in" in card and "version:" in card
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.slow
@needs("transformers")
def test_special_tokens_inside_an_answer_of_transformers_count(from_there, exported, monkeypatch):
    import transformers

    job, *_ = sources(from_there)
    pad, bos, eos = job.codec.pad_id, job.codec.bos_id, job.codec.eos_id
    answer = export.read_transformers(job, exported("transformers")[0])
    for ids, expected in (([7, bos, 8, eos, pad], [7, bos, 8]), ([7, 8], [7, 8]), ([eos], [])):
        generate = lambda *_, ids=ids, **__: torch.tensor([[bos, *ids]])  # noqa: E731
        monkeypatch.setattr(transformers.MarianMTModel, "generate", generate)
        assert answer([5, eos]) == expected


@pytest.mark.slow
@needs("transformers")
def test_transformers_gives_the_same_logits_and_translations(from_there, exported):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    folder, _ = exported("transformers")
    job, texts, _, src = sources(from_there)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == src.tolist()
    tgt_in = torch.tensor([[job.codec.bos_id, 7, 8, 9]] * 3)
    with torch.no_grad():
        logits = theirs(**batch, decoder_input_ids=tgt_in).logits
        torch.testing.assert_close(logits, job.model(src, tgt_in), rtol=1e-4, atol=1e-4)
    found = theirs.generate(**batch, num_beams=1, max_length=60)
    found = tokenizer.batch_decode(found, skip_special_tokens=True)
    assert [text.strip() for text in found] == load(str(from_there), device="cpu", beam_size=1)(
        texts
    )


@needs("ctranslate2")
@pytest.mark.parametrize("compute_type", ["float32", "int8"])
@pytest.mark.slow
def test_ctranslate2_finds_the_same_candidates_in_a_beam(compute_type, from_there, exported):
    import ctranslate2

    folder, _ = exported("ctranslate2")
    job, _, rows, src = sources(from_there)
    tokens = export.all_tokens(job)
    translator = ctranslate2.Translator(str(folder), compute_type=compute_type)
    results = translator.translate_batch(
        [[tokens[i] for i in row] for row in rows],
        beam_size=5,
        num_hypotheses=5,
        length_penalty=0,  # as alpha = 0: no normalization on either side
        return_scores=True,
        max_decoding_length=20,
    )
    ends = {"bos_id": job.codec.bos_id, "eos_id": job.codec.eos_id}
    ours = beam_search(job.model.eval(), src, **ends, beam_size=5, alpha=0.0, n_best=5)
    for expected, result in zip(ours, results):
        best = [tokens.index(token) for token in result.hypotheses[0]]
        if compute_type == "float32":
            assert best == expected[0][1]
        assert result.scores[0] == pytest.approx(expected[0][0], abs=0.2, rel=0.05)


@pytest.mark.slow
@needs("onnx")
def test_onnx_gives_the_same_probabilities_for_any_batch(run_copy, tmp_path):
    import onnxruntime

    run_export(run_copy, "onnx", tmp_path / "out")
    job, _ = load_job({"run_dir": str(run_copy), "device": "cpu", "test_only": True}, [])
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    facts = json.loads((tmp_path / "out" / "rhea.json").read_text(encoding="utf-8"))
    for b, l_z in ((1, 1), (4, 9)):
        src = np.random.default_rng(0).integers(5, 200, (b, l_z))
        (p,) = session.run(None, {"src": src})
        tgt_in = torch.full((b, 1), facts["bos_id"])
        expected = job.model.eval()(torch.from_numpy(src), tgt_in)[:, 0].softmax(-1)
        np.testing.assert_allclose(p, expected.detach().numpy(), atol=1e-5)
    assert facts["classes"] == job.classes


@needs("onnx")
@pytest.mark.slow
def test_the_search_of_the_documentation_answers_as_rhea_does(from_there, exported, capsys):
    folder, _ = exported("onnx")
    text = (PROJECT / "docs" / "running.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    model = load(str(from_there), device="cpu", beam_size=1)
    for source in ("a b c", "d e f g h i j"):
        changed = code.replace('"my_model", "a b c"', f"{str(folder)!r}, {source!r}")
        assert changed != code
        exec(changed, {})
        assert capsys.readouterr().out.strip() == model(source)


@pytest.mark.slow
@needs("onnx")
def test_a_model_is_exported_without_its_data(run_copy, tmp_path, monkeypatch, capsys):
    def gone(*_):
        raise BadInput("--dataset x: no such file")

    monkeypatch.setattr(export, "load_splits", gone)
    out = run_export(run_copy, "onnx", tmp_path / "out")
    assert "100 of 100 answers to sentences of random tokens (no data: --dataset x" in out
    argv = ["--export", "onnx", "--run-dir", str(run_copy), "--to", "new", "--dataset", "x"]
    refuse_with(argv, ["--dataset x: no such file"], capsys)


@pytest.mark.slow
@needs("ctranslate2")
def test_a_model_that_answers_otherwise_is_not_exported(from_there, tmp_path, monkeypatch, capsys):
    write, read = export.FORMATS["ctranslate2"]

    def spoil(job, folder):
        with torch.no_grad():
            job.model.decoder[0].norm_3.gamma.neg_()
        answer = read(job, folder)  # of the weights as they were
        return answer

    monkeypatch.setitem(export.FORMATS, "ctranslate2", (write, spoil))
    argv = ["--export", "ctranslate2", "--run-dir", str(from_there), "--to", str(tmp_path / "x")]
    assert main.main(argv) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused(run_copy, capsys, monkeypatch):
    argv = ["--run-dir", str(run_copy), "--export"]
    lines = "\n".join(refuse([*argv, "ctranslate2", "--to", "."], capsys, 2))
    assert "no model like this classifier; give --export onnx" in lines
    assert "--to .: exists" in lines
    assert "--to" in "\n".join(refuse([*argv, "onnx"], capsys))
    monkeypatch.setitem(export.PACKAGES, "onnx", ("no_such_package",))
    lines = "\n".join(refuse([*argv, "onnx", "--to", "new"], capsys))
    assert "cannot import no_such_package" in lines and "pip install no_such_package" in lines
    assert not Path("new").exists()


@pytest.mark.slow
def test_scores_are_finite(from_there):
    model = load(str(from_there), device="cpu")
    ((first, *_),) = model.best(["a b c"], 3)
    assert math.isfinite(first[1])
