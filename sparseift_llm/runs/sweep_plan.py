"""The grid of a sweep: a recipe over several settings and seeds, each run with a name and a folder of its own.

sweep.py trains it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseift_llm.config.yaml_files import parse_yaml
from sparseift_llm.models.architectures import build_model
from sparseift_llm.runs.formats import DATA_NAME
from sparseift_llm.runs.model import model_config
from sparseift_llm.runs.recipe import Recipe, load_recipe, option_path, split_overrides
from sparseift_llm.runs.recipe_training import LearningRateFactors
from sparseift_llm.runs.same_data import differing_data
from sparseift_llm.training.learning_rates import group_factors
from sparseift_llm.utils.outputs import user_path

DENSE, SPARSE = "dense", "sparse"
DEFAULT_SEED = 42  # of transformers
_SET_BY_SWEEP = {
    "training.output_dir": "every run has a folder of its own below --output",
    "training.seed": "give the seeds as --seeds 0,1,2",
    "training.resume_from_checkpoint": "a sweep that is started again goes on where it was",
}
_LONGEST_VALUE = 40


@dataclass(frozen=True)
class Axis:
    """One recipe option that varies.

    Args:
        path: its dotted path, e.g. `training.learning_rate`.
        name: the last part of the path, or the whole path where two axes share that part.
        values: at least two, in the order given.
    """

    path: str
    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Args:
        name: of its folder.
        arm: `dense` or `sparse`.
        settings: name of an axis -> value.
        seed: of weights and data.
        folder: what the run writes to.
        log: what its process prints.
        words: the recipe file and its overrides, as for `sparseift pretrain`.
        recipe: what they ask for.
    """

    name: str
    arm: str
    settings: Mapping[str, Any]
    seed: int
    folder: Path
    log: Path
    words: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """A grid of runs.

    Args:
        words: the recipe file and all overrides, as given.
        output: the folder of the sweep.
        axes: arm -> what varies in it; the dense arm has no axis of `sparse_ift`.
        seeds: those of every setting.
        runs: the first seed of every setting first.
    """

    words: tuple[str, ...]
    output: Path
    axes: Mapping[str, tuple[Axis, ...]]
    seeds: tuple[int, ...]
    runs: tuple[SweepRun, ...]


def plan_sweep(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    seeds: Sequence[int] | None = None,
    dense_twin: bool = False,
) -> Sweep:
    """The runs of a sweep, all of them checked as recipes; nothing is written or started.

    Args:
        recipe: the YAML file.
        overrides: as for `load_recipe`. One whose value is several YAML values with commas between them is an axis,
            e.g. `--learning_rate 4e-3,8e-3`; the others hold for all runs.
        output: the folder of the sweep; by default the recipe's `training.output_dir` with `_sweep` after it.
        seeds: by default the one that the recipe has.
        dense_twin: train every setting for the dense model as well, with `sparse_ift: null`.

    Raises:
        ValueError: a setting that the recipe or its model refuses, an option or a value that stands twice, an option
            that the sweep sets by itself, a dense twin of a dense recipe, or runs on different data, whose losses
            cannot be compared.
        FileNotFoundError: no such recipe.
    """
    axes, fixed = _split_axes(overrides)
    words = (str(recipe), *fixed)
    first = [f"--{axis.path}={_as_yaml(axis.values[0])}" for axis in axes]
    if output is None:
        output = f"{load_recipe(recipe, [*fixed, *first]).training['output_dir']}_sweep"
    output = user_path(output)
    if seeds is None:
        seeds = [load_recipe(recipe, [*fixed, *first, "--training.output_dir=x"]).training.get("seed", DEFAULT_SEED)]
    if len(set(seeds)) < len(seeds) or not seeds:
        raise ValueError(f"seeds must be different numbers, at least one, got {', '.join(map(str, seeds))}")
    own = _runs(words, axes, seeds, output, arm=None)
    arms = {own[0].arm: axes}
    runs = own
    if dense_twin:
        dense = next((run for run in own if run.recipe.sparse_ift is None), None)
        if dense is not None:
            raise ValueError(
                f"--dense-twin trains the dense model beside the recipe's sparse one, but {dense.name} is dense "
                "already (sparse_ift: null); leave --dense-twin out, or give the recipe a sparse_ift section"
            )
        dense_axes = tuple(axis for axis in axes if axis.path.split(".")[0] != "sparse_ift")
        runs = [*_runs((*words, "--sparse_ift=null"), dense_axes, seeds, output, arm=DENSE), *own]
        arms = {DENSE: dense_axes, **arms}
    _check_data(runs)
    _check_factors(runs)
    runs.sort(key=lambda run: list(seeds).index(run.seed))
    return Sweep((str(recipe), *overrides), output, arms, tuple(seeds), tuple(runs))


