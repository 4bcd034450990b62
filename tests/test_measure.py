"""Benchmarks, records, the figure of epoch times, and the check of a device."""

import getpass
import json
import math
import socket
import time

import matplotlib.figure
import pytest
import torch
from test_main import TINY, refuse, run_quietly, slice_of_reviews  # noqa: F401, a fixture
from torch.utils.flop_counter import FlopCounterMode

import comp_utils
import main
import measure
import models
import settings
from comp_utils import BadInput
from data import ASSETS, Batch
from models import ModelConfig, Transformer, TransformerClassifier

ODD = ModelConfig(
    n_layers=2, d_model=10, d_ff=14, n_heads=3, d_attn=5, d_mid=4, attention="matmul", dropout=0.0
)


# ----------------------------------------------------------------------------------------- counting


def test_flops_of_one_layer_by_hand():
    config = ModelConfig(n_layers=1, d_model=2, d_ff=3, n_heads=1)
    # One sentence, 2 source positions and 1 target position, products of (l, m) and (m, n) cost
    # 2 l m n. Self-attention of the encoder: W_q, W_k, W_v, W_o, then Q K^T and S V.
    encoder = 4 * (2 * 2 * 2 * 2) + 2 * (2 * 2 * 2 * 2) + 2 * (2 * 2 * 2 * 3)
    self_attention = 4 * (2 * 1 * 2 * 2) + 2 * (2 * 1 * 2 * 1)
    cross_attention = 2 * (2 * 1 * 2 * 2) + 2 * (2 * 2 * 2 * 2) + 2 * (2 * 1 * 2 * 2)
    decoder = self_attention + cross_attention + 2 * (2 * 1 * 2 * 3)
    logits = 2 * 1 * 2 * 5
    assert measure.model_flops(config, n=1, l_z=2, l_x=1, n_out=5) == encoder + decoder + logits


@pytest.mark.parametrize("classifies", [False, True])
def test_flops_are_those_that_torch_counts(classifies):
    sizes = {"n_vocab": 30, "pad_id": 0, "max_len": 20}
    n_out, l_x = (6, 1) if classifies else (30, 9)
    model = (
        TransformerClassifier(ODD, n_classes=6, **sizes)
        if classifies
        else Transformer(ODD, **sizes)
    )
    src, tgt_in = torch.randint(4, 30, (3, 7)), torch.randint(4, 30, (3, l_x))
    with FlopCounterMode(display=False) as counter:
        logits = model(src, tgt_in)
    forward = measure.model_flops(ODD, n=3, l_z=7, l_x=l_x, n_out=n_out)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() == 2 * forward


# ------------------------------------------------------------------------------------------- timing

FIELDS = [
    "workload",
    "dataset",
    "task",
    "batch_size",
    "batch_tokens",
    "pad_to",
    "max_length",
    "accumulate",
    "r_drop",
    "n_layers",
    "d_model",
    "d_ff",
    "n_heads",
    "d_attn",
    "d_mid",
    "dropout",
    "activation",
    "attention",
    "positions",
    "parameters",
    "plan_fingerprint",
    "work_fingerprint",
    "processes",
    "device",
    "device_name",
    "processor",
    "driver",
    "mps_fallback",
    "cores",
    "threads",
    "system",
    "python",
    "torch",
    "precision",
    "compile",
    "tf32",
    "deterministic",
    "date",
    "updates",
    "updates_of_an_epoch",
    "repetitions",
    "warm_up_updates",
    "seconds_per_update",
    "tokens_per_second",
    "positions_per_second",
    "seconds_per_epoch",
    "seconds_per_epoch_is",
    "peak_process_bytes",
    "peak_device_bytes",
    "model_flops_per_second",
    "matmul_flops_per_second",
    "share_of_matmul_flops",
    "start_seconds",
    "compile_seconds",
]


@pytest.fixture
def quick(monkeypatch):
    """A matrix product of a size that costs nothing."""
    monkeypatch.setattr(measure, "matmul_flops_per_second", lambda *_: 1e9)


