"""Comparing result files: the same questions side by side, differences with paired bootstrap intervals.

Reads result files and item records; loads no model and no lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseift_llm.evaluation.results import read_items
from sparseift_llm.evaluation.suites import (
    Headline,
    Score,
    Suite,
    averages,
    headline_normalized,
    headline_value,
    is_ratio,
)
from sparseift_llm.utils.tables import markdown_table

Floats = NDArray[np.float64]
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

    Raises:
        ValueError: a file is missing, unfinished or no result file.
    """
    name, _, files = text.rpartition("=")
    paths = tuple(Path(part) for part in files.split(",") if part)
    results = []
    for path in paths:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            _ = result["suite"], result["results"], result["subtasks"], result["averages"], result["model"]["name"]
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing: the evaluation has not finished, or the name is wrong") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result file of eval/leaderboard.py ({error!r})") from error
        results.append(result)
    if not results:
        raise ValueError(f"{text!r} names no result file")
    return Arm(name or Path(results[0]["model"]["name"]).name, paths, tuple(results))


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
    """Headlines and averages of every arm, and each arm's difference to the first with its interval.

    The bootstrap draws items within each task, the same for all models (they answered the same questions), and,
    where an arm has several seeds, seeds: together where both arms have the same seeds, else independently.

    Args:
        arms: the baseline first.
        num_samples: bootstrap samples.
        confidence: of the percentile intervals, in (0, 1).
        seed: of the bootstrap.

    Returns:
        JSON-ready: `arms`, `rows` with `values` and `differences` (`difference`, `low`, `high`), and the settings.

    Raises:
        ValueError: see `check_comparable`; fewer than two arms; settings out of range; damaged item records.
    """
    if len(arms) < 2:
        raise ValueError("give at least two result files")
    if not 0 < confidence < 1 or num_samples < 100:
        raise ValueError(f"confidence must be in (0, 1) and num_samples at least 100, got {confidence}, {num_samples}")
    check_comparable(arms)
    suite = _suite_of(arms[0].results[0])
    exact = [np.array([_lines(suite, _exact(suite, r)) for r in _item_sums(suite, arm)]) for arm in arms]
    samples = _resample(suite, arms, num_samples, np.random.default_rng(seed))  # (num_samples, seeds, lines) each
    draws = _seed_draws(arms, num_samples, np.random.default_rng([seed, 1]))
    means = [np.take_along_axis(s, d[:, :, None], axis=1).mean(axis=1) for s, d in zip(samples, draws, strict=True)]
    tail = 100 * (1 - confidence) / 2
    rows = []
    for index, (name, metric) in enumerate(_names(suite, arms[0].results[0])):
        values = [float(values[:, index].mean()) for values in exact]
        differences = []
        for number in range(1, len(arms)):
            low, high = np.percentile(means[number][:, index] - means[0][:, index], [tail, 100 - tail])
            differences.append({"difference": values[number] - values[0], "low": float(low), "high": float(high)})
        rows.append({"task": name, "metric": metric, "values": values, "differences": differences})
    return {
        "suite": suite.name,
        "arms": [_describe(arm) for arm in arms],
        "rows": rows,
        "num_samples": num_samples,
        "confidence": confidence,
        "seed": seed,
        "over": "items and seeds" if any(len(arm.results) > 1 for arm in arms) else "items",
    }


def _suite_of(result: Mapping[str, Any]) -> Suite:
    lines = tuple(
        Headline(name, tuple(Score(**score) for score in line["scores"]), pooled=line["pooled"])
        for name, line in result["results"].items()
    )
    of = {name: tuple(lines) for name, lines in result["averages"].items()}
    return Suite(result["suite"], lines, of, normalized=result["average_of"] == "normalized")


