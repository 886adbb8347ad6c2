"""The Triton kernel: products of a block-sparse weight with dense activations on a GPU that touch active tiles only.

How products are launched is in triton_launch.py, and a feed-forward block in triton_feed_forward.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseift_llm.ops.kernels import triton_launch
from sparseift_llm.ops.kernels.triton_feed_forward import TritonFeedForward
from sparseift_llm.ops.kernels.triton_launch import Operand

SMALLEST_TILE = 16  # the smallest product that tensor cores compute


class TritonKernel:
    """float32, bfloat16 and float16 on a CUDA device; tiles of 16, 32, 64, 128 or 256."""

    name = "triton"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    smallest_fast_tile = SMALLEST_TILE
    remedy = "install triton"
    fused = TritonFeedForward()

    def is_available(self) -> bool:
        """Whether triton is installed and there is a CUDA device, or triton's interpreter is on."""
        return triton_launch.is_available()

    def supports(self, device: str, dtype: torch.dtype, block_size: int) -> bool:
        """Whether dtype and tile are such; on a CPU triton's interpreter runs the same code."""
        return dtype in self.dtypes and block_size >= SMALLEST_TILE

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, out_features: int) -> Tensor:
        """As `Kernel.forward`; the bias is added in float32."""
        return triton_launch.product(Operand(x, weight, columns), bias, out_features, out_features)

    def input_gradient(
        self, grad: Tensor, weight: Tensor, by_column: Sequence[Tensor], out_features: int, in_features: int
    ) -> Tensor:
        """As `Kernel.input_gradient`."""
        return triton_launch.product(Operand.transposed(grad, weight, by_column), None, out_features, in_features)

    def weight_gradient(self, grad: Tensor, x: Tensor, columns: Tensor, block_size: int) -> Tensor:
        """As `Kernel.weight_gradient`."""
        return triton_launch.weight_gradient(grad, x, columns, block_size)


TRITON = TritonKernel()
