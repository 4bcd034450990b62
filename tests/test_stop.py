"""A run that ends early, by a signal, a divergence, a full disk or memory, loses nothing."""

import errno
import gc
import io
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import csv_bytes, events, run_quietly
from kill import checkpoint_id, command, differences
from processes import (
    PROJECT,
    WAIT_LIMIT,
    Forked,
    free_port,
    rank_environment,
    run_main,
    run_rank,
    wait_until,
)
from runs import act_after_step, is_finite, load_checkpoint, only_error, raise_own_signal, resume

import main
import predict
import procedures
import reports
from errors import Stopped, StopSignals
from run_folder import RunFolder

EPOCHS = ("--epochs", "3")
Fault = tuple[str, str, Callable, Callable]  # run folder, words of the error, break, fix
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
RESUME_WITH = "is saved; resume with: "


# ------------------------------------------------------------------------------------------ signals


def signal_in(module, name: str, patch, signum: int) -> None:
    """A signal comes in the third call of a function."""
    count, function = iter(range(1, 10**6)), getattr(module, name)

    def interrupted(*args, **kwargs):
        if next(count) == 3:
            raise_own_signal(signum)
        return function(*args, **kwargs)

    patch.setattr(module, name, interrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "signum, module, name",
    [
        (signal.SIGINT, procedures, "train_step"),
        (signal.SIGTERM, procedures, "evaluate_split"),  # the second epoch's validation
        (signal.SIGINT, predict, "greedy"),
        (signal.SIGTERM, reports, "draw_attention"),
    ],
)
def test_a_signal_ends_a_run_with_a_checkpoint_and_the_command_that_resumes(
    signum, module, name, small_data, unbroken, patch, capsys
):
    if name == "draw_attention":  # which is called once, after the test
        patch.setattr(module, name, lambda *args, **more: raise_own_signal(signum))
    else:
        signal_in(module, name, patch, signum)
    status = main.main(command("translation", small_data, "run", *EPOCHS))
    assert status == SIGNALS[signum]
    said = capsys.readouterr().err.strip().splitlines()[-1]
    patch.undo()
    n = load_checkpoint("run")["state"]["step"]
    assert said.startswith(f"stopped; step {n} {RESUME_WITH}python ")
    words = shlex.split(said.partition("with: ")[2])
    assert words[0] == "python" and words[1] == sys.argv[0]
    run_quietly(*words[2:])
    assert differences(Path("run"), unbroken["translation"]) == []


@pytest.mark.slow
def test_a_real_run_is_locked_stopped_and_resumed_by_the_command_that_it_prints(small_data, capsys):
    run = Path("run on \u00fcber das Land")
    argv = command("classification", small_data, run, "--epochs", 10)
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "main.py"), *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: checkpoint_id(run) or process.poll() is not None)
        remedy = ["another process writes to it", "wait for it", f"--run-dir {run}"]
        for again in ([*argv, "--overwrite"], [*argv, "--resume"]):
            capsys.readouterr()
            only_error(capsys, main.main(again), 2, *remedy)
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=WAIT_LIMIT)[1]
    finally:
        process.kill()
    assert process.returncode == 143, err
    n = load_checkpoint(run)["state"]["step"]
    assert 0 < n < 5 * 10
    said = err.strip().splitlines()[-1]
    assert said.startswith(f"stopped; step {n} {RESUME_WITH}python ")
    # Literally, in a shell, where `python` is this one.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    line = said.partition("with: ")[2]
    subprocess.run(line, shell=True, check=True, env={**os.environ, "PATH": path})
    run_quietly(*command("classification", small_data, "unbroken", "--epochs", 10))
    assert differences(run, Path("unbroken")) == []


def hangs_in_a_step() -> None:
    """Says when it hangs, and when it has received a signal that did not end it."""
    receive = StopSignals._receive

    def forever(*args, **kwargs):
        print("hangs", flush=True)
        while True:
            signal.pause()

    def received(self, signum, frame):
        receive(self, signum, frame)
        print("received", flush=True)

    procedures.train_step, StopSignals._receive = forever, received


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(small_data):
    process = Forked("run", run_main, command("classification", small_data, "run"), hangs_in_a_step)
    for said, signum in (("hangs\n", signal.SIGTERM), ("received\n", signal.SIGINT)):
        wait_until(lambda said=said: said in process.said()[0] or process.poll() is not None)
        assert process.poll() is None  # the first signal waits for the step
        process.send_signal(signum)
    assert process.wait() == 130
    assert is_finite(Path("run"))


