"""The `training` section of a recipe: fields of `transformers.TrainingArguments` and factors on learning rates.

All are checked before anything is loaded: transformers takes many values that it cannot train with, such as a step
count of -3, and falls back in silence. transformers is imported when its fields are asked for, so that the help does
not wait for it.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from fractions import Fraction
from functools import cache
from typing import Annotated, Any

from pydantic import Field

from sparseift_llm.config.describe import Option, describe_options
from sparseift_llm.config.fields import FieldType
from sparseift_llm.config.parsing import check_finite, checked, config_class
from sparseift_llm.utils.outputs import user_path
from sparseift_llm.utils.words import check_choice, nearest

_POSITIVE = Field(gt=0)
_AT_LEAST_0 = Field(ge=0)
_AT_LEAST_1 = Field(ge=1)
_BELOW_1 = Field(ge=0, lt=1)
_SEED = Field(ge=0, le=2**32 - 1)
RANGES = {
    "per_device_train_batch_size": _AT_LEAST_1,
    "per_device_eval_batch_size": _AT_LEAST_1,
    "gradient_accumulation_steps": _AT_LEAST_1,
    "eval_accumulation_steps": _AT_LEAST_1,
    "torch_empty_cache_steps": _AT_LEAST_1,
    "ddp_timeout": _AT_LEAST_1,
    "num_train_epochs": _POSITIVE,
    "logging_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "learning_rate": _AT_LEAST_0,
    "warmup_steps": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "max_grad_norm": _AT_LEAST_0,
    "adam_epsilon": _AT_LEAST_0,
    "neftune_noise_alpha": _AT_LEAST_0,
    "eval_delay": _AT_LEAST_0,
    "save_total_limit": _AT_LEAST_0,
    "dataloader_num_workers": _AT_LEAST_0,
    "adam_beta1": _BELOW_1,
    "adam_beta2": _BELOW_1,
    "label_smoothing_factor": Field(ge=0, le=1),
    "seed": _SEED,
    "data_seed": _SEED,
}
_SIMPLE = {float, int, bool, str}
# What sparseift pretrain does whatever these say: the Trainer leaves them to the script.
_ALWAYS = {"do_train": True, "do_eval": True, "do_predict": False}
_METRICS = ("loss", "eval_loss")


@config_class
class LearningRateFactors:
    """Factors on learning rates, in the training section beside the fields of TrainingArguments."""

    embedding_lr_factor: Annotated[float, Field(gt=0)] = 1.0
    """Times the learning rate of input embeddings, tied to the output head or not, and of learned positions."""
    head_lr_factor: Annotated[float, Field(gt=0)] | None = None
    """Times the learning rate of an output head that is not tied to the input embedding; null leaves it as it is."""

    @classmethod
    def of(cls, training: dict[str, Any]) -> LearningRateFactors:
        """Those that a training section gives, and defaults for the others."""
        return cls(**{key: training[key] for key in _FACTOR_NAMES if key in training})

    def rates_at(self, learning_rate: float) -> dict[str, float]:
        """What a log says of embeddings and head when the others have `learning_rate`; only those with a factor."""
        factors = {"embedding_learning_rate": self.embedding_lr_factor, "head_learning_rate": self.head_lr_factor}
        return {key: learning_rate * factor for key, factor in factors.items() if factor not in (None, 1)}


_FACTOR_NAMES = tuple(field.name for field in dataclasses.fields(LearningRateFactors))


def trainer_fields(training: dict[str, Any]) -> dict[str, Any]:
    """The part of a training section that is fields of TrainingArguments."""
    return {key: value for key, value in training.items() if key not in _FACTOR_NAMES}


@cache
def training_fields() -> dict[str, Any]:
    """The annotations of the fields of the training section by name, with the ranges that a recipe may use."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    names = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    fields = {name: Annotated[hints[name], RANGES[name]] if name in RANGES else hints[name] for name in names}
    own = typing.get_type_hints(LearningRateFactors, include_extras=True)
    return fields | {name: own[name] for name in _FACTOR_NAMES}


