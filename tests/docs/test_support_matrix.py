"""docs/support.md is what the tests' marks say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.composite import CompositeProjection
from tests.conftest import tiny_models_of
from tests.docs.support_matrix import FAMILIES, GROUPS, PAGE, ROOT, Row, page
from tests.helpers.tiny_runs import sparse_gpt2


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    made = tmp_path / "support.md"
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.support_matrix", str(made)],
        cwd=ROOT, env={**os.environ, "PYTEST_ADDOPTS": "-p no:xdist"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert made.read_text() == PAGE.read_text(), "run python -m tests.docs.support_matrix"


def full() -> dict[str, Row]:
    cells = {("Wide, tiles", "tiles"): "yes", ("Doped", "masks"): "refused", ("Parallel", "masks"): "yes"}
    cells |= {("Parallel", "tiles"): "yes", ("Factorized", "masks"): "yes", ("Factorized", "tiles"): "refused"}
    return {name: Row(cells, {"tests/a.py::b": None}) for names in GROUPS.values() for name in names}


def test_what_has_no_test_is_not_claimed() -> None:
    text = page(full())
    assert "| DDP: no_sync | - | yes | yes | masks yes, tiles refused | refused (masks) |\n" in text
    assert "| DDP: no_sync | `tests/a.py::b` |\n" in text


def test_rows_and_marks_must_agree() -> None:
    rows = full()
    rows["telepathy"] = rows.pop("DDP: no_sync")
    with pytest.raises(ValueError, match=r"not in both: \['DDP: no_sync', 'telepathy'\]"):
        page(rows)


@pytest.mark.parametrize("structure", ["families", "family_tiles"])
def test_the_model_of_families_has_all_three(structure: str) -> None:
    """What is claimed of Parallel, Factorized and Doped is tested on one model that mixes them."""
    with tiny_models_of(structure):
        model = sparse_gpt2()
    kinds = {type(module).__name__ for module in model.modules()}
    assert {f"{family}Projection" for family in FAMILIES} <= kinds
    storages = {type(layer).__name__ for layer in sparse_layers(model).values()}
    assert storages == {"MaskedLinear" if structure == "families" else "BlockSparseLinear"}
    for composite in (module for module in model.modules() if isinstance(module, CompositeProjection)):
        assert sparse_layers(composite)
