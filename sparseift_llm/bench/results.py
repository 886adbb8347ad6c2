"""What the rows of both levels have in common: the floor under their times, and the keys of their results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparseift_llm.bench.measure import seconds_of
from sparseift_llm.bench.rows import VARIANTS, Row


def floor_seconds(row: Row, flops: float, traffic: float) -> float:
    """The longer of two times: the FLOPs at the rate of a dense product, and the bytes at the rate of a copy.

    The rate of the product is the better one of the row's dtype and float32, because a CPU may multiply bfloat16 more
    slowly.

    Args:
        row: gives the device, the dtype and the number of tokens.
        flops: multiply-adds of the contestant, counted as two each.
        traffic: bytes that it has to read or write at least.
    """
    gemm = min(gemm_seconds(row, dtype) for dtype in {row.dtype, torch.float32})
    source = torch.zeros(32 << 20, device=row.device)
    target = torch.zeros_like(source)
    copying = statistics.median(seconds_of(lambda: target.copy_(source), row.device) for _ in range(7))
    return max(flops * gemm / gemm_flops(row), traffic * copying / (2 * source.nbytes))


def gemm_flops(row: Row) -> float:
    """FLOPs of the product that `gemm_seconds` times."""
    return 2.0 * row.tokens * 768 * 3072


def gemm_seconds(row: Row, dtype: torch.dtype) -> float:
    """Median seconds of a product of (tokens, 768) and (768, 3072)."""
    left = torch.randn(row.tokens, 768, device=row.device, dtype=dtype)
    right = torch.randn(768, 3072, device=row.device, dtype=dtype)
    return statistics.median(seconds_of(lambda: left @ right, row.device) for _ in range(7))


def row_result(
    row: Row, total: Mapping[str, float], floor: float, states: Mapping[str, int], peaks: Mapping[str, int]
) -> dict[str, Any]:
    """What every row reports, whatever its level.

    Args:
        row: the setting.
        total: seconds of each contestant.
        floor: seconds, see `floor_seconds`.
        states: bytes of parameters, gradients, masks or tile indices, and at level `step` of the optimizer.
        peaks: bytes at the peak of a pass or step, beyond what was allocated before it.
    """
    return {
        "name": row.name,
        "level": row.level,
        "device": row.device,
        "dtype": str(row.dtype).removeprefix("torch."),
        "tile": row.tile,
        "tokens": row.tokens,
        "hidden": row.hidden,
        **{f"{name}_s": total[name] for name in VARIANTS},
        "ratio_masked": total["masked"] / total["dense"],
        "ratio_block": total["block"] / total["dense"],
        "gemm_flops_per_s": gemm_flops(row) / gemm_seconds(row, row.dtype),
        "floor_s": floor,
        "ratio_floor": total["block"] / floor,
        "state_bytes_ratio": states["block"] / states["dense"],
        "state_bytes_ratio_masked": states["masked"] / states["dense"],
        **{f"{name}_peak_bytes": peaks[name] for name in VARIANTS},
    }


def buffer_bytes(module: nn.Module) -> int:
    """Bytes of all buffers: masks, or the indices of tiles."""
    return sum(buffer.nbytes for buffer in module.buffers())
