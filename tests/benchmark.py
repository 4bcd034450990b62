"""Speed against others on the same work, in turn and in one run, so that a slow hour hits both.

python tests/benchmark.py train [options of main.py]   one update, against torch.nn.Transformer
python tests/benchmark.py decode RUN_DIR               greedy search, against no cache
Each figure is the median of all rounds, with the least and the greatest.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

import main
from comp_utils import autocast, grad_scaler, set_seed
from components import sinusoids
from data import DataConfig, TextData, TokenizerConfig, get_tokenizer, load_splits, read_tokenizer
from decoding import EXTRA_LENGTH, greedy
from procedures import build_optimizer, train_step
from run_folder import RunFolder

CPU = torch.device("cpu")
ROUNDS, BATCHES, SENTENCES = 5, 12, 1000


class TorchTransformer(nn.Module):
    """The same model out of torch.nn: post-norm, tied embeddings, sinusoidal positions."""

    def __init__(self, config, *, n_vocab: int, max_len: int, pad_id: int) -> None:
        super().__init__()
        self.pad_id, self.scale = pad_id, math.sqrt(config.d_model)
        self.embedding = nn.Embedding(n_vocab, config.d_model, padding_idx=pad_id)
        nn.init.normal_(self.embedding.weight, std=1 / self.scale)
        self.register_buffer("PE", sinusoids(max_len, config.d_model).float())
        sizes = (config.d_model, config.n_heads, config.d_ff, config.dropout)
        n = config.n_layers
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(*sizes, batch_first=True), n, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(*sizes, batch_first=True), n
        )
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, ids: Tensor) -> Tensor:
        return self.dropout(self.embedding(ids) * self.scale + self.PE[: ids.shape[1]])

    def forward(self, src: Tensor, tgt_in: Tensor) -> Tensor:
        padding = src == self.pad_id
        memory = self.encoder(self.embed(src), src_key_padding_mask=padding)
        hidden = torch.ones(tgt_in.shape[1], tgt_in.shape[1], dtype=torch.bool).triu(1)
        X = self.decoder(
            self.embed(tgt_in),
            memory,
            tgt_mask=hidden,
            tgt_is_causal=True,
            memory_key_padding_mask=padding,
        )
        return X @ self.embedding.weight.T


def in_turn(works: dict[str, Callable[[], float]], unit: str) -> None:
    """Runs each work once to warm up, then all of them ROUNDS times in turn."""
    for work in works.values():
        work()
    speeds = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            speeds[name].append(work())
    for name, all_of in speeds.items():
        median = statistics.median(all_of)
        print(f"{name}: {median:,.0f} {unit} ({min(all_of):,.0f} to {max(all_of):,.0f})")
    first, *others = speeds.items()
    for name, all_of in others:
        ratio = statistics.median(a / b for a, b in zip(first[1], all_of))
        print(f"{first[0]} / {name}: {ratio:.2f} (median of the ratios, round by round)")


def train(argv: list[str]) -> None:
    """Tokens of source and target in a second of training, ours and torch.nn's."""
    given, problems = main.parse_args(argv)
    options = main.resolve(given)
    main.check(options, given, problems)
    set_seed(options.seed)
    config = main.part(DataConfig, options)
    splits = load_splits(config)
    tokenizer, sides = main.part(TokenizerConfig, options), ["source", "target"]
    codec = get_tokenizer(tokenizer, options.dataset, splits["train"], sides)
    data = TextData(config, splits, codec, None)
    plan = data.plan("train", seed=options.seed, epoch=1)[:BATCHES]
    batches = list(data.batches("train", plan, CPU))
    n_tokens = sum(batch.n_tokens for batch in batches)

    def work(model: nn.Module) -> Callable[[], float]:
        model.train()
        optimizer = build_optimizer(model, weight_decay=options.weight_decay)
        scaler, smoothing = grad_scaler("fp32", CPU), options.label_smoothing

        def epoch() -> float:
            began = time.perf_counter()
            for batch in batches:
                precision = autocast(options.precision, CPU)
                rates = {"lr": 1e-4, "max_norm": options.max_norm, "label_smoothing": smoothing}
                train_step(model, [batch], optimizer, scaler, precision, **rates)
            return n_tokens / (time.perf_counter() - began)

        return epoch

    ours = main.build_model(options, codec, None)
    length = options.max_length + EXTRA_LENGTH
    sizes = {"n_vocab": codec.n_vocab, "max_len": length, "pad_id": codec.pad_id}
    theirs = TorchTransformer(main.part(main.ModelConfig, options), **sizes)
    print(f"{torch.get_num_threads()} threads, {BATCHES} batches, {n_tokens:,} tokens")
    in_turn({"rhea": work(ours), "torch.nn.Transformer": work(theirs)}, "tokens/s")


