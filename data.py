"""Data sets, tokenizers, batches: text becomes ids, ids a plan of batches, a plan tensors."""

import csv
import difflib
import gzip
import hashlib
import json
import re
import signal
import socket
import sys
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from comp_utils import BadInput, digest, flag, option

if TYPE_CHECKING:  # costs a second to import, so it is imported where it is used
    from datasets import Dataset

ASSETS = Path(__file__).parent / "assets"
SPLITS = ("train", "validation", "test")
Row = dict[str, Any]


@dataclass(frozen=True)
class DataConfig:
    """Which sentences, and how they are put into batches."""

    dataset: str = option("rotten_tomatoes", "embedded name, file, folder, or id on the Hub")
    dataset_config: str | None = option(
        None, "configuration of a Hub data set", unset="its only one"
    )
    task: str = option("classification", "what to learn", choices=("classification", "translation"))
    source_column: str = option("text", "column, or ending of parallel files; a.b: field b in a")
    target_column: str = option("label", "the same for the labels or translations")
    max_length: int = option(256, "most tokens of a sentence, its end token included", low=2)
    batch_size: int | None = option(
        None, "sentences per process and micro-batch", low=1, unset="see --batch-tokens"
    )
    batch_tokens: int | None = option(
        None, "tokens per process and micro-batch, with padding", low=1, unset="see --batch-size"
    )
    pad_to: int = option(0, "tokens every batch is padded to; 0: its longest sentence", low=0)
    num_workers: int = option(0, "processes that put batches together beside the run", low=0)

    def problems(self) -> list[str]:
        """What cannot work, a line each."""
        size, tokens, longest = self.batch_size, self.batch_tokens, self.max_length
        lines = []
        if size and tokens:
            lines.append(f"--batch-size {size} and --batch-tokens {tokens}: give one of the two")
        remedy = (
            f"sentences may have {longest} tokens; give at least that, or a smaller --max-length"
        )
        if tokens and tokens < longest:
            lines.append(f"--batch-tokens {tokens}: {remedy}")
        if self.pad_to and self.pad_to < longest:
            lines.append(f"--pad-to {self.pad_to}: {remedy}")
        return lines


# ------------------------------------------------------------------------------------ reading files


def read_lines(name: Path | str) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end) of a UTF-8 file, plain or gzip, in flat memory.

    "-" is standard input. Raises BadInput.
    """
    number = 0
    try:
        with open(0 if name == "-" else name, "rb", closefd=name != "-") as raw:
            zipped = name != "-" and raw.peek(2)[:2] == b"\x1f\x8b"
            for number, line in enumerate(gzip.GzipFile(fileobj=raw) if zipped else raw, 1):
                text = line.decode()
                if "\0" in text:  # a binary file, or UTF-16 of ASCII, which is UTF-8 as well
                    place = f"{name}, line {number}"
                    raise BadInput(f"{place}: has NUL bytes; save the file as UTF-8 text")
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except UnicodeDecodeError as error:
        place = f"{name}, line {number}, byte {error.start + 1}"
        raise BadInput(f"{place}: not UTF-8; save the file as UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        place = f"{name}, after line {number}"
        raise BadInput(f"{place}: broken gzip file ({error}); make or fetch it again") from None
    except OSError as error:
        raise BadInput(f"{name}: {error.strerror}; give a file that can be read") from None


def read_delimited(path: Path, delimiter: str) -> Iterator[tuple[str, Row]]:
    """(place, row) of a csv file, quoted as RFC 4180 has it, or of a tsv file, never quoted."""
    quoting = {"quoting": csv.QUOTE_NONE} if delimiter == "\t" else {"strict": True}
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line for _, line in read_lines(path)), delimiter=delimiter, **quoting)
    header, begin = [], 1  # a quoted field may span lines: begin is where the row begins
    try:
        for values in reader:
            place, begin = f"{path}, line {begin}", reader.line_num + 1
            header = header or values
            if len(values) not in (0, len(header)):
                counts = f"{len(values)} fields, and the header has {len(header)}"
                raise BadInput(f"{place}: {counts}; mend or take out the line")
            if values and values is not header:
                yield place, dict(zip(header, values))
    except csv.Error as error:
        raise BadInput(f"{path}, line {begin}: broken csv ({error}); mend the line") from None


def read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of a file with one JSON object a line."""
    for number, line in read_lines(path):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{place}: not JSON ({error}); mend or take out the line") from None
            if not isinstance(row, dict):
                raise BadInput(f'{place}: not an object such as {{"text": "fine", "label": 1}}')
            yield place, row


