"""Heat maps with a row for every layer: degrees of the newest masks, masks and spectral quantities along training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from sparseift_llm.reporting.page.curves import SPECTRAL_QUANTITIES
from sparseift_llm.reporting.page.degrees import LayerDegrees, Masks, binned, short_names
from sparseift_llm.reporting.page.heat import HeatMap, draw
from sparseift_llm.reporting.page.markup import Body, Table, short
from sparseift_llm.reporting.page.runs import Run
from sparseift_llm.reporting.page.words import text
from sparseift_llm.runs.lenient_json import finite, mapping

NUM_BINS, MOST_COLUMNS = 48, 32
_BY_LAYER = (
    ("sparsity", "Sparsity", "share of zeros"),
    ("exploration", "Exploration", "share of weights that were ever active"),
    ("churn", "Churn", "share of active weights that the last update grew"),
    ("survival", "Survival", "share of grown weights that the next update kept"),
)
_SIDES: tuple[tuple[str, str, Callable[[LayerDegrees], NDArray[np.int64]]], ...] = (
    ("row", "Row degrees (outputs)", lambda layer: layer.rows),
    ("column", "Column degrees (inputs)", lambda layer: layer.columns),
)


@dataclass(frozen=True)
class LayerFigure:
    """The heat maps of one run, and the table with their numbers.

    Args:
        run: the name of the run.
        about: one sentence on what is shown.
        maps: the title and the drawing of each map.
        table: the numbers that the maps show.
    """

    run: str
    about: str
    maps: Sequence[tuple[str, Markup]]
    table: Table


def degree_figures(runs: Sequence[Run]) -> list[LayerFigure]:
    """For each run with masks, the degrees of rows and columns along the sides of every layer.

    A shade means the same degree in the figures of all runs.
    """
    figures = []
    having = [(index, run, run.masks) for index, run in enumerate(runs) if run.masks is not None and run.masks.layers]
    cells = {
        (index, side): [_relative(degrees(layer)) for layer in masks.layers]
        for index, _, masks in having
        for side, _, degrees in _SIDES
    }
    spread = max((abs(value - 1) for rows in cells.values() for row in rows for value in row), default=0)
    spread = min(1.0, max(0.1, spread))
    for index, run, masks in having:
        labels = [f"{name} {layer.kind}" for name, layer in zip(_short(masks.layers), masks.layers, strict=True)]
        maps, constants = [], []
        for side, title, _ in _SIDES:
            value = _constant(cells[index, side])
            if value is not None:
                constants.append(f"{title.lower()} {short(value)} times the mean")
                continue
            ends = f"first {side}", "last"
            unit = "degree, 1 is the layer's mean"
            heat = HeatMap(title, unit, labels, cells[index, side], ends, 1 - spread, 1 + spread)
            maps.append((title, draw(f"degrees-{index}-{side}", heat)))
        about = f"{_about(masks)}{_not_drawn(constants)}"
        figures.append(LayerFigure(run.name, about, maps, _degree_table(masks.layers, masks.unit)))
    return figures


def _constant(rows: Sequence[Sequence[float | None]]) -> float | None:
    """The value that all cells of a map have which are not blank; None if they differ."""
    values = {value for row in rows for value in row if value is not None}
    return values.pop() if len(values) == 1 else None


def _not_drawn(constants: Sequence[str]) -> str:
    """A sentence, with a space before it, on maps of which all cells are equal."""
    return f" The same everywhere, so not drawn: {'; '.join(constants)}." if constants else ""


def _about(masks: Masks) -> str:
    step = "" if masks.step is None else f" of step {masks.step}"
    where = "the final model" if masks.folder == "." else masks.folder
    num_active = sum(int(layer.rows.sum()) for layer in masks.layers)
    size = sum(layer.shape[0] * layer.shape[1] for layer in masks.layers)
    sparsity = 1 - num_active / size if size else 0.0
    return f"Masks{step} from {where}: {num_active:,} of {size:,} {masks.unit} active, sparsity {sparsity:.6g}."


def _short(layers: Sequence[LayerDegrees]) -> list[str]:
    return short_names([layer.name for layer in layers])


def _relative(degrees: NDArray[np.int64]) -> list[float]:
    mean = float(degrees.mean())
    return [value / mean if mean else 0.0 for value in binned(degrees, NUM_BINS)]


def _degree_table(layers: Sequence[LayerDegrees], unit: str) -> Table:
    def cells(degrees: NDArray[np.int64]) -> list[str]:
        return [str(degrees.min()), short(float(degrees.mean())), str(degrees.max()), str(int((degrees == 0).sum()))]

    rows = [
        [layer.name, layer.kind, f"{layer.shape[0]} x {layer.shape[1]}", short(layer.sparsity),
         *cells(layer.rows), *cells(layer.columns)]
        for layer in layers
    ]  # fmt: skip
    sides = [f"{side}: {what}" for side in ("rows", "columns") for what in ("least", "mean", "most", "empty")]
    header = ["layer", "kind", "rows x columns", "sparsity", *sides]
    return Table(f"Sparsity and degrees by layer, counted in {unit}", header, [Body(rows)])


def evolution_figures(runs: Sequence[Run]) -> list[LayerFigure]:
    """For each run with a layers.jsonl, the sparsity, exploration, churn and survival of every layer by step."""
    return _figures("evolution", runs, lambda run: run.layers, _BY_LAYER, _evolution_table)


def spectral_figures(runs: Sequence[Run]) -> list[LayerFigure]:
    """For each run with a spectral.json, the spectral quantities of every layer by step."""
    quantities = [(q.key, q.title, q.unit) for q in SPECTRAL_QUANTITIES]
    return _figures("spectral", runs, lambda run: run.spectral, quantities, _spectral_table)


def _figures(
    name: str,
    runs: Sequence[Run],
    entries_of: Callable[[Run], Sequence[Mapping[str, Any]]],
    quantities: Sequence[tuple[str, str, str]],
    make_table: Callable[[Mapping[str, Any]], Table],
) -> list[LayerFigure]:
    """One figure for each run that has logged something.

    Args:
        name: of this kind of figure, for ids in the page.
        runs: all runs of the page.
        entries_of: the logged entries of a run, each a mapping with `step` and `layers`.
        quantities: the key of each quantity in an entry, the title of its map, and its unit.
        make_table: the table of a run's last entry.

    Returns:
        The figures; a shade means the same value in all of them.
    """
    logged = [{entry["step"]: entry for entry in entries_of(run) if mapping(entry.get("layers"))} for run in runs]
    ranges = {key: _range(logged, key) for key, _, _ in quantities}
    figures = []
    for index, (run, by_step) in enumerate(zip(runs, logged, strict=True)):
        if not by_step:
            continue
        steps = _columns(sorted(by_step))
        layers = list(dict.fromkeys(layer for step in steps for layer in by_step[step]["layers"]))
        kinds = [_kind(by_step[steps[-1]]["layers"].get(layer)) for layer in layers]
        labels = [f"{name} {kind}" for name, kind in zip(short_names(layers), kinds, strict=True)]
        maps, constants = [], []
        for key, title, unit in quantities:
            span = ranges[key]
            rows = [[_value(by_step[step], layer, key) for step in steps] for layer in layers]
            value = _constant(rows)
            if value is not None:
                constants.append(f"{title.lower()} {short(value)}")
            elif span is not None and any(value is not None for row in rows for value in row):
                ends = f"step {steps[0]}", f"step {steps[-1]}"
                heat = HeatMap(title, unit, labels, rows, ends, *span)
                maps.append((title, draw(f"{name}-layers-{index}-{key}", heat)))
        shown = f"{len(steps)} of {len(by_step)} steps" if len(steps) < len(by_step) else f"{len(steps)} steps"
        about = f"One column each for {shown}; blank: not logged.{_not_drawn(constants)}"
        figures.append(LayerFigure(run.name, about, maps, make_table(by_step[steps[-1]])))
    return figures


def _kind(layer: Any) -> str:
    return text(mapping(layer).get("kind", "unknown"))


def _columns(steps: Sequence[int]) -> list[int]:
    """At most `MOST_COLUMNS` steps, spread evenly, the first and the last among them."""
    chosen = np.linspace(0, len(steps) - 1, min(MOST_COLUMNS, len(steps))).round().astype(int)
    return [steps[index] for index in chosen]


def _value(entry: Mapping[str, Any], layer: str, key: str) -> float | None:
    found = finite(mapping(mapping(entry.get("layers")).get(layer)).get(key))
    return None if found is None else float(found)


def _range(logged: Sequence[Mapping[int, Mapping[str, Any]]], key: str) -> tuple[float, float] | None:
    values = [
        found
        for by_step in logged
        for entry in by_step.values()
        for layer in entry["layers"]
        if (found := _value(entry, layer, key)) is not None
    ]
    return (min(values), max(values)) if values else None


def _evolution_table(entry: Mapping[str, Any]) -> Table:
    keys = [key for key, _, _ in _BY_LAYER]
    rows = [
        [name, _kind(values), *(short(mapping(values).get(key)) for key in keys)]
        for name, values in entry["layers"].items()
    ]
    header = ["layer", "kind", *(f"{title.lower()} ({unit})" for _, title, unit in _BY_LAYER)]
    return Table(f"Layers at step {entry['step']}, the last logged", header, [Body(rows)])


def _spectral_table(entry: Mapping[str, Any]) -> Table:
    keys = ("sparsity", "mean_degree_left", "mean_degree_right", *(q.key for q in SPECTRAL_QUANTITIES))
    rows = []
    for name, found in entry["layers"].items():
        values = mapping(found)
        shape = values.get("shape")
        sides = " x ".join(map(str, shape)) if isinstance(shape, list) else text(shape)
        excluded = values.get("excluded")
        why = "" if excluded in (None, False) else "yes" if excluded is True else text(excluded)
        rows.append([name, _kind(values), sides, *(short(values.get(key)) for key in keys), why])
    header = ["layer", "kind", "rows x columns", "sparsity", "mean degree, left", "mean degree, right"]
    header += [*(q.key for q in SPECTRAL_QUANTITIES), "excluded"]
    return Table(f"Spectral quantities by layer at step {entry['step']}, the last analysed", header, [Body(rows)])
