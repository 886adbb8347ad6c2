"""Token streams and trained tokenizers on disk: each is made once, and never seen half done.

An entry's name is a digest of everything that its content depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np

from sparseift_llm.data.corpora import Source
from sparseift_llm.data.packing import token_batches
from sparseift_llm.utils.files import PARTIAL_MARK, is_silent, remove, written_whole
from sparseift_llm.utils.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_FORMAT = 2  # part of every name: raise it when the same input would give another content
_LOCKS_NAME = ".locks"


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
        logger.info("tokenising %s; tokens are kept in %s", source.name, folder)
        batches = token_batches(tokenizer, source.documents(), source.joined)
        with progress_bar("tokenising", None if limit else source.num_bytes, "B", scaled=True) as bar:
            return _write_tokens(entry / "tokens.npy", _counted(batches, bar), dtype, limit)

    entry, info = cached(folder, "tokens", key, build)
    return entry / "tokens.npy", info


def _counted(batches: Iterable[tuple[np.ndarray, int]], bar: Any) -> Iterator[tuple[np.ndarray, int]]:
    """The same batches; the bar is told the bytes of each."""
    for batch in batches:
        yield batch
        bar.update(batch[1])


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """A JSON-serialisable value that two tokenizers share only if they give the same tokens."""
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

    It is built under another name and renamed when complete; a manifest with all file sizes tells a damaged one,
    which is built again. Processes that ask for the same entry at the same time wait for the one that builds it.

    Args:
        folder: parent of all entries.
        kind: start of the entry's name.
        key: JSON-serialisable; everything that the content depends on.
        build: fills an empty folder, returns JSON-serialisable facts about it.

    Returns:
        The entry's folder and the facts.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()
    entry = folder / f"{kind}-{digest[:32]}"
    info = _intact(entry)
    if info is None:
        with _locked(entry):
            info = _intact(entry)  # another process may have built it while this one waited
            if info is None:
                _remove_abandoned(folder, entry)
                info = _build(entry, key, build)
    return entry, info


def _build(entry: Path, key: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Fill the entry, and return the facts about it."""
    try:
        with written_whole(entry, mark=_machine()) as partial:
            partial.mkdir()
            info = build(partial)
            files = {file.name: file.stat().st_size for file in partial.iterdir()}
            manifest = {"key": key, "info": info, "files": files}
            (partial / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
            if entry.exists() and _intact(entry) is None:
                logger.warning("%s is damaged and replaced", entry)
                remove(entry)
    except OSError:
        # Where locks do not hold for all machines, another one may have finished first, with the same content.
        found = _intact(entry)
        if found is None:
            raise
        return found
    return info


@contextlib.contextmanager
def _locked(entry: Path) -> Iterator[None]:
    """Hold the lock on building `entry`, waiting for a process that has it; a killed process loses its locks."""
    lock = _lock_of(entry)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.info("another process is making %s: waiting for it", entry)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _lock_of(entry: Path) -> filelock.BaseFileLock:
    path = entry.parent / _LOCKS_NAME / f"{entry.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(path)


def _remove_abandoned(folder: Path, building: Path) -> None:
    """Remove what killed builds left behind, while this process holds the lock on `building`.

    Other processes, also of other machines, may be building in `folder` right now.
    """
    for partial in (*folder.glob(f".*{PARTIAL_MARK}*"), *folder.glob(f"{PARTIAL_MARK}*")):  # the latter by 0.1.0
        if _is_abandoned(partial, building):
            logger.info("removing %s, which a killed run left behind", partial)
            remove(partial)


def _is_abandoned(partial: Path, building: Path) -> bool:
    """Whether nobody holds the lock on a partial build, or nothing was written to it for a day.

    Locks are only asked about builds of this machine, because not every network file system has locks that hold for
    all machines.
    """
    name, _, rest = partial.name.removeprefix(".").partition(PARTIAL_MARK)
    if rest.partition("-")[0] != _machine():
        return is_silent(partial)
    if name == building.name:
        return True
    try:
        with _lock_of(partial.with_name(name)).acquire(timeout=0):
            return True
    except filelock.Timeout:
        return False


def _machine() -> str:
    """A name for the machine as it was started last, the same in all its containers."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:  # not Linux
        started = socket.gethostname()
    return hashlib.sha256(started.encode()).hexdigest()[:12]


def _intact(entry: Path) -> dict[str, Any] | None:
    """The facts about a complete entry, or None if it is missing or damaged."""
    try:
        manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
        complete = all((entry / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError):
        return None
    return manifest["info"] if complete else None
