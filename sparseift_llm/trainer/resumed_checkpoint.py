"""What a Trainer's checkpoint must have in common with the model and the callback that go on from it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import CONFIG_NAME

from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.config.as_begun import as_begun
from sparseift_llm.record.model_record import ModelRecord, has_record, transformation_values
from sparseift_llm.record.specs import MatrixSpec
from sparseift_llm.trainer.speed import ReportOptions
from sparseift_llm.training.checks import changed_keys

logger = logging.getLogger(__name__)
_FREE = ("dst", "seed")  # options that a resumed run may change


def check_before_loading(model: nn.Module) -> None:
    """From now on a Trainer that resumes a checkpoint of another sparsity into `model` gets an error that says so.

    A Trainer loads weights before its callbacks hear of the checkpoint, and torch would complain of sizes, if they
    differ at all. So this is a hook of the model's `load_state_dict`. It finds the checkpoint on the call stack,
    because transformers tells nobody which one it reads.
    """
    if _before_loading not in [getattr(hook, "hook", hook) for hook in model._load_state_dict_pre_hooks.values()]:
        model.register_load_state_dict_pre_hook(_before_loading)


def _before_loading(model: nn.Module, *_: Any) -> None:
    folder = _checkpoint_on_stack()
    if folder is not None:
        check_same_sparsity(folder, model)


def _checkpoint_on_stack() -> Path | None:
    """The folder that a Trainer is resuming from, if one is."""
    frame = inspect.currentframe()
    while frame is not None:
        folder = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(frame.f_locals.get("self"), Trainer) and isinstance(folder, str | Path):
            return Path(folder)
        frame = frame.f_back
    return None


def check_same_sparsity(folder: Path, model: nn.Module) -> None:
    """Refuse a checkpoint whose sparse layers have other sizes or numbers of active weights than the model's.

    Nothing is known, and nothing refused, where config.json is missing, as beside sharded weights, or damaged.

    Args:
        folder: of the checkpoint.
        model: what goes on from it; anything but a transformers model passes.

    Raises:
        ValueError: with the options of both.
    """
    if not isinstance(model, PreTrainedModel) or not (folder / CONFIG_NAME).is_file():
        return
    now = read_record(model.config) if has_record(model.config) else None
    try:
        config = type(model.config).from_json_file(folder / CONFIG_NAME)
        before = read_record(config) if has_record(config) else None
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("whether %s is of the same sparsity cannot be read (%r)", folder, error)
        return
    if _sizes(before) != _sizes(now):
        raise ValueError(
            f"{folder} is a checkpoint of another sparsity: {_difference(before, now)}; resume with a model of the "
            "checkpoint's SparseIFTConfig, or start a new run"
        )


def _sizes(record: ModelRecord | None) -> list[tuple[str, MatrixSpec]]:
    """What decides whether masks and weights fit; in which groups active weights are counted is none of it."""
    return [
        (layer.name, dataclasses.replace(matrix, transposed=False, heads=None, row_groups=()))
        for layer in (record.layers if record else ())
        for matrix in layer.matrices
    ]


def _difference(before: ModelRecord | None, now: ModelRecord | None) -> str:
    """In words, how two records differ whose sizes do."""
    if before is None or now is None:
        there, here = ("dense" if record is None else "sparse" for record in (before, now))
        return f"its model is {there}, and this one {here}"
    theirs, ours = (
        {**record.transformation.to_dict(), "dense_model": vars(record.dense_model)} for record in (before, now)
    )
    changed = [key for key in theirs if key not in _FREE and theirs[key] != ours[key]]
    words = [f"{key} is {theirs[key]!r} there, and {ours[key]!r} here" for key in changed]
    return ", ".join(words) or "its projections have other sizes, or other numbers of active weights"


def check_same_tokens(before: Mapping[str, Any], now: ReportOptions) -> None:
    """Refuse steps of another size: `train_flops` of all steps so far are counted by the one that is given now.

    Raises:
        ValueError: naming the option.
    """
    for option in ("tokens_per_step", "seq_len"):
        was, value = before.get(option), getattr(now, option)
        if None not in (was, value) and was != value:
            raise ValueError(
                f"the checkpoint was written with {option}={was}, and the callback has {option}={value}, so that the "
                f"run's FLOPs would be counted wrongly; resume with {option}={was} and batches of that size, or start "
                "a new run"
            )


def warn_of_changes(folder: Path, model: PreTrainedModel) -> None:
    """Log a warning if the checkpoint was written with other mask updates than are coming."""
    if not (folder / CONFIG_NAME).is_file():  # so it is beside sharded weights
        return
    try:
        values = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        before = _mask_options(values["sparse_ift"])
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("whether %s was written with other mask updates cannot be read (%r)", folder, error)
        return
    if changed := changed_keys(before, _mask_options(model.config.sparse_ift)):
        logger.warning("%s was written with other mask updates, and the run goes on with these: %s", folder, changed)


def _mask_options(record: Any) -> dict[str, Any]:
    """What a record says of mask updates."""
    values = as_begun(transformation_values(record))
    return {"kinds_apart": values["kinds_apart"], **values["dst"]}
