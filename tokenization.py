"""Tokenizers: text becomes ids."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel

from cache import Table, cache_folder, cached_file
from comp_utils import digest
from config import ASSETS, TokenizerConfig
from errors import BadInput
from splits import without_network

MAX_TOKENIZER_BYTES = 100_000_000  # the largest in use have some 20 million

# No sentence has so many; without a limit, a line of 10 MB takes the tokenizer seconds and 1 GB.
MAX_CHARACTERS = 200_000
MAX_TRAINING_TEXTS = 2_000_000  # for a tokenizer; more take minutes and GB, and change little
# Of a text for training a tokenizer: the time grows with the square of the longest word.
MAX_TRAINING_CHARACTERS = 10_000

# The four tokens that a model needs, and their spellings in other people's tokenizers.
SPECIAL_TOKENS = {
    "<pad>": ("<pad>", "[PAD]", "<|pad|>"),
    "<s>": ("<s>", "[CLS]", "[BOS]", "<bos>", "<|startoftext|>"),
    "</s>": ("</s>", "[SEP]", "[EOS]", "<eos>", "<|endoftext|>"),
    "<unk>": ("<unk>", "[UNK]"),
}


@dataclass(frozen=True)
class TextCodec:
    """A tokenizer, and the ids of its special tokens."""

    tokenizer: Tokenizer
    pad_id: int
    bos_id: int
    eos_id: int
    unk_id: int
    counter: Tokenizer | None  # gives unk_id where the tokenizer drops a character in silence

    @property
    def n_vocab(self) -> int:
        """Rows that an embedding needs."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def ignores_case(self) -> bool:
        """Whether the tokenizer lower-cases its text."""
        normalizer = self.tokenizer.normalizer
        return normalizer is not None and normalizer.normalize_str("A") == "a"

    def encode(self, texts: list[str], by: Tokenizer | None = None) -> list[list[int]]:
        """The ids of the first MAX_CHARACTERS of each text, without special tokens."""
        texts = [text[:MAX_CHARACTERS] for text in texts]
        encodings = (by or self.tokenizer).encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_and_count(self, texts: list[str]) -> tuple[list[list[int]], list[int]]:
        """The ids of each text, and how many tokens or dropped characters in it are unknown."""
        ids = self.encode(texts)
        counted = self.encode(texts, self.counter) if self.counter else ids
        return ids, [row.count(self.unk_id) for row in counted]


def own_unk_token(tokenizer: Tokenizer) -> str | None:
    """The token that the model itself gives to what it does not know, if it has one."""
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] == "Unigram" and model["unk_id"] is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def as_counter(tokenizer: Tokenizer, unk: str) -> Tokenizer | None:
    """The same tokenizer, but with unk for each character that it drops in silence.

    Only a BPE without an unknown token drops any, unless it knows all bytes: else None.
    """
    vocab, is_bpe = tokenizer.get_vocab(), isinstance(tokenizer.model, models.BPE)
    if not is_bpe or own_unk_token(tokenizer) or {*ByteLevel.alphabet()} <= vocab.keys():
        return None
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"][unk], state["model"]["unk_token"] = vocab[unk], unk
    counter = Tokenizer.from_str(json.dumps(state))
    counter.encode_special_tokens = True
    return counter


def as_codec(tokenizer: Tokenizer) -> TextCodec:
    """Finds the special tokens, and adds those that are missing."""
    ids, unk = [], own_unk_token(tokenizer)
    for name, spellings in SPECIAL_TOKENS.items():
        spellings = (unk, *spellings) if unk and name == "<unk>" else spellings
        found = next((s for s in spellings if tokenizer.token_to_id(s) is not None), None)
        if found is None:
            tokenizer.add_special_tokens([name])
            print(f"tokenizer: has no {name}, so it was added", file=sys.stderr)
        ids.append(tokenizer.token_to_id(found or name))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # "<pad>" in a user's sentence is text like any other
    return TextCodec(tokenizer, *ids, as_counter(tokenizer, tokenizer.id_to_token(ids[-1])))


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> TextCodec:
    """A byte-level BPE: any text has ids, and the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    steps = [normalizers.NFC(), *([normalizers.Lowercase()] if config.lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return as_codec(tokenizer)


def read_tokenizer(name: str) -> TextCodec:
    """A tokenizer.json, or the one of an id on the Hub. Raises BadInput."""
    try:
        path = Path(name).expanduser()
        if path.exists() and path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ValueError(f"over {MAX_TOKENIZER_BYTES:,} bytes")
        if path.exists() or name.endswith(".json"):
            tokenizer = Tokenizer.from_file(str(path))
        else:
            cache_folder()  # fails if there is no home folder
            without_network()
            tokenizer = Tokenizer.from_pretrained(name)
        codec = as_codec(tokenizer)
        codec.encode(["\N{SNOWMAN}"])  # fails if what the tokenizer does not know has no id
    except Exception as error:  # the library raises plain Exceptions
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"--tokenizer {name}: not found or not usable ({reason}); give a tokenizer.json of the "
            "tokenizers library, or --train-tokenizer"
        ) from None
    return codec


def shipped_tokenizer(dataset: str) -> Path:
    """Where an embedded data set has its tokenizer."""
    return ASSETS / dataset / "tokenizer.json"


def trains_tokenizer(config: TokenizerConfig, dataset: str) -> bool:
    """Whether a new tokenizer is trained: asked for, or there is no other."""
    return config.train_tokenizer or not (config.tokenizer or shipped_tokenizer(dataset).is_file())


def get_tokenizer(
    config: TokenizerConfig, dataset: str, train: Table, columns: Sequence[str]
) -> TextCodec:
    """The tokenizer asked for; else that of an embedded data set; else one trained on columns,
    or on evenly spaced rows of a large table, and kept in the cache."""
    if not trains_tokenizer(config, dataset):
        return read_tokenizer(config.tokenizer or str(shipped_tokenizer(dataset)))
    n_texts = len(train) * len(columns)
    step = math.ceil(n_texts / MAX_TRAINING_TEXTS) or 1
    if step > 1:
        print(f"tokenizer: trained on one in {step} of {n_texts:,} sentences", file=sys.stderr)

    def write(file: Path) -> None:
        texts = (
            text[:MAX_TRAINING_CHARACTERS]
            for rows in train.iter(1000)
            for name in columns
            for text in rows[name][::step]
        )
        file.write_text(train_tokenizer(texts, config).tokenizer.to_str(), encoding="utf-8")

    wanted = (config.vocab_size, config.lowercase, step, tokenizers.__version__)
    key = digest("tokenizer", train._fingerprint, columns, wanted)
    return as_codec(Tokenizer.from_file(str(cached_file(f"{key}.json", write))))
