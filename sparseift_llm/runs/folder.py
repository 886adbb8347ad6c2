"""The one reader of run folders: what a folder holds, finished or not, damaged or not, as one object.

It reads output folders of `sparseift pretrain`, and those of a `transformers.Trainer` as far as their files go. Reading
takes files only, never a model, and nothing in a run's folder makes it raise an error. Masks are read by
checkpoints/mask_file.py, because they are large and most readers do without them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from sparseift_llm.checkpoints.trainer_folder import is_complete, numbered_checkpoints
from sparseift_llm.runs.formats import (
    EVALUATIONS,
    LAYERS_NAME,
    METRICS_NAME,
    PROGRESS_SUFFIX,
    RECIPE_NAME,
    RECIPE_SECTIONS,
    SPECTRAL_FORMAT,
    SPECTRAL_NAME,
    SUMMARY_KEYS,
    SUMMARY_NAME,
    TRAINER_STATE_NAME,
)
from sparseift_llm.runs.lenient_json import Lines, Object, finite, mapping, number, read_lines, read_object

Values = Mapping[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """What a run folder holds.

    Args:
        path: the folder.
        summary, recipe: the files of that name.
        metrics: the lines of `metrics.jsonl`. In the folder of a plain Trainer, the lines of the newest log in a
            `trainer_state.json`, with `train_tokens` where the Trainer counted tokens.
        layers: the lines of `layers.jsonl`.
        spectral: the checkpoints in `spectral.json`, ascending by step.
        evaluations: path below the folder -> contents of a result file of an evaluation.
        trainer_state: the newest `trainer_state.json`, in the folder itself or in a checkpoint.
        step: the optimizer steps of the model in the folder itself, None if neither its summary nor a
            `trainer_state.json` beside it has them.
        model_config: the `config.json` of the final model, or else of the newest whole checkpoint.
        problems: what is damaged or not finite, in words.
        open_ends: why the run has not reached its end, in words.
        remarks: what else a reader should know, in words.
    """

    path: Path
    summary: Object
    recipe: Object
    metrics: Lines
    layers: Lines
    spectral: tuple[Values, ...]
    evaluations: Mapping[str, Values]
    trainer_state: Object
    step: int | None
    model_config: Values
    problems: tuple[str, ...]
    open_ends: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def is_readable(self) -> bool:
        """Whether a file that makes a folder a run could be read, at least in part."""
        return bool(
            self.summary.values
            or self.recipe.values
            or self.metrics.lines
            or self.layers.lines
            or self.trainer_state.values
        )

    @property
    def state(self) -> str:
        """`broken` if there are problems, else `unfinished` if there are open ends, else `finished`."""
        return "broken" if self.problems else "unfinished" if self.open_ends else "finished"

    @property
    def config(self) -> Values:
        """The configuration, in the sections of a recipe; without a recipe, what the model's config says."""
        recipe = self.recipe.values
        recorded = {key: recipe[key] for key in RECIPE_SECTIONS if key in recipe}
        sparse_ift = mapping(self.model_config.get("sparse_ift"))
        return (
            mapping(self.summary.values.get("config")) or recorded or ({"sparse_ift": sparse_ift} if sparse_ift else {})
        )

    @property
    def kinds(self) -> dict[str, str]:
        """Layer -> kind of projection, as `layers.jsonl` and `spectral.json` say."""
        kinds = {}
        for entry in (*self.spectral, *self.layers.lines):
            for name, values in mapping(entry.get("layers")).items():
                kinds[name] = str(mapping(values).get("kind", "unknown"))
        return kinds


