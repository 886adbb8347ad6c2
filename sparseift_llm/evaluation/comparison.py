"""Comparing result files: the same questions side by side, and differences with intervals over seeds and items.

Reads result files and item records; loads no model and no lm-eval. How wide intervals are is decided in intervals.py,
how they are shown in comparison_table.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparseift_llm._moved import old_names
from sparseift_llm.evaluation.intervals import Floats, Uncertainty, uncertainty
from sparseift_llm.evaluation.results import read_items
from sparseift_llm.evaluation.suites import (
    Headline,
    Score,
    Suite,
    averages,
    headline_normalized,
    headline_value,
)
from sparseift_llm.utils.outputs import user_path

if not TYPE_CHECKING:  # so that type checkers still know what is here
    __getattr__ = old_names(__name__)

COMPARISON_BEGINNING = r'\{\s*"suite": "[^"]*",\s*"arms": \['  # a pattern, see refuse_foreign
_CHUNK = 2**22  # resampled counts held at a time


@dataclass(frozen=True)
class Arm:
    """One kind of model: the result files of its seeds.

    Args:
        name: for the table.
        paths: of the result files.
        results: their contents.
    """

    name: str
    paths: tuple[Path, ...]
    results: tuple[Mapping[str, Any], ...]

    @property
    def seeds(self) -> list[Any]:
        """Training seeds, None where a model's run left none behind."""
        return [result["model"].get("run", {}).get("seed") for result in self.results]


def read_arm(text: str) -> Arm:
    """`F.json`, or several seeds' files joined by commas, optionally as `name=F.json,G.json`.

    What stands before the first `=` is a name only if it has no path separator; a text that is the path of a file is
    that file, whatever characters it has.

    Raises:
        ValueError: a file is missing, unfinished or no result file; two are the same file, hold the same model or are
            of the same training seed.
    """
    name, files = _name_and_files(text)
    whole = user_path(files)
    paths = (whole,) if whole.is_file() else tuple(user_path(part) for part in files.split(",") if part)
    results = []
    for path in paths:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            _ = result["suite"], result["results"], result["subtasks"], result["averages"], result["model"]["name"]
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing: the evaluation has not finished, or the name is wrong") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result file of `sparseift evaluate` ({error!r})") from error
        results.append(result)
    if not results:
        raise ValueError(f"{text!r} names no result file")
    arm = Arm(name or Path(results[0]["model"]["name"]).name, paths, tuple(results))
    _refuse_repeats(arm)
    return arm


def _name_and_files(text: str) -> tuple[str, str]:
    name, sign, files = text.partition("=")
    is_name = bool(sign) and not any(separator in name for separator in ("/", "\\", ","))
    return (name, files) if is_name and not Path(text).is_file() else ("", text)


def _refuse_repeats(arm: Arm) -> None:
    """One training run is one seed, however often it is named.

    Raises:
        ValueError: two files are of the same run.
    """
    kinds = (
        ("the same file", [path.resolve() for path in arm.paths]),
        ("evaluations of the same model", [result["model"].get("sha256") for result in arm.results]),
        ("of the same training seed", arm.seeds),
    )
    for what, values in kinds:
        for number, value in enumerate(values):
            if value is not None and value in values[:number]:
                first, second = arm.paths[values.index(value)], arm.paths[number]
                raise ValueError(
                    f"{first} and {second} are {what}, and not two seeds of {arm.name}; name every training run once"
                )


def check_comparable(arms: Sequence[Arm]) -> None:
    """Refuse files that do not answer the same questions.

    Raises:
        ValueError: the files differ in suite, tasks, shots, items (limit or data) or versions; says where.
    """
    pairs = [(path, result) for arm in arms for path, result in zip(arm.paths, arm.results, strict=True)]
    first_path, first = pairs[0]
    for path, result in pairs[1:]:
        for what, mine, theirs in _differences(first, result):
            if mine != theirs:
                raise ValueError(f"{first_path} and {path} cannot be compared: {what} is {mine!r} and {theirs!r}")


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    found = [
        ("the suite", first["suite"], second["suite"]),
        ("the list of tasks", sorted(first["subtasks"]), sorted(second["subtasks"])),
        ("the list of headlines", list(first["results"]), list(second["results"])),
        ("lm_eval's version", first["versions"]["lm_eval"], second["versions"]["lm_eval"]),
    ]
    for task, mine in first["subtasks"].items():
        theirs = second["subtasks"].get(task, {})
        found += [
            (f"{task}: the number of shots", mine["num_fewshot"], theirs.get("num_fewshot")),
            (f"{task}: the version", mine["version"], theirs.get("version")),
            (f"{task}: the number of items", mine["num_items"], theirs.get("num_items")),
            (f"{task}: the hash of items and prompts", mine["task_hash"], theirs.get("task_hash")),
        ]
    return found


