import itertools
import json
import random
import subprocess
import sys

import pytest
import sacrebleu
import torch
from matplotlib.image import imread

import decoding
import main
from data import DataConfig, load_splits
from decoding import beam_search, greedy, length_penalty
from models import ModelConfig, Transformer

PAD, BOS, EOS = 0, 1, 2
ENDS = {"bos_id": BOS, "eos_id": EOS}


def small_model(n_vocab=23, seed=0, **changes):
    """Untrained, in float64, with weights large enough that it has strong opinions."""
    torch.manual_seed(seed)
    config = ModelConfig(n_layers=2, d_model=16, d_ff=24, n_heads=4, dropout=0.3, **changes)
    model = Transformer(config, n_vocab=n_vocab, max_len=100, pad_id=PAD).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p *= 2
    return model


def sources(lengths, n_vocab=23, seed=1):
    """Random sentences with their end token, padded to the longest."""
    draw = torch.Generator().manual_seed(seed)
    src = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(src, lengths):
        row[:length] = torch.randint(3, n_vocab, (length,), generator=draw)
        row[length - 1] = EOS
    return src


def greedy_without_cache(model, src):
    """The whole prefix through the whole decoder, for each token of each sentence by itself."""
    found = []
    for row in src:
        row = row[row != PAD][None]
        ids = [BOS]
        while ids[-1] != EOS and len(ids) <= row.shape[1] + decoding.EXTRA_LENGTH:
            ids.append(model(row, torch.tensor([ids]))[0, -1].argmax().item())
        found.append([token for token in ids[1:] if token != EOS])
    return found


# ----------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("form", ["list", "matmul", "fused"])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_steps_with_a_cache_give_the_logits_of_the_whole_prefix(form, positions):
    model = small_model(attention=form, positions=positions)
    src = sources([7, 4, 5])
    tgt_in = torch.randint(3, 23, (3, 9))
    caches, src_mask = model.start(src)
    steps = [model.step(tgt_in[:, t], t, caches, src_mask) for t in range(9)]
    torch.testing.assert_close(torch.stack(steps, 1), model(src, tgt_in), rtol=0, atol=1e-10)


def test_greedy_search_gives_the_tokens_of_decoding_without_a_cache():
    model, src = small_model(), sources([3, 9, 5, 5, 12])
    found = greedy(model, src, **ENDS)
    assert found == greedy_without_cache(model, src)
    assert len(set(map(len, found))) > 1  # some have left the batch before others


def test_no_translation_is_longer_than_its_source_and_fifty():
    src = sources([3, 9])
    model = small_model()
    with torch.no_grad():
        model.embedding.W_e[EOS] = 0  # its logit is 0, never the highest
    for found in (greedy(model, src, **ENDS), beams(model, src, 2)):
        assert [len(ids) for ids in found] == [53, 59]


def beams(model, src, k, alpha=0.6):
    return beam_search(model, src, **ENDS, beam_size=k, alpha=alpha)


@pytest.mark.parametrize("seed", range(4))
def test_a_beam_of_one_is_greedy_search(seed):
    model, src = small_model(seed=seed), sources([3, 9, 5, 12], seed=seed)
    assert beams(model, src, 1) == greedy(model, src, **ENDS)


@pytest.mark.parametrize("search", [lambda m, s: greedy(m, s, **ENDS), lambda m, s: beams(m, s, 4)])
def test_a_translation_does_not_depend_on_the_batch_it_is_in(search):
    model, src = small_model(seed=3), sources([3, 9, 5, 5, 12])
    alone = [search(model, row[row != PAD][None])[0] for row in src]
    assert search(model, src) == alone
    assert search(model, src.flip(0)) == alone[::-1]