def benchmark(data, name: str, *options) -> dict:
    run_quietly(*TINY, "--dataset", data, "--run-dir", name, "--benchmark", *options)
    with open(f"{name}/benchmark.json", encoding="utf-8") as file:
        return json.load(file)


def test_a_record_holds_every_field_and_nothing_private(slice_of_reviews, capsys):
    record = benchmark(slice_of_reviews, "b", 2)
    assert record.keys() == set(FIELDS)
    text = json.dumps(record)
    for private in (str(slice_of_reviews), "reviews", getpass.getuser(), socket.gethostname(), "/"):
        assert private not in text.replace("tokens/s", "")
    assert record["matmul_flops_per_second"] > 1e8
    assert record["model_flops_per_second"] > 0
    assert record["share_of_matmul_flops"] == pytest.approx(
        record["model_flops_per_second"] / record["matmul_flops_per_second"]
    )
    assert record["peak_process_bytes"] > 2**26 and record["peak_device_bytes"] is None
    assert 0.5 < record["start_seconds"] < 3600
    for name in ("seconds_per_update", "seconds_per_epoch"):
        spread = record[name]
        assert 0 < spread["least"] <= spread["median"] <= spread["greatest"]


def test_an_epoch_is_measured_when_it_was_run_and_reckoned_by_positions_when_not(
    slice_of_reviews,
    quick,
):
    whole = benchmark(slice_of_reviews, "whole", 1000)
    assert whole["updates"] == whole["updates_of_an_epoch"] == 5
    assert whole["seconds_per_epoch_is"] == "measured"
    epoch, update = (whole[k]["median"] for k in ("seconds_per_epoch", "seconds_per_update"))
    assert epoch == pytest.approx(5 * update)
    part = benchmark(slice_of_reviews, "part", 2)
    assert part["updates"] == 2 and part["seconds_per_epoch_is"].startswith("reckoned")
    # Positions in a second are the same whether counted over the part or over the reckoned whole.
    n_positions = whole["positions_per_second"] * epoch
    reckoned = part["positions_per_second"] * part["seconds_per_epoch"]["median"]
    assert reckoned == pytest.approx(n_positions)


def test_what_the_model_takes_is_in_the_figure(slice_of_reviews, quick, monkeypatch):
    now, forward = [0.0], TransformerClassifier.forward

    def sleepy(self, *args):
        now[0] += 0.01
        time.sleep(0.01)
        return forward(self, *args)

    monkeypatch.setattr(TransformerClassifier, "forward", sleepy)
    slow = benchmark(slice_of_reviews, "slow", 5)["seconds_per_update"]
    assert slow["least"] >= 0.01  # by the real clock
    # By one that the model alone moves the figure is the model's, whatever else the machine does.
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    alone = benchmark(slice_of_reviews, "alone", 5)["seconds_per_update"]
    assert alone == pytest.approx({"median": 0.01, "least": 0.01, "greatest": 0.01})


def test_the_same_work_has_one_fingerprint_and_other_work_another(
    slice_of_reviews,
    quick,
):
    def work(name: str, *options) -> str:
        return benchmark(slice_of_reviews, name, 1, *options)["work_fingerprint"]

    first = work("a")
    assert work("b", "--attention", "list", "--lr", "1e-4") == first
    others = [work("c", "--d-ff", 32), work("d", "--pad-to", 256), work("e", "--r-drop", 0)]
    assert len({first, *others}) == 4


def test_the_original_workload_is_what_was_published():
    options = settings.resolve({"workload": "original"})
    assert (options.dataset, options.pad_to, options.max_length) == ("rotten_tomatoes", 512, 512)
    assert (options.batch_size, options.batch_tokens, options.dropout) == (16, None, 0.1)
    assert (options.n_layers, options.d_model, options.d_ff, options.n_heads) == (6, 16, 64, 8)
    assert options.r_drop == 0
    published = [r for r in measure.read_records(str(EPOCH_TIMES)) if r.get("published")]
    seconds = [r["seconds_per_epoch"]["median"] for r in published]
    assert seconds == [3346, 1088, 63, 54, 17, 15]
    assert all(r["workload"] == "original" and "2022" in r["source"] for r in published)


