"""Recipe files: a YAML file plus `--field value` overrides becomes one checked `Recipe`.

Parsing and checking only; recipes/pretrain.py trains what a recipe says.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from sparseift_llm.config.parsing import convert, from_dict, load_yaml, nearest, parse_yaml
from sparseift_llm.config.transform import DSTConfig, SparseIFTConfig
from sparseift_llm.data.options import DataConfig


@dataclass(frozen=True)
class ModelConfig:
    """Which dense model to start from: freshly initialised (`name`), or trained (`from_pretrained`).

    Args:
        name: a preset (default: gpt3-small), a path to a config.json, a model folder, or a hub id; only its config
            is read.
        config: fields of the transformers config to change, e.g. `{n_layer: 4}`; of a trained model no sizes, but
            e.g. dropout. A fresh model takes vocabulary size and special tokens from the tokenizer.
        init_truncation: redraw initial weights beyond this many standard deviations; None keeps all.
        from_pretrained: folder or hub id of a trained dense model, in place of `name`; `sparse_ift.init` is then
            `pretrained` unless it says otherwise.
    """

    name: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    init_truncation: float | None = None
    from_pretrained: str | None = None

    def __post_init__(self) -> None:
        if self.from_pretrained is not None and (self.name is not None or self.init_truncation is not None):
            given = "name" if self.name is not None else "init_truncation"
            raise ValueError(
                f"model.{given}={getattr(self, given)!r} is for a freshly initialised model; leave it out, or "
                f"from_pretrained={self.from_pretrained!r}"
            )
        if self.from_pretrained is None and self.name is None:
            object.__setattr__(self, "name", "gpt3-small")
        if self.init_truncation is not None and self.init_truncation <= 0:
            raise ValueError(f"init_truncation must be above 0, got {self.init_truncation}")


@dataclass(frozen=True)
class Recipe:
    """One pretraining run.

    Args:
        model: the dense model.
        data: text, tokenizer, sequence length.
        sparse_ift: the transformation, or None to train the dense model.
        training: fields of `transformers.TrainingArguments`.
        lr_decay_steps: optimizer step at which a cosine schedule reaches its minimum and stays there;
            None means the last step.
    """

    model: ModelConfig
    data: DataConfig
    sparse_ift: SparseIFTConfig | None
    training: dict[str, Any]
    lr_decay_steps: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping of the same layout as a recipe file."""
        values = dataclasses.asdict(self)
        values["sparse_ift"] = self.sparse_ift.to_dict() if self.sparse_ift else None
        return values


SECTIONS = ("model", "data", "sparse_ift", "training", "lr_decay_steps")
_TRAINING_FIELDS = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply command-line overrides.

    Args:
        path: the YAML file.
        overrides: words such as `--training.learning_rate 1e-3`, `--learning_rate=1e-3` or
            `--sparse_ift null`. A bare name means the training argument of that name, else the
            one section that has it. Values are YAML.

    Raises:
        ValueError: an unknown key (naming the nearest valid one), an ambiguous or malformed override,
            or a value that is refused.
        FileNotFoundError: no such file.
    """
    values = load_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping with the keys {', '.join(SECTIONS)}")
    _check_keys(values, SECTIONS, str(path))
    values = copy.deepcopy(values)
    for key, value in _parse_overrides(overrides):
        _set(values, key, value)
    return _build(values)


def recorded_recipe(path: str | Path) -> dict[str, Any]:
    """What a run wrote of its recipe; model, data and sparse_ift with defaults for options that did not exist then.

    Raises:
        ValueError: the file is damaged, or one of these options is no longer known or valid.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        compared = {key: record[key] for key in ("model", "data", "sparse_ift")}
        recipe = _build({**compared, "training": {"output_dir": "the run's"}}).to_dict()
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged, or of another version of this package: {error!r}") from error
    return {**record, **{key: recipe[key] for key in compared}}


