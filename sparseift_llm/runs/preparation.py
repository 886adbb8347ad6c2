"""Before a run trains: its TrainingArguments, its output folder, the checkpoint to resume, and `recipe.json`."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.deepspeed import is_deepspeed_available
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_liger_kernel_available

from sparseift_llm.checkpoints.trainer_folder import is_complete, last_complete_checkpoint
from sparseift_llm.config.as_begun import BEFORE, BEFORE_IN_DST
from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.data.loading import LoadedData
from sparseift_llm.runs.formats import METRICS_NAME, RECIPE_NAME
from sparseift_llm.runs.recipe import Recipe, recorded_recipe
from sparseift_llm.runs.recipe_training import trainer_fields
from sparseift_llm.runs.resuming import SIZE_KEY, changes
from sparseift_llm.runs.trainer import sequences_per_step
from sparseift_llm.utils.files import write_json
from sparseift_llm.utils.provenance import versions
from sparseift_llm.utils.words import check_choice

logger = logging.getLogger("pretrain")
_WANT_A_MODEL = ("galore", "apollo", "lomo", "adalomo")  # optimizers that the Trainer makes for a model


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's training section as TrainingArguments, without `resume_from_checkpoint` (see `prepare_output`).

    Raises:
        ValueError: transformers does not know an argument, or refuses its value; a tracker, an optimizer or DeepSpeed
            is not installed; the schedule does not take its options; or the number of tokens of an optimizer step would
            not be known.
    """
    values = trainer_fields(recipe.training)
    values.pop("resume_from_checkpoint", None)
    values.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    if values.get("deepspeed") and not is_deepspeed_available():
        raise ValueError("training.deepspeed needs a package that is not installed: pip install deepspeed")
    if values.get("use_liger_kernel") and not is_liger_kernel_available():
        raise ValueError("training.use_liger_kernel needs a package that is not installed: pip install liger-kernel")
    try:
        args = TrainingArguments(**values)
    except TypeError as error:
        raise ValueError(f"training: {error}") from error
    _check_trackers(args)
    _check_optimizer(args)
    _check_schedule(args)
    _check_batches(args)
    return args


def _check_trackers(args: TrainingArguments) -> None:
    """The Trainer would look for the packages of its trackers only when text and model are there."""
    installed = get_available_reporting_integrations()
    for name in args.report_to or ():
        check_choice("training.report_to", name, INTEGRATION_TO_CALLBACK)
        if name not in (*installed, "flyte"):  # which transformers leaves out of its list
            raise ValueError(
                f"training.report_to={name!r} needs a package that is not installed; install it (pip install {name}), "
                "or leave report_to out: metrics.jsonl is written without"
            )


def _check_optimizer(args: TrainingArguments) -> None:
    """The Trainer would import the optimizer's package, and read its options, only when text and model are there."""
    name = OptimizerNames(args.optim).value
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise ValueError(f"training.optim={name!r} needs a package that is not installed: {error}") from error
    except ValueError as error:
        if name.startswith(_WANT_A_MODEL):  # which is not there yet
            return
        raise ValueError(f"training.optim={name!r} with training.optim_args={args.optim_args!r}: {error}") from error
    for option in (args.optim_args or "").replace(" ", "").split(","):
        key = option.partition("=")[0]
        if key and not _is_read(args, key):
            raise ValueError(
                f"training.optim_args={args.optim_args!r}: the Trainer reads no {key!r} for training.optim={name!r}, "
                "and would ignore it; leave it out (adam_beta1, adam_beta2, adam_epsilon and weight_decay are keys of "
                "training)"
            )


def _is_read(args: TrainingArguments, key: str) -> bool:
    """Whether the Trainer looks for `key` in optim_args: then a value that cannot be makes a difference."""
    try:
        found = []
        for text in (f"{key}=?", None):
            probe = copy.copy(args)
            probe.optim_args = text
            found.append(Trainer.get_optimizer_cls_and_kwargs(probe))
    except (ValueError, AttributeError):
        return True
    return found[0] != found[1]


def _check_schedule(args: TrainingArguments) -> None:
    """The Trainer would make the schedule only when text and model are there."""
    given: Any = args.lr_scheduler_kwargs or {}
    try:
        get_scheduler(args.lr_scheduler_type, SGD([torch.zeros(1)], 1.0), 1, 10, dict(given))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"training.lr_scheduler_kwargs={given!r} is not for training.lr_scheduler_type="
            f"{SchedulerType(args.lr_scheduler_type).value!r}: {error}"
        ) from error


def _check_batches(args: TrainingArguments) -> None:
    """Tokens are counted by optimizer steps of one size, which has to be known beforehand."""
    if args.auto_find_batch_size:
        raise ValueError(
            "training.auto_find_batch_size=True changes the batch while the run goes on, so that its tokens could not "
            "be counted; find the size first, and give it as per_device_train_batch_size"
        )
    if args.accelerator_config.split_batches:  # type: ignore[union-attr]
        raise ValueError(
            "training.accelerator_config.split_batches=True makes per_device_train_batch_size that of all processes "
            "together, so that tokens would be counted wrongly; leave it out, and divide the size by their number"
        )


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
        has_checkpoint = any(output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        if (has_checkpoint or (output_dir / METRICS_NAME).is_file()) and not resume:
            way_out = "" if has_checkpoint else " (it has no checkpoint, so you may also delete it, and start anew)"
            raise ValueError(
                f"{output_dir} already holds a run{way_out}; continue it with --resume_from_checkpoint true, "
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


def check_recipe(recipe: Recipe, data: LoadedData, args: TrainingArguments) -> None:
    """Write `recipe.json`, and refuse to go on with another model, data or sparsity than the run began with.

    Args:
        recipe: what is going to be trained.
        data: its text.
        args: its training section.

    Raises:
        ValueError: one of these sections or the text itself has changed since, or `recipe.json` is damaged.
    """
    path = Path(recipe.training["output_dir"]) / RECIPE_NAME
    now = {
        **recipe.to_dict(),
        SIZE_KEY: sequences_per_step(args),
        "data_fingerprint": data.fingerprint,
        "versions": versions(),
    }
    before = recorded_recipe(path) if path.is_file() else now
    before["data"]["cache_dir"] = now["data"]["cache_dir"]  # where tokens are kept does not matter
    for key in ("model", "data", "sparse_ift", "data_fingerprint"):
        if before.get(key) != now[key]:
            changed = ", ".join(changes(before.get(key), now[key], key))
            raise ValueError(
                f"{path.parent} was begun with another {key}: {changed}; resume with the same recipe and text, or "
                "choose another --output_dir"
            )
    if args.process_index == 0:
        write_json(path, now)
