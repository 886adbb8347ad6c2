"""Tensor descriptors: with them the TMA of a Hopper GPU copies operands, and no thread computes addresses for it.

The TMA (Tensor Memory Accelerator) copies a rectangle of a matrix into shared memory, given its corner. A descriptor
tells it where the matrix lies, and how large a rectangle is. It is made on the host at every launch and passed as an
argument. One made by the kernel itself would need memory from `triton.set_allocator`, which holds for one thread only,
while backward passes run in threads of autograd. As an argument it is kept in a CUDA graph, too.

It is off unless it is asked for: no GPU has run it yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseift_llm.ops.kernels import triton_code
from sparseift_llm.utils.words import check_choice

if triton_code.HAS_TRITON:
    from triton.tools.tensor_descriptor import (  # type: ignore[import-untyped, import-not-found, unused-ignore]
        TensorDescriptor,
    )

TMA_VARIABLE = "SPARSEIFT_BLOCK_TMA"
_ALIGNED = 16  # bytes, of addresses and row strides
_wanted: bool | None = None


def use_tma(wanted: bool | None) -> None:
    """Say whether the Triton kernels may read operands by TMA, where that is possible and the tuner finds it faster.

    The environment variable SPARSEIFT_BLOCK_TMA does the same: 1, or 0, which is the default.

    Args:
        wanted: whether; None: as the environment variable says.
    """
    global _wanted
    _wanted = wanted


def is_wanted() -> bool:
    """Whether TMA was asked for.

    Raises:
        ValueError: SPARSEIFT_BLOCK_TMA is neither 0 nor 1.
    """
    if _wanted is not None:
        return _wanted
    word = os.environ.get(TMA_VARIABLE) or "0"
    check_choice(TMA_VARIABLE, word, ("0", "1"))
    return word == "1"


def has_tma(device: torch.device) -> bool:
    """Whether a device has it; Triton's interpreter does the same on a CPU."""
    return bool(triton_code.INTERPRETED.value) or torch.cuda.get_device_capability(device) >= (9, 0)


def may_describe(*matrices: Tensor) -> bool:
    """Whether TMA is wanted and can read these operands of a kernel: matrices and tiles.

    They have to be aligned, and of 16-bit numbers, which tensor cores multiply as they have been copied.
    """
    return is_wanted() and has_tma(matrices[0].device) and all(_is_describable(matrix) for matrix in matrices)


def _is_describable(matrix: Tensor) -> bool:
    stride, width = matrix.stride(-2), matrix.shape[-1]
    return (
        matrix.element_size() == 2
        and matrix.numel() > 0
        and max(matrix.shape[:-1].numel(), width) < 2**31  # corners are of 32 bits
        and matrix.data_ptr() % _ALIGNED == 0
        and stride >= width  # rows that overlap are not for it
        and stride * matrix.element_size() % _ALIGNED == 0
    )


def rectangles(matrix: Tensor, height: int, width: int) -> Any:
    """The descriptor of a matrix, or of tiles (N, b, b) below each other, that is read in such rectangles.

    What lies beyond the last row is read as 0.
    """
    rows = matrix.shape[:-1].numel()
    return TensorDescriptor(matrix, [rows, matrix.shape[-1]], [matrix.stride(-2), 1], [height, width])


class Described:
    """A kernel whose configurations may say `tma`: it is then launched with descriptors, where its operands allow them.

    It stands between a kernel and its tuner, because how large rectangles are depends on the configuration.

    Args:
        fn: the kernel (as triton's own wrappers call it).
        descriptors: the kernel's arguments by name, with those of the configuration -> descriptors by name.
    """

    def __init__(self, fn: Any, descriptors: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.fn = fn
        self.arg_names = fn.arg_names
        self._descriptors = descriptors

    def run(self, *args: Any, tma: int = 0, **kwargs: Any) -> Any:
        """Launch the kernel, as the tuner asks for it."""
        if tma:
            arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
            if arguments["can_describe"]:
                kwargs |= self._descriptors(arguments)
        return self.fn.run(*args, **kwargs)


def of_product(arguments: dict[str, Any]) -> dict[str, Any]:
    """The descriptors of `product_kernel`: rows of the source by `depth` features, and parts of tiles by as many."""
    depth, part = arguments["depth"], arguments["part"]
    of_tiles = (depth, part) if arguments["transposed"] else (part, depth)
    found = {}
    for source, weight in (("source", "weight"), ("second", "second_weight")):
        if arguments[source] is not None:
            found[f"{source}_tma"] = rectangles(arguments[source], arguments["token_block"], depth)
            found[f"{weight}_tma"] = rectangles(arguments[weight], *of_tiles)
    return found


def of_weight_gradient(arguments: dict[str, Any]) -> dict[str, Any]:
    """The descriptors of `weight_gradient_kernel`: `depth` tokens by the columns of a part."""
    size = arguments["depth"], arguments["part"]
    return {f"{name}_tma": rectangles(arguments[name], *size) for name in ("grad", "x")}
