"""The one way in which this package writes files: a file or folder appears whole, or it stays as it was.

A new content is written under another name beside its target and takes the target's place in one step, so that a
process may be killed at any moment. Which files there are, and what they hold, is the business of the callers.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PARTIAL_MARK = ".partial-"
_ABANDONED_SECONDS = 24 * 3600


@contextlib.contextmanager
def written_whole(path: str | Path, mark: str = "") -> Iterator[Path]:
    """Give a path beside `path`; what is written there takes the place of `path` at the end of the block.

    After an error the new content is deleted, and `path` is as it was. After a kill `path` is as it was too, and the
    unfinished content lies beside it under the hidden name `.NAME.partial-...`; the next writer of `path` removes it
    once nothing was written to it for a day. The new content is on the disk before it takes its place, so that a
    machine that goes down does not leave an empty file either. The folder around `path` is made.

    Args:
        path: a file, or a folder that is empty or does not exist. `~` is not expanded here, see `user_path`.
        mark: letters and digits that the unfinished content carries in its name.

    Raises:
        OSError: the content cannot be written; the error names `path`, not the path beside it.
    """
    path = Path(os.path.abspath(path))  # "." has no name
    temporary = path.with_name(f".{path.name}{PARTIAL_MARK}{mark}-{uuid.uuid4().hex[:12]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        yield temporary
        _flush(temporary)
        if temporary.is_dir() and path.exists():
            path.rmdir()
        os.replace(temporary, path)
        _flush_entry(path.parent)
    except OSError as error:
        if isinstance(error.filename, str | Path):
            error.filename = str(error.filename).replace(str(temporary), str(path))
        raise
    finally:
        remove(temporary)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all, as UTF-8 and without changing line ends."""
    with written_whole(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all, indented, with numbers in full precision."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def set_aside(path: Path, prefix: str) -> Path:
    """Rename what an earlier process left at `path`, and return its new path.

    The new name is `prefix` and the old name, followed by a number if that is taken.
    """
    target, number = path.with_name(prefix + path.name), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{prefix}{path.name}.{number}")
    return path.rename(target)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, as far as that is possible and if it is there."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def is_silent(path: Path, seconds: float = _ABANDONED_SECONDS) -> bool:
    """Whether nothing was written to a file, or to a folder and the files in it, for `seconds`."""
    try:
        inside = path.iterdir() if path.is_dir() else ()
        written = max(entry.stat().st_mtime for entry in (path, *inside))
    except OSError:  # it was finished or removed just now
        return False
    return time.time() - written > seconds


def _remove_abandoned(path: Path) -> None:
    """Remove what killed writers of `path` left beside it; another process may be writing the same path right now."""
    for partial in path.parent.glob(f".{_literal(path.name)}{PARTIAL_MARK}*"):
        if is_silent(partial):
            remove(partial)


def _literal(name: str) -> str:
    """A glob pattern that matches `name` alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _flush(path: Path) -> None:
    """Have the system write a file, or all files of a folder, to its disk."""
    flags = os.O_RDWR if os.name == "nt" else os.O_RDONLY  # Windows flushes only what is open for writing
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file() and not file.is_symlink():
            _flush_opened(file, flags)


def _flush_entry(folder: Path) -> None:
    """Have the system write a folder's list of names to its disk, where folders can be opened for that."""
    if os.name == "posix":
        _flush_opened(folder, os.O_RDONLY)


def _flush_opened(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no flushing
            raise
    finally:
        os.close(descriptor)
