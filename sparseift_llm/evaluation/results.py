"""Results of an evaluation: headlines and averages from the tasks' scores, the table that a person reads, item records.

Nothing here needs lm-eval. Files are written in result_file.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseift_llm._moved import old_names
from sparseift_llm.evaluation.suites import (
    Headline,
    Score,
    Suite,
    averages,
    headline_chance,
    headline_normalized,
    headline_value,
    is_ratio,
)
from sparseift_llm.utils.tables import markdown_table

if not TYPE_CHECKING:  # so that type checkers still know what is here
    __getattr__ = old_names(__name__)

Leaves = Mapping[str, Mapping[str, Any]]


def summarize(suite: Suite, leaves: Leaves) -> dict[str, Any]:
    """`results`, the averages, and how they follow from the tasks.

    Args:
        suite: with its groups expanded.
        leaves: task -> result, see `harness.evaluate_task`.

    Returns:
        JSON-ready. A headline's `value` is in lm-eval's unit, accuracies from 0 to 1. Averages are means of
        `value`, or of `normalized`, 0 to 100, where the suite normalises.
    """
    if suite.is_named:
        suite = _with_metrics_given(suite, leaves)
    results = {line.name: _headline_result(suite, line, leaves) for line in suite.headlines}
    key = "normalized" if suite.normalized else "value"
    return {
        "results": results,
        **averages(suite, {name: result[key] for name, result in results.items()}),
        "averages": {name: list(of) for name, of in suite.averages.items()},
        "average_of": key,
        "subtasks": {task: dict(leaves[task]) for task in suite.tasks()},
    }


def _with_metrics_given(suite: Suite, leaves: Leaves) -> Suite:
    """The suite with a line for every metric that its tasks gave; some only name their metrics while they run."""
    lines: list[Headline] = []
    for task in suite.tasks():
        own = [line for line in suite.headlines if line.tasks() == [task]]
        if not own:
            continue  # a part of a group, which has a line of its own
        given = [key for key in leaves[task]["metrics"] if "_stderr" not in key.partition(",")[0]]
        kept = [line for line in own if line.scores[0].key in given]
        declared = {line.scores[0].key for line in kept}
        for key in given:
            if key not in declared:
                metric, _, filter_name = key.partition(",")
                score = Score(task, metric, filter_name)
                kept.append(
                    Headline(f"{task}/{key.removesuffix(',none')}", (score,), own[0].num_fewshot, is_further=True)
                )
        if kept and kept[0].is_further:
            kept[0] = replace(kept[0], name=task, is_further=False)
        lines += kept
    groups = [line for line in suite.headlines if len(line.tasks()) > 1]
    order = {line.name: number for number, line in enumerate(suite.headlines)}
    lines = sorted([*groups, *lines], key=lambda line: order.get(line.name, order.get(line.tasks()[0], 0)))
    return replace(suite, headlines=tuple(lines))


def _headline_result(suite: Suite, line: Headline, leaves: Leaves) -> dict[str, Any]:
    values = {score: leaves[score.task]["metrics"][score.key] for score in line.scores}
    weights = {score: leaves[score.task]["num_items"] for score in line.scores}
    tasks = list(dict.fromkeys(score.task for score in line.scores))
    shots = {leaves[task]["num_fewshot"] for task in tasks}
    result = {
        "metric": " and ".join(dict.fromkeys(score.metric for score in line.scores)),
        "value": headline_value(line, values, weights),
        "stderr": _stderr(line, leaves, weights),
        "num_fewshot": shots.pop() if len(shots) == 1 else None,
        "num_items": sum(leaves[task]["num_items"] for task in tasks),
        "chance": headline_chance(line),
        "version": " ".join(dict.fromkeys(str(leaves[task]["version"]) for task in tasks)),
        "task_hash": _joined_hash([leaves[task]["task_hash"] for task in tasks]),
        "truncated_items": _total(leaves[task].get("truncated_items") for task in tasks),
        "truncated_prompts": _total(leaves[task].get("truncated_prompts") for task in tasks),
        "pooled": line.pooled,
        "is_further": line.is_further,
        "scores": [asdict(score) for score in line.scores],
    }
    if suite.normalized:
        result["normalized"] = headline_normalized(line, values, weights)
    return result


def _stderr(line: Headline, leaves: Leaves, weights: Mapping[Score, float]) -> float | None:
    """Of independent tasks; several metrics of one task are taken as fully correlated, which overstates it."""
    total = sum(weights.values())
    by_task: dict[str, float] = {}
    for score in line.scores:
        stderr = leaves[score.task]["metrics"].get(f"{score.metric}_stderr,{score.filter}")
        if stderr is None:
            return None
        share = weights[score] / total if line.pooled else 1 / len(line.scores)
        by_task[score.task] = by_task.get(score.task, 0.0) + share * stderr
    return by_task.popitem()[1] if len(by_task) == 1 else math.sqrt(sum(value**2 for value in by_task.values()))


def _total(counts: Iterable[int | None]) -> int | None:
    """The sum, or None if a count is not known."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def _joined_hash(hashes: Sequence[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def table(result: Mapping[str, Any]) -> str:
    """The headlines of a result file as markdown, with what was left out and what a reader should know below."""
    header = ("task", "metric", "shots", "items", "truncated", "score", "stderr", "chance")
    rows: list[list[str]] = []
    for name, line in result["results"].items():
        cells = [shown(line[key], line["metric"]) for key in ("value", "stderr", "chance")]
        if "normalized" in line:
            cells[0] += f" ({line['normalized']:.2f} normalised)"
        cut = line.get("truncated_items")
        counts = [str(line["num_fewshot"]), f"{line['num_items']:,}", "-" if cut is None else f"{cut:,}"]
        rows.append([name, metric_in_words(line), *counts, *cells])
    left_out = result.get("left_out", {})
    rows += [[name, "", "", "", "", "left out", "", ""] for name in left_out]
    for name in result["averages"]:
        average = result[name] if result["average_of"] == "normalized" else 100 * result[name]
        rows.append([f"**{name}**", "", "", "", "", f"{average:.2f}", "", ""])
    text = markdown_table(header, rows, "llrrrrrr")
    notes = [f"{name} was left out: {reason}." for name, reason in left_out.items()] + _notes(result)
    return "\n\n".join([text, *notes]) + "\n"


