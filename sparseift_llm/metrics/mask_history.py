"""`MaskMetrics`: follows a controller through its mask updates, and says at any time what the masks have done.

Other steps cost nothing. What the numbers mean is in counts.py, and what a Trainer does with them in trainer/log.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparseift_llm.checkpoints.mask_file import pack, unpack
from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.metrics.counts import LayerCounts, UnitHistory, kinds_in, num_ones, summarize
from sparseift_llm.models.projections import kind_of
from sparseift_llm.topology.connected import empty_lines
from sparseift_llm.training.algorithms import SET
from sparseift_llm.training.controller import SparseTrainingController

logger = logging.getLogger(__name__)


class MaskMetrics:
    """Follows a controller's mask updates; `values()` is what to log. For any loop; Trainers have it in their callback.

        metrics = MaskMetrics(controller)
        accelerator.register_for_checkpointing(metrics)  # after the controller
        ...
        accelerator.log(metrics.values(), step=controller.step)

    No collectives, so one rank may call it alone, and no effect on training.

    Args:
        controller: the run's controller; create this before the first step, and before loading a saved state.
        scaler: the gradient scaler, if there is one: dense gradients are captured while they are scaled.
    """

    def __init__(self, controller: SparseTrainingController, scaler: Any = None) -> None:
        self.controller = controller
        kinds = kinds_in(controller.model)
        self.kinds = {name: kind_of(name, kinds, "other") for name in controller.layers}
        self.num_updates = 0
        self._scaler = scaler
        self._histories: dict[str, UnitHistory] = {}
        self._recorded_step = -1
        self._grown_squares: Tensor | None = None  # stays on its device until it is asked for
        self._grown_norm: float | None = None
        self._due, self._due_step = 0, 0
        self._has_warned = False
        self._counts: tuple[tuple[int, int], dict[str, LayerCounts]] | None = None
        controller.listeners.append(self._record)

    def close(self) -> None:
        """Follow the controller no longer."""
        if self._record in self.controller.listeners:
            self.controller.listeners.remove(self._record)

    def values(self) -> dict[str, float]:
        """All metrics of the masks by name (see docs/metrics.md); those that are not known yet are left out."""
        values = summarize(self.layers().values())
        algorithm, step = self.controller.algorithm, self.controller.step
        if isinstance(algorithm, SET):
            values["drop_fraction"] = algorithm.drop_fraction(min(step, algorithm.stop))
        if self.grad_norm_grown is not None:
            values["grad_norm_grown"] = self.grad_norm_grown
        cost = self.controller.cost
        return {**values, "mask_update_seconds": cost.seconds, "mask_update_bytes": cost.num_bytes}

    def layers(self) -> dict[str, LayerCounts]:
        """Counts of every sparse layer, worked out again only after an update."""
        key = self.num_updates, self._num_due()
        if self._counts is None or self._counts[0] != key:
            self._counts = key, {name: self._count(name, layer) for name, layer in self.controller.layers.items()}
        return self._counts[1]

    @property
    def grad_norm_grown(self) -> float | None:
        """L2 norm, over all units grown at the last update, of the gradient norms they were grown for (RigL only)."""
        if self._grown_squares is not None:
            self._grown_norm, self._grown_squares = float(self._grown_squares.sqrt()), None
        return self._grown_norm

    def counters(self) -> dict[str, Any]:
        """The part of the state that JSON can hold."""
        counts = {name: [x.num_grown_before, x.num_survived] for name, x in self._all_histories().items()}
        return {
            "num_updates": self.num_updates,
            "num_due": self._num_due(),
            "grad_norm_grown": self.grad_norm_grown,
            "survival": counts,
        }

    def masks(self) -> dict[str, Tensor]:
        """The rest of the state: bool masks of the units that were ever active, and of those that were grown last."""
        masks = {}
        for name, history in self._all_histories().items():
            shape = self.controller.layers[name].mask_shape
            masks[f"ever/{name}"] = unpack(history.ever, shape)
            if history.grown is not None:
                masks[f"grown/{name}"] = unpack(history.grown, shape)
        return masks

    def restore(self, counters: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        """Go on from `counters()` and `masks()`.

        Raises:
            ValueError: they are of another model.
        """
        survival = counters["survival"]
        for name, layer in self.controller.layers.items():
            ever = masks.get(f"ever/{name}")
            if ever is None or ever.shape != layer.mask_shape or survival.keys() != self.controller.layers.keys():
                raise ValueError(f"the metrics' state is of another model: it does not fit {name}")
        self._histories = {}
        for name, (before, survived) in survival.items():
            grown = masks.get(f"grown/{name}")
            packed = None if grown is None else pack(grown)
            self._histories[name] = UnitHistory(pack(masks[f"ever/{name}"]), packed, before, survived)
        self.num_updates, self._recorded_step = int(counters["num_updates"]), -1
        # as counted then: a run that is made longer has another schedule now
        self._due, self._due_step = int(counters["num_due"]), self.controller.step
        self._grown_norm, self._grown_squares = counters["grad_norm_grown"], None
        self._counts = None

    def state_dict(self) -> dict[str, Any]:
        """For `accelerator.register_for_checkpointing` and the like."""
        masks = self.masks()
        shapes = {name: list(mask.shape) for name, mask in masks.items()}
        return {**self.counters(), "masks": {name: pack(mask) for name, mask in masks.items()}, "shapes": shapes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; raises ValueError as `restore` does."""
        shapes = state["shapes"]
        self.restore(state, {name: unpack(bits, tuple(shapes[name])) for name, bits in state["masks"].items()})

    def _record(self, name: str, old: Tensor, new: Tensor, growth: Tensor | None) -> None:
        if self.controller.step != self._recorded_step:  # the update's first layer
            self._recorded_step = self.controller.step
            self._all_histories()
            self.num_updates += 1
            self._grown_squares, self._grown_norm = None, None
        self._histories[name].update(pack(old), pack(new))
        if growth is not None:
            scale = self._scaler.get_scale() if self._scaler is not None and self._scaler.is_enabled() else 1.0
            squares = torch.where(new & ~old, growth / scale, 0).square().sum(dtype=torch.float64)
            self._grown_squares = squares if self._grown_squares is None else self._grown_squares + squares

    def _all_histories(self) -> dict[str, UnitHistory]:
        """Made when first needed, so that masks which are loaded after this object was created count."""
        if not self._histories:
            self._histories = {name: UnitHistory(pack(x.current_mask())) for name, x in self.controller.layers.items()}
        return self._histories

    def _count(self, name: str, layer: SparseProjection) -> LayerCounts:
        mask, unit, history = layer.current_mask(), layer.unit_size, self._all_histories()[name]
        outputs = layer.output_dim
        unread, unfed = (int(empty_lines(mask, dim).sum()) for dim in (outputs, 1 - outputs))
        ever = num_ones(history.ever) * unit if self._has_seen_all_updates() else None
        grown = None if history.grown is None else num_ones(history.grown) * unit
        return LayerCounts(
            self.kinds[name], mask.numel() * unit, int(mask.sum()) * unit, ever, grown,
            history.num_grown_before * unit, history.num_survived * unit,
            mask.shape[1 - outputs], mask.shape[outputs], unread, unfed,
        )  # fmt: skip

    def _num_due(self) -> int:
        """Updates that there were up to now according to the schedule."""
        step = self.controller.step
        if step < self._due_step:
            self._due, self._due_step = 0, 0
        self._due += sum(map(self.controller.algorithm.is_update_step, range(self._due_step + 1, step + 1)))
        self._due_step = step
        return self._due

    def _has_seen_all_updates(self) -> bool:
        due = self._num_due()
        if self.num_updates != due and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "exploration is not reported: of %d mask updates so far only %d were followed (a checkpoint without "
                "the metrics' state, or a rank that ran out of data in a join context)", due, self.num_updates
            )  # fmt: skip
        return self.num_updates == due