def _names(suite: Suite, result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(row, metric) of each line and average, as `_lines` orders them."""
    kind = "normalised" if suite.normalized else ""
    lines = [(line.name, kind or result["results"][line.name]["metric"]) for line in suite.headlines]
    return lines + [(name, kind or "mean") for name in suite.averages]


def _lines(suite: Suite, sums: Mapping[Score, tuple[Floats, Floats]]) -> Floats:
    """Headlines and averages from each score's sums of values and of weights; any shape in front."""
    values: dict[Any, Any] = {score: above / below for score, (above, below) in sums.items()}
    weights: dict[Any, Any] = {score: below for score, (_, below) in sums.items()}
    of = headline_normalized if suite.normalized else headline_value
    lines: dict[str, Any] = {line.name: of(line, values, weights) for line in suite.headlines}
    return np.stack([*lines.values(), *averages(suite, lines).values()], axis=-1)


def _item_sums(suite: Suite, arm: Arm) -> list[dict[Score, tuple[Floats, Floats]]]:
    """Per seed and score, each item's value and weight, (num_items,) each."""
    found = []
    for path, result in zip(arm.paths, arm.results, strict=True):
        items = {task: read_items(path.parent / result["items"], task) for task in suite.tasks()}
        found.append({s: _values(items[s.task], s, result, path) for line in suite.headlines for s in line.scores})
    return found


def _values(
    items: Sequence[Mapping[str, Any]], score: Score, result: Mapping[str, Any], path: Path
) -> tuple[Floats, Floats]:
    values = [item["values"].get(score.key) for item in items]
    if len(values) != result["subtasks"][score.task]["num_items"]:
        raise ValueError(f"{path}: {score.task} has {len(values)} item records, not as many as its result says")
    if any(value is None for value in values):
        raise ValueError(f"{path}: {score.metric} of {score.task} is no mean over items; it cannot be resampled")
    pairs = np.array([value if isinstance(value, list) else [value, 1.0] for value in values], dtype=np.float64)
    return pairs[:, 0], pairs[:, 1]


def _exact(suite: Suite, items: Mapping[Score, tuple[Floats, Floats]]) -> dict[Score, tuple[Floats, Floats]]:
    return {score: (above.sum(), below.sum()) for score, (above, below) in items.items()}


def _resample(suite: Suite, arms: Sequence[Arm], num_samples: int, rng: np.random.Generator) -> list[Floats]:
    """Lines of every arm and seed, (num_samples, seeds, lines); within a task all models share the drawn items."""
    items = [_item_sums(suite, arm) for arm in arms]
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


def _seed_draws(arms: Sequence[Arm], num_samples: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Which seeds each sample takes, (num_samples, seeds) per arm; arms with the first one's seeds share its draw."""
    draws: list[NDArray[np.int64]] = []
    for arm in arms:
        num_seeds = len(arm.results)
        is_paired = bool(draws) and arm.seeds == arms[0].seeds and None not in arm.seeds
        drawn = draws[0] if is_paired else rng.integers(num_seeds, size=(num_samples, num_seeds))
        draws.append(drawn)
    return draws


def _describe(arm: Arm) -> dict[str, Any]:
    models = [result["model"] for result in arm.results]
    keys = ("linear_sparsity", "linear_active_params", "num_parameters", "forward_flops_per_token")
    return {
        "name": arm.name,
        "files": [str(path) for path in arm.paths],
        "seeds": arm.seeds,
        **{key: models[0].get(key) for key in keys},
        "train_flops": models[0].get("run", {}).get("train_flops"),
        "train_tokens": models[0].get("run", {}).get("train_tokens"),
    }


_FACTS = (
    ("linear sparsity", "linear_sparsity", "{:.4f}"),
    ("active linear parameters", "linear_active_params", "{:,}"),
    ("whole-model FLOPs/token (forward)", "forward_flops_per_token", "{:,}"),
    ("training FLOPs, whole model", "train_flops", "{:.4g}"),
    ("training tokens", "train_tokens", "{:,}"),
)


def markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison as a table: scores, differences to the first arm with intervals, and what the models cost."""
    names = [arm["name"] for arm in comparison["arms"]]
    percent = f"{100 * comparison['confidence']:g}%"
    heads = [heading for name in names[1:] for heading in (f"{name} - {names[0]}", f"{percent} interval")]
    header = ["task", "metric", *names, *heads]
    lines = []
    for row in comparison["rows"]:
        cells = [_shown(row, value) for value in row["values"]]
        for entry in row["differences"]:
            cells += [
                _shown(row, entry["difference"], "+"),
                f"{_shown(row, entry['low'])} to {_shown(row, entry['high'])}",
            ]
        lines.append([row["task"], row["metric"], *cells])
    for title, key, form in _FACTS:
        values = [arm[key] for arm in comparison["arms"]]
        if any(value is not None for value in values):
            shown_values = ["-" if value is None else form.format(value) for value in values]
            lines.append([title, "", *shown_values, *[""] * len(heads)])
    text = markdown_table(header, lines, "ll" + "r" * (len(header) - 2))
    return f"{text}\n\n{_note(comparison, percent)}\n"


def _shown(row: Mapping[str, Any], value: float, sign: str = "") -> str:
    if row["metric"] == "normalised":
        return f"{value:{sign}.2f}"
    return f"{value:{sign}.4f}" if is_ratio(row["metric"]) else f"{100 * value:{sign}.2f}"


def _note(comparison: Mapping[str, Any], percent: str) -> str:
    note = (
        f"Intervals ({percent}): paired bootstrap over {comparison['over']}, {comparison['num_samples']} samples. "
        "Accuracies are in percent; of bits per byte, less is better."
    )
    if comparison["over"] == "items":
        note += " One training run each: how much the training seed changes is not in the intervals."
    return note
