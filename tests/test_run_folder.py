"""A run folder that was damaged, or comes from a stranger, is refused or recovered from."""

import os
import pickle
import random
import shlex
import shutil
import signal
import zipfile
from pathlib import Path

import hypothesis
import pytest
import torch
from helpers import TINY, csv_bytes, numbered, refuse_with, run_quietly, write_files
from hypothesis import strategies
from kill import DATA, command, differences
from runs import act_after_step, load_checkpoint, only_error, raise_own_signal, resume, stop_after
from safetensors.torch import load_file, save_file

import main
from run_folder import sha256, weights_checksum

EPOCHS = ("--epochs", "3")
N_STEPS = 15  # of the classification; 5 in an epoch


# ---------------------------------------------------------------------------------- hostile pickles


class Payload:
    """Unpickled, it runs a command."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


def saved(value) -> bytes:
    torch.save(value, "made.pt")
    return Path("made.pt").read_bytes()


def zip_of(name: str) -> bytes:
    with zipfile.ZipFile("made.zip", "w") as out:
        out.writestr(name, "text")
    return Path("made.zip").read_bytes()


HOSTILE = {
    "pickle": lambda: pickle.dumps(Payload()),
    "torch pickle": lambda: saved(Payload()),
    "payload in a checkpoint": lambda: saved(
        {"metrics": {"n_bytes": 0, "checksum": sha256()}, "state": Payload()}
    ),
    "zip of another kind": lambda: zip_of("a.txt"),
}


# torch warns of pickles of a newer kind than its own before it refuses them.
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_pickle_in_place_of_a_file_is_refused_and_not_run(make, stopped, done_copy, capsys):
    content = make()
    pickle.loads(pickle.dumps(Payload()))
    assert Path("harmed").exists()  # it would work
    Path("harmed").unlink()
    for name in ("last.pt", "previous.pt"):
        (stopped / name).write_bytes(content)
    assert main.main(["--resume", "--run-dir", str(stopped)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: run") for line in lines)
    assert "last.pt: " in lines[0] and "previous.pt: " in lines[1]
    assert lines[2] == "error: run: cannot be resumed; train again"
    assert (stopped / "last.pt").read_bytes() == content
    write_files({"in.txt": b"good\n"})
    (done_copy / "best.safetensors").write_bytes(make())
    for use in ("--test-only", "--predict=in.txt"):
        words = ["copy/best.safetensors", "use another run"]
        refuse_with(["--run-dir", "copy", use], words, capsys)
    assert not Path("harmed").exists()


@pytest.fixture
def done_copy(unbroken) -> Path:
    return Path(shutil.copytree(unbroken["classification"], "copy"))


# ----------------------------------------------------------------------------- damaged checkpoints


def changed_checkpoint(change):
    """Changes last.pt and previous.pt, with right checksums."""

    def damage(run: Path) -> None:
        for name in ("last.pt", "previous.pt"):
            content = load_checkpoint(run, name)
            change(content)
            (run / name).write_bytes(saved(content))

    return damage


def drop(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return changed_checkpoint(change)


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(content):
        for key in path:
            content = content[key]
        content[last] = value

    return changed_checkpoint(change)


OF_ANOTHER_VERSION = {  # what a right checksum does not excuse; words of the last line
    "no metrics": (drop("metrics"), ["train again"]),
    "metrics without checksum": (drop("metrics", "checksum"), ["train again"]),
    "metrics of other length": (put("metrics", "n_bytes", 5), ["metrics.jsonl: changed since"]),
    "no state": (drop("state"), ["state"]),
    "state unknown": (put("state", "mood", 1), ["mood"]),
    "no model": (drop("model"), ["model"]),
    "a weight missing": (drop("model", "embedding.W_e"), ["embedding.W_e"]),
    "a weight of another shape": (
        put("model", "embedding.W_e", torch.zeros(3, 4)),
        ["embedding.W_e"],
    ),
    "a weight that is no tensor": (put("model", "embedding.W_e", "wide"), ["embedding.W_e"]),
    "moments missing": (drop("optimizer", 0), ["moments"]),
    "moments of another shape": (put("optimizer", 0, "exp_avg", torch.zeros(3)), ["moments"]),
    "weights to average are no list": (put("last_epochs", None), ["not a checkpoint"]),
}


@pytest.mark.parametrize(
    "damage, words", OF_ANOTHER_VERSION.values(), ids=OF_ANOTHER_VERSION.keys()
)
def test_a_checkpoint_of_another_version_is_refused_and_nothing_changes(
    damage, words, stopped, capsys
):
    damage(stopped)
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    assert main.main(["--resume", "--run-dir", "run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines), lines
    assert all(word in lines[-1] for word in words), lines
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_weights(path: Path) -> None:
    shutil.copy(path.parent / "best.safetensors", path)


DAMAGED = {
    "cut": cut,
    "one bit": flip_one_bit,
    "empty": lambda path: path.write_bytes(b""),
    "of another kind": replace_by_weights,
    "missing": Path.unlink,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED.keys())
def test_the_checkpoint_before_is_used_instead_of_a_damaged_one(damage, stopped, unbroken, capsys):
    damage(stopped / "last.pt")
    (stopped / "metrics.jsonl").open("a").write('{"event": "st')  # cut as well
    out = resume(stopped)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "last.pt" in line]
    assert warning.startswith("warning: run/last.pt: ")
    assert warning.endswith("; previous.pt is used instead")
    # The stop wrote the step that --checkpoint-every had written: previous.pt holds it as well.
    assert "resumed from step 7" in out
    assert differences(stopped, unbroken["classification"]) == []


def test_two_damaged_checkpoints_are_refused(stopped, capsys):
    for name in ("last.pt", "previous.pt"):
        cut(stopped / name)
    assert main.main(["--resume", "--run-dir", "run"]) == 2
    first, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith("error: run/last.pt: damaged")
    assert second.startswith("error: run/previous.pt: damaged")
    assert last == "error: run: cannot be resumed; train again"


def test_a_damaged_checkpoint_never_replaces_a_valid_one(stopped, patch):
    cut(stopped / "last.pt")
    replace = os.replace

    def killed_between_two_renamings(source, target):
        replace(source, target)
        if Path(target).name == "previous.pt":
            raise KeyboardInterrupt

    patch.setattr(os, "replace", killed_between_two_renamings)
    main.main(["--resume", "--run-dir", "run"])
    patch.undo()
    resume(stopped)


def test_any_tool_can_verify_a_checkpoint(stopped):
    with zipfile.ZipFile(stopped / "last.pt") as file:
        assert file.testzip() is None
    flip_one_bit(stopped / "last.pt")
    with zipfile.ZipFile(stopped / "last.pt") as file:
        assert file.testzip() is not None


def rewrite_weights(path: Path, weights: dict[str, torch.Tensor], checksum: str = "") -> None:
    save_file(weights, path, {"checksum": checksum or weights_checksum(weights)})


def other_shapes(path: Path) -> None:
    rewrite_weights(path, {name: w[..., :1].clone() for name, w in load_file(path).items()})


def other_names(path: Path) -> None:
    rewrite_weights(path, {name + "x": w for name, w in load_file(path).items()})


def other_numbers(path: Path) -> None:
    rewrite_weights(path, {name: w + 1 for name, w in load_file(path).items()}, "0" * 64)


@pytest.mark.parametrize("damage", [other_shapes, other_names, other_numbers])
def test_weights_of_another_model_are_refused(damage, done, capsys):
    write_files({"in.txt": b"good\n"})
    damage(done / "best.safetensors")
    refuse_with(["--run-dir", "run", "--predict", "in.txt"], ["run/best.safetensors: not"], capsys)


# ------------------------------------------------------------------------- large files, NUL, links


def test_a_tokenizer_of_200_megabytes_is_refused_unread(stopped, capsys, patch):
    patch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read"))
    write_files({"few.csv": csv_bytes(numbered(60))})
    with open("big.json", "wb") as out:
        out.truncate(200_000_000)  # without using space on the disk
    argv = ["--dataset", "few.csv", "--tokenizer", "big.json"]
    assert main.main(argv) == 2
    only_error(capsys, 2, 2, "--tokenizer big.json", "over 100,000,000 bytes", "--train-tokenizer")
    patch.undo()
    shutil.copy("big.json", stopped / "tokenizer.json")
    for use in ("--resume", "--predict=few.csv"):
        assert main.main(["--run-dir", "run", use]) == 2
        capsys.readouterr()


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl"])
def test_data_with_nul_bytes_are_refused(name, capsys):
    rows = csv_bytes(numbered(60))
    if name == "d.tsv":
        rows = rows.replace(b",", b"\t")
    if name == "d.jsonl":
        rows = b'{"text": "a", "label": "b"}\r\n' * 61
    write_files({name: rows + b"go\0od,1\n"})
    refuse_with(["--dataset", name], [f"{name}, line 62", "NUL bytes", "UTF-8"], capsys)


def test_lines_with_nul_bytes_are_not_answered(done, capsys):
    write_files({"in.txt": "good\n".encode("utf-16-le")})
    refuse_with(["--run-dir", "run", "--predict", "in.txt"], ["in.txt, line 1", "NUL"], capsys)


@pytest.mark.slow
def test_lines_of_nine_megabytes_are_cut_and_counted(capsys):
    word = "".join(random.Random(0).choices("abcdefgh", k=1000)) * 9_000
    words = "a b " * 2_250_000
    rows = [*numbered(60), (word, "1"), (words, "0")]
    write_files({"d/train.csv": csv_bytes(rows), "in.txt": f"good\n{word}\n{words}\n".encode()})
    for split in ("validation", "test"):
        write_files({f"d/{split}.csv": csv_bytes(numbered(10))})
    argv = [*TINY, "--max-steps", "1", "--run-dir", "run"]
    assert "2 over 256 tokens and cut" in run_quietly(*argv, "--dataset", "d")
    capsys.readouterr()
    assert main.main(["--run-dir", "run", "--predict", "in.txt"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 3 and "lines cut to 256 tokens: 2" in err


def link_elsewhere(path: Path) -> None:
    path.symlink_to(Path(shutil.move(path, "elsewhere")).absolute())


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)  # who opens it waits for ever


NOT_FILES = {link_elsewhere: "a link", link_to_itself: "a link", make_pipe: "not a file"}


@pytest.mark.parametrize(
    "name, replace",
    [(name, replace) for name in ("metrics.jsonl", ".lock") for replace in NOT_FILES]
    + [(name, link_elsewhere) for name in ("config.json", "tokenizer.json", "best.safetensors")],
)
def test_a_link_or_a_pipe_in_place_of_a_file_is_refused(name, replace, done, capsys):
    """A link could lead out of the folder, and make a run read or change another file."""
    write_files({"in.txt": b"good\n"})
    before = (done / name).read_bytes()
    replace(done / name)
    use = ["--predict", "in.txt"] if name == "best.safetensors" else ["--resume", "--epochs", "4"]
    assert main.main(["--run-dir", "run", *use]) == 2
    only_error(capsys, 2, 2, f"run/{name}: {NOT_FILES[replace]}")
    assert replace is not link_elsewhere or Path("elsewhere").read_bytes() == before


@pytest.mark.parametrize("replace", NOT_FILES)
def test_a_checkpoint_that_is_a_link_or_a_pipe_is_like_a_damaged_one(
    replace, stopped, unbroken, capsys
):
    before = (stopped / "last.pt").read_bytes()
    replace(stopped / "last.pt")
    resume(stopped)
    words = f"warning: run/last.pt: {NOT_FILES[replace]}"
    shown = [x for x in capsys.readouterr().err.splitlines() if "last.pt" in x]
    assert shown[0].startswith(words)
    assert differences(stopped, unbroken["classification"]) == []
    assert replace is not link_elsewhere or Path("elsewhere").read_bytes() == before


@pytest.mark.pictures
def test_nothing_is_written_through_a_link(stopped, unbroken):
    """Links in place of files that a run writes are replaced, and their targets stay."""
    Path("victim").write_text("years of work")
    names = ("last.pt.tmp", "best.safetensors.tmp", "curves.png", "confusion.png", "previous.pt")
    for name in names:
        (stopped / name).unlink(missing_ok=True)
        (stopped / name).symlink_to(Path("victim").absolute())
    resume(stopped)
    assert Path("victim").read_text() == "years of work"
    assert not any((stopped / name).is_symlink() for name in names)
    assert differences(stopped, unbroken["classification"]) == []


def test_folders_with_spaces_and_letters_of_any_alphabet_work(small_data, unbroken, capsys):
    folder = shutil.copytree(
        small_data / DATA["classification"], "\u0434\u0430\u043d\u043d\u044b\u0435 \u00fc b/c d"
    )
    run = Path("runs of \u039a\u03b1\u03c4\u03b5\u03c1\u03af\u03bd\u03b1/it's 'mine'")
    argv = command("classification", small_data, run, *EPOCHS)
    argv[argv.index("--dataset") + 1] = str(folder)
    with pytest.MonkeyPatch.context() as patch:
        act_after_step(patch, 7, lambda: raise_own_signal(signal.SIGINT))
        assert main.main(argv) == 130
    line = capsys.readouterr().err.strip().splitlines()[-1].partition("with: ")[2]
    assert shlex.split(line)[2:] == ["--resume", "--run-dir", str(run)]
    resume(run)
    assert differences(run, unbroken["classification"], ignore={"metrics.jsonl"}) == []
    write_files({"f\u00fcr mich.txt": b"good\n"})
    assert run_quietly("--run-dir", run, "--predict", "f\u00fcr mich.txt").count("\n") == 1


# --------------------------------------------------------------------------------- bytes at random

FILES = "config.json tokenizer.json metrics.jsonl best.safetensors last.pt previous.pt".split()


@strategies.composite
def damages(draw):
    """A function that cuts, flips or fills some bytes of a file."""
    kind = draw(strategies.sampled_from(["cut", "flip", "fill", "insert", "grow"]))
    where, length = draw(strategies.floats(0, 1)), draw(strategies.sampled_from([1, 1, 64]))
    bits, byte = (
        draw(strategies.sampled_from([1, 2, 255])),
        draw(strategies.sampled_from([b"0", b"\0"])),
    )

    def damage(content: bytes) -> bytes:
        begin = min(int(where * len(content)), max(0, len(content) - 1))
        end = min(begin + length, len(content))
        if kind == "cut":
            return content[:begin]
        if kind == "flip":
            return content[:begin] + bytes(b ^ bits for b in content[begin:end]) + content[end:]
        if kind == "fill":
            return content[:begin] + byte * (end - begin) + content[end:]
        if kind == "insert":
            return content[:begin] + byte * length + content[begin:]
        return content + byte * length

    return damage


few_examples = hypothesis.settings(
    max_examples=15,  # of each file
    deadline=None,
    derandomize=True,  # the same ones each time, so that a failure repeats
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def outcome(argv: list[str], capsys) -> tuple[int, str]:
    """Exit status and output; every line of an error must be a clear one."""
    capsys.readouterr()
    status = main.main(argv)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert status in (0, 2)
    if status == 2:
        assert any(line.startswith("error: ") for line in lines)
        assert all(line.startswith(("error: ", "warning: ")) for line in lines), err
        assert all(len(line) < 600 for line in lines)
    return status, out


@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes_never_change_an_answer(name, done, capsys):
    write_files({"in.txt": b"good film\nawful story of the house\nfine\n"})
    argv = ["--run-dir", "run", "--predict", "in.txt"]
    whole, right, seen = (done / name).read_bytes(), outcome(argv, capsys), set()
    assert right[0] == 0

    @few_examples
    @hypothesis.given(damage=damages())
    def check(damage):
        damaged = damage(whole)
        (done / name).write_bytes(damaged)
        status, out = outcome(argv, capsys)
        assert status == 2 or (status, out) == right
        # Perhaps no answer here depends on what was damaged: it must be found all the same.
        assert status == 2 or damaged == whole or name not in ("best.safetensors", "tokenizer.json")
        seen.add((damaged != whole, status))

    check()
    is_read = name in ("config.json", "tokenizer.json", "best.safetensors")
    assert (True, 2) in seen if is_read else {status for _, status in seen} == {0}


@pytest.fixture(scope="module")
def nearly_done(small_data, tmp_path_factory) -> Path:
    """A run that was stopped before its last step, so that little is left to do."""
    run = tmp_path_factory.mktemp("nearly") / "run"
    stop_after(N_STEPS - 1, command("classification", small_data, run, *EPOCHS))
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes_never_change_the_result_of_a_resumed_run(
    name, nearly_done, unbroken, capsys
):
    whole, seen = (nearly_done / name).read_bytes(), set()

    @few_examples
    @hypothesis.given(damage=damages())
    def check(damage):
        run = Path(shutil.copytree(nearly_done, "run"))
        damaged = damage(whole)
        (run / name).write_bytes(damaged)
        status, _ = outcome(["--resume", "--run-dir", "run"], capsys)
        if status == 0:
            assert differences(run, unbroken["classification"]) == []
        shutil.rmtree(run)
        seen.add((damaged != whole, status))

    check()
    is_needed = name in ("config.json", "tokenizer.json", "metrics.jsonl")
    # Bytes after those that the checkpoint counts are what a kill leaves, and are deleted.
    assert (True, 2) in seen if is_needed else {status for _, status in seen} == {0}
