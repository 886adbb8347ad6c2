"""Reading JSON files that may be missing, cut off or damaged: what can be read, and in words what cannot.

What the files mean is the business of folder.py. A file of lines that is known to be whole is read by
utils/json_lines.py, which raises an error for damage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Number = int | float
_BROKEN_JSON = (ValueError, RecursionError)  # JSONDecodeError and UnicodeDecodeError are ValueErrors


@dataclass(frozen=True)
class Object:
    """What a JSON file holds.

    Args:
        values: the mapping; empty where there is none.
        is_there: whether the file exists.
        problem: why it could not be read, None if it could or is not there.
    """

    values: Mapping[str, Any]
    is_there: bool = True
    problem: str | None = None


@dataclass(frozen=True)
class Lines:
    """The whole lines of a file with one JSON object per line.

    Args:
        lines: those that could be read, in order.
        is_there: whether the file exists.
        problems: what could not be read.
        is_cut: whether the last line has no end, as when its writer was killed; it is left out.
    """

    lines: tuple[Mapping[str, Any], ...] = ()
    is_there: bool = True
    problems: tuple[str, ...] = ()
    is_cut: bool = False


def read_object(path: Path) -> Object:
    """Read a file that holds one JSON mapping; never raises for what is in it."""
    if not path.is_file():
        return Object({}, is_there=False)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return Object({}, problem=f"{path.name} cannot be read: {error.strerror}")
    except _BROKEN_JSON as error:
        return Object({}, problem=f"{path.name} is truncated or damaged: {error}")
    if not isinstance(values, dict):
        return Object({}, problem=f"{path.name} holds no JSON object, but {type(values).__name__}")
    return Object(values)


def read_lines(path: Path) -> Lines:
    """Read a file of JSON lines, each with a whole number `step`; lines that are damaged are left out and counted."""
    if not path.is_file():
        return Lines(is_there=False)
    try:
        raw = path.read_bytes()
    except OSError as error:
        return Lines(problems=(f"{path.name} cannot be read: {error.strerror}",))
    whole, _, rest = raw.rpartition(b"\n")
    good, bad = [], []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            values = json.loads(line.decode("utf-8"))
        except _BROKEN_JSON:
            values = None
        if isinstance(values, dict) and type(values.get("step")) is int:
            good.append(values)
        else:
            bad.append(number)
    problems = [f"{path.name} is damaged: {_listed('line', bad)} no JSON object with a step; left out"] if bad else []
    return Lines(tuple(good), problems=tuple(problems), is_cut=bool(rest.strip()))


def _listed(word: str, numbers: list[int], shown: int = 5) -> str:
    if len(numbers) == 1:
        return f"{word} {numbers[0]} is"
    rest = f" and {len(numbers) - shown} more" if len(numbers) > shown else ""
    return f"{word}s {', '.join(map(str, numbers[:shown]))}{rest} are"


def number(value: Any) -> Number | None:
    """`value` if it is a number, NaN and infinities included, else None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def finite(value: Any) -> Number | None:
    """`value` if it is a finite number that fits a float, else None."""
    found = number(value)
    try:
        return found if found is not None and math.isfinite(found) else None
    except OverflowError:  # a whole number beyond any float
        return None


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}
