"""Fixtures of the study at equal whole-model FLOPs, whose tests are in several files."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.scripts import load_script


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script("benchmarks/equal_flops.py")


@pytest.fixture(scope="module")
def rows(study: ModuleType) -> ModuleType:
    """As `study` has imported it, so that classes are the same."""
    return sys.modules["equal_flops_rows"]


@pytest.fixture(scope="module")
def tables(study: ModuleType) -> ModuleType:
    return sys.modules["equal_flops_table"]


@pytest.fixture
def corpus(study: ModuleType, tmp_path: Path) -> Any:
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    return study.Corpus.from_word(f"novels={tmp_path / 'train.txt'},{tmp_path / 'valid.txt'}")
