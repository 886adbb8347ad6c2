"""Recipe files: a YAML file plus `--field value` overrides becomes one checked `Recipe`.

Parsing and checking only; recipes/pretrain.py trains what a recipe says.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic_core import to_jsonable_python

from sparseift_llm.config.as_begun import as_begun
from sparseift_llm.config.describe import Option, describe_options
from sparseift_llm.config.parsing import check_finite, checked, config_class
from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.config.yaml_files import load_yaml, parse_yaml
from sparseift_llm.data.options import DataConfig
from sparseift_llm.runs.recipe_training import checked_training, training_options
from sparseift_llm.utils.words import nearest


@config_class
class ModelConfig:
    """Which dense model to start from: freshly initialised (`name`), or trained (`from_pretrained`)."""

    name: str | None = None
    """A preset (default: gpt3-small), a path to a config.json, a model folder, or a hub id; only its config is read."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the transformers config to change, e.g. `{n_layer: 4}`; of a trained model no sizes, but e.g. dropout.
    A fresh model takes vocabulary size and special tokens from the tokenizer, unless they are given here."""
    init_truncation: Annotated[float, Field(gt=0)] | None = None
    """Redraw initial weights beyond this many standard deviations; null keeps all."""
    from_pretrained: str | None = None
    """Folder or hub id of a trained dense model, in place of `name`; `sparse_ift.init` is then `pretrained` unless it
    says otherwise."""
    semi_structured_kernels: bool = False
    """Compute outputs of `sparse_ift.structure: 2:4` on torch's semi-structured kernels, in training too, and with
    `sparse_ift.transposable` the gradients of inputs. Needs an NVIDIA GPU, and `bf16` or `fp16` in `training`. The
    dense twin (`sparse_ift: null`) is trained without them."""

    def __post_init__(self) -> None:
        check_finite(self.config, "config")
        if self.from_pretrained is not None and (self.name is not None or self.init_truncation is not None):
            given = "name" if self.name is not None else "init_truncation"
            raise ValueError(
                f"model.{given}={getattr(self, given)!r} is for a freshly initialised model; leave it out, or "
                f"from_pretrained={self.from_pretrained!r}"
            )
        if self.from_pretrained is None and self.name is None:
            object.__setattr__(self, "name", "gpt3-small")


@config_class
class Recipe:
    """One pretraining run."""

    model: ModelConfig
    """The dense model."""
    data: DataConfig
    """Text, tokenizer, sequence length."""
    sparse_ift: SparseIFTConfig | None
    """The transformation; null trains the dense model."""
    training: dict[str, Any]
    """Fields of `transformers.TrainingArguments`, and factors on the learning rates of embeddings and output head."""
    lr_decay_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer step at which a cosine schedule reaches its minimum and stays there; null means the last step."""

    def __post_init__(self) -> None:
        if self.model.semi_structured_kernels and self.sparse_ift is not None and self.sparse_ift.structure != "2:4":
            raise ValueError(
                "model.semi_structured_kernels needs sparse_ift.structure='2:4', got "
                f"{self.sparse_ift.structure!r}; set it, or leave the kernels out"
            )
        if self.model.from_pretrained is not None and self.data.tokenizer == "bpe":
            raise ValueError(
                f"model.from_pretrained={self.model.from_pretrained!r} knows the tokens of its own tokenizer; set "
                "data.tokenizer to it, usually the same folder or hub id"
            )
        starts_trained = self.sparse_ift is not None and self.sparse_ift.init == "pretrained"
        if starts_trained and self.model.from_pretrained is None:
            raise ValueError("sparse_ift.init='pretrained' needs model.from_pretrained, a trained dense model")
        schedule = self.training.get("lr_scheduler_kwargs")
        if self.lr_decay_steps is not None and (
            self.training.get("lr_scheduler_type") != "cosine_with_min_lr"
            or not isinstance(schedule, dict)
            or "min_lr_rate" not in schedule
        ):
            raise ValueError(
                "lr_decay_steps needs lr_scheduler_type: cosine_with_min_lr and min_lr_rate in lr_scheduler_kwargs"
            )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a JSON-serialisable mapping with the sections of a recipe file."""
        values: dict[str, Any] = to_jsonable_python(self)
        return values


logger = logging.getLogger(__name__)

SECTIONS = ("model", "data", "sparse_ift", "training", "lr_decay_steps")
_FAMILY = "sparse_ift.family"


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
    pairs = [(option_path(key), parse_yaml(text, f"--{key}")) for key, text in split_overrides(overrides)]
    for path, value in pairs:
        _set(values, path, value)
    _forget_trained_tokenizer(values, {path for path, _ in pairs})
    return _build(values)


def recorded_recipe(path: str | Path) -> dict[str, Any]:
    """What a run wrote of its recipe; model, data and sparse_ift with defaults for options that did not exist then.

    Raises:
        ValueError: the file is damaged, or one of these options is no longer known or valid.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        compared = {key: record[key] for key in ("model", "data", "sparse_ift")}
        compared["data"] = _without_unused_vocab_size(compared["data"])
        compared["sparse_ift"] = as_begun(compared["sparse_ift"])
        recipe = _build({**compared, "training": {"output_dir": "the run's"}}).to_dict()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, or of another version of this package: {error!r}") from error
    return {**record, **{key: recipe[key] for key in compared}}


