"""The examples of docs/change_something.md, applied to a copy of the project and run there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY

PROJECT = Path(__file__).parent.parent
EXAMPLES = re.findall(
    r"^\*\*([^*\n]+?)\.?\*\*[^\n]*\n```diff\n(.*?)^```",
    (PROJECT / "docs" / "change_something.md").read_text(encoding="utf-8"),
    flags=re.MULTILINE | re.DOTALL,
)
# Which tests run the example, by name, and what its command line adds.
CHOICES = {
    "An activation": ("silu", ["--activation", "silu"]),
    "Pre-norm": ("relu", []),
    "Rotary positions": ("rotary", ["--positions", "rotary"]),
}
# The tests, then a training, in one process that imports torch once.
CODE = "import sys, pytest, main; argv = sys.argv[1:]; i = argv.index('then'); "
CODE += "sys.exit(pytest.main(argv[:i]) or main.main(argv[i + 1 :]))"


def apply_diff(diff: str, folder: Path) -> None:
    """Each hunk is some lines, which the file must have once, followed by the lines added."""
    for name, body in re.findall(r"^@@ (\S+)\n((?:[-+ ].*\n)+)", diff, flags=re.MULTILINE):
        path = folder / name
        for old, added in re.findall(r"((?:[- ].*\n)+)((?:\+.*\n)+)", body):
            text, old_lines = path.read_text(encoding="utf-8"), re.sub("^.", "", old, flags=re.M)
            assert f"\n{text}".count(f"\n{old_lines}") == 1, f"{name} does not have once:\n{old}"
            kept = "".join(line[1:] for line in old.splitlines(True) if line[0] == " ")
            new = kept + re.sub("^.", "", added, flags=re.M)
            path.write_text(f"\n{text}".replace(f"\n{old_lines}", f"\n{new}")[1:], encoding="utf-8")


def copy_project(folder: Path) -> None:
    for path in [*PROJECT.glob("*.py"), PROJECT / "pyproject.toml"]:
        shutil.copy(path, folder)
    shutil.copytree(PROJECT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__py*"))
    shutil.copytree(PROJECT / "assets", folder / "assets")


def run(folder: Path, *argv: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout


def n_changed(diff: str) -> int:
    return sum(line[0] in "+-" for line in diff.splitlines())


def test_the_examples_are_short():
    assert [name for name, _ in EXAMPLES] == list(CHOICES)
    activation, pre_norm, rotary = (n_changed(diff) for _, diff in EXAMPLES)
    assert activation <= 2 and pre_norm < 12 and rotary < 30


@pytest.mark.slow
@pytest.mark.parametrize("name, diff", EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_an_example_trains_and_passes_the_tests_of_every_choice(
    name, diff, tmp_path, slice_of_reviews
):
    choice, options = CHOICES[name]
    copy_project(tmp_path)
    apply_diff(diff, tmp_path)
    modules = ["tests/test_models.py", "tests/test_decoding.py"]
    tests = f"{choice} and (padding or later_logits or parameter or forms or cached)"
    training = [*TINY, "--dataset", slice_of_reviews, "--max-steps", "4", "--run-dir", "run"]
    argv = ["-v", "-p", "no:xdist", *modules, "-k", tests, "then", *training, *options]
    output = run(tmp_path, "-c", CODE, *map(str, argv))
    assert re.search(rf"test_cached_steps_match\S*{choice}\S* PASSED", output)
    assert (tmp_path / "run" / "best.safetensors").is_file()