def metric_in_words(line: Mapping[str, Any]) -> str:
    """The metric of a headline, and how it is put together if it is made of several tasks."""
    number = len({score["task"] for score in line["scores"]})
    if number == 1:
        return str(line["metric"])
    kind = "over all items" if line["pooled"] else "each counting the same"
    return f"{line['metric']}, mean of {number} subtasks, {kind}"


def _notes(result: Mapping[str, Any]) -> list[str]:
    notes = []
    cut = [name for name, line in result["results"].items() if line.get("truncated_items") and not line["is_further"]]
    if cut:
        notes.append(
            f"Truncated: items whose prompt is longer than the model's context of {result['model']['seq_len']:,} "
            f"tokens lost its beginning, examples first ({', '.join(cut)})."
        )
    wrong = result.get("wrong_labels", {})
    if wrong:
        listed = ", ".join(f"{number:,} of {name}" for name, number in wrong.items())
        notes.append(f"The gold answer is none of the choices in some items, which are wrong for all models: {listed}.")
    shortened = result.get("shortened_answers", {})
    if shortened:
        notes.append(
            f"Answers to {', '.join(shortened)} end after {next(iter(shortened.values())):,} tokens, half of the "
            "model's context; lm-eval allows 256, for which the context has no room."
        )
    return notes


def shown(value: float | None, metric: str) -> str:
    """Accuracies in percent, everything else as it is."""
    if value is None:
        return "-"
    return f"{value:.4f}" if is_ratio(metric) else f"{100 * value:.2f}"


def read_items(items_dir: Path, task: str) -> list[dict[str, Any]]:
    """The records of one task.

    Raises:
        ValueError: they are missing or damaged.
    """
    path = items_dir / f"{task}.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"the item records {path} are missing or damaged: {error}") from error