@torch.inference_mode()
def greedy_without_cache(
    model: nn.Module, src: Tensor, *, bos_id: int, eos_id: int, keeps_memory: bool
) -> list:
    """procedures.greedy with the whole prefix through the decoder for each token.

    keeps_memory: the encoder runs once, and only the last position goes through the unembedding.
    """
    found = [[] for _ in src]
    limits = (src != model.pad_id).sum(dim=1) + EXTRA_LENGTH
    mask = (src != model.pad_id)[:, None, None, :]
    memory, sentences = model.encode(src, mask), torch.arange(len(src))
    tokens = torch.full((len(src), 1), bos_id)
    while len(sentences):
        if keeps_memory:
            logits = model.unembedding(model.decode(tokens, memory, mask)[:, -1])
        else:
            logits = model(src, tokens)[:, -1]
        tokens = torch.cat((tokens, logits.argmax(dim=-1)[:, None]), dim=1)
        done = (tokens[:, -1] == eos_id) | (tokens.shape[1] > limits)
        for i, ids in zip(sentences[done].tolist(), tokens[done, 1:].tolist()):
            found[i] = [token for token in ids if token != eos_id]
        keep = ~done
        tokens, limits, sentences = tokens[keep], limits[keep], sentences[keep]
        src, memory, mask = src[keep], memory[keep], mask[keep]
    return found


def decode(run_dir: str) -> None:
    """Sentences in a second of greedy search, with cached keys and values and without."""
    folder = RunFolder.find(run_dir)
    options = main.SimpleNamespace(**main.saved_options(folder, folder.read_config()))
    codec = read_tokenizer(str(folder.path / folder.TOKENIZER))
    model = main.build_model(options, codec, None).eval()
    folder.load_weights(model)
    options.batch_size, options.batch_tokens = 64, None
    config = main.part(DataConfig, options)
    data = TextData(config, load_splits(config, ["test"]), codec, None)
    batches = [batch.src for batch in data.batches("test", data.plan("test"), CPU)]
    batches = batches[: SENTENCES // 64 + 1]
    ends = {"bos_id": codec.bos_id, "eos_id": codec.eos_id}
    found = {}

    def work(search: Callable) -> Callable[[], float]:
        def all_sentences() -> float:
            began = time.perf_counter()
            found[search] = [search(model, src, **ends) for src in batches]
            return sum(map(len, batches)) / (time.perf_counter() - began)

        return all_sentences

    no_cache = partial(greedy_without_cache, keeps_memory=False)
    memory = partial(greedy_without_cache, keeps_memory=True)
    searches = {"cache": greedy, "no cache": no_cache, "encoder's output kept alone": memory}
    in_turn({name: work(search) for name, search in searches.items()}, "sentences/s")
    print(f"the same tokens: {found[greedy] == found[no_cache] == found[memory]}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("train", "decode"):
        sys.exit(__doc__)
    decode(sys.argv[2]) if sys.argv[1] == "decode" else train(sys.argv[2:])