@pytest.mark.parametrize("name", ["reviews", "translation"])
def test_other_workloads_are_the_recipes(name):
    options = vars(settings.resolve({"workload": name}))
    dataset = {"reviews": "rotten_tomatoes", "translation": "libreoffice_help"}[name]
    assert options == vars(settings.resolve({"dataset": dataset})) | {"workload": name}


# ------------------------------------------------------------------------------------------ records

EPOCH_TIMES = ASSETS / "epoch_times.jsonl"


def record(seconds: float = 2.0, **facts) -> dict:
    return {
        "workload": "reviews",
        "work_fingerprint": "a" * 16,
        "device": "cpu",
        "device_name": "Some CPU",
        "threads": 2,
        "attention": "fused",
        "seconds_per_epoch": {"median": seconds, "least": seconds / 2, "greatest": seconds * 2},
        "seconds_per_epoch_is": "measured",
    } | facts


def write_records(name: str, *records) -> str:
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)
    return name


@pytest.fixture
def drawn(monkeypatch) -> list[matplotlib.figure.Figure]:
    """The figures that are saved."""
    figures, savefig = [], matplotlib.figure.Figure.savefig

    def save(self, *args, **options):
        figures.append(self)
        return savefig(self, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)
    return figures


@pytest.mark.parametrize("greatest", [30.0, 4000.0])  # a linear axis, and a logarithmic one
def test_table_and_bars_show_the_same_numbers(greatest, drawn):
    seconds = [2.0, 30.0, greatest]
    records = [record(s, threads=i) for i, s in enumerate(seconds, 1)]
    out = run_quietly("--compare", write_records("r.jsonl", *records), "--figure", "f.png")
    (axes,) = drawn[0].axes
    bars = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert bars == pytest.approx(seconds)
    assert (axes.get_xscale() == "log") == (greatest > 100)
    texts = [text.get_text() for text in axes.texts]
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [f"{row[0]} s" for row in rows] == texts
    assert [row[1] for row in rows] == [measure.seconds_text(s / 2) for s in seconds]
    assert [row[2] for row in rows] == [measure.seconds_text(s * 2) for s in seconds]
    whiskers = [line.get_segments()[0] for line in axes.collections]
    assert [w[0][0] for w in whiskers] == pytest.approx([s / 2 for s in seconds])
    assert [w[1][0] for w in whiskers] == pytest.approx([s * 2 for s in seconds])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["Some, 1 thread", "Some, 2 threads", "Some, 3 threads"]
    assert "seconds" in axes.get_xlabel() and "reviews" in drawn[0].get_suptitle()
    assert "a" * 16 in drawn[0].legends[0].get_title().get_text()


