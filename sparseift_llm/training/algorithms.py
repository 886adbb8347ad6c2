"""The mask-update rules: static, SET, RigL, gradual magnitude pruning (GMP) and GraNet.

An algorithm looks at one layer at a time and returns its next mask. When to ask it, and what happens to
weights and optimizer state, is the controller's business. What is exchanged is decided in topology/exchange.py.
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

    def next_mask(
        self, layer: SparseProjection, step: int, index: int, growth: Tensor | None, importance: Tensor | None = None
    ) -> Tensor:
        """The layer's mask after `step`.

        Args:
            layer: a sparse projection, weights already updated by the optimizer.
            step: optimizer step, from 1.
            index: the layer's place in the model.
            growth: L1 norm of the global batch's gradient of every unit, if `needs_dense_gradient`.
            importance: score of every active unit, those of the smallest go; None stands for |w|.

        Returns:
            Bool mask, of the shape and on the device of the layer's.
        """
        return layer.current_mask()


class SET(Static):
    """Drop the least important weights, grow at random. Source: arXiv 1707.04780."""

    def is_update_step(self, step: int) -> bool:
        return schedules.is_update_step(step, self.config.update_every_steps, self.stop)

    def drop_fraction(self, step: int) -> float:
        """Share of active units that an update at `step` drops."""
        return schedules.DROP_SCHEDULES[self.config.drop_schedule](step, self.stop, self.config.drop_fraction)

    def next_mask(
        self, layer: SparseProjection, step: int, index: int, growth: Tensor | None, importance: Tensor | None = None
    ) -> Tensor:
        scores = self.growth_scores(layer, step, index, growth)
        return self.exchanged(layer, layer.current_mask(), step, index, scores, importance)

    def exchanged(
        self, layer: SparseProjection, mask: Tensor, step: int, index: int, scores: Tensor, importance: Tensor | None
    ) -> Tensor:
        """`mask` after the exchange of `step`, in the groups of `layer`; `scores` are those of growth."""
        groups = layer.groups
        phase = random_phase(derive_seed(self.seed, "phase", step, index))
        importance = layer.magnitude() if importance is None else importance
        num_exchanged = groups.num_exchanged(mask, importance, self.drop_fraction(step), phase)
        connected = layer.lines if self.config.keeps_connected("block" if layer.unit_size > 1 else "") else None
        # The row of a word that the batch lacks has no gradient, and nothing to choose other weights by.
        only_moving = layer.role == "embedding"
        return drop_and_grow(mask, importance, scores, num_exchanged, groups, connected, only_moving)

    def growth_scores(self, layer: SparseProjection, step: int, index: int, growth: Tensor | None) -> Tensor:
        """Scores of the mask's shape; the largest among the inactive ones grow."""
        seed = derive_seed(self.seed, "growth", step, index)
        return random_scores(layer.mask_shape, seed).to(layer.weight.device)


class RigL(SET):
    """SET that grows where the dense gradient is largest, or with `soft_growth` in proportion to it at random.

    Source: arXiv 1911.11134; sampling without replacement by exponential noise: Efraimidis and Spirakis, 2006.
    """

    needs_dense_gradient = True

    def growth_scores(self, layer: SparseProjection, step: int, index: int, growth: Tensor | None) -> Tensor:
        assert growth is not None
        if not self.config.soft_growth:
            return growth
        uniform = super().growth_scores(layer, step, index, growth)
        exponential = -torch.log1p(-uniform)
        return growth.double() / exponential.clamp(min=1e-300)  # a score of 0 stays 0


class GMP(Static):
    """Start dense, prune the least important weights along a cubic ramp. Source: arXiv 1710.01878."""

    def __init__(self, config: DSTConfig, total_steps: int, seed: int) -> None:
        super().__init__(config, total_steps, seed)
        self.start = min(schedules.start_step(total_steps, config.start_fraction), self.stop - 1)

    def is_update_step(self, step: int) -> bool:
        return step > self.start and schedules.is_pruning_step(step, self.config.update_every_steps, self.stop)

    def next_mask(
        self, layer: SparseProjection, step: int, index: int, growth: Tensor | None, importance: Tensor | None = None
    ) -> Tensor:
        mask, groups = layer.current_mask(), layer.groups
        sizes = groups.count(torch.ones_like(mask)).tolist()
        targets = groups.share(layer.num_active).tolist()
        pairs = zip(sizes, targets, strict=True)
        num_active = torch.tensor([self._num_active(step, size, target) for size, target in pairs], device=mask.device)
        importance = layer.magnitude() if importance is None else importance
        return groups.largest(importance, mask, num_active.minimum(groups.count(mask)))

    def _num_active(self, step: int, size: int, target: int) -> int:
        """Active weights after `step` of a group of `size` weights, of which `target` stay in the end."""
        if step >= self.stop:
            return target
        return size - int(size * schedules.cubic_sparsity(step, self.stop, 1 - target / size, self.start))


class GraNet(RigL):
    """Prune along the ramp of GMP, and at each of its updates but the last exchange a share as RigL does.

    Source: arXiv 2106.10404.
    """

    def __init__(self, config: DSTConfig, total_steps: int, seed: int) -> None:
        super().__init__(config, total_steps, seed)
        self._ramp = GMP(config, total_steps, seed)

    def is_update_step(self, step: int) -> bool:
        return self._ramp.is_update_step(step)

    def next_mask(
        self, layer: SparseProjection, step: int, index: int, growth: Tensor | None, importance: Tensor | None = None
    ) -> Tensor:
        pruned = self._ramp.next_mask(layer, step, index, growth, importance)
        if step >= self.stop:
            return pruned
        scores = self.growth_scores(layer, step, index, growth)
        return self.exchanged(layer, pruned, step, index, scores, importance)


ALGORITHMS: dict[str, type[Static]] = {"static": Static, "set": SET, "rigl": RigL, "gmp": GMP, "granet": GraNet}
