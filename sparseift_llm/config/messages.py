"""What a user is told about a wrong value: pydantic's errors in words, with the dotted path and the nearest valid word.

Checking itself is in parsing.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from sparseift_llm.config.fields import FieldType, field_types, positional_fields
from sparseift_llm.utils.words import nearest, not_one_of

_MISSING = object()


def explain(error: ValidationError, kind: Any, where: str, given: Any) -> str:
    """All mistakes that pydantic found, each in a line of its own.

    Args:
        error: what pydantic raised.
        kind: the config class or other type that was to be built.
        where: how to call the whole value, e.g. `sparse_ift`; empty for a bare field name.
        given: the whole value, as the user gave it.
    """
    lines = [_sentence(dict(details), kind, where, given) for details in error.errors(include_url=False)]
    return "\n".join(dict.fromkeys(lines))


def _sentence(error: dict[str, Any], kind: Any, where: str, given: Any) -> str:
    """One mistake in words."""
    *above, last = error["loc"] or (None,)
    reason, value = error["type"], error["input"]
    if reason == "unexpected_positional_argument":
        return f"{kind.__name__} takes {len(positional_fields(kind))} arguments by place at most; {value!r} is too many"
    if reason in ("unexpected_keyword_argument", "invalid_key", "missing"):
        name, owner = _locate(kind, where, given, above)
        name = name or getattr(owner.kind, "__name__", "")
        known = list(field_types(owner.kind))
        if reason == "missing":
            return f"{name}: the key {last!r} is missing"
        beside = [key for field in field_types(owner.kind).values() for key in field.member_keys]
        return f"{name}: unknown key {last!r}{nearest(last, known + beside)} (valid keys: {', '.join(known) or 'none'})"
    name, field = _locate(kind, where, given, error["loc"])
    if reason == "value_error":
        return f"{name}: {error['ctx']['error']}" if name else str(error["ctx"]["error"])
    if reason == "multiple_argument_values":
        return f"{name} is given twice, by its place and by its name"
    name = name or getattr(field.kind, "__name__", "the value")
    if reason in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_tag(name, value, field)
    if reason == "literal_error" and isinstance(value, str):
        return not_one_of(name, value, field.choices)
    if field.bounds and reason in _OUTSIDE:
        return f"{name} must be {field.bounds}, got {float(value) if field.kind is float else value!r}"
    if reason == "string_too_short":
        return f"{name} must not be empty{'; leave it out or set it to null' if field.is_optional else ''}"
    if reason == "finite_number":
        return f"{name} must be a finite number, got {value!r}"
    return _wrong_type(name, value, field)


_OUTSIDE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")


def _wrong_type(name: str, value: Any, field: FieldType) -> str:
    if field.is_list or field.kind is dict:
        return f"{name} must be {field.noun}, got {value!r}"
    return f"{name} must be {field.noun}, got {type(value).__name__}: {value!r}"


def _wrong_tag(name: str, value: Mapping[str, Any], field: FieldType) -> str:
    """A mistake in the name that says which class of a union is meant."""
    names = tuple(field.members)
    if "name" not in value:
        return f"{name} has no name; give it one of {', '.join(map(repr, names))}"
    tag = value["name"]
    return not_one_of(name, tag, names) if isinstance(tag, str) else f"{name}.name must be str, got {tag!r}"


def _locate(kind: Any, where: str, given: Any, path: Sequence[Any]) -> tuple[str, FieldType]:
    """The dotted name of the value at pydantic's `path`, and its type.

    pydantic's path names members of a union by their tags, and arguments by their places; users do not. A key that was
    moved into a nested mapping is called by the name under which the user gave it.
    """
    name, value, field = where, given, FieldType.of(kind)
    for part in path:
        if isinstance(part, str) and field.members and part in field.members:
            field = FieldType.of(field.members[part])
            continue
        if isinstance(part, int) and field.is_list:
            name, field = f"{name}[{part}]", field.element
            value = value[part] if isinstance(value, list | tuple) else _MISSING
            continue
        types = field_types(field.kind)
        key = positional_fields(field.kind)[part] if isinstance(part, int) else part
        inner = value.get(key, _MISSING) if isinstance(value, Mapping) else _MISSING
        next_field = types.get(key) or FieldType.of(Any)
        was_moved = (
            bool(next_field.members)
            and isinstance(value, Mapping)
            and path[-1] in next_field.member_keys
            and path[-1] in value
        )
        if not was_moved:
            name, value = f"{name}.{key}" if name else str(key), inner
        field = next_field
    return name, field
