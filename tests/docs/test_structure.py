"""The package's shape: folders import from those below them, files stay readable and are where the pages say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "sparseift_llm"
MAX_LINES = 400  # without docstrings, comments and blank lines
DEVELOPERS = ROOT / "docs" / "developers"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of `folder`'s pyproject.toml against the package that stands beside it."""
    program = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    command = [sys.executable, "-c", program, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def missing_files(page: str) -> list[str]:
    """Files that a page names with their folder, in backticks, and that are neither in the package nor in the clone."""
    named = re.findall(r"`(\w+/[\w/.-]+\.(?:py|cpp|md|yaml|toml))`", page)
    return [path for path in named if not any((top / path).is_file() for top in (PACKAGE, ROOT, ROOT / "tests"))]


def code_lines(source: str) -> int:
    """Lines of a module that hold code: neither docstrings nor comments nor blank lines."""
    lines = {number for number, line in enumerate(source.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_folders_import_only_from_those_below_them() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_import_from_above_is_caught(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    for file in FILES:
        target = tmp_path / "sparseift_llm" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (PACKAGE / file).read_text(encoding="utf-8")
        target.write_text(text + "\nimport sparseift_llm.runs.recipe\n" if file == "layers/masked.py" else text)
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert "sparseift_llm.layers.masked -> sparseift_llm.runs.recipe" in done.stdout


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_short_enough_to_be_one_idea(file: str) -> None:
    assert code_lines((PACKAGE / file).read_text(encoding="utf-8")) <= MAX_LINES


@pytest.mark.parametrize("page", sorted(path.name for path in DEVELOPERS.glob("*.md")))
def test_pages_for_developers_name_files_that_are_there(page: str) -> None:
    assert missing_files((DEVELOPERS / page).read_text(encoding="utf-8")) == []


def test_a_file_that_is_gone_is_noticed() -> None:
    assert missing_files("`layers/base.py`, `tests/conftest.py`, `helpers/models.py`; `layers/gone.py`") == [
        "layers/gone.py"
    ]


def test_lines_are_counted_without_prose() -> None:
    assert code_lines('"""Two lines\nof prose."""\n\n# a comment\nx = """text\nthat is a value"""\n') == 2


def test_the_core_imports_without_optional_packages() -> None:
    program = (
        "import sys\n"
        "for name in ('datasets', 'lm_eval', 'matplotlib', 'triton'):\n"
        "    sys.modules[name] = None\n"
        "import sparseift_llm, sparseift_llm.data.options, sparseift_llm.runs.recipe, sparseift_llm.cli\n"
        "import sparseift_llm.reporting.page.page\n"
        "for name in sparseift_llm.__all__:\n"
        "    getattr(sparseift_llm, name)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
