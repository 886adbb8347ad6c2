"""Strict reading of one JSON object of a record: every error names the field, and no field is passed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LATER_VERSION = "load the model with the version of sparseift_llm that saved it"
_MISSING = object()


def damaged(where: str, problem: str) -> ValueError:
    """The error for a field at the dotted path `where` that does not hold what it should."""
    return ValueError(f"the sparse_ift record in config.json is damaged: {where} {problem}")


class Fields:
    """The fields of one object, each of which is taken once; what is left at the end is unknown.

    Args:
        values: the object, as JSON gives it.
        where: its dotted path, for errors.

    Raises:
        ValueError: `values` is not an object.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise damaged(where, f"must be an object, got {values!r}")
        self.where = where
        self._left = dict(values)

    def path(self, name: str) -> str:
        """The dotted path of a field."""
        return f"{self.where}.{name}"

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """The value of a field as it stands; `default` where it is absent. A ValueError if there is none."""
        value = self._left.pop(name, default)
        if value is _MISSING:
            raise damaged(self.path(name), "is missing")
        return value

    def text(self, name: str, default: Any = _MISSING) -> Any:
        """A string that is not empty, or the default."""
        value = self.take(name, default)
        if value is not default and not (isinstance(value, str) and value):
            raise damaged(self.path(name), f"must be a non-empty string, got {value!r}")
        return value

    def integer(self, name: str, default: Any = _MISSING, least: int = 1) -> Any:
        """A whole number of at least `least`, or the default."""
        value = self.take(name, default)
        if value is not default and not is_integer(value, least):
            raise damaged(self.path(name), f"must be a whole number of at least {least}, got {value!r}")
        return value

    def pair(self, name: str, default: Any = _MISSING, least: int = 1) -> Any:
        """Two whole numbers of at least `least` as a tuple, or the default."""
        value = self.take(name, default)
        if value is default:
            return value
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(is_integer(side, least) for side in value):
            raise damaged(self.path(name), f"must be two whole numbers of at least {least}, got {value!r}")
        return tuple(value)

    def objects(self, name: str, default: Any = _MISSING) -> list[tuple[Any, str]]:
        """The entries of a list, each with its dotted path."""
        value = self.take(name, default)
        if not isinstance(value, list | tuple):
            raise damaged(self.path(name), f"must be a list, got {value!r}")
        return [(entry, f"{self.path(name)}[{index}]") for index, entry in enumerate(value)]

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise damaged(self.path(name), f"must be true or false, got {value!r}")
        return value

    def end(self) -> None:
        """Raise ValueError if a field was not taken: an older version must not guess what a newer one means by it."""
        if self._left:
            raise ValueError(
                f"the sparse_ift record in config.json has the field {self.path(min(map(str, self._left)))}, which "
                f"this version does not know; {LATER_VERSION}"
            )


def is_integer(value: Any, least: int) -> bool:
    """Whether `value` is a whole number (not a bool) of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
