"""The mask-update rules: static, SET, RigL and gradual magnitude pruning (GMP).

An algorithm looks at one layer at a time and returns its next mask. When to ask it, and what happens to
weights and optimizer state, is the controller's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseift_llm.config.transform import DSTConfig
from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.topology.exchange import drop_and_grow
from sparseift_llm.topology.masks import derive_seed, random_phase, random_scores
from sparseift_llm.training import schedules


class Static:
    """Masks never change. Base of the others.

    Args:
        config: the schedule.
        total_steps: optimizer steps of the whole run.
        seed: seeds random growth.
    """

    needs_dense_gradient = False

    def __init__(self, config: DSTConfig, total_steps: int, seed: int) -> None:
        self.config = config
        self.stop = schedules.stop_step(total_steps, config.stop_fraction)
        self.seed = seed

    def is_update_step(self, step: int) -> bool:
        """Whether masks change right after optimizer step `step`."""
        return False

    def next_mask(self, layer: SparseProjection, step: int, index: int, growth: Tensor | None) -> Tensor:
        """The layer's mask after `step`.

        Args:
            layer: a sparse projection, weights already updated by the optimizer.
            step: optimizer step, from 1.
            index: the layer's place in the model.
            growth: L1 norm of the global batch's gradient of every unit, if `needs_dense_gradient`.

        Returns:
            Bool mask, of the shape and on the device of the layer's.
        """
        return layer.current_mask()


class SET(Static):
    """Drop the smallest weights, grow at random. Source: arXiv 1707.04780."""

    def is_update_step(self, step: int) -> bool:
        return schedules.is_update_step(step, self.config.update_every_steps, self.stop)

    def next_mask(self, layer: SparseProjection, step: int, index: int, growth: Tensor | None) -> Tensor:
        fraction = schedules.cosine_drop_fraction(step, self.stop, self.config.drop_fraction)
        phase = random_phase(derive_seed(self.seed, "phase", step, index))
        mask, groups = layer.current_mask(), layer.groups
        num_exchanged = groups.num_exchanged(groups.count(mask), fraction, phase)
        scores = self.growth_scores(layer, step, index, growth)
        return drop_and_grow(mask, layer.magnitude(), scores, num_exchanged, groups)

    def growth_scores(self, layer: SparseProjection, step: int, index: int, growth: Tensor | None) -> Tensor:
        """Scores of the mask's shape; the largest among the inactive ones grow."""
        seed = derive_seed(self.seed, "growth", step, index)
        return random_scores(layer.mask_shape, seed).to(layer.weight.device)


class RigL(SET):
    """SET that grows where the dense gradient is largest. Source: arXiv 1911.11134."""

    needs_dense_gradient = True

    def growth_scores(self, layer: SparseProjection, step: int, index: int, growth: Tensor | None) -> Tensor:
        assert growth is not None
        return growth


class GMP(Static):
    """Start dense, prune the smallest weights along a cubic ramp. Source: arXiv 1710.01878."""

    def is_update_step(self, step: int) -> bool:
        return schedules.is_pruning_step(step, self.config.update_every_steps, self.stop)

    def next_mask(self, layer: SparseProjection, step: int, index: int, growth: Tensor | None) -> Tensor:
        mask, groups = layer.current_mask(), layer.groups
        sizes = groups.count(torch.ones_like(mask)).tolist()
        targets = groups.share(layer.num_active).tolist()
        pairs = zip(sizes, targets, strict=True)
        num_active = torch.tensor([self._num_active(step, size, target) for size, target in pairs], device=mask.device)
        return groups.largest(layer.magnitude(), mask, num_active.minimum(groups.count(mask)))

    def _num_active(self, step: int, size: int, target: int) -> int:
        """Active weights after `step` of a group of `size` weights, of which `target` stay in the end."""
        if step >= self.stop:
            return target
        return size - int(size * schedules.cubic_sparsity(step, self.stop, 1 - target / size))


ALGORITHMS: dict[str, type[Static]] = {"static": Static, "set": SET, "rigl": RigL, "gmp": GMP}
