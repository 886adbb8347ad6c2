"""Files of one JSON object per line that grow while a run goes on, and are cut back when it is resumed.

Only whole lines count, so that a run may be killed at any moment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparseift_llm.utils.files import write_text


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, in order; none if there is no file.

    A last line without its newline was cut off when the run was killed, and is left out.

    Raises:
        ValueError: another line is damaged; the message names the file and the line.
    """
    return [values for values, _ in _read(path)]


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Add one line at the end of the file, with numbers in full precision."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def keep_lines(path: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step`, which a resumed run is going to take again.

    At any moment the file holds all its old lines or exactly the kept ones. It is made if it is not there. Every line
    has a `step`.

    Raises:
        ValueError: as `read_lines`.
    """
    write_text(path, "".join(line for values, line in _read(path) if values["step"] <= last_step))


def _read(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The object in each whole line, and the line itself with its end."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                values = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"line {number} of {path} is damaged ({error}); restore the file, or delete that line"
                ) from error
            yield values, line
