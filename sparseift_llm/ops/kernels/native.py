"""Block-sparse products by the C++ in native/, which is compiled once per machine type and kept in the user's cache.

Linux with a C++ compiler (`c++`, or what CXX names); `is_available()` says no elsewhere. Functions as in
block_reference.py. float32, float64 and bfloat16; sums in float32 or wider.
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
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparseift_llm.topology.blocks import row_starts, rows_of_slots

logger = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_SOURCES = [
    Path(__file__).parents[1] / "native" / name for name in ("scratch.h", "kernels.h", "linear.cpp", "feed_forward.cpp")
]
_NO_MEMORY = 2  # of enum Outcome in kernels.h
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-fvisibility=hidden")


def is_available() -> bool:
    """Whether the kernels are, or can be, compiled here; the first call may take half a minute."""
    return _library() is not None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, out_features: int) -> Tensor:
    """x (T, in) -> (T, out)."""
    return _gather(x, weight, True, _row_map(weight, columns, out_features), bias)


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    slots_by_column: Tensor,
    column_starts: Tensor,
    out_features: int,
    in_features: int,
) -> Tensor:
    """grad (T, out) -> (T, in)."""
    return _gather(grad, weight, False, _column_map(weight, (slots_by_column, column_starts), out_features), None)


def weight_gradient(grad: Tensor, x: Tensor, columns: Tensor, block_size: int) -> Tensor:
    """grad (T, out), x (T, in) -> tiles (N, b, b)."""
    grad, x = _unit_stride(grad), _unit_stride(x)
    result = torch.empty(len(columns), block_size, block_size, dtype=x.dtype)
    out_blocks, in_blocks = grad.shape[1] // block_size, x.shape[1] // block_size
    _, rows, _ = _fixed_index(len(columns), out_blocks)
    _call(
        "outer", x.dtype, grad, grad.stride(0), out_blocks, x, x.stride(0), in_blocks, len(x), rows,
        columns.contiguous(), len(columns), result, block_size,
    )  # fmt: skip
    return result


def feed_forward(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    up_columns: Tensor,
    hidden_features: int,
    down: Tensor,
    down_bias: Tensor | None,
    down_columns: Tensor,
    out_features: int,
) -> Tensor:
    """x (T, in), up (N, b, b), down (M, b, b) -> (T, out), GELU in between."""
    x, size = _unit_stride(x), up.shape[1]
    y = torch.empty(len(x), out_features, dtype=x.dtype)
    _call(
        "feed_forward", x.dtype, x, x.stride(0), len(x), x.shape[1] // size, up.contiguous(), len(up),
        _contiguous(up_bias), *_row_map(up, up_columns, hidden_features), hidden_features // size,
        down.contiguous(), len(down), _contiguous(down_bias), *_row_map(down, down_columns, out_features),
        out_features // size, y, size,
    )  # fmt: skip
    return y


def feed_forward_gradient(
    grad: Tensor,
    x: Tensor,
    up_tiles: tuple[Tensor, ...],
    up_bias: Tensor | None,
    hidden_features: int,
    down_tiles: tuple[Tensor, ...],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """grad (T, out), x (T, in) -> the gradients of x, up, up_bias and down, where `needed`.

    Both weights' tiles come as (weight, columns, slots_by_column, column_starts).
    """
    (up, up_columns, *up_index), (down, _, *down_index) = up_tiles, down_tiles
    grad, x, size, out_features = _unit_stride(grad), _unit_stride(x), up.shape[1], grad.shape[1]
    shapes = (x.shape, up.shape, (hidden_features,), down.shape)
    results = [torch.empty(shape, dtype=x.dtype) if want else None for shape, want in zip(shapes, needed, strict=True)]
    _call(
        "feed_forward_gradient", x.dtype, grad, grad.stride(0), x, x.stride(0), len(x), x.shape[1] // size,
        up.contiguous(), len(up), _contiguous(up_bias), *_row_map(up, up_columns, hidden_features),
        *_column_map(up, up_index, hidden_features), hidden_features // size, down.contiguous(), len(down),
        *_column_map(down, down_index, out_features), out_features // size, *results, size,
    )  # fmt: skip
    return results


def scratch_bytes() -> int:
    """Bytes of packed operands that threads keep for the next call, which no allocator of torch's knows of."""
    library = _library()
    if library is None:
        return 0
    library.scratch_bytes.restype = ctypes.c_int64
    return int(library.scratch_bytes())


def release_scratch() -> None:
    """Give back what `scratch_bytes` counts; not while another thread multiplies."""
    library = _library()
    if library is not None:
        library.release_scratch()


