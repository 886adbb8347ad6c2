"""Words from a fixed list: the check, and the nearest valid word for a message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise ValueError, with the nearest allowed word, when `value` is not in `allowed`."""
    words = tuple(allowed)
    if value not in words:
        raise ValueError(not_one_of(name, value, words))


def not_one_of(name: str, value: Any, allowed: Sequence[Any]) -> str:
    """The sentence about a word that is not among the allowed ones."""
    return f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}{nearest(value, allowed)}"


def nearest(word: Any, candidates: Iterable[Any]) -> str:
    """The phrase `; did you mean 'x'?` for the candidate closest to `word`, or an empty string."""
    matches = difflib.get_close_matches(str(word), list(map(str, candidates)), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""
