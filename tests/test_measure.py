"""Benchmarks, FLOP counts, and the comparison of a device with the CPU."""

import getpass
import json
import socket
import time

import pytest
import torch
from helpers import TINY, run_quietly
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import main
import measure
import models
import settings
from config import ModelConfig
from data import Batch
from models import Transformer, TransformerClassifier

ODD = ModelConfig(
    n_layers=2, d_model=10, d_ff=14, n_heads=3, d_attn=5, d_mid=4, attention="matmul", dropout=0.0
)
FORMS = settings.option_fields()["attention"].metadata["choices"]


def build(classifies: bool = False, **changes) -> nn.Module:
    config, sizes = ModelConfig(**vars(ODD) | changes), {"n_vocab": 30, "pad_id": 0, "max_len": 90}
    if classifies:
        return TransformerClassifier(config, n_classes=6, **sizes)
    return Transformer(config, **sizes)


# ------------------------------------------------------------------------------------------- FLOP/s


@pytest.mark.parametrize("form", FORMS)
def test_flops_of_one_layer_by_hand(form):
    config = ModelConfig(n_layers=1, d_model=2, d_ff=3, n_heads=1, attention=form)
    model = Transformer(config, n_vocab=5, pad_id=0, max_len=9)
    # One sentence, 2 source positions and 1 target position, products of (l, m) and (m, n) cost
    # 2 l m n. Self-attention of the encoder: W_q, W_k, W_v, W_o, then Q K^T and S V.
    encoder = 4 * (2 * 2 * 2 * 2) + 2 * (2 * 2 * 2 * 2) + 2 * (2 * 2 * 2 * 3)
    self_attention = 4 * (2 * 1 * 2 * 2) + 2 * (2 * 1 * 2 * 1)
    cross_attention = 2 * (2 * 1 * 2 * 2) + 2 * (2 * 2 * 2 * 2) + 2 * (2 * 1 * 2 * 2)
    decoder = self_attention + cross_attention + 2 * (2 * 1 * 2 * 3)
    logits = 2 * 1 * 2 * 5
    assert measure.forward_flops(model, {(2, 1): 1}) == encoder + decoder + logits


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classifies", [False, True])
def test_flops_are_those_of_the_batches_and_a_third_of_a_step(classifies, form):
    shapes = {(7, 1 if classifies else 9): 3, (5, 1 if classifies else 80): 2, (1, 1): 4}
    total = 0
    for (l_z, l_x), n in shapes.items():
        # torch counts nothing for its fused kernel on a CPU, so the batches take another form.
        src, tgt_in = torch.randint(4, 30, (n, l_z)), torch.randint(4, 30, (n, l_x))
        with FlopCounterMode(display=False) as counter:
            build(classifies)(src, tgt_in).sum().backward()
        total += counter.get_total_flops()
    assert 3 * measure.forward_flops(build(classifies, attention=form), shapes) == total


def test_hundreds_of_shapes_take_seven_forward_passes(monkeypatch):
    calls, forward = [], Transformer.forward

    def counted(self, *args):
        calls.append(1)
        return forward(self, *args)

    monkeypatch.setattr(Transformer, "forward", counted)
    shapes = {(l_z, l_x): 1 for l_z in range(1, 80, 4) for l_x in range(1, 80, 4)}
    assert measure.forward_flops(build(), shapes) > 0 and len(calls) == 7


