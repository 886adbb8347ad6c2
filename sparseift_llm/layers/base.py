"""What every sparse projection offers to surgery, mask updates and checkpoints, whatever its storage.

The storages themselves are in masked.py and block.py; who sets a mask, and when, is not known here.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparseift_llm.ops.dense_gradient import DenseGradient

_WRAPPERS = re.compile(r"^(module\.)+|_checkpoint_wrapped_module\.")


class SparseProjection(nn.Module):
    """A sparse linear map in place of a dense projection.

    Attributes:
        weight: the parameter.
        mask: bool tensor, one entry per unit that is active or not (a weight, or a tile).
        dense_shape: (out, in) of the dense projection this one replaces.
        num_active: active weights that the plan gives this layer.
        dense_gradient: where the next backward passes add the gradient of all weights, or None.
    """

    weight: Tensor
    bias: Any
    mask: Tensor
    dense_shape: tuple[int, int]
    num_active: int
    dense_gradient: DenseGradient | None

    @property
    def unit_size(self) -> int:
        """Weights per entry of the mask."""
        raise NotImplementedError

    def count_active(self) -> int:
        """Active weights according to the mask as it is now."""
        return int(self.mask.sum()) * self.unit_size

    @property
    def topology_bytes(self) -> int:
        """Bytes of the buffers that say which weights are active."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    def accepts(self, mask: Tensor) -> bool:
        """Whether `set_mask` would take a mask, as far as its shape and its number of active units go."""
        return mask.shape == self.mask.shape

    def weights_fit(self, mask: Tensor) -> bool:
        """Whether the weights as they are can be those of `mask`, which `accepts` takes."""
        raise NotImplementedError

    def set_mask(self, mask: Tensor) -> Tensor:
        """Take over `mask`; weights that become inactive are lost, those that become active are 0.

        Returns:
            Bool tensor, broadcastable to the weight's shape, true where the weight now stands for
            something else or for nothing, so that optimizer state must be zeroed there.
        """
        raise NotImplementedError

    @property
    def topology(self) -> Tensor:
        """The buffer that says what the weights stand for: the mask, or the column of every tile."""
        raise NotImplementedError

    def load_topology(self, topology: Tensor) -> None:
        """Take over another copy's `topology` together with its weights, which are not touched here."""
        raise NotImplementedError

    @property
    def is_frozen(self) -> bool:
        """Whether the weight takes no gradient; its mask does not change then."""
        return not self.weight.requires_grad

    @property
    def gradient_shape(self) -> tuple[int, ...]:
        """Shape of the dense gradient that `dense_gradient` captures."""
        raise NotImplementedError

    @property
    def gathered_bytes(self) -> int:
        """Bytes that `magnitude` gathers over ranks: none, unless the weight is sharded."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32) if self.unit_size > 1 else self.weight.dtype
        size = self.weight.numel() // self.unit_size * dtype.itemsize
        return size if isinstance(self.weight, DTensor) else 0

    def zero_inactive(self) -> None:
        """Set inactive weights that are stored to exactly 0."""
        raise NotImplementedError

    def restore_buffers(self) -> None:
        """Make buffers that are not part of the state dict fit a parameter and buffers that were just loaded."""
        raise NotImplementedError

    def magnitude(self) -> Tensor:
        """L1 norm of the weights of every unit, of the mask's shape."""
        raise NotImplementedError

    def growth_scores(self, dense_gradient: Tensor) -> Tensor:
        """L1 norm of every unit's gradient, of the mask's shape, from what `dense_gradient` captured."""
        raise NotImplementedError

    def exchange(self, fraction: float, growth: Tensor, phase: float) -> Tensor:
        """The mask after dropping `fraction` of the active units and growing as many.

        Args:
            fraction: in [0, 1].
            growth: finite scores of the mask's shape; the largest inactive ones grow.
            phase: in [0, 1), see `topology.blocks.changes_per_row`.
        """
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """The stock layer with this one's weights, zeros filled in."""
        raise NotImplementedError

    def describe(self) -> str:
        """Sparsity, counts and the dense twin, for `extra_repr`."""
        size = self.mask.numel() * self.unit_size
        active = self.num_active if self.mask.is_meta else self.count_active()
        rows, columns = self.dense_shape
        return f"sparsity={1 - active / size:.4f}, active {active:,} of {size:,}, replaces {columns}->{rows}"


def sparse_layers(model: nn.Module) -> dict[str, SparseProjection]:
    """All sparse projections of a model by module path, in the model's own order.

    Prefixes that wrappers add (DistributedDataParallel, torch.compile, AveragedModel) and activation checkpointing's
    infixes are taken off.
    """
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, SparseProjection)}


def plain_name(name: str) -> str:
    """A module path without what wrappers add to it."""
    return _WRAPPERS.sub("", name.replace("_orig_mod.", ""))
