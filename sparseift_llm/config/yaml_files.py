"""YAML as its version 1.2 reads it: `6e-4` is a number, `no` and `off` are words, `012` is twelve; keys are unique."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
# the core schema, https://yaml.org/spec/1.2.2/#103-core-schema, with its first characters; and merge keys of YAML 1.1
_CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    "merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema of YAML 1.2, and an error for a key that stands twice."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - filled below, then never changed

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:  # before merge keys bring in others, which these may override
            if (key.tag, str(key.value)) in seen:
                raise _DoubledKeyError(f"key {key.value!r} stands twice (line {key.start_mark.line + 1})")
            seen.add((key.tag, str(key.value)))
        return node

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


for _name, (_pattern, _firsts) in _CORE_SCHEMA.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), _firsts)
_Loader.add_constructor(_TAG + "int", _Loader.construct_yaml_int)
_Loader.add_constructor(_TAG + "map", lambda loader, node: loader.construct_mapping(node, deep=True))  # type: ignore[arg-type]


class _DoubledKeyError(ValueError):
    """An error whose message lacks nothing but the name of the text."""


def load_yaml(path: str | Path) -> Any:
    """Parse a YAML file.

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
    try:
        return yaml.load(text, _Loader)
    except _DoubledKeyError as error:
        raise ValueError(f"{where}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where} is not valid YAML: {error}") from error
