"""The mask metrics of a Trainer run: what `SparseTrainingCallback` adds to the log, `layers.jsonl`, and the state kept.

The metrics themselves are in metrics/.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, TrainerCallback

from sparseift_llm.checkpoints.mask_file import digest, read_masks, write_masks
from sparseift_llm.metrics.mask_history import MaskMetrics
from sparseift_llm.metrics.step_probe import StepSample
from sparseift_llm.metrics.throughput import TrainingFlops
from sparseift_llm.trainer.speed import ReportOptions, SpeedReport
from sparseift_llm.training.controller import SparseTrainingController
from sparseift_llm.utils.files import set_aside
from sparseift_llm.utils.json_lines import append_line, keep_lines
from sparseift_llm.utils.words import check_choice

logger = logging.getLogger(__name__)
HISTORY_NAME = "sparse_history.safetensors"
LAYERS_NAME = "layers.jsonl"


SUMMARY = "summary"
ALL = "all"
_ALWAYS = ("grad_norm_active", "tokens_per_second", "model_flops_utilization")
_SEARCH = ("exploration", "mask_churn", "mask_survival")
_SUMMARY_KEYS = {  # of each update rule: only what changes while it trains
    "static": _ALWAYS,
    "gmp": ("sparsity", *_ALWAYS),
    "granet": ("sparsity", *_SEARCH, *_ALWAYS),
}
_SUMMARY_KEYS_OF_OTHERS = (*_SEARCH, *_ALWAYS)


def chosen_metrics(metrics: str | bool) -> str | None:
    """Which metrics a callback logs, by its argument `metrics`: `summary`, `all`, or None for none.

    Raises:
        ValueError: another word.
    """
    if isinstance(metrics, bool):
        return ALL if metrics else None
    check_choice("metrics", metrics, (SUMMARY, ALL))
    return metrics


class MaskReport:
    """Metrics of one call of `Trainer.train`.

    Args:
        controller: the run's.
        model: the Sparse-IFT model, not wrapped.
        args: the Trainer's.
        scaler: the gradient scaler or None.
        options: see there.
        which: `summary` or `all`, see docs/metrics.md. `layers.jsonl` is the same with both.
    """

    def __init__(
        self,
        controller: SparseTrainingController,
        model: PreTrainedModel,
        args: TrainingArguments,
        scaler: Any,
        options: ReportOptions,
        which: str = ALL,
    ) -> None:
        self.metrics = MaskMetrics(controller, scaler)
        self._controller = controller
        self._sample = StepSample(controller.model, controller.layers)
        self._is_sampling = False
        self._max_grad_norm = float(args.max_grad_norm or 0.0)
        self._layers_path = Path(args.output_dir or ".") / LAYERS_NAME
        flops = None
        if options.tokens_per_step is not None and options.seq_len is not None:
            flops = TrainingFlops(model, options.tokens_per_step, options.seq_len, controller).total
        self._speed = SpeedReport(options, flops, model, args)
        self._kept: tuple[str, ...] | None = None  # of all that is known; None keeps everything
        if which == SUMMARY:
            algorithm = controller.algorithm.config.algorithm
            self._kept = _SUMMARY_KEYS.get(algorithm, _SUMMARY_KEYS_OF_OTHERS)

    def begin(self, state: TrainerState) -> None:
        """The first step comes; lines of steps that are run again are dropped, those of another run set aside."""
        if state.is_world_process_zero:
            self._layers_path.parent.mkdir(parents=True, exist_ok=True)
            if state.global_step:
                keep_lines(self._layers_path, state.global_step)
            elif self._layers_path.exists():
                aside = set_aside(self._layers_path, "earlier-")
                logger.warning("%s holds an earlier run's lines; they are now in %s", self._layers_path, aside.name)
        self._speed.begin(state.global_step)

    def begin_step(self, args: TrainingArguments, state: TrainerState) -> None:
        """Before a step's first micro-batch."""
        self._speed.watch.begin_step()
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
        self._speed.watch.end_step()

    def interrupt(self) -> None:
        """After evaluation and saving, whose time does not count as training."""
        self._speed.watch.interrupt()

    def log(self, logs: dict[str, Any], state: TrainerState) -> None:
        """Add metrics to a training step's `logs`, and a line to `layers.jsonl`."""
        values = {**self.metrics.values(), **self._sampled(logs), **self._speed.values(state.global_step)}
        logs.update({key: value for key, value in values.items() if self._kept is None or key in self._kept})
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


def _holds(checkpoint: Path, masks_digest: str) -> bool:
    """Whether the masks in the folder are those of now."""
    try:
        return digest(read_masks(checkpoint)) == masks_digest
    except ValueError:
        return False
