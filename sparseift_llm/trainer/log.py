"""The mask metrics of a Trainer run: what `SparseTrainingCallback` adds to the log, `layers.jsonl`, and the state kept.

The metrics themselves are in metrics/.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, TrainerCallback

from sparseift_llm.checkpoints.mask_file import digest, read_masks, write_masks
from sparseift_llm.metrics.mask_history import MaskMetrics
from sparseift_llm.metrics.step_probe import StepSample
from sparseift_llm.metrics.throughput import WARM_UP_STEPS, Stopwatch, TrainingFlops, measured_peak
from sparseift_llm.training.controller import SparseTrainingController
from sparseift_llm.utils.files import set_aside
from sparseift_llm.utils.json_lines import append_line, keep_lines

logger = logging.getLogger(__name__)
HISTORY_NAME = "sparse_history.safetensors"
LAYERS_NAME = "layers.jsonl"


@dataclass(frozen=True)
class ReportOptions:
    """What a report cannot find out by itself. JSON can hold it.

    Args:
        tokens_per_step: tokens of one optimizer step on all ranks; without it no FLOPs and no speed are reported.
        seq_len: tokens per sequence, for attention FLOPs.
        peak_flops_per_second: of one device; `"measure"` times a matrix product at the start of training; without
            it `model_flops_utilization` is not reported.

    Raises:
        ValueError: a value out of range, or one of `tokens_per_step` and `seq_len` without the other.
    """

    tokens_per_step: int | None = None
    seq_len: int | None = None
    peak_flops_per_second: float | str | None = None

    def __post_init__(self) -> None:
        for name in ("tokens_per_step", "seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if (self.tokens_per_step is None) != (self.seq_len is None):
            raise ValueError(
                f"tokens_per_step={self.tokens_per_step} and seq_len={self.seq_len} go together; give both, or none"
            )
        peak = self.peak_flops_per_second
        if peak is not None and (peak != "measure" if isinstance(peak, str) else not 0 < peak < math.inf):
            raise ValueError(f"peak_flops_per_second must be above 0, 'measure' or None, got {peak!r}")
        if peak is not None and self.tokens_per_step is None:
            raise ValueError("peak_flops_per_second needs tokens_per_step and seq_len: FLOPs cannot be counted without")


class MaskReport:
    """Metrics of one call of `Trainer.train`.

    Args:
        controller: the run's.
        model: the Sparse-IFT model, not wrapped.
        args: the Trainer's.
        scaler: the gradient scaler or None.
        options: see there.
    """

    def __init__(
        self,
        controller: SparseTrainingController,
        model: PreTrainedModel,
        args: TrainingArguments,
        scaler: Any,
        options: ReportOptions,
    ) -> None:
        self.metrics = MaskMetrics(controller, scaler)
        self._controller = controller
        self._sample = StepSample(controller.model, controller.layers)
        self._is_sampling = False
        self._max_grad_norm = float(args.max_grad_norm or 0.0)
        self._layers_path = Path(args.output_dir or ".") / LAYERS_NAME
        self._watch = Stopwatch(WARM_UP_STEPS)
        self._flops: TrainingFlops | None = None
        self._peak: float | None = None
        self._tokens_per_step = options.tokens_per_step or 0
        if options.tokens_per_step is not None and options.seq_len is not None:
            self._flops = TrainingFlops(model, options.tokens_per_step, options.seq_len, controller)
        if options.peak_flops_per_second is not None:
            peak = options.peak_flops_per_second
            self._peak = args.world_size * (_measured(model, args) if isinstance(peak, str) else peak)
        self._flops_before: int | None = None
        self._step_before = 0

    def begin(self, state: TrainerState) -> None:
        """The first step comes; lines of steps that are run again are dropped, those of another run set aside."""
        if state.is_world_process_zero:
            self._layers_path.parent.mkdir(parents=True, exist_ok=True)
            if state.global_step:
                keep_lines(self._layers_path, state.global_step)
            elif self._layers_path.exists():
                aside = set_aside(self._layers_path, "earlier-")
                logger.warning("%s holds an earlier run's lines; they are now in %s", self._layers_path, aside.name)
        self._flops_before = self._flops.total(state.global_step) if self._flops else None
        self._step_before = state.global_step

    def begin_step(self, args: TrainingArguments, state: TrainerState) -> None:
        """Before a step's first micro-batch."""
        self._watch.begin_step()
        self._is_sampling = will_be_logged(state.global_step + 1, args, state)
        if self._is_sampling:
            self._sample.begin()

    def before_optimizer_step(self) -> None:
        """Between clipping and the optimizer, on all ranks."""
        if self._is_sampling:
            self._sample.end()
            if self._sample.saturated is not None:
                self._sample.saturated = self._controller.ranks.mean(self._sample.saturated)

    def end_step(self) -> None:
        """After the optimizer."""
        self._watch.end_step()

    def interrupt(self) -> None:
        """After evaluation and saving, whose time does not count as training."""
        self._watch.interrupt()

    def log(self, logs: dict[str, Any], state: TrainerState) -> None:
        """Add all metrics to a training step's `logs`, and a line to `layers.jsonl`."""
        logs.update(self.metrics.values())
        logs.update(self._sampled(logs))
        logs.update(self._speed(state.global_step))
        if state.is_world_process_zero:
            layers = {name: counts.to_dict() for name, counts in self.metrics.layers().items()}
            append_line(self._layers_path, {"step": state.global_step, "layers": layers})

    def close(self) -> None:
        """Leave controller and model alone."""
        self.metrics.close()
        self._sample.close()

    def save(self, checkpoint: Path, masks_digest: str) -> dict[str, Any]:
        """Write the state that belongs to a checkpoint which is just being written.

        Returns:
            The rest of the state, which JSON can hold.
        """
        masks = self.metrics.masks()
        if _holds(checkpoint, masks_digest):  # else a Trainer asks for its state without saving
            write_masks(masks, checkpoint / HISTORY_NAME)
        return {**self.metrics.counters(), "digest": digest(masks)}

    def restore(self, checkpoint: Path, saved: Mapping[str, Any] | None) -> None:
        """Go on from `save`'s state; a checkpoint without it is resumed, but exploration is unknown from then on.

        Raises:
            ValueError: the file is missing, damaged, or of another checkpoint.
        """
        if saved is None:
            logger.warning("%s was written without mask metrics: exploration cannot be reported", checkpoint)
            return
        masks = read_masks(checkpoint, HISTORY_NAME)
        if digest(masks) != saved["digest"]:
            raise ValueError(
                f"{checkpoint / HISTORY_NAME} is not the one its trainer_state.json speaks of; restore the folder"
            )
        self.metrics.restore(saved, masks)

    def _sampled(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """What was measured on the step just taken; gradients as they were before the Trainer clipped them."""
        if not self._is_sampling:
            return {}
        values = {}
        norm, total = self._sample.grad_norm, logs.get("grad_norm")
        if norm is not None and (total is not None or not self._max_grad_norm):
            clipped_by = min(1.0, self._max_grad_norm / (float(total or 0.0) + 1e-6)) if self._max_grad_norm else 1.0
            value = float(norm) / clipped_by if clipped_by else math.nan
            if math.isfinite(value):  # not so in a step that a gradient scaler skips
                values["grad_norm_active"] = value
        if self._sample.saturated is not None:
            values["saturated_units"] = float(self._sample.saturated)
        return values

    def _speed(self, step: int) -> dict[str, float]:
        num_steps, seconds = self._watch.read()
        if self._flops is None:
            return {}
        flops = self._flops.total(step)
        values: dict[str, float] = {"train_flops": flops}
        if num_steps > 0 and seconds > 0:
            values["tokens_per_second"] = num_steps * self._tokens_per_step / seconds
            if self._peak is not None and self._flops_before is not None:
                flops_per_step = (flops - self._flops_before) / (step - self._step_before)  # with those not timed
                values["model_flops_utilization"] = flops_per_step * num_steps / seconds / self._peak
        self._flops_before, self._step_before = flops, step
        return values


def will_be_logged(step: int, args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the Trainer's own schedule logs after `step`; with `logging_strategy="epoch"` that is not foreseen."""
    if args.logging_strategy != "steps":
        return False
    return step % max(1, int(state.logging_steps)) == 0 or (step == 1 and args.logging_first_step)


def go_first(callback: TrainerCallback) -> None:
    """Make `callback`, which is handling an event, the first of its Trainer's callbacks.

    A Trainer calls TensorBoard, wandb and other trackers before a user's callbacks, so that what those add to `logs`
    would come too late. transformers has no event that tells a callback which Trainer calls it, so this looks at the
    call stack. `SparseTrainingCallback.attach` does without.
    """
    handler = _handler_on_stack()
    if handler is None or callback not in handler.callbacks:
        logger.warning("the mask metrics may be missing in trackers: no Trainer was found that calls this callback")
        return
    handler.callbacks.remove(callback)
    handler.callbacks.insert(0, callback)  # the loop over callbacks that is under way goes on behind where it was


def _handler_on_stack() -> CallbackHandler | None:
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None


def _measured(model: PreTrainedModel, args: TrainingArguments) -> float:
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
    return measured_peak(args.device, dtype)


def _holds(checkpoint: Path, masks_digest: str) -> bool:
    """Whether the masks in the folder are those of now."""
    try:
        return digest(read_masks(checkpoint)) == masks_digest
    except ValueError:
        return False
