"""What README.md and docs/ promise is there and works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PROJECT

import ddp_main
import settings

README = (PROJECT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in (PROJECT / "docs").glob("*.md")}
PAGES[PROJECT / "README.md"] = README
TORCHRUN = {"--nproc-per-node", "--max-restarts", "--nnodes", "--node-rank", "--master-addr"}


def commands() -> list[str]:
    """The lines of the shell code blocks, without their comments."""
    found = []
    for text in PAGES.values():
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.S | re.M):
            found += [] if kind else block.splitlines()
    return [line.split("  #")[0].strip() for line in found]


def test_every_option_in_the_pages_exists_and_every_option_is_in_the_pages():
    text = "\n".join(PAGES.values())
    named = set(re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", text)) - TORCHRUN - {"--help"}
    fields = settings.option_fields(ddp_main.DDP_GROUPS)
    negated = {f"no_{name}" for name, f in fields.items() if f.metadata.get("negatable")}
    assert named - set(map(settings.format_flag, negated)) == set(map(settings.format_flag, fields))


def test_every_command_in_the_pages_has_valid_options():
    lines = [line.split("main.py", 1)[1].split() for line in commands() if "main.py" in line]
    assert len(lines) >= 10
    for argv in lines:
        assert settings.parse_args(argv, ddp_main.DDP_GROUPS)[1] == []


def test_ci_runs_the_one_test_command_of_the_readme():
    (command,) = [line for line in commands() if "pytest" in line]
    script = (PROJECT / ".ci" / "run").read_text().replace('bash -euo pipefail -c "$command"', "")
    done = subprocess.run(
        ["bash", "-c", script, str(PROJECT / ".ci" / "run")], capture_output=True, text=True
    )
    assert done.stdout == f"+ {command}\n" and done.returncode == 0


def test_the_table_of_files_has_every_module_and_no_other():
    rows = re.findall(r"^\| (`\w+\.py`(?:, `\w+\.py`)*) \|", README, flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+\.py)`", row)]
    assert sorted(named) == sorted(path.name for path in PROJECT.glob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_to_one(page):
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.S | re.M)
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_the_names_in_the_table_of_papers_exist():
    table = README[README.index("| in the papers") : README.index("FA writes tokens")]
    cells = [row.split("|")[2] for row in table.splitlines()[2:] if row.startswith("|")]
    names = [name for cell in cells for name in re.findall(r"`(\w+)[`.]", cell)]
    modules = ("components", "models", "optimization", "decoding")
    code = "".join((PROJECT / f"{module}.py").read_text(encoding="utf-8") for module in modules)
    forms = {"list", "matmul", "fused"}
    missing = [n for n in names if n not in forms and not re.search(rf"(def|class) {n}\b", code)]
    assert len(names) > 15 and missing == []


@pytest.mark.slow
def test_the_python_snippet_runs(run_copy):
    (snippet,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.S | re.M)
    Path("runs").mkdir()
    Path("runs/mine").symlink_to(run_copy.absolute())
    printed: list = []
    exec(snippet, {"print": lambda *values: printed.extend(values)})
    label, labels, ((first, second),) = printed
    assert {label, *labels} <= {"negative", "positive"} and len(labels) == 2
    assert {first[0], second[0]} == {"negative", "positive"} and first[1] > 0.5 > second[1]


def test_the_readme_fits_one_page():
    assert len(README.splitlines()) <= 180
    assert max(map(len, README.splitlines())) <= 250


@pytest.mark.slow
def test_nothing_happens_on_import():
    code = "import " + ", ".join(path.stem for path in PROJECT.glob("*.py"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout == done.stderr == ""