def _row_map(weight: Tensor, columns: Tensor, out_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """For a product with W^T: where each output block's entries begin, their input blocks, and their tiles."""
    starts, _, slots = _fixed_index(len(weight), out_features // weight.shape[1])
    return starts, columns.contiguous(), slots


def _column_map(weight: Tensor, by_column: Sequence[Tensor], out_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a product with W; `by_column`: its slots by column, and where each column begins."""
    slots, starts = by_column
    _, rows, _ = _fixed_index(len(weight), out_features // weight.shape[1])
    return starts.contiguous(), rows[slots.long()], slots.contiguous()


@functools.lru_cache(maxsize=64)
def _fixed_index(num_tiles: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """What no mask update changes: the rows' first slots, the slots' rows, and the slots' numbers; read only."""
    with torch.device("cpu"):
        rows = rows_of_slots(num_tiles, num_rows).to(torch.int32)
        return row_starts(num_tiles, num_rows), rows, torch.arange(num_tiles, dtype=torch.int32)


def _gather(
    x: Tensor, weight: Tensor, transpose: bool, tile_map: tuple[Tensor, Tensor, Tensor], bias: Tensor | None
) -> Tensor:
    """Output block j: sum over e in starts[j]..starts[j+1] of input block sources[e] times tile slots[e].

    Tiles are (output of this product, its input) when `transpose`, else the other way round.
    """
    size, out_blocks = weight.shape[1], len(tile_map[0]) - 1
    x, weight = _unit_stride(x), weight.contiguous()
    y = torch.empty(len(x), out_blocks * size, dtype=x.dtype)
    _call(
        "gather", x.dtype, x, x.stride(0), len(x), x.shape[1] // size, weight, int(transpose), len(weight),
        *tile_map, out_blocks, _contiguous(bias), y, size,
    )  # fmt: skip
    return y


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | None) -> None:
    """Call a kernel; tensors are passed as pointers, which `arguments` keeps alive."""
    library = _library()
    if library is None:
        raise RuntimeError("the native block kernels need Linux and a C++ compiler; install one or use kernel 'blas'")
    function = library[f"{name}_{str(dtype).removeprefix('torch.')}"]
    converted = [
        ctypes.c_void_p(argument.data_ptr())
        if isinstance(argument, Tensor)
        else argument
        if argument is None
        else ctypes.c_int64(argument)
        for argument in arguments
    ]
    outcome = function(*converted)
    if outcome == _NO_MEMORY:
        raise torch.OutOfMemoryError("the native block kernels ran out of memory. Use smaller batches")
    if outcome != 0:
        raise RuntimeError(f"the native block kernels have no code for block size {arguments[-1]}")


@functools.cache
def _library() -> ctypes.CDLL | None:
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
    """The shared library for this source, compiler and processor; compiled now unless it is in the cache."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(version)
    for part in (*(source.read_bytes() for source in _SOURCES), *(word.encode() for word in (*compiler, *_FLAGS))):
        key.update(part)
    key.update(_processor().encode())
    name = f"block_native_{key.hexdigest()[:16]}"
    folders = list(_cache_folders())
    for path in (path for folder in folders for path in folder.glob(f"{name}_*.so")):
        if path.stem == f"{name}_{_checksum(path)}":  # not cut off when the machine went down: that would crash here
            return path
    cache = next((folder for folder in folders if os.access(folder, os.W_OK)), None)
    if cache is None:
        raise PermissionError("no folder to keep them in; set XDG_CACHE_HOME to one of your own")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / "built.so"
        sources = [str(source) for source in _SOURCES if source.suffix == ".cpp"]
        subprocess.run([*compiler, *_FLAGS, *sources, "-o", str(built)], capture_output=True, check=True, text=True)
        target = cache / f"{name}_{_checksum(built)}.so"
        os.replace(built, target)  # whole or absent, also when several processes compile at once
    return target


def _cache_folders() -> Iterator[Path]:
    """Where compiled kernels are kept: the user's cache, and a folder for temporary files if that cannot be written."""
    with contextlib.suppress(OSError, RuntimeError):  # no home, or a read-only one
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparseift_llm"
        cache.mkdir(parents=True, exist_ok=True)
        yield cache
    with contextlib.suppress(OSError):
        temporary = Path(tempfile.gettempdir()) / f"sparseift_llm_{os.getuid()}"
        temporary.mkdir(mode=0o700, exist_ok=True)
        found = temporary.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            yield temporary  # nobody else can have put anything there


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
