"""Token streams and trained tokenizers on disk: each is made once, and never seen half done.

An entry's name is a digest of everything that its content depends on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseift_llm.data.corpora import Source
from sparseift_llm.data.packing import token_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_FORMAT = 2  # part of every name: raise it when the same input would give another content
_ABANDONED_SECONDS = 24 * 3600
_PARTIAL_NAME = re.compile(r"\.partial-.+-(?P<where>[0-9a-f]{12})-(?P<pid>\d{1,9})-[0-9a-f]{32}")


def cached_tokens(
    tokenizer: PreTrainedTokenizerBase, source: Source, folder: Path, limit: int | None
) -> tuple[Path, dict[str, Any]]:
    """The stored token stream of `source`, at least its first `limit` tokens.

    Returns:
        The `.npy` file, and the `tokens`, `text_bytes` and `sha256` (of the tokens) that it holds.
    """
    key = {"tokenizer": tokenizer_identity(tokenizer), "text": source.fingerprint, "limit": limit}
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)

    def build(entry: Path) -> dict[str, Any]:
        batches = token_batches(tokenizer, source.documents(), source.joined)
        return _write_tokens(entry / "tokens.npy", batches, dtype, limit)

    entry, info = cached(folder, "tokens", key, build)
    return entry / "tokens.npy", info


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """JSON-ready value that two tokenizers share only if they give the same tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return [type(tokenizer).__name__, hashlib.sha256(content.encode()).hexdigest(), tokenizer.eos_token_id]


def _write_tokens(
    file: Path, batches: Iterable[tuple[np.ndarray, int]], dtype: np.dtype[Any], limit: int | None
) -> dict[str, Any]:
    """Write a `.npy` file batch by batch, then its header again: numpy pads it so that the length can grow."""
    tokens = text_bytes = 0
    digest = hashlib.sha256()

    def write_header() -> None:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (tokens,)}
        np.lib.format.write_array_header_1_0(out, header)

    with file.open("wb") as out:
        write_header()
        start = out.tell()
        for batch, size in batches:
            stored = batch.astype(dtype).tobytes()
            out.write(stored)
            digest.update(stored)
            tokens += len(batch)
            text_bytes += size
            if limit is not None and tokens >= limit:
                break
        out.seek(0)
        write_header()
        assert out.tell() == start, "the .npy header changed its length"
    return {"tokens": tokens, "text_bytes": text_bytes, "sha256": digest.hexdigest()}


def cached(
    folder: Path, kind: str, key: dict[str, Any], build: Callable[[Path], dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """The folder that `build` fills, made once per `key` and never seen half done.

    It is built under another name and renamed when complete; a manifest with all file sizes tells
    a damaged one, which is built again.

    Args:
        folder: parent of all entries.
        kind: start of the entry's name.
        key: JSON-ready; everything the content depends on.
        build: fills an empty folder, returns JSON-ready facts about it.

    Returns:
        The entry's folder and the facts.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()
    entry = folder / f"{kind}-{digest[:32]}"
    info = _intact(entry)
    if info is not None:
        return entry, info
    _remove_abandoned(folder)
    partial = folder / f".partial-{entry.name}-{_where()}-{os.getpid()}-{uuid.uuid4().hex}"
    partial.mkdir(parents=True)
    try:
        info = build(partial)
        files = {file.name: file.stat().st_size for file in partial.iterdir()}
        manifest = {"key": key, "info": info, "files": files}
        (partial / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        if entry.exists() and _intact(entry) is None:
            logger.warning("%s is damaged and replaced", entry)
            shutil.rmtree(entry)
        try:
            os.replace(partial, entry)
        except OSError:
            if _intact(entry) is None:  # otherwise another machine finished first, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return entry, info


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed builds left behind; other processes and machines may be building here right now."""
    for partial in folder.glob(".partial-*"):
        if _abandoned(partial):
            logger.info("removing %s, which a killed run left behind", partial)
            shutil.rmtree(partial, ignore_errors=True)


def _abandoned(partial: Path) -> bool:
    """Whether its process is known to be gone or, where that cannot be known, nothing was written for a day."""
    match = _PARTIAL_NAME.fullmatch(partial.name)
    if match and match["where"] == _where() and not _alive(int(match["pid"])):
        return True
    try:
        written = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
    except OSError:  # finished or removed just now
        return False
    return time.time() - written > _ABANDONED_SECONDS


def _where() -> str:
    """Where a process number has a meaning: this host and, as containers may share its name, this container."""
    try:
        numbering = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        numbering = ""
    return hashlib.sha256(f"{socket.gethostname()} {numbering}".encode()).hexdigest()[:12]


def _alive(pid: int) -> bool:
    if os.name != "posix":  # there, signal 0 is not a mere question
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def _intact(entry: Path) -> dict[str, Any] | None:
    """The facts about a complete entry, or None if it is missing or damaged."""
    try:
        manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
        complete = all((entry / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError):
        return None
    return manifest["info"] if complete else None
