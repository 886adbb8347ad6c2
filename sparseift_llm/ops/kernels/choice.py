"""The one place that chooses a kernel: by device, dtype and side of the tiles, or as the user says."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor

from sparseift_llm.ops.kernels.base import Kernel
from sparseift_llm.ops.kernels.blas import BLAS
from sparseift_llm.ops.kernels.native import NATIVE
from sparseift_llm.ops.kernels.reference import REFERENCE
from sparseift_llm.ops.kernels.triton import TRITON
from sparseift_llm.utils.words import check_choice

_ALL: tuple[Kernel, ...] = (NATIVE, BLAS, TRITON, REFERENCE)
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _ALL}
# By device, the fastest first. The last one of each runs wherever the device exists; elsewhere the reference runs.
_PREFERRED: dict[str, tuple[Kernel, ...]] = {"cpu": (NATIVE, BLAS), "cuda": (TRITON, REFERENCE)}
ENVIRONMENT_VARIABLE = "SPARSEIFT_BLOCK_KERNEL"
_forced: str | None = None
_warned: set[tuple[Any, ...]] = set()


def use_block_kernel(name: str | None) -> None:
    """Force one kernel for all block-sparse layers of this process.

    The environment variable SPARSEIFT_BLOCK_KERNEL does the same.

    Args:
        name: native, blas, triton or reference; None lets device, dtype and tile decide again.

    Raises:
        ValueError: another name.
    """
    global _forced
    if name is not None:
        check_choice("block kernel", name, tuple(KERNELS))
    _forced = name


def kernel_name(device: str, dtype: torch.dtype, block_size: int) -> str:
    """The name of the kernel that products of such operands run on: the forced one, or the fastest that can.

    Args:
        device: a device type, e.g. `"cpu"`.
        dtype: of activations and weights.
        block_size: side of the tiles.

    Raises:
        ValueError: a kernel is forced that does not exist or has no code for these operands.
    """
    return _chosen(device, dtype, block_size).name


def kernel_for(x: Tensor, weight: Tensor, out_features: int, in_features: int) -> Kernel:
    """The kernel for x (T, .) and tiles (N, b, b); warns once if it may be slower than a dense layer with zeros."""
    device, size = x.device.type, weight.shape[1]
    kernel = _chosen(device, x.dtype, size)
    if kernel.smallest_fast_tile is None or size >= kernel.smallest_fast_tile or _forced_name():
        return kernel
    shape = (kernel.name, device, x.dtype, size, in_features, out_features)
    if shape not in _warned:
        _warned.add(shape)
        warnings.warn(
            f"block-sparse {in_features}->{out_features} with {size}x{size} tiles in {x.dtype} on {device} runs on the "
            f"{kernel.name!r} kernel, which can be slower than a masked dense layer; "
            f"{_advice(kernel, device, x.dtype, size)}",
            stacklevel=2,
        )
    return kernel


def _chosen(device: str, dtype: torch.dtype, block_size: int) -> Kernel:
    forced = _forced_name()
    if forced is None:
        candidates = _PREFERRED.get(device, (REFERENCE,))
        able = (kernel for kernel in candidates if kernel.supports(device, dtype, block_size) and kernel.is_available())
        return next(able, candidates[-1])
    check_choice(ENVIRONMENT_VARIABLE, forced, tuple(KERNELS))
    if not KERNELS[forced].supports(device, dtype, block_size):
        raise ValueError(
            f"the block kernel {forced!r} has no code for {block_size}x{block_size} tiles in {dtype} on {device}; "
            f"unset {ENVIRONMENT_VARIABLE} (or call use_block_kernel(None)), or force another kernel"
        )
    return KERNELS[forced]


def _forced_name() -> str | None:
    return _forced or os.environ.get(ENVIRONMENT_VARIABLE) or None


def _advice(kernel: Kernel, device: str, dtype: torch.dtype, block_size: int) -> str:
    """What to change about a choice that may be slow."""
    if device not in _PREFERRED:
        return f"no kernel is made for {device}, use structure='unstructured' there"
    best = _PREFERRED[device][0]
    if best.dtypes is not None and dtype not in best.dtypes:
        return "use float32 or bfloat16"
    if kernel is not best and best.supports(device, dtype, block_size):
        return best.remedy
    return "use larger tiles (block_size)"
