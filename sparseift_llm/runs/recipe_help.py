"""The keys of a recipe as text for `--help`: type, default and meaning of each, in the sections of the file.

The fields of `transformers.TrainingArguments` are read from the source of transformers with `ast`, because importing
that class imports torch, for which nobody should wait who asks for help. A test compares them with the class.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from sparseift_llm.config.describe import Option, describe_options
from sparseift_llm.config.fields import FieldType
from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.data.options import DataConfig
from sparseift_llm.runs.recipe import ModelConfig, Recipe
from sparseift_llm.runs.recipe_training import RANGES, LearningRateFactors

_WIDTH = 100
_SIMPLE: dict[str, Any] = {"bool": bool, "float": float, "int": int, "str": str}


def recipe_help() -> str:
    """Every key of a recipe under the heading of its section."""
    decay = next(option for option in describe_options(Recipe) if option.name == "lr_decay_steps")
    training = [*describe_options(LearningRateFactors, "training"), *trainer_options(), decay]
    sparse_ift = describe_options(SparseIFTConfig, "sparse_ift")
    sections = (
        ("model: the dense model", describe_options(ModelConfig, "model")),
        ("data: text, tokenizer, sequence length", describe_options(DataConfig, "data")),
        ("sparse_ift: the transformation; null trains the dense model", sparse_ift),
        ("training: learning rates, and the fields of transformers.TrainingArguments", training),
    )
    lines = ["keys of a recipe, each of which can be overridden; a name without its section is enough if it is unique:"]
    for title, options in sections:
        lines += ["", title, *_lines(options)]
    return "\n".join(lines)


def trainer_options() -> list[Option]:
    """The fields of `transformers.TrainingArguments`, without importing it.

    Returns:
        One option per field. Its meaning is the first sentence of what transformers says.
    """
    options = []
    for statement in _class_body("TrainingArguments"):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        arguments = _field_arguments(statement.value)
        if getattr(arguments.get("init"), "value", True):
            name = statement.target.id
            meaning = _first_sentence(_help(arguments.get("metadata")))
            options.append(
                Option(f"training.{name}", _type_words(name, statement.annotation), _default(arguments), meaning)
            )
    return options


def _lines(options: Iterable[Option]) -> Iterator[str]:
    for option in options:
        default = "must be given" if option.default is None else f"default {option.default}"
        yield from textwrap.wrap(
            f"--{option.name}  {option.type}; {default}", _WIDTH, initial_indent="  ", subsequent_indent="      "
        )
        yield from textwrap.wrap(option.meaning, _WIDTH, initial_indent="      ", subsequent_indent="      ")


def _class_body(name: str) -> list[ast.stmt]:
    """The statements of a class in the file `training_args.py` of transformers."""
    package = importlib.util.find_spec("transformers")
    assert package is not None  # this package needs it
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "training_args.py"
    module = ast.parse(path.read_text(encoding="utf-8"))
    return next(node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == name)


def _field_arguments(value: ast.expr | None) -> dict[str | None, ast.expr]:
    """The keywords of `field(default=..., metadata=...)`; a plain value is the default."""
    if isinstance(value, ast.Call):
        return {keyword.arg: keyword.value for keyword in value.keywords}
    return {} if value is None else {"default": value}


def _default(arguments: dict[str | None, ast.expr]) -> str | None:
    """The default as JSON, or as the code has it where it is not a plain value; None if there is none."""
    if "default" not in arguments:
        factory = arguments.get("default_factory")
        return {"list": "[]", "dict": "{}"}.get(ast.unparse(factory)) if factory else None
    try:
        return json.dumps(ast.literal_eval(arguments["default"]))
    except ValueError:  # a name, such as one that depends on the version of torch
        return ast.unparse(arguments["default"])


def _help(metadata: ast.expr | None) -> str:
    """The text under `help` in the metadata of a field; empty without one."""
    if isinstance(metadata, ast.Dict):
        for key, value in zip(metadata.keys, metadata.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "help" and isinstance(value, ast.Constant):
                return " ".join(str(value.value).split())
    return ""


def _type_words(name: str, annotation: ast.expr) -> str:
    """What may be given: in words with its range where the type is simple, else the annotation itself."""
    text = ast.unparse(annotation)
    plain = text.removesuffix(" | None")
    if plain not in _SIMPLE:
        return text
    kind: Any = Annotated[_SIMPLE[plain], RANGES[name]] if name in RANGES else _SIMPLE[plain]
    return FieldType.of(kind if plain == text else kind | None).words


def _first_sentence(text: str) -> str:
    """`text` up to the first full stop that ends a sentence."""
    return re.split(r"(?<=[a-z)`'][.]) (?=[A-Z`(])", text, maxsplit=1)[0]