def log_probability(model, row, ids):
    logits = model(row, torch.tensor([[BOS, *ids[:-1]]]))[0]
    return logits.log_softmax(-1)[range(len(ids)), list(ids)].sum().item()


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_as_wide_as_all_there_is_finds_the_best_there_is(alpha, seed, monkeypatch):
    monkeypatch.setattr(decoding, "EXTRA_LENGTH", 2)
    n_vocab, limit = 5, 4  # tokens of a source of 2, and EXTRA_LENGTH
    model, src = small_model(n_vocab, seed=seed), sources([2], n_vocab, seed)
    others = [token for token in range(n_vocab) if token != EOS]
    endings = [(*ids, EOS) for n in range(limit) for ids in itertools.product(others, repeat=n)]

    def score(ids):
        return log_probability(model, src, ids) / ((5 + len(ids)) / 6) ** alpha

    assert beams(model, src, n_vocab**limit, alpha) == [list(max(endings, key=score)[:-1])]


def test_a_wider_beam_finds_likelier_translations():
    model, src = small_model(seed=5), sources([6] * 12)
    score = {}
    for k in (1, 8):
        found = beams(model, src, k, alpha=0.0)
        score[k] = sum(
            log_probability(model, row[None], [*ids, EOS]) for row, ids in zip(src, found)
        )
    assert score[8] > score[1]


def test_length_penalty_has_the_values_of_the_formula():
    assert length_penalty(1, 0.6) == 1
    assert length_penalty(7, 1.0) == 2
    assert length_penalty(20, 0.6) == pytest.approx(2.35436, abs=1e-5)
    assert length_penalty(20, 0.0) == 1


def test_a_decoding_step_runs_on_the_meta_device():
    model = small_model().to("meta")
    src = torch.empty(3, 7, dtype=torch.long, device="meta")
    caches, src_mask = model.start(src, 2)
    for t in range(2):
        ids = torch.empty(6, dtype=torch.long, device="meta")
        assert model.step(ids, t, caches, src_mask).shape == (6, 23)


def test_what_a_token_takes_of_the_source_sums_to_one_and_leaves_padding_alone():
    model, src = small_model(), sources([7, 4])
    weights = model.cross_attention(src, torch.randint(3, 23, (2, 5)))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5).double())
    assert (weights[1, :, 4:] == 0).all() and (weights[1, :, :4] > 0).all()


# -------------------------------------------------------------------------------------------- files


