"""What a sweep says: the best setting of every arm, with its interval and edges, as a table, a picture and JSON.

The runs are made by runs/sweep_plan.py and runs/sweep.py.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from sparseift_llm.runs.lenient_json import read_object
from sparseift_llm.runs.sweep import Outcome
from sparseift_llm.runs.sweep_plan import Axis, Sweep, value_name
from sparseift_llm.utils.files import write_json, write_text, written_whole
from sparseift_llm.utils.outputs import refuse_foreign
from sparseift_llm.utils.provenance import commit, machine, versions
from sparseift_llm.utils.tables import markdown_table

RESULT_NAME, TABLE_NAME, PICTURE_NAME = "sweep.json", "sweep.md", "sweep.png"
FORMAT = "sparseift_sweep_v1"
CONFIDENCE = 0.95
_BEGINNING = rf'\{{\s*"format": "{re.escape(FORMAT)}"'  # a pattern, see refuse_foreign
_LOG_RATIO = 3  # between the ends of an axis; a wider one is drawn in logarithms
NOTE = (
    "The best setting has the lowest mean held-out loss (nats per token) over all seeds. The interval is of the mean "
    f"over seeds, by Student's t at {CONFIDENCE:.0%}; that the best of several settings was taken is not in it."
)


@dataclass(frozen=True)
class Setting:
    """One setting of an arm, over its seeds.

    Args:
        values: name of an axis -> value.
        losses: held-out losses of the seeds whose training gave a finite one.
        num_seeds: how many were asked for.
    """

    values: Mapping[str, Any]
    losses: tuple[float, ...]
    num_seeds: int

    @property
    def is_whole(self) -> bool:
        """Whether every seed has a loss; other settings are not compared, as their missing seeds may be the worst."""
        return len(self.losses) == self.num_seeds

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)


def settings_of(arm: str, sweep: Sweep, outcomes: Sequence[Outcome]) -> list[Setting]:
    """The settings of an arm, in the order of the grid."""
    losses: dict[str, list[float]] = {}
    values: dict[str, Mapping[str, Any]] = {}
    for outcome in outcomes:
        if outcome.run.arm == arm:
            key = in_words(outcome.run.settings)
            values[key] = outcome.run.settings
            found = losses.setdefault(key, [])
            if outcome.eval_loss is not None and math.isfinite(outcome.eval_loss):
                found.append(outcome.eval_loss)
    return [Setting(values[key], tuple(losses[key]), len(sweep.seeds)) for key in losses]


def best_of(settings: Sequence[Setting]) -> Setting | None:
    """The setting of the lowest mean loss; the first of equal ones; None if none has a loss for every seed."""
    return min((setting for setting in settings if setting.is_whole), key=lambda setting: setting.mean, default=None)


def t_interval(losses: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student's t interval of the mean of independent values; None for fewer than two."""
    if len(losses) < 2:
        return None
    error = statistics.stdev(losses) / math.sqrt(len(losses))
    half = float(stats.t.ppf((1 + confidence) / 2, len(losses) - 1)) * error
    return statistics.fmean(losses) - half, statistics.fmean(losses) + half


