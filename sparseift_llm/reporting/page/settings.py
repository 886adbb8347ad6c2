"""The settings of runs: those that differ, and those of each that are not the defaults."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping, Sequence

from sparseift_llm.config.families import FamilyOptions
from sparseift_llm.record.model_record import transformation_values
from sparseift_llm.reporting.page.markup import NONE, Body, Table
from sparseift_llm.reporting.page.runs import Run
from sparseift_llm.reporting.page.words import flattened
from sparseift_llm.runs.lenient_json import finite
from sparseift_llm.runs.recipe import recipe_options

_RECORD = ("machine", "versions", "commit", "command", "device", "num_ranks", "data_fingerprint")
_FAMILY = "sparse_ift.family"
_NAMING = (  # what tells one model from another is said even where it is a default
    "model.name", _FAMILY, f"{_FAMILY}.name", f"{_FAMILY}.scope", "sparse_ift.scope", "sparse_ift.sparsity",
    "sparse_ift.structure", "sparse_ift.dst.algorithm",
)  # fmt: skip
# what a recipe fills in where these are not given: what stands at another key, and a word
_FROM_OTHERS = {"sparse_ift.seed": "training.seed", "sparse_ift.seq_len": "data.seq_len"}
_FILLED_IN = {"sparse_ift.init": "preserve"}


def difference_table(runs: Sequence[Run]) -> Table | None:
    """Settings, versions and machines that are not the same in all runs; None for a single run or if all agree.

    A setting that is a default wherever it is known is left out: a run that lacks it has no such option.
    """
    values = [settings(run) for run in runs]
    chosen = {key for found in values for key in without_defaults(found)}
    keys = dict.fromkeys(key for found in values for key in found)
    sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    rows = [
        [key, *(_setting(found, key) for found in values)]
        for key in sorted(keys, key=lambda key: sections.index(key.partition(".")[0]))
        if key in chosen and len({found.get(key) for found in values}) > 1
    ]
    header = ["setting", *(run.name for run in runs)]
    return Table("Settings that differ", header, [Body(rows)], is_words=True) if rows else None


def setting_tables(runs: Sequence[Run]) -> list[Table]:
    """The settings of every run that are not defaults, and what it ran on."""
    tables = []
    for run in runs:
        values = settings(run)
        rows = [[key, value] for key, value in without_defaults(values).items()]
        if rows:
            left_out = f", without {len(values) - len(rows)} defaults" if len(values) > len(rows) else ""
            title = f"Settings of {run.name}{left_out}"
            tables.append(Table(title, ["setting", "value"], [Body(rows)], is_words=True))
    return tables


def settings(run: Run) -> dict[str, str]:
    """A run's configuration with dotted keys, and what it ran on."""
    record = {key: source[key] for source in (run.recipe, run.summary) for key in _RECORD if key in source}
    config = dict(run.config)
    if transformation_values(config.get("sparse_ift")):
        config["sparse_ift"] = dict(transformation_values(config["sparse_ift"]))
    return dict(flattened({**config, **record}))


def without_defaults(values: Mapping[str, str]) -> dict[str, str]:
    """The settings with dotted keys that are not what a recipe has by itself, and those that name a model."""
    defaults = dict(_defaults(values.get(f"{_FAMILY}.name")))
    filled_in = _FILLED_IN | {key: values[source] for key, source in _FROM_OTHERS.items() if source in values}
    return {
        key: value
        for key, value in values.items()
        if key in _NAMING
        or not any(_is_same(value, default[key]) for default in (defaults, filled_in) if key in default)
    }


def _defaults(family: str | None) -> Iterator[tuple[str, str]]:
    """Dotted keys of a recipe and their defaults in words; a family's options where it is known."""
    for option in recipe_options():
        if option.default is not None and not option.name.startswith(_FAMILY):
            value = json.loads(option.default)
            yield from flattened({option.name: value})
    for kind in typing.get_args(FamilyOptions):
        options = dataclasses.asdict(kind())
        if options["name"] == family:
            yield from flattened({_FAMILY: options})


def _is_same(value: str, default: str) -> bool:
    """Whether both are the same words or the same number, which a recipe may write as 50 and as 50.0."""
    return value == default or (_number(value) is not None and _number(value) == _number(default))


def _number(words: str) -> float | None:
    try:
        value: float | None = finite(json.loads(words))
    except ValueError:
        return None
    return value


def _setting(found: Mapping[str, str], key: str) -> str:
    if key in found:
        return found[key]
    return "options below" if any(name.startswith(f"{key}.") for name in found) else NONE
