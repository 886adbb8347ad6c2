"""What a resumed run must have in common with the run that wrote its checkpoint.

Resuming takes the optimizer's state, the place in the data and the counts of steps from the checkpoint. A recipe that
asks for something else would be obeyed in part only, so it is refused before anything is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainingArguments

from sparseift_llm.checkpoints.loading import weight_files
from sparseift_llm.checkpoints.trainer_folder import check_has_optimizer_state
from sparseift_llm.runs.formats import RECIPE_NAME
from sparseift_llm.runs.metrics_log import read_metrics
from sparseift_llm.runs.recipe import Recipe, recorded_recipe
from sparseift_llm.runs.recipe_training import LearningRateFactors
from sparseift_llm.runs.trainer import sequences_per_step

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
# These schedules are no functions of the step: all of their options stand in the scheduler's state.
WITH_A_STATE = ("reduce_lr_on_plateau", "greedy")
_OF_THEIRS = ("lr_scheduler_type", "lr_scheduler_kwargs")
_FIELDS = {
    field.name: field for config in (TrainingArguments, LearningRateFactors) for field in dataclasses.fields(config)
}
_DEFAULTS = {key: _FIELDS[key].default for key in (*IN_OPTIMIZER_STATE, *_OF_THEIRS)}
SIZE_KEY = "sequences_per_step"  # in recipe.json


def check_resumed(recipe: Recipe, args: TrainingArguments, model: nn.Module, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint of another model, or with settings that would be ignored or counted wrongly.

    Args:
        recipe: what is going to be trained.
        args: its training section.
        model: its model.
        checkpoint: the folder that training goes on from.

    Raises:
        ValueError: the checkpoint's run had another model or sparsity, another number of sequences per step, or other
            settings that stand in the optimizer's state; it had other seeds for the same text; the checkpoint holds
            no optimizer state, or weights of other shapes; or its run's `recipe.json` is damaged.
    """
    check_has_optimizer_state(checkpoint)
    run = checkpoint.parent
    if not (run / RECIPE_NAME).is_file():  # a folder of a plain Trainer: only the weights can be compared
        _check_shapes(model, checkpoint)
    else:
        before = recorded_recipe(run / RECIPE_NAME)
        if run.resolve() != Path(recipe.training["output_dir"]).resolve():  # else all sections are compared
            _check_sections(recipe, before, checkpoint)
        _check_optimizer_settings(recipe.training, before["training"], checkpoint)
        if _text_options(recipe.to_dict()) == _text_options(before):
            _check_order_of_text(recipe.training, before["training"], run)
        _check_sequences_per_step(recipe, args, before, run)


def changes(before: Any, now: Any, key: str) -> Iterator[str]:
    """In words, the options of a section that are not what they were."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        was, wanted = ("a section" if isinstance(value, dict) else repr(value) for value in (before, now))
        yield f"{key} was {was}, now {wanted}"
        return
    for name in dict.fromkeys((*before, *now)):
        if before.get(name) != now.get(name):
            yield from changes(before.get(name), now.get(name), f"{key}.{name}")


def _check_sections(recipe: Recipe, before: Mapping[str, Any], checkpoint: Path) -> None:
    now = recipe.to_dict()
    for key in ("model", "sparse_ift"):
        if before[key] != now[key]:
            raise ValueError(
                f"{checkpoint} is a checkpoint of another {key}: {', '.join(changes(before[key], now[key], key))}; "
                "resume from a checkpoint of the same recipe, or start a new run"
            )


def _check_optimizer_settings(training: Mapping[str, Any], before: Mapping[str, Any], checkpoint: Path) -> None:
    keys: tuple[str, ...] = IN_OPTIMIZER_STATE
    if any(section.get("lr_scheduler_type") in WITH_A_STATE for section in (before, training)):
        keys += _OF_THEIRS
    for key in keys:
        default = _DEFAULTS[key]
        was, now = before.get(key, default), training.get(key, default)
        if was != now:
            raise ValueError(
                f"training.{key} was {was!r} when {checkpoint.parent} was begun, and is now {now!r}; a resumed run "
                f"takes it from the optimizer's state in {checkpoint.name}, so that the new value would be ignored. "
                f"Resume with {key}={was!r}, or start a new run in another --output_dir"
            )


def _text_options(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe["data"].items() if key != "cache_dir"}


def _check_order_of_text(training: Mapping[str, Any], before: Mapping[str, Any], run: Path) -> None:
    """Sequences are shuffled by a seed, and a resumed run leaves out as many as its checkpoint has seen."""
    for key in ("seed", "data_seed"):
        was, now = (_seed(section, key) for section in (before, training))
        if was != now:
            raise ValueError(
                f"training.{key} was {was} when {run} was begun, and is now {now}; text would come in another order, "
                f"and some of it be left out or repeated. Resume with {key}={was}, or start a new run in another "
                "--output_dir"
            )


def _seed(training: Mapping[str, Any], key: str) -> Any:
    """The Trainer shuffles by `data_seed`, or by `seed` where there is none."""
    value = training.get(key, _FIELDS[key].default)
    return _seed(training, "seed") if value is None else value


def _check_sequences_per_step(recipe: Recipe, args: TrainingArguments, before: Mapping[str, Any], run: Path) -> None:
    """Tokens are counted, and the place in the data is found, by steps of one size."""
    was, now = before.get(SIZE_KEY), sequences_per_step(args)
    if was is None:  # begun by version 0.1
        tokens = [line["train_tokens"] / line["step"] for line in read_metrics(run) if line["step"]]
        was = round(tokens[-1] / recipe.data.seq_len) if tokens else now
    if was != now:
        raise ValueError(
            f"an optimizer step of {run} had {was} sequences, and would now have {now} (per_device_train_batch_size="
            f"{args.per_device_train_batch_size}, gradient_accumulation_steps={args.gradient_accumulation_steps}, "
            f"processes: {args.world_size}), so that tokens would be counted wrongly and text left out or repeated. "
            f"Choose values whose product is {was}, or start a new run in another --output_dir"
        )


def _check_shapes(model: nn.Module, checkpoint: Path) -> None:
    """Compare what the weight files say of themselves; nothing is said of shards, which have other files."""
    files = [path for path in weight_files(checkpoint) if path.is_file()]
    if not files:
        return
    stored: dict[str, list[int]] = {}
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                stored |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights in {checkpoint} are missing or damaged: {error}") from error
    names: dict[int, list[str]] = {}  # of a tied parameter several, of which one is stored
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, parameter in model.named_parameters():
        found = next((stored[other] for other in names[id(parameter)] if other in stored), None)
        if found != list(parameter.shape):
            has = f"is {' x '.join(map(str, found))} there" if found else "is not in it"
            raise ValueError(
                f"{checkpoint} is a checkpoint of another model: {name}, here {' x '.join(map(str, parameter.shape))}, "
                f"{has}; resume from a checkpoint of the same recipe, or start a new run"
            )
