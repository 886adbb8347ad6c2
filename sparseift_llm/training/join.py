"""Ranks that run out of data before others: `with Join([ddp_model, controller])` of torch.distributed.

A rank without data takes part in the collectives of mask updates with an empty gradient, and gets masks,
counters and optimizer state from a rank that trained to the end when the context is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel

from sparseift_llm.training.collectives import Ranks, no_gradient

if TYPE_CHECKING:
    from sparseift_llm.training.controller import SparseTrainingController

_ADVICE = "use `with Join([model, controller])`, the DistributedDataParallel model first"


class SparseJoinHook(JoinHook):
    """What a rank without data does once per step of the others, and at the end."""

    def __init__(self, controller: SparseTrainingController) -> None:
        self.controller = controller

    def main_hook(self) -> None:
        """Take part in the collectives of the others' optimizer step, with an empty gradient."""
        controller = self.controller
        controller.step += 1
        if not controller.algorithm.is_update_step(controller.step):
            return
        controller.ranks.any_has([False] * len(controller.layers))  # as in check_finite
        if controller.algorithm.needs_dense_gradient:
            trained = [layer for layer in controller.layers.values() if not layer.is_frozen]
            arrived = controller.ranks.any_has([False] * len(trained))
            for layer, has_gradient in zip(trained, arrived, strict=True):
                if has_gradient:
                    controller.ranks.mean(no_gradient(layer))
        controller.ranks.check_same_masks(None, controller.step)

    def post_hook(self, is_last_joiner: bool) -> None:
        """Take over masks, counters and optimizer state of a rank that trained to the end.

        DistributedDataParallel's own hook does so for the weights.
        """
        source = Ranks.newest(is_last_joiner)
        controller = self.controller
        state: list[Any] = [controller.counters(), controller.optimizer.state_dict()]
        dist.broadcast_object_list(state, source)
        for layer in controller.layers.values():
            topology = layer.topology.to(torch.int32)  # not every backend sends bool
            dist.broadcast(topology, source)
            layer.load_topology(topology)
        if dist.get_rank() != source:
            controller.optimizer.load_state_dict(state[1])
        controller.load_counters(state[0])


def check_join(controller: Joinable, model: torch.nn.Module) -> None:
    """Refuse a join context in which ranks would wait for each other for ever.

    Raises:
        ValueError: the model joins without the controller, or after it.
    """
    wrapped = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if not wrapped or not any(module._join_config.enable for module in wrapped):
        return
    if not controller._join_config.enable:
        raise ValueError(f"the model is in a join context without its SparseTrainingController: {_ADVICE}")
    if controller._join_config.is_first_joinable:
        raise ValueError(f"the SparseTrainingController stands first in the join context: {_ADVICE}")
