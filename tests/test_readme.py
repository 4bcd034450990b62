import re
import subprocess
import sys
from pathlib import Path

import ddp_main
import settings

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def commands():
    """The lines of the README's code blocks, without their comments."""
    blocks = re.findall(r"```\n(.*?)```", README, flags=re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


def test_every_option_in_the_readme_is_one_and_every_option_is_in_the_readme():
    said = set(re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", re.sub(r"`hf [^`]*`", "", README)))
    said -= {"--nproc-per-node", "--max-restarts", "--nnodes", "--node-rank", "--master-addr"}
    options = {settings.flag(name) for name in settings.option_fields(ddp_main.DDP_GROUPS)}
    assert said == options | {"--help"}


def test_every_command_in_the_readme_has_options_that_can_be():
    lines = [line.split("main.py", 1)[1].split() for line in commands() if "main.py" in line]
    assert len(lines) >= 4
    for argv in lines:
        assert settings.parse_args(argv, ddp_main.DDP_GROUPS)[1] == []


def test_ci_runs_the_one_test_command_of_the_readme():
    (command,) = [line for line in commands() if "pytest" in line]
    script = (PROJECT / ".ci" / "run").read_text().replace('bash -euo pipefail -c "$command"', "")
    said = subprocess.run(
        ["bash", "-c", script, str(PROJECT / ".ci" / "run")], capture_output=True, text=True
    )
    assert said.stdout == f"+ {command}\n" and said.returncode == 0


def test_the_table_of_contents_has_every_module_and_no_other():
    modules = {path.name for path in PROJECT.glob("*.py")}
    assert set(re.findall(r"^\| `(\w+\.py)`", README, flags=re.MULTILINE)) == modules


def test_nothing_happens_on_import():
    code = "import " + ", ".join(path.stem for path in PROJECT.glob("*.py"))
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert said.stdout == said.stderr == ""
