"""What every sparse projection offers to conversion, mask updates and checkpoints, whatever its storage.

The two storages are in masked.py and block.py. Who sets a mask, and when, is not known here.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparseift_llm.ops.dense_gradient import DenseGradient
from sparseift_llm.topology.groups import Groups

_WRAPPERS = re.compile(r"^(module\.)+|_checkpoint_wrapped_module\.")


class SparseProjection(nn.Module):
    """A sparse linear map in place of a dense projection.

    A mask has one entry per unit that is active or not. A unit is a weight, or a tile.

    Attributes:
        weight: the parameter, in a layout of the subclass.
        bias: the parameter (out,), or None.
        dense_shape: (out, in) of the dense projection that this layer replaces.
        num_active: the number of active weights that the plan gives this layer.
        dense_gradient: where the next backward passes add the gradient of all weights, or None.
        role: `projection`, or `embedding` or `logits` for the matrices at both ends of the model. Their multiply-adds
            are counted apart: looking up a row has none.
    """

    weight: Tensor
    bias: Any
    dense_shape: tuple[int, int]
    num_active: int
    dense_gradient: DenseGradient | None
    role: str = "projection"

    @property
    def unit_size(self) -> int:
        """Weights per entry of the mask."""
        raise NotImplementedError

    @property
    def mask_shape(self) -> torch.Size:
        """Shape of the mask. Nothing is computed for it."""
        raise NotImplementedError

    @property
    def num_weights(self) -> int:
        """Weights of the matrix, inactive ones included."""
        return self.mask_shape.numel() * self.unit_size

    def current_mask(self) -> Tensor:
        """Which units are active now: bool, of `mask_shape`. It must not be written to.

        A layer that stores its mask returns the stored tensor. One that stores tiles makes a new tensor at each call,
        so ask once and keep the answer, and ask `mask_shape`, `num_weights` or `count_active` where they are enough.
        """
        raise NotImplementedError

    def count_active(self) -> int:
        """The number of weights that are active now."""
        raise NotImplementedError

    @property
    def topology_bytes(self) -> int:
        """Bytes of the buffers that say which weights are active."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    def accepts(self, mask: Tensor) -> bool:
        """Whether `set_mask` would take a mask, as far as its shape and its number of active units go."""
        return mask.shape == self.mask_shape

    def weights_fit(self, mask: Tensor) -> bool:
        """Whether the present weights can be those of `mask`, which `accepts` takes."""
        raise NotImplementedError

    def set_mask(self, mask: Tensor) -> Tensor:
        """Make the units of `mask` the active ones. Weights that become inactive are lost; new ones are 0.

        Returns:
            Bool tensor, broadcastable to the weight's shape. It is true where an entry of the weight now stands for
            another weight or for none, so that optimizer state must be zeroed there.
        """
        raise NotImplementedError

    @property
    def topology(self) -> Tensor:
        """The buffer that says what the weights stand for: the mask, or the block-column of every tile."""
        raise NotImplementedError

    def load_topology(self, topology: Tensor) -> None:
        """Copy another layer's `topology`. The weights that belong to it are copied elsewhere."""
        raise NotImplementedError

    @property
    def is_frozen(self) -> bool:
        """Whether the weight takes no gradient. The mask of a frozen layer does not change."""
        return not self.weight.requires_grad

    @property
    def gradient_shape(self) -> tuple[int, ...]:
        """Shape of the dense gradient that `dense_gradient` captures."""
        raise NotImplementedError

    @property
    def gathered_bytes(self) -> int:
        """Bytes that `magnitude` gathers over ranks; 0 unless the weight is sharded."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32) if self.unit_size > 1 else self.weight.dtype
        size = self.weight.numel() // self.unit_size * dtype.itemsize
        return size if isinstance(self.weight, DTensor) else 0

    @property
    def qconfig(self) -> None:
        """None, so that torch's eager quantization (torch.ao) leaves this layer as it is; setting it warns.

        That quantization sets `qconfig` on every module of a model, and then replaces those whose class it knows. It
        says nothing of the others.
        """
        return None

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        warnings.warn(
            "torch.ao.quantization does not know sparse layers and leaves them in floating point; quantize "
            "to_dense(model) to quantize all",
            stacklevel=2,
        )

    @qconfig.deleter
    def qconfig(self) -> None:
        """Nothing to do; quantization takes the attribute off again when it has finished."""

    def zero_inactive(self) -> None:
        """Set inactive weights that are stored to exactly 0."""
        raise NotImplementedError

    def restore_buffers(self) -> None:
        """Bring buffers that are not in the state dict in line with a state that was just loaded."""
        raise NotImplementedError

    def magnitude(self) -> Tensor:
        """L1 norm of the weights of every unit, of the mask's shape; 0 for inactive units."""
        return self.unit_sums(self.weight.detach().abs())

    def unit_sums(self, values: Tensor) -> Tensor:
        """The sum of `values`, laid out and sharded as the weight is, over every unit: of the mask's shape."""
        raise NotImplementedError

    def growth_scores(self, dense_gradient: Tensor) -> Tensor:
        """L1 norm of the gradient of every unit, of the mask's shape, from what `dense_gradient` captured."""
        raise NotImplementedError

    @property
    def lines(self) -> tuple[int, ...]:
        """Along which dimensions of the mask lines may lose their last active unit, see `topology.connected`."""
        raise NotImplementedError

    @property
    def output_dim(self) -> int:
        """The dimension of the mask along which outputs follow each other."""
        return 0

    @property
    def groups(self) -> Groups:
        """The groups of units that keep their numbers of active ones."""
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """The stock layer that computes the same, with zeros filled in."""
        raise NotImplementedError

    def describe(self) -> str:
        """Sparsity, counts and the sides of the dense twin, for `extra_repr`."""
        active = self.num_active if self.topology.is_meta else self.count_active()
        rows, columns = self.dense_shape
        size = self.num_weights
        return f"sparsity={1 - active / size:.4f}, active {active:,} of {size:,}, replaces {columns}->{rows}"


def sparse_layers(model: nn.Module) -> dict[str, SparseProjection]:
    """All sparse projections of a model by module path, in the order of the model.

    Paths are without the prefixes that DistributedDataParallel, torch.compile and AveragedModel add, and without
    what activation checkpointing puts in the middle.
    """
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, SparseProjection)}


def plain_name(name: str) -> str:
    """A module path without what wrappers add to it."""
    return _WRAPPERS.sub("", name.replace("_orig_mod.", ""))
