"""Pictures of an analysis: quantities along training, and final loss over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseift_llm.analysis.correlation import MIN_RUNS
from sparseift_llm.analysis.results import LOSS, Analysis, labels
from sparseift_llm.analysis.spectral import QUANTITIES
from sparseift_llm.utils.files import written_whole
from sparseift_llm.utils.outputs import user_path

ALONG_TRAINING_NAME = "spectral.png"
CORRELATIONS_NAME = "correlations.png"


def draw(analysis: Analysis, output: str | Path) -> list[Path]:
    """Write `spectral.png` and, with at least 3 finished runs, `correlations.png` into the folder `output`.

    Returns:
        The files; an older `correlations.png` that would no longer be true is deleted.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ValueError("drawing needs matplotlib: pip install 'sparseift_llm[plot]'") from error
    along, scatter = (user_path(output) / name for name in (ALONG_TRAINING_NAME, CORRELATIONS_NAME))
    figure = matplotlib.figure.Figure(figsize=(11, 7), layout="constrained")
    _draw_along_training(analysis, figure)
    _save(figure, along)
    if sum(run.eval_loss is not None for run in analysis.runs) < MIN_RUNS:
        scatter.unlink(missing_ok=True)
        return [along]
    figure = matplotlib.figure.Figure(figsize=(11, 7), layout="constrained")
    _draw_losses(analysis, figure)
    _save(figure, scatter)
    return [along, scatter]


def _save(figure: Any, path: Path) -> None:
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_along_training(analysis: Analysis, figure: Any) -> None:
    for panel, key in zip(figure.subplots(2, 2, sharex=True).flat, QUANTITIES, strict=True):
        for index, (label, run) in enumerate(zip(labels(analysis.runs), analysis.runs, strict=True)):
            points = [(entry["step"], entry["model"][key]) for entry in run.checkpoints]
            points = [point for point in points if point[1] is not None]
            if points:
                panel.plot(*zip(*points, strict=True), "o-", color=f"C{index}", markersize=4, label=label)
        _finish(panel, "optimizer step", f"{key}, mean over layers")


def _draw_losses(analysis: Analysis, figure: Any) -> None:
    for panel, key in zip(figure.subplots(2, 2, sharey=True).flat, QUANTITIES, strict=True):
        for index, (label, run) in enumerate(zip(labels(analysis.runs), analysis.runs, strict=True)):
            value = None if run.eval_loss is None else run.checkpoints[-1]["model"][key]
            if value is not None:
                panel.plot([value], [run.eval_loss], "o", color=f"C{index}", label=label)
        (pair,) = (item for item in analysis.correlations if (item.first, item.second) == (key, LOSS))
        title = "no correlation" if pair.excluded else f"Pearson {pair.pearson:.2f}, Spearman {pair.spearman:.2f}"
        panel.set_title(title, fontsize=9)
        _finish(panel, f"{key} of the last model", "held-out loss (nats per token)")


def _finish(panel: Any, x_label: str, y_label: str) -> None:
    panel.set_xlabel(x_label)
    panel.set_ylabel(y_label)
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8)
