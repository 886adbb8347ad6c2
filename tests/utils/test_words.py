"""Words from a fixed list, and what is said of others."""

from __future__ import annotations

import re

import pytest

from sparseift_llm.utils.words import check_choice, nearest


def test_nearest() -> None:
    assert nearest("sparsty", ["scope", "sparsity"]) == "; did you mean 'sparsity'?"
    assert nearest("zzzz", ["scope", "sparsity"]) == ""


def test_check_choice() -> None:
    check_choice("scope", "ffn", ("model", "ffn"))
    with pytest.raises(
        ValueError, match=re.escape("scope='modle' is not one of 'model', 'ffn'; did you mean 'model'?")
    ):
        check_choice("scope", "modle", ("model", "ffn"))
