"""Operands of a block-sparse feed-forward block, and the dense float64 results that kernels are held to.

Not a test module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseift_llm.ops.activations import ACTIVATIONS
from sparseift_llm.ops.block_feed_forward import block_feed_forward_op
from sparseift_llm.ops.tiles import dense_weight
from sparseift_llm.topology import blocks
from tests.helpers import block_cases
from tests.helpers.block_cases import SUM_DTYPE, normal_source

GRADIENTS = ("x", "up", "up_bias", "gate", "gate_bias", "down", "down_bias")
# the largest second derivative; that of ReLU's jump is in `Case._slope_error`
CURVATURE = {"gelu_tanh": 0.8, "gelu_erf": 0.8, "silu": 0.5, "relu": 0.0, "relu_squared": 2.0}
SHARE = {torch.float64: 1e-12, torch.float32: 5e-6}
ROUNDINGS = 16  # of an activation's formula, in the sums' dtype


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
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    gate_columns: Tensor | None = None
    activation: str = "gelu_tanh"

    @property
    def size(self) -> int:
        return self.up.shape[1]

    @property
    def projections(self) -> list[str]:
        return [name for name in ("up", "gate", "down") if getattr(self, name) is not None]

    def dense(self, name: str) -> Tensor:
        inputs, hidden, outputs = (count * self.size for count in self.block_counts)
        shape = (outputs, hidden) if name == "down" else (hidden, inputs)
        return dense_weight(getattr(self, name).double(), getattr(self, f"{name}_columns"), *shape)

    def expected(self) -> dict[str, Tensor]:
        """By autograd on dense float64 matrices; the gradients of tiles are cut out of theirs."""
        values = {name: None if (value := getattr(self, name)) is None else value.double() for name in GRADIENTS}
        values |= {name: self.dense(name) for name in self.projections}
        leaves = {name: value.detach().requires_grad_() for name, value in values.items() if value is not None}
        hidden = F.linear(leaves["x"], leaves["up"], leaves.get("up_bias"))
        function = ACTIVATIONS[self.activation].value
        if self.gate is None:
            active = function(hidden)
        else:
            active = function(F.linear(leaves["x"], leaves["gate"], leaves.get("gate_bias"))) * hidden
        y = F.linear(active, leaves["down"], leaves.get("down_bias"))
        y.backward(self.grad.double())
        found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        for name in self.projections:
            found[name] = self.tiles(found[name], getattr(self, f"{name}_columns"))
        return {"y": y.detach(), **found}

    def bounds(self) -> dict[str, Tensor]:
        """How far each entry of each result may be off.

        Every intermediate may be rounded to the operands' dtype once, every addition of a sum to that of sums. Errors
        that multiply each other are left out, as all that is here adds up the worst of every entry.
        """
        kind, of_sum = torch.finfo(self.x.dtype), self._unit
        x, grad, down = self.x.double(), self.grad.double(), self.dense("down")
        ones = torch.ones(len(x), 1).double()
        hidden, hidden_error = self._projected("up")
        before, before_error = grad @ down, self._summed(grad, 0.0, down)
        if self.gate is None:
            value, slope, value_error, slope_error = self._activated(hidden, hidden_error)
            active, active_error = value, value_error + self._rounded(value)
            grad_hidden = before * slope
            grads = {"up": (grad_hidden, slope.abs() * before_error + before.abs() * slope_error)}
        else:
            through, through_error = self._projected("gate")
            value, slope, value_error, slope_error = self._activated(through, through_error)
            value_error = value_error + self._rounded(value)
            active = value * hidden
            active_error = value_error * hidden.abs() + value.abs() * hidden_error + self._rounded(active)
            passed = before_error * hidden.abs() + before.abs() * hidden_error + self._rounded(before * hidden)
            grads = {
                "up": (before * value, before_error * value.abs() + before.abs() * value_error),
                "gate": (before * hidden * slope, passed * slope.abs() + (before * hidden).abs() * slope_error),
            }
        found = {
            "y": self._summed(active, active_error, down.T, self._bias("down")),
            "down": self.tiles(self._summed(active.T, active_error.T, grad).T, self.down_columns),
            "down_bias": self._summed(grad.T, 0.0, ones)[:, 0],
            "x": torch.zeros_like(x),
        }
        of_x = torch.zeros_like(x)
        for name, (value, error) in grads.items():
            error = error + self._rounded(value) + 4 * of_sum * value.abs() + kind.tiny
            found["x"] += self._summed(value, error, self.dense(name))
            of_x += value @ self.dense(name)
            found[name] = self.tiles(self._summed(value.T, error.T, x), getattr(self, f"{name}_columns"))
            found[f"{name}_bias"] = self._summed(value.T, error.T, ones)[:, 0]
        found["x"] += self._rounded(of_x)
        return found

    @property
    def _unit(self) -> float:
        return torch.finfo(SUM_DTYPE.get(self.x.dtype, torch.float32)).eps / 2

    def _bias(self, name: str) -> Tensor:
        bias = getattr(self, f"{name}_bias")
        return torch.zeros(len(self.dense(name))).double() if bias is None else bias.double()

    def _rounded(self, value: Tensor) -> Tensor:
        kind = torch.finfo(self.x.dtype)
        return kind.eps / 2 * value.abs() + kind.tiny

    def _summed(self, left: Tensor, left_error: Tensor | float, right: Tensor, addend: Tensor | float = 0.0) -> Tensor:
        """The error of left @ right + addend, with an error in left."""
        magnitudes = left.abs() @ right.abs() + abs(addend)
        carried = left_error @ right.abs() if isinstance(left_error, Tensor) else 0.0
        return (len(right) + 1) * self._unit * magnitudes + carried + self._rounded(left @ right + addend)

    def _projected(self, name: str) -> tuple[Tensor, Tensor]:
        """What up or gate gives, and its error."""
        x, matrix, bias = self.x.double(), self.dense(name), self._bias(name)
        return x @ matrix.T + bias, self._summed(x, 0.0, matrix.T, bias)

    def _activated(self, h: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """f(h), f'(h) and their errors, for an error in h."""
        h = h.requires_grad_()
        value = ACTIVATIONS[self.activation].value(h)
        (slope,) = torch.autograd.grad(value.sum(), h)
        h, value = h.detach(), value.detach()
        formula = ROUNDINGS * self._unit * (1 + h.abs() + value.abs())
        curvature = CURVATURE[self.activation]
        jumps = (h.abs() <= error) if self.activation == "relu" else torch.zeros_like(h)
        slope_error = curvature * error + jumps + formula
        return value, slope, (slope.abs() + curvature * error + jumps) * error + formula, slope_error

    def tiles(self, matrix: Tensor, columns: Tensor) -> Tensor:
        size, num_rows = self.size, len(matrix) // self.size
        rows = [((slot + 1) * num_rows - 1) // len(columns) for slot in range(len(columns))]
        cut = [
            matrix[row * size : (row + 1) * size, column * size : (column + 1) * size]
            for row, column in zip(rows, columns.tolist(), strict=True)
        ]
        return torch.stack(cut)

    def arguments(self, keep: str) -> tuple[Any, ...]:
        """As the operator takes them."""
        inputs, hidden, outputs = self.block_counts
        given: list[Any] = [self.x]
        for name, rows, columns in (("up", hidden, inputs), ("gate", hidden, inputs), ("down", outputs, hidden)):
            places = getattr(self, f"{name}_columns")
            tables = [] if places is None else list(blocks.by_column(places, rows, columns))
            given += [getattr(self, name), getattr(self, f"{name}_bias"), places, tables]
        return (*given, hidden * self.size, outputs * self.size, self.activation, keep)

    def computed(self, keep: str = "nothing") -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in GRADIENTS}
        leaves = {name: value.detach().requires_grad_() for name, value in values.items() if value is not None}
        y, *_ = block_feed_forward_op(*replace(self, **leaves).arguments(keep))
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
    activation: str = "gelu_tanh",
    gated: bool = False,
) -> Case:
    normal = normal_source(dtype, seed)
    inputs, hidden, outputs = block_counts
    return Case(
        x=block_cases.activation(normal, tokens, inputs * size, layout),
        up=normal(tiles[0], size, size) / size**0.5,
        up_bias=normal(hidden * size) if bias else None,
        up_columns=blocks.random_columns(hidden, inputs, tiles[0], seed),
        down=normal(tiles[1], size, size) / size**0.5,
        down_bias=normal(outputs * size) if bias else None,
        down_columns=blocks.random_columns(outputs, hidden, tiles[1], seed + 1),
        grad=block_cases.activation(normal, tokens, outputs * size, layout),
        block_counts=block_counts,
        gate=normal(tiles[0], size, size) / size**0.5 if gated else None,
        gate_bias=normal(hidden * size) if bias and gated else None,
        gate_columns=blocks.random_columns(hidden, inputs, tiles[0], seed + 2) if gated else None,
        activation=activation,
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


def check(case: Case, keep: str = "nothing") -> None:
    found = errors(case, case.computed(keep))
    assert max(found.values(), default=0.0) <= 1, found
