"""What a controller makes sure of before it touches a weight, and what it says about schedules.

Each check raises on all ranks, or on none.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sparseift_llm.config.transform import DSTConfig
from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.layers.masked import MaskedProjection, has_surplus
from sparseift_llm.layers.sharding import gathered, is_zero3, local, part_of
from sparseift_llm.training.algorithms import Static
from sparseift_llm.training.collectives import Ranks

logger = logging.getLogger(__name__)
_LOAD_STATE = (
    "load the controller's state together with the others (controller.load_state_dict, or with accelerate "
    "register_for_checkpointing(controller) before load_state; in a Trainer, resume_from_checkpoint does it)"
)


@torch.no_grad()
def fits(layer: SparseProjection, mask: Tensor | None = None) -> bool:
    """Whether this rank's part of the weight is 0 where `mask`, by default the layer's, is.

    Always true for tiles, whose weights are of the places that the layer says, and for ZeRO-3, which hides weights.
    """
    if not isinstance(layer, MaskedProjection) or is_zero3(layer.weight):
        return True
    mask = layer.mask if mask is None else mask
    if mask.shape != layer.mask.shape:
        return True
    return not has_surplus(local(layer.weight), part_of(mask.to(layer.mask.device), layer.weight))


def check_weights(layers: Mapping[str, SparseProjection], ranks: Ranks, step: int) -> None:
    """Refuse weights that are not 0 where their mask is, before the optimizer step `step` makes them so.

    Raises:
        ValueError: naming the first such layer.
    """
    wrong = [not fits(layer) for layer in layers.values()]
    if any(isinstance(layer.weight, DTensor) for layer in layers.values()):
        wrong = ranks.any_has(wrong)
    for name, is_wrong in zip(layers, wrong, strict=True):
        if is_wrong:
            raise ValueError(
                f"{name}.weight is not 0 where its mask is, before step {step}: going on would destroy weights. If "
                "they were loaded without their masks, load the model with sparseift_llm.load_pretrained, or "
                f"{_LOAD_STATE}. If something writes to weights after the optimizer has stepped, as Lookahead does, "
                "give the controller the outermost optimizer"
            )


def check_step_count(num_steps: int, step: int) -> None:
    """Refuse an optimizer that is further than the controller: its state was loaded, the controller's was not.

    Raises:
        ValueError: with both counts.
    """
    if num_steps > step:
        steps = "a step" if num_steps == 1 else f"{num_steps} steps"
        raise ValueError(
            f"the optimizer has taken {steps}, but the controller has counted {step}, so that the schedule "
            f"of mask updates would start again: {_LOAD_STATE}. To train the weights anew, use a new optimizer, or "
            "say so with controller.accept_optimizer_steps()"
        )


def warn_of_new_state(num_steps: int, step: int) -> None:
    """Log a warning if an optimizer had no state when its controller went on, and has one after a step.

    Plain SGD never has any. Training anew from a checkpoint's weights can be meant, so this is no error.

    Args:
        num_steps: those that the optimizer has counted since, or 0 if it has no state.
        step: where the controller went on.
    """
    if num_steps > 0:
        logger.warning(
            "the controller went on at step %d, but the optimizer's state began anew there: load it from the "
            "checkpoint as well (optimizer.load_state_dict), or the run is not the one that was saved", step
        )  # fmt: skip


@torch.no_grad()
def check_finite(layers: Mapping[str, SparseProjection], ranks: Ranks, step: int) -> None:
    """Refuse to choose among weights that are nan or infinite: such a mask has any number of active weights.

    Raises:
        RuntimeError: naming the first such layer.
    """
    broken = []
    for layer in layers.values():
        with gathered(layer.weight):
            broken.append(not bool(local(layer.weight).isfinite().all()))
    for name, is_broken in zip(layers, ranks.any_has(broken), strict=True):
        if is_broken:
            raise RuntimeError(
                f"{name}.weight is not finite after step {step}, so its mask cannot be updated: training has diverged. "
                "Go on from an earlier checkpoint, with a lower learning rate, gradient clipping, or without the batch "
                "that broke it"
            )


def warn_without_updates(algorithm: Static, total_steps: int, dst: DSTConfig) -> None:
    """Log a warning if masks are to change, but never will in a run of `total_steps`."""
    if dst.algorithm == "static" or any(algorithm.is_update_step(step) for step in range(1, total_steps + 1)):
        return
    logger.warning(
        "algorithm=%r, but masks will never change: with update_every_steps=%d no update falls before step %d, where "
        "masks become final (stop_fraction=%s of %d steps); lower update_every_steps, or use algorithm='static'",
        dst.algorithm, dst.update_every_steps, algorithm.stop, dst.stop_fraction, total_steps,
    )  # fmt: skip


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The entries that differ, as `key: old -> new`; empty if there are none."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in keys)
