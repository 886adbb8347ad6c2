"""`SparseTrainingController`: dynamic sparse training for any loop, driven by the optimizer's own steps.

It counts the optimizer's own steps, so that accumulation steps and steps that a gradient scaler skips do not count.
The Trainer's adapter is in trainer/callback.py. What a controller refuses is in checks.py and compatibility.py, and how
it reaches optimizers is in backends/.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.optim import Optimizer

from sparseift_llm.checkpoints.mask_file import apply_masks, digest, pack, unpack
from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.config.as_begun import dst_as_begun
from sparseift_llm.config.families import Wide
from sparseift_llm.layers import unattended
from sparseift_llm.layers.base import SparseProjection, sparse_layers
from sparseift_llm.layers.sharding import gathered, reshard
from sparseift_llm.ops.dense_gradient import DenseGradient
from sparseift_llm.record.model_record import missing_layers
from sparseift_llm.training import checks, compiler_stance, grown_weights, importance
from sparseift_llm.training.algorithms import ALGORITHMS
from sparseift_llm.training.averages import AveragedCopies
from sparseift_llm.training.backends.choice import backend_of
from sparseift_llm.training.collectives import Ranks, UpdateCost, gradient_dtype, no_gradient, world_size
from sparseift_llm.training.compatibility import pretrained_model
from sparseift_llm.training.gradient_watch import GradientWatch
from sparseift_llm.training.join import SparseJoinHook, check_join
from sparseift_llm.utils.numbers import check_count

logger = logging.getLogger(__name__)
_attached: WeakSet[SparseTrainingController] = WeakSet()
MISSES_TO_WARN = 3
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
            wrapper of either. Of optimizers inside each other (Lookahead, SAM) the outermost.
        total_steps: optimizer steps of the whole run, at least 1.
        micro_batches: backward passes per optimizer step. With 1, in a single process, each layer's dense
            gradient is reduced to scores at once and freed; otherwise, or if None (not known), the
            dense gradients of all layers are held until the optimizer steps.

    Attributes:
        step: optimizer steps taken.
        active_weight_steps: active weights of sparse projections, summed over steps taken (for training FLOPs).
        num_dense_gradient_steps: steps on which dense gradients were computed.
        cost: time and communication of mask updates.
        listeners: called in every update for every layer: name, mask, next mask, units' gradient norms (RigL) or None.
        ranks: the collectives of mask updates.

    Raises:
        ValueError: the model has no sparse layers, a sparse weight is not in the optimizer, the two have a controller
            already, or a wrapper, adapter or optimizer is not supported; see compatibility.py. On all ranks, if they
            were given different schedules. At the first optimizer step, before any weight is changed: weights are not
            0 where their mask is, or the optimizer has taken more steps than the controller.
        RuntimeError: on all ranks, if they hold different masks. At an update, if weights or dense gradients are not
            finite, or no dense gradient has arrived.
    """

    def __init__(self, model: nn.Module, optimizer: Any, total_steps: int, micro_batches: int | None = None) -> None:
        check_count("total_steps", total_steps)
        if micro_batches is not None:
            check_count("micro_batches", micro_batches)
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
        self._updates_ends = isinstance(config.family, Wide) and config.family.embedding_updates
        self.algorithm = ALGORITHMS[config.dst.algorithm](config.dst, total_steps, config.seed)
        self._micro_batches = micro_batches
        self._reduces_at_once = micro_batches == 1 and world_size() == 1
        self.step = 0
        self.active_weight_steps = 0
        self.num_dense_gradient_steps = 0
        self.cost = UpdateCost()
        self.listeners: list[UpdateListener] = []
        self._schedule = {**asdict(config.dst), "seed": config.seed, "total_steps": total_steps}
        self._is_checked = False
        self._goes_on_without_state = False
        self._steps_before = 0
        self._watches: list[GradientWatch] = []
        self._misses: dict[str, int] = {}
        self._copies = AveragedCopies()
        self._grown_weights = grown_weights.rule_for(config.dst, self.backend)
        self._importance = importance.rule_for(config.dst, self.backend)
        self._num_active = self._count_active()
        self.ranks = Ranks(next(iter(self.layers.values())).topology.device)
        self.ranks.check_same_schedule(f"total_steps={total_steps}, {config.dst}, seed={config.seed}")
        self.ranks.check_same_masks(self._masks(), self.step)
        checks.warn_without_updates(self.algorithm, total_steps, config.dst)
        self._unhook = self.backend.follow_steps(self._before_optimizer_step, self._after_optimizer_step)
        _attached.add(self)
        unattended.attend(self.layers.values())
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

        Only needed where gradients are abandoned after a backward pass without `zero_grad()`, or with DeepSpeed, where
        that cannot be seen: call it before the first micro-batch of each step. The Trainer callback does.
        """
        for layer in self.layers.values():
            if layer.dense_gradient is not None:
                layer.dense_gradient.total = None

    def accept_optimizer_steps(self) -> None:
        """Let the schedule start at 0 although the optimizer has stepped before: a new phase with the same optimizer.

        Without this, an optimizer that is further than the controller is an error at the first step, because then the
        optimizer's state was loaded and the controller's was forgotten.
        """
        self._steps_before = self.backend.num_steps(self.layers)

    def close(self) -> None:
        """Detach from model and optimizer; masks stay as they are."""
        self._unhook()
        _attached.discard(self)
        unattended.leave(self.layers.values())
        self._disarm()

    def state_dict(self) -> dict[str, Any]:
        """Step, counters and packed masks: all that a resumed run needs; and the schedule, to be compared."""
        masks = {name: pack(layer.current_mask()) for name, layer in self.layers.items()}
        shapes = {name: list(layer.mask_shape) for name, layer in self.layers.items()}
        return {**self.counters(), "masks": masks, "shapes": shapes, "schedule": self._schedule}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`'s state. Load the model's and optimizer's state as well, in any order.

        A schedule other than the one the state was saved with is followed from here on, and a warning names what
        differs.

        Raises:
            ValueError: the state is of another model, or the model's weights are neither those of its masks nor those
                of the state's, so that a state of another step is being loaded; nothing is changed then.
        """
        masks = {name: unpack(packed, tuple(state["shapes"][name])) for name, packed in state["masks"].items()}
        reshard(self.model)
        for name, layer in self.layers.items():
            if name in masks and not checks.fits(layer) and not checks.fits(layer, masks[name]):
                raise ValueError(
                    f"{name}.weight is not 0 where the masks of the controller's state are, so they are of different "
                    "steps: load weights and state from one checkpoint"
                )
        if changed := checks.changed_keys(dst_as_begun(state.get("schedule", self._schedule)), self._schedule):
            logger.warning("the state was saved with other mask updates, and the run goes on with these: %s", changed)
        apply_masks(self.model, masks, "the controller's state")
        self.load_counters(state)

    def counters(self) -> dict[str, int]:
        """The integers of `state_dict`, which JSON can hold."""
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
        self._is_checked, self._steps_before = False, 0
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
        return sum(layer.count_active() for layer in self.layers.values() if layer.role == "projection")

    def _has_updates(self, layer: SparseProjection) -> bool:
        """Whether mask updates are meant for a layer: not at the model's ends, unless asked for."""
        return layer.role == "projection" or self._updates_ends

    def _takes_updates(self, layer: SparseProjection) -> bool:
        """Whether mask updates change a layer as it is now: not while it is frozen."""
        return self._has_updates(layer) and not layer.is_frozen

    @torch.no_grad()
    def _before_optimizer_step(self) -> None:
        """Look at weights and counts before anything is changed: at the first step, and before updates."""
        for layer in self.layers.values():
            if layer.dense_gradient is not None:
                layer.dense_gradient.forget_thrown_away()
        self._grown_weights.before_step(self.layers)
        if self._is_checked and not self.algorithm.is_update_step(self.step + 1):
            return
        reshard(self.model)
        checks.check_weights(self.layers, self.ranks, self.step + 1)
        if not self._is_checked:
            num_steps = self.backend.num_steps(self.layers)
            checks.check_step_count(num_steps - self._steps_before, self.step)
            self._goes_on_without_state = self.step > 0 and num_steps == 0
            if self.step > 0:
                self._grown_weights.check(self.layers)
        self._is_checked = True

    @torch.no_grad()
    def _after_optimizer_step(self, *_: Any) -> None:
        if self.backend.was_skipped():
            return
        check_join(self, self.model)
        reshard(self.model)
        if self._goes_on_without_state:
            checks.warn_of_new_state(self.backend.num_steps(self.layers), self.step)
            self._goes_on_without_state = False
        self.step += 1
        self.active_weight_steps += self._num_active
        self._grown_weights.after_step(self.layers)
        self.backend.zero_inactive(self.layers)  # some optimizers move weights whose gradient is 0
        if self.algorithm.is_update_step(self.step):
            self._update_masks()
        self._arm()

    def _update_masks(self) -> None:
        started, bytes_before = self._now(), self.ranks.num_bytes
        checks.check_finite(self.layers, self.ranks, self.step)
        if self.algorithm.needs_dense_gradient:
            self.num_dense_gradient_steps += 1
        unused = self._unused_layers() if self.algorithm.needs_dense_gradient else set()
        for index, (name, layer) in enumerate(self.layers.items()):
            if not self._takes_updates(layer):
                continue
            if name in unused:
                mask = layer.current_mask()
                self._notify(name, mask, mask, None)
                continue
            growth = self._growth(name) if self.algorithm.needs_dense_gradient else None
            with gathered(layer.weight):
                mask = self.algorithm.next_mask(layer, self.step, index, growth, self._importance(layer))
                self._notify(name, layer.current_mask(), mask, growth)
                changed = layer.set_mask(mask)
            self.ranks.num_bytes += self.backend.reset(name, layer, changed)
            self.ranks.num_bytes += self._grown_weights.start(layer, changed)
        self._num_active = self._count_active()
        self.ranks.check_same_masks(self._masks(), self.step)
        self._copies.update(self.layers)
        seconds, num_bytes = self._now() - started, self.ranks.num_bytes - bytes_before
        self.cost.num_updates += 1
        self.cost.seconds += seconds
        self.cost.num_bytes += num_bytes
        logger.info("step %d: masks updated in %.4f s, %d bytes over ranks", self.step, seconds, num_bytes)

    def _notify(self, name: str, mask: Tensor, next_mask: Tensor, growth: Tensor | None) -> None:
        for listener in self.listeners:
            listener(name, mask, next_mask, growth)

    def _now(self) -> float:
        if self.ranks.device.type != "cpu":
            torch.accelerator.synchronize()  # do not count what the device had to do before
        return time.perf_counter()

    def _unused_layers(self) -> set[str]:
        """The layers that no backward pass of this step has reached on any rank (LayerDrop): they keep their masks.

        Raises:
            RuntimeError: on all ranks, if there was no backward pass through any of them.
        """
        layers = {name: layer for name, layer in self.layers.items() if self._takes_updates(layer)}
        captures = [layer.dense_gradient for layer in layers.values()]
        arrived = self.ranks.any_has([capture is not None and capture.total is not None for capture in captures])
        unused = {name for name, has_gradient in zip(layers, arrived, strict=True) if not has_gradient}
        if unused and len(unused) == len(layers):
            raise RuntimeError(
                f"{next(iter(layers))}: no dense gradient reached step {self.step}, nor did one reach any other sparse "
                "layer; run forward and backward() between two optimizer steps. Gradients that are put into .grad by "
                "hand, from torch.autograd.grad or torch.func, are those of active weights alone"
            )
        self._misses = {name: self._misses.get(name, 0) + 1 for name in unused}
        for name in unused:
            log = logger.warning if self._misses[name] == MISSES_TO_WARN else logger.info
            log(
                "step %d: %s was not used, so its mask stays (%d updates in a row)", self.step, name, self._misses[name]
            )
        return unused

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
                f"{name}: the dense gradient at step {self.step} is not finite; training has diverged, or gradients "
                "of a step that a gradient scaler skipped were kept: call optimizer.zero_grad(), or "
                "controller.begin_step(), before each step's first micro-batch"
            )
        return scores

    def _arm(self) -> None:
        """Capture dense gradients during the coming optimizer step, if it updates masks."""
        self._disarm()
        if not (self.algorithm.needs_dense_gradient and self.algorithm.is_update_step(self.step + 1)):
            return
        for layer in filter(self._has_updates, self.layers.values()):  # a frozen one may be unfrozen before the step
            layer.dense_gradient = DenseGradient(layer.growth_scores if self._reduces_at_once else None)
            if (watch := self.backend.watch(layer)) is not None:
                layer.dense_gradient.is_thrown_away = watch.is_thrown_away
                self._watches.append(watch)
        compiler_stance.hold(self)  # compiled graphs do not capture

    def _disarm(self) -> None:
        for layer in self.layers.values():
            layer.dense_gradient = None
        for watch in self._watches:
            watch.close()
        self._watches.clear()
        compiler_stance.release(self)
