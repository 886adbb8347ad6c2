"""The block-sparse products of a feed-forward layer, with their float64 results and the times that are predicted.

gpu.py measures them, and gpu_tma.py checks them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseift_llm.ops.kernels.triton import TRITON
from sparseift_llm.ops.kernels.triton_launch import (
    MULTIPROCESSORS,
    Epilogue,
    Operand,
    empty_token_sums,
    product,
    token_pieces,
)
from sparseift_llm.topology import blocks

TENSOR_FLOPS, BYTES_PER_S = (
    650e12,
    4.8e12,
)  # of an H200: a large dense bfloat16 product, and its memory by its data sheet
LARGEST_ERROR = 1e-2  # of a product of bfloat16, relative to its norm
START_STEPS = 2.3  # of 64 features: what a program takes besides its loop
STEP = 64


@dataclass(frozen=True)
class Setting:
    """What is measured: sizes, and how often."""

    device: str
    dtype: torch.dtype
    tokens: int
    hidden: int
    tile: int
    calls: int


REAL = Setting("cuda", torch.bfloat16, 16384, 768, 128, 30)
DRY = Setting("cpu", torch.float32, 70, 16, 16, 1)


@dataclass(frozen=True)
class Shape:
    """A block-sparse matrix of (rows, columns) tiles of which `tiles` are active."""

    name: str
    rows: int
    columns: int
    tiles: int


def shapes(setting: Setting) -> list[Shape]:
    """Those of an FFN hidden -> 4 hidden made Wide 75%, at the widths of scope `model` and of scope `ffn`."""
    side = setting.hidden // setting.tile
    tiles = 4 * side * side
    wide = [Shape("up", 8 * side, 2 * side, tiles), Shape("down", 2 * side, 8 * side, tiles)]
    return [*wide, Shape("up, scope ffn", 16 * side, side, tiles), Shape("down, scope ffn", side, 16 * side, tiles)]


# ---- what is predicted


def predicted_product(setting: Setting, counts: Sequence[int], written: int) -> float:
    """Seconds of a product whose output blocks have `counts` tiles, and that writes `written` bytes.

    Programs are handed out in order to the first of 2 * MULTIPROCESSORS places that is free, each with half of a
    multiprocessor's rate. A program takes START_STEPS and one step per 64 features.
    """
    block = 128
    step = 2 * block * setting.tile * STEP / (TENSOR_FLOPS / (2 * MULTIPROCESSORS))
    places = [0.0] * (2 * MULTIPROCESSORS)
    for count in sorted(counts, reverse=True):
        for _ in range(math.ceil(setting.tokens / block)):
            heapq.heappush(places, heapq.heappop(places) + (START_STEPS + count * setting.tile / STEP) * step)
    return max(max(places), written / BYTES_PER_S)


def predicted_weight_gradient(setting: Setting, tiles: int) -> float:
    """Seconds of a weight gradient: rounds of pieces on the busiest multiprocessor, and the pieces' sums in memory."""
    pieces = token_pieces(tiles, setting.tokens)
    whole = 2 * setting.tokens * setting.tile**2 / (TENSOR_FLOPS / MULTIPROCESSORS)
    passed_on = 8 * pieces * tiles * setting.tile**2 / BYTES_PER_S if pieces > 1 else 0.0
    return math.ceil(tiles * pieces / MULTIPROCESSORS) / pieces * whole + passed_on