def difference_interval(
    first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Welch's t interval of the mean of `first` less that of `second`; None if one has fewer than two values."""
    if min(len(first), len(second)) < 2:
        return None
    low, high = stats.ttest_ind(first, second, equal_var=False).confidence_interval(confidence)
    return float(low), float(high)


def edges(best: Setting, axes: Sequence[Axis]) -> list[str]:
    """In words, the axes of numbers at whose smallest or largest value the best setting is.

    With two values, the best is always at an edge.
    """
    found = []
    for axis in axes:
        if len(axis.values) < 2 or not all(map(_is_number, axis.values)):
            continue
        value = best.values[axis.name]
        for word, end in (("smallest", min(axis.values)), ("largest", max(axis.values))):
            if value == end:
                found.append(f"best at the {word} {axis.name} tried")
    return found


def sweep_table(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    """A Markdown table with the best setting of every arm, and one of the runs without a finite loss."""
    rows = []
    for arm, axes in sweep.axes.items():
        settings = settings_of(arm, sweep, outcomes)
        best = best_of(settings)
        if best is None:
            rows.append([arm, "none has a finite loss for every seed", "", "", len(sweep.seeds), ""])
            continue
        interval = t_interval(best.losses)
        rows.append(
            [
                arm,
                in_words(best.values) or "the recipe's",
                f"{best.mean:.4f}",
                f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "",
                len(best.losses),
                "; ".join(edges(best, axes)),
            ]
        )
    header = ["arm", "best setting", "held-out loss", f"{CONFIDENCE:.0%} interval", "seeds", "edges"]
    parts = [markdown_table(header, rows, "llrlrl"), NOTE]
    lost = [
        [outcome.run.name, outcome.failure or f"diverged: held-out loss {outcome.eval_loss}", str(outcome.run.log)]
        for outcome in outcomes
        if not outcome.is_finite
    ]
    if lost:
        parts.append(markdown_table(["run without a result", "why", "log"], lost, "lll"))
    return "\n\n".join(parts) + "\n"


def check_output(sweep: Sweep, has_picture: bool) -> None:
    """Before anything is run: whether the results can be written.

    Raises:
        ValueError: the picture needs matplotlib, which is missing, or the files there are not of a sweep, or of one of
            another recipe.
    """
    if has_picture:
        _figure_class()
    output = sweep.output
    refuse_foreign([output / name for name in (RESULT_NAME, TABLE_NAME, PICTURE_NAME)], _BEGINNING, "sparseift sweep")
    words = read_object(output / RESULT_NAME).values.get("words")
    before = Path(words[0]).name if isinstance(words, list) and words else None
    if before not in (None, Path(sweep.words[0]).name):
        raise ValueError(
            f"{output} holds the results of a sweep of {before}, which those of {sweep.words[0]} would replace; give "
            "another --output"
        )


def write_sweep(sweep: Sweep, outcomes: Sequence[Outcome], has_picture: bool) -> str:
    """Write `sweep.json`, `sweep.md` and, if asked for, `sweep.png` into the sweep's folder.

    Returns:
        The table, followed by a line that says where the results are.
    """
    table = sweep_table(sweep, outcomes)
    write_json(sweep.output / RESULT_NAME, sweep_values(sweep, outcomes))
    write_text(sweep.output / TABLE_NAME, table)
    names = [RESULT_NAME, TABLE_NAME]
    if has_picture:
        sweep_picture(sweep, outcomes, sweep.output / PICTURE_NAME)
        names.append(PICTURE_NAME)
    else:  # an older one would not be of these results
        (sweep.output / PICTURE_NAME).unlink(missing_ok=True)
    return f"{table}\nwrote {', '.join(names)} to {sweep.output}"


def sweep_values(sweep: Sweep, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The contents of `sweep.json`: all runs, and the best setting of every arm."""
    best = {}
    for arm, axes in sweep.axes.items():
        found = best_of(settings_of(arm, sweep, outcomes))
        best[arm] = found and {
            "settings": found.values,
            "eval_loss": found.mean,
            "interval": t_interval(found.losses),
            "num_seeds": len(found.losses),
            "edges": edges(found, axes),
        }
    return {
        "format": FORMAT,
        "words": list(sweep.words),
        "seeds": list(sweep.seeds),
        "axes": {arm: {axis.path: list(axis.values) for axis in axes} for arm, axes in sweep.axes.items()},
        "confidence": CONFIDENCE,
        "best": best,
        "runs": [_run_values(outcome, sweep.output) for outcome in outcomes],
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }


def _run_values(outcome: Outcome, output: Path) -> dict[str, Any]:
    state = "failed" if outcome.failure else "finished" if outcome.is_finite else "diverged"
    return {
        "name": outcome.run.name,
        "arm": outcome.run.arm,
        "settings": outcome.run.settings,
        "seed": outcome.run.seed,
        "state": state,
        "eval_loss": outcome.eval_loss if state == "finished" else None,
        "failure": outcome.failure,
        "folder": outcome.run.folder.relative_to(output).as_posix(),
        "log": outcome.run.log.relative_to(output).as_posix(),
    }


# ---- the picture


def sweep_picture(sweep: Sweep, outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw a panel for every arm: mean loss over the first axis, a line for each setting of the other axes.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = _figure_class()(figsize=(5.5 * len(sweep.axes), 4.5), layout="constrained")
    panels = figure.subplots(1, len(sweep.axes), sharey=True, squeeze=False)[0]
    for panel, (arm, axes) in zip(panels, sweep.axes.items(), strict=True):
        _draw_arm(panel, axes, settings_of(arm, sweep, outcomes))
        panel.set_title(arm)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss (nats per token)")
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_arm(panel: Any, axes: Sequence[Axis], settings: Sequence[Setting]) -> None:
    first = axes[0] if axes else None
    places = _places(panel, first)
    lines: dict[str, list[tuple[float, Setting]]] = {}
    for setting in settings:
        if setting.is_whole:
            others = {key: value for key, value in setting.values.items() if first is None or key != first.name}
            place = places[value_name(setting.values[first.name])] if first else 0.0
            lines.setdefault(in_words(others), []).append((place, setting))
    for label, points in lines.items():
        points.sort(key=lambda point: point[0])
        (line,) = panel.plot([x for x, _ in points], [setting.mean for _, setting in points], "-", label=label)
        every = [(x, loss) for x, setting in points for loss in setting.losses]
        panel.plot(*zip(*every, strict=True), "o", color=line.get_color(), markersize=3)
    best = best_of(settings)
    if best is not None:
        place = places[value_name(best.values[first.name])] if first else 0.0
        panel.plot([place], [best.mean], "*", color="black", markersize=12, label="best")
        panel.legend()


def _places(panel: Any, axis: Axis | None) -> dict[str, float]:
    """Where each value of the first axis stands: at itself if all are numbers, else one beside the other."""
    if axis is None:
        panel.set_xticks([])
        return {}
    panel.set_xlabel(axis.name)
    names = [value_name(value) for value in axis.values]
    if not all(map(_is_number, axis.values)):
        panel.set_xticks(range(len(names)), names)
        return {name: float(index) for index, name in enumerate(names)}
    if min(axis.values) > 0 and max(axis.values) >= _LOG_RATIO * min(axis.values):
        panel.set_xscale("log")
    panel.set_xticks(list(axis.values), names)
    panel.minorticks_off()
    return dict(zip(names, map(float, axis.values), strict=True))


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "sweep.png needs matplotlib: pip install 'sparseift_llm[plot]', or give --no-picture"
        ) from error
    return Figure


def in_words(settings: Mapping[str, Any]) -> str:
    """Settings for a reader, e.g. `learning_rate 0.004, embedding_lr_factor 3`."""
    return ", ".join(f"{name} {value_name(value)}" for name, value in settings.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
