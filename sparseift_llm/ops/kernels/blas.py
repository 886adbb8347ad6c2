"""The BLAS kernel: one call of torch's matrix product per tile, for CPUs without a C++ compiler.

The calls work on strided views, without copies. Small tiles with few tokens take one batched call for all tiles.
Operands of half precision are converted first, so that sums are float32 for every dtype but float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseift_llm.topology.groups import row_starts

TOKENS_PER_CHUNK = 1024  # so that the operands of one block-row stay in the second-level cache
FEW_TOKENS, SMALL_TILE = 32, 64  # with no more of both, a call per tile would take longer than the work in it


class BlasKernel:
    """Takes every dtype on a CPU."""

    name = "blas"
    dtypes = None
    smallest_fast_tile = 64
    remedy = ""
    fused = None

    def is_available(self) -> bool:
        """Always true: torch brings its BLAS along."""
        return True

    def supports(self, device: str, dtype: torch.dtype, block_size: int) -> bool:
        """Whether the device is a CPU."""
        return device == "cpu"

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, out_features: int) -> Tensor:
        """As `Kernel.forward`."""
        size = weight.shape[1]
        starts = row_starts(len(weight), out_features // size).tolist()
        return _gather(x, weight.transpose(1, 2), starts, columns.tolist(), None, bias)

    def input_gradient(
        self, grad: Tensor, weight: Tensor, by_column: Sequence[Tensor], out_features: int, in_features: int
    ) -> Tensor:
        """As `Kernel.input_gradient`."""
        slots, rows, starts, _ = by_column
        return _gather(grad, weight, starts.tolist(), rows.tolist(), slots.tolist(), None)

    def weight_gradient(self, grad: Tensor, x: Tensor, columns: Tensor, block_size: int) -> Tensor:
        """As `Kernel.weight_gradient`."""
        left, right = _widen(grad).split(block_size, 1), _widen(x).split(block_size, 1)
        result = left[0].new_empty(len(columns), block_size, block_size)
        starts, of_slot = row_starts(len(columns), len(left)).tolist(), columns.tolist()
        for row, block in enumerate(left):
            for slot in range(starts[row], starts[row + 1]):
                torch.mm(block.T, right[of_slot[slot]], out=result[slot])
        return result.to(x.dtype)


BLAS = BlasKernel()


def _gather(
    x: Tensor, tiles: Tensor, starts: list[int], sources: list[int], slots: list[int] | None, bias: Tensor | None
) -> Tensor:
    """Output block j: the sum over e, from starts[j] to starts[j + 1] - 1, of input block sources[e] @ tiles[slots[e]].

    Without `slots`, e itself is the number of the tile. The tiles are (in, out) here.
    """
    size = tiles.shape[1]
    if len(x) <= FEW_TOKENS and size <= SMALL_TILE:
        ordered = tiles if slots is None else tiles[slots]
        return _gather_few(_widen(x), _widen(ordered), starts, sources, bias).to(x.dtype)
    tiles, outputs = _widen(tiles), []
    for chunk in x.split(TOKENS_PER_CHUNK):
        blocks = _widen(chunk).split(size, 1)
        y = tiles.new_zeros(len(chunk), (len(starts) - 1) * size)
        if bias is not None:
            y += bias
        for j, out in enumerate(y.split(size, 1)):
            for e in range(starts[j], starts[j + 1]):
                out.addmm_(blocks[sources[e]], tiles[e if slots is None else slots[e]])
        outputs.append(y.to(x.dtype))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _gather_few(x: Tensor, tiles: Tensor, starts: list[int], sources: list[int], bias: Tensor | None) -> Tensor:
    """The same sums as `_gather`, with one batched call for all tiles."""
    size, num_blocks = tiles.shape[1], len(starts) - 1
    blocks = x.view(len(x), x.shape[1] // size, size).transpose(0, 1)
    with torch.autocast(x.device.type, enabled=False):  # which would sum in half precision
        products = torch.bmm(blocks[sources], tiles)
    counts = torch.tensor(starts, device=x.device).diff()
    owners = torch.arange(num_blocks, device=x.device).repeat_interleave(counts)
    y = tiles.new_zeros(num_blocks, len(x), size).index_add_(0, owners, products)
    y = y.transpose(0, 1).reshape(len(x), num_blocks * size)
    return y if bias is None else y + bias


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
