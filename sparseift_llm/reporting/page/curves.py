"""Figures of curves: loss over FLOPs, tokens and time; masks, speed and gradients over steps; spectral quantities.

Each figure has the table of the points it draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from sparseift_llm.reporting.page.charts import Series, downsampled, line_chart
from sparseift_llm.reporting.page.markup import Body, Table, short
from sparseift_llm.reporting.page.runs import Run
from sparseift_llm.runs.lenient_json import finite, mapping, number

MOST_LOSSES = 500  # points of a loss curve
NUM_LINES, NUM_STRETCHES = 200, 10  # other curves: lines spread evenly, stretches whose extremes are kept
X_AXES = (  # name, key, label, unit, words of the switch
    ("flops", "train_flops", "training FLOPs, whole model", "FLOP", "FLOPs"),
    ("tokens", "train_tokens", "training tokens", "tokens", "tokens"),
    ("time", "wall_seconds", "wall-clock time, evaluation included (s)", None, "wall-clock time"),
    ("steps", "step", "optimizer steps", None, "steps"),  # all that a plain Trainer's log has
)
SPANS = (  # name, where it begins as a share of the shortest run, words, words of the switch
    ("whole", 0.0, "whole training", "all"),
    ("half", 0.5, "from the middle of the shortest run", "second half"),
)
_EXTREMES = "for every curve the smallest and the largest value of equal stretches"
_EVENLY = f"{NUM_LINES} a run, spread evenly, and for every curve the extremes of each tenth of training"
_LOSSES = (("loss", "training", False), ("eval_loss", "held-out", True))


@dataclass(frozen=True)
class Figure:
    """Drawings with one table.

    Args:
        name: start of all its ids.
        plots: (name, title, drawing).
        drawn: numbers of the runs that have lines.
        table: of the points drawn.
        note: what is left out; empty if nothing is.
        constants: quantities that never changed and are not drawn, in one sentence; empty if there are none.
    """

    name: str
    plots: Sequence[tuple[str, str, Markup]]
    drawn: Sequence[int]
    table: Table
    note: str
    constants: str = ""


@dataclass(frozen=True)
class Quantity:
    """Something that is logged by step.

    Args:
        key: in the log.
        title: of its chart.
        unit: of its axis.
        starts_at_zero: whether its axis includes 0.
    """

    key: str
    title: str
    unit: str
    starts_at_zero: bool = False


MASK_QUANTITIES = (
    Quantity("sparsity", "Sparsity", "share of zeros"),
    Quantity("exploration", "Exploration", "share of weights that were ever active"),
    Quantity("mask_churn", "Churn", "share of active weights that the last update grew", True),
    Quantity("mask_survival", "Survival", "share of grown weights that the next update kept"),
    Quantity("drop_fraction", "Drop fraction", "share of active weights", True),
    Quantity("unread_units", "Inputs that nothing reads", "share of columns without an active weight", True),
    Quantity("unfed_units", "Outputs that nothing feeds", "share of rows without an active weight", True),
)
TRAINING_QUANTITIES = (
    Quantity("tokens_per_second", "Speed", "tokens per second", True),
    Quantity("model_flops_utilization", "Model FLOPs utilization", "share of the peak", True),
    Quantity("learning_rate", "Learning rate", "at that step", True),
    Quantity("embedding_learning_rate", "Learning rate of embeddings", "at that step", True),
    Quantity("head_learning_rate", "Learning rate of the output head", "at that step", True),
    Quantity("grad_norm", "Gradient", "norm", True),
    Quantity("grad_norm_active", "Gradient of active weights", "norm", True),
    Quantity("grad_norm_grown", "Gradient of weights just grown", "norm", True),
    Quantity("dead_units", "Dead units", "share of rows and columns without an active weight", True),
    Quantity("saturated_units", "Saturated units", "share of hidden FFN units", True),
)
SPECTRAL_QUANTITIES = (
    Quantity("delta_r", "Ramanujan gap", "delta_r, of the mask"),
    Quantity("delta_r_imdb", "Ramanujan gap over subgraphs", "delta_r_imdb, of the mask"),
    Quantity("lambda", "Weighted spectral gap", "lambda, of absolute weights"),
    Quantity("lambda_imsg", "Weighted spectral gap over subgraphs", "lambda_imsg, of absolute weights"),
)


def loss_figure(runs: Sequence[Run]) -> Figure | None:
    """Training and held-out loss of all runs, over every axis, whole and from the middle of training."""
    kept = [{key: _kept(run.metrics, key, MOST_LOSSES) for key, _, _ in _LOSSES} for run in runs]
    plots = []
    keys = ["step", "train_flops", "train_tokens", "wall_seconds", "loss", "eval_loss"]  # columns of the table
    has_tokens = all(any("train_tokens" in line for line in run.metrics) for run in runs if run.metrics)
    for name, key, label, unit, words in X_AXES:
        if name == "steps" and has_tokens:
            continue  # every run can be drawn over axes that say more
        logged = [[x for line in run.metrics if (x := finite(line.get(key))) is not None] for run in runs]
        for span, start, span_words, _ in SPANS:
            begin = start * min((max(values) for values in logged if values), default=0)
            series = [
                Series(
                    f"{run.name}, {title}",
                    index,
                    _points(kept[index][loss], key, loss, begin),
                    is_main,
                    _end(run, loss),
                )
                for loss, title, is_main in _LOSSES
                for index, run in enumerate(runs)
            ]
            title = f"Loss over {words}, {span_words}"
            columns = {"x": str(keys.index(key)), "y": f"{keys.index('loss')} {keys.index('eval_loss')}"}
            chart = line_chart(
                f"loss-{name}-{span}", title, series, label, "nats per token", columns=columns, x_low=begin,
                x_unit=unit, is_tall=True,
            )  # fmt: skip
            if chart is not None:
                plots.append((f"{name}-{span}", title, chart))
    header = ["step", "FLOPs", "tokens", "seconds", "training loss", "held-out loss"]
    table = Table("Loss (nats per token) over training", header, _bodies(runs, kept, keys))
    total = sum(any(loss in line for loss, _, _ in _LOSSES) for run in runs for line in run.metrics)
    return Figure("loss", plots, _drawn(kept), table, _note(table.num_rows, total, _EXTREMES)) if plots else None


def _end(run: Run, loss: str) -> str | None:
    """The name at the end of a run's held-out loss, or of its training loss where it has no other."""
    has_held_out = any(finite(line.get("eval_loss")) is not None for line in run.metrics)
    return run.name if loss == ("eval_loss" if has_held_out else "loss") else None