class Destroyed:
    """An object that receives a signal while it is destroyed, as tqdm's bar may."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_inside_a_destructor_is_not_lost(patch):
    unraisable = []
    patch.setattr(sys, "unraisablehook", unraisable.append)
    with StopSignals() as signals, pytest.raises(Stopped):
        stopped = Destroyed()
        del stopped
        wait_until(lambda: unraisable)
    assert signals.received == signal.SIGTERM and unraisable == []


@pytest.mark.parametrize("program", ["main.py", "ddp_main.py"])
@pytest.mark.parametrize("signum, status", SIGNALS.items())
def test_a_signal_while_torch_is_imported_is_one_line(program, signum, status):
    Path("torch").mkdir()
    Path("torch/__init__.py").write_text(
        "import signal\nprint('importing', flush=True)\nwhile True: signal.pause()\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / program)],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signum)
        out, err = process.communicate(timeout=WAIT_LIMIT)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (status, "", "\nstopped\n")


def test_ctrl_c_that_no_test_sent_ends_pytest(small_data, request, patch):
    act_after_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
    seen = []  # pytest does not let a stop be taken back
    recorder = property(lambda _: False, lambda _, reason: seen.append(reason))
    patch.setattr(type(request.session), "shouldstop", recorder)
    assert main.main(command("classification", small_data, "run", *EPOCHS)) == 130
    assert seen == ["Ctrl-C"]


# ------------------------------------------------------------------------------- a reader that ends


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_a_run_outlives_the_reader_of_its_output(n, small_data, unbroken):
    """As in `python main.py | head -1`: training continues, with one warning."""
    os.mkfifo("out.0")
    argv, port, action = [], free_port(), run_main
    argv = command("classification", small_data, Path("run").absolute(), *EPOCHS)
    if n > 1:
        action = run_rank
        argv[argv.index("--accumulate") + 1] = "1"
    processes = []
    for i in range(n):
        environment = rank_environment(i, n, port) if n > 1 else {}
        processes.append(Forked(i, action, argv, **environment))
    try:
        with open("out.0") as out:
            assert "thread" in out.readline()
        ended = [process.ended() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [e.status for e in ended] == [0] * n, ended
    warnings = [line for e in ended for line in e.err.splitlines()]
    assert warnings == [
        "warning: standard output was closed or is full; the run continues without it"
    ]
    assert differences(Path("run"), unbroken["classification"]) == []
    names = {path.name for path in unbroken["classification"].iterdir()}
    pictures = {"curves.png", "confusion.png"}
    assert {path.name for path in Path("run").iterdir()} == names - pictures


def test_the_resume_command_is_quoted_for_its_shell(patch):
    folder = SimpleNamespace(path=Path("my runs/it's mine"))
    patch.setattr(sys, "argv", ["main.py"])
    assert main.resume_command(folder) == (
        """python main.py --resume --run-dir 'my runs/it'"'"'s mine'"""
    )
    patch.setattr(os, "name", "nt")
    command_line = main.resume_command(folder)
    patch.undo()
    assert command_line == '''python main.py --resume --run-dir "my runs/it's mine"'''


# ---------------------------------------------------------------------------------------- diverged


def test_finite_weights_that_give_no_finite_loss_are_not_saved(stopped, unbroken, capsys):
    status = main.main(["--resume", "--run-dir", str(stopped), "--lr", "4e30"])
    # The weights of step 8 are finite, about 1e30, and their loss is not.
    line = only_error(capsys, status, 1, "step 9: the loss is nan at learning rate 2.55e+30")
    assert "--lr" in line and f"step 7 {RESUME_WITH}" in line
    assert load_checkpoint(stopped)["state"]["step"] == 7
    assert is_finite(stopped) and not (stopped / "previous.pt").exists()
    resume(stopped, "--lr", "3e-3")
    assert differences(stopped, unbroken["classification"]) == []


def test_a_loss_that_is_not_finite_ends_the_run_with_the_checkpoint_before(small_data, capsys):
    argv = command("classification", small_data, "run", "--epochs", 2, "--lr", "4e30")
    argv[argv.index("--checkpoint-every") + 1] = "5"
    status = main.main(argv)
    line = only_error(capsys, status, 1, "step 2: the loss is nan at learning rate 1.6e+30")
    assert f"step 0 {RESUME_WITH}" in line and "--lr" in line
    assert is_finite(Path("run"))
    assert "--lr 0.001 (was 4e+30)" in resume("run", "--lr", "1e-3")
    assert len(events("run", "step")) == 10 and is_finite(Path("run"))


# ------------------------------------------------------------------------------------------- memory


class Limit:
    """A limit of this process in this context."""

    def __init__(self, kind: int, value: int) -> None:
        self.kind, self.value = kind, value

    def __enter__(self) -> None:
        self.before = resource.getrlimit(self.kind)
        resource.setrlimit(self.kind, (self.value, self.before[1]))

    def __exit__(self, *_) -> None:
        resource.setrlimit(self.kind, self.before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory use from /proc")
def test_a_batch_that_does_not_fit_into_memory_is_named_before_the_first_step(capsys):
    long = " ".join(["good"] * 2900)
    rows = [(f"{long} {i}", str(i % 2)) for i in range(40)]
    Path("long.csv").write_bytes(csv_bytes(rows))
    argv = "--n-layers 1 --d-model 16 --d-ff 16 --n-heads 2 --vocab-size 300 --attention matmul "
    argv += "--dataset long.csv --max-length 3000 --batch-size 16 --run-dir run --device cpu"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with Limit(resource.RLIMIT_AS, used + 900 * 2**20):
        status = main.main(argv.split())
    words = ["out of memory at a batch of 16 sentences, 29", "source and 1 target tokens long"]
    only_error(capsys, status, 1, *words, "--batch-size", "--accumulate", "--max-length")
    assert {path.name for path in Path("run").iterdir()} == {
        ".lock",
        "config.json",
        "tokenizer.json",
    }


def live_bytes() -> int:
    """Bytes of all tensors that exist."""
    gc.collect()  # or tensors of earlier tests could go while two moments are compared
    # torch.compile may have left subclasses without memory, and meta tensors have none.
    kinds = (torch.Tensor, torch.nn.Parameter)
    tensors = [x for x in gc.get_objects() if type(x) in kinds and x.device.type == "cpu"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.slow
def test_the_warm_up_reserves_the_memory_of_the_optimizer(small_data, patch):
    """Adam's moments are made in the first step, after the warm-up has tried the largest batch."""
    seen, add_gradients = [], procedures.add_gradients
    warm_up = procedures.Trainer.warm_up

    def measured(*args, **kwargs):
        seen.append(live_bytes())
        return add_gradients(*args, **kwargs)

    def started(trainer) -> None:
        seen.append(live_bytes())
        patch.setattr(procedures, "add_gradients", measured)
        warm_up(trainer)
        seen.append(sum(p.numel() for p in trainer.model.parameters()))
        raise_own_signal(signal.SIGTERM)

    patch.setattr(procedures.Trainer, "warm_up", started)
    assert main.main(command("classification", small_data, "run", *EPOCHS)) == 143
    before, during, n_parameters = seen
    # Besides the moments there is the batch.
    assert 8 * n_parameters <= during - before < 8 * n_parameters + 100_000


