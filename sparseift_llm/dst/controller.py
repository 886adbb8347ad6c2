"""`SparseTrainingController`: dynamic sparse training for any loop, driven by the optimizer's own steps.

It counts optimizer steps through a hook, so that accumulation steps and steps that a gradient
scaler skips do not count. The Trainer's adapter is in callback.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel

from sparseift_llm.dst.algorithms import ALGORITHMS
from sparseift_llm.dst.distributed import check_same_masks, mean_over_ranks, world_size
from sparseift_llm.dst.optimizer_state import zero_state
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.mask_file import apply_masks, digest, pack, unpack
from sparseift_llm.ops.dense_gradient import DenseGradient
from sparseift_llm.planning import read_record


class SparseTrainingController:
    """Updates masks, weights and optimizer state right after the optimizer steps that call for it.

    Two lines in any training loop: create it after the optimizer, and nothing else. Gradients
    of micro-batches accumulate until the optimizer steps, over all ranks, so that the masks
    are those of the global batch. With accelerate, create it from the prepared model and optimizer, and
    `accelerator.register_for_checkpointing(controller)` makes it resumable.

    Args:
        model: a Sparse-IFT model, bare, compiled or in DistributedDataParallel.
        optimizer: a torch optimizer that holds all sparse weights, or accelerate's wrapper of one.
        total_steps: optimizer steps of the whole run, at least 1.
        micro_batches: backward passes per optimizer step. With 1, in a single process, each layer's dense
            gradient is reduced to scores at once and freed; otherwise, or if None (not known), the
            dense gradients of all layers are held until the optimizer steps.

    Attributes:
        step: optimizer steps taken.
        active_weight_steps: active sparse weights, summed over steps taken (for training FLOPs).
        num_dense_gradient_steps: steps on which dense gradients were computed.

    Raises:
        ValueError: the model has no sparse layers, or a sparse weight is not in the optimizer.
    """

    def __init__(self, model: nn.Module, optimizer: Any, total_steps: int, micro_batches: int | None = None) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        if micro_batches is not None and micro_batches < 1:
            raise ValueError(f"micro_batches must be at least 1, got {micro_batches}")
        self.model = model
        self.layers = sparse_layers(model)
        if not self.layers:
            raise ValueError("the model has no sparse layers: call sparsify(model, config) first")
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the real one
        self.optimizer: Optimizer = inner
        self._check_optimizer()
        hf_config = _config_of(model)
        config, _ = read_record(hf_config)
        self.algorithm = ALGORITHMS[config.dst.algorithm](config.dst, total_steps, config.seed)
        self._reduces_at_once = micro_batches == 1 and world_size() == 1
        self.step = 0
        self.active_weight_steps = 0
        self.num_dense_gradient_steps = 0
        self._num_active = self._count_active()
        check_same_masks({name: layer.mask for name, layer in self.layers.items()}, self.step)
        self._hook = self.optimizer.register_step_post_hook(self._after_optimizer_step)
        self._arm()

    def begin_step(self) -> None:
        """Forget gradients captured so far for the coming optimizer step.

        Only needed where a step may be abandoned after its backward passes (fp16 gradient
        scaling): call it before the first micro-batch of each step. The Trainer callback does.
        """
        for layer in self.layers.values():
            if layer.dense_gradient is not None:
                layer.dense_gradient.total = None

    def close(self) -> None:
        """Detach from model and optimizer; masks stay as they are."""
        self._hook.remove()
        self._disarm()

    def state_dict(self) -> dict[str, Any]:
        """Step, counters and packed masks: all that a resumed run needs."""
        masks = {name: pack(layer.mask) for name, layer in self.layers.items()}
        shapes = {name: list(layer.mask.shape) for name, layer in self.layers.items()}
        return {**self.counters(), "masks": masks, "shapes": shapes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`'s state. Load the model's and optimizer's state as well.

        Raises:
            ValueError: the state is of another model.
        """
        masks = {name: unpack(packed, tuple(state["shapes"][name])) for name, packed in state["masks"].items()}
        apply_masks(self.model, masks, "the controller's state")
        self.load_counters(state)

    def counters(self) -> dict[str, int]:
        """The integers of `state_dict`, JSON-ready."""
        return {
            "step": self.step,
            "active_weight_steps": self.active_weight_steps,
            "num_dense_gradient_steps": self.num_dense_gradient_steps,
        }

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Restore `counters()`, after the masks have been set."""
        self.step = int(counters["step"])
        self.active_weight_steps = int(counters["active_weight_steps"])
        self.num_dense_gradient_steps = int(counters["num_dense_gradient_steps"])
        self._num_active = self._count_active()
        self._arm()

    def masks_digest(self) -> str:
        """SHA-256 of all masks; the same on every rank."""
        return digest({name: layer.mask for name, layer in self.layers.items()})

    def _check_optimizer(self) -> None:
        if not isinstance(self.optimizer, Optimizer):
            raise ValueError(
                f"{type(self.optimizer).__name__} is not a torch.optim.Optimizer, so it cannot be followed"
            )
        owned = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        for name, layer in self.layers.items():
            if isinstance(layer.weight, DTensor):
                raise ValueError(f"{name}: sharded parameters (FSDP) are not supported; use DistributedDataParallel")
            if id(layer.weight) not in owned:
                raise ValueError(
                    f"{name}.weight is not in the optimizer; create the optimizer after sparsify, from "
                    "model.parameters(), or leave the projection dense with SparseIFTConfig(exclude=...)"
                )

    def _count_active(self) -> int:
        return sum(layer.count_active() for layer in self.layers.values())

    @torch.no_grad()
    def _after_optimizer_step(self, *_: Any) -> None:
        # a fused optimizer is stepped by the gradient scaler also when it will skip, and told so
        if bool(getattr(self.optimizer, "found_inf", False)):
            return
        self.step += 1
        self.active_weight_steps += self._num_active
        for layer in self.layers.values():
            layer.zero_inactive()  # some optimizers move weights whose gradient is 0
        if self.algorithm.is_update_step(self.step):
            self._update_masks()
        self._arm()

    def _update_masks(self) -> None:
        if self.algorithm.needs_dense_gradient:
            self.num_dense_gradient_steps += 1
        for index, (name, layer) in enumerate(self.layers.items()):
            growth = self._growth(name) if self.algorithm.needs_dense_gradient else None
            changed = layer.set_mask(self.algorithm.next_mask(layer, self.step, index, growth))
            zero_state(self.optimizer, layer.weight, changed, name)
        self._num_active = self._count_active()
        check_same_masks({name: layer.mask for name, layer in self.layers.items()}, self.step)

    def _growth(self, name: str) -> Tensor:
        """Scores of the layer's dense gradient, summed over micro-batches, averaged over ranks; freed here."""
        layer = self.layers[name]
        capture = layer.dense_gradient
        if capture is None or capture.total is None:
            raise RuntimeError(
                f"{name}: no dense gradient reached step {self.step}; run forward and backward of every sparse layer "
                "between two optimizer steps"
            )
        scores = capture.total if self._reduces_at_once else layer.growth_scores(mean_over_ranks(capture.total))
        capture.total = None
        if not scores.isfinite().all():
            raise RuntimeError(
                f"{name}: the dense gradient at step {self.step} is not finite; training has diverged, or "
                "a gradient scaler skipped a step: call controller.begin_step() before each step's first micro-batch"
            )
        return scores

    def _arm(self) -> None:
        """Capture dense gradients during the coming optimizer step, if it updates masks."""
        if self.algorithm.needs_dense_gradient and self.algorithm.is_update_step(self.step + 1):
            for layer in self.layers.values():
                layer.dense_gradient = DenseGradient(layer.growth_scores if self._reduces_at_once else None)
            torch.compiler.set_stance("force_eager")  # compiled graphs do not capture
        else:
            self._disarm()

    def _disarm(self) -> None:
        if any(layer.dense_gradient is not None for layer in self.layers.values()):
            for layer in self.layers.values():
                layer.dense_gradient = None
            torch.compiler.set_stance("default")


def _config_of(model: nn.Module) -> PreTrainedConfig:
    """The transformers config inside a model that may be wrapped (DistributedDataParallel, torch.compile)."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module.config
    raise ValueError(f"{type(model).__name__} holds no transformers model, so its sparse_ift record cannot be read")
