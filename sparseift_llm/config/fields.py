"""What the fields of a config class accept, taken apart for error messages and for lists of options."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import annotated_types
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Words:
    """Metadata of a field: what may be given, where a class of its own checks it.

    Args:
        words: one for each form, e.g. `n:m`.
    """

    words: tuple[str, ...]


@dataclass(frozen=True)
class FieldType:
    """The type of one field.

    Args:
        kind: the class of a value, e.g. `float` or a config class; of a list, that of an element. `str` for words.
        is_list: whether it is a list (a tuple in Python) of such values.
        is_optional: whether None is allowed.
        choices: the allowed words; empty if all are.
        members: the config classes among which a `name` chooses, by that name.
        bounds: the allowed range in words, e.g. `in (0, 1]`; empty if there is none.
    """

    kind: Any
    is_list: bool = False
    is_optional: bool = False
    choices: tuple[Any, ...] = ()
    members: dict[str, type] = field(default_factory=dict)
    bounds: str = ""

    @classmethod
    def of(cls, annotation: Any, metadata: Sequence[Any] = ()) -> FieldType:
        """Take an annotation apart.

        Args:
            annotation: e.g. `int | None`, `Literal["a", "b"]`, `Annotated[float, Field(gt=0)]`.
            metadata: what pydantic has split off from it.
        """
        metadata = list(metadata)
        while typing.get_origin(annotation) is typing.Annotated:
            annotation, *more = typing.get_args(annotation)
            metadata += more
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin in (typing.Union, types.UnionType):
            return cls._of_union(arguments, metadata)
        if origin is Literal:
            return cls(type(arguments[0]), choices=arguments)
        if origin in (tuple, list):
            element = cls.of(arguments[0])
            return cls(element.kind, is_list=True, choices=element.choices, members=element.members)
        choices = next((item.words for item in metadata if isinstance(item, Words)), ())
        return cls(origin or annotation, choices=choices, bounds=_bounds(metadata))

    @classmethod
    def _of_union(cls, arguments: Sequence[Any], metadata: Sequence[Any]) -> FieldType:
        options = [option for option in arguments if option is not type(None)]
        if len(options) > 1:
            members = {config_fields(option)["name"].default: option for option in options if config_fields(option)}
            kind = object if members else tuple(cls.of(option).kind for option in options)
            return cls(kind, is_optional=type(None) in arguments, members=members)
        inner = cls.of(options[0], metadata)
        return cls(inner.kind, inner.is_list, True, inner.choices, inner.members, inner.bounds)

    @property
    def element(self) -> FieldType:
        """The type of a list's elements."""
        return FieldType(self.kind, choices=self.choices, members=self.members, bounds=self.bounds)

    @property
    def member_keys(self) -> list[str]:
        """The options of all `members`, which may also stand beside the field."""
        keys = [key for member in self.members.values() for key in config_fields(member) if key != "name"]
        return list(dict.fromkeys(keys))

    @property
    def noun(self) -> str:
        """For the sentence `it must be ...`."""
        if self.is_list:
            return "a list of strings" if self.kind is str else "a list of mappings"
        if self.members:
            return f"one of {', '.join(self.members)}, or a mapping of its options"
        if config_fields(self.kind):
            return "a mapping of options"
        if self.kind is dict:
            return "a mapping"
        kinds = self.kind if isinstance(self.kind, tuple) else (self.kind,)
        return " or ".join(kind.__name__ for kind in kinds)

    @property
    def words(self) -> str:
        """What may be given, for a list of options."""
        words = self.noun
        if self.choices:
            words = f"{'a list of' if self.is_list else 'one of'} {', '.join(map(str, self.choices))}"
        elif self.bounds:
            words = f"{words} {self.bounds}" if self.bounds.startswith("in ") else f"{words}, {self.bounds}"
        return f"{words}, or null" if self.is_optional else words


def config_fields(kind: Any) -> dict[str, FieldInfo]:
    """The fields of a config class as pydantic keeps them; empty for any other type."""
    fields: dict[str, FieldInfo] = getattr(kind, "__pydantic_fields__", {})
    return fields


def positional_fields(kind: Any) -> list[str]:
    """The names of the fields that the constructor of a config class takes by their places."""
    return [name for name, info in config_fields(kind).items() if not info.kw_only]


@cache
def field_types(kind: Any) -> dict[str, FieldType]:
    """The fields of a config class by name; empty for any other type."""
    return {name: FieldType.of(info.annotation, info.metadata) for name, info in config_fields(kind).items()}


def _bounds(metadata: Sequence[Any]) -> str:
    """The range that pydantic checks, in words."""
    low, high = "", ""
    for item in metadata:
        for limit in item.metadata if isinstance(item, FieldInfo) else (item,):
            if isinstance(limit, annotated_types.Ge | annotated_types.Gt):
                low = f"[{_plain(limit.ge)}" if isinstance(limit, annotated_types.Ge) else f"({_plain(limit.gt)}"
            elif isinstance(limit, annotated_types.Le | annotated_types.Lt):
                high = f"{_plain(limit.le)}]" if isinstance(limit, annotated_types.Le) else f"{_plain(limit.lt)})"
    if low and high:
        return f"in {low}, {high}"
    if low:
        return f"{'at least' if low[0] == '[' else 'above'} {low[1:]}"
    return f"{'at most' if high[-1] == ']' else 'below'} {high[:-1]}" if high else ""


def _plain(limit: Any) -> Any:
    """1 for 1.0."""
    return int(limit) if limit == int(limit) else limit