def compare(arms: Sequence[Arm], num_samples: int = 2000, confidence: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """Headlines and averages of every arm, and each arm's difference to the first with its intervals.

    Items are resampled within each task, the same for all models (they answered the same questions). Where an arm has
    several seeds, the spread between seeds counts: of the differences seed by seed where both arms have the same
    seeds, else of each arm.

    Args:
        arms: the baseline first.
        num_samples: resamples of the items.
        confidence: of the intervals, in (0, 1).
        seed: of the resampling.

    Returns:
        JSON-ready: `arms`, `rows` with `values` and `differences`, and the settings. A difference has `difference`,
        its interval `low` to `high`, and the wider one `joint_low` to `joint_high`: with the given confidence, all
        joint intervals of the comparison hold the truth at once (Bonferroni). `is_clear` says that the joint interval
        does not hold 0.

    Raises:
        ValueError: see `check_comparable`; fewer than two arms; settings out of range; damaged item records.
    """
    if len(arms) < 2:
        raise ValueError("give at least two result files")
    if not 0 < confidence < 1 or num_samples < 100:
        raise ValueError(f"confidence must be in (0, 1) and num_samples at least 100, got {confidence}, {num_samples}")
    check_comparable(arms)
    records = [_read_records(arm) for arm in arms]
    suite, dropped = _comparable_part(_suite_of(arms[0].results[0]), records)
    items = [_item_sums(suite, arm, found) for arm, found in zip(arms, records, strict=True)]
    exact = [np.array([_lines(suite, _exact(one)) for one in seeds]) for seeds in items]
    samples = _resample(suite, items, num_samples, np.random.default_rng(seed))  # (num_samples, seeds, lines) each
    names = _names(suite, arms[0].results[0])
    sizes = _smallest_tasks(suite, items)
    joint = 1 - (1 - confidence) / (len(names) * (len(arms) - 1))
    rows = []
    for index, (name, metric) in enumerate(names):
        values = [float(one[:, index].mean()) for one in exact]
        differences = []
        for number in range(1, len(arms)):
            found = uncertainty(
                exact[0][:, index],
                exact[number][:, index],
                samples[0][:, :, index],
                samples[number][:, :, index],
                is_paired(arms[0], arms[number]),
                sizes[index],
            )
            differences.append(_difference(values[number] - values[0], found, confidence, joint))
        rows.append({"task": name, "metric": metric, "values": values, "differences": differences})
    return {
        "suite": suite.name,
        "arms": [_describe(arm, arms[0]) for arm in arms],
        "rows": rows,
        "num_samples": num_samples,
        "confidence": confidence,
        "seed": seed,
        "over": "items and seeds" if any(len(arm.results) > 1 for arm in arms) else "items",
        "not_compared": dropped,
        "versions_differ": _version_differences(arms),
    }


def is_paired(first: Arm, second: Arm) -> bool:
    """Whether differences are taken seed by seed: both have the same several seeds, and all are known."""
    return len(second.results) > 1 and first.seeds == second.seeds and None not in first.seeds


def _difference(value: float, found: Uncertainty, confidence: float, joint: float) -> dict[str, Any]:
    half, joint_half = found.half_width(confidence), found.half_width(joint)
    return {
        "difference": value,
        "low": value - half,
        "high": value + half,
        "joint_low": value - joint_half,
        "joint_high": value + joint_half,
        "is_clear": abs(value) > joint_half,
    }


def _suite_of(result: Mapping[str, Any]) -> Suite:
    lines = tuple(
        Headline(
            name,
            tuple(Score(**score) for score in line["scores"]),
            pooled=line["pooled"],
            is_further=line.get("is_further", False),
        )
        for name, line in result["results"].items()
    )
    of = {name: tuple(lines) for name, lines in result["averages"].items()}
    return Suite(result["suite"], lines, of, normalized=result["average_of"] == "normalized")


Records = Mapping[str, Sequence[Mapping[str, Any]]]  # task -> the records of its items


def _read_records(arm: Arm) -> list[Records]:
    """The item records of every seed."""
    return [
        {task: read_items(path.parent / result["items"], task) for task in result["subtasks"]}
        for path, result in zip(arm.paths, arm.results, strict=True)
    ]


def _comparable_part(suite: Suite, records: Sequence[Sequence[Records]]) -> tuple[Suite, list[str]]:
    """The suite without further metrics that are not means over items, and the names of those."""

    def has_values(score: Score) -> bool:
        found = (item["values"].get(score.key) for arm in records for seed in arm for item in seed[score.task])
        return all(value is not None for value in found)

    dropped = [line.name for line in suite.headlines if line.is_further and not has_values(line.scores[0])]
    return replace(suite, headlines=tuple(line for line in suite.headlines if line.name not in dropped)), dropped


def _names(suite: Suite, result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(row, metric) of each line and average, as `_lines` orders them."""
    kind = "normalised" if suite.normalized else ""
    lines = [(line.name, kind or result["results"][line.name]["metric"]) for line in suite.headlines]
    return lines + [(name, kind or "mean") for name in suite.averages]


def _smallest_tasks(suite: Suite, items: Sequence[Sequence[Mapping[Score, tuple[Floats, Floats]]]]) -> list[int]:
    """Number of items in the smallest task of each line and average, as `_lines` orders them."""
    sizes = {line.name: min(len(items[0][0][score][0]) for score in line.scores) for line in suite.headlines}
    return [*sizes.values(), *(min(sizes[line] for line in of) for of in suite.averages.values())]


def _lines(suite: Suite, sums: Mapping[Score, tuple[Floats, Floats]]) -> Floats:
    """Headlines and averages from each score's sums of values and of weights; any shape in front."""
    values: dict[Any, Any] = {score: above / below for score, (above, below) in sums.items()}
    weights: dict[Any, Any] = {score: below for score, (_, below) in sums.items()}
    of = headline_normalized if suite.normalized else headline_value
    lines: dict[str, Any] = {line.name: of(line, values, weights) for line in suite.headlines}
    return np.stack([*lines.values(), *averages(suite, lines).values()], axis=-1)


def _item_sums(suite: Suite, arm: Arm, records: Sequence[Records]) -> list[dict[Score, tuple[Floats, Floats]]]:
    """Per seed and score, each item's value and weight, (num_items,) each."""
    return [
        {s: _values(items[s.task], s, result, path) for line in suite.headlines for s in line.scores}
        for path, result, items in zip(arm.paths, arm.results, records, strict=True)
    ]


def _values(
    items: Sequence[Mapping[str, Any]], score: Score, result: Mapping[str, Any], path: Path
) -> tuple[Floats, Floats]:
    values = [item["values"].get(score.key) for item in items]
    if len(values) != result["subtasks"][score.task]["num_items"]:
        raise ValueError(f"{path}: {score.task} has {len(values)} item records, not as many as its result says")
    if any(value is None for value in values):
        raise ValueError(f"{path}: {score.metric} of {score.task} is not a mean over items; it cannot be resampled")
    pairs = np.array([value if isinstance(value, list) else [value, 1.0] for value in values], dtype=np.float64)
    return pairs[:, 0], pairs[:, 1]


def _exact(items: Mapping[Score, tuple[Floats, Floats]]) -> dict[Score, tuple[Floats, Floats]]:
    return {score: (above.sum(), below.sum()) for score, (above, below) in items.items()}


def _resample(
    suite: Suite,
    items: Sequence[Sequence[Mapping[Score, tuple[Floats, Floats]]]],
    num_samples: int,
    rng: np.random.Generator,
) -> list[Floats]:
    """Lines of every arm and seed, (num_samples, seeds, lines); within a task all models share the drawn items."""
    sums: list[list[dict[Score, tuple[Floats, Floats]]]] = [[{} for _ in seeds] for seeds in items]
    by_task: dict[str, list[Score]] = {}
    for score in items[0][0]:
        by_task.setdefault(score.task, []).append(score)
    for scores in by_task.values():
        num_items = len(items[0][0][scores[0]][0])
        for counts in _counts(num_items, num_samples, rng):
            for seeds, kept in zip(items, sums, strict=True):
                for values, target in zip(seeds, kept, strict=True):
                    for score in scores:
                        new = tuple(counts @ part for part in values[score])
                        old = target.get(score)
                        joined = new if old is None else tuple(map(np.concatenate, zip(old, new, strict=True)))
                        target[score] = (joined[0], joined[1])
    return [np.stack([_lines(suite, values) for values in seeds], axis=1) for seeds in sums]


def _counts(num_items: int, num_samples: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """How often each item is drawn, (part of num_samples, num_items) each."""
    size = max(1, _CHUNK // num_items)
    shares = np.full(num_items, 1 / num_items)
    parts = [min(size, num_samples - start) for start in range(0, num_samples, size)]
    return [rng.multinomial(num_items, shares, size=part) for part in parts]


def _describe(arm: Arm, first: Arm) -> dict[str, Any]:
    models = [result["model"] for result in arm.results]
    keys = ("linear_sparsity", "linear_active_params", "num_parameters", "forward_flops_per_token")
    return {
        "name": arm.name,
        "files": [str(path) for path in arm.paths],
        "seeds": arm.seeds,
        "num_seeds": len(arm.results),
        "is_paired": is_paired(first, arm),
        **{key: models[0].get(key) for key in keys},
        "train_flops": models[0].get("run", {}).get("train_flops"),
        "train_tokens": models[0].get("run", {}).get("train_tokens"),
    }


def _version_differences(arms: Sequence[Arm]) -> list[str]:
    """Packages whose versions are not the same in all files, which may change scores by roundings."""
    versions = [result.get("versions", {}) for arm in arms for result in arm.results]
    names = dict.fromkeys(name for found in versions for name in found)
    return [name for name in names if any(found.get(name) != versions[0].get(name) for found in versions)]