def save_measured(folder: str, n_bytes: int) -> int:
    """The action of a process that saves a large checkpoint. Prints the growth of its peak."""
    folder = RunFolder(Path(folder))
    folder.path.mkdir()
    weights = {"a": torch.ones(n_bytes // 8), "b": torch.ones(n_bytes // 8)}
    folder.save_checkpoint({"state": {"step": 0}, "model": {"a": torch.ones(10)}})

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present use
    before = peak()
    folder.save_checkpoint({"state": {"step": 1}, "model": weights})
    print(peak() - before)
    return 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks from /proc")
def test_a_checkpoint_is_written_without_a_second_copy():
    n_bytes = 128 * 2**20
    ended = Forked("save", save_measured, "run", n_bytes).ended()
    assert ended.status == 0, ended.err
    assert Path("run/last.pt").stat().st_size > n_bytes
    assert int(ended.out) < n_bytes // 4


# --------------------------------------------------------------------------------------- the disk


def changed(command_line: str) -> bool:
    """Whether a command that needs an administrator succeeds."""
    words = command_line.split()
    return (
        bool(shutil.which(words[0])) and not subprocess.run(words, capture_output=True).returncode
    )


@contextmanager
def small_disk():
    """A disk of 2 MiB, mounted as the folder `disk`."""
    folder = Path("disk").absolute()
    folder.mkdir()
    if not changed(f"mount -t tmpfs -o size=2m tmpfs {folder}"):
        pytest.skip("may not mount a disk here")
    try:
        yield
    finally:
        changed(f"umount --lazy {folder}")


def fill(path: Path) -> None:
    """Leaves no space on a disk."""
    with open(path, "wb", buffering=0) as out, suppress(OSError):
        while True:
            out.write(bytes(4096))


def full_disk() -> Fault:
    fix = Path("disk/large").unlink
    return "disk/run", "No space left on device", lambda: fill(Path("disk/large")), fix


def file_size_limit() -> Fault:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    set_to = partial(resource.setrlimit, resource.RLIMIT_FSIZE)
    words = "run/last.pt: cannot be written (File too large)"  # it has 120 kB
    return "run", words, lambda: set_to((60_000, before[1])), lambda: set_to(before)


def immutable_folder() -> Fault:
    """Permissions do not bind an administrator; this attribute does."""
    Path("probe").mkdir()
    if not changed("chattr +i probe"):
        pytest.skip("may not make a folder immutable here")
    changed("chattr -i probe")
    words = "run/last.pt: cannot be written (Operation not permitted)"
    return "run", words, lambda: changed("chattr +i run"), lambda: changed("chattr -i run")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [full_disk, file_size_limit, immutable_folder])
def test_a_failed_write_ends_the_run_with_one_line_and_loses_nothing(
    fault, small_data, unbroken, patch, capsys
):
    with small_disk() if fault is full_disk else nullcontext():
        run, words, break_, fix = fault()
        act_after_step(patch, 8, break_)
        try:
            status = main.main(command("classification", small_data, run, *EPOCHS))
            only_error(capsys, status, 1, f"{run}/", words, f"step 7 {RESUME_WITH}")
            patch.undo()
            # While it lasts, a resumed run fails as clearly, and makes nothing worse.
            status = main.main(["--resume", "--run-dir", run])
            only_error(capsys, status, 1, f"{run}/", words.rpartition("(")[2])
        finally:
            fix()
        assert not list(Path(run).glob("*.tmp"))
        assert "resumed from step 7, in epoch 2" in resume(run)
        assert differences(Path(run), unbroken["classification"]) == []


class FullFile(io.RawIOBase):
    """A file that has space for 2,000 bytes."""

    n_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.n_bytes += len(data)
        if self.n_bytes > 2000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)


