"""Many processes make the steps, the test result and the answers of one."""

import shutil
from pathlib import Path

import pytest
from helpers import csv_bytes, events, run_quietly, without_times, write_files
from processes import Ended, ranks, ranks_quietly
from runs import RANK_OPTIONS, assert_same_weights, record_plans, recorded_plans

import procedures
from data import TextData
from errors import StopSignals

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


# ----------------------------------------------------------------------------------- the same steps


@pytest.mark.parametrize(
    "task, n, options",
    [
        ("classification", 2, "--max-steps 30 --dropout 0"),
        ("translation", 2, "--max-steps 30 --dropout 0"),
        ("classification", 4, "--max-steps 10 --dropout 0"),
        ("classification", 2, "--max-steps 10 --dropout 0.3 --r-drop 1 --accumulate 2"),
        ("translation", 3, "--max-steps 10 --dropout 0.3 --average-checkpoints 2"),
    ],
)
def test_processes_make_the_steps_of_accumulated_micro_batches(task, n, options, corpora):
    argv = [*RANK_OPTIONS, *corpora[task], "--epochs", "30", *options.split()]
    ranks_quietly(n, *argv, "--run-dir", "many")
    together = n * (2 if "--accumulate" in argv else 1)
    run_quietly(*argv, "--run-dir", "one", "--accumulate", together)
    assert_same_weights("many", "one", exactly=together == 2)
    many, one = without_times("many"), without_times("one")
    assert len(many) == len(one)
    for event, other in zip(many, one):
        for name in [name for name, value in event.items() if isinstance(value, str)]:
            mine, its = event.pop(name), other.pop(name)
            assert mine == its or name == "checksum"
        assert event == pytest.approx(other, rel=1e-6, abs=1e-6)
    steps = [event["step"] for event in events("many", "step")]
    assert steps == list(range(1, int(options.split()[1]) + 1))


def test_rank_r_of_n_takes_every_nth_micro_batch_of_the_plan(corpora, monkeypatch):
    monkeypatch.setattr(TextData, "load", TextData.load)
    argv = [*RANK_OPTIONS, *corpora["classification"], "--epochs", "1", "--accumulate", "2"]
    ranks_quietly(3, *argv, "--run-dir", "many", prepare=record_plans)
    record_plans()
    run_quietly(*argv, "--run-dir", "one")
    whole = recorded_plans("one")
    of_rank = [recorded_plans(r) for r in range(3)]
    splits = ["train", "validation", "train", "validation", "test"]  # the first two: the warm-up
    assert all([split for split, _ in plans] == splits for plans in (whole, *of_rank))
    for i, split in [*enumerate(splits)][2:]:
        _, plan = whole[i]
        n_last = len(plan) % 6 or 6  # micro-batches in the last step
        assert n_last < 6 or split != "train", "the last step is as large as the others"
        for r in range(3):
            dummies = [[]] if split == "train" and r >= n_last else []
            assert of_rank[r][i][1] == plan[r::3] + dummies


def test_more_processes_than_micro_batches(corpora):
    argv = [*RANK_OPTIONS, *corpora["classification"], "--batch-tokens", "2500", "--epochs", "2"]
    ranks_quietly(4, *argv, "--run-dir", "many")
    run_quietly(*argv, "--run-dir", "one", "--accumulate", 4)
    run_quietly(*argv, "--run-dir", "single", "--max-steps", 2)
    assert [e["steps_per_epoch"] for e in events("many", "epoch")] == [1, 1]
    assert 1 < events("single", "epoch")[0]["steps_per_epoch"] < 4
    assert_same_weights("many", "one")


# ----------------------------------------------------------------------------- the same test result


@pytest.fixture(scope="module")
def trained(corpora, tmp_path_factory) -> dict[str, Path]:
    """A trained model of each task, in its folder."""
    folder = tmp_path_factory.mktemp("trained")
    for task, options in corpora.items():
        argv = [*RANK_OPTIONS, *options, "--epochs", "8", "--lr", "1e-2", "--max-length", "100"]
        argv += ["--run-dir", str(folder / task)]
        run_quietly(*argv)
    return {task: folder / task for task in corpora}


@pytest.mark.parametrize("task", ["classification", "translation"])
def test_any_number_of_processes_gets_the_same_test_result(task, trained):
    for n in (2, 3):
        shutil.copytree(trained[task], str(n))
        Path(str(n), "test.hypotheses.txt").unlink(missing_ok=True)
        ranks_quietly(n, "--run-dir", n, "--test-only")
    facts = [events(folder, "test")[-1] for folder in (trained[task], "2", "3")]
    del facts[0]["step"]
    for event in facts:
        del event["checksum"]
    assert facts[0] == facts[1] == facts[2]
    if task == "translation":
        folders = [trained[task], "2", "3"]
        texts = [Path(folder, "test.hypotheses.txt").read_bytes() for folder in folders]
        assert texts[0] == texts[1] == texts[2]
        assert len(set(texts[0].splitlines())) > 1


