"""Ids to batches: plans, steps and tensors."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import PROJECT, WAIT_LIMIT, refuse_with, table
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from config import DataConfig
from data import NO_ROWS, NO_TARGET, Batch, TextData, dropout_seed, map_ahead, pad, plan_epoch
from errors import BadInput
from files import SPLITS
from prepare import load_data
from settings import resolve
from tokenization import TextCodec, as_codec

# -------------------------------------------------------------------------------------------- plans

LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=60)
PLANS = st.fixed_dictionaries(
    {
        "batch_size": st.none() | st.integers(1, 9),
        "batch_tokens": st.none() | st.integers(30, 200),  # no sentence is longer than 30
        "seed": st.integers(0, 2**40),
        "epoch": st.integers(0, 1000),
    }
)


def plan_as_lists(lengths, **arguments) -> list[list[int]]:
    return [rows.tolist() for rows in plan_epoch(np.array(lengths), **arguments)]


def fits(rows, lengths, batch_size, batch_tokens) -> bool:
    width = max(max(lengths[row]) for row in rows)
    return (batch_size is None or len(rows) <= batch_size) and (
        batch_tokens is None or len(rows) * width <= batch_tokens
    )


@given(lengths=LENGTHS, arguments=PLANS)
def test_a_plan_has_each_row_once_within_the_limits(lengths, arguments):
    plan = plan_as_lists(lengths, **arguments)
    assert sorted(row for rows in plan for row in rows) == list(range(len(lengths)))
    limits = {k: arguments[k] for k in ("batch_size", "batch_tokens")}
    assert all(rows and fits(rows, lengths, **limits) for rows in plan)


@given(lengths=LENGTHS, arguments=PLANS)
def test_a_plan_fills_each_batch_with_rows_of_similar_length(lengths, arguments):
    limits = {k: arguments[k] for k in ("batch_size", "batch_tokens")}
    plan = plan_as_lists(lengths, **arguments)
    spans = [sorted(lengths[row] for row in rows) for rows in plan]
    by_length = sorted(zip(spans, plan), key=lambda p: (p[0][0], p[0][-1], -len(p[1])))
    for (span, rows), (next_span, next_rows) in pairwise(by_length):
        assert span[-1] <= next_span[0], "similar lengths are together"
        shortest = min(next_rows, key=lambda row: lengths[row])
        assert not fits([*rows, shortest], lengths, **limits), "one more would have fitted"


@given(lengths=LENGTHS, arguments=PLANS)
def test_a_plan_depends_on_its_arguments_alone_and_keeps_its_number_of_batches(lengths, arguments):
    plan = plan_as_lists(lengths, **arguments)
    np.random.seed(1), torch.manual_seed(1)
    assert plan_as_lists(lengths, **arguments) == plan
    for other in ({"epoch": arguments["epoch"] + 1}, {"seed": arguments["seed"] + 1}):
        assert len(plan_as_lists(lengths, **{**arguments, **other})) == len(plan)


def test_epochs_and_seeds_differ_in_order_and_in_which_rows_meet():
    lengths = [(i // 20 + 1, 1) for i in range(60)]
    plans = [
        plan_as_lists(lengths, batch_size=4, batch_tokens=None, seed=seed, epoch=epoch)
        for seed, epoch in ((0, 1), (0, 2), (1, 1), (1, 2))
    ]
    meetings = [{frozenset(rows) for rows in plan} for plan in plans]
    widths = [[lengths[rows[0]] for rows in plan] for plan in plans]
    for i in range(4):
        for j in range(i):
            assert meetings[i] != meetings[j], "the same rows meet again"
            assert widths[i] != widths[j], "the batches come in the same order"


def test_a_plan_is_the_same_as_in_older_versions():
    lengths = [(5, 1), (2, 1), (9, 1), (5, 3), (3, 7), (2, 1), (8, 2), (5, 1), (3, 1), (4, 4)]
    plan = plan_as_lists(lengths, batch_size=None, batch_tokens=16, seed=3, epoch=2)
    assert plan == [[5, 1, 8], [0, 7, 3], [6], [2], [4, 9]]


def test_rows_with_equal_keys_keep_their_order_on_any_machine():
    lengths = np.full((400, 2), 2**30)  # 31 bits each: 2 of 64 are left for noise
    (rows,) = plan_epoch(lengths, batch_size=400, batch_tokens=None, seed=3, epoch=2)
    noise = np.random.PCG64([3, 2]).random_raw(400) >> np.uint64(62)
    assert rows.tolist() == np.argsort(noise, kind="stable").tolist()


# Prints the hash of a large plan and of a new tokenizer.
FACTS = """
import hashlib, sys
import numpy as np
from config import TokenizerConfig
from data import plan_epoch
from tokenization import train_tokenizer
lengths = np.array([(i * 7 % 40 + 1, i % 3 + 1) for i in range(500)])
plan = plan_epoch(lengths, batch_size=None, batch_tokens=256, seed=1, epoch=1)
texts = [f"w{i % 11} x{i % 7}{i % 5} \\u00e9{i % 3}" for i in range(300)]
tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=300)).tokenizer.to_str()
for fact in (str([rows.tolist() for rows in plan]), tokenizer):
    print(hashlib.sha256(fact.encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def facts_of_other_processes() -> list[list[str]]:
    """What two processes print whose sets of strings have another order."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", FACTS],
            cwd=PROJECT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    return [process.communicate(timeout=WAIT_LIMIT)[0].split() for process in running]


@pytest.mark.slow
@pytest.mark.parametrize("fact", [0, 1], ids=["plan", "tokenizer"])
def test_another_process_makes_the_same(fact, facts_of_other_processes, capsys):
    exec(FACTS, {})
    here = capsys.readouterr().out.split()
    first, second = facts_of_other_processes
    assert here[fact] == first[fact] == second[fact]


# ------------------------------------------------------------------------------------------ batches


@pytest.fixture
def word_codec() -> TextCodec:
    """Ids that are easy to read: <pad> 0, <s> 1, </s> 2, <unk> 3, a 4, b 5, c 6."""
    vocab = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return as_codec(tokenizer)


def with_line_breaks(rows) -> datasets.Dataset:
    """Rows as a table, with 1 for each that had a line break."""
    breaks = [int(any("\n" in text for text in row)) for row in rows]
    return table(rows).add_column("line_breaks", breaks)


def text_data(codec: TextCodec, classes=("no", "yes"), **splits_and_options) -> TextData:
    """classes: None for translation."""
    splits = {k: with_line_breaks(v) for k, v in splits_and_options.items() if k in SPLITS}
    options = {k: v for k, v in splits_and_options.items() if k not in SPLITS}
    config = DataConfig(**{"batch_size": 8, **options})
    return TextData(config, splits, codec, classes and list(classes))


def translations(codec: TextCodec, n: int = 37, **options) -> TextData:
    """n pairs of many lengths."""
    pairs = [("a " * (i % 7 + 1), "b " * (i * 5 % 11 + 1)) for i in range(n)]
    return text_data(codec, None, **{"train": pairs, "batch_size": 2, **options})


CPU = torch.device("cpu")


def test_pad_fills_up_on_the_right():
    ids = pad([[7], [8, 9], []], value=5)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[7, 5], [8, 9], [5, 5]]
    assert pad([[7], [8, 9]], 0, 4).tolist() == [[7, 0, 0, 0], [8, 9, 0, 0]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_has_the_sentence_the_start_token_and_the_class(word_codec, num_workers):
    rows = [("a b c", "yes"), ("", "no"), ("c a", "yes")]
    data = text_data(word_codec, train=rows, num_workers=num_workers)
    (batch,) = data.load("train", [np.array([2, 0, 1])], CPU)
    assert batch.src.tolist() == [[6, 4, 2, 0], [4, 5, 6, 2], [2, 0, 0, 0]]
    assert batch.tgt_in.tolist() == [[1], [1], [1]]
    assert batch.tgt_out.tolist() == [[1], [1], [0]]
    assert (batch.n_targets, batch.n_tokens) == (3, 3 + 4 + 1 + 3)
    assert {t.dtype for t in (batch.src, batch.tgt_in, batch.tgt_out)} == {torch.int64}


def test_pad_to_gives_every_batch_the_same_width(word_codec):
    data = text_data(word_codec, train=[("a", "yes"), ("a b", "no")], pad_to=6, max_length=6)
    batches = data.load("train", [np.array([0]), np.array([1])], CPU)
    assert [batch.src.tolist() for batch in batches] == [[[4, 2, 0, 0, 0, 0]], [[4, 5, 2, 0, 0, 0]]]


def test_a_missing_target_is_not_class_zero(word_codec):
    data = text_data(word_codec, train=[("a", "no")])
    batch = data.collate([([4, 2], [0, 1]), ([2], [0])])
    assert batch.tgt_out.tolist() == [[0, 1], [0, NO_TARGET]]
    assert torch.nn.CrossEntropyLoss().ignore_index == NO_TARGET


def test_a_long_sentence_is_cut_and_keeps_its_end_token(word_codec):
    data = text_data(word_codec, train=[("a b c a b c", "yes"), ("a b", "no")], max_length=3)
    (batch,) = data.load("train", [np.array([0, 1])], CPU)
    assert batch.src.tolist() == [[4, 5, 2], [4, 5, 2]]


def test_report_counts_what_was_not_used_as_it_is(word_codec):
    train = [("a b c a", "yes"), ("", "no"), ("a ? b !", "yes"), ("a b c", "no"), ("?", "no")]
    data = text_data(word_codec, train=train, validation=[("b", "yes")] * 2, max_length=4)
    # with end tokens 5, 1, 5, 4, 2, cut to 4, 1, 4, 4, 2 of 5 x 4 positions; and 5 start tokens
    assert data.report("train") == (
        "train: 5 sentences, 22 tokens, 1 empty, 2 over 4 tokens and cut, 3 unknown tokens, "
        "20.0% padding"
    )
    assert data.report("validation") == "validation: 2 sentences, 6 tokens, 0.0% padding"


def test_report_counts_line_breaks(word_codec):
    data = text_data(word_codec, train=[("a\nb\n", "yes"), ("a", "no"), ("\nb", "no")])
    assert ", 2 with line breaks, now spaces, " in data.report("train")


def test_training_leaves_out_pairs_that_are_empty_or_cut_and_tests_use_all(word_codec):
    pairs = [("a", "b"), ("", "b"), ("a", ""), ("a a a", "b"), ("a", "b b b"), ("a b", "c")]
    data = text_data(word_codec, None, train=pairs, test=pairs, max_length=3)
    assert sorted(np.concatenate(data.plan("train")).tolist()) == [0, 5]
    assert sorted(np.concatenate(data.plan("test")).tolist()) == list(range(6))
    assert ", 2 empty, 2 over 3 tokens and left out, " in data.report("train")
    assert ", 2 empty, 2 over 3 tokens and cut, " in data.report("test")


@pytest.mark.parametrize(
    "pairs, counts",
    [
        ([("a a a", "b")] * 3, "3 sentences, 18 tokens, 3 over 3 tokens and left out"),
        ([("a", "")] * 3, "3 sentences, 9 tokens, 3 empty"),
    ],
    ids=["too long", "empty"],
)
def test_no_usable_training_pair_is_refused_with_the_counts(pairs, counts, word_codec):
    with pytest.raises(BadInput, match=f"no training pair can be used .{counts}.; give other data"):
        text_data(word_codec, None, train=pairs, max_length=3)


def test_a_max_length_that_no_pair_fits_ends_a_run_with_one_line(capsys):
    rows = [{"en": f"a long sentence {i}", "de": f"ein langer Satz {i}"} for i in range(60)]
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = "--dataset d.jsonl --task translation --max-length 3 --train-tokenizer".split()
    refuse_with(argv, ["no training pair", "over 3 tokens", "larger --max-length"], capsys)


def test_plan_fingerprint_stands_for_ids_and_plan(word_codec):
    rows = [(w, "yes") for w in "abcabc"]

    def fingerprint(seed=0, rows=rows, **options):
        return text_data(word_codec, train=rows, **options).plan_fingerprint(seed)

    changed = [
        fingerprint(seed=1),
        fingerprint(batch_size=2),
        fingerprint(batch_size=None, batch_tokens=4),
        fingerprint(pad_to=256),
        fingerprint(rows=[*rows[:-1], ("a b", "yes")]),
    ]
    assert fingerprint() == fingerprint(num_workers=3)
    assert fingerprint() not in changed


@pytest.mark.parametrize("options", [{}, {"pad_to": 20, "max_length": 20}, {"batch_tokens": 30}])
@pytest.mark.parametrize("task", ["classification", "translation"])
def test_sizes_of_a_plan_are_those_of_its_batches(task, options, word_codec):
    options = {"batch_size": 3, "max_length": 9, **options}
    if "batch_tokens" in options:
        options["batch_size"] = None
    if task == "translation":
        data = translations(word_codec, **options)
    else:
        rows = [("a " * (i % 12), "yes") for i in range(40)]
        data = text_data(word_codec, train=rows, **options)
    plan = data.plan("train", seed=1, epoch=2)
    batches = list(data.load("train", plan, CPU))
    sizes = data.sizes("train", plan)
    assert sizes.n_rows.tolist() == [len(batch.src) for batch in batches]
    assert sizes.l_z.tolist() == [batch.src.shape[1] for batch in batches]
    assert sizes.l_x.tolist() == [batch.tgt_in.shape[1] for batch in batches]
    n_targets = [int((batch.tgt_out != NO_TARGET).sum()) for batch in batches]
    assert sizes.n_targets.tolist() == [batch.n_targets for batch in batches] == n_targets
    n_tokens = [int((batch.src != 0).sum() + (batch.tgt_in != 0).sum()) for batch in batches]
    assert sizes.n_tokens.tolist() == [batch.n_tokens for batch in batches] == n_tokens
    positions = [batch.src.numel() + batch.tgt_in.numel() for batch in batches]
    assert sizes.n_positions.tolist() == positions
    assert sizes.padding_share == pytest.approx(1 - sum(n_tokens) / sum(positions))
    by_size = data.sizes("train", data.largest_first("train", plan)).n_positions.tolist()
    assert by_size == sorted(positions, reverse=True)


def test_a_plan_without_batches_has_no_sizes(word_codec):
    assert [size.tolist() for size in translations(word_codec).sizes("train", [])] == [[]] * 5


@pytest.mark.slow
def test_padding_of_the_embedded_reviews_is_small_at_the_default_batch_size():
    options = resolve({})
    data, _ = load_data(options)
    for epoch in (1, 2):
        plan = data.plan("train", seed=options.seed, epoch=epoch)
        assert 0 < data.sizes("train", plan).padding_share < 0.05


# -------------------------------------------------------------------------------------------- steps


def as_lists(rows) -> list[list[int]]:
    return [batch.tolist() for batch in rows]


@pytest.mark.parametrize("accumulate, world_size", [(4, 1), (2, 2), (1, 4)])
def test_ranks_and_accumulation_make_the_same_steps(accumulate, world_size, word_codec):
    data = translations(word_codec)
    plan = data.plan("train", seed=3, epoch=2)
    sizes = data.sizes("train", plan)
    assert len(plan) == 19
    by_rank = [
        data.steps(plan, seed=3, epoch=2, accumulate=accumulate, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {len(steps) for steps in by_rank} == {5}
    for k, ranks in enumerate(zip(*by_rank)):
        places = range(4 * k, min(4 * k + 4, 19))
        for rank, step in enumerate(ranks):
            own = [i for i in places if i % world_size == rank]  # every world_size-th is one rank's
            assert as_lists(step.rows) == (as_lists(plan[i] for i in own) or [[]])
            if own:
                assert step.seeds == [dropout_seed(3, 2, i) for i in own]
            assert step.n_micro_batches == len(places)
            assert step.n_targets == sizes.n_targets[list(places)].sum()
            assert step.n_tokens == sizes.n_tokens[list(places)].sum()
    if world_size == 4:  # the last of 19 micro-batches leaves one rank without any
        assert by_rank[3][-1].rows == [NO_ROWS]


def test_dropout_has_a_seed_of_its_own_for_each_seed_epoch_and_place():
    seeds = {dropout_seed(s, e, i) for s in range(5) for e in range(5) for i in range(40)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert dropout_seed(0, 1, 2) == 7680575655704880704, "older runs are resumed with it"


def test_steps_that_begin_in_the_middle_of_an_epoch_are_the_rest_of_its_steps(word_codec):
    data = translations(word_codec)
    plan = data.plan("train", seed=3, epoch=2)
    shape = {"seed": 3, "epoch": 2, "accumulate": 2, "rank": 1, "world_size": 2}
    whole, rest = data.steps(plan, **shape), data.steps(plan, **shape, begin=8)
    assert len(rest) == len(whole) - 2 > 0
    for step, expected in zip(rest, whole[2:]):
        assert as_lists(step.rows) == as_lists(expected.rows)
        assert vars(step) | {"rows": 0} == vars(expected) | {"rows": 0}
    assert data.steps(plan, **shape, begin=len(plan)) == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_each_step_is_loaded_with_its_micro_batches_and_dummy_batches(num_workers, word_codec):
    data = translations(word_codec, num_workers=num_workers)
    plan = data.plan("train", epoch=1)
    steps = data.steps(plan, seed=0, epoch=1, rank=3, world_size=4)
    loaded = list(data.load_steps(steps, CPU))
    assert [step for step, _ in loaded] == steps
    (expected,) = data.load("train", plan[3:4], CPU)
    assert loaded[0][1][0].src.equal(expected.src)
    (dummy,) = loaded[-1][1]
    assert dummy.n_targets == dummy.n_tokens == 0


@pytest.mark.parametrize("classes", [("no", "yes"), None], ids=["classes", "translations"])
def test_a_dummy_batch_has_no_targets_and_the_sizes_that_torch_compile_needs(classes, word_codec):
    dummy = text_data(word_codec, classes, train=[("a", "yes" if classes else "b")]).dummy_batch()
    l_x = 1 if classes else 2  # sizes of 1 would be compiled again
    assert dummy.src.shape == (2, 2) and dummy.tgt_in.shape == dummy.tgt_out.shape == (2, l_x)
    assert (dummy.tgt_out == NO_TARGET).all() and (dummy.n_targets, dummy.n_tokens) == (0, 0)


class StandInTensor:
    """Records how it is copied."""

    def __init__(self, pinned: bool):
        self.pinned, self.copies = pinned, []

    def is_pinned(self):
        return self.pinned

    def to(self, device, non_blocking):
        self.copies.append((device.type, non_blocking))


@pytest.mark.parametrize(
    "pinned, kind, non_blocking",
    [(True, "cuda", True), (False, "cuda", False), (True, "mps", False), (False, "cpu", False)],
)
def test_only_copies_from_pinned_memory_to_cuda_are_asynchronous(pinned, kind, non_blocking):
    tensors = [StandInTensor(pinned) for _ in range(3)]
    Batch(*tensors, n_targets=1, n_tokens=2).to(torch.device(kind))
    assert [t.copies for t in tensors] == [[(kind, non_blocking)]] * 3


# ---------------------------------------------------------------------------------- ids on the disk


@pytest.mark.parametrize("last_id", [2**16 - 1, 2**16, 2**20])
def test_ids_of_any_vocabulary_are_kept(last_id):
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "a": last_id}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    data = text_data(as_codec(tokenizer), None, train=[("a", "a")])
    (batch,) = data.load("train", [np.array([0])], CPU)
    assert (batch.src.tolist(), batch.tgt_in.tolist()) == ([[last_id, 2]], [[1, last_id]])


def test_damaged_ids_are_made_again(word_codec, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    before = translations(word_codec).rows["train"].pairs(range(37))
    (file,) = tmp_path.rglob("*.ids")
    content = file.read_bytes()
    for damaged in (content[:-1], b"", bytes(len(content))):
        file.unlink()  # the tables of before are mapped from it
        file.write_bytes(damaged)
        after = translations(word_codec).rows["train"].pairs(range(37))
        assert file.read_bytes() == content
        assert all(map(np.array_equal, sum(after, ()), sum(before, ())))


# Loads and reports the default data, and prints what that should not need.
WARM_START = """
import sys
from prepare import load_data
from settings import resolve
load_data(resolve({}))[0].report("train")
print(sorted({"datasets", "pandas", "torch._inductor"} & sys.modules.keys()))
"""


@pytest.mark.slow
def test_data_are_loaded_without_slow_imports():
    command = [sys.executable, "-c", WARM_START]
    for _ in range(2):  # the first fills the cache
        out = subprocess.check_output(command, cwd=PROJECT, text=True, timeout=WAIT_LIMIT)
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize("n_threads", [0, 1, 3])
def test_items_are_computed_in_order_and_only_a_few_ahead(n_threads):
    taken = []
    results = map_ahead(lambda i: 1 / (7 - i), (taken.append(i) or i for i in range(9)), n_threads)
    assert [next(results) for _ in range(4)] == [1 / 7, 1 / 6, 1 / 5, 1 / 4]
    assert len(taken) <= 4 + 2 * n_threads
    assert [next(results) for _ in range(3)] == [1 / 3, 1 / 2, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