def _split_axes(overrides: Sequence[str]) -> tuple[tuple[Axis, ...], list[str]]:
    """The axes among the overrides, and the words of the others."""
    found: list[tuple[str, list[Any]]] = []
    fixed, paths = [], []
    for key, text in split_overrides(overrides):
        path = option_path(key)
        if path in _SET_BY_SWEEP:
            raise ValueError(f"--{key} is set by the sweep: {_SET_BY_SWEEP[path]}")
        paths.append(path)
        values = _several(text)
        if values is None:
            fixed.append(f"--{path}={text}")
        else:
            found.append((path, values))
    for path, values in found:
        if paths.count(path) > 1:
            raise ValueError(f"--{path} is given twice; put all its values into one list, e.g. --{path} 1,2,3")
        names = Counter(map(value_name, values))
        doubled = next((name for name, count in names.items() if count > 1), None)
        if doubled is not None:
            raise ValueError(f"--{path}: the value {doubled} stands twice among {', '.join(map(str, values))}")
    last = Counter(path.rpartition(".")[2] for path, _ in found)
    return tuple(
        Axis(path, path if last[path.rpartition(".")[2]] > 1 else path.rpartition(".")[2], tuple(values))
        for path, values in found
    ), fixed


def _several(text: str) -> list[Any] | None:
    """The values of a comma list, each of them YAML; None if it is one value."""
    try:
        values = parse_yaml(f"[{text}]", "")
    except ValueError:  # not a list; the recipe says what is wrong with it, if anything
        return None
    return values if isinstance(values, list) and len(values) > 1 else None


def _runs(
    words: Sequence[str], axes: Sequence[Axis], seeds: Iterable[int], output: Path, arm: str | None
) -> list[SweepRun]:
    """The runs of one arm; without a name for it, it is `dense` if all of its recipes are, else `sparse`."""
    grid = [
        (dict(zip([axis.name for axis in axes], values, strict=True)), values, seed)
        for seed in seeds
        for values in itertools.product(*(axis.values for axis in axes))
    ]
    set_words = [
        (
            *(f"--{axis.path}={_as_yaml(value)}" for axis, value in zip(axes, values, strict=True)),
            f"--training.seed={_as_yaml(seed)}",
        )
        for _, values, seed in grid
    ]
    if arm is None:
        recipes = [load_recipe(words[0], [*words[1:], *own, "--training.output_dir=x"]) for own in set_words]
        arm = DENSE if all(recipe.sparse_ift is None for recipe in recipes) else SPARSE
    runs = []
    for (settings, _, seed), own in zip(grid, set_words, strict=True):
        name = "_".join([arm, *(f"{key}-{value_name(value)}" for key, value in settings.items()), f"seed-{seed}"])
        folder = output / name
        all_words = (
            *words,
            *own,
            f"--training.output_dir={_as_yaml(str(folder))}",
            "--training.resume_from_checkpoint=true",
        )
        recipe = load_recipe(all_words[0], all_words[1:])
        if recipe.data.cache_dir is None:  # the runs of a sweep share their tokens
            all_words = (*all_words, f"--data.cache_dir={_as_yaml(str(output / DATA_NAME))}")
            recipe = load_recipe(all_words[0], all_words[1:])
        runs.append(SweepRun(name, arm, settings, seed, folder, output / f"{name}.log", all_words, recipe))
    return runs


def _check_data(runs: Sequence[SweepRun]) -> None:
    """Raise ValueError, naming two runs and the option, unless all runs have the same data."""
    first = runs[0]
    for run in runs:
        for key, one, other in differing_data(first.recipe.to_dict()["data"], run.recipe.to_dict()["data"]):
            raise ValueError(
                f"{first.name} and {run.name} cannot be compared: data.{key} is {one!r} and {other!r}; "
                "make a sweep for each"
            )


def _check_factors(runs: Iterable[SweepRun]) -> None:
    """Raise ValueError if a run has a factor on the rate of an output head that its model lacks, naming the run."""
    for run in runs:
        factors = LearningRateFactors.of(run.recipe.training)
        if factors.head_lr_factor is None:
            continue
        try:
            model = build_model(model_config(run.recipe), meta=True)
            group_factors(model, factors.embedding_lr_factor, factors.head_lr_factor)
        except ValueError as error:
            raise ValueError(f"{run.name}: {error}") from error


def value_name(value: Any) -> str:
    """How a value stands in the name of a folder: letters, digits and `_.+-`, with a hash where that loses anything."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    text = value if isinstance(value, str) else json.dumps(value)
    safe = re.sub(r"[^A-Za-z0-9_.+-]", "_", text)
    if safe == text and 0 < len(text) <= _LONGEST_VALUE:
        return text
    return f"{safe[:_LONGEST_VALUE]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _as_yaml(value: Any) -> str:
    """JSON, which YAML reads as the same value."""
    return json.dumps(value, ensure_ascii=False)