def drawn_axes(loss: Figure | None) -> list[tuple[str, str]]:
    """The axes over which there are losses: their names, and their words for the switch."""
    names = {name for name, _, _ in loss.plots} if loss else set()
    return [(name, words) for name, *_, words in X_AXES if any(f"{name}-{span}" in names for span, *_ in SPANS)]


def multiples(
    name: str,
    caption: str,
    runs: Sequence[Run],
    quantities: Sequence[Quantity],
    lines_of: Callable[[Run], Sequence[Mapping[str, Any]]] = lambda run: run.metrics,
) -> Figure | None:
    """A chart over steps for every quantity that any run has.

    Args:
        name: start of the ids.
        caption: of the table.
        runs: those to draw.
        quantities: in the order of the charts.
        lines_of: mappings with a `step` and quantities.
    """
    logged = [lines_of(run) for run in runs]
    values = {q: [_values(lines, q.key) for lines in logged] for q in quantities}
    constant = [q for q in quantities if any(values[q]) and all(len(set(found)) <= 1 for found in values[q])]
    found = [q for q in quantities if any(values[q]) and q not in constant]
    kept = [_shared(lines, [q.key for q in found]) for lines in logged]
    plots = []
    for place, quantity in enumerate(found, start=1):
        series = [
            Series(run.name, index, _points(kept[index][quantity.key], "step", quantity.key), end=run.name)
            for index, run in enumerate(runs)
        ]
        chart = line_chart(
            f"{name}-{quantity.key}", quantity.title, series, "optimizer step", quantity.unit,
            quantity.starts_at_zero, {"x": "0", "y": str(place)}, x_low=0,
        )  # fmt: skip
        if chart is not None:
            plots.append((quantity.key, quantity.title, chart))
    table = Table(
        caption,
        ["step", *(f"{q.title.lower()} ({q.unit})" for q in found)],
        _bodies(runs, kept, ["step", *(q.key for q in found)]),
    )
    total = sum(any(q.key in line for q in found) for lines in logged for line in lines)
    note = _note(table.num_rows, total, _EVENLY)
    sentence = _constants(runs, {q: values[q] for q in constant})
    return Figure(name, plots, _drawn(kept), table, note, sentence) if plots or sentence else None


