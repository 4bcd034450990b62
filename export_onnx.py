"""A trained model in ONNX: files that onnxruntime runs without torch."""

import json
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components import Context, padding_mask
from decoding import EXTRA_LENGTH
from jobs import Job
from models import Cache


class Classifier(nn.Module):
    """src (b, l_z) -> the probabilities of the classes (b, n)."""

    def __init__(self, model: nn.Module, bos_id: int) -> None:
        super().__init__()
        self.model, self.bos_id = model, bos_id

    def forward(self, src: Tensor) -> Tensor:
        tgt_in = torch.full_like(src[:, :1], self.bos_id)
        return self.model(src, tgt_in)[:, 0].softmax(dim=-1)


class Encoder(nn.Module):
    """src (b, l_z) -> keys and values of its last layer's output for each layer of the decoder,
    (n_layers, b, h, l_z, d_attn or d_mid)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, src: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.model.encode(src, padding_mask(src, self.model.pad_id))
        layers = [layer.cross_attention.project(memory, memory) for layer in self.model.decoder]
        _, K, V = zip(*layers)
        return torch.stack(K), torch.stack(V)


class JoinedContext(Context):
    """A context that is joined anew with each token, since ONNX has no buffers to write to."""

    def __init__(self, K: Tensor, V: Tensor) -> None:
        super().__init__()
        self._kept, self.n_tokens = [K, V], K.shape[2]

    def append(self, K: Tensor, V: Tensor) -> None:
        self._kept = [torch.cat(pair, dim=2) for pair in zip(self._kept, (K, V))]
        self.n_tokens = self._kept[0].shape[2]


class DecoderStep(nn.Module):
    """The logits (b, n_vocab) after one more token, and all keys and values so far.

    Shapes: src (b, l_z), ids (b), memory_K and memory_V as from `Encoder`, past_K and past_V
    (n_layers, b, h, t, d_attn or d_mid) with t = 0 at first.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        src: Tensor,
        ids: Tensor,
        memory_K: Tensor,
        memory_V: Tensor,
        past_K: Tensor,
        past_V: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = zip(past_K, past_V, memory_K, memory_V)
        layers = [(JoinedContext(K, V), JoinedContext(M, N)) for K, V, M, N in tensors]
        cache = Cache(padding_mask(src, self.model.pad_id), None, layers, None)
        logits = self.model.output(self.model.step(ids[:, None], cache))[:, 0]
        K, V = zip(*(past.all() for past, _ in layers))
        return logits, torch.stack(K), torch.stack(V)


def write_onnx(job: Job, folder: Path) -> None:
    """model.onnx of a classifier, or encoder.onnx and decoder.onnx; tokenizer.json, rhea.json."""
    model, codec, options = job.model.eval(), job.codec, job.options
    src = torch.full((2, 5), codec.eos_id)
    if job.classes:
        to_onnx(Classifier(model, codec.bos_id), folder / "model.onnx", {"src": src}, ["p"])
    else:
        to_onnx(Encoder(model), folder / "encoder.onnx", {"src": src}, ["memory_K", "memory_V"])
        with torch.no_grad():
            K, V = Encoder(model)(src)
        inputs = {"src": src, "ids": src[:, 0], "memory_K": K, "memory_V": V}
        inputs |= {"past_K": K[..., :3, :], "past_V": V[..., :3, :]}
        outputs = ["logits", "next_K", "next_V"]
        to_onnx(DecoderStep(model), folder / "decoder.onnx", inputs, outputs)
    facts = {name: getattr(codec, name) for name in ("pad_id", "bos_id", "eos_id", "unk_id")}
    facts |= {"classes": job.classes, "max_length": options.max_length}
    if not job.classes:
        facts |= {"n_layers": options.n_layers, "n_heads": options.n_heads}
        facts |= {"d_attn": K.shape[-1], "d_mid": V.shape[-1]}
    (folder / "rhea.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
    codec.tokenizer.save(str(folder / "tokenizer.json"))


def to_onnx(module: nn.Module, path: Path, inputs: dict[str, Tensor], outputs: list[str]) -> None:
    """One file, for any number of sentences and any lengths."""
    b, l_z, t = (torch.export.Dim(name) for name in ("b", "l_z", "t"))
    sizes = {"src": {0: b, 1: l_z}, "ids": {0: b}, "past_K": {1: b, 3: t}, "past_V": {1: b, 3: t}}
    sizes |= {"memory_K": {1: b, 3: l_z}, "memory_V": {1: b, 3: l_z}}
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            str(path),
            input_names=[*inputs],
            output_names=outputs,
            dynamic_shapes=tuple(sizes[name] for name in inputs),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def read_onnx(job: Job, folder: Path) -> Callable[[list[int]], list[int]]:
    """Answers of the models in a folder."""
    import numpy as np
    import onnxruntime

    def session(name: str) -> Any:
        return onnxruntime.InferenceSession(
            folder / f"{name}.onnx", providers=["CPUExecutionProvider"]
        )

    facts = json.loads((folder / "rhea.json").read_text(encoding="utf-8"))
    if facts["classes"]:
        model = session("model")
        return lambda src: [int(model.run(None, {"src": np.array([src])})[0][0].argmax())]
    encoder, decoder = session("encoder"), session("decoder")
    shape = (facts["n_layers"], 1, facts["n_heads"], 0)

    def answer(src: list[int]) -> list[int]:
        src = np.array([src])
        memory_K, memory_V = encoder.run(None, {"src": src})
        K, V = (np.zeros((*shape, facts[d]), np.float32) for d in ("d_attn", "d_mid"))
        ids = [facts["bos_id"]]
        while len(ids) <= src.shape[1] + EXTRA_LENGTH:
            inputs = {"src": src, "ids": np.array(ids[-1:]), "past_K": K, "past_V": V}
            inputs |= {"memory_K": memory_K, "memory_V": memory_V}
            logits, K, V = decoder.run(None, inputs)
            ids.append(int(logits[0].argmax()))
            if ids[-1] == facts["eos_id"]:
                return ids[1:-1]
        return ids[1:]

    return answer
