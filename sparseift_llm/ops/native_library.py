"""Compiles the C++ in native/ for the machine at hand, keeps the library in the user's cache, and loads it.

It needs Linux and a C++ compiler: `c++`, or what the environment variable CXX names. What the library computes is in
kernels/native.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sparseift_llm.utils.files import written_whole

logger = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent / "native"
_HEADERS = ("arguments.h", "scratch.h", "kernels.h", "activations.h")
_SOURCES = [_FOLDER / name for name in (*_HEADERS, "linear.cpp", "feed_forward.cpp")]
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-fvisibility=hidden")


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The loaded library, or None where it cannot be compiled; the first call may take a minute."""
    if sys.platform != "linux":
        return None
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]  # may be "ccache g++"
        if shutil.which(compiler[0]) is None:
            raise FileNotFoundError(f"no C++ compiler {compiler[0]!r}")
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("the native block kernels cannot be used, BLAS calls take their place: %s", detail)
        return None


def _compiled(compiler: list[str]) -> Path:
    """The library for these sources, this compiler and this processor; it is compiled now unless it is in the cache."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(version)
    for part in (*(source.read_bytes() for source in _SOURCES), *(word.encode() for word in (*compiler, *_FLAGS))):
        key.update(part)
    key.update(_processor().encode())
    name = f"block_native_{key.hexdigest()[:16]}"
    folders = list(_cache_folders())
    for path in (path for folder in folders for path in folder.glob(f"{name}_*.so")):
        if (
            path.stem == f"{name}_{_checksum(path)}"
        ):  # a file that was cut off when the machine went down would crash here
            return path
    cache = next((folder for folder in folders if os.access(folder, os.W_OK)), None)
    if cache is None:
        raise PermissionError("no folder to keep them in; set XDG_CACHE_HOME to one of your own")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / "built.so"
        sources = [str(source) for source in _SOURCES if source.suffix == ".cpp"]
        subprocess.run([*compiler, *_FLAGS, *sources, "-o", str(built)], capture_output=True, check=True, text=True)
        target = cache / f"{name}_{_checksum(built)}.so"
        with written_whole(target) as temporary:  # other processes that compile at the same time see all of it or none
            built.rename(temporary)
    return target


def _cache_folders() -> Iterator[Path]:
    """Where compiled kernels are kept: in the user's cache, or, if it cannot be written, among the temporary files."""
    with contextlib.suppress(OSError, RuntimeError):  # there may be no home folder, or one that cannot be written
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparseift_llm"
        cache.mkdir(parents=True, exist_ok=True)
        yield cache
    with contextlib.suppress(OSError):
        temporary = Path(tempfile.gettempdir()) / f"sparseift_llm_{os.getuid()}"
        temporary.mkdir(mode=0o700, exist_ok=True)
        found = temporary.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            yield temporary  # nobody else can have put a library there


def _checksum(library: Path) -> str:
    try:
        return hashlib.sha256(library.read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by unequal machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), *sorted(kept)])
