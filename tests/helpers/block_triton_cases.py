"""Operands of the Triton kernels on the device at hand, and the float64 products with the same zeros as their check.

Not a test module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseift_llm.ops.kernels.triton import TRITON
from sparseift_llm.topology.blocks import ByColumn, by_column

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of float32 sums: a tensor core cuts off where the interpreter rounds, hence not half of it
UNIT = 2.0**-23


@dataclass(frozen=True)
class Problem:
    """One block-sparse product: the tiles with their index, activations and upstream gradient."""

    weight: Tensor
    columns: Tensor
    by_column: ByColumn
    bias: Tensor | None
    x: Tensor
    grad: Tensor

    @property
    def tile(self) -> int:
        return self.weight.shape[1]

    def rows(self) -> list[int]:
        """Block-row of every slot, by the definition of the storage: row r ends at slot (r+1)*N//R."""
        slots, rows = len(self.weight), self.grad.shape[1] // self.tile
        return [row for row in range(rows) for _ in range(row * slots // rows, (row + 1) * slots // rows)]

    def dense(self) -> Tensor:
        """The float64 matrix with the same zeros."""
        tile = self.tile
        matrix = torch.zeros(self.grad.shape[1], self.x.shape[1], dtype=torch.float64, device=DEVICE)
        for slot, (row, column) in enumerate(zip(self.rows(), self.columns.tolist(), strict=True)):
            matrix[row * tile :, column * tile :][:tile, :tile] = self.weight[slot]
        return matrix

    def tiles_of(self, matrix: Tensor) -> Tensor:
        """(N, b, b): the active tiles of a dense matrix."""
        tile = self.tile
        places = zip(self.rows(), self.columns.tolist(), strict=True)
        tiles = [matrix[row * tile :, column * tile :][:tile, :tile] for row, column in places]
        return torch.stack(tiles) if tiles else matrix.new_zeros(0, tile, tile)


def problem(
    tile: int,
    rows: int,
    columns: int,
    slots: int,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    first_column: int = 0,
    seed: int = 0,
) -> Problem:
    """Random tiles in the given number of block-rows and block-columns; those before `first_column` are empty."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    order: list[int] = []
    for row in range(rows):
        count = (row + 1) * slots // rows - row * slots // rows
        choice = torch.randperm(columns - first_column, generator=generator)[:count] + first_column
        order += sorted(choice.tolist())
    assert len(order) == slots
    index = torch.tensor(order, dtype=torch.int32, device=DEVICE)
    return Problem(
        weight=values(slots, tile, tile),
        columns=index,
        by_column=by_column(index, rows, columns),
        bias=values(rows * tile) if bias else None,
        x=values(tokens, columns * tile),
        grad=values(tokens, rows * tile),
    )


def run(given: Problem) -> dict[str, Tensor]:
    rows, columns = given.grad.shape[1], given.x.shape[1]
    return {
        "forward": TRITON.forward(given.x, given.weight, given.bias, given.columns, rows),
        "input_gradient": TRITON.input_gradient(given.grad, given.weight, given.by_column, rows, columns),
        "weight_gradient": TRITON.weight_gradient(given.grad, given.x, given.columns, given.tile),
    }


def check_close(actual: Tensor, left: Tensor, right: Tensor, added: Tensor | None, select: Any) -> None:
    """`actual` is left @ right + added up to the error bound of a float32 sum and one rounding to its dtype."""
    left, right = left.double(), right.double()
    extra = torch.zeros((), dtype=torch.float64, device=DEVICE) if added is None else added.double()
    expected, size = select(left @ right + extra), select(left.abs() @ right.abs() + extra.abs())
    assert actual.shape == expected.shape
    kind = torch.finfo(actual.dtype)
    # one rounding: to the next number, not the nearest, because the interpreter cuts bfloat16 off
    bound = (left.shape[1] + 1) * UNIT * size + kind.eps * expected.abs() + kind.smallest_normal
    error = (actual.double() - expected).abs()
    assert bool((error <= bound).all()), f"error {error.max():.2e}, of bound {(error / bound).max():.2f}"


def check_forward(given: Problem, actual: Tensor) -> None:
    assert actual.dtype == given.x.dtype
    check_close(actual, given.x, given.dense().T, given.bias, lambda matrix: matrix)


def check_input_gradient(given: Problem, actual: Tensor) -> None:
    assert actual.dtype == given.grad.dtype
    check_close(actual, given.grad, given.dense(), None, lambda matrix: matrix)


def check_weight_gradient(given: Problem, actual: Tensor) -> None:
    assert actual.dtype == given.x.dtype
    check_close(actual, given.grad.T, given.x, None, given.tiles_of)


CHECKS: dict[str, Callable[[Problem, Tensor], None]] = {
    "forward": check_forward,
    "input_gradient": check_input_gradient,
    "weight_gradient": check_weight_gradient,
}


def check(given: Problem) -> None:
    for name, actual in run(given).items():
        CHECKS[name](given, actual)
