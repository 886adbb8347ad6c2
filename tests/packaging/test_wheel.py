"""The wheel in a fresh environment: it holds every file, declares what it imports, and works away from the clone."""

from __future__ import annotations

import ast
import json
import math
import re
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.helpers.evaluation import save_model
from tests.helpers.fresh_environment import FreshEnvironment
from tests.helpers.paths import ROOT
from tests.helpers.pretrain_runs import tiny_recipe

VERSION = re.search(r"^version = (.+)$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), flags=re.MULTILINE)[1]  # type: ignore[index]


def succeed(environment: FreshEnvironment, *words: str | Path, cwd: Path) -> str:
    """What a program prints that must succeed."""
    done = environment.run(*words, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metadata(environment: FreshEnvironment) -> str:
    """The METADATA file of the wheel."""
    with zipfile.ZipFile(environment.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return wheel.read(name).decode()


# ---- what is in it


def test_the_wheel_holds_every_file_of_the_package(fresh_environment: FreshEnvironment) -> None:
    with zipfile.ZipFile(fresh_environment.wheel) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "sparseift_llm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == files
    for suffix in (".cpp", ".h", ".yaml", ".jinja", ".css", "py.typed"):
        assert any(name.endswith(suffix) for name in held), suffix


def test_the_version_stands_in_one_place_and_elsewhere_agrees(fresh_environment: FreshEnvironment) -> None:
    assert fresh_environment.wheel.name.startswith(f"sparseift_llm-{VERSION}-")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {VERSION}\n" in citation
    released = re.search(r"^date-released: (\d{4}-\d\d-\d\d)$", citation, flags=re.MULTILINE)
    assert released is not None
    changelog = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert changelog[0] == f"{VERSION} - {released[1]}"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", line) for line in changelog)


def test_setup_cfg_and_pyproject_do_not_overlap() -> None:
    sections = re.findall(r"^\[([\w.:]+)\]$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert all(section.startswith(("metadata", "options")) for section in sections)
    tables = re.findall(r"^\[+([\w.-]+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {table.partition(".")[0] for table in tables} == {"build-system", "tool"}
    assert not any(table.startswith("tool.setuptools") for table in tables)


def imported_libraries() -> set[str]:
    """Top-level names of everything that files of the package import, also inside functions."""
    found = set()
    for path in (ROOT / "sparseift_llm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"sparseift_llm"}


def test_the_wheel_declares_what_it_imports(fresh_environment: FreshEnvironment) -> None:
    declared = re.findall(r"^Requires-Dist: ([\w.-]+)", metadata(fresh_environment), flags=re.MULTILINE)
    names = {name.lower().replace("-", "_") for name in declared}
    # by lm_eval, datasets, transformers and pydantic
    brought = {"nltk", "pyarrow", "huggingface_hub", "pydantic_core", "annotated_types", "typing_extensions"}
    elsewhere = {"deepspeed", "compression"}  # the user's own, where an engine is handed in; Python 3.14
    known = packages_distributions()
    for library in imported_libraries() - brought - elsewhere:
        distributions = {name.lower().replace("-", "_") for name in known.get(library, [library])}
        assert names & distributions, library


# ---- what it does


def test_the_program_runs_from_the_wheel(fresh_environment: FreshEnvironment, tmp_path: Path) -> None:
    assert succeed(fresh_environment, "sparseift", "--help", cwd=tmp_path).startswith("usage: sparseift COMMAND")
    assert succeed(fresh_environment, "sparseift", "--version", cwd=tmp_path) == f"sparseift {VERSION}\n"
    words = ["plan", "--model", "gpt3-small", "--sparsity", "0.75", "--seq-len", "1024"]
    assert "400MFLOP" in succeed(fresh_environment, "sparseift", *words, cwd=tmp_path)
    program = "import sparseift_llm; print(sparseift_llm.__file__, sparseift_llm.__version__)"
    file, version = succeed(fresh_environment, "python", "-c", program, cwd=tmp_path).split()
    assert Path(file).is_relative_to(fresh_environment.folder)
    assert version == VERSION


def test_a_run_from_training_to_report(fresh_environment: FreshEnvironment, tmp_path: Path) -> None:
    """The C++ of tiles is compiled from the wheel, the page is made of its templates, and the model loads."""
    recipe = tiny_recipe(tmp_path, {"structure": "block", "block_size": 4}, max_steps=2, save_steps=2)
    succeed(fresh_environment, "sparseift", "pretrain", recipe, cwd=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["step"] == 2
    assert math.isfinite(summary["eval_loss"])
    assert summary["versions"]["sparseift_llm"] == VERSION
    assert summary["commit"] is None  # it does not run from a clone
    program = (
        "import sparseift_llm, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained('run')\n"
        "same = sparseift_llm.load_pretrained('run')\n"
        "ids = torch.arange(8)[None]\n"
        "assert torch.equal(model(ids).logits, same(ids).logits)\n"
        "print(len([name for name in model.state_dict() if name.endswith('.columns')]))\n"
    )
    assert succeed(fresh_environment, "python", "-c", program, cwd=tmp_path) == "8\n"
    assert "wrote page.html" in succeed(
        fresh_environment, "sparseift", "report", "run", "-o", "page.html", cwd=tmp_path
    )


def test_the_built_in_suite_is_evaluated_from_the_wheel(fresh_environment: FreshEnvironment, tmp_path: Path) -> None:
    """The suite's YAML files name functions in a Python file beside them, which must be in the wheel as well."""
    save_model(tmp_path / "model")
    words = ["evaluate", "--model", "model", "--suite", "builtin", "--limit", "2", "--output", "result.json"]
    succeed(fresh_environment, "sparseift", *words, cwd=tmp_path)
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["command"] == " ".join(["sparseift", *words])


def test_the_environment_has_nothing_of_the_clone(fresh_environment: FreshEnvironment, tmp_path: Path) -> None:
    program = "import sys; print(*sys.path, sep='\\n')"
    paths = [
        Path(line) for line in succeed(fresh_environment, "python", "-c", program, cwd=tmp_path).splitlines() if line
    ]
    clone = ROOT.resolve()
    assert not [path for path in paths if path.resolve() == clone]
    done = fresh_environment.run("python", "-c", "import tests.helpers", cwd=tmp_path)
    assert "No module named 'tests" in done.stderr
    with pytest.raises(AssertionError):
        fresh_environment.run("python", "-c", "pass", cwd=ROOT / "recipes")
