"""The reference kernel fills in the zeros and multiplies dense matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseift_llm.ops.tiles import dense_weight, tiles_of


class ReferenceKernel:
    """Runs on every device and takes every dtype. It saves neither time nor memory."""

    name = "reference"
    dtypes = None
    smallest_fast_tile = None
    remedy = ""
    fused = None

    def is_available(self) -> bool:
        """Always true."""
        return True

    def supports(self, device: str, dtype: torch.dtype, block_size: int) -> bool:
        """Always true."""
        return True

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, out_features: int) -> Tensor:
        """As `Kernel.forward`."""
        return F.linear(x, dense_weight(weight, columns, out_features, x.shape[1]), bias)

    def input_gradient(
        self, grad: Tensor, weight: Tensor, by_column: Sequence[Tensor], out_features: int, in_features: int
    ) -> Tensor:
        """As `Kernel.input_gradient`."""
        slots, _, starts, _ = by_column
        columns = torch.empty_like(slots)
        places = torch.arange(len(columns), dtype=starts.dtype, device=columns.device)
        columns[slots.long()] = (torch.searchsorted(starts, places, right=True) - 1).to(columns.dtype)
        return grad @ dense_weight(weight, columns, out_features, in_features)

    def weight_gradient(self, grad: Tensor, x: Tensor, columns: Tensor, block_size: int) -> Tensor:
        """As `Kernel.weight_gradient`."""
        return tiles_of(grad.T @ x, columns, block_size).contiguous()


REFERENCE = ReferenceKernel()
