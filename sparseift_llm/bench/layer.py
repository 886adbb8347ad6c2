"""Level `layer`: an FFN made Wide, its forward and its backward pass."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparseift_llm import isoflop
from sparseift_llm.bench.measure import peak_bytes, take_turns
from sparseift_llm.bench.results import buffer_bytes, floor_seconds, row_result
from sparseift_llm.bench.rows import VARIANTS, Row
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.layers.block_ffn import BlockFeedForward
from sparseift_llm.layers.masked import masked_projection
from sparseift_llm.topology.blocks import random_columns, tile_mask


class FeedForward(nn.Module):
    """An FFN of two layers of any kind, with GELU between them."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = up, nn.GELU(approximate="tanh"), down

    def forward(self, x: Tensor) -> Tensor:
        """(T, hidden) -> (T, hidden)."""
        y: Tensor = self.down(self.act(self.up(x)))
        return y


def feed_forwards(row: Row) -> dict[str, nn.Module]:
    """The dense FFN with sides (hidden, 4 hidden), and its two Wide twins.

    With scope `model` both sides are twice as long and 75% of the weights are zeros; with scope `residual`, the hidden
    side and 50%. Both twins have the same active weights: the mask of the masked one covers the tiles of the other.
    """
    hidden = row.hidden
    up, down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
    inner = 4 if row.scope == "residual" else 8
    pairs = []
    for index, linear in enumerate((up, down)):
        dense_shape = (linear.out_features, linear.in_features)
        outputs, inputs = (2 * hidden if side == hidden else inner * hidden for side in dense_shape)
        wide = nn.Linear(inputs, outputs)
        rows, columns = outputs // row.tile, inputs // row.tile
        slots = random_columns(rows, columns, int((1 - row.sparsity) * rows * columns), seed=index)
        block = BlockSparseLinear(wide, slots, row.tile, dense_shape)
        masked = masked_projection(wide, block.num_active, dense_shape)
        tiles = tile_mask(slots, rows, columns)
        masked.set_mask(tiles.repeat_interleave(row.tile, 0).repeat_interleave(row.tile, 1))
        pairs.append((masked, block))
    return {
        "dense": FeedForward(up, down),
        "masked": FeedForward(pairs[0][0], pairs[1][0]),
        "block": BlockFeedForward(FeedForward(pairs[0][1], pairs[1][1]), ("up", "act", "down")),
    }


def measure_layer(row: Row, repeats: int) -> dict[str, Any]:
    """Time the forward and backward passes of the three FFNs in turns, and count their bytes.

    Returns:
        See `row_result`, and the medians of the two passes of the dense and the block-sparse FFN.
    """
    torch.manual_seed(0)
    layers = {name: layer.to(row.device, row.dtype) for name, layer in feed_forwards(row).items()}
    width = {"dense": row.hidden, "masked": 2 * row.hidden, "block": 2 * row.hidden}
    x = {
        name: torch.randn(row.tokens, width[name], device=row.device, dtype=row.dtype, requires_grad=True)
        for name in VARIANTS
    }
    gradient = {name: torch.randn_like(x[name]) for name in VARIANTS}
    outputs: dict[str, Tensor] = {}

    def forward(name: str) -> None:
        layers[name].zero_grad()
        x[name].grad = None
        outputs[name] = layers[name](x[name])

    def backward(name: str) -> None:
        outputs.pop(name).backward(gradient[name])

    def both(name: str) -> None:
        forward(name)
        backward(name)

    parts = {name: {"forward_s": partial(forward, name), "backward_s": partial(backward, name)} for name in VARIANTS}
    times = take_turns(parts, row.device, repeats)
    total = {name: statistics.median(map(sum, zip(*times[name].values(), strict=True))) for name in VARIANTS}
    num_active = 8 * row.hidden**2
    flops = isoflop.TRAINING_FACTOR * isoflop.linear_flops(num_active) * row.tokens
    # Input, output and their gradients are each written once and read once; what is in between can stay in cache.
    traffic = 4 * row.tokens * (2 + 2) * row.hidden * x["dense"].element_size()
    states = {
        name: sum(2 * p.nbytes for p in layer.parameters()) + buffer_bytes(layer) for name, layer in layers.items()
    }
    peaks = {name: peak_bytes(partial(both, name), row.device) for name in VARIANTS}
    split = {
        f"{name}_{part}": statistics.median(values)
        for name in ("dense", "block")
        for part, values in times[name].items()
    }
    return {**row_result(row, total, floor_seconds(row, flops, traffic), states, peaks), **split}
