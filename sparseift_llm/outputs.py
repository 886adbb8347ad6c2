"""Files and folders that users name: whole or not there at all, and what fails in words."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path`; what is written there takes the place of `path` at the end, or is deleted after an error.

    The folder around it is made. An OSError names `path`, not the path beside it.

    Args:
        path: a file, or a folder that is empty or does not exist.
    """
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


def in_words(error: Exception) -> str:
    """The message for a user: of an OSError the path and what the system says, of other errors their own words."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot read or write {error.filename}: {error.strerror}"
    return str(error)
