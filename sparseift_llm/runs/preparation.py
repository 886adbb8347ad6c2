"""Before a run trains: its TrainingArguments, its output folder, the checkpoint to resume, and `recipe.json`."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparseift_llm.checkpoints.trainer_folder import is_complete, last_complete_checkpoint
from sparseift_llm.data.loading import LoadedData
from sparseift_llm.runs.formats import METRICS_NAME, RECIPE_NAME
from sparseift_llm.runs.recipe import Recipe, recorded_recipe
from sparseift_llm.utils.files import write_json
from sparseift_llm.utils.provenance import versions

logger = logging.getLogger("pretrain")


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's training section as TrainingArguments, without `resume_from_checkpoint` (see `prepare_output`).

    Raises:
        ValueError: transformers does not know an argument, or refuses its value.
    """
    values = {key: value for key, value in recipe.training.items() if key != "resume_from_checkpoint"}
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


def check_recipe(recipe: Recipe, data: LoadedData, args: TrainingArguments) -> None:
    """Write `recipe.json`, and refuse to go on with another model, data or sparsity than the run began with.

    Raises:
        ValueError: one of these sections, or the text itself, has changed since, or `recipe.json` is damaged.
    """
    path = Path(recipe.training["output_dir"]) / RECIPE_NAME
    now = {**recipe.to_dict(), "data_fingerprint": data.fingerprint, "versions": versions()}
    before = recorded_recipe(path) if path.is_file() else now
    before["data"]["cache_dir"] = now["data"]["cache_dir"]  # where tokens are kept does not matter
    for key in ("model", "data", "sparse_ift", "data_fingerprint"):
        if before.get(key) != now[key]:
            raise ValueError(
                f"{path.parent} was begun with another {key}: {before.get(key)}, now {now[key]}; resume with the same "
                "recipe and text, or choose another --output_dir"
            )
    if args.process_index == 0:
        write_json(path, now)
