"""Random masks and scores, and the choice of the largest scores. Pure functions on tensors.

Deterministic by construction: ties break by index and randomness comes from an explicit seed, so
every rank and every rerun gets the same mask.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_FEW = 16  # entries of a row, up to which comparing all pairs is faster than sorting
_ROWS_AT_ONCE = 4096  # rows that are sorted together


def derive_seed(*parts: int | str) -> int:
    """A generator seed from e.g. (seed, step, layer index); nearby parts give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def random_mask(shape: torch.Size, num_active: int, seed: int) -> Tensor:
    """A uniformly random mask with exactly `num_active` ones.

    Args:
        shape: the weight's shape.
        num_active: ones, in [0, number of weights].
        seed: see `derive_seed`.

    Returns:
        Bool tensor of `shape` on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(shape.numel(), dtype=torch.bool)
    mask[torch.randperm(shape.numel(), generator=generator)[:num_active]] = True
    return mask.view(shape)


def random_rows(shape: torch.Size, per_row: int, seed: int, rows_at_once: int = _ROWS_AT_ONCE) -> Tensor:
    """A random mask whose every row has exactly `per_row` ones, uniform within the row.

    Args:
        shape: two sides; one row may stand for each of 50,000 words, so that the work is done in parts.
        per_row: ones of a row, in [0, number of columns].
        seed: see `derive_seed`.
        rows_at_once: rows of a part; another number gives the same mask.

    Returns:
        Bool tensor of `shape` on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(shape, dtype=torch.bool)
    for part in mask.split(rows_at_once):
        scores = torch.rand(part.shape, generator=generator)
        part.scatter_(1, scores.sort(dim=1, stable=True).indices[:, :per_row], True)
    return mask


def random_scores(shape: torch.Size, seed: int) -> Tensor:
    """Uniform scores in [0, 1), float64 on the CPU, the same on every machine type."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def random_phase(seed: int) -> float:
    """A uniform number in [0, 1) from `seed`."""
    return float(random_scores(torch.Size((1,)), seed))


def largest(scores: Tensor, eligible: Tensor, count: int) -> Tensor:
    """Mask of the `count` eligible positions with the largest scores; among equals the lower index wins.

    Args:
        scores: float tensor of any shape, finite where eligible.
        eligible: bool tensor of the same shape with at least `count` ones.
        count: positions to select, at least 0.

    Returns:
        Bool tensor of the same shape with exactly `count` ones.

    >>> largest(torch.tensor([1.0, 3.0, 3.0, 2.0]), torch.tensor([True, True, True, False]), 1)
    tensor([False,  True, False, False])
    """
    if count == 0:
        return torch.zeros_like(eligible)
    flat = scores.masked_fill(~eligible, -torch.inf).flatten()
    threshold = torch.kthvalue(flat, flat.numel() - count + 1).values
    selected = flat > threshold
    ties = ((flat == threshold) & eligible.flatten()).nonzero().squeeze(1)
    selected[ties[: count - int(selected.sum())]] = True
    return selected.view(scores.shape)


def largest_per_row(scores: Tensor, eligible: Tensor, counts: Tensor, rows_at_once: int = _ROWS_AT_ONCE) -> Tensor:
    """Mask of the `counts[r]` eligible entries of row r with the largest scores; among equals the lower index wins.

    Args:
        scores: (R, C), finite where eligible. One row may stand for each of 50,000 words, so that long rows are sorted
            in parts: the places of a sort take twice the memory of float32 scores.
        eligible: bool (R, C), with at least `counts[r]` ones in row r.
        counts: int (R,), on any device.
        rows_at_once: rows of a part; another number gives the same mask.
    """
    counts = counts.to(scores.device)
    if scores.shape[1] <= _FEW:
        return eligible & (_num_before(scores.T.contiguous(), eligible.T.contiguous()) < counts).T
    mask = eligible.new_zeros(eligible.shape)
    ranks = torch.arange(scores.shape[1], device=scores.device)
    parts = zip(*(rows.split(rows_at_once) for rows in (mask, scores, eligible, counts)), strict=True)
    for part, some_scores, are_eligible, numbers in parts:
        part.scatter_(1, _largest_first(some_scores, are_eligible), ranks < numbers[:, None])
    return mask


def _largest_first(scores: Tensor, eligible: Tensor) -> Tensor:
    """Columns of every row (R, C), the eligible ones first and among them the largest: int64."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order.gather(1, (~eligible).gather(1, order).sort(dim=1, stable=True).indices)


def _num_before(scores: Tensor, eligible: Tensor) -> Tensor:
    """How many eligible entries of its column come before an entry, the largest first: uint8, of the shape (C, R).

    Every pair is compared, which is faster than a sort where columns are short and many.
    """
    before = torch.zeros_like(scores, dtype=torch.uint8)
    for first in range(len(scores)):
        for second in range(first + 1, len(scores)):
            is_in_order = scores[first] >= scores[second]
            before[second] += is_in_order & eligible[first]
            before[first] += ~is_in_order & eligible[second]
    return before