def _build(values: dict[str, Any]) -> Recipe:
    sections = {key: {} if values.get(key) is None else values[key] for key in ("model", "data", "training")}
    training = _checked_training(sections["training"])
    model = from_dict(ModelConfig, sections["model"], "model")
    data = from_dict(DataConfig, sections["data"], "data")
    if model.from_pretrained is not None and data.tokenizer == "bpe":
        raise ValueError(
            f"model.from_pretrained={model.from_pretrained!r} knows the tokens of its own tokenizer; set "
            "data.tokenizer to it, usually the same folder or hub id"
        )
    sparse_values = values.get("sparse_ift")
    if sparse_values is not None:
        if not isinstance(sparse_values, dict):
            raise ValueError(f"sparse_ift must be a mapping or null, got {sparse_values!r}")
        sparse_values = {"seed": training.get("seed", 42), "seq_len": data.seq_len, **sparse_values}
        if model.from_pretrained is not None:
            sparse_values.setdefault("init", "pretrained")
        elif sparse_values.get("init") == "pretrained":
            raise ValueError("sparse_ift.init='pretrained' needs model.from_pretrained, a trained dense model")
    decay_steps = values.get("lr_decay_steps")
    if decay_steps is not None and (type(decay_steps) is not int or decay_steps < 1):
        raise ValueError(f"lr_decay_steps must be a whole number of steps, at least 1, got {decay_steps!r}")
    if decay_steps is not None and (
        training.get("lr_scheduler_type") != "cosine_with_min_lr"
        or not isinstance(training.get("lr_scheduler_kwargs"), dict)
        or "min_lr_rate" not in training["lr_scheduler_kwargs"]
    ):
        raise ValueError(
            "lr_decay_steps needs lr_scheduler_type: cosine_with_min_lr and min_lr_rate in lr_scheduler_kwargs"
        )
    return Recipe(
        model=model,
        data=data,
        sparse_ift=None if sparse_values is None else SparseIFTConfig.from_dict(sparse_values),
        training=training,
        lr_decay_steps=decay_steps,
    )


def _checked_training(training: Any) -> dict[str, Any]:
    """The training section with names and simple types checked; the rest is left to TrainingArguments."""
    if not isinstance(training, dict):
        raise ValueError(f"training must be a mapping of TrainingArguments fields, got {training!r}")
    _check_keys(training, _TRAINING_FIELDS, "training")
    hints = typing.get_type_hints(TrainingArguments)
    checked = {}
    for key, value in training.items():
        hint = hints[key]
        simple = {float, int, bool, str, type(None)}
        parts = set(typing.get_args(hint)) or {hint}
        if key != "resume_from_checkpoint" and parts <= simple and len(parts - {type(None)}) == 1:
            value = convert(value, hint, f"training.{key}")
        checked[key] = value
    resume = checked.get("resume_from_checkpoint")
    if not isinstance(resume, bool | str | None):
        raise ValueError(f"training.resume_from_checkpoint must be true, false or a folder, got {resume!r}")
    _check_save_steps(checked)
    if not checked.get("output_dir"):
        raise ValueError("training.output_dir is missing: say where the run is written")
    return checked


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


def _check_keys(values: Iterable[str], valid: Iterable[str], where: str) -> None:
    for key in values:
        if key not in valid:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, valid)}")


def _parse_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ValueError(f"expected --field value, got {word!r}")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                raise ValueError(f"--{key} needs a value")
            text = rest.pop(0)
        pairs.append((key, parse_yaml(text, f"--{key}")))
    return pairs


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Put `value` at the dotted path that `key` means."""
    *sections, last = _resolve(key).split(".")
    target = values
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise ValueError(f"{section} must be a mapping of options, got {type(target).__name__}: {target!r}")
    target[last] = value


def _resolve(key: str) -> str:
    paths = _all_paths()
    if key in paths or key.startswith("model.config."):
        return key
    matches = [path for path in paths if path.rpartition(".")[2] == key]
    if f"training.{key}" in matches:
        return f"training.{key}"
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(f"--{key} could mean {' or '.join(f'--{match}' for match in matches)}; write one of them")
    leaves = {path.rpartition(".")[2] for path in paths} | set(paths)
    raise ValueError(f"unknown option --{key}{nearest(key, leaves)}")


def _all_paths() -> list[str]:
    def fields(cls: Any, prefix: str) -> list[str]:
        return [f"{prefix}.{f.name}" for f in dataclasses.fields(cls)]

    return [
        *SECTIONS,
        *fields(ModelConfig, "model"),
        *fields(DataConfig, "data"),
        *fields(SparseIFTConfig, "sparse_ift"),
        *fields(DSTConfig, "sparse_ift.dst"),
        *(f"training.{name}" for name in sorted(_TRAINING_FIELDS)),
    ]
