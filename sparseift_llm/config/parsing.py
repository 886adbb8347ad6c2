"""Config classes: frozen dataclasses whose fields pydantic checks strictly, from Python, YAML and JSON alike.

Strictly means that nothing is converted (a word is not a number, True is not 1) but three harmless things: a whole
number for a float, a list for a tuple, and a mapping for a nested config. What a mistake is told is in messages.py.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pydantic
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ArgsKwargs
from pydantic_core.core_schema import no_info_before_validator_function
from typing_extensions import dataclass_transform

from sparseift_llm.config.fields import positional_fields
from sparseift_llm.config.messages import explain

_Config = TypeVar("_Config")
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_DOCUMENTED = ConfigDict(use_attribute_docstrings=True)  # the string below a field says what it means


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, pydantic.Field))
def config_class(cls: type[_Config]) -> type[_Config]:
    """Make `cls` a frozen dataclass that checks its fields; a string below a field is its documentation.

    The class is built by its constructor, or from a mapping by `from_dict`. Both raise ValueError for unknown names
    (naming the nearest valid one), wrong types, values out of range and what `__post_init__` refuses.
    """
    cls.__get_pydantic_core_schema__ = classmethod(_schema)  # type: ignore[attr-defined]
    has_equality = cls.__eq__ is not object.__eq__
    made: Any = pydantic_dataclass(frozen=True, eq=not has_equality, config=ConfigDict(**_STRICT, **_DOCUMENTED))(cls)
    checked: Callable[..., None] = made.__init__

    @functools.wraps(checked)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        try:
            checked(self, *args, **kwargs)
        except ValidationError as error:
            given = {**dict(zip(positional_fields(made), args, strict=False)), **kwargs}
            raise ValueError(explain(error, made, "", given)) from None

    made.__init__ = __init__
    return made


def _schema(cls: type, source: Any, handler: Callable[[Any], Any]) -> Any:
    """pydantic's strict schema of a config class, but mappings are taken for the class itself, and lists for tuples."""
    schema = handler(source)
    _below_validators(schema, "dataclass")["strict"] = False
    for field in _below_validators(schema, "dataclass-args")["fields"]:
        field["schema"] = _with_lists_for_tuples(field["schema"])
    return schema


def _below_validators(schema: Any, kind: str) -> Any:
    """The schema of this kind inside of those of the class's own validators."""
    while schema["type"] != kind:
        schema = schema["schema"]
    return schema


def _with_lists_for_tuples(schema: Any) -> Any:
    """The schema of a field with a list accepted wherever it has a tuple."""
    if schema["type"] == "tuple":
        return no_info_before_validator_function(_as_tuple, schema)
    if schema["type"] in ("default", "nullable"):
        return {**schema, "schema": _with_lists_for_tuples(schema["schema"])}
    return schema


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def keyword_arguments(cls: type, values: Any) -> dict[str, Any] | None:
    """What a `model_validator(mode="before")` of a config class was given, by name of the field.

    Returns:
        The arguments of the constructor or the mapping; None for anything else, or for too many arguments.
    """
    if isinstance(values, Mapping):
        return dict(values)
    if not isinstance(values, ArgsKwargs):
        return None
    names = positional_fields(cls)
    arguments, keywords = values.args, values.kwargs or {}
    named = dict(zip(names, arguments, strict=False))
    return None if len(arguments) > len(names) or named.keys() & keywords.keys() else {**named, **keywords}


def from_dict(cls: type[_Config], values: Any, where: str = "") -> _Config:
    """Build a config class from a mapping, as read from YAML or JSON.

    Args:
        cls: made by `config_class`; fields that are configs take nested mappings.
        values: the mapping.
        where: how to call it in error messages, e.g. `"data"`; default: the name of the class.

    Raises:
        ValueError: unknown key, missing key, wrong type, or a value that the class itself refuses. The message
            starts with the dotted path.
    """
    return checked(cls, values, where or cls.__name__)


def checked(kind: Any, value: Any, where: str) -> Any:
    """`value` as the type or config class `kind`, which may be any annotation such as `float | None`.

    Raises:
        ValueError: it is of another type; the message starts with `where`.
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        raise ValueError(explain(error, kind, where, value)) from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    is_config = inspect.isclass(kind) and hasattr(kind, "__pydantic_fields__")
    return TypeAdapter(kind, config=None if is_config else _STRICT)


def check_finite(value: Any, where: str) -> None:
    """Raise ValueError where a number in nested lists and mappings is infinite or not a number."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value!r}")
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_finite(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_finite(item, f"{where}[{index}]")
