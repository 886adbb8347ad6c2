"""Evaluations on the page: scores of every run, how many prompts were truncated, and differences with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from sparseift_llm.evaluation.comparison import Arm, compare
from sparseift_llm.evaluation.comparison_table import notes as comparison_notes
from sparseift_llm.evaluation.suites import is_ratio
from sparseift_llm.reporting.page.markup import NONE, Body, Table, formatted, short
from sparseift_llm.reporting.page.runs import Run
from sparseift_llm.reporting.page.words import flattened, text
from sparseift_llm.runs.lenient_json import finite, mapping

_NUM_RESAMPLES = 1000
_CONFIDENCE = 0.95
_OF_ONE_SEED = ("seed", "data_seed", "output_dir", "run_name", "logging_dir")  # settings that tell seeds apart


@dataclass(frozen=True)
class Differences:
    """One result file's differences between kinds of runs.

    Args:
        table: scores of every kind, and differences to the first with intervals; None if there are none.
        notes: what to know about the intervals, or why there are none.
    """

    table: Table | None
    notes: Sequence[str]


def evaluation_tables(runs: Sequence[Run]) -> list[Table]:
    """A table for every result file's name: tasks by runs, in percent where a score is a share of items."""
    tables = []
    for name in _names(runs):
        results = {run.name: run.evaluations[name] for run in runs if name in run.evaluations}
        tasks = dict.fromkeys(task for result in results.values() for task in mapping(result["results"]))
        bodies = [Body([_task_row(task, list(results.values())) for task in tasks], "tasks")]
        averages = dict.fromkeys(key for result in results.values() for key in mapping(result.get("averages")))
        if averages:
            rows = [[key, "mean", "", "", *(_average(result, key) for result in results.values())] for key in averages]
            bodies.append(Body(rows, "averages"))
        bodies.append(Body([["training seed", "", "", "", *(_seed(result) for result in results.values())]], "models"))
        left_out = dict.fromkeys(task for result in results.values() for task in mapping(result.get("left_out")))
        if left_out:
            rows = [[task, "", "", "", *(_left_out(result, task) for result in results.values())] for task in left_out]
            bodies.append(Body(rows, "left out"))
        suites = dict.fromkeys(text(result.get("suite", "unknown")) for result in results.values())
        scores = (f"{run}: score ± standard error (95% interval), items" for run in results)
        header = ["task", "metric", "shots", "chance", *scores]
        tables.append(Table(f"{name}: suite {', '.join(suites)}", header, bodies))
    return tables


def difference_tables(runs: Sequence[Run]) -> list[Differences]:
    """For every result file's name that several kinds of runs have: their differences with intervals.

    Runs whose settings differ in nothing but seeds are one kind. Items and seeds are in the intervals, see
    `sparseift_llm.evaluation.comparison`.
    """
    found = []
    for name in _names(runs):
        arms = _arms([run for run in runs if name in run.evaluations], name)
        if len(arms) < 2:
            continue
        try:
            comparison = compare(arms, _NUM_RESAMPLES, _CONFIDENCE)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            found.append(Differences(None, [f"{name}: differences have no intervals ({text(str(error))})."]))
        else:
            found.append(Differences(_difference_table(name, comparison), comparison_notes(comparison)))
    return found


def _names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.evaluations))


def _arms(runs: Sequence[Run], name: str) -> list[Arm]:
    """One arm for each kind of runs, in the order of the runs."""
    kinds: dict[Any, list[Run]] = {}
    for run in runs:
        values = flattened(run.config)
        key = tuple((k, v) for k, v in dict(values).items() if k.rpartition(".")[2] not in _OF_ONE_SEED)
        kinds.setdefault(key or run.name, []).append(run)
    groups: list[list[Run]] = []
    for members in kinds.values():
        seeds = [_seed(run.evaluations[name]) for run in members]
        are_seeds = NONE not in seeds and len(set(seeds)) == len(seeds)
        groups += [members] if are_seeds else [[run] for run in members]
    groups.sort(key=lambda members: runs.index(members[0]))
    return [
        Arm(
            ", ".join(run.name for run in members),
            tuple(run.folder / name for run in members),
            tuple(run.evaluations[name] for run in members),
        )
        for members in groups
    ]