def read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path}: not a whole parquet file ({reason}); make it again") from None


def read_parallel(source: Path, target: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of two text files of which line n of one translates line n of the other.

    Raises BadInput if one of them has more lines.
    """
    names = [file_format(path)[1:] for path in (source, target)]
    pairs = zip_longest(read_lines(source), read_lines(target))
    for number, pair in enumerate(pairs, 1):
        if None in pair:
            n, m = (sum(1 for _ in read_lines(path)) for path in (source, target))
            remedy = "line n of one must translate line n of the other; mend them"
            raise BadInput(f"{source} has {n} lines and {target} has {m}: {remedy}")
        yield f"{source}, line {number}", dict(zip(names, (line for _, line in pair)))


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".csv": lambda path: read_delimited(path, ","),
    ".tsv": lambda path: read_delimited(path, "\t"),
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
FILE_ENDINGS = {*READERS, ".json", ".txt", ".zip", ".xlsx", ".xls", ".ods", ".doc", ".docx"}
FORMATS = ".parquet, or .csv, .tsv, .jsonl, plain or with .gz behind"


def file_format(path: Path) -> str:
    """The ending that says how to read a file: reviews.csv.gz -> .csv."""
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()


SPLIT_NAMES = {"train": "train", "training": "train", "test": "test"}
SPLIT_NAMES |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


def split_of(path: Path) -> str | None:
    """The split that a file's name, or its folder's, begins with; None if neither does."""
    words = [re.split(r"[^a-z]", name.lower())[0] for name in (path.name, path.parent.name)]
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)


def find_files(path: Path, columns: dict[str, str]) -> dict[str, list[tuple[Path, ...]]]:
    """The data files of a file or folder, by split; all under "train" if no name tells a split.

    A file stands alone, or in a pair if the two columns are the endings of parallel files.
    """
    if path.is_file() and file_format(path) not in READERS:
        raise BadInput(f"--dataset {path}: no data file; its name must end in one of {FORMATS}")
    if path.is_file():
        return {split_of(Path(path.name)) or "train": [(path,)]}
    sides = ["." + columns[key] for key in ("source_column", "target_column")]
    found: dict[Path, list[Path]] = {}  # by the name without the ending of a side
    for file in sorted(path.rglob("*")):
        form, inner = file_format(file), file.relative_to(path)
        hidden = any(part.startswith(".") for part in inner.parts)
        if file.is_file() and not hidden and form in (*READERS, *sides):
            key = inner if form in READERS else inner.with_name(inner.name.partition(form)[0])
            found.setdefault(key, []).append(file)
    by_split: dict[str | None, list[tuple[Path, ...]]] = {}
    for key, files in found.items():
        if file_format(files[0]) in sides:
            files = [file for side in sides for file in files if file_format(file) == side]
            if len(files) != 2:
                both = " and ".join(str(key) + side for side in sides)
                raise BadInput(f"--dataset {path}: only {files[0].name}; there must be {both}")
        by_split.setdefault(split_of(key), []).append(tuple(files))
    if not by_split:
        raise BadInput(
            f"--dataset {path}: a folder without any data file ({FORMATS}, or text files that end "
            f"in {' and '.join(sides)}); add one, or name --source-column and --target-column"
        )
    if None in by_split and len(by_split) > 1:
        odd = ", ".join(file.name for files in by_split[None] for file in files)
        raise BadInput(f"--dataset {path}: {odd}: begin the name with train, validation or test")
    return {split or "train": files for split, files in by_split.items()}


# --------------------------------------------------------------------------------- rows into splits


def column(row: Row, name: str) -> Any:
    """row[name], or for a.b the field b of row["a"]. Raises KeyError."""
    outer, dot, inner = name.partition(".")
    if name in row or not dot:
        return row[name]
    return column(row[outer], inner) if isinstance(row[outer], dict) else row[name]


def column_names(row: Row) -> list[str]:
    """The columns of a row, nested ones as a.b."""
    names = []
    for name, value in row.items():
        inner = column_names(value) if isinstance(value, dict) else []
        names += [f"{name}.{i}" for i in inner] or [name]
    return names


def select(
    rows: Iterable[tuple[str, Row]], source_column: str, target_column: str, task: str
) -> Iterator[dict[str, str]]:
    """The two columns of each row as text. A missing sentence is empty, a missing label refused."""
    for place, row in rows:
        selected = {}
        for side, name in (("source", source_column), ("target", target_column)):
            try:
                value = column(row, name)
            except KeyError:
                there = ", ".join(column_names(row))
                remedy = f"name one with {flag(side + '_column')}, if the first line names columns"
                if len(row) == 1 and re.search("[;|\t]", there):
                    remedy = "separate the columns of a .csv by commas, of a .tsv by tabs"
                raise BadInput(f"{place}: no column {name}, only {there}; {remedy}") from None
            text = "" if value is None else str(value).strip()
            if not text.isascii() and re.search("[\ud800-\udfff]", text):
                raise BadInput(f"{place}: half of a surrogate pair, which is no character; mend it")
            selected[side] = text
        if task == "classification" and not selected["target"]:
            raise BadInput(f"{place}: the column {target_column} is empty; fill it or drop the row")
        yield selected


def read_files(files: list[list[str]], **columns: str) -> Iterator[dict[str, str]]:
    """The two columns of all rows of several files. Raises BadInput if there is no row."""
    empty = True
    for names in files:
        paths = [Path(name) for name in names]
        rows = READERS[file_format(paths[0])](*paths) if len(paths) == 1 else read_parallel(*paths)
        for row in select(rows, **columns):
            empty = False
            yield row
    if empty:
        names = ", ".join(name for names in files for name in names)
        raise BadInput(f"{names}: no rows; fill the file or take it away")


def read_table(table: "Dataset", name: str, **columns: str) -> Iterator[dict[str, str]]:
    """The two columns of a table of the Hub, a class's name in place of its number."""
    target = columns["target_column"]
    names = getattr(table.features.get(target), "names", None)

    def rows() -> Iterator[tuple[str, Row]]:
        for number, row in enumerate(table, 1):
            if names and row[target] is not None:
                row[target] = names[row[target]] if row[target] >= 0 else None  # -1 is "held back"
            yield f"{name}, row {number}", row

    yield from select(rows(), **columns)


def to_arrow(
    rows: Callable[..., Iterator[dict[str, str]]], arguments: Row, fingerprint: str
) -> "Dataset":
    """Rows as an Arrow table on disk with the text columns source and target, made once."""
    import datasets

    text = datasets.Value("string")
    features = datasets.Features({"source": text, "target": text})
    try:
        return datasets.Dataset.from_generator(
            rows, features=features, gen_kwargs=arguments, fingerprint=fingerprint
        )
    except datasets.exceptions.DatasetGenerationError as error:
        told = isinstance(error.__cause__, BadInput | OSError)
        raise (error.__cause__ if told else error) from None


def checksum(file: Path) -> str:
    """What tells a file's content from any other. Raises BadInput if it cannot be read."""
    try:
        with open(file, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror}; give a file that can be read") from None


def without_network() -> bool:
    """Whether the Hub is out of reach; then the libraries are told, and do not try for a minute."""
    import datasets
    from huggingface_hub import constants

    if not urllib.request.getproxies() and not constants.HF_HUB_OFFLINE:
        try:
            socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return constants.HF_HUB_OFFLINE


def load_files(path: Path, columns: dict[str, str]) -> dict[str, "Dataset"]:
    """The splits of a file or folder. A changed file is read anew; one that was moved is not."""
    splits = {}
    for split, files in find_files(path, columns).items():
        contents = [[checksum(file), file_format(file)] for pair in files for file in pair]
        arguments = {"files": [[str(file) for file in pair] for pair in files], **columns}
        splits[split] = to_arrow(read_files, arguments, digest(contents, columns))
    return splits


def has_card(folder: Path) -> bool:
    """Whether a folder is laid out like one of the Hub, where a card says which file is what."""
    card = folder / "README.md"
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    return re.match(r"---\n(.*\n)*?configs:", text) is not None


def load_tables(
    path: Path, name: str, config_name: str | None
) -> tuple[dict[str, "Dataset"], str | None]:
    """What `datasets` makes of an id on the Hub, or of a folder with a card, which has a digest.

    No code that comes with the data is run.
    """
    import datasets

    content = cache = None
    if path.is_dir():
        # The library knows a folder by its name and card, and would give what it held before.
        content = digest([[str(f), checksum(f)] for f in sorted(path.rglob("*")) if f.is_file()])
        cache = Path(datasets.config.HF_DATASETS_CACHE, f"rhea-{content}")
    offline = content is None and without_network()
    try:
        source = str(path) if content else name
        return datasets.load_dataset(source, config_name, cache_dir=cache), content
    except Exception as error:  # a dozen kinds; all mean that it has none
        reason = " ".join(str(error).split())[:300]
        if content:
            raise BadInput(f"--dataset {name}: {reason}; mend its README.md or files") from None
        reason = "no network, and not fetched before" if offline else reason
        near = difflib.get_close_matches(name, embedded(), 1)
        remedy = (
            f"did you mean {near[0]}?" if near else "check the name, or fetch it with a network:"
        )
        raise BadInput(
            f"--dataset {name}: no file or folder here, not embedded (as {', '.join(embedded())} "
            f"is), not on the Hub ({reason}); {remedy} hf download --repo-type dataset {name}"
        ) from None


def load_hub(
    path: Path, name: str, config_name: str | None, columns: dict[str, str]
) -> dict[str, "Dataset"]:
    """The splits of a data set on the Hub, or of a folder with a card."""
    tables, content = load_tables(path, name, config_name)
    splits = {}
    for split, table in tables.items():
        table = table.flatten()  # the fields of a nested column are columns named a.b
        usual = "train" if len(tables) == 1 else split_of(Path(split))
        target = columns["target_column"]
        if usual is None or usual in splits:
            print(f"{name}: split {split} is left out, only train, validation and test are used")
        elif hasattr(table.features.get(target), "names") and table.unique(target) == [-1]:
            print(f"{name}: split {split} is left out, for its labels are held back")
        else:
            arguments = {"table": table, "name": f"{name}, {split}", **columns}
            splits[usual] = to_arrow(
                read_table, arguments, digest(table._fingerprint, content, columns)
            )
    return splits


def embedded() -> list[str]:
    """Names of the data sets under assets/."""
    return sorted(path.name for path in ASSETS.iterdir() if path.is_dir())


def share_of(text: str) -> float:
    """A number in [0, 1) that the text alone decides: where a cut puts a sentence, it stays."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


CUTS = {"test": (0.0, 0.1), "validation": (0.1, 0.2)}  # of share_of


def cut_missing(splits: dict[str, "Dataset"]) -> dict[str, "Dataset"]:
    """Cuts a validation or test split that is not there out of the training split."""
    train = splits["train"]
    missing = {split: bounds for split, bounds in CUTS.items() if split not in splits}

    def rows_of(split: str) -> "Dataset":
        def belongs(texts: list[str]) -> list[bool]:
            homes = ({s for s, (a, b) in missing.items() if a <= share_of(t) < b} for t in texts)
            return [split in (home or {"train"}) for home in homes]

        key = digest(train._fingerprint, split, missing)
        return train.filter(belongs, input_columns="source", batched=True, new_fingerprint=key)

    if missing:
        splits = {**splits, **{split: rows_of(split) for split in ("train", *missing)}}
    for split in SPLITS:
        if not len(splits[split]):
            raise BadInput(f"no sentence of {len(train)} is left for the {split} split; give more")
    return {split: splits[split] for split in SPLITS}


def load_splits(config: DataConfig, wanted: Sequence[str] = SPLITS) -> dict[str, "Dataset"]:
    """The splits wanted, tables with the text columns source and target. Raises BadInput."""
    import datasets

    datasets.disable_progress_bars()
    name = config.dataset
    columns = {key: getattr(config, key) for key in ("source_column", "target_column", "task")}
    path = ASSETS / name if name in embedded() else Path(name).expanduser()
    asks_hub = path.is_dir() and (config.dataset_config or has_card(path))
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and file_format(path) not in FILE_ENDINGS
    if config.dataset_config and (path.is_file() or name in embedded()):
        told = f"--dataset-config {config.dataset_config}"
        raise BadInput(f"{told}: is for a data set of the Hub, not {name}; leave it out")
    if path.exists() and not asks_hub:
        splits = load_files(path, columns)
    elif path.exists() or is_hub_id:
        splits = load_hub(path, name, config.dataset_config, columns)
    else:
        known = ", ".join(embedded())
        raise BadInput(f"--dataset {name}: no such file or folder; embedded data sets are {known}")
    if not set(wanted) <= splits.keys():
        if "train" not in splits:
            raise BadInput(f"--dataset {name}: only {', '.join(splits)}, no training split; add it")
        splits = cut_missing(splits)
    return {split: splits[split] for split in wanted}


def class_names(splits: dict[str, "Dataset"]) -> list[str]:
    """The labels of the training split, numbers in their order, else by alphabet.

    Raises BadInput if they will not do as classes.
    """
    names, n = splits["train"].unique("target"), len(splits["train"])
    are_numbers = all(re.fullmatch(r"-?\d{1,18}", name) for name in names)
    names = sorted(names, key=int if are_numbers else str)
    if len(names) == 1:
        raise BadInput(f"--target-column: every training sentence is {names[0]}; give two classes")
    if len(names) > max(100, n / 2):
        raise BadInput(
            f"--target-column: {len(names)} labels in {n} rows; name a column of classes, or "
            "--task translation"
        )
    return names


# --------------------------------------------------------------------------------------- tokenizers


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes ids."""

    tokenizer: str | None = option(
        None,
        "a tokenizer.json, or an id on the Hub",
        unset="the embedded data set's, else a new one",
    )
    train_tokenizer: bool = option(False, "train a new byte-level BPE on the training split")
    vocab_size: int = option(
        8000,
        "tokens of a new tokenizer, at most; 256 bytes and 4 special ones are always in",
        low=260,
    )
    lowercase: bool = option(
        False, "a new tokenizer makes no difference between A and a", negatable=True
    )

    def problems(self) -> list[str]:
        """What cannot work, a line each."""
        if self.tokenizer and self.train_tokenizer:
            return [f"--tokenizer {self.tokenizer} and --train-tokenizer: give one of the two"]
        return []


MOST_TOKENIZER_BYTES = 100_000_000  # the largest in use have some 20 million

# No sentence has so many; without a limit, a line of 10 MB takes the tokenizer seconds and 1 GB.
MOST_CHARACTERS = 200_000
# What a new tokenizer learns from a text: its time grows with the square of the longest word.
MOST_CHARACTERS_TO_LEARN_FROM = 10_000

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

    @property
    def n_vocab(self) -> int:
        """Rows that an embedding needs."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens; of its first MOST_CHARACTERS alone."""
        texts = [text[:MOST_CHARACTERS] for text in texts]
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def as_codec(tokenizer: Tokenizer) -> TextCodec:
    """Finds the special tokens, and adds those that are not there."""
    ids = []
    for name, spellings in SPECIAL_TOKENS.items():
        found = next((s for s in spellings if tokenizer.token_to_id(s) is not None), None)
        if found is None:
            tokenizer.add_special_tokens([name])
            print(f"tokenizer: has no {name}, so it was added", file=sys.stderr)
        ids.append(tokenizer.token_to_id(found or name))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # "<pad>" in a user's sentence is text like any other
    return TextCodec(tokenizer, *ids)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> TextCodec:
    """A byte-level BPE: any text has ids, and the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    steps = [normalizers.NFC(), *([normalizers.Lowercase()] if config.lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return as_codec(tokenizer)


def read_tokenizer(name: str) -> TextCodec:
    """A tokenizer.json, or the one of an id on the Hub. Raises BadInput."""
    path = Path(name).expanduser()
    try:
        if path.exists() and path.stat().st_size > MOST_TOKENIZER_BYTES:
            raise ValueError(f"over {MOST_TOKENIZER_BYTES:,} bytes")
        if path.exists() or name.endswith(".json"):
            tokenizer = Tokenizer.from_file(str(path))
        else:
            without_network()
            tokenizer = Tokenizer.from_pretrained(name)
        codec = as_codec(tokenizer)
        codec.encode(["\N{SNOWMAN}"])  # fails if what the tokenizer does not know has no id
    except Exception as error:  # the library raises plain Exceptions
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"--tokenizer {name}: none there, or none of use ({reason}); give a tokenizer.json of "
            "the tokenizers library, or --train-tokenizer"
        ) from None
    return codec


def shipped_tokenizer(dataset: str) -> Path:
    """Where an embedded data set has its tokenizer."""
    return ASSETS / dataset / "tokenizer.json"


def trains_tokenizer(config: TokenizerConfig, dataset: str) -> bool:
    """Whether a new tokenizer is due: asked for, or there is no other."""
    return config.train_tokenizer or not (config.tokenizer or shipped_tokenizer(dataset).is_file())


def get_tokenizer(
    config: TokenizerConfig, dataset: str, train: "Dataset", columns: Sequence[str]
) -> TextCodec:
    """The tokenizer asked for; else that of an embedded data set; else one trained on columns."""
    if trains_tokenizer(config, dataset):
        texts = (text for rows in train.iter(1000) for name in columns for text in rows[name])
        return train_tokenizer((text[:MOST_CHARACTERS_TO_LEARN_FROM] for text in texts), config)
    return read_tokenizer(config.tokenizer or str(shipped_tokenizer(dataset)))


# ------------------------------------------------------------------------------------------ batches

NO_TARGET = -100  # what torch's cross_entropy leaves out; 0 is a class like any other


@dataclass
class Batch:
    """A micro-batch. Its counts are known on the host, so that no step has to ask the device."""

    src: Tensor  # (b, l_z) int64, each row ending with eos_id, then pad_id
    tgt_in: Tensor  # (b, l_x) int64, each row beginning with bos_id
    tgt_out: Tensor  # (b, l_x) int64, what is to be predicted, NO_TARGET where nothing is
    n_targets: int  # what a mean loss is divided by
    n_tokens: int  # of source and target, without padding

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = (change(t) for t in (self.src, self.tgt_in, self.tgt_out))
        return Batch(*tensors, self.n_targets, self.n_tokens)

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; from pinned memory the copy goes on beside the computation."""
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by torch's DataLoader when the batch is bound for CUDA."""
        return self._each(Tensor.pin_memory)


def pad(rows: Sequence[Sequence[int]], value: int, width: int = 0) -> Tensor:
    """Rows of unequal length as one tensor (b, longest or width), filled up with value."""
    ids = np.full((len(rows), max(width, *map(len, rows))), value, dtype=np.int64)
    for line, row in zip(ids, rows):
        line[: len(row)] = row
    return torch.from_numpy(ids)


def plan_epoch(
    lengths: np.ndarray,
    *,
    batch_size: int | None,
    batch_tokens: int | None,
    seed: int,
    epoch: int,
    pad_to: int = 0,
) -> list[np.ndarray]:
    """The micro-batches of an epoch as row numbers: each row once, like lengths together.

    lengths: (n, 2) tokens of source and target. A micro-batch has at most batch_size rows and, with
    padding, at most batch_tokens tokens on its longer side. Which rows of one length meet, and the
    order of the batches, falls anew each epoch. The arguments alone decide, not the machine, the
    processes or the version of a library: numpy promises the stream of PCG64 for ever.
    """
    noise = np.random.PCG64([seed, epoch])
    ties = noise.random_raw(len(lengths))
    order = np.lexsort((ties, lengths[:, 1], lengths[:, 0]))
    longest = np.maximum(lengths.max(axis=1), pad_to)[order].tolist()
    bounds, width = [0], 0
    for end, length in enumerate(longest):
        n, width = end - bounds[-1], max(width, length)
        if n == batch_size or (batch_tokens and n and (n + 1) * width > batch_tokens):
            bounds.append(end)
            width = length
    batches = np.split(order, bounds[1:])
    return [batches[i] for i in np.argsort(noise.random_raw(len(batches)), kind="stable")]


def ignore_signals(_: int) -> None:
    """For a process that puts batches together: it ends with the one it works for, and a Ctrl-C
    that is meant for all must not take it away before."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


class TextData:
    """Splits as ids, and batches of them.

    Ids are kept on disk and memory-mapped, so memory grows by the lengths alone, 16 bytes a row.
    classes: the names of the labels; None for translation, where the target is text as well.
    """

    def __init__(
        self,
        config: DataConfig,
        splits: dict[str, "Dataset"],
        codec: TextCodec,
        classes: list[str] | None,
    ) -> None:
        self.config, self.texts, self.codec, self.classes = config, splits, codec, classes
        self.pad_to = (config.pad_to, 0 if classes else config.pad_to)  # of source, of target
        self.fingerprint = digest({split: texts._fingerprint for split, texts in splits.items()})
        self.rows = {split: self._encode(split, texts) for split, texts in splits.items()}
        self.lengths = {split: self._lengths(rows) for split, rows in self.rows.items()}

    def _encode(self, split: str, texts: "Dataset") -> "Dataset":
        codec, classes, longest = self.codec, self.classes, self.config.max_length
        for name in texts.unique("target") if classes else []:
            if name not in classes:
                known = ", ".join(classes[:20])
                remedy = "take out its rows, or put some into the training split"
                raise BadInput(
                    f"label {name} of the {split} split: the model knows only {known}; {remedy}"
                )

        def encode(batch: dict[str, list[str]]) -> dict[str, list]:
            src = codec.encode(batch["source"])
            tgt = [] if classes else codec.encode(batch["target"])
            labels = [[classes.index(name)] for name in batch["target"]] if classes else []
            return {
                "src": [ids[: longest - 1] + [codec.eos_id] for ids in src],
                "tgt": labels or [ids[: longest - 1] + [codec.eos_id] for ids in tgt],
                "n_src": [len(ids) + 1 for ids in src],
                "n_tgt": [1 for _ in labels] or [len(ids) + 1 for ids in tgt],
                "n_unknown": [
                    sum(ids.count(codec.unk_id) for ids in pair)
                    for pair in zip_longest(src, tgt, fillvalue=())
                ],
            }

        key = digest(texts._fingerprint, codec.tokenizer.to_str(), longest, classes)
        names = texts.column_names
        return texts.map(encode, batched=True, remove_columns=names, new_fingerprint=key)

    def _lengths(self, rows: "Dataset") -> np.ndarray:
        """(n, 2) tokens of source and target before any cut, end tokens included."""
        return np.stack([rows.data.column(name).to_numpy() for name in ("n_src", "n_tgt")], axis=1)

    def usable(self, split: str) -> np.ndarray:
        """The row numbers that take part. A pair with an empty or a cut side would teach a model to
        leave out, so training does without it; validation and test have every sentence."""
        lengths = self.lengths[split]
        if split != "train" or self.classes:
            return np.arange(len(lengths))
        complete = (lengths <= self.config.max_length).all(axis=1) & (lengths > 1).all(axis=1)
        return np.flatnonzero(complete)

    def plan(self, split: str, *, seed: int = 0, epoch: int = 0) -> list[np.ndarray]:
        """The micro-batches of one epoch; training counts epochs from 1."""
        c, rows = self.config, self.usable(split)
        plan = plan_epoch(
            np.minimum(self.lengths[split][rows], c.max_length),
            batch_size=c.batch_size,
            batch_tokens=c.batch_tokens,
            seed=seed,
            epoch=epoch,
            pad_to=c.pad_to,
        )
        return [rows[batch] for batch in plan]

    def longest_first(self, split: str, plan: list[np.ndarray]) -> list[np.ndarray]:
        """The batches of a plan, those with most positions first, and of these the widest."""
        widths = [sum(self.widths(split, rows)) for rows in plan]
        sizes = [(len(rows) * width, width) for rows, width in zip(plan, widths)]
        return [plan[i] for i in sorted(range(len(plan)), key=lambda i: sizes[i], reverse=True)]

    def padding_share(self, split: str, plan: list[np.ndarray]) -> float:
        """Share of the positions of a plan, source and target, that hold no token."""
        n_tokens = n_positions = 0
        for rows in plan:
            n_tokens += self.count(split, rows)[1]
            n_positions += len(rows) * sum(self.widths(split, rows))
        return 1 - n_tokens / n_positions

    def _cut_lengths(self, split: str, rows: np.ndarray) -> np.ndarray:
        return np.minimum(self.lengths[split][rows], self.config.max_length)  # (n, 2)

    def widths(self, split: str, rows: np.ndarray) -> tuple[int, int]:
        """Positions of source and target of a batch, padding included."""
        return tuple(np.maximum(self._cut_lengths(split, rows).max(axis=0), self.pad_to).tolist())

    def plan_fingerprint(self, seed: int) -> str:
        """Two runs that show the same one train on the same ids in the same batches."""
        plan = [rows.tolist() for rows in self.plan("train", seed=seed, epoch=1)]
        return digest(self.rows["train"]._fingerprint, self.config.pad_to, plan)

    def report(self, split: str) -> str:
        """One line of counts, so that nothing is cut or left out in silence."""
        lengths, longest = self.lengths[split], self.config.max_length
        n_unknown = self.rows[split].data.column("n_unknown").to_numpy().sum()
        n_empty = (lengths == 1)[:, : 1 if self.classes else 2].any(axis=1).sum()
        n_long = (lengths > longest).any(axis=1).sum()
        fate = "left out" if len(self.usable(split)) < len(lengths) else "cut"
        return (
            f"{split}: {len(lengths):,} sentences, {lengths.sum():,} tokens; {n_empty:,} empty, "
            f"{n_long:,} over {longest} tokens and {fate}, {n_unknown:,} unknown tokens, "
            f"{self.padding_share(split, self.plan(split)):.1%} padding"
        )

    def count(self, split: str, rows: np.ndarray) -> tuple[int, int]:
        """Targets, and tokens of source and target, of a batch."""
        n_src, n_tgt = self._cut_lengths(split, rows).sum(axis=0).tolist()
        return n_tgt, n_src + n_tgt

    def batches(self, split: str, plan: list[np.ndarray], device: torch.device) -> Iterator[Batch]:
        """The batches of a plan on a device, in its order; of no rows, a filler with no targets."""
        loader = torch.utils.data.DataLoader(
            self.rows[split].select_columns(["src", "tgt"]),
            batch_sampler=[rows.tolist() for rows in plan if len(rows)],
            collate_fn=self.collate,
            num_workers=self.config.num_workers,
            worker_init_fn=ignore_signals,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # its own, or it would draw from dropout's
        )
        loaded = iter(loader)
        return ((next(loaded) if len(rows) else self.filler()).to(device) for rows in plan)

    def filler(self) -> Batch:
        """A batch that counts nothing, for a process that has none while others have."""
        batch = self.collate([{"src": [self.codec.eos_id], "tgt": [0]}])
        return replace(batch, tgt_out=batch.tgt_out.fill_(NO_TARGET), n_targets=0, n_tokens=0)

    def collate(self, rows: list[Row]) -> Batch:
        """Puts rows together as one batch. Of a class the decoder sees the start token alone."""
        bos_id, pad_id, (src_width, tgt_width) = self.codec.bos_id, self.codec.pad_id, self.pad_to
        src, tgt = [row["src"] for row in rows], [row["tgt"] for row in rows]
        n_targets = sum(map(len, tgt))
        return Batch(
            src=pad(src, pad_id, src_width),
            tgt_in=pad([[bos_id] + ids[:-1] for ids in tgt], pad_id, tgt_width),
            tgt_out=pad(tgt, NO_TARGET, tgt_width),
            n_targets=n_targets,
            n_tokens=sum(map(len, src)) + n_targets,
        )
