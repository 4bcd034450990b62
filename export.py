"""A trained model in the formats of other tools: transformers, CTranslate2, ONNX."""

import importlib
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from components import MHAttention, SinusoidalPositions
from config import VERSION, DataConfig
from decoding import EXTRA_LENGTH, greedy
from ensemble import Ensemble
from errors import BadInput, RunFailed
from export_onnx import read_onnx, write_onnx
from jobs import Job
from run_folder import RunFolder
from settings import extract_config
from splits import load_splits

# The packages that write and read a format.
PACKAGES = {
    "transformers": ("transformers",),
    "ctranslate2": ("ctranslate2",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}
N_SENTENCES = 100  # of the self-test
TIE = 1e-3  # nats; of two tokens nearer to each other, rounding decides

Answer = Callable[[list[int]], list[int]]  # source ids with eos_id -> target ids without


def export(job: Job, folder: RunFolder, name: str, target: Path, *, needs_data: bool) -> str:
    """Writes a model in a format to a new folder, reads it again, and compares its answers to some
    sentences with rhea's. Returns a line about them. needs_data: as `test_sentences` takes it.
    Raises BadInput and RunFailed; then there is no folder."""
    problems = format_problems(job, name)
    if target.exists() or target.is_symlink():
        problems.append(f"--to {target}: exists; give a new name, or remove it")
    if problems:
        raise BadInput(*problems)
    sentences, of_what = test_sentences(job, needs_data)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as made:
        made = Path(made) / target.name
        made.mkdir()
        write, read = FORMATS[name]
        write(job, made)
        (made / "README.md").write_text(model_card(job, folder, name), encoding="utf-8")
        said = self_test(job, read(job, made), sentences, of_what, name)
        os.rename(made, target)
    return said


def format_problems(job: Job, name: str) -> list[str]:
    """Why a model cannot be written in a format, a line each."""
    is_written = name == "onnx" and (job.classes or not isinstance(job.model, Ensemble))
    problems = [] if is_written else model_problems(job, name)
    try:
        for package in PACKAGES[name]:
            importlib.import_module(package)
    except ImportError as error:
        install = f"install it with: pip install {' '.join(PACKAGES[name])}"
        missing = f"--export {name}: cannot import {error.name}; {install}"
        return problems or [missing]
    return problems


def model_problems(job: Job, name: str) -> list[str]:
    """What this model has that the models of other tools have not, a line each."""
    problems, instead = [], "give --export onnx"
    if job.classes:
        return [f"--export {name}: it has no model like this classifier; {instead}"]
    if isinstance(job.model, Ensemble):
        return [f"--export {name}: one model alone, and this is an ensemble; give another run"]
    options = job.options
    if name == "transformers" and not isinstance(job.model.positions, SinusoidalPositions):
        positions = f"--positions {options.positions}"
        problems.append(f"--export {name}: its Marian model has no {positions}; {instead}")
    if options.activation not in ("relu", "gelu"):
        activation = f"--activation {options.activation}"
        problems.append(f"--export {name}: its models have no {activation}; {instead}")
    sizes = (options.d_attn, options.d_mid)
    if any(size not in (None, options.d_model // options.n_heads) for size in sizes):
        sizes = "--d-attn or --d-mid other than --d-model / --n-heads"
        problems.append(f"--export {name}: its models have no {sizes}; {instead}")
    return problems


# ---------------------------------------------------------------------------------------- self-test


def test_sentences(job: Job, needs_data: bool) -> tuple[list[str], str]:
    """Sentences of the validation split, or if the data is gone and not needed, of random tokens;
    and what they are."""
    try:
        splits = load_splits(extract_config(DataConfig, job.options), ["validation"])
        return splits.tables["validation"]["source"][:N_SENTENCES], "validation sentences"
    except BadInput as error:
        if needs_data:
            raise
        draw = random.Random(0)
        rows = [draw.choices(range(job.codec.n_vocab), k=1 + i // 5) for i in range(N_SENTENCES)]
        texts = job.codec.tokenizer.decode_batch(rows)
        return texts, f"sentences of random tokens (no data: {error.lines[0]})"


@torch.inference_mode()
def self_test(job: Job, answer: Answer, sentences: list[str], of_what: str, name: str) -> str:
    """Compares the answers of the model that was read with rhea's. Raises RunFailed."""
    codec, model = job.codec, job.model.eval()
    n_same = n_tied = 0
    rows = [row[: job.options.max_length - 1] for row in codec.encode(sentences)]
    for row in rows:
        src = torch.tensor([[*row, codec.eos_id]])
        if job.classes:
            log_p = model(src, torch.tensor([[codec.bos_id]])).log_softmax(dim=-1)[0]
            ours, theirs = [int(log_p.argmax())], answer(src[0].tolist())
        else:
            (ours,) = greedy(model, src, bos_id=codec.bos_id, eos_id=codec.eos_id)
            theirs = answer(src[0].tolist())
            ends = [[codec.bos_id, *ids, codec.eos_id] for ids in (ours, theirs)]
            ours, theirs = (ids[1 : src.shape[1] + EXTRA_LENGTH + 1] for ids in ends)
            log_p = model(src, torch.tensor([ends[0][:-1]])).log_softmax(dim=-1)[0]
        n_same += ours == theirs
        i = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
        n_tied += i is not None and bool(log_p[i, ours[i]] - log_p[i, theirs[i]] < TIE)
    tied = f", {n_tied} more differ where two tokens are equally probable" if n_tied else ""
    said = f"{n_same} of {len(rows)} answers to {of_what} are the same{tied}"
    if n_same + n_tied < len(rows):
        raise RunFailed(f"--export {name}: the exported model differs: {said}; nothing was written")
    return said


def model_card(job: Job, folder: RunFolder, name: str) -> str:
    """The text of README.md in the exported folder."""
    options, tests = job.options, folder.read_tests()
    scores, data = tests[-1] if tests else {}, Path(options.dataset).name
    keys = ("accuracy", "macro_f1", "bleu", "chrf", "bleu_lowercase_13a", "loss")
    lines = [f"- {key}: {scores[key]:.4g}" for key in keys if key in scores]
    lines += [f"- signature: {scores['signature']}"] if "signature" in scores else []
    of = "labels " + ", ".join(job.classes) if job.classes else options.target_column
    notes = {
        "transformers": "Beam search here divides log P by length^length_penalty, rhea by "
        "((5 + length) / 6)^length_penalty, so its answers with several beams can differ; those "
        "of one beam do not.",
        "ctranslate2": "Give each sentence as tokens of tokenizer.json and `</s>`. Load it with "
        '`compute_type="int8"` for 8 bits. Beam search divides log P by length^length_penalty.',
        "onnx": "Ids are those of tokenizer.json, then eos_id; rhea.json has the special ids.",
    }
    return "\n".join(
        [
            *(f"# {data}: {options.source_column} -> {of}", ""),
            f"An encoder-decoder Transformer trained with rhea {VERSION}, in the {name} format.",
            *("", f"- data: {data}", f"- longest source: {options.max_length} tokens"),
            *("- licence: fill in", "", "Scores on the test split:", ""),
            *(lines or ["- none"]),
            *("", notes[name], ""),
        ]
    )


# ------------------------------------------------------------------------------------- transformers


def as_marian(job: Job) -> nn.Module:
    """The same weights in transformers' MarianMTModel, whose layers are the paper's too.

    Marian has all sines before all cosines where rhea alternates, so the axis of d_model is
    permuted in all weights, which changes no result.
    """
    from transformers import MarianConfig, MarianMTModel

    model, codec, options = job.model, job.codec, job.options
    n_vocab, d_model = model.embedding.W_e.shape
    sizes = {"d_model": d_model, "max_position_embeddings": len(model.positions.PE)}
    for side in ("encoder", "decoder"):
        sizes[f"{side}_layers"] = options.n_layers
        sizes[f"{side}_ffn_dim"] = options.d_ff
        sizes[f"{side}_attention_heads"] = options.n_heads
    config = MarianConfig(
        vocab_size=n_vocab,
        activation_function=options.activation,
        dropout=options.dropout,
        attention_dropout=0.0,
        scale_embedding=True,
        tie_word_embeddings=True,
        pad_token_id=codec.pad_id,
        bos_token_id=codec.bos_id,
        eos_token_id=codec.eos_id,
        decoder_start_token_id=codec.bos_id,
        forced_eos_token_id=None,
        **sizes,
    )
    theirs = MarianMTModel(config).eval()
    order = torch.cat((torch.arange(0, d_model, 2), torch.arange(1, d_model, 2)))
    norms = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
    with torch.no_grad():
        theirs.model.shared.weight.copy_(model.embedding.W_e[:, order])
        layers = [*zip(model.encoder, theirs.model.encoder.layers)]
        for ours, layer in [*layers, *zip(model.decoder, theirs.model.decoder.layers)]:
            copy_attention(ours.self_attention, layer.self_attn, order)
            if hasattr(layer, "encoder_attn"):
                copy_attention(ours.cross_attention, layer.encoder_attn, order)
            layer.fc1.weight.copy_(ours.feed_forward.W_1.weight[:, order])
            layer.fc1.bias.copy_(ours.feed_forward.W_1.bias)
            layer.fc2.weight.copy_(ours.feed_forward.W_2.weight[order])
            layer.fc2.bias.copy_(ours.feed_forward.W_2.bias[order])
            names = [name for name in norms if hasattr(layer, name)]
            for i, name in enumerate(names, 1):
                norm = getattr(ours, f"norm_{i}")
                getattr(layer, name).weight.copy_(norm.gamma[order])
                getattr(layer, name).bias.copy_(norm.beta[order])
    return theirs


def copy_attention(ours: MHAttention, theirs: nn.Module, order: Tensor) -> None:
    """One attention's weights."""
    for name in ("q", "k", "v"):
        layer, W = getattr(theirs, f"{name}_proj"), getattr(ours, f"W_{name}")
        layer.weight.copy_(W.weight[:, order])
        layer.bias.copy_(W.bias)
    theirs.out_proj.weight.copy_(ours.W_o.weight[order])
    theirs.out_proj.bias.copy_(ours.W_o.bias[order])


def write_transformers(job: Job, folder: Path) -> None:
    """A folder for AutoModelForSeq2SeqLM and AutoTokenizer, without code of its own."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()
    model, codec, options = as_marian(job), job.codec, job.options
    ids = {"pad_token_id": codec.pad_id, "eos_token_id": codec.eos_id, "bos_token_id": codec.bos_id}
    beams = {"num_beams": options.beam_size, "length_penalty": options.length_penalty}
    beams = beams if options.beam_size > 1 else {}
    model.generation_config = GenerationConfig(
        **beams,
        max_length=options.max_length + EXTRA_LENGTH,
        decoder_start_token_id=codec.bos_id,
        **ids,
    )
    model.save_pretrained(folder)
    tokenizer = type(codec.tokenizer).from_str(codec.tokenizer.to_str())
    eos = tokenizer.id_to_token(codec.eos_id)
    tokenizer.post_processor = TemplateProcessing(
        single=["$A", eos], special_tokens=[(eos, codec.eos_id)]
    )
    spellings = {
        name.replace("_id", ""): tokenizer.id_to_token(value) for name, value in ids.items()
    }
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=tokenizer.id_to_token(codec.unk_id),
        model_max_length=options.max_length,
        split_special_tokens=True,  # "<pad>" in a sentence is text like any other
        clean_up_tokenization_spaces=False,
        **spellings,
    ).save_pretrained(folder)


def read_transformers(job: Job, folder: Path) -> Answer:
    """Answers of the model in a folder, which is checked to cut sentences into the same tokens."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "A <pad> of\u00e9 text."
    found, expected = tokenizer(text)["input_ids"], [*job.codec.encode([text])[0], job.codec.eos_id]
    if found != expected:
        raise RunFailed(f"--export transformers: its tokenizer gives {found}, not {expected}")

    def answer(src: list[int]) -> list[int]:
        limit = {"max_new_tokens": len(src) + EXTRA_LENGTH, "max_length": None}
        ids = model.generate(torch.tensor([src]), num_beams=1, do_sample=False, **limit)
        ids = [*ids[0].tolist()[1:], job.codec.eos_id]
        return ids[: ids.index(job.codec.eos_id)]

    return answer


# -------------------------------------------------------------------------------------- CTranslate2


def linear(theirs: Any, *ours: nn.Module) -> None:
    """The weights of one or more linear layers as those of one."""
    theirs.weight = torch.cat([W.weight for W in ours]).detach().numpy()
    theirs.bias = torch.cat([W.bias for W in ours]).detach().numpy()


def norm(theirs: Any, ours: nn.Module) -> None:
    """The weights of a layer norm."""
    theirs.gamma, theirs.beta = ours.gamma.detach().numpy(), ours.beta.detach().numpy()


def write_ctranslate2(job: Job, folder: Path) -> None:
    """A folder for ctranslate2.Translator, in float32."""
    from ctranslate2.specs import TransformerSpec, common_spec

    model, codec, options = job.model, job.codec, job.options
    activation = {"relu": "RELU", "gelu": "GELU"}[options.activation]
    spec = TransformerSpec.from_config(
        (options.n_layers, options.n_layers),
        options.n_heads,
        pre_norm=False,
        activation=getattr(common_spec.Activation, activation),
    )

    def self_attention(theirs: Any, ours: nn.Module) -> None:
        attention = ours.self_attention
        linear(theirs.linear[0], attention.W_q, attention.W_k, attention.W_v)
        linear(theirs.linear[1], attention.W_o)
        norm(theirs.layer_norm, ours.norm_1)

    def feed_forward(theirs: Any, ours: nn.Module, last_norm: nn.Module) -> None:
        linear(theirs.linear_0, ours.feed_forward.W_1)
        linear(theirs.linear_1, ours.feed_forward.W_2)
        norm(theirs.layer_norm, last_norm)

    W_e = model.embedding.W_e.detach().numpy()
    positions = getattr(model.positions, "PE", None)
    positions = model.positions.W_p if positions is None else positions
    for side in (spec.encoder, spec.decoder):
        side.scale_embeddings = True
        side.position_encodings.encodings = positions.detach().numpy()
    spec.encoder.embeddings[0].weight = spec.decoder.embeddings.weight = W_e
    spec.decoder.projection.weight = W_e
    spec.decoder.start_from_zero_embedding = False
    for theirs, ours in zip(spec.encoder.layer, model.encoder):
        self_attention(theirs.self_attention, ours)
        feed_forward(theirs.ffn, ours, ours.norm_2)
    for theirs, ours in zip(spec.decoder.layer, model.decoder):
        self_attention(theirs.self_attention, ours)
        cross = ours.cross_attention
        linear(theirs.attention.linear[0], cross.W_q)
        linear(theirs.attention.linear[1], cross.W_k, cross.W_v)
        linear(theirs.attention.linear[2], cross.W_o)
        norm(theirs.attention.layer_norm, ours.norm_2)
        feed_forward(theirs.ffn, ours, ours.norm_3)
    register_tokens(spec, job)
    spec.validate()
    spec.optimize()
    spec.save(str(folder))
    codec.tokenizer.save(str(folder / "tokenizer.json"))


def register_tokens(spec: Any, job: Job) -> None:
    """The vocabulary, and which tokens are special."""
    tokens, codec = all_tokens(job), job.codec
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.config.decoder_start_token = spec.config.bos_token = tokens[codec.bos_id]
    spec.config.eos_token, spec.config.unk_token = tokens[codec.eos_id], tokens[codec.unk_id]


def all_tokens(job: Job) -> list[str]:
    """The spelling of each id; an id without one gets a spelling of its own."""
    spelled = {i: token for token, i in job.codec.tokenizer.get_vocab().items()}
    return [spelled.get(i, f"<unused {i}>") for i in range(job.codec.n_vocab)]


def read_ctranslate2(job: Job, folder: Path) -> Answer:
    """Answers of the model in a folder."""
    import ctranslate2

    tokens = all_tokens(job)
    ids = {token: i for i, token in enumerate(tokens)}
    translator = ctranslate2.Translator(str(folder), device="cpu", compute_type="float32")

    def answer(src: list[int]) -> list[int]:
        limit = len(src) + EXTRA_LENGTH
        source = [[tokens[i] for i in src]]
        (found,) = translator.translate_batch(source, beam_size=1, max_decoding_length=limit)
        return [ids[token] for token in found.hypotheses[0]]

    return answer


FORMATS = {
    "transformers": (write_transformers, read_transformers),
    "ctranslate2": (write_ctranslate2, read_ctranslate2),
    "onnx": (write_onnx, read_onnx),
}
