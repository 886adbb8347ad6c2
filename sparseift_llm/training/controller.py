"""`SparseTrainingController`: dynamic sparse training for any loop, driven by the optimizer's own steps.

It counts optimizer steps through a hook, so that accumulation steps and steps that a gradient
scaler skips do not count. The Trainer's adapter is in callback.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.optim import Optimizer

from sparseift_llm.checkpoints.mask_file import apply_masks, digest, pack, unpack
from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.sharding import gathered, reshard
from sparseift_llm.ops.dense_gradient import DenseGradient
from sparseift_llm.record.model_record import missing_layers
from sparseift_llm.training.algorithms import ALGORITHMS
from sparseift_llm.training.averages import AveragedCopies
from sparseift_llm.training.backends.choice import backend_of
from sparseift_llm.training.collectives import Ranks, UpdateCost, gradient_dtype, no_gradient, world_size
from sparseift_llm.training.compatibility import pretrained_model
from sparseift_llm.training.join import SparseJoinHook, check_join

logger = logging.getLogger(__name__)
_attached: WeakSet[SparseTrainingController] = WeakSet()
UpdateListener = Callable[[str, Tensor, Tensor, "Tensor | None"], None]


class SparseTrainingController(Joinable):
    """Updates masks, weights and optimizer state right after the optimizer steps that call for it.

    Two lines in any training loop: create it after the optimizer, and nothing else. Gradients
    of micro-batches accumulate until the optimizer steps, over all ranks, so that the masks
    are those of the global batch. With accelerate, create it from the prepared model and optimizer, and
    `accelerator.register_for_checkpointing(controller)` makes it resumable. Where ranks have unequal numbers
    of batches, train inside `torch.distributed.algorithms.join.Join([ddp_model, controller])`.

    Args:
        model: a Sparse-IFT model, bare, compiled, in DistributedDataParallel, sharded by `fully_shard`, or a DeepSpeed
            engine with ZeRO. Weights with `requires_grad=False` keep their masks.
        optimizer: a torch optimizer that holds all sparse weights, DeepSpeed's `engine.optimizer`, or accelerate's
            wrapper of either.
        total_steps: optimizer steps of the whole run, at least 1.
        micro_batches: backward passes per optimizer step. With 1, in a single process, each layer's dense
            gradient is reduced to scores at once and freed; otherwise, or if None (not known), the
            dense gradients of all layers are held until the optimizer steps.

    Attributes:
        step: optimizer steps taken.
        active_weight_steps: active sparse weights, summed over steps taken (for training FLOPs).
        num_dense_gradient_steps: steps on which dense gradients were computed.
        cost: time and communication of mask updates.
        listeners: called in every update for every layer: name, mask, next mask, units' gradient norms (RigL) or None.
        ranks: the collectives of mask updates.

    Raises:
        ValueError: the model has no sparse layers, a sparse weight is not in the optimizer, the two have a controller
            already, or a wrapper, adapter or optimizer is not supported; see support.py. On all ranks, if they were
            given different schedules.
        RuntimeError: on all ranks, if they hold different masks.
    """

    def __init__(self, model: nn.Module, optimizer: Any, total_steps: int, micro_batches: int | None = None) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        if micro_batches is not None and micro_batches < 1:
            raise ValueError(f"micro_batches must be at least 1, got {micro_batches}")
        super().__init__()
        self.model = model
        self.layers = sparse_layers(model)
        if not self.layers:
            raise ValueError(missing_layers(getattr(model, "config", None)))
        # The order of what follows matters:
        # 1. A model without a record cannot be trained, whatever the optimizer is.
        # 2. Sharded weights are put back in their places before anything compares parameters with the optimizer's.
        # 3. The backend refuses what cannot work at all. Only then can it be asked for the optimizer in it,
        # 4. which tells whether this optimizer and these layers are in use already.
        # 5. Ranks are compared last, because every rank must get here, or raise one of the errors above.
        pretrained = pretrained_model(model)
        reshard(model)
        self.backend = backend_of(optimizer, model, self.layers)
        if any(
            other.backend.shares_optimizer(self.backend) and {*other.layers.values()} & {*self.layers.values()}
            for other in _attached
        ):
            raise ValueError(
                "model and optimizer have a SparseTrainingController already: close() it first, or make a new optimizer"
            )
        config = read_record(pretrained.config).transformation
        self.algorithm = ALGORITHMS[config.dst.algorithm](config.dst, total_steps, config.seed)
        self._micro_batches = micro_batches
        self._reduces_at_once = micro_batches == 1 and world_size() == 1
        self.step = 0
        self.active_weight_steps = 0
        self.num_dense_gradient_steps = 0
        self.cost = UpdateCost()
        self.listeners: list[UpdateListener] = []
        self._copies = AveragedCopies()
        self._num_active = self._count_active()
        self.ranks = Ranks(next(iter(self.layers.values())).topology.device)
        self.ranks.check_same_schedule(f"total_steps={total_steps}, {config.dst}, seed={config.seed}")
        self.ranks.check_same_masks(self._masks(), self.step)
        self._unhook = self.backend.follow_steps(self._after_optimizer_step)
        _attached.add(self)
        self._arm()

    @property
    def optimizer(self) -> Optimizer:
        """The torch optimizer that is followed; with DeepSpeed ZeRO, the one inside."""
        optimizer: Optimizer = self.backend.optimizer
        return optimizer

    def follow(self, copy: nn.Module) -> None:
        """Give every mask update to an averaged copy of the model, too (EMA, `torch.optim.swa_utils.AveragedModel`).

        Without it the copy would average weights that no longer stand for the same connections. A grown
        weight starts at 0 in the copy as in the model. To resume, load the copy's state, then call this.

        Args:
            copy: a deep copy of the model, perhaps wrapped.

        Raises:
            ValueError: it has other sparse layers, or its weights stand for other connections.
        """
        self._copies.add(copy, self.layers)

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
        self._unhook()
        _attached.discard(self)
        self._disarm()

    def state_dict(self) -> dict[str, Any]:
        """Step, counters and packed masks: all that a resumed run needs."""
        masks = {name: pack(layer.current_mask()) for name, layer in self.layers.items()}
        shapes = {name: list(layer.mask_shape) for name, layer in self.layers.items()}
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
        """Restore `counters()`, after the masks have been set.

        Raises:
            RuntimeError: on all ranks, if they hold different masks.
        """
        self.step = int(counters["step"])
        self.active_weight_steps = int(counters["active_weight_steps"])
        self.num_dense_gradient_steps = int(counters["num_dense_gradient_steps"])
        self._num_active = self._count_active()
        self.ranks.check_same_masks(self._masks(), self.step)
        self._copies.update(self.layers)
        self._arm()

    def masks_digest(self) -> str:
        """SHA-256 of all masks; the same on every rank."""
        return digest(self._masks())

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """For `Join([ddp_model, controller])`; each forward pass must be followed by an optimizer step.

        Raises:
            ValueError: the controller was not told that each step has one micro-batch.
        """
        if self._micro_batches != 1:
            raise ValueError("in a join context a step has one micro-batch: create the controller with micro_batches=1")
        return SparseJoinHook(self)

    @property
    def join_device(self) -> torch.device:
        """Device of the collectives."""
        return self.ranks.device

    @property
    def join_process_group(self) -> Any:
        """All ranks."""
        return dist.group.WORLD

    def _masks(self) -> dict[str, Tensor]:
        return {name: layer.current_mask() for name, layer in self.layers.items()}

    def _count_active(self) -> int:
        return sum(layer.count_active() for layer in self.layers.values())

    @torch.no_grad()
    def _after_optimizer_step(self, *_: Any) -> None:
        if self.backend.was_skipped():
            return
        check_join(self, self.model)
        reshard(self.model)
        self.step += 1
        self.active_weight_steps += self._num_active
        self.backend.zero_inactive(self.layers)  # some optimizers move weights whose gradient is 0
        if self.algorithm.is_update_step(self.step):
            self._update_masks()
        self._arm()

    def _update_masks(self) -> None:
        started, bytes_before = self._now(), self.ranks.num_bytes
        if self.algorithm.needs_dense_gradient:
            self.num_dense_gradient_steps += 1
            self._check_gradients_arrived()
        for index, (name, layer) in enumerate(self.layers.items()):
            if layer.is_frozen:
                continue
            growth = self._growth(name) if self.algorithm.needs_dense_gradient else None
            with gathered(layer.weight):
                mask = self.algorithm.next_mask(layer, self.step, index, growth)
                for listener in self.listeners:
                    listener(name, layer.current_mask(), mask, growth)
                changed = layer.set_mask(mask)
            self.ranks.num_bytes += self.backend.reset(name, layer, changed)
        self._num_active = self._count_active()
        self.ranks.check_same_masks(self._masks(), self.step)
        self._copies.update(self.layers)
        seconds, num_bytes = self._now() - started, self.ranks.num_bytes - bytes_before
        self.cost.num_updates += 1
        self.cost.seconds += seconds
        self.cost.num_bytes += num_bytes
        logger.info("step %d: masks updated in %.4f s, %d bytes over ranks", self.step, seconds, num_bytes)

    def _now(self) -> float:
        if self.ranks.device.type != "cpu":
            torch.accelerator.synchronize()  # do not count what the device had to do before
        return time.perf_counter()

    def _check_gradients_arrived(self) -> None:
        """Raise on all ranks if a layer was used on none of them; one that was used on some is fine."""
        layers = {name: layer for name, layer in self.layers.items() if not layer.is_frozen}
        captures = [layer.dense_gradient for layer in layers.values()]
        arrived = self.ranks.any_has([capture is not None and capture.total is not None for capture in captures])
        for name, has_gradient in zip(layers, arrived, strict=True):
            if not has_gradient:
                raise RuntimeError(
                    f"{name}: no dense gradient reached step {self.step}; run forward and backward of every sparse "
                    "layer between two optimizer steps"
                )

    def _growth(self, name: str) -> Tensor:
        """Scores of the layer's dense gradient, summed over micro-batches, averaged over ranks; freed here."""
        layer = self.layers[name]
        total = None
        if layer.dense_gradient is not None:
            total, layer.dense_gradient.total = layer.dense_gradient.total, None
        if self._reduces_at_once:
            assert total is not None
            scores = total
        else:
            total = no_gradient(layer) if total is None else total.to(gradient_dtype(layer))
            scores = layer.growth_scores(self.ranks.mean(total))
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