def write(path, lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def splits_of(folder, **changes):
    columns = {"task": "translation", "source_column": "en", "target_column": "de"} | changes
    splits = load_splits(DataConfig(dataset=str(folder), **columns))
    return {split: list(zip(rows["source"], rows["target"])) for split, rows in splits.items()}


def test_parallel_files_are_read_in_either_direction(tmp_path):
    import gzip

    for split in ("train", "val", "test"):
        write(tmp_path / f"{split}.en", [f"{split} one", "", "three"])
        with gzip.open(tmp_path / f"{split}.de.gz", "wt", encoding="utf-8") as out:
            out.write(f"{split} eins\nzwei\ndrei ß\n")
    pairs = splits_of(tmp_path)
    assert pairs["validation"] == [("val one", "val eins"), ("", "zwei"), ("three", "drei ß")]
    turned = splits_of(tmp_path, source_column="de", target_column="en")
    assert turned["test"] == [("test eins", "test one"), ("zwei", ""), ("drei ß", "three")]


@pytest.mark.parametrize("n_source, n_target", [(3, 2), (2, 3)])
def test_parallel_files_of_unequal_length_are_refused_with_both_counts(
    tmp_path, capsys, n_source, n_target
):
    write(tmp_path / "train.en", ["a"] * n_source)
    write(tmp_path / "train.de", ["a"] * n_target)
    command = ["--dataset", str(tmp_path), "--task", "translation"]
    assert main.main(command) == 2
    error = capsys.readouterr().err
    assert f"train.en has {n_source} lines" in error and f"train.de has {n_target}" in error


def test_a_parallel_file_without_its_partner_is_refused(tmp_path, capsys):
    write(tmp_path / "train.en", ["a"])
    assert main.main(["--dataset", str(tmp_path), "--task", "translation"]) == 2
    assert "train.en" in (error := capsys.readouterr().err) and "train.de" in error


def test_tables_with_two_columns_and_nested_ones_are_read(tmp_path):
    rows = [{"translation": {"en": f"word {i}", "de": f"Wort {i}"}} for i in range(40)]
    write(tmp_path / "all.jsonl", map(json.dumps, rows))
    pairs = splits_of(tmp_path, source_column="translation.en", target_column="translation.de")
    assert sorted(itertools.chain(*pairs.values())) == sorted(
        (f"word {i}", f"Wort {i}") for i in range(40)
    )


# --------------------------------------------------------------------------------- the command line


TOY = "--n-layers 1 --d-model 64 --d-ff 128 --n-heads 4 --dropout 0 --label-smoothing 0 --lr 3e-3"
TOY += " --warmup-steps 100 --schedule linear --batch-tokens 512 --max-length 32 --vocab-size 270"


def toy_corpus(folder, change, n=3000):
    draw = random.Random(0)
    for split, size in (("train", n), ("val", 100), ("test", 100)):
        lines = [draw.choices("abcdefgh", k=draw.randint(2, 6)) for _ in range(size)]
        write(folder / f"{split}.in", map(" ".join, lines))
        write(folder / f"{split}.out", (" ".join(change(line)) for line in lines))


def translate_toy(folder, *options):
    columns = "--task translation --source-column in --target-column out --train-tokenizer"
    command = ["--dataset", str(folder), "--run-dir", "run", *columns.split(), *TOY.split()]
    return main.main([*command, *options])


@pytest.mark.parametrize("change", [list, lambda line: line[::-1]], ids=["copy", "reversal"])
def test_a_toy_task_is_learnt_to_the_last_sentence_of_the_test_split(tmp_path, capsys, change):
    toy_corpus(tmp_path, change)
    assert translate_toy(tmp_path, "--epochs", "20", "--average-checkpoints", "1") == 0
    hypotheses = (tmp_path / "run" / "test.hypotheses.txt").read_text()
    assert hypotheses == (tmp_path / "test.out").read_text()
    assert imread(tmp_path / "run" / "attention.png").std() > 0.01  # a picture, and not blank
    out = capsys.readouterr().out
    assert "bleu 100.0000" in out
    assert out.count("  hypothesis  ") == 2 * 20

    # The model is used with nothing but its folder; a blank line stays one.
    write(tmp_path / "new.txt", ["a b c", "", "h g"])
    expected = [" ".join(change(line.split())) for line in ("a b c", "", "h g")]
    for beam_size in ("1", "4"):
        use = ["--run-dir", "run", "--predict", "new.txt", "--beam-size", beam_size]
        assert main.main(use) == 0
        assert capsys.readouterr().out.splitlines() == expected


def test_bleu_is_what_the_command_of_sacrebleu_says_of_the_files(tmp_path, capsys):
    toy_corpus(tmp_path, list, n=400)
    assert translate_toy(tmp_path, "--epochs", "3", "--beam-size", "2") == 0
    files = [str(tmp_path / "run" / f"test.{name}.txt") for name in ("references", "hypotheses")]
    test = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    command = [sys.executable, "-m", "sacrebleu", files[0], "-i", files[1], "-w", "4", "-b"]
    for name, options in {
        "bleu": ["-m", "bleu"],
        "chrf": ["-m", "chrf"],
        "bleu_lowercase_13a": ["-m", "bleu", "-lc", "-tok", "13a"],
    }.items():
        said = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
        assert 0 < test[name] < 100
        assert float(said.stdout) == pytest.approx(test[name], abs=1e-4)
    assert f"version:{sacrebleu.__version__}" in test["signature"]


def test_a_translation_without_end_is_drawn_no_larger_than_can_be_read(tmp_path):
    toy_corpus(tmp_path, list, n=100)
    assert translate_toy(tmp_path, "--max-steps", "1", "--beam-size", "1") == 0
    assert max(map(len, (tmp_path / "run/test.hypotheses.txt").read_text().splitlines())) > 40
    assert max(imread(tmp_path / "run" / "attention.png").shape) < 5000
