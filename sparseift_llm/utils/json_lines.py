"""Files of one JSON object per line that grow while a run goes on: whole lines only, whenever the run is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The file's lines; none if there is no file.

    A last line without its newline was cut off when the run was killed, and is left out.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Add one line at the end, in full precision."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def keep_lines(path: Path, last_step: int) -> None:
    """Drop, atomically, the lines of steps after `last_step`, which are going to be run again."""
    kept = [line for line in read_lines(path) if line["step"] <= last_step]
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
