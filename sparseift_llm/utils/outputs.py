"""Files and folders that users name: whole or not there at all, nobody else's overwritten, and what fails in words."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_BEGINNING_BYTES = 2**16


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path`; what is written there takes the place of `path` at the end, or is deleted after an error.

    The folder around it is made. An OSError names `path`, not the path beside it.

    Args:
        path: a file, or a folder that is empty or does not exist.
    """
    path = Path(os.path.abspath(path))  # "." has no name
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_dir() and path.exists():
            path.rmdir()
        os.replace(temporary, path)
    except OSError as error:
        if isinstance(error.filename, str | Path):
            error.filename = str(error.filename).replace(str(temporary), str(path))
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink()


def refuse_foreign(paths: Sequence[Path], beginning: str, command: str) -> None:
    """Refuse to overwrite what `command` did not write.

    Args:
        paths: what it is going to write; the first is written before the others, and tells whose they are.
        beginning: a pattern that the first one's text starts with, if `command` wrote it.
        command: for the message.

    Raises:
        ValueError: one of `paths` is there, and not from `command`.
    """
    taken = [path for path in paths if path.exists()]
    if taken and not (paths[0].is_file() and re.match(beginning, _beginning_of(paths[0]))):
        lacks = "" if paths[0].exists() else f" ({paths[0].name} is not beside it)"
        raise ValueError(
            f"{taken[0]} is there already, and not from {command}; move it away or give another --output{lacks}"
        )


def _beginning_of(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_BEGINNING_BYTES).decode("utf-8", errors="replace")


def set_aside(path: Path, prefix: str) -> Path:
    """Rename what an earlier process left at `path` to `prefix` and its name, and a number if that is taken, too."""
    target, number = path.with_name(prefix + path.name), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{prefix}{path.name}.{number}")
    return path.rename(target)


def in_words(error: Exception) -> str:
    """The message for a user: of an OSError the path and what the system says, of other errors their own words."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot read or write {error.filename}: {error.strerror}"
    return str(error)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` whole or not at all, indented, numbers in full precision."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