def _without_unused_vocab_size(data: dict[str, Any]) -> dict[str, Any]:
    """The data section of a record; version 0.1 wrote the size of a tokenizer to train beside one that was given."""
    return {**data, "vocab_size": None} if data.get("tokenizer", "bpe") != "bpe" else data


def _build(values: dict[str, Any]) -> Recipe:
    """The recipe from the sections of its file, of which any may be missing or null."""
    given = {key: values.get(key) for key in SECTIONS}
    for key in ("model", "data", "training"):
        given[key] = {} if given[key] is None else given[key]
    given["training"] = checked_training(given["training"])
    if given["sparse_ift"] is not None:
        given["sparse_ift"] = _with_inherited(given["sparse_ift"], given)
    recipe: Recipe = checked(Recipe, given, "")
    return recipe


def _with_inherited(sparse_ift: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The sparse_ift section with what it takes from the other sections unless it says otherwise."""
    if not isinstance(sparse_ift, dict):
        raise ValueError(f"sparse_ift must be a mapping or null, got {sparse_ift!r}")
    inherited = {"seed": given["training"].get("seed", 42)}
    if isinstance(given["data"], dict):
        inherited["seq_len"] = given["data"].get("seq_len", DataConfig().seq_len)
    starts_trained = isinstance(given["model"], dict) and given["model"].get("from_pretrained") is not None
    inherited["init"] = "pretrained" if starts_trained else "preserve"
    return {**inherited, **sparse_ift}


def _check_keys(values: Iterable[Any], valid: Iterable[str], where: str) -> None:
    for key in values:
        if key not in valid:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, valid)}")


def split_overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """The name and the YAML text of each override, in order.

    Raises:
        ValueError: a word that does not start with `--` stands where a name should be, or a name has no value.
    """
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
        pairs.append((key, text))
    return pairs


def _forget_trained_tokenizer(values: dict[str, Any], overridden: set[str]) -> None:
    """Where the command line gives a tokenizer, the file's size of one to be trained goes with the one it was for."""
    data = values.get("data")
    if "data.tokenizer" not in overridden or "data.vocab_size" in overridden or not isinstance(data, dict):
        return
    if data["tokenizer"] != "bpe" and data.pop("vocab_size", None) is not None:
        logger.info(
            "data.tokenizer=%r has its own entries: the recipe's data.vocab_size is left out", data["tokenizer"]
        )


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    """Put `value` at a dotted path, as `option_path` gives it."""
    *sections, last = path.split(".")
    if sections == _FAMILY.split("."):
        sections, last = _place_in_family(values, last)
    target = values
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise ValueError(f"{section} must be a mapping of options, got {type(target).__name__}: {target!r}")
    target[last] = value


def _place_in_family(values: dict[str, Any], option: str) -> tuple[list[str], str]:
    """Where a file keeps an option of the family: in the mapping `family`, or beside the name of the family."""
    *sections, family = _FAMILY.split(".")
    parent: Any = values
    for section in sections:
        parent = parent.get(section) if isinstance(parent, dict) else None
    if isinstance(parent, dict) and isinstance(parent.get(family), dict):
        return [*sections, family], option
    return sections, family if option == "name" else option


def option_path(key: str) -> str:
    """The dotted path that a word on the command line means: a path, or the last part of one.

    Raises:
        ValueError: there is no such option (naming the nearest one), or several.
    """
    options = [option.name for option in recipe_options()]
    paths = list(dict.fromkeys(path for option in options for path in (*_sections_of(option), option)))
    section, _, last = key.rpartition(".")
    if key in paths or key.startswith("model.config.") or key == f"{_FAMILY}.name":
        return key
    if section == _FAMILY.rpartition(".")[0] and f"{_FAMILY}.{last}" in paths:
        return f"{_FAMILY}.{last}"  # beside the family
    matches = [path for path in paths if path.rpartition(".")[2] == key]
    if f"training.{key}" in matches:
        return f"training.{key}"
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(f"--{key} could mean {' or '.join(f'--{match}' for match in matches)}; write one of them")
    leaves = {path.rpartition(".")[2] for path in paths} | set(paths)
    raise ValueError(f"unknown option --{key}{nearest(key, leaves)}")


def _sections_of(path: str) -> list[str]:
    """The mappings that a dotted path goes through."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


@cache
def recipe_options() -> tuple[Option, ...]:
    """Every option of a recipe with its type, default and meaning, in the order of the file's sections."""
    options: list[Option] = []
    for option in describe_options(Recipe):
        options.append(option)
        if option.name == "training":
            options += training_options()
    return tuple(options)