@pytest.mark.parametrize("task", ["classification", "translation"])
def test_any_number_of_processes_gives_the_same_answers(task, trained):
    texts = [f"open file {i} and choose the {'very ' * (i % 5)}last page" for i in range(70)]
    write_files({"in.txt": "\n".join([*texts, "", "long " * 99]).encode()})
    argv = ["--run-dir", str(trained[task]), "--predict", "in.txt", "--batch-size", "30"]
    (one,), (two, silent) = ranks(1, *argv), ranks(2, *argv)
    assert one == two and one.status == 0
    assert len(one.out.splitlines()) == 72 and len(one.err.splitlines()) == 2
    assert silent == Ended(0, "", "")


# ---------------------------------------------------------------------------------------- bad input


def refused_once(n: int, *argv, **how) -> str:
    """The one line in which n processes refuse a command line; one of them prints it."""
    ended = ranks(n, *argv, **how)
    assert [e.status for e in ended] == [2] * n, ended
    (line,) = "".join(e.err for e in ended).splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--epochs", "--epochs: expected one argument"),
        ("--epoch 3", "--epoch: no such option; did you mean --epochs?"),
        ("--dataset nowhere.csv", "nowhere.csv"),
        ("--world-size 3", "--world-size 3: the launcher started 2"),
        ("--run-dir nowhere --test-only", "--run-dir nowhere: no such run"),
        ("--run-dir TRAINED --predict -", "--predict -: only one process can read standard input"),
        ("--run-dir TRAINED --predict latin.txt", "latin.txt, line 5000"),
    ],
)
def test_bad_input_is_reported_once(argv, words, trained):
    write_files({"latin.txt": b"\n" * 4999 + b"\xff\n"})
    argv = argv.replace("TRAINED", str(trained["classification"])).split()
    assert words in refused_once(2, *argv)


def test_fewer_sentences_than_processes_are_refused(corpora):
    write_files({"few.csv": csv_bytes([("good", "a"), ("bad", "b")])})
    argv = [*RANK_OPTIONS, *corpora["classification"]]
    write_files(
        {f"d/{s}.csv": Path("few.csv").read_bytes() for s in ("train", "validation", "test")}
    )
    line = refused_once(3, *argv, "--dataset", "d", "--run-dir", "r")
    assert "2 training sentences for 3 processes; start at most 2" in line
    assert not Path("r").exists()


# ----------------------------------------------------------------------------------- --compile


def trainer_of(argv: list[str]) -> procedures.Trainer:
    """A trainer in this process."""
    from prepare import prepare, resolve_run
    from settings import parse_args

    options, device, folder = resolve_run(*parse_args(argv))
    return prepare(options, device).trainer(folder, StopSignals())


@pytest.mark.parametrize("task", ["classification", "translation"])
def test_the_warm_up_has_each_kind_of_batch_that_compiles_anew(task, corpora, monkeypatch):
    monkeypatch.setattr(procedures, "world_size", lambda: 2)
    trainer = trainer_of([*RANK_OPTIONS, *corpora[task], "--batch-tokens", "256"])
    assert len(trainer.warm_up_plan()) == 1
    trainer.compiled = True
    *plan, dummy = trainer.warm_up_plan()
    assert len(dummy) == 0

    def kinds(plan) -> set:
        sizes = trainer.data.sizes("train", plan)
        return {tuple(n == 1 for n in row) for row in zip(sizes.n_rows, sizes.l_z, sizes.l_x)}

    everything = kinds(trainer.plan(1))
    assert kinds(plan) == everything and len(plan) < len(trainer.plan(1))
    batch = trainer.data.dummy_batch()
    assert batch.src.shape == (2, 2) and batch.n_targets == 0
    # A classifier's decoder has one position in every batch.
    assert batch.tgt_in.shape == (2, 1 if task == "classification" else 2)


def compiles_without_kernels() -> None:
    """Traces as torch.compile does, and fails where it would compile after the warm-up."""
    import torch._dynamo

    compile_, warm_up = torch.compile, procedures.Trainer.warm_up
    torch.compile = lambda model, **how: compile_(model, backend="eager", **how)

    def then_no_more(self) -> None:
        warm_up(self)
        torch._dynamo.config.error_on_recompile = True

    procedures.Trainer.warm_up = then_no_more


def test_nothing_is_compiled_again_after_the_warm_up(corpora):
    argv = [*RANK_OPTIONS, *corpora["translation"], "--epochs", "1", "--run-dir", "r", "--compile"]
    ended = ranks(2, *argv, "--accumulate", 2, prepare=compiles_without_kernels)
    assert [e.status for e in ended] == [0, 0], ended
    assert "compiled in " in ended[0].out
