"""The data sets of the YAML files beside this one, made in memory; lm-eval calls these functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets  # type: ignore[import-untyped, unused-ignore]

from sparseift_llm.evaluation import builtin


def continuation(**_: Any) -> dict[str, Any]:
    """Items of builtin_continuation."""
    return _test_split(builtin.continuation_items)


def identifier(**_: Any) -> dict[str, Any]:
    """Items of builtin_identifier."""
    return _test_split(builtin.identifier_items)


def text(**_: Any) -> dict[str, Any]:
    """Items of builtin_bits_per_byte."""
    return _test_split(builtin.text_items)


def _test_split(make: Callable[[Sequence[str]], list[dict[str, Any]]]) -> dict[str, Any]:
    return {"test": datasets.Dataset.from_list(make(builtin.held_out_documents()))}
