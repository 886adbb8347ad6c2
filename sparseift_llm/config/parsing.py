"""Strict parsing shared by every config file: unknown keys, wrong types and doubled keys are errors.

Knows nothing of this library's configs; those are in config.py, data.py and recipe.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

_Config = TypeVar("_Config")
_BOOL = "tag:yaml.org,2002:bool"


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError, with the nearest allowed word, when `value` is not in `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}{nearest(value, allowed)}")


def nearest(word: Any, candidates: typing.Iterable[str]) -> str:
    """The phrase `; did you mean 'x'?` for the candidate closest to `word`, or an empty string."""
    matches = difflib.get_close_matches(str(word), list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def from_dict(cls: type[_Config], values: Any, where: str = "") -> _Config:
    """Build the dataclass `cls` from a mapping, rejecting unknown keys and wrong types.

    Args:
        cls: a dataclass type; nested dataclass fields take nested mappings.
        values: the mapping, as read from YAML or JSON.
        where: how to call this mapping in error messages, e.g. `"data"`.

    Raises:
        ValueError: unknown key (naming the nearest valid one), missing key, wrong type, or a value
            that the class itself refuses. The message starts with the key's dotted path.
    """
    name = where or cls.__name__
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a mapping of options, got {type(values).__name__}: {values!r}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    converted = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{name}: unknown key {key!r}{nearest(key, known)} (valid keys: {', '.join(known)})")
        converted[key] = convert(value, hints[key], f"{name}.{key}")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in converted:
            raise ValueError(f"{name}: the key {field.name!r} is missing")
    try:
        return cls(**converted)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_fields(config: Any) -> None:
    """Check the types of a frozen dataclass's fields in `__post_init__`, as `from_dict` would.

    Lists become tuples, mappings nested configs, whole numbers floats where the annotation says so.

    Raises:
        ValueError: a value of the wrong type, naming the field.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        object.__setattr__(config, field.name, convert(getattr(config, field.name), hints[field.name], field.name))


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type `hint`; int is accepted for float, list for tuple, nothing else."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        (hint,) = [option for option in options if option is not type(None)]
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(typing.cast(type, hint), value, where)  # type: ignore[arg-type]
    if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(item := typing.get_args(hint)[0]):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list of mappings, got {value!r}")
        return tuple(convert(entry, item, f"{where}[{index}]") for index, entry in enumerate(value))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{where} must be a list of strings, got {value!r}")
        return tuple(value)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, got {value!r}")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be {hint.__name__}, got {type(value).__name__}: {value!r}")
    return value


def load_yaml(path: str | Path) -> Any:
    """Parse a YAML file as YAML 1.2 reads it: `6e-4` is a number, `no` and `off` are words; keys are unique.

    Raises:
        ValueError: the file is not valid YAML or names a key twice; the message has the path and line.
        FileNotFoundError: no such file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text as `load_yaml` does; `where` names the text in errors."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012 - read once, never changed
            first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    def unique_mapping(loader: Any, node: Any) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = loader.construct_object(key_node)
            if key in seen:
                raise _DoubledKeyError(f"{where}: key {key!r} stands twice (line {key_node.start_mark.line + 1})")
            seen.append(key)
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, unique_mapping)
    Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    try:
        return yaml.load(text, Loader)
    except _DoubledKeyError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        raise ValueError(f"{where} is not valid YAML: {error}") from error


class _DoubledKeyError(ValueError):
    """An error whose message already says where."""
