"""Before a run trains: its TrainingArguments, its output folder, the checkpoint to resume, and `recipe.json`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparseift_llm.checkpoints.trainer_folder import is_complete, last_complete_checkpoint
from sparseift_llm.config.as_begun import BEFORE, BEFORE_IN_DST
from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.data.loading import LoadedData
from sparseift_llm.runs.formats import METRICS_NAME, RECIPE_NAME
from sparseift_llm.runs.recipe import Recipe, recorded_recipe
from sparseift_llm.runs.recipe_training import LearningRateFactors, trainer_fields
from sparseift_llm.utils.files import write_json
from sparseift_llm.utils.provenance import versions

logger = logging.getLogger("pretrain")

# Training settings that stand in the optimizer's or the scheduler's state, from which a resumed run restores them.
# Those of the schedule's shape (warmup, its type, the number of steps) do not: they are read anew from the recipe.
IN_OPTIMIZER_STATE = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim",
    "optim_args",
    "embedding_lr_factor",
    "head_lr_factor",
)
_FIELDS = {
    field.name: field for config in (TrainingArguments, LearningRateFactors) for field in dataclasses.fields(config)
}
_DEFAULTS = {key: _FIELDS[key].default for key in IN_OPTIMIZER_STATE}


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's training section as TrainingArguments, without `resume_from_checkpoint` (see `prepare_output`).

    Raises:
        ValueError: transformers does not know an argument, or refuses its value.
    """
    values = trainer_fields(recipe.training)
    values.pop("resume_from_checkpoint", None)
    values.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    try:
        return TrainingArguments(**values)
    except TypeError as error:
        raise ValueError(f"training: {error}") from error


def prepare_output(recipe: Recipe, output_dir: Path, args: TrainingArguments) -> Path | None:
    """Find the checkpoint to resume from, if the recipe asks for one, and refuse to overwrite another run.

    Returns:
        A complete checkpoint, or None to start at step 0.

    Raises:
        ValueError: the folder holds a run that is not to be resumed, or the checkpoint named is not complete.
    """
    resume = recipe.training.get("resume_from_checkpoint")
    if args.process_index == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        used = any(output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")) or (output_dir / METRICS_NAME).is_file()
        if used and not resume:
            raise ValueError(
                f"{output_dir} already holds a run; continue it with --resume_from_checkpoint true, "
                "or choose another --output_dir"
            )
        if not resume:
            (output_dir / RECIPE_NAME).unlink(missing_ok=True)
    if isinstance(resume, str):
        if not is_complete(Path(resume)):
            raise ValueError(f"resume_from_checkpoint={resume!r} is not a folder with a complete checkpoint")
        return Path(resume)
    if not resume:
        return None
    checkpoint = last_complete_checkpoint(output_dir)
    if checkpoint is None:
        logger.info("%s has no complete checkpoint yet: starting at step 0", output_dir)
    return checkpoint


def as_it_was_begun(recipe: Recipe, output_dir: Path) -> Recipe:
    """The recipe of a run that goes on, with what its first part did where options are newer than that part.

    Args:
        recipe: as it is read now, with defaults that are for new runs.
        output_dir: of the run; what it recorded of its recipe counts.
    """
    path = output_dir / RECIPE_NAME
    if recipe.sparse_ift is None or not path.is_file():
        return recipe
    before = recorded_recipe(path)["sparse_ift"] or {}
    values = recipe.sparse_ift.to_dict()
    for old, now, options in ((before, values, BEFORE), (before.get("dst", {}), values["dst"], BEFORE_IN_DST)):
        for key, value in options.items():
            if key in old and old[key] == value != now[key]:
                logger.info("%s was begun with %s=%r, and goes on with it", output_dir, key, value)
                now[key] = value
    return dataclasses.replace(recipe, sparse_ift=SparseIFTConfig.from_dict(values))


def check_recipe(recipe: Recipe, data: LoadedData, args: TrainingArguments, resume_from: Path | None = None) -> None:
    """Write `recipe.json`, and refuse to go on with another model, data or sparsity than the run began with.

    Args:
        recipe: what is going to be trained.
        data: its text.
        args: its training section.
        resume_from: the checkpoint that training goes on from, None if it starts at step 0.

    Raises:
        ValueError: one of these sections, the text itself, or a setting that the checkpoint's optimizer has in its
            state has changed since; or `recipe.json` is damaged.
    """
    path = Path(recipe.training["output_dir"]) / RECIPE_NAME
    if resume_from is not None:
        _check_optimizer_settings(recipe.training, resume_from)
    now = {**recipe.to_dict(), "data_fingerprint": data.fingerprint, "versions": versions()}
    before = recorded_recipe(path) if path.is_file() else now
    before["data"]["cache_dir"] = now["data"]["cache_dir"]  # where tokens are kept does not matter
    for key in ("model", "data", "sparse_ift", "data_fingerprint"):
        if before.get(key) != now[key]:
            changes = ", ".join(_changes(before.get(key), now[key], key))
            raise ValueError(
                f"{path.parent} was begun with another {key}: {changes}; resume with the same recipe and text, or "
                "choose another --output_dir"
            )
    if args.process_index == 0:
        write_json(path, now)


def _changes(before: Any, now: Any, key: str) -> Iterator[str]:
    """In words, the options of a section that are not what they were."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        yield f"{key} was {before!r}, now {now!r}"
        return
    for name in dict.fromkeys((*before, *now)):
        if before.get(name) != now.get(name):
            yield from _changes(before.get(name), now.get(name), f"{key}.{name}")


def _check_optimizer_settings(training: Mapping[str, Any], resume_from: Path) -> None:
    """Refuse to change settings that a resumed run takes from its checkpoint, whatever its recipe says."""
    path = resume_from.parent / RECIPE_NAME
    if not path.is_file():  # a checkpoint without the recipe of its run: nothing can be compared
        return
    before = recorded_recipe(path)["training"]
    for key in IN_OPTIMIZER_STATE:
        default = _DEFAULTS[key]
        was, now = before.get(key, default), training.get(key, default)
        if was != now:
            raise ValueError(
                f"training.{key} was {was!r} when {path.parent} was begun, and is now {now!r}; a resumed run takes it "
                f"from the optimizer's state in {resume_from.name}, so that the new value would be ignored. Resume "
                f"with {key}={was!r}, or start a new run in another --output_dir"
            )
