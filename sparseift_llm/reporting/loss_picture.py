"""The picture of the losses of runs, for papers and slides, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparseift_llm.reporting.page.line_ends import shortened, spread
from sparseift_llm.runs.folder import RunFolder, read_folder
from sparseift_llm.utils.files import written_whole
from sparseift_llm.utils.outputs import user_path
from sparseift_llm.utils.units import unit_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_NAME = "loss.png"
_AXES = (("train_tokens", "training tokens", "tokens"), ("train_flops", "training FLOPs, whole model", "FLOP"))
_STEPS = ("step", "optimizer steps", "")
_CURVES = (("loss", "-", "training", 1.0, 0.5), ("eval_loss", "o--", "held-out", 2.0, 1.0))
_GAP = 9.0  # percent of a panel's height that a name and a value take


def loss_picture(runs: Sequence[str | Path], path: str | Path) -> None:
    """Draw training and held-out loss of all runs over training tokens and training FLOPs, or else over steps.

    An axis is drawn if all runs have logged it; a plain Trainer may have logged neither. Beside the end of every run's
    held-out loss stand its name and its value; so many runs that these would cover each other have the legend alone.

    Args:
        runs: output folders.
        path: the PNG to write.

    Raises:
        ValueError: a run has no metrics, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("drawing needs matplotlib: pip install 'sparseift_llm[plot]'") from error
    folders = [read_folder(user_path(run)) for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if not folder.metrics.lines:
            raise ValueError(f"{run} has no metrics to draw")
    axes = [axis for axis in _AXES if all(_points(folder, axis[0], "loss") for folder in folders)] or [_STEPS]
    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    names = [Path(run).name for run in runs]
    for panel, (key, label, unit) in zip(panels, axes, strict=True):
        _draw(panel, names, folders, key, label, unit)
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].legend()
    figure.suptitle(f"Training and held-out loss: {', '.join(names)}")
    with written_whole(user_path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw(panel: Axes, names: Sequence[str], folders: Sequence[RunFolder], key: str, label: str, unit: str) -> None:
    """The curves of all runs over one axis."""
    largest = max((abs(line[key]) for folder in folders for line in folder.metrics.lines if key in line), default=0)
    divisor, words = unit_at(largest, unit) if unit else (1.0, "")
    ends = {}
    for index, (name, folder) in enumerate(zip(names, folders, strict=True)):
        for quantity, style, title, width, alpha in _CURVES:
            points = [(x / divisor, y) for x, y in _points(folder, key, quantity)]
            panel.plot(*zip(*points, strict=True), style, color=f"C{index}", linewidth=width, markersize=4,
                       alpha=alpha, label=f"{name}, {title}")  # fmt: skip
            if points and quantity == "eval_loss":
                ends[index] = points[-1]
    panel.set_xlabel(f"{label} ({words})" if words else label)
    panel.grid(alpha=0.3)
    low, high = panel.get_ylim()
    panel.set_ylim(low, high)  # as they are, so that shares of the height stay true
    heights = spread([100 * (high - y) / (high - low) for _, y in ends.values()], _GAP)
    for (index, end), height in zip(ends.items(), heights or (), strict=False):
        panel.annotate(
            f"{shortened(names[index])}\n{end[1]:.3f}", end, (1.01, 1 - height / 100), textcoords="axes fraction",
            color=f"C{index}", va="center", fontsize=9, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "linestyle": ":", "color": f"C{index}", "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip


def _points(folder: RunFolder, x: str, y: str) -> list[tuple[float, float]]:
    """The points of a curve: of the lines of the log that have both values."""
    return [(line[x], line[y]) for line in folder.metrics.lines if x in line and y in line]