def checked_training(training: Any) -> dict[str, Any]:
    """The training section with names, simple types and ranges checked; the rest is left to TrainingArguments.

    Raises:
        ValueError: an unknown name (naming the nearest valid one), a value of a wrong type or outside its range, or
            values that do not go together.
    """
    if not isinstance(training, dict):
        raise ValueError(f"training must be a mapping of TrainingArguments fields, got {training!r}")
    kinds, values = training_fields(), {}
    for key, value in training.items():
        if key not in kinds:
            raise ValueError(f"training: unknown key {key!r}{nearest(key, kinds)}")
        values[key] = checked(kinds[key], value, f"training.{key}") if _is_simple(key) else value
    check_finite(values, "training")
    resume = values.get("resume_from_checkpoint")
    if not isinstance(resume, bool | str | None):
        raise ValueError(f"training.resume_from_checkpoint must be true, false or a folder, got {resume!r}")
    for key, does in _ALWAYS.items():
        if values.get(key, does) != does:
            raise ValueError(
                f"training.{key}={values[key]} would be ignored: a run trains, and evaluates on held-out text; leave "
                f"{key} out"
            )
    if values.get("metric_for_best_model") is not None:
        check_choice("training.metric_for_best_model", values["metric_for_best_model"], _METRICS)
    _check_number_of_steps(values)
    _check_schedule(values)
    _check_save_steps(values)
    if not values.get("output_dir"):
        raise ValueError("training.output_dir is missing: say where the run is written")
    for key in ("output_dir", "logging_dir", "resume_from_checkpoint"):
        if isinstance(values.get(key), str) and values[key]:
            values[key] = str(user_path(values[key]))  # once, so that everything of a run is in the same folder
    return values


def _is_simple(key: str) -> bool:
    """Whether one plain type or a list of it is asked for, rather than one of several or an enumeration's words."""
    return key != "resume_from_checkpoint" and FieldType.of(training_fields()[key]).kind in _SIMPLE


def _check_number_of_steps(training: dict[str, Any]) -> None:
    steps = training.get("max_steps", -1)
    if steps < 1 and steps != -1:
        raise ValueError(f"training.max_steps must be at least 1, or -1 to train for num_train_epochs, got {steps}")


def _check_schedule(training: dict[str, Any]) -> None:
    """transformers computes any rate that these say, above the peak or below 0."""
    schedule = training.get("lr_scheduler_kwargs")
    if not isinstance(schedule, dict):
        return
    for key in ("min_lr_rate", "min_lr"):
        if schedule.get(key) is not None:
            high = 1.0 if key == "min_lr_rate" else training.get("learning_rate", 5e-5)
            name = f"training.lr_scheduler_kwargs.{key}"
            checked(Annotated[float, Field(ge=0, le=high)], schedule[key], name)


def _check_save_steps(training: dict[str, Any]) -> None:
    """A checkpoint between two log lines would lose the sum of losses since the last one."""
    if training.get("save_strategy", "steps") != "steps":
        return
    save_every, log_every = training.get("save_steps", 500), training.get("logging_steps", 500)
    fits = (log_every >= 1) == (save_every >= 1) and Fraction(str(save_every)) % Fraction(str(log_every)) == 0
    if training.get("logging_strategy", "steps") == "steps" and not fits:
        raise ValueError(
            f"training.save_steps={save_every:g} must be a multiple of logging_steps={log_every:g}, "
            "otherwise a resumed run would log other averages than an uninterrupted one"
        )


def training_options() -> list[Option]:
    """The fields of the training section for `--help`; what transformers says of its own fields is taken over."""
    from transformers import TrainingArguments

    options = describe_options(LearningRateFactors, "training")
    for field in dataclasses.fields(TrainingArguments):
        if field.init:
            accepted = FieldType.of(training_fields()[field.name])
            default = None if field.default is dataclasses.MISSING else json.dumps(field.default, default=str)
            meaning = " ".join((field.metadata.get("help") or "").split())
            options.append(Option(f"training.{field.name}", accepted.words, default, meaning))
    return options
