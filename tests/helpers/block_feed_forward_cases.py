"""Operands of two block-sparse products with a GELU in between, and the dense float64 results that kernels are held to.

Not a test module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseift_llm.ops.block_feed_forward import block_feed_forward_op
from sparseift_llm.ops.tiles import dense_weight
from sparseift_llm.topology import blocks
from tests.helpers.block_cases import SUM_DTYPE, activation, normal_source

GRADIENTS = ("x", "up", "up_bias", "down", "down_bias")
STEEPEST, MOST_CURVED = 1.13, 0.8  # the largest first and second derivative of GELU
SHARE = {torch.float64: 1e-12, torch.float32: 5e-6}
GELU_ROUNDINGS = 16  # of its formula, in the sums' dtype


@dataclass
class Case:
    """Operands; block counts are (in, hidden, out)."""

    x: Tensor
    up: Tensor
    up_bias: Tensor | None
    up_columns: Tensor
    down: Tensor
    down_bias: Tensor | None
    down_columns: Tensor
    grad: Tensor
    block_counts: tuple[int, int, int]

    @property
    def size(self) -> int:
        return self.up.shape[1]

    def dense(self, name: str) -> Tensor:
        inputs, hidden, outputs = (count * self.size for count in self.block_counts)
        shape = (hidden, inputs) if name == "up" else (outputs, hidden)
        return dense_weight(getattr(self, name).double(), getattr(self, f"{name}_columns"), *shape)

    def expected(self) -> dict[str, Tensor]:
        """By autograd on dense float64 matrices; the gradients of tiles are cut out of theirs."""
        values = {name: None if (value := getattr(self, name)) is None else value.double() for name in GRADIENTS}
        values |= {"up": self.dense("up"), "down": self.dense("down")}
        leaves = {name: value.detach().requires_grad_() for name, value in values.items() if value is not None}
        hidden = F.linear(leaves["x"], leaves["up"], leaves.get("up_bias"))
        y = F.linear(F.gelu(hidden, approximate="tanh"), leaves["down"], leaves.get("down_bias"))
        y.backward(self.grad.double())
        found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        for name in ("up", "down"):
            found[name] = self.tiles(found[name], getattr(self, f"{name}_columns"))
        return {"y": y.detach(), **found}

    def bounds(self) -> dict[str, Tensor]:
        """How far each entry of each result may be off.

        Every intermediate may be rounded to the operands' dtype once, every addition of a sum to that of sums.
        """
        kind = torch.finfo(self.x.dtype)
        of_sum = torch.finfo(SUM_DTYPE.get(self.x.dtype, torch.float32)).eps / 2
        x, grad, up, down = self.x.double(), self.grad.double(), self.dense("up"), self.dense("down")
        up_bias, down_bias = (
            torch.zeros(len(matrix)).double() if bias is None else bias.double()
            for matrix, bias in ((up, self.up_bias), (down, self.down_bias))
        )

        def rounded(value: Tensor) -> Tensor:
            return kind.eps / 2 * value.abs() + kind.tiny

        def summed(left: Tensor, left_error: Tensor | float, right: Tensor, addend: Tensor | float = 0.0) -> Tensor:
            """Of left @ right + addend, with an error in left."""
            magnitudes = left.abs() @ right.abs() + abs(addend)
            carried = left_error @ right.abs() if isinstance(left_error, Tensor) else 0.0
            return (len(right) + 1) * of_sum * magnitudes + carried + rounded(left @ right + addend)

        hidden = (x @ up.T + up_bias).requires_grad_()
        active = F.gelu(hidden, approximate="tanh")
        (slope,) = torch.autograd.grad(active.sum(), hidden)
        hidden, active = hidden.detach(), active.detach()
        formula = GELU_ROUNDINGS * of_sum * (1 + hidden.abs())
        hidden_error = summed(x, 0.0, up.T, up_bias)
        active_error = STEEPEST * hidden_error + formula + rounded(active)
        before = grad @ down
        before_error = STEEPEST * summed(grad, 0.0, down) + before.abs() * (MOST_CURVED * hidden_error + formula)
        grad_hidden = before * slope
        grad_error = before_error + rounded(grad_hidden)
        ones = torch.ones(len(x), 1).double()
        return {
            "y": summed(active, active_error, down.T, down_bias),
            "x": summed(grad_hidden, grad_error, up),
            "up": self.tiles(summed(grad_hidden.T, grad_error.T, x), self.up_columns),
            "up_bias": summed(grad_hidden.T, grad_error.T, ones)[:, 0],
            "down": self.tiles(summed(active.T, active_error.T, grad).T, self.down_columns),
            "down_bias": summed(grad.T, 0.0, ones)[:, 0],
        }

    def tiles(self, matrix: Tensor, columns: Tensor) -> Tensor:
        size, num_rows = self.size, len(matrix) // self.size
        rows = [((slot + 1) * num_rows - 1) // len(columns) for slot in range(len(columns))]
        cut = [
            matrix[row * size : (row + 1) * size, column * size : (column + 1) * size]
            for row, column in zip(rows, columns.tolist(), strict=True)
        ]
        return torch.stack(cut)

    def arguments(self, keep_hidden: bool) -> tuple[Any, ...]:
        inputs, hidden, outputs = self.block_counts
        return (
            self.x, self.up, self.up_bias, self.up_columns, list(blocks.by_column(self.up_columns, hidden, inputs)),
            hidden * self.size, self.down, self.down_bias, self.down_columns,
            list(blocks.by_column(self.down_columns, outputs, hidden)), outputs * self.size, keep_hidden,
        )  # fmt: skip

    def computed(self, keep_hidden: bool = False) -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in GRADIENTS}
        leaves = {name: value.detach().requires_grad_() for name, value in values.items() if value is not None}
        y, _ = block_feed_forward_op(*replace(self, **leaves).arguments(keep_hidden))
        y.backward(self.grad)
        return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def make_case(
    tokens: int = 37,
    block_counts: tuple[int, int, int] = (2, 5, 3),
    tiles: tuple[int, int] = (4, 6),
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    layout: str = "contiguous",
    seed: int = 0,
) -> Case:
    normal = normal_source(dtype, seed)
    inputs, hidden, outputs = block_counts
    return Case(
        x=activation(normal, tokens, inputs * size, layout),
        up=normal(tiles[0], size, size) / size**0.5,
        up_bias=normal(hidden * size) if bias else None,
        up_columns=blocks.random_columns(hidden, inputs, tiles[0], seed),
        down=normal(tiles[1], size, size) / size**0.5,
        down_bias=normal(outputs * size) if bias else None,
        down_columns=blocks.random_columns(outputs, hidden, tiles[1], seed + 1),
        grad=activation(normal, tokens, outputs * size, layout),
        block_counts=block_counts,
    )


def errors(case: Case, computed: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each result's entries, of what roundings allow; nan counts as infinite.

    In float32 and float64, where roundings in fact add up to far less, also of `SHARE` of the largest entry.
    """
    found, bounds = {}, case.bounds()
    expected = case.expected()
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        assert computed[name].shape == value.shape, name
        assert computed[name].dtype == case.x.dtype, name
        if value.numel():
            bound = bounds[name]
            if case.x.dtype in SHARE:
                bound = bound.clamp(max=SHARE[case.x.dtype] * float(value.abs().max()) + 1e-300)
            error = float(((computed[name].double() - value).abs() / bound).max())
            found[name] = error if error == error else float("inf")
    return found


def check(case: Case, keep_hidden: bool = False) -> None:
    found = errors(case, case.computed(keep_hidden))
    assert max(found.values(), default=0.0) <= 1, found