def _values(lines: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [value for line in lines if (value := finite(line.get(key))) is not None]


def _constants(runs: Sequence[Run], values: Mapping[Quantity, Sequence[Sequence[float]]]) -> str:
    """A sentence on quantities of which every run has one value throughout, e.g. `sparsity 0.75`."""
    parts = []
    for quantity, of_runs in values.items():
        having = {run.name: found[0] for run, found in zip(runs, of_runs, strict=True) if found}
        if len(set(having.values())) == 1:
            parts.append(f"{quantity.title.lower()} {short(next(iter(having.values())))}")
        else:
            each = ", ".join(f"{short(value)} in {name}" for name, value in having.items())
            parts.append(f"{quantity.title.lower()} {each}")
    return f"The same at every step, so not drawn: {'; '.join(parts)}." if parts else ""


def spectral_lines(run: Run) -> list[dict[str, Any]]:
    """The whole model's quantities by step."""
    return [{**mapping(entry.get("model")), "step": entry["step"]} for entry in run.spectral]


def by_kind_table(runs: Sequence[Run]) -> Table | None:
    """Sparsity and exploration of every kind of projection in the last log line that has them."""
    bodies = []
    for run in runs:
        last: dict[str, dict[str, Any]] = {}
        for line in run.metrics:
            for key, value in line.items():
                quantity, slash, kind = key.partition("/")
                if slash and quantity in ("sparsity", "exploration") and number(value) is not None:
                    last.setdefault(kind, {})[quantity] = value
                    last[kind]["step"] = line["step"]
        rows = [[kind, *(short(last[kind].get(key)) for key in ("step", "sparsity", "exploration"))] for kind in last]
        if rows:
            bodies.append(Body(rows, run.name))
    header = ["kind", "step", "sparsity (share of zeros)", "exploration (share of weights ever active)"]
    return Table("Kinds of projections, as last logged", header, bodies) if bodies else None


def _kept(lines: Sequence[Mapping[str, Any]], key: str, limit: int) -> list[Mapping[str, Any]]:
    """The lines to draw of those that have `key`."""
    having = [line for line in lines if key in line]
    values = [found if (found := finite(line[key])) is not None else float("nan") for line in having]
    return [having[index] for index in downsampled(values, limit)]


def _shared(lines: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    """The lines to draw for each of `keys`, the same ones where they have it, so that one table holds all curves."""
    having = [line for line in lines if any(key in line for key in keys)]
    chosen = {round(place) for place in np.linspace(0, len(having) - 1, min(NUM_LINES, len(having))).tolist()}
    for key in keys:
        values = [found if (found := finite(line.get(key))) is not None else float("nan") for line in having]
        chosen.update(index for index in downsampled(values, 2 + 2 * NUM_STRETCHES) if key in having[index])
    return {key: [having[index] for index in sorted(chosen) if key in having[index]] for key in keys}


def _points(lines: Sequence[Mapping[str, Any]], x_key: str, y_key: str, begin: float = 0) -> list[tuple[float, float]]:
    points = []
    for line in lines:
        x, y = finite(line.get(x_key)), finite(line.get(y_key))
        if x is not None and x >= begin:
            points.append((float(x), float("nan") if y is None else float(y)))
    return points


def _bodies(
    runs: Sequence[Run], kept: Sequence[Mapping[str, Sequence[Mapping[str, Any]]]], keys: Sequence[str]
) -> list[Body]:
    """A body per run: the lines that any of its curves draws, by step."""
    bodies = []
    for run, curves in zip(runs, kept, strict=True):
        lines = {id(line): line for lines in curves.values() for line in lines}
        ordered = sorted(lines.values(), key=lambda line: line["step"])
        if ordered:
            bodies.append(Body([[short(line.get(key)) for key in keys] for line in ordered], run.name))
    return bodies


def _drawn(kept: Sequence[Mapping[str, Sequence[Any]]]) -> list[int]:
    return [index for index, curves in enumerate(kept) if any(curves.values())]


def _note(shown: int, total: int, how: str) -> str:
    return f"{shown:,} of {total:,} log lines are drawn: {how}." if shown < total else ""
