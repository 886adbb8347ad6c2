"""Checks of numbers that a caller gives, for functions that no config class checks."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def check_count(name: str, value: Any) -> None:
    """Raise ValueError when `value` is no whole number of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_number(name: str, value: Any, above_0: bool = False) -> None:
    """Raise ValueError when `value` is no finite number of at least 0, or, if it is to be `above_0`, when it is 0."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (above_0 and value == 0):
        raise ValueError(f"{name} must be a finite number {'above' if above_0 else 'of at least'} 0, got {value!r}")
