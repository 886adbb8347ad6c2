"""The two collectives of dynamic sparse training: the global batch's gradient, and agreement on masks.

Both do nothing in a single process. Every rank must call them in the same order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from sparseift_llm.mask_file import digest


def world_size() -> int:
    """Number of ranks, 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of `tensor` over all ranks, in place; the same bits on every rank."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def check_same_masks(masks: dict[str, Tensor], step: int) -> None:
    """Compare every mask's digest over the ranks.

    Raises:
        RuntimeError: on all ranks, naming the first layer that differs.
    """
    if world_size() == 1 or not masks:
        return
    own = [int(digest({name: mask})[:15], 16) for name, mask in masks.items()]
    device = next(iter(masks.values())).device
    digests = torch.tensor(own, dtype=torch.int64, device=device)
    gathered = [torch.empty_like(digests) for _ in range(world_size())]
    dist.all_gather(gathered, digests)
    differs = torch.stack([other != gathered[0] for other in gathered]).any(0)
    if differs.any():
        name = list(masks)[int(differs.nonzero()[0])]
        raise RuntimeError(f"ranks hold different masks after step {step}, first in {name}; training cannot go on")
