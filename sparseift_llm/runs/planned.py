"""What `sparseift plan` plans: a recipe, or a model with options, as the arguments of `plan`. No text is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.data.tokenizer import load_tokenizer
from sparseift_llm.models.presets import load_config
from sparseift_llm.planning.planner import Plan, plan
from sparseift_llm.runs.model import check_positions, model_config
from sparseift_llm.runs.recipe import Recipe, load_recipe

_DEFAULT_BATCH_SIZE = 8  # sequences, of TrainingArguments


@dataclass(frozen=True)
class PlannedRun:
    """A plan, and what a recipe says of the training.

    Args:
        plan: sizes and costs.
        num_tokens: tokens of the whole training in one process, None if that is not known without reading the text.
        notes: what the reader has to know about the plan's assumptions.
    """

    plan: Plan
    num_tokens: int | None = None
    notes: tuple[str, ...] = ()


def plan_model(model: str, options: Mapping[str, Any], seq_len: int | None) -> PlannedRun:
    """Plan a model without a recipe.

    Args:
        model: a preset, a config.json, a model folder or a hub id.
        options: of `SparseIFTConfig`, by dotted name.
        seq_len: tokens per sequence; None for the transformation's own, else the model's longest.

    Raises:
        ValueError: an option or the model is refused, or sequences are longer than the model's positions.
    """
    config, values = load_config(model), _nested(options)
    if seq_len is not None:
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, got {seq_len}")
        values.setdefault("seq_len", seq_len)
    transformation = SparseIFTConfig.from_dict(values)
    planned = PlannedRun(plan(config, transformation, seq_len))
    check_positions(config, planned.plan.seq_len, "seq_len")
    return planned


def plan_recipe(path: str | Path, options: Mapping[str, Any], model: str | None, seq_len: int | None) -> PlannedRun:
    """Plan what a recipe trains.

    Args:
        path: the recipe file.
        options: of `SparseIFTConfig`, by dotted name, in place of the recipe's own.
        model, seq_len: in place of the recipe's own; None leaves them.

    Raises:
        ValueError: the recipe or an option is refused, or the recipe trains the dense model.
    """
    words = [f"--sparse_ift.{name}={json.dumps(value)}" for name, value in options.items()]
    words += [] if model is None else [f"--model.name={json.dumps(model)}"]
    words += [] if seq_len is None else [f"--data.seq_len={seq_len}"]
    recipe = load_recipe(path, [*words, "--training.output_dir=unused"])
    if recipe.sparse_ift is None:
        raise ValueError(f"{path} trains the dense model; give a transformation to plan, e.g. --sparsity 0.75")
    config, notes = _config_with_vocabulary(recipe)
    return PlannedRun(plan(config, recipe.sparse_ift, recipe.data.seq_len), _num_tokens(recipe), notes)


def _config_with_vocabulary(recipe: Recipe) -> tuple[PreTrainedConfig, tuple[str, ...]]:
    """The dense config with as many entries as the tokenizer is going to have, and what had to be assumed."""
    config = model_config(recipe)
    if recipe.model.from_pretrained is not None or "vocab_size" in recipe.model.config:
        return config, ()
    if recipe.data.vocab_size is not None:
        config.vocab_size = recipe.data.vocab_size
        for name in ("bos_token_id", "eos_token_id"):  # the tokenizer's, which is not made here, come in their place
            setattr(config, name, None)
        return config, ()
    try:
        config.vocab_size = len(load_tokenizer(recipe.data, ()))
    except ValueError as error:
        reason = str(error).splitlines()[0]
        return config, (
            f"vocabulary: {config.vocab_size:,} entries, which {recipe.model.name} has by itself, because the "
            f"tokenizer could not be loaded here ({reason})",
        )
    return config, ()


def _num_tokens(recipe: Recipe) -> int | None:
    training = recipe.training
    max_steps = training.get("max_steps", -1)
    if max_steps < 1:
        return None
    batch = training.get("per_device_train_batch_size", _DEFAULT_BATCH_SIZE)
    return int(max_steps * batch * training.get("gradient_accumulation_steps", 1) * recipe.data.seq_len)


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as nested mappings; the name of a family with options becomes `family.name`."""
    values: dict[str, Any] = {}
    if any(name.startswith("family.") for name in options):
        options = {**options, "family": {"name": options.get("family", "wide")}}
    for name, value in sorted(options.items()):  # a section before what is in it
        section, _, last = name.rpartition(".")
        (values.setdefault(section, {}) if section else values)[last] = value
    return values
