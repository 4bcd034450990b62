"""A run that was killed or stopped is resumed and ends as an unbroken one, bit for bit."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import (
    csv_bytes,
    events,
    numbered,
    refuse_with,
    run_quietly,
    without_times,
    write_files,
)
from kill import COMMANDS, DATA, command, differences, run_with_kills, tensors_of
from runs import act_after_step, load_checkpoint, only_error, raise_own_signal, resume, stop_after

import main
import prepare
import procedures
from checkpoints import KeptWeights
from run_folder import RunFolder, json_checksum
from scoring import Evaluation

TASKS = list(COMMANDS)
EPOCHS = ("--epochs", "3")
N_STEPS = 15  # of the classification; 5 in an epoch


# ------------------------------------------------------------------------------------------- killed


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_is_killed_three_times_ends_as_an_unbroken_one(task, small_data, unbroken):
    argv = command(task, small_data, Path("run"), *EPOCHS)
    run_with_kills(task, argv, Path("run"), 3, random.Random(task))
    assert differences(Path("run"), unbroken[task]) == []


@pytest.mark.slow
def test_the_runs_that_are_killed_use_every_part_of_a_checkpoint(unbroken):
    options = {}
    for task, run in unbroken.items():
        options[task] = json.loads((run / "config.json").read_text())["options"]
    assert options["classification"]["accumulate"] == 2
    assert options["translation"]["precision"] == "bf16"
    assert all(o["dropout"] > 0 and o["average_checkpoints"] == 3 for o in options.values())


# ------------------------------------------------------------------------------ what resuming means


@pytest.mark.slow
def test_a_run_is_resumed_in_the_middle_of_an_epoch(stopped, unbroken):
    before = load_checkpoint(stopped)["state"]
    assert (before["step"], before["epoch"], before["n_micro_batches"]) == (7, 2, 4)
    out = resume(stopped)
    assert "resumed from step 7, in epoch 2\n" in out
    assert differences(stopped, unbroken["classification"]) == []
    assert [event["step"] for event in events(stopped, "step")] == list(range(1, N_STEPS + 1))


@pytest.mark.slow
def test_a_run_can_be_stopped_after_each_step(small_data, unbroken):
    stop_after(1, command("translation", small_data, "run", *EPOCHS))
    for _ in range(30):
        with pytest.MonkeyPatch.context() as patch:
            act_after_step(patch, 1, lambda: raise_own_signal(signal.SIGTERM))
            status = main.main(["--resume", "--run-dir", "run"])
        if status == 0:
            break
        assert status == 143
    assert differences(Path("run"), unbroken["translation"]) == []


def test_the_same_command_line_with_resume_continues(small_data, stopped, unbroken):
    out = run_quietly(*command("classification", small_data, stopped, *EPOCHS, "--resume"))
    assert " (was " not in out
    assert differences(stopped, unbroken["classification"]) == []


def files_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir()}


@pytest.mark.parametrize("more", [(), ("--max-steps", 15), ("--max-steps", 4), ("--epochs", 2)])
def test_a_finished_run_has_nothing_to_do_and_stays_as_it_is(more, done):
    before = files_of(done)
    out = resume(done, *more)
    assert out == (
        f"nothing to do: the run in {done} has 15 steps and 3 whole epochs; give more --epochs or "
        "--max-steps to continue\n"
    )
    assert files_of(done) == before


def test_fewer_max_steps_than_are_done_train_and_change_nothing(stopped):
    before = files_of(stopped)
    out = resume(stopped, "--max-steps", 4)
    assert out.startswith(f"nothing to do: the run in {stopped} has 7 steps and 1 whole epochs; ")
    assert files_of(stopped) == before


CONSTANT = ("--schedule", "constant")  # else the learning rates depend on the number of steps


@pytest.mark.slow
def test_more_epochs_continue_a_finished_run(small_data):
    run_quietly(*command("classification", small_data, "long", "--epochs", 3, *CONSTANT))
    run_quietly(*command("classification", small_data, "run", "--epochs", 2, *CONSTANT))
    assert "--epochs 3 (was 2)" in resume("run", "--epochs", 3)
    # The test after two epochs stays in the metrics.
    assert differences(Path("run"), Path("long"), ignore={"metrics.jsonl"}) == []
    assert len(events("run", "test")) == 2
    trained = [event for event in without_times(Path("run")) if event["event"] != "test"]
    assert trained == [event for event in without_times(Path("long")) if event["event"] != "test"]
    assert resume("run").startswith("nothing to do")


@pytest.mark.slow
def test_more_max_steps_train_the_rest_of_the_epoch_that_was_cut(small_data):
    """The weights and every step are those of an unbroken run; there is one more validation."""
    argv = command("classification", small_data, "run", "--epochs", 9, *CONSTANT)
    run_quietly(*argv, "--max-steps", 7)
    assert [(e["epoch"], e["steps"]) for e in events("run", "epoch")] == [(1, 5), (2, 2)]
    assert "resumed from step 7, in epoch 2; --max-steps 15 (was 7)" in resume(
        "run", "--max-steps", 15
    )
    argv[argv.index("run")] = "long"
    run_quietly(*argv, "--max-steps", 15)
    for name in ("model", "optimizer", "last_epochs"):
        mine, its = (tensors_of(load_checkpoint(run)[name]) for run in ("run", "long"))
        assert mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in mine)
    path = Path("best.safetensors")  # the average of three whole epochs
    assert ("run" / path).read_bytes() == ("long" / path).read_bytes()
    mine, its = ([e for e in without_times(run) if e["event"] != "test"] for run in ("run", "long"))
    cut = [e for e in mine if e["event"] == "epoch" and e["steps"] == 2]
    assert len(cut) == 1
    assert [e for e in mine if e not in cut] == its


def test_a_run_that_was_stopped_before_its_test_is_only_tested(small_data, unbroken, patch):
    patch.setattr(main, "test", lambda *_, **__: raise_own_signal(signal.SIGINT))
    assert main.main(command("classification", small_data, "run", *EPOCHS)) == 130
    patch.undo()
    patch.setattr(procedures.Trainer, "step", None)  # no step more
    resume("run")
    assert differences(Path("run"), unbroken["classification"]) == []


def test_changed_options_are_listed_and_saved(stopped):
    out = resume(stopped, "--lr", "1e-3", "--patience", "9", "--epochs", "3")
    assert "in epoch 2; --lr 0.001 (was 0.003); --patience 9 (was None)\n" in out
    options = json.loads((stopped / "config.json").read_text())["options"]
    assert options["lr"] == 1e-3 and options["patience"] == 9 and options["resume"] is False
    assert events(stopped, "step")[-1]["lr"] < 1e-3


@pytest.mark.slow
def test_data_can_be_moved(small_data, unbroken, capsys):
    shutil.copytree(small_data / DATA["classification"], "old place")
    argv = command("classification", small_data, "run", *EPOCHS)
    argv[argv.index("--dataset") + 1] = "old place"
    stop_after(4, argv)
    shutil.move("old place", "new place")
    capsys.readouterr()
    refuse_with(["--resume", "--run-dir", "run"], ["old place", "no such file"], capsys)
    assert "--dataset new place (was old place)" in resume("run", "--dataset", "new place")
    found = differences(Path("run"), unbroken["classification"], ignore={"metrics.jsonl"})
    assert found == []


@pytest.mark.parametrize("change", ["text", "label", "one row fewer"])
def test_changed_data_are_refused(change, small_data, capsys):
    folder = Path(shutil.copytree(small_data / DATA["classification"], "reviews"))
    argv = command("classification", small_data, "run", *EPOCHS)
    argv[argv.index("--dataset") + 1] = "reviews"
    stop_after(2, argv)
    lines = (folder / "train.csv").read_text().splitlines(True)
    if change == "text":
        lines[5] = "other " + lines[5]
    elif change == "label":
        lines[5] = lines[5].replace("awful\n", "fine\n").replace("fine\n", "awful\n")
    else:
        del lines[5]
    (folder / "train.csv").write_text("".join(lines))
    capsys.readouterr()
    refuse_with(["--resume", "--run-dir", "run"], ["reviews is not the data that"], capsys)


def test_other_classes_than_the_data_have_are_refused(stopped, capsys):
    config = json.loads((stopped / "config.json").read_text()) | {"classes": ["fine", "dull"]}
    config["checksum"] = json_checksum(config)
    (stopped / "config.json").write_text(json.dumps(config))
    words = ["is not the data that the run started with", "classes"]
    refuse_with(["--resume", "--run-dir", "run"], words, capsys)


# name: (options, words of the one line); run is a run stopped in its second epoch
RESUME_REFUSED = {
    "no folder given": ("--resume", ["--run-dir: missing", "such as run"]),
    "no run": ("--resume --run-dir nowhere", ["--run-dir nowhere", "config.json is missing"]),
    "no run, but files": ("--resume --run-dir mine", ["--run-dir mine", "config.json is missing"]),
    "a file": ("--resume --run-dir mine/thesis.txt", ["mine/thesis.txt", "no such run"]),
    "with overwrite": (
        "--resume --overwrite --run-dir run",
        ["--resume and --overwrite", "one of the two"],
    ),
    "with test-only": ("--resume --test-only --run-dir run", ["--resume", "--test-only"]),
    "with predict": ("--resume --predict in.txt --run-dir run", ["--resume", "--predict"]),
    "width": ("--resume --run-dir run --d-model 32", ["--d-model 32", "has 16", "leave it out"]),
    "depth": ("--resume --run-dir run --n-layers 2", ["--n-layers 2", "has 1", "a new run"]),
    "named size": ("--resume --run-dir run --model base", ["--model base", "has tiny"]),
    "positions": ("--resume --run-dir run --positions learned", ["--positions", "sinusoidal"]),
    "activation": ("--resume --run-dir run --activation gelu", ["--activation gelu", "has relu"]),
    "task": ("--resume --run-dir run --task translation", ["--task", "has classification"]),
    "column": ("--resume --run-dir run --source-column label", ["--source-column", "has text"]),
    "length": ("--resume --run-dir run --max-length 9", ["--max-length 9", "has 256"]),
    "batch": ("--resume --run-dir run --batch-size 8", ["--batch-size 8", "has 16"]),
    "batch by tokens": ("--resume --run-dir run --batch-tokens 512", ["--batch-tokens 512"]),
    "padding": ("--resume --run-dir run --pad-to 256", ["--pad-to 256", "has 0"]),
    "seed": ("--resume --run-dir run --seed 1", ["--seed 1", "has 0", "start a new run"]),
    "tokenizer": ("--resume --run-dir run --tokenizer t.json", ["--tokenizer t.json", "has None"]),
    "new tokenizer": ("--resume --run-dir run --train-tokenizer", ["--train-tokenizer", "False"]),
    "vocabulary": ("--resume --run-dir run --vocab-size 400", ["--vocab-size 400", "has 300"]),
    "case": ("--resume --run-dir run --no-lowercase", ["--no-lowercase", "has True"]),
    "other data": ("--resume --run-dir run --dataset few.csv", ["few.csv is not the data"]),
    "no data": ("--resume --run-dir run --dataset ./x.csv", ["--dataset ./x.csv", "no such file"]),
    "rate out of range": ("--resume --run-dir run --lr 0", ["--lr 0", "above 0"]),
    "no interval": (
        "--resume --run-dir run --checkpoint-every 0",
        ["--checkpoint-every 0", "at least 1"],
    ),
    "device": ("--resume --run-dir run --device cuda", ["--device cuda", "not available", "cpu"]),
    "precision": ("--resume --run-dir run --precision fp16", ["--precision fp16", "bf16"]),
    "misspelled": ("--resme --run-dir new", ["--resme", "did you mean --resume?"]),
    "new run in its folder": ("--run-dir run", ["--run-dir run", "--overwrite", "--resume"]),
}


@pytest.mark.parametrize("argv, words", RESUME_REFUSED.values(), ids=RESUME_REFUSED.keys())
def test_what_would_be_another_run_is_refused(argv, words, stopped, capsys, patch):
    patch.setattr(torch.cuda, "is_available", lambda: False)
    write_files({"mine/thesis.txt": b"years of work", "few.csv": csv_bytes(numbered(60))})
    refuse_with(argv.split(), words, capsys)


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_can_be_resumed_or_started_again(
    small_data, unbroken, patch, capsys
):
    argv = command("classification", small_data, "run", *EPOCHS)
    patch.setattr(RunFolder, "write_config", lambda *_: raise_own_signal(signal.SIGINT))
    assert main.main(argv) == 130
    assert files_of(Path("run")).keys() == {".lock", "tokenizer.json"}
    patch.undo()
    capsys.readouterr()
    refuse_with(["--resume", "--run-dir", "run"], ["no such run, config.json is missing"], capsys)
    patch.setattr(procedures.Trainer, "train", lambda _: raise_own_signal(signal.SIGINT))
    assert main.main(argv) == 130
    assert files_of(Path("run")).keys() == {".lock", "tokenizer.json", "config.json"}
    patch.undo()
    resume("run")
    assert differences(Path("run"), unbroken["classification"]) == []


# --------------------------------------------------------------------------- test events, threads


def change_tests(run: Path, change) -> None:
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for event in lines:
        if event["event"] == "test":
            change(event)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_test_event_survives_and_one_that_was_changed_does_not(done):
    (true,) = events(done, "test")
    change_tests(done, lambda event: None)
    assert resume(done).startswith("nothing to do")
    assert events(done, "test") == [true]
    change_tests(done, lambda event: event.update(accuracy=1.0))
    assert "resumed from step 15" in resume(done)
    assert events(done, "test") == [true]  # it was tested again


@pytest.mark.parametrize("n_cores, expected", [(4, 2), (2, 2), (1, 1)])
def test_the_number_of_threads_is_restored_or_there_is_a_warning(n_cores, expected, patch, capsys):
    before = torch.get_num_threads()
    patch.setattr(prepare, "usable_cores", lambda: n_cores)
    try:
        torch.set_num_threads(1)
        prepare.restore_threads({"threads": 2})
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
    err = capsys.readouterr().err
    assert err.count("\n") == (n_cores == 1)
    assert n_cores > 1 or err.startswith("warning: the run so far used 2 threads a process, and ")


def test_a_resumed_run_uses_its_threads(stopped):
    config = json.loads((stopped / "config.json").read_text())
    n = config["threads"]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n + 1)
        assert f", {n} thread" in resume(stopped).splitlines()[0]
        assert json.loads((stopped / "config.json").read_text())["threads"] == n
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------- weights that are kept


def model_of(value: float) -> torch.nn.Module:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, value)
    return model


def kept_epochs(*better: bool, n: int, up_to_best: bool) -> list[float]:
    """The epochs to average, of epochs that were better than all before or not."""
    kept = KeptWeights(n, up_to_best=up_to_best)
    for epoch, is_better in enumerate(better, start=1):
        kept.add(model_of(epoch), is_better=is_better, is_whole_epoch=True)
    return [w["weight"].item() for w in kept.chosen(model_of(99), is_cut=False)]


def test_the_last_epochs_are_averaged_or_with_patience_those_up_to_the_best():
    better = (True, False, True, True, False, False)
    assert kept_epochs(*better, n=3, up_to_best=False) == [4, 5, 6]
    assert kept_epochs(*better, n=3, up_to_best=True) == [2, 3, 4]
    assert kept_epochs(*better, n=9, up_to_best=True) == [1, 2, 3, 4]
    assert kept_epochs(True, False, n=3, up_to_best=True) == [1]


def test_an_epoch_that_was_cut_is_averaged_at_the_end_and_not_kept():
    kept = KeptWeights(2, up_to_best=False)
    kept.add(model_of(1), is_better=True, is_whole_epoch=True)
    kept.add(model_of(2), is_better=True, is_whole_epoch=False)
    assert [w["weight"].item() for w in kept.chosen(model_of(2), is_cut=True)] == [1, 2]
    kept.add(model_of(3), is_better=True, is_whole_epoch=True)
    assert [w["weight"].item() for w in kept.chosen(model_of(3), is_cut=False)] == [1, 3]


def losses_by_epoch(patch, losses: dict[int, float], seen: dict[int, dict]) -> None:
    """Each epoch's validation has a given loss; seen: the weights of each epoch."""

    def evaluated(trainer, plan=None):
        if plan is None and trainer.state.n_micro_batches:
            weights = {k: p.detach().clone() for k, p in trainer.model.named_parameters()}
            seen[trainer.state.epoch] = weights
        return Evaluation(losses.get(trainer.state.epoch, 9.0), 0.5, None)

    patch.setattr(procedures.Trainer, "evaluate", evaluated)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [False, True])