def read_folder(path: str | Path) -> RunFolder:
    """Read a run folder; whatever is missing or damaged in it is said in the result.

    Raises:
        ValueError: `path` is not a folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is {'a file' if folder.exists() else 'missing'}: a run is an output folder")
    summary, recipe = read_object(folder / SUMMARY_NAME), read_object(folder / RECIPE_NAME)
    metrics, layers = read_lines(folder / METRICS_NAME), read_lines(folder / LAYERS_NAME)
    own_state, model_config = read_object(folder / TRAINER_STATE_NAME), _model_config(folder)
    state = _newest_trainer_state(folder, own_state)
    steps = (summary.values.get("step"), own_state.values.get("global_step"))
    is_by_recipe = any(file.is_there for file in (summary, recipe, metrics))
    if not is_by_recipe and state.is_there:
        metrics = Lines(tuple(_logged_by_trainer(state.values)))
    spectral, spectral_problems = _spectral(read_object(folder / SPECTRAL_NAME))
    evaluations, evaluation_problems, interrupted = _evaluations(folder)
    problems = [file.problem for file in (summary, recipe, own_state) if file.problem]
    problems += [*metrics.problems, *layers.problems, *spectral_problems, *evaluation_problems]
    if summary.is_there and not summary.problem:
        problems += _summary_problems(summary.values)
    problems += _lost_losses(metrics)
    if is_by_recipe:
        open_ends = _unfinished(summary, metrics, mapping(recipe.values.get("training")))
    elif state.is_there:
        open_ends = _unfinished_trainer(state.values)
    else:
        open_ends = []
        if layers.lines:
            open_ends.append(f"whether it reached its end is not known: there is no {TRAINER_STATE_NAME}")
        else:
            names = f"{SUMMARY_NAME}, {RECIPE_NAME} and {METRICS_NAME}"
            problems.append(f"none of {names} is there: no run left this folder")
    cut = [
        f"the last line of {name} was cut off, as when a run is killed; left out"
        for name, file in ((METRICS_NAME, metrics), (LAYERS_NAME, layers))
        if file.is_cut
    ]
    return RunFolder(
        path=folder,
        summary=summary,
        recipe=recipe,
        metrics=metrics,
        layers=layers,
        spectral=tuple(spectral),
        evaluations=evaluations,
        trainer_state=state,
        step=next((step for step in steps if type(step) is int), None),
        model_config=model_config,
        problems=tuple(problems),
        open_ends=tuple(open_ends),
        remarks=(*cut, *interrupted),
    )


def read_summary(run: str | Path) -> dict[str, Any]:
    """The `summary.json` of a finished run.

    Raises:
        ValueError: the run is missing, has not finished, or its summary is damaged.
    """
    path = Path(run) / SUMMARY_NAME
    if not path.is_file():
        raise ValueError(f"{path} is missing: {run} is not a finished run of `sparseift pretrain`")
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    fault = _fault_of(summary)
    if fault is not None:
        raise ValueError(f"{path} {fault}")
    return summary


def _fault_of(summary: Any) -> str | None:
    """Why a JSON value is not the summary of a run."""
    missing = [key for key in SUMMARY_KEYS if not isinstance(summary, dict) or key not in summary]
    return f"is not the summary of a run: it has no {missing[0]!r}" if missing else None


def _summary_problems(summary: Values) -> list[str]:
    fault = _fault_of(summary)
    if fault is not None:
        return [f"{SUMMARY_NAME} {fault}"]
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


# ---- folders of a plain Trainer


def _newest_trainer_state(folder: Path, own: Object) -> Object:
    """The `trainer_state.json` of the most steps; checkpoints that were not written to their end are left out."""
    whole = [path for path in numbered_checkpoints(folder).values() if is_complete(path)]
    found = [own, *(read_object(path / TRAINER_STATE_NAME) for path in whole[-1:])]
    return max(found, key=lambda file: finite(file.values.get("global_step")) or -1)


def _logged_by_trainer(state: Values) -> Iterable[Values]:
    """The log events in a Trainer's state; without the last one, which sums up the whole training."""
    history = state.get("log_history")
    for line in history if isinstance(history, list) else ():
        if isinstance(line, dict) and type(line.get("step")) is int and "train_runtime" not in line:
            tokens = finite(line.get("num_input_tokens_seen"))
            yield line if tokens is None else {"train_tokens": tokens, **line}


def _unfinished_trainer(state: Values) -> list[str]:
    step, wanted = finite(state.get("global_step")), finite(state.get("max_steps"))
    if step is not None and wanted is not None and step < wanted:
        return [f"the newest {TRAINER_STATE_NAME} is of step {step} of {wanted}"]
    return []


def _model_config(folder: Path) -> Values:
    whole = [path for path in numbered_checkpoints(folder).values() if is_complete(path)]
    for place in (folder, *reversed(whole)):
        found = read_object(place / CONFIG_NAME)
        if found.values:
            return found.values
    return {}


# ---- what analyses and evaluations write into the folder


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


def _evaluations(folder: Path) -> tuple[dict[str, Values], list[str], list[str]]:
    """Result files of the final model and of checkpoints, what is wrong with others, and interrupted evaluations."""
    found: dict[str, Values] = {}
    problems, interrupted = [], []
    for path in sorted([*folder.glob(EVALUATIONS), *folder.glob(f"checkpoint-*/{EVALUATIONS}")]):
        name = path.relative_to(folder).as_posix()
        if name.endswith(PROGRESS_SUFFIX):
            interrupted.append(f"{name}: an evaluation was interrupted; it goes on with --resume")
            continue
        file = read_object(path)
        if file.problem:
            problems.append(f"{name}: {file.problem}")
        elif not mapping(file.values.get("results")):
            problems.append(f"{name} is not a result file of `sparseift evaluate`: it has no results")
        else:
            found[name] = file.values
    return found, problems, interrupted
