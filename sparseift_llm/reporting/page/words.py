"""Values of JSON files as words: nested options flattened to lines, and short names for paths."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def text(value: Any) -> str:
    """`value` as words: strings as they are, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values, as words, of nested mappings; an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", text(value)


def unique_names(paths: list[Path]) -> list[str]:
    """The shortest ends of `paths` that tell them apart, of at least one part each."""
    names = []
    for path in paths:
        depth = 1
        while depth < len(path.parts) and any(
            other.parts[-depth:] == path.parts[-depth:] for other in paths if other != path
        ):
            depth += 1
        names.append("/".join(path.parts[-depth:]))
    return names
