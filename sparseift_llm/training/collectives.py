"""The collectives of mask updates: the global batch's gradient, and agreement on masks; and what they cost.

They do nothing in a single process. Every rank must call them in the same order, and an error that
only one rank sees is made known to all before any of them raises, so that none is left waiting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparseift_llm.checkpoints.mask_file import digest
from sparseift_llm.layers.base import SparseProjection


def world_size() -> int:
    """Number of ranks, 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def no_gradient(layer: SparseProjection) -> Tensor:
    """What a rank that did not use the layer adds to its dense gradient."""
    return torch.zeros(layer.gradient_shape, dtype=gradient_dtype(layer), device=layer.topology.device)


def gradient_dtype(layer: SparseProjection) -> torch.dtype:
    """In which all ranks add up the layer's dense gradient."""
    return torch.promote_types(layer.weight.dtype, torch.float32)


@dataclass
class UpdateCost:
    """What mask updates took on this rank since the controller was created, the ranks' waiting for each other included.

    Attributes:
        num_updates: updates.
        seconds: time between the optimizer's own step and the end of the update.
        num_bytes: bytes of the tensors reduced or gathered over ranks.
    """

    num_updates: int = 0
    seconds: float = 0.0
    num_bytes: int = 0


class Ranks:
    """All ranks, as mask updates see them.

    Args:
        device: where the backend takes tensors: that of the weights.

    Attributes:
        num_bytes: bytes of the tensors that were reduced or gathered so far; a ring all-reduce
            moves about twice that per rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_bytes = 0

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of `tensor` over all ranks, in place; the same bits on every rank."""
        if world_size() > 1:
            dist.all_reduce(tensor)
            tensor /= world_size()
            self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def any_has(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        if world_size() == 1 or not flags:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(counts)
        self.num_bytes += counts.numel() * counts.element_size()
        return [bool(count) for count in counts.tolist()]

    def check_same_schedule(self, schedule: str) -> None:
        """Compare what decides when and how masks change, before ranks could wait for each other.

        Raises:
            ValueError: on all ranks, with two of the schedules.
        """
        if world_size() == 1:
            return
        gathered: list[Any] = [None] * world_size()
        dist.all_gather_object(gathered, schedule)
        other = next((found for found in gathered if found != gathered[0]), None)
        if other is not None:
            raise ValueError(f"ranks have different schedules: {gathered[0]}; {other}. Give all the same")

    def check_same_masks(self, masks: Mapping[str, Tensor] | None, step: int) -> None:
        """Compare masks and steps over the ranks: 16 bytes per rank, and names only when they differ.

        Args:
            masks: by layer name; None on a rank that has none of its own to compare.
            step: optimizer steps taken.

        Raises:
            RuntimeError: on all ranks, naming the steps or the first layer that differs.
        """
        if world_size() == 1:
            return
        own = -1 if masks is None else _number(digest(masks))
        numbers = torch.tensor([own, step], dtype=torch.int64, device=self.device)
        gathered = [torch.empty_like(numbers) for _ in range(world_size())]
        dist.all_gather(gathered, numbers)
        self.num_bytes += 16 * world_size()
        digests, steps = zip(*(found.tolist() for found in gathered), strict=True)
        if len(set(steps)) > 1:
            raise RuntimeError(f"ranks are at different steps: {sorted(set(steps))}; resume all from one checkpoint")
        if len(set(digests) - {-1}) > 1:
            name = self._first_difference(masks)
            raise RuntimeError(f"ranks hold different masks after step {step}, first in {name}; training cannot go on")

    @staticmethod
    def _first_difference(masks: Mapping[str, Tensor] | None) -> str:
        own = None if masks is None else {name: digest({name: mask}) for name, mask in masks.items()}
        gathered: list[Any] = [None] * world_size()
        dist.all_gather_object(gathered, own)
        present = [digests for digests in gathered if digests is not None]
        names = dict.fromkeys(name for digests in present for name in digests)
        return next(
            (name for name in names if len({digests.get(name) for digests in present}) > 1), "the layers' order"
        )

    @staticmethod
    def newest(is_newest: bool) -> int:
        """The highest rank that says it is the newest."""
        ranks: list[Any] = [None] * world_size()
        dist.all_gather_object(ranks, is_newest)
        return max(rank for rank, flag in enumerate(ranks) if flag)


def _number(hexadecimal: str) -> int:
    """60 bits of a digest, never negative."""
    return int(hexadecimal[:15], 16)
