"""`SparseTrainingCallback`: a controller for the transformers Trainer, with automatic resume.

What it logs is in log.py, and which checkpoints are complete is decided in checkpoints/trainer_folder.py.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from sparseift_llm.checkpoints.mask_file import MASKS_NAME, apply_masks, digest, read_masks, save_masks
from sparseift_llm.checkpoints.saving import tell_before_saving
from sparseift_llm.checkpoints.trainer_folder import (
    SAVING_NAME,
    check_has_optimizer_state,
    find_resumed_checkpoint,
    set_aside_incomplete,
)
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.trainer.log import SUMMARY, MaskReport, chosen_metrics, go_first
from sparseift_llm.trainer.resumed_checkpoint import (
    check_before_loading,
    check_same_sparsity,
    check_same_tokens,
    warn_of_changes,
)
from sparseift_llm.trainer.speed import ReportOptions
from sparseift_llm.training.checks import fits
from sparseift_llm.training.controller import SparseTrainingController
from sparseift_llm.utils.numbers import check_count

logger = logging.getLogger(__name__)


class SparseTrainingCallback(TrainerCallback, ExportableState):
    """Dynamic sparse training in a Trainer: `Trainer(model=sparsify(...), callbacks=[SparseTrainingCallback()])`.

    What to do is read from the model (`SparseIFTConfig.dst`). Checkpoints hold the masks
    (`sparse_masks.safetensors`) and, in `trainer_state.json`, the rest of the state;
    `trainer.train(resume_from_checkpoint=True)` goes on from them, and half-written checkpoints are set aside when the
    Trainer is created (so do not create one for the `output_dir` of a run that is still going on). It becomes the first
    of the Trainer's callbacks, so that every tracker gets what it adds to the log.

    Args:
        metrics: which metrics of docs/metrics.md to log. `summary` logs at most six, of which none is constant; `all`
            or True logs everything; False logs nothing and writes no `layers.jsonl`. Training is the same with each.
        tokens_per_step, seq_len, peak_flops_per_second: for metrics of speed, see `ReportOptions`.
        backward_passes: per optimizer step, if a `training_step` of your own makes others than
            `gradient_accumulation_steps`. One loss that uses the model several times takes one backward pass.

    Raises:
        ValueError: an argument out of range. At the start of training: the model has no sparse layers, DeepSpeed,
            FSDP1 or DataParallel is in use, the resumed checkpoint is of another sparsity, its masks are missing,
            damaged or another model's, it holds no optimizer state, or it was written with another `tokens_per_step`
            or `seq_len`.
        RuntimeError: after a step that the controller has not seen.
    """

    def __init__(
        self,
        metrics: str | bool = SUMMARY,
        tokens_per_step: int | None = None,
        seq_len: int | None = None,
        peak_flops_per_second: float | str | None = None,
        backward_passes: int | None = None,
    ) -> None:
        if backward_passes is not None:
            check_count("backward_passes", backward_passes)
        self.backward_passes = backward_passes
        self.options = ReportOptions(tokens_per_step, seq_len, peak_flops_per_second)
        self.metrics = chosen_metrics(metrics)
        self.report: MaskReport | None = None
        self.controller: SparseTrainingController | None = None
        self.saved: dict[str, Any] = {}
        self._output_dir = "."
        self._is_attached = False
        self._step = 0
        self._counted_before: int | None = None
        self._checkpoint: Path | None = None  # that is just being written
        self._rank_files: list[str] = []

    def attach(self, trainer: Trainer) -> SparseTrainingCallback:
        """Put this callback ahead of all other callbacks of `trainer`, which need not have it yet.

        Trackers such as TensorBoard then get what it adds to the log. `Trainer(callbacks=[callback])` does as well, but
        has to find the Trainer at the start of training, which transformers does not tell its callbacks.

        Returns:
            This callback.
        """
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        else:
            self.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
        callbacks.insert(0, self)
        self._is_attached = True
        return self

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._output_dir = args.output_dir or "."
        if (model := kwargs.get("model")) is not None:
            check_before_loading(model)
        with args.main_process_first(local=False, desc="checking checkpoints"):
            if args.process_index == 0:
                set_aside_incomplete(self._output_dir)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self._output_dir = args.output_dir or "."  # also when restored from a checkpoint, without on_init_end
        fsdp: Any = args.fsdp_config if args.fsdp else None
        if args.deepspeed or (fsdp and fsdp.get("xla")):
            raise ValueError(
                "SparseTrainingCallback does not support DeepSpeed or XLA's FSDP; use DistributedDataParallel, or "
                'FSDP2 with TrainingArguments(fsdp=True, fsdp_config={"version": 2}), or DeepSpeed ZeRO in a loop of '
                "your own with SparseTrainingController(engine, engine.optimizer, ...)"
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process (torch.nn.DataParallel) are not supported: start one process "
                "per GPU with accelerate launch or torchrun, or choose one with CUDA_VISIBLE_DEVICES"
            )
        assert model is not None
        if not self._is_attached:
            go_first(self)
        self._rank_files = _rank_files(args)
        self._close()  # what an earlier train() left that ended in an exception
        micro_batches = self.backward_passes or args.gradient_accumulation_steps
        self.controller = SparseTrainingController(model, optimizer, state.max_steps, micro_batches)
        if state.global_step == 0:  # the Trainer's own schedule starts again, too, when train() is called twice
            self.controller.accept_optimizer_steps()
        tell_before_saving(model, self._before_saving)
        scaler = getattr(optimizer, "scaler", None)
        self.report = None
        if self.metrics is not None:
            self.report = MaskReport(self.controller, model, args, scaler, self.options, self.metrics)
        if state.global_step > 0:
            self._resume(args, state, model)
        if self.report is not None:
            self.report.begin(state)

    def _resume(self, args: TrainingArguments, state: TrainerState, model: PreTrainedModel) -> None:
        assert self.controller is not None
        name = type(self).__name__
        exported: Any = state.stateful_callbacks  # a mapping once it was loaded from a checkpoint
        if isinstance(exported.get(name), list):
            raise ValueError(f"the checkpoint was written with several {name}; pass the Trainer just one")
        saved = exported.get(name, {}).get("attributes", {}).get("saved", {})
        if not saved:
            raise ValueError(
                f"the checkpoint at step {state.global_step} was not written with {name}, so it holds no masks; "
                "start a new run from its weights instead of resuming"
            )
        check_same_tokens(exported[name].get("args", {}), self.options)
        folder = find_resumed_checkpoint(
            (
                args.resume_from_checkpoint,
                Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}",
                saved["checkpoint"],
            ),
            name,
            saved["masks_digest"],
        )
        check_has_optimizer_state(folder)
        check_same_sparsity(folder, model)
        masks = read_masks(folder)
        if digest(masks) != saved["masks_digest"]:  # before a weight is set to 0
            raise ValueError(
                f"the masks in {folder} are not those its trainer_state.json speaks of; restore the folder"
            )
        apply_masks(model, masks, folder, check_weights=True)
        if state.is_world_process_zero:
            warn_of_changes(folder, model)
        self.controller.load_counters(saved)
        if self.report is not None:
            self.report.restore(folder, saved.get("metrics"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.controller is not None:
            self.controller.begin_step()
            self._counted_before = self.controller.step
        if self.report is not None:
            self.report.begin_step(args, state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.report is not None:
            self.report.before_optimizer_step()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._step = state.global_step
        self._check_step_was_counted(kwargs.get("optimizer"))
        if self.report is not None:
            self.report.end_step()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.report is not None:
            self.report.interrupt()

    on_save = on_evaluate

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Add masks to the files of the checkpoint just written that the Trainer, by name, uploads to the hub."""
        if args.process_index == 0 and self.controller is not None:
            save_masks(self.controller.model, Path(args.output_dir or "."))

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the mask metrics, and the cost of mask updates since the start of this process, to what is logged."""
        if self.controller is None or logs is None or "loss" not in logs:
            return
        if self.metrics != SUMMARY:
            cost = self.controller.cost
            logs.update(mask_update_seconds=cost.seconds, mask_update_bytes=cost.num_bytes)
        if self.report is not None:
            self.report.log(logs, state)
        state.log_history[-1].update(logs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self._close()
        tell_before_saving(model, None)
        if args.load_best_model_at_end and state.best_model_checkpoint:
            _apply_best_masks(model, Path(state.best_model_checkpoint))

    def state(self) -> dict[str, Any]:
        """What a Trainer stores for this callback in `trainer_state.json`.

        A Trainer asks for it last, before it writes that file. So this is also the moment to write what only this
        callback knows how to write, and to take off the mark of a checkpoint that is not complete.
        """
        arguments = {"metrics": self.metrics or False, **asdict(self.options), "backward_passes": self.backward_passes}
        if self.controller is None:
            return {"args": arguments, "attributes": {"saved": {}}}
        # a search for hyperparameters and subclasses of the Trainer choose other folders
        checkpoint = self._checkpoint or Path(self._output_dir).absolute() / self._checkpoint_name
        self._checkpoint = None
        if checkpoint.is_dir() and not (checkpoint / MASKS_NAME).exists():
            save_masks(self.controller.model, checkpoint)  # sharded weights are saved without save_pretrained
        masks_digest = self.controller.masks_digest()
        saved = {
            **self.controller.counters(),
            "masks_digest": masks_digest,
            "checkpoint": str(checkpoint),
            "rank_files": self._rank_files,
        }
        if self.report is not None:
            saved["metrics"] = self.report.save(checkpoint, masks_digest)
        (checkpoint / SAVING_NAME).unlink(missing_ok=True)
        return {"args": arguments, "attributes": {"saved": saved}}

    @property
    def _checkpoint_name(self) -> str:
        """As the Trainer names the folder of the checkpoint after the last step, wherever it puts it."""
        return f"{PREFIX_CHECKPOINT_DIR}-{self._step}"

    def _before_saving(self, folder: Path) -> None:
        """The model is about to be saved: perhaps the first part of a checkpoint, which is marked as not complete."""
        if folder.name != self._checkpoint_name:
            return
        self._checkpoint = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SAVING_NAME).touch()

    def _check_step_was_counted(self, optimizer: Any) -> None:
        """A Trainer's step is one step of the optimizer, unless a gradient scaler skipped it."""
        if self.controller is None or self._counted_before is None:
            return
        expected = 0 if getattr(optimizer, "step_was_skipped", False) else 1
        counted, self._counted_before = self.controller.step - self._counted_before, None
        if counted != expected:
            name = type(getattr(optimizer, "optimizer", optimizer)).__name__
            raise RuntimeError(
                f"the Trainer has taken step {self._step}, but the controller has counted {counted} steps of the "
                f"optimizer ({name}) in it, so masks would not be updated when they should: call step() of the "
                "Trainer's optimizer once per training step"
            )

    def _close(self) -> None:
        for part in (self.controller, self.report):
            if part is not None:
                part.close()


def _apply_best_masks(model: PreTrainedModel, folder: Path) -> None:
    """Set the masks that belong to the weights which the Trainer has just loaded from its best checkpoint.

    If the checkpoint is gone, the Trainer has warned and has kept the weights of the last step; so masks stay, too.

    Raises:
        ValueError: the masks are missing or damaged, although the weights were loaded.
    """
    weights = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    has_weights = any((folder / name).exists() for name in weights)
    keep = all(fits(layer) for layer in sparse_layers(model).values())
    if not (folder / MASKS_NAME).exists() and not has_weights and keep:
        logger.warning("the best checkpoint, %s, is not there any more: the model of the last step is kept", folder)
        return
    apply_masks(model, read_masks(folder), folder)


def _rank_files(args: TrainingArguments) -> list[str]:
    """Names of the random states that the ranks beside this one write to every checkpoint."""
    if args.save_only_model:
        return []
    if args.world_size == 1:
        return ["rng_state.pth"]
    ranks = range(args.world_size)
    if args.save_on_each_node:
        first = args.process_index - args.local_process_index
        ranks = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)))
    return [f"rng_state_{rank}.pth" for rank in ranks]
