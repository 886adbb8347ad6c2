"""Operands of one block-sparse product, and the float64 products with the same zeros that kernels are held to.

Not a test module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparseift_llm.ops.kernels.base import Kernel
from sparseift_llm.ops.kernels.native import NATIVE
from sparseift_llm.topology import blocks

NEEDS_COMPILER = pytest.mark.skipif(not NATIVE.is_available(), reason="no C++ compiler")
# what a sum is rounded to at each addition: float32, or wider for wider operands
SUM_DTYPE = {torch.float64: torch.float64}
LAYOUTS = ("contiguous", "strided", "transposed", "expanded")


@dataclass
class Case:
    """Operands of one product, and the same matrix dense in float64."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    columns: Tensor
    grad: Tensor
    num_rows: int
    num_columns: int

    @property
    def block_size(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.num_rows * self.block_size

    @property
    def dense(self) -> Tensor:
        """(out, in), filled tile by tile with the slowest code there is."""
        size = self.block_size
        matrix = torch.zeros(self.out_features, self.num_columns * size, dtype=torch.float64)
        starts = [row * len(self.columns) // self.num_rows for row in range(self.num_rows + 1)]
        for row in range(self.num_rows):
            for slot in range(starts[row], starts[row + 1]):
                column = int(self.columns[slot])
                matrix[row * size : (row + 1) * size, column * size : (column + 1) * size] = self.weight[slot].double()
        return matrix

    def expected(self, absolute: bool = False) -> dict[str, Tensor]:
        """The three products, or those of the operands' absolute values."""
        x, grad, dense = self.x.double(), self.grad.double(), self.dense
        bias = torch.zeros(self.out_features).double() if self.bias is None else self.bias.double()
        if absolute:
            x, grad, dense, bias = x.abs(), grad.abs(), dense.abs(), bias.abs()
        full = (grad.T @ x).view(self.num_rows, self.block_size, self.num_columns, self.block_size)
        rows = [((slot + 1) * self.num_rows - 1) // len(self.columns) for slot in range(len(self.columns))]
        tiles = [full[row, :, int(column)] for row, column in zip(rows, self.columns, strict=True)]
        return {"output": x @ dense.T + bias, "input": grad @ dense, "weight": torch.stack(tiles)}

    def computed(self, kernel: Kernel) -> dict[str, Tensor]:
        by_column = blocks.by_column(self.columns, self.num_rows, self.num_columns)
        in_features = self.num_columns * self.block_size
        return {
            "output": kernel.forward(self.x, self.weight, self.bias, self.columns, self.out_features),
            "input": kernel.input_gradient(self.grad, self.weight, by_column, self.out_features, in_features),
            "weight": kernel.weight_gradient(self.grad, self.x, self.columns, self.block_size),
        }


def normal_source(dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    """Draws normal tensors of the shapes that it is called with."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def activation(normal: Callable[..., Tensor], tokens: int, width: int, layout: str) -> Tensor:
    """(tokens, width); `expanded` is one row for all tokens, as the gradient of a sum is one number for all."""
    if layout == "strided":
        return normal(2 * tokens, width + 3)[::2, 1 : width + 1]
    if layout == "transposed":
        return normal(width, tokens).T
    return normal(1, width).expand(tokens, width) if layout == "expanded" else normal(tokens, width)


@contextlib.contextmanager
def num_threads(number: int) -> Iterator[None]:
    """Of torch, and so of the native kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_case(
    tokens: int = 37,
    rows: int = 3,
    columns: int = 5,
    num_tiles: int = 7,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    layout: str = "contiguous",
    seed: int = 0,
) -> Case:
    normal = normal_source(dtype, seed)
    return Case(
        x=activation(normal, tokens, columns * size, layout),
        weight=normal(num_tiles, size, size),
        bias=normal(rows * size) if bias else None,
        columns=blocks.random_columns(rows, columns, num_tiles, seed),
        grad=activation(normal, tokens, rows * size, layout),
        num_rows=rows,
        num_columns=columns,
    )


def errors(case: Case, computed: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each product's entries, of what a sum and one rounding to its dtype allow; nan: infinite."""
    result, magnitudes = {}, case.expected(absolute=True)
    counts = {"output": case.x.shape[1] + 1, "input": case.grad.shape[1], "weight": len(case.x)}
    kind, sums = torch.finfo(case.x.dtype), torch.finfo(SUM_DTYPE.get(case.x.dtype, torch.float32))
    for name, expected in case.expected().items():
        assert computed[name].shape == expected.shape, name
        assert computed[name].dtype == case.x.dtype, name
        if expected.numel():
            bound = counts[name] * sums.eps / 2 * magnitudes[name] + kind.eps / 2 * expected.abs() + kind.tiny
            error = float(((computed[name].double() - expected).abs() / bound).max())
            result[name] = error if error == error else float("inf")
    return result


def check(case: Case, kernel: Kernel) -> None:
    found = errors(case, case.computed(kernel))
    assert max(found.values(), default=0.0) <= 1, found
