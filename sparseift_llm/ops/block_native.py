"""Block-sparse products by block_native.cpp, which is compiled once per machine type and kept in the user's cache.

Linux with a C++ compiler (`c++`, or what CXX names); `is_available()` says no elsewhere. Functions as in
block_reference.py. float32, float64 and bfloat16; sums in float32 or wider.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from sparseift_llm.topology.blocks import row_starts, rows_of_slots

logger = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")


def is_available() -> bool:
    """Whether the kernels are, or can be, compiled here; the first call may take ten seconds."""
    return _library() is not None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, out_features: int, gelu: bool = False
) -> Tensor:
    """x (T, in), or gelu(x), -> (T, out)."""
    starts = row_starts(len(weight), out_features // weight.shape[1])
    slots = torch.arange(len(weight), dtype=torch.int32)
    return _gather(x, weight, True, starts, columns, slots, bias, gelu)


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    slots_by_column: Tensor,
    column_starts: Tensor,
    out_features: int,
    in_features: int,
    before_gelu: Tensor | None = None,
) -> Tensor:
    """grad (T, out) -> (T, in); times the derivative of gelu at `before_gelu` (T, in), if given."""
    rows = rows_of_slots(len(weight), out_features // weight.shape[1]).to(torch.int32)
    return _gather(
        grad, weight, False, column_starts, rows[slots_by_column.long()], slots_by_column,
        before_gelu=before_gelu,
    )  # fmt: skip


def weight_gradient(grad: Tensor, x: Tensor, columns: Tensor, block_size: int, gelu: bool = False) -> Tensor:
    """grad (T, out), x (T, in) or gelu(x) -> tiles (N, b, b)."""
    grad, x = _unit_stride(grad), _unit_stride(x)
    result = torch.empty(len(columns), block_size, block_size, dtype=x.dtype)
    out_blocks, in_blocks = grad.shape[1] // block_size, x.shape[1] // block_size
    rows = rows_of_slots(len(columns), out_blocks).to(torch.int32)
    _call(
        "outer", x.dtype, grad, grad.stride(0), out_blocks, x, x.stride(0), in_blocks, len(x), rows,
        columns.contiguous(), len(columns), int(gelu), result, block_size,
    )  # fmt: skip
    return result


def _gather(
    x: Tensor,
    weight: Tensor,
    transpose: bool,
    starts: Tensor,
    sources: Tensor,
    slots: Tensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    before_gelu: Tensor | None = None,
) -> Tensor:
    """Output block j: sum over e in starts[j]..starts[j+1] of input block sources[e] times tile slots[e].

    Tiles are (output of this product, its input) when `transpose`, else the other way round.
    """
    size, out_blocks = weight.shape[1], len(starts) - 1
    x, weight = _unit_stride(x), weight.contiguous()
    y = torch.empty(len(x), out_blocks * size, dtype=x.dtype)
    _call(
        "gather", x.dtype, x, x.stride(0), len(x), x.shape[1] // size, weight, int(transpose), len(weight),
        starts.contiguous(), sources.contiguous(), slots.contiguous(), out_blocks,
        None if bias is None else bias.contiguous(), int(gelu),
        None if before_gelu is None else before_gelu.contiguous(), y, size,
    )  # fmt: skip
    return y


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
    if function(*converted) != 0:
        raise RuntimeError(f"the native block kernels have no code for block size {arguments[-1]}")


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if sys.platform != "linux" or compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("the native block kernels cannot be used, BLAS calls take their place: %s", detail)
        return None


def _compiled(compiler: str) -> Path:
    """The shared library for this source, compiler and processor; compiled now unless it is in the cache."""
    key = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    for part in (_SOURCE.read_bytes(), version, " ".join(_FLAGS).encode(), _processor().encode()):
        key.update(part)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparseift_llm"
    target = cache / f"block_native_{key.hexdigest()[:16]}.so"
    if not target.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / target.name
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(built)]
            subprocess.run(command, capture_output=True, check=True, text=True)
            os.replace(built, target)  # whole or absent, also when several processes compile at once
    return target


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by unequal machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), *sorted(kept)])