def test_a_model_that_is_not_quadratic_in_the_lengths_is_counted_shape_by_shape():
    class Window(nn.Module):
        """Looks at no more than 4 positions."""

        def __init__(self):
            super().__init__()
            self.W = nn.Linear(3, 3, bias=False)

        def forward(self, src, tgt_in):
            return self.W(self.W.weight.new_zeros(src.shape[1], 3)[:4])

    assert measure.forward_flops(Window(), {(2, 1): 1, (9, 1): 2}) == 2 * 3 * 3 * (2 + 2 * 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reference_product_converts_nothing_while_it_is_timed(precision):
    class Operations(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with Operations() as operations:
        measure.matmul_flops_per_second(torch.device("cpu"), precision, size=16)
    first = operations.names.index("mm.default")
    timed = [name for name in operations.names[first:] if name != "t.default"]  # a view
    assert timed == ["mm.default"] * 6


# ------------------------------------------------------------------------------------------- timing

FIELDS = """
workload dataset task batch_size batch_tokens pad_to max_length accumulate r_drop n_layers d_model
d_ff n_heads d_attn d_mid dropout activation attention positions ensemble parameters
plan_fingerprint work_fingerprint processes device device_name label processor processor_model
driver mps_fallback cores threads system python torch precision compile tf32 deterministic date
steps steps_per_epoch repetitions warm_up_steps seconds_per_step tokens_per_second
positions_per_second seconds_per_epoch seconds_per_epoch_is peak_process_bytes peak_device_bytes
model_flops_per_second matmul_flops_per_second share_of_matmul_flops start_seconds compile_seconds
""".split()


@pytest.fixture
def quick(monkeypatch):
    """A reference product that takes no time."""
    monkeypatch.setattr(measure, "matmul_flops_per_second", lambda *_: 1e9)


def benchmark(data, name: str, *options) -> dict:
    run_quietly(*TINY, "--dataset", data, "--run-dir", name, "--benchmark", *options)
    with open(f"{name}/benchmark.json", encoding="utf-8") as file:
        return json.load(file)


@pytest.mark.slow
def test_a_record_holds_every_field_and_nothing_private(slice_of_reviews):
    record = benchmark(slice_of_reviews, "b", 2, "--label", "my machine")
    assert record.keys() == set(FIELDS)
    text = json.dumps(record)
    for private in (str(slice_of_reviews), "reviews", getpass.getuser(), socket.gethostname(), "/"):
        assert private not in text
    assert record["label"] == "my machine"
    assert record["matmul_flops_per_second"] > 1e8
    assert record["model_flops_per_second"] > 0
    assert record["share_of_matmul_flops"] == pytest.approx(
        record["model_flops_per_second"] / record["matmul_flops_per_second"]
    )
    assert record["peak_process_bytes"] > 2**26 and record["peak_device_bytes"] is None
    assert 0.5 < record["start_seconds"] < 3600
    for name in ("seconds_per_step", "seconds_per_epoch"):
        spread = record[name]
        assert 0 < spread["least"] <= spread["median"] <= spread["greatest"]


@pytest.mark.slow
def test_an_epoch_is_measured_or_extrapolated_by_positions(slice_of_reviews, quick):
    whole = benchmark(slice_of_reviews, "whole", 1000)
    assert whole["steps"] == whole["steps_per_epoch"] == 5
    assert whole["seconds_per_epoch_is"] == "measured"
    epoch, step = (whole[k]["median"] for k in ("seconds_per_epoch", "seconds_per_step"))
    assert epoch == pytest.approx(5 * step)
    part = benchmark(slice_of_reviews, "part", 2)
    assert part["steps"] == 2
    assert part["seconds_per_epoch_is"] == "extrapolated from 2 steps"
    # Positions in a second are the same, counted over the part or over the extrapolated whole.
    n_positions = whole["positions_per_second"] * epoch
    extrapolated = part["positions_per_second"] * part["seconds_per_epoch"]["median"]
    assert extrapolated == pytest.approx(n_positions)


@pytest.mark.slow
def test_the_time_of_the_model_is_in_the_figure(slice_of_reviews, quick, monkeypatch):
    now, forward = [0.0], TransformerClassifier.forward

    def sleepy(self, *args):
        now[0] += 0.01
        time.sleep(0.01)
        return forward(self, *args)

    monkeypatch.setattr(TransformerClassifier, "forward", sleepy)
    slow = benchmark(slice_of_reviews, "slow", 5)["seconds_per_step"]
    assert slow["least"] >= 0.01  # by the real clock
    # By a clock that only the model advances, the figure is the model's, however busy the machine.
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    alone = benchmark(slice_of_reviews, "alone", 5)["seconds_per_step"]
    assert alone == pytest.approx({"median": 0.01, "least": 0.01, "greatest": 0.01})


def test_peak_memory_is_that_of_the_steps_alone(slice_of_reviews, monkeypatch):
    used = []
    monkeypatch.setattr(measure, "matmul_flops_per_second", lambda *_: used.append(1) or 1e9)
    monkeypatch.setattr(measure, "forward_flops", lambda *_: used.append(1) or 1)
    monkeypatch.setattr(measure, "peak_memory", lambda _: (2**20, len(used)))
    assert benchmark(slice_of_reviews, "b", 1)["peak_device_bytes"] == 0 and len(used) == 2


@pytest.mark.slow
def test_equal_work_has_equal_fingerprints_and_other_work_another(slice_of_reviews, quick):
    def work(name: str, *options) -> str:
        return benchmark(slice_of_reviews, name, 1, *options)["work_fingerprint"]

    first = work("a")
    assert work("b", "--attention", "list", "--lr", "1e-4") == first
    others = [work("c", "--d-ff", 32), work("d", "--pad-to", 256), work("e", "--r-drop", 0)]
    assert len({first, *others}) == 4


def test_the_original_workload_is_the_published_one():
    options = settings.resolve({"workload": "original"})
    assert (options.dataset, options.pad_to, options.max_length) == ("rotten_tomatoes", 512, 512)
    assert (options.batch_size, options.batch_tokens, options.dropout) == (16, None, 0.1)
    assert (options.n_layers, options.d_model, options.d_ff, options.n_heads) == (6, 16, 64, 8)
    assert options.r_drop == 0


@pytest.mark.parametrize("name", ["reviews", "translation"])
def test_other_workloads_are_the_recipes(name):
    options = vars(settings.resolve({"workload": name}))
    dataset = {"reviews": "rotten_tomatoes", "translation": "libreoffice_help"}[name]
    recipe = vars(settings.resolve({"dataset": dataset}))
    alone = {"ensemble": 1, "naive_bayes": False}  # the time of one model
    assert options == recipe | {"workload": name, **alone}


# ------------------------------------------------------------------------------- device against CPU


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_cpu_matches_the_cpu(precision, slice_of_reviews):
    argv = [*TINY, "--dataset", slice_of_reviews, "--check-device", "--precision", precision]
    out = run_quietly(*argv)
    assert "matches the CPU" in out and "logits" in out and "gradient of " in out


def test_a_device_that_computes_something_else_is_found(slice_of_reviews, monkeypatch, capsys):
    attend = models.MHAttention.forward

    def wrong(self, *args):
        return attend(self, *args) * (1.001 if self.form == "fused" else 1)

    monkeypatch.setattr(models.MHAttention, "forward", wrong)
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--check-device"]
    assert main.main(argv) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: cpu does not match the CPU") and "1e-04" in line


def test_each_tensor_is_compared_with_the_reference():
    batch = Batch(*(torch.randint(4, 30, (3, 7)) for _ in range(3)), n_targets=21, n_tokens=42)
    where = {"device": torch.device("cpu"), "precision": "fp32", "label_smoothing": 0.1}
    model, reference = build(dropout=0.3), build(dropout=0.3)
    errors = measure.check_device(model, reference, batch, **where)
    assert errors[0][1] < 1e-6 and {name for name, _ in errors} == {
        "loss",
        "logits",
        *(f"gradient of {name}" for name, _ in model.named_parameters()),
    }
    model, reference = build(), build()
    hook = model.encoder[1].feed_forward.W_2.weight.register_hook(lambda g: g * 1.01)
    errors = measure.check_device(model, reference, batch, **where)
    hook.remove()
    (name, error), (_, next_error) = errors[:2]
    assert name == "gradient of encoder.1.feed_forward.W_2.weight"
    assert error == pytest.approx(0.01, rel=0.01) and next_error < 1e-5


@pytest.mark.parametrize("name", ["embedding.W_e", "decoder.0.cross_attention.W_q.weight"])
def test_a_weight_changed_by_one_percent_is_found(name, slice_of_reviews, monkeypatch, capsys):
    load = TransformerClassifier.load_state_dict

    def load_changed(self, weights):
        return load(self, {**weights, name: weights[name] * 1.01})

    monkeypatch.setattr(TransformerClassifier, "load_state_dict", load_changed)
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--check-device"]
    assert main.main(argv) == 1
    assert "does not match the CPU" in capsys.readouterr().err