@pytest.mark.parametrize(
    "ending, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_a_figure_is_what_its_name_says(ending, start, tmp_path):
    run_quietly("--compare", write_records("r.jsonl", record()), "--figure", f"f.{ending}")
    assert (tmp_path / f"f.{ending}").read_bytes().startswith(start)


def test_what_others_published_is_marked_and_apart(drawn):
    ours = write_records("r.jsonl", record(workload="original"))
    argv = ["--compare", EPOCH_TIMES, ours, "--figure", "f.png", "--allow-different-work"]
    out = run_quietly(*argv)
    (axes,) = drawn[0].axes
    hatched = [bool(bar.get_hatch()) for bar in axes.patches]
    assert hatched == [False] * (len(hatched) - 6) + [True] * 6
    words = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert any("published" in text for text in words)
    assert out.count("published by others") == 6


def test_different_work_is_refused_unless_asked_for_and_then_said(drawn, capsys):
    name = write_records("r.jsonl", record(), record(work_fingerprint="b" * 16))
    (line,) = refuse(["--compare", name, "--figure", "f.png"], capsys)
    assert "a" * 16 in line and "b" * 16 in line and "--allow-different-work" in line
    assert not drawn
    run_quietly("--compare", name, "--figure", "f.png", "--allow-different-work")
    title = drawn[0].legends[0].get_title().get_text()
    assert "NOT the same work" in title and "a" * 16 in title
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert labels[0].count("\n") == 0 and "\nreviews " + "b" * 16 in labels[1]


def test_a_training_run_is_a_record_too(slice_of_reviews):
    run_quietly(*TINY, "--dataset", slice_of_reviews, "--run-dir", "r")
    with open("r/metrics.jsonl", encoding="utf-8") as file:
        seconds = [e["seconds"] for e in map(json.loads, file) if e["event"] == "epoch"]
    (found,) = measure.read_records("r")
    assert found["seconds_per_epoch"]["median"] == pytest.approx(sum(seconds) / 2)
    assert measure.seconds_text(sum(seconds) / 2) in run_quietly("--compare", "r")


BROKEN = {
    "no JSON": b"{",
    "no object": b"[1]",
    "nothing": b"",
    "no text": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "no device": json.dumps(record(device_name=3)).encode(),
    "no work": json.dumps(record(work_fingerprint=None)).encode(),
    "no seconds": json.dumps(record() | {"seconds_per_epoch": 3}).encode(),
    "seconds below 0": json.dumps(record(-1.0)).encode(),
    "endless seconds": json.dumps(record(math.inf)).encode(),
    "seconds in words": json.dumps(record() | {"seconds_per_epoch": {"median": "3"}}).encode(),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_record_is_refused(content, tmp_path, capsys):
    (tmp_path / "r.jsonl").write_bytes(content)
    (line,) = refuse(["--compare", "r.jsonl"], capsys)
    assert "--compare r.jsonl" in line and "; " in line


REFUSED = {
    "no file": ("--compare nowhere", ["--compare nowhere", "give a run folder or file"]),
    "no run": ("--compare .", ["config.json"]),
    "figure of what": ("--figure f.png", ["--figure", "--compare"]),
    "figure of a kind": ("--compare r.jsonl --figure f.gif", ["--figure f.gif", ".png, .svg"]),
    "figure nowhere": ("--compare r.jsonl --figure no/f.png", ["--figure no/f.png", "write"]),
    "allowed for what": ("--allow-different-work", ["--allow-different-work", "--compare"]),
    "with training": ("--compare r.jsonl --epochs 3", ["--epochs", "leave it out"]),
    "two at once": ("--benchmark 3 --check-device", ["--check-device and --benchmark", "one"]),
    "a folder for nothing": ("--check-device --run-dir r", ["--run-dir", "writes nothing"]),
    "resumed": ("--benchmark 3 --resume --run-dir r", ["--resume and --benchmark", "one"]),
    "no workload": ("--workload mine", ["--workload mine", "one of original, reviews"]),
    "no updates": ("--benchmark 0", ["--benchmark 0", "at least 1"]),
    "TF32 on a CPU": ("--tf32 --device cpu", ["--tf32", "is for cuda", "leave it out"]),
}


@pytest.mark.parametrize("argv, words", REFUSED.values(), ids=REFUSED.keys())
def test_measurements_that_cannot_be_made_are_refused(argv, words, capsys):
    write_records("r.jsonl", record())
    (line,) = refuse(argv.split(), capsys)
    assert [word for word in words if word not in line] == []


# ------------------------------------------------------------------------------- device against CPU


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_cpu_does_what_the_cpu_does(precision, slice_of_reviews):
    argv = [*TINY, "--dataset", slice_of_reviews, "--check-device", "--precision", precision]
    out = run_quietly(*argv)
    assert "they agree" in out and "logits" in out and "gradient of " in out


def test_a_device_that_computes_something_else_is_found_out(
    slice_of_reviews,
    monkeypatch,
    capsys,
):
    attend = models.MHAttention.attend

    def wrong(self, *args):
        return attend(self, *args) * (1.001 if self.form == "fused" else 1)

    monkeypatch.setattr(models.MHAttention, "attend", wrong)
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--check-device"]
    assert main.main(argv) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: cpu does not compute what the CPU does") and "1e-04" in line


def pair(**changes) -> list[Transformer]:
    sizes = {"n_vocab": 30, "pad_id": 0, "max_len": 20}
    return [Transformer(ModelConfig(**vars(ODD) | changes), **sizes) for _ in range(2)]


def test_each_tensor_is_held_against_the_reference():
    batch = Batch(*(torch.randint(4, 30, (3, 7)) for _ in range(3)), n_targets=21, n_tokens=42)
    where = {"device": torch.device("cpu"), "precision": "fp32", "label_smoothing": 0.1}
    model, reference = pair(dropout=0.3)
    shares, agrees = measure.check_device(model, reference, batch, tolerance=1e-6, **where)
    assert agrees and {name for name, _ in shares} == {
        "loss",
        "logits",
        *(f"gradient of {name}" for name, _ in model.named_parameters()),
    }
    model, reference = pair()
    hook = model.encoder[1].feed_forward.W_2.weight.register_hook(lambda g: g * 1.01)
    shares, agrees = measure.check_device(model, reference, batch, tolerance=1e-3, **where)
    hook.remove()
    (name, share), (_, next_share) = shares[:2]
    assert name == "gradient of encoder.1.feed_forward.W_2.weight" and not agrees
    assert share == pytest.approx(0.01, rel=0.01) and next_share < 1e-5


@pytest.mark.parametrize("name", ["embedding.W_e", "decoder.0.cross_attention.W_q.weight"])
def test_a_weight_changed_by_one_percent_is_found_out(name, slice_of_reviews, monkeypatch, capsys):
    load = TransformerClassifier.load_state_dict

    def load_changed(self, weights):
        return load(self, {**weights, name: weights[name] * 1.01})

    monkeypatch.setattr(TransformerClassifier, "load_state_dict", load_changed)
    argv = [*TINY, "--dataset", str(slice_of_reviews), "--check-device"]
    assert main.main(argv) == 1
    assert "does not compute what the CPU does" in capsys.readouterr().err


# ------------------------------------------------------------------------ devices that are not here


class FakeCuda:
    """What comp_utils asks torch.cuda."""

    def __init__(self):
        self.waited = []

    def synchronize(self, device):
        self.waited.append(device)

    def max_memory_allocated(self, device):
        return 123

    def is_available(self):
        return True

    def device_count(self):
        return 2

    def get_device_name(self, device):
        return "NVIDIA Fake"

    def is_bf16_supported(self):
        return False


@pytest.fixture
def fake_cuda(monkeypatch):
    fake = FakeCuda()
    for name in (name for name in dir(fake) if not name.startswith("_") and name != "waited"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_cuda_is_asked_for_its_own(fake_cuda):
    device = torch.device("cuda", 1)
    comp_utils.synchronize(device)
    assert fake_cuda.waited == [device]
    assert comp_utils.peak_memory(device)[1] == 123
    assert comp_utils.pick_device("auto") == torch.device("cuda", 0)
    several = {"local_rank": 1, "local_world_size": 2}
    assert comp_utils.pick_device("cuda", "fp16", **several) == device
    with pytest.raises(BadInput, match="no bfloat16"):
        comp_utils.pick_device("cuda", "bf16")
    with pytest.raises(BadInput, match="3 processes on this machine, which has 2"):
        comp_utils.pick_device("auto", local_rank=2, local_world_size=3)
    facts = comp_utils.machine_facts(device)
    assert facts["device_name"] == "NVIDIA Fake" and facts["driver"].startswith("NVIDIA ")
    assert facts["processor"] != "NVIDIA Fake"


def test_tf32_and_deterministic_kernels_are_set_and_taken_back(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    device = torch.device("cuda")
    try:
        comp_utils.set_up(device, tf32=True, deterministic=True)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        comp_utils.set_up(device, tf32=False, deterministic=False)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_mac_has_one_process(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert comp_utils.pick_device("auto").type == "mps"
    with pytest.raises(BadInput, match="--device mps: 2 processes"):
        comp_utils.pick_device("mps", local_world_size=2)
    assert comp_utils.pick_device("auto", local_world_size=2).type == "cpu"
    with pytest.raises(BadInput, match="fp16"):
        comp_utils.pick_device("mps", "fp16")
    waited = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append(1))
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 77)
    comp_utils.synchronize(torch.device("mps"))
    assert waited == [1] and comp_utils.peak_memory(torch.device("mps"))[1] == 77
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    assert comp_utils.machine_facts(torch.device("cpu"))["mps_fallback"]
