"""Paths that users name: their `~`, files of others that must not be overwritten, and errors in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_BEGINNING_BYTES = 2**16


def user_path(path: str | Path) -> Path:
    """A path as a user gave it, with a leading `~` or `~name` replaced by the home folder.

    Every place that takes a path from a user (a command, a recipe, a public function) calls this once, and hands on
    what it returns.

    Raises:
        ValueError: there is no such user, or the home folder is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"the path {str(path)!r} starts with a home folder that is not known: {error}") from error


def refuse_foreign(paths: Sequence[Path], beginning: str, command: str) -> None:
    """Refuse to overwrite files that `command` did not write.

    Args:
        paths: the files that it is going to write. The first is written before the others, and tells whose they are.
        beginning: a pattern that the first file's text starts with, if `command` wrote it.
        command: how the message calls the command.

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


def in_words(error: Exception) -> str:
    """The message for a user: of an OSError the path and what the system says, of other errors their own words."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot read or write {error.filename}: {error.strerror}"
    return str(error)
