"""A run's folder as one object: what is there, whether the run finished, and in words what is broken or missing.

Reads files only, never a model; nothing that stands in a run's folder makes it raise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparseift_llm.reporting.comparison import read_summary
from sparseift_llm.reporting.page.degrees import Masks, newest_masks
from sparseift_llm.reporting.page.reading import (
    Lines,
    Object,
    finite,
    mapping,
    number,
    read_lines,
    read_object,
    unique_names,
)
from sparseift_llm.runs.record import METRICS_NAME, RECIPE_NAME, SUMMARY_NAME

LAYERS_NAME = "layers.jsonl"
SPECTRAL_NAME = "spectral.json"
SPECTRAL_FORMAT = "sparseift_spectral_v1"
EVALUATIONS = "eval_*.json"
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        name: the end of its path that tells it from the other runs.
        folder: its path.
        state: `finished`, `unfinished` or `broken`.
        reasons: why it is not simply finished; for the reader.
        missing: optional pieces that are not there.
        summary, recipe: contents of the files, empty if there are none.
        metrics: lines of `metrics.jsonl`.
        layers: lines of `layers.jsonl`.
        spectral: checkpoints of `spectral.json`, by step.
        masks: the newest masks.
        evaluations: file name -> result file of an evaluation.
    """

    name: str
    folder: Path
    state: str
    reasons: tuple[str, ...]
    missing: tuple[str, ...]
    summary: Values
    recipe: Values
    metrics: tuple[Values, ...]
    layers: tuple[Values, ...]
    spectral: tuple[Values, ...]
    masks: Masks | None
    evaluations: Mapping[str, Values]

    @property
    def is_readable(self) -> bool:
        """Whether a file that makes a folder a run could be read, at least in part."""
        return bool(self.summary or self.recipe or self.metrics)

    @property
    def last_step(self) -> int | None:
        """Of the last log line."""
        return self.metrics[-1]["step"] if self.metrics else None

    @property
    def config(self) -> Values:
        """The whole configuration: what `recipe.json` and `summary.json` hold of it."""
        return mapping(self.summary.get("config")) or {key: self.recipe[key] for key in _SECTIONS if key in self.recipe}


_SECTIONS = ("model", "data", "sparse_ift", "training", "lr_decay_steps")


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the folders of runs.

    Raises:
        ValueError: a path is no folder, one is given twice, there are none, or none of them holds a readable run.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("give at least one run: an output folder of recipes/pretrain.py")
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is {'a file' if path.exists() else 'missing'}: a run is an output folder")
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise ValueError(f"{paths[index]} is given twice")
    runs = [_read(path, name) for path, name in zip(paths, unique_names(resolved), strict=True)]
    if not any(run.is_readable for run in runs):
        found = " | ".join(f"{run.folder}: {'; '.join(run.reasons)}" for run in runs)
        raise ValueError(
            f"no run to report on; a report is about output folders of recipes/pretrain.py, which hold {SUMMARY_NAME}, "
            f"{RECIPE_NAME} or {METRICS_NAME}. Found: {found}"
        )
    return runs


def _read(folder: Path, name: str) -> Run:
    summary, recipe = read_object(folder / SUMMARY_NAME), read_object(folder / RECIPE_NAME)
    metrics, layers = read_lines(folder / METRICS_NAME), read_lines(folder / LAYERS_NAME)
    spectral, spectral_problems = _spectral(read_object(folder / SPECTRAL_NAME))
    masks, mask_problems = newest_masks(folder, summary.values, _kinds(layers, spectral))
    evaluations, evaluation_problems, interrupted = _evaluations(folder)
    problems = [file.problem for file in (summary, recipe) if file.problem]
    problems += [*metrics.problems, *layers.problems, *spectral_problems, *mask_problems, *evaluation_problems]
    if summary.is_there and not summary.problem:
        problems += _summary_problems(folder, summary.values)
    problems += _lost_losses(metrics)
    if not any(file.is_there for file in (summary, recipe, metrics)):
        problems.append(f"none of {SUMMARY_NAME}, {RECIPE_NAME} and {METRICS_NAME} is there: no run left this folder")
        open_ends = []
    else:
        open_ends = _unfinished(summary, metrics, mapping(recipe.values.get("training")))
    cut = [
        f"the last line of {path} was cut off, as when a run is killed; left out"
        for path, file in ((METRICS_NAME, metrics), (LAYERS_NAME, layers))
        if file.is_cut
    ]
    found = Run(
        name=name,
        folder=folder,
        state="broken" if problems else "unfinished" if open_ends else "finished",
        reasons=(*problems, *open_ends, *cut, *interrupted),
        missing=(),
        summary=summary.values,
        recipe=recipe.values,
        metrics=metrics.lines,
        layers=layers.lines,
        spectral=tuple(spectral),
        masks=masks,
        evaluations=evaluations,
    )
    return _with_missing(found, {SUMMARY_NAME: summary.is_there, RECIPE_NAME: recipe.is_there})


