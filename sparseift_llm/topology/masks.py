"""Unstructured masks: the first random one, and drop-and-grow. Pure functions on tensors.

Deterministic by construction: ties break by index and randomness comes from an explicit seed, so
every rank and every rerun gets the same mask.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


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


def drop_and_grow(mask: Tensor, magnitude: Tensor, growth: Tensor, num_changed: int) -> Tensor:
    """Drop the active weights of smallest magnitude, then grow as many where `growth` is largest.

    A weight just dropped competes for growth like any other inactive one, so it may come back.

    Args:
        mask: current mask, bool.
        magnitude: |w|, same shape.
        growth: growth score, same shape; looked at where the mask is 0 after the drop.
        num_changed: weights to drop and to grow, in [0, active weights].

    Returns:
        New mask with as many ones as `mask`.

    Source: RigL, arXiv 1911.11134, algorithm 1.
    """
    kept = mask & ~largest(-magnitude, mask, num_changed)
    return kept | largest(growth, ~kept, num_changed)


def magnitude_mask(mask: Tensor, magnitude: Tensor, num_active: int) -> Tensor:
    """The `num_active` largest weights among those active in `mask` (gradual magnitude pruning)."""
    return largest(magnitude, mask, num_active)