def test_an_os_error_that_torch_hides_is_one_line(stopped, patch, capsys):
    """In the middle of a file torch.save raises a RuntimeError about positions instead."""
    save = torch.save
    with pytest.raises(RuntimeError, match="unexpected pos"):
        save({"a": torch.ones(1000)}, FullFile())
    patch.setattr(torch, "save", lambda content, _: save(content, FullFile()))
    status = main.main(["--resume", "--run-dir", "run"])
    words = "run/last.pt: cannot be written (No space left on device)"
    only_error(capsys, status, 1, words, f"step 7 {RESUME_WITH}")


def test_a_disk_that_is_read_only_is_refused_before_any_work(small_data, stopped, capsys):
    with small_disk():
        run = Path(shutil.copytree(stopped, "disk/run"))
        assert changed("mount -o remount,ro disk")
        status = main.main(["--resume", "--run-dir", str(run)])
        only_error(capsys, status, 2, f"--run-dir {run}: cannot be written (Read-only file system)")
        status = main.main(command("classification", small_data, "disk/new"))
        words = "--run-dir disk/new: no permission to write; give another folder"
        only_error(capsys, status, 2, words)


def test_a_folder_that_is_removed_during_its_run_ends_it_with_one_line(small_data, patch, capsys):
    act_after_step(patch, 8, lambda: shutil.rmtree("run"))
    status = main.main(command("classification", small_data, "run", *EPOCHS))
    line = only_error(capsys, status, 1, "run/", "No such file or directory")
    assert "is saved" not in line
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&- 2>/dev/full", ">/dev/full 2>&-"])
def test_streams_that_are_closed_or_full_from_the_start_cost_nothing(streams, small_data):
    argv = command("classification", small_data, Path("run").absolute(), "--epochs", "1")
    line = shlex.join([sys.executable, str(PROJECT / "main.py"), *map(str, argv)])
    process = subprocess.run(
        f"{line} {streams}", shell=True, capture_output=True, text=True, timeout=WAIT_LIMIT
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == process.stderr == ""
    assert len(events("run", "test")) == 1