def predicted_feed_forward(setting: Setting) -> float:
    """Seconds of both passes of the block-sparse FFN: its six products, and the sum of the last bias' gradient."""
    up, down, *_ = shapes(setting)
    wide, narrow = (setting.tokens * shape.rows * setting.tile * 2 for shape in (up, down))
    total = predicted_product(setting, [up.tiles // up.rows] * up.rows, 2 * wide)
    total += predicted_product(setting, [down.tiles // down.rows] * down.rows, narrow)
    total += predicted_product(setting, [down.tiles // down.columns] * down.columns, 3 * wide)
    total += predicted_product(setting, [up.tiles // up.columns] * up.columns, narrow)
    return total + 2 * predicted_weight_gradient(setting, up.tiles) + narrow / BYTES_PER_S


# ---- the products


def normal(setting: Setting, *shape: int) -> Tensor:
    return torch.randn(*shape, device=setting.device, dtype=setting.dtype)


class Product(NamedTuple):
    """A product of a shape: the call, its result in float64, its FLOPs, and the seconds that are predicted for it."""

    name: str
    run: Callable[[], Tensor]
    expected: Tensor
    flops: int
    predicted: float

    def error(self, result: Tensor) -> float:
        """The relative error of a result, in the norm of its matrix."""
        return float((result.double() - self.expected).norm() / self.expected.norm())


def products(setting: Setting, shape: Shape) -> Iterator[Product]:
    """The three products of a shape, and those of a feed-forward block with their elementwise work."""
    tile, tokens = setting.tile, setting.tokens
    rows, columns = shape.rows * tile, shape.columns * tile
    places = blocks.random_columns(shape.rows, shape.columns, shape.tiles, 0).to(setting.device)
    tables = blocks.by_column(places, shape.rows, shape.columns)
    weight, bias = normal(setting, shape.tiles, tile, tile) / tile**0.5, normal(setting, rows)
    x, grad = normal(setting, tokens, columns), normal(setting, tokens, rows)
    of_slot = blocks.rows_of_slots(shape.tiles, shape.rows).to(setting.device)
    dense = torch.zeros(shape.rows, shape.columns, tile, tile, device=setting.device, dtype=torch.float64)
    dense[of_slot, places.long()] = weight.double()
    dense = dense.transpose(1, 2).reshape(rows, columns)
    flops = 2 * tokens * shape.tiles * tile**2
    per_row = torch.bincount(of_slot, minlength=shape.rows).tolist()
    per_column = tables.starts.diff().tolist()

    out_bytes, in_bytes = (tokens * width * x.element_size() for width in (rows, columns))
    y = x.double() @ dense.T + bias.double()
    straight, transposed = Operand(x, weight, places), Operand.transposed(grad, weight, tables)
    forward = predicted_product(setting, per_row, out_bytes)
    yield Product("forward", lambda: product(straight, bias, rows, rows), y, flops, forward)
    with_gelu = Epilogue("gelu_tanh", torch.empty_like(grad))
    y = F.gelu(y, approximate="tanh")
    forward = predicted_product(setting, per_row, 2 * out_bytes)
    yield Product("forward and GELU", lambda: product(straight, bias, rows, rows, with_gelu), y, flops, forward)
    del y
    grad_x = grad.double() @ dense
    backward = predicted_product(setting, per_column, in_bytes)
    yield Product("input gradient", lambda: product(transposed, None, rows, columns), grad_x, flops, backward)
    # of up and gate: here both are the same
    backward = predicted_product(setting, [2 * count for count in per_column], in_bytes)
    yield Product(
        "two input gradients",
        lambda: product(transposed, None, rows, columns, second=transposed),
        2 * grad_x,
        2 * flops,
        backward,
    )
    sums = empty_token_sums(tokens, columns, x.device)
    with_derivative = Epilogue("gelu_tanh", x, active=torch.empty_like(x), sums=sums)
    slope = torch.ops.aten.gelu_backward(grad_x, x.double(), approximate="tanh")
    del grad_x
    yield Product(
        "input gradient and GELU's",
        lambda: product(transposed, None, rows, columns, with_derivative),
        slope,
        flops,
        predicted_product(setting, per_column, 3 * in_bytes),
    )
    del slope
    full = (grad.double().T @ x.double()).view(shape.rows, tile, shape.columns, tile).transpose(1, 2)
    yield Product(
        "weight gradient",
        lambda: TRITON.weight_gradient(grad, x, places, tile),
        full[of_slot, places.long()],
        flops,
        predicted_weight_gradient(setting, shape.tiles),
    )
