"""docs/support.md is what the tests' marks say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support_matrix import GROUPS, PAGE, ROOT, Row, page


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    made = tmp_path / "support.md"
    done = subprocess.run(
        [sys.executable, "-m", "tests.support_matrix", str(made)],
        cwd=ROOT, env={**os.environ, "PYTEST_ADDOPTS": "-p no:xdist"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert made.read_text() == PAGE.read_text(), "run python -m tests.support_matrix"


def full() -> dict[str, Row]:
    return {name: Row({"block": "yes"}, {"tests/a.py::b": None}) for names in GROUPS.values() for name in names}


def test_a_structure_without_a_test_is_not_claimed() -> None:
    assert "| Wide | - | yes | `tests/a.py::b` |" in page(full())


def test_rows_and_marks_must_agree() -> None:
    rows = full()
    rows["telepathy"] = rows.pop("Wide")
    with pytest.raises(ValueError, match=r"not in both: \['Wide', 'telepathy'\]"):
        page(rows)
