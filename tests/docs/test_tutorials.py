"""The notebooks run from top to bottom, as the site hands them out, each in less than a minute."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script

NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
MAX_SECONDS = 60.0


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    path = list(sys.path)
    module = load_script("docs/site_hooks.py")
    sys.path[:] = path
    return module


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(
    source: Path, hooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "basicConfig", lambda **kwargs: None)  # of `sparseift pretrain`, for this process
    notebook = json.loads(hooks.notebook_file(source))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5
    scope = {"__name__": "__main__"}
    begin = time.monotonic()
    for number, cell in enumerate(cells):
        exec(compile(cell, f"{source.stem}, cell {number}", "exec"), scope)
    assert time.monotonic() - begin < MAX_SECONDS
    assert capsys.readouterr().out.count("\n") > 10  # it shows something


def test_a_cell_that_fails_is_seen(hooks: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "broken.py"
    source.write_text("# %% [markdown]\n# # Title\n\n# %%\nraise KeyError('here')\n")
    notebook = json.loads(hooks.notebook_file(source))
    assert [cell["cell_type"] for cell in notebook["cells"]] == ["markdown", "code"]
    with pytest.raises(KeyError, match="here"):
        exec("".join(notebook["cells"][1]["source"]), {})
    assert hooks.notebook_page(source).startswith("# Title\n\nDownload [broken.ipynb](broken.ipynb)")