def test_patience_with_average_checkpoints_averages_up_to_the_best(stop, small_data, patch):
    seen: dict[int, dict] = {}
    losses_by_epoch(patch, {1: 3.0, 2: 2.0, 3: 1.0}, seen)
    argv = command("classification", small_data, "run", "--epochs", 9, "--patience", 2)
    argv[argv.index("--average-checkpoints") + 1] = "2"
    if stop:
        stop_after(17, argv)  # in epoch 4
        resume("run")
    else:
        run_quietly(*argv)
    assert sorted(seen) == [1, 2, 3, 4, 5]
    from safetensors.torch import load_file

    weights = load_file("run/best.safetensors")
    expected = {name: (seen[2][name] + seen[3][name]) / 2 for name in weights}
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-7)


def test_the_best_weights_of_an_abandoned_branch_are_not_kept(small_data, patch):
    """A run is killed after epoch 2 wrote the best weights, and resumed with other options, under
    which epoch 2 is worse than epoch 1, whose weights are gone."""
    seen: dict[int, dict] = {}
    losses_by_epoch(patch, {1: 2.0, 2: 1.0}, seen)
    argv = command("classification", small_data, "run", "--epochs", 2)
    argv[argv.index("--average-checkpoints") + 1] = "1"
    argv[argv.index("--checkpoint-every") + 1] = "3"  # the last is before the end of epoch 2
    save = RunFolder.save_checkpoint

    def killed(folder, checkpoint):
        if checkpoint["state"]["best_epoch"] == 2:
            raise_own_signal(signal.SIGTERM)
            raise KeyboardInterrupt  # as if it were killed: there is no checkpoint of this
        save(folder, checkpoint)

    patch.setattr(RunFolder, "save_checkpoint", killed)
    assert main.main(argv) in (130, 143)
    patch.setattr(RunFolder, "save_checkpoint", save)
    abandoned = Path("run/best.safetensors").read_bytes()
    losses_by_epoch(patch, {1: 2.0, 2: 3.0}, seen)
    resume("run", "--lr", "1e-5")
    assert Path("run/best.safetensors").read_bytes() != abandoned
    assert load_checkpoint("run")["state"]["best_epoch"] == 2


def test_damaged_best_weights_are_found_before_training(small_data, capsys):
    argv = command("classification", small_data, "run", *EPOCHS, "--average-checkpoints", 1)
    stop_after(7, argv)
    path = Path("run/best.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    capsys.readouterr()
    status = main.main(["--resume", "--run-dir", "run"])
    only_error(capsys, status, 2, "run/best.safetensors: not the weights of this run")