def _summary_problems(folder: Path, summary: Values) -> list[str]:
    try:
        read_summary(folder)
    except ValueError as error:
        return [str(error).replace(f"{folder}/", "")]
    numbers = {key: number(value) for key, value in summary.items()}
    lost = [key for key, value in numbers.items() if isinstance(value, float) and not math.isfinite(value)]
    return [f"{SUMMARY_NAME}: {', '.join(lost)} not finite"] if lost else []


def _lost_losses(metrics: Lines) -> list[str]:
    problems = []
    for key, title in (("loss", "the training loss"), ("eval_loss", "the held-out loss")):
        values = {line["step"]: line[key] for line in metrics.lines if key in line}
        lost = [step for step, value in values.items() if finite(value) is None]
        if lost:
            steps = "logged step" if len(lost) == 1 else "logged steps"
            value = values[lost[0]]
            word = value if number(value) is not None else "no number"
            problems.append(f"{title} is not finite in {len(lost)} {steps}, first at step {lost[0]} ({word})")
    return problems


def _unfinished(summary: Object, metrics: Lines, training: Values) -> list[str]:
    last = metrics.lines[-1]["step"] if metrics.lines else None
    if not summary.is_there:
        wanted = f" of {training['max_steps']}" if finite(training.get("max_steps")) else ""
        so_far = "nothing was logged yet" if last is None else f"the last log line is of step {last}{wanted}"
        return [f"{SUMMARY_NAME}, which a run writes at its end, is missing; {so_far}"]
    step = finite(summary.values.get("step"))
    if step is not None and last is not None and last > step:
        return [f"{SUMMARY_NAME} is of step {step}, but the log goes on to step {last}: the run was continued"]
    return []


def _spectral(file: Object) -> tuple[list[Values], list[str]]:
    if not file.is_there or file.problem:
        return [], [file.problem] if file.problem else []
    if file.values.get("format") != SPECTRAL_FORMAT:
        return [], [f"{SPECTRAL_NAME} is not of format {SPECTRAL_FORMAT!r}, but {file.values.get('format')!r}"]
    checkpoints = file.values.get("checkpoints")
    listed = checkpoints if isinstance(checkpoints, list) else []
    good = [item for item in listed if isinstance(item, dict) and type(item.get("step")) is int]
    bad = len(listed) - len(good) if isinstance(checkpoints, list) else "all"
    return sorted(good, key=lambda item: item["step"]), [
        f"{SPECTRAL_NAME} is damaged: {bad} of its checkpoints have no step; left out"
    ] if bad else []


def _kinds(layers: Lines, spectral: Sequence[Values]) -> dict[str, str]:
    """Layer -> kind, from what analyses wrote."""
    kinds = {}
    for entry in (*spectral, *layers.lines):
        for name, values in mapping(entry.get("layers")).items():
            kinds[name] = str(mapping(values).get("kind", "unknown"))
    return kinds


def _evaluations(folder: Path) -> tuple[dict[str, Values], list[str], list[str]]:
    """Result files of the final model and of checkpoints, what is wrong with others, and interrupted evaluations."""
    found: dict[str, Values] = {}
    problems, interrupted = [], []
    for path in sorted([*folder.glob(EVALUATIONS), *folder.glob(f"checkpoint-*/{EVALUATIONS}")]):
        name = path.relative_to(folder).as_posix()
        if name.endswith(".progress.json"):
            interrupted.append(f"{name}: an evaluation was interrupted; it goes on with --resume")
            continue
        file = read_object(path)
        if file.problem:
            problems.append(f"{name}: {file.problem}")
        elif not mapping(file.values.get("results")):
            problems.append(f"{name} is not a result file of eval/leaderboard.py: it has no results")
        else:
            found[name] = file.values
    return found, problems, interrupted


def _with_missing(run: Run, files: Mapping[str, bool]) -> Run:
    keys = {key for line in run.metrics for key in line}
    is_sparse = bool(run.masks) or bool(run.config.get("sparse_ift"))
    pieces = {
        f"{SUMMARY_NAME} (headline numbers)": files[SUMMARY_NAME],
        f"{RECIPE_NAME} (configuration)": files[RECIPE_NAME] or bool(run.config),
        f"{METRICS_NAME} (curves)": bool(run.metrics),
        "held-out losses along training": "eval_loss" in keys,
        f"{EVALUATIONS} (evaluation on tasks)": bool(run.evaluations),
    }
    if is_sparse:
        pieces |= {
            "masks (degree maps)": bool(run.masks),
            f"{LAYERS_NAME} (mask evolution by layer)": bool(run.layers),
            f"{SPECTRAL_NAME} (spectral curves)": bool(run.spectral),
        }
    return replace(run, missing=tuple(piece for piece, is_there in pieces.items() if not is_there))
