"""Devices, seeds and console output, with stand-ins for devices and streams that are not here."""

import io
import os
import sys

import numpy as np
import pytest
import torch

import comp_utils
from comp_utils import Progress, check_precision, digest, say, set_seed, set_up_output, write_lines
from errors import BadInput

# ---------------------------------------------------------------------------- devices and precision


class FakeCuda:
    """What comp_utils uses of torch.cuda; it emulates bfloat16."""

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

    def is_bf16_supported(self, including_emulation=True):
        return including_emulation


@pytest.fixture
def fake_cuda(monkeypatch):
    fake = FakeCuda()
    for name in (name for name in dir(fake) if not name.startswith("_") and name != "waited"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_cuda_is_queried_for_its_own_figures(fake_cuda, monkeypatch):
    device = torch.device("cuda", 1)
    comp_utils.synchronize(device)
    assert fake_cuda.waited == [device]
    assert comp_utils.peak_memory(device)[1] == 123
    assert comp_utils.pick_device("auto") == torch.device("cuda", 0)
    several = {"local_rank": 1, "local_world_size": 2}
    assert comp_utils.pick_device("cuda", "fp16", **several) == device
    with pytest.raises(BadInput, match="no bfloat16"):
        comp_utils.pick_device("cuda", "bf16")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        assert comp_utils.pick_device("cuda", "bf16") == torch.device("cuda", 0)
    with pytest.raises(BadInput, match="3 processes on this machine, which has 2"):
        comp_utils.pick_device("auto", local_rank=2, local_world_size=3)
    facts = comp_utils.machine_facts(device)
    assert facts["device_name"] == "NVIDIA Fake" and facts["driver"].startswith("CUDA ")
    assert facts["processor"] != "NVIDIA Fake"


@pytest.mark.slow
def test_tf32_and_deterministic_kernels_are_set_and_reset(monkeypatch):
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


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_fp16_needs_cuda_and_bf16_does_not(kind):
    check_precision("bf16", torch.device(kind))
    with pytest.raises(BadInput, match=f"--precision fp16: needs cuda, not {kind}; give bf16"):
        check_precision("fp16", torch.device(kind))


# ------------------------------------------------------------------------------ seeds, fingerprints


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1])
def test_a_seed_repeats_all_draws(seed):
    draws = []
    for _ in range(2):
        set_seed(seed)
        draws.append((np.random.random(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_a_digest_depends_on_content_and_not_on_the_order_of_keys():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": "1"}) != digest({"a": 2})
    assert len(digest()) == 16


# ----------------------------------------------------------------------------------- console output


def closed_pipe():
    """The end of a pipe whose reader has ended."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def test_a_stream_whose_reader_has_ended_takes_lines_and_drops_them():
    with closed_pipe() as stream:
        assert write_lines(stream, "first") is False
        assert write_lines(stream, "second", "third") is True


def test_the_end_of_the_reader_of_stdout_is_warned_of_once(monkeypatch, capsys):
    with closed_pipe() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        say("first")
        say("second", "third")
        monkeypatch.undo()
    assert capsys.readouterr().err == (
        "warning: standard output was closed or is full; the run continues without it\n"
    )


@pytest.mark.parametrize("encoding, expected", [("ascii", b"caf? ?\n"), ("cp1252", b"caf\xe9 ?\n")])
def test_the_screen_replaces_what_it_cannot_show(encoding, expected, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    set_up_output()
    say("caf\u00e9 \u2603")
    assert raw.getvalue() == expected


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    progress = Progress("epoch 1/3", n_steps=50, n_done=10)
    progress.advance(2, "loss 0.7")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Progress, "SECONDS_BETWEEN_LINES", -1.0)
    progress.advance(3, "loss 0.6")
    progress.close()
    assert capsys.readouterr().err == "epoch 1/3: step 15/50, loss 0.6\n"
