"""The package's shape: imports follow the order of the README's table, and the core needs no optional package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "sparseift_llm"


def reading_order() -> list[str]:
    """Files and folders of the README's "Read the code" table, top to bottom."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Read the code")[2]
    rows = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([\w/.]+)`", row)]


def rank_of(module: str) -> int:
    """Row of the module (path below the package) in the reading order."""
    for index, name in enumerate(reading_order()):
        if module == name or (name.endswith("/") and module.startswith(name)):
            return index
    raise AssertionError(f"{module} is missing from the README's table")


def imported_modules(path: Path) -> list[str]:
    """Paths below the package of everything of ours that the file imports, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparseift_llm":
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        files = [f"{(name or '').removeprefix('sparseift_llm.').replace('.', '/')}.py" for name in names]
        found += [file for file in files if (PACKAGE / file).is_file()]
    return found


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", [file for file in FILES if not file.endswith("__init__.py")])
def test_a_file_imports_only_from_its_own_or_earlier_rows(file: str) -> None:
    later = [module for module in imported_modules(PACKAGE / file) if rank_of(module) > rank_of(file)]
    assert not later, f"{file} imports {later}, which stand below it in the README's table"


def test_every_row_of_the_table_exists() -> None:
    assert all((PACKAGE / name).exists() for name in reading_order())


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_one_idea(file: str) -> None:
    assert len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) <= 330


def test_the_core_imports_without_optional_packages() -> None:
    program = (
        "import sys\n"
        "for name in ('datasets', 'lm_eval', 'matplotlib', 'triton'):\n"
        "    sys.modules[name] = None\n"
        "import sparseift_llm, sparseift_llm.data.options, sparseift_llm.runs.recipe, sparseift_llm.cli.main\n"
        "import sparseift_llm.reporting.page.page\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_sizes_and_configs_need_no_torch() -> None:
    """Planning arithmetic stays usable, and testable, without loading torch."""
    for file in ("strict.py", "config.py", "isoflop.py", "schedules.py", "topology/distributions.py"):
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not [name for name in names if name.split(".")[0] in ("torch", "transformers")]
