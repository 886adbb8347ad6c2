"""Every option of a config class with its type, default and meaning, for `--help` and for documentation."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from sparseift_llm.config.fields import FieldType, config_fields


@dataclass(frozen=True)
class Option:
    """One option.

    Args:
        name: its dotted path, e.g. `sparse_ift.dst.algorithm`.
        type: what may be given, in words, e.g. `float in (0, 1), or null`.
        default: as YAML and JSON write it; None if the option must be given.
        meaning: what it does, in one paragraph.
    """

    name: str
    type: str
    default: str | None
    meaning: str


def describe_options(cls: type, prefix: str = "") -> list[Option]:
    """The options of a config class and of the configs in it, in the order in which they are declared.

    Args:
        cls: made by `config_class`.
        prefix: put before every name, with a dot.

    Returns:
        One entry per option. Options of a family stand below `family`, once for all families that have that option.
    """
    options: list[Option] = []
    for key, info in config_fields(cls).items():
        name, accepted = f"{prefix}.{key}" if prefix else key, FieldType.of(info.annotation, info.metadata)
        nested = accepted.kind if config_fields(accepted.kind) and not accepted.is_list else None
        if nested is None or accepted.is_optional:
            options.append(Option(name, accepted.words, _default(info), _paragraph(info.description)))
        if nested is not None:
            options += describe_options(nested, name)
        options += [_of_members(member, accepted, name) for member in accepted.member_keys if not accepted.is_list]
    return options


def _of_members(key: str, accepted: FieldType, name: str) -> Option:
    """An option of one or several members of a union."""
    types, defaults, meanings = [], [], []
    for tag, member in accepted.members.items():
        info = config_fields(member).get(key)
        if info is not None:
            types.append(f"of {tag}: {FieldType.of(info.annotation, info.metadata).words}")
            defaults.append(f"{_default(info)} ({tag})")
            meanings.append(f"Of `{tag}`: {_paragraph(info.description)}")
    return Option(f"{name}.{key}", "; ".join(types), ", ".join(defaults), " ".join(meanings))


def _default(info: FieldInfo) -> str | None:
    value: Any = info.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return None
    name = getattr(value, "name", None)
    return str(name) if config_fields(type(value)) and name else json.dumps(to_jsonable_python(value))


def _paragraph(text: str | None) -> str:
    """A docstring on one line."""
    return re.sub(r"\s+", " ", inspect.cleandoc(text or "")).strip()
