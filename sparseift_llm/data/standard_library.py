"""The built-in corpus: the source files of the running Python's standard library, for a machine that has no text."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sparseift_llm.data.corpora import Source

_TESTS = {"test", "tests", "idle_test"}
_INSTALLED = {"site-packages", "dist-packages", "__pycache__"}
_GENERATED = {"encodings", "pydoc_data"}  # character tables and one long manual; they were most of the held-out text
_LEFT_OUT = frozenset(_TESTS | _INSTALLED | _GENERATED)


def builtin_source() -> Source:
    """The running Python's own standard library: one document per `.py` file.

    Tests and generated files (character tables, the manual's text) are left out. Files come in the order of their
    relative posix paths, which are also the keys; files whose declared encoding does not decode are left out.

    Raises:
        ValueError: this Python has no library source files (a zipped or stripped installation).
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    names = sorted(name for name in paths if not _LEFT_OUT.intersection(name.split("/")))
    if not names:
        raise ValueError(f"corpus='builtin': no Python source files in {root}; set corpus to a text file or folder")
    digest, num_bytes = hashlib.sha256(), 0
    for name in names:
        content = paths[name].read_bytes()
        num_bytes += len(content)
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    fingerprint = {"builtin": sys.version, "sha256": digest.hexdigest()}
    return Source("the built-in corpus", fingerprint, partial(_read, root, names), num_bytes=num_bytes)


def _read(root: Path, names: list[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        # tokenize.open follows the file's coding line; SyntaxError is its word for an unknown coding.
        with contextlib.suppress(UnicodeDecodeError, SyntaxError), tokenize.open(root / name) as file:
            text = file.read()
            yield name, text
