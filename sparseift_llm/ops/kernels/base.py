"""Which kernels multiply block-sparse matrices: by device, dtype and tile, or as the user says.

block_native.py (CPU), block_blas.py (CPU without a compiler), block_triton.py (GPU) and block_reference.py (anywhere)
have the same functions.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparseift_llm.config.parsing import check_choice
from sparseift_llm.ops.kernels import blas as block_blas
from sparseift_llm.ops.kernels import native as block_native
from sparseift_llm.ops.kernels import reference as block_reference
from sparseift_llm.ops.kernels import triton as block_triton

KERNELS = {"native": block_native, "blas": block_blas, "triton": block_triton, "reference": block_reference}
ENVIRONMENT_VARIABLE = "SPARSEIFT_BLOCK_KERNEL"
_SMALLEST_FAST_BLOCK = {"native": 16, "blas": 64, "triton": 16}
_forced: str | None = None
_warned: set[tuple[Any, ...]] = set()


def use_block_kernel(name: str | None) -> None:
    """Force a kernel for all block-sparse layers: native, blas, triton or reference; None: choose by device and shape.

    The environment variable SPARSEIFT_BLOCK_KERNEL does the same.

    Raises:
        ValueError: another name.
    """
    global _forced
    if name is not None:
        check_choice("block kernel", name, tuple(KERNELS))
    _forced = name


def kernel_name(device: str, dtype: torch.dtype, block_size: int) -> str:
    """The kernel that products of these operands run on: the forced one, or the fastest that supports them.

    Raises:
        ValueError: the forced one is none, or has no code for these operands.
    """
    forced = _forced_kernel()
    if forced:
        check_choice(ENVIRONMENT_VARIABLE, forced, tuple(KERNELS))
        if not _supports(forced, device, dtype, block_size):
            raise ValueError(
                f"the block kernel {forced!r} has no code for {block_size}x{block_size} tiles in {dtype} on {device}; "
                f"unset {ENVIRONMENT_VARIABLE} (or call use_block_kernel(None)), or force another kernel"
            )
        return forced
    if device == "cpu":
        is_native = _supports("native", device, dtype, block_size) and block_native.is_available()
        return "native" if is_native else "blas"
    if device == "cuda" and _supports("triton", device, dtype, block_size) and block_triton.is_available():
        return "triton"
    return "reference"


def _supports(name: str, device: str, dtype: torch.dtype, block_size: int) -> bool:
    """Whether a kernel has code for these operands; that triton runs on a CPU in its interpreter only is left out."""
    if name == "triton":
        return dtype in block_triton.DTYPES and block_size >= block_triton.SMALLEST_TILE
    if name == "native":
        return device == "cpu" and dtype in block_native.DTYPES and block_size % 4 == 0
    return name == "reference" or device == "cpu"


def _forced_kernel() -> str | None:
    return _forced or os.environ.get(ENVIRONMENT_VARIABLE)


def kernel_for(x: Tensor, weight: Tensor, out_features: int, in_features: int) -> ModuleType:
    """The kernels' module for x (T, .) and weight (N, b, b); warns once if they may be slower than a dense layer."""
    device, size = x.device.type, weight.shape[1]
    name = kernel_name(device, x.dtype, size)
    shape = (name, device, x.dtype, size, in_features, out_features)
    if size < _SMALLEST_FAST_BLOCK.get(name, 1 << 30) and shape not in _warned and not _forced_kernel():
        _warned.add(shape)
        warnings.warn(
            f"block-sparse {in_features}->{out_features} with {size}x{size} tiles in {x.dtype} on {device} runs on the "
            f"{name!r} kernel, which can be slower than a masked dense layer; {_faster(name, device, x.dtype, size)}",
            stacklevel=2,
        )
    return KERNELS[name]


def _faster(name: str, device: str, dtype: torch.dtype, block_size: int) -> str:
    """What to change about a slow choice."""
    if device not in ("cpu", "cuda"):
        return f"no kernel is made for {device}, use structure='unstructured' there"
    if dtype not in (block_native if device == "cpu" else block_triton).DTYPES:
        return "use float32 or bfloat16"
    if device == "cuda" and not block_triton.is_available():
        return "install triton"
    if device == "cpu" and name != "native" and _supports("native", device, dtype, block_size):
        return "install a C++ compiler (on Linux), or use larger tiles (block_size)"
    return "use larger tiles (block_size)"


def check_operands(values: Iterable[Tensor | None], indices: Iterable[Tensor]) -> None:
    """Raise ValueError unless operands are of one dtype, as torch's linear demands, indices int32, all on one device.

    Kernels read memory by pointer, and a custom operator of which one operand is on the meta device computes nothing.
    """
    operands, numbers = [tensor for tensor in values if tensor is not None], list(indices)
    if any(tensor.dtype != operands[0].dtype for tensor in operands):
        found = ", ".join(str(tensor.dtype) for tensor in operands)
        raise ValueError(f"input, weight and bias must have one dtype, got {found}; convert them, or use autocast")
    if any(tensor.dtype != torch.int32 for tensor in numbers):
        raise ValueError("a block-sparse layer's indices are no longer int32; change its dtype with `to`, not `type`")
    everything = (*operands, *numbers)
    if any(tensor.device != operands[0].device for tensor in everything):
        found = ", ".join(dict.fromkeys(str(tensor.device) for tensor in everything))
        raise ValueError(
            f"input, weight, bias and indices must be on one device, got {found}; move the whole model, and if it is "
            "offloaded, offload whole MLPs, not their projections (accelerate: preload_module_classes)"
        )
