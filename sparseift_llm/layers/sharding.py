"""Weights that FSDP2 (`fully_shard`) or ZeRO-3 has spread over ranks: this rank's part, the whole, what stands beside.

Masks and columns stay whole on every rank. Everything here is the identity for an ordinary tensor.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`; a collective for a sharded one, which every rank of its mesh must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The part of `tensor`, equal on every rank, that stands beside this rank's part of `parameter`.

    Args:
        tensor: broadcastable to the shape of `parameter`.
        parameter: a weight or optimizer state, sharded or not.

    Returns:
        A tensor broadcastable to `local(parameter)`. Nothing is communicated.
    """
    if not isinstance(parameter, DTensor):
        return tensor
    expanded = tensor.expand(parameter.shape)
    return local(distribute_tensor(expanded, parameter.device_mesh, parameter.placements, src_data_rank=None))


def is_zero3(weight: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has taken a weight's values away, up to the next forward pass."""
    return hasattr(weight, "ds_id")


def gathered(weight: Tensor) -> AbstractContextManager[Any]:
    """A context in which a weight of ZeRO-3 is whole, and keeps what is written to it; every rank must enter it."""
    if not is_zero3(weight):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([weight], modifier_rank=0)
    return context


def is_sharded(model: nn.Module) -> bool:
    """Whether any weight is spread over ranks."""
    return any(isinstance(parameter, DTensor) or is_zero3(parameter) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Free gathered copies of weights, so that `layer.weight` is the shard that the optimizer owns."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