def _difference_table(name: str, comparison: Mapping[str, Any]) -> Table:
    names = [arm["name"] for arm in comparison["arms"]]
    header = ["task", "metric", *(f"{arm}: mean score" for arm in names)]
    header += [f"{arm} - {names[0]} (95% interval)" for arm in names[1:]]
    rows = []
    for row in comparison["rows"]:
        cells = [_shown(value, row["metric"]) for value in row["values"]]
        cells += [_interval(entry, row["metric"]) for entry in row["differences"]]
        rows.append([row["task"], row["metric"], *cells])
    seeds = [["training seeds", "", *(str(arm["num_seeds"]) for arm in comparison["arms"]), *[""] * (len(names) - 1)]]
    return Table(f"{name}: differences to {names[0]}", header, [Body(rows, "tasks"), Body(seeds, "models")])


def _interval(entry: Mapping[str, Any], metric: str) -> str:
    low, high = (_shown(entry[key], metric, "+") for key in ("low", "high"))
    clear = " *" if entry["is_clear"] else ""
    return f"{_shown(entry['difference'], metric, '+')} ({low} to {high}){clear}"


def _task_row(task: str, results: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [mapping(mapping(result["results"]).get(task)) for result in results]
    columns = [_agreed(lines, key) for key in ("metric", "num_fewshot")]
    metric = text(next((line["metric"] for line in lines if "metric" in line), ""))
    chances = dict.fromkeys(_score(line.get("chance"), metric) for line in lines if line)
    return [task, *columns, " / ".join(chances), *(_scored(line, metric) for line in lines)]


def _agreed(lines: Sequence[Mapping[str, Any]], key: str) -> str:
    return " / ".join(dict.fromkeys(NONE if line.get(key) is None else text(line[key]) for line in lines if line))


def _scored(line: Mapping[str, Any], metric: str) -> str:
    if not line:
        return NONE
    words = _score(line.get("value"), metric)
    value, stderr = finite(line.get("value")), finite(line.get("stderr"))
    if value is not None and stderr is not None:
        half = float(stats.norm.ppf((1 + _CONFIDENCE) / 2)) * stderr
        words += f" ± {_score(stderr, metric)} ({_score(value - half, metric)} to {_score(value + half, metric)})"
    if "normalized" in line:
        words += f", {formatted(line['normalized'], '{:.2f}'.format)} normalised"
    words += f", {formatted(line.get('num_items'), '{:,}'.format)} items"
    return (
        f"{words}, {formatted(line['truncated_items'], '{:,}'.format)} truncated"
        if line.get("truncated_items")
        else words
    )


def _score(value: Any, metric: str) -> str:
    """Accuracies in percent, everything else as it is."""
    if finite(value) is None:
        return short(value)
    return formatted(value, "{:.4f}".format) if is_ratio(metric) else formatted(value, "{:.2%}".format)


def _shown(value: float, metric: str, sign: str = "") -> str:
    if metric == "normalised":
        return f"{value:{sign}.2f}"
    return f"{value:{sign}.4f}" if is_ratio(metric) else f"{value:{sign}.2%}"


def _average(result: Mapping[str, Any], key: str) -> str:
    words = "{:.2f}" if result.get("average_of") == "normalized" else "{:.2%}"
    return formatted(result.get(key), words.format)


def _seed(result: Mapping[str, Any]) -> str:
    """The seed a model was trained with, as far as its run left it behind."""
    return short(mapping(mapping(result.get("model")).get("run")).get("seed"))


def _left_out(result: Mapping[str, Any], task: str) -> str:
    left_out = mapping(result.get("left_out"))
    return text(left_out[task]) if task in left_out else NONE
