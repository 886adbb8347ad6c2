"""Pictures of an analysis: quantities along training, and final loss over them."""

from __future__ import annotations

from pathlib import Path

from sparseift_llm.analysis import LOSS, Analysis
from sparseift_llm.correlation import MIN_RUNS
from sparseift_llm.spectral import QUANTITIES

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
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("drawing needs matplotlib: pip install 'sparseift_llm[plot]'") from error
    along, scatter = Path(output) / ALONG_TRAINING_NAME, Path(output) / CORRELATIONS_NAME
    figure = Figure(figsize=(11, 7), layout="constrained")
    for panel, key in zip(figure.subplots(2, 2, sharex=True).flat, QUANTITIES, strict=True):
        for index, run in enumerate(analysis.runs):
            points = [(entry["step"], entry["model"][key]) for entry in run.checkpoints]
            points = [point for point in points if point[1] is not None]
            if points:
                panel.plot(*zip(*points, strict=True), "o-", color=f"C{index}", markersize=4, label=run.run.name)
        panel.set_xlabel("optimizer step")
        panel.set_ylabel(f"{key}, mean over layers")
        panel.grid(alpha=0.3)
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.axes[0].legend()
    figure.savefig(along, dpi=120)
    finished = [run for run in analysis.runs if run.checkpoints and run.eval_loss is not None]
    if len(finished) < MIN_RUNS:
        scatter.unlink(missing_ok=True)
        return [along]
    figure = Figure(figsize=(11, 7), layout="constrained")
    for panel, key in zip(figure.subplots(2, 2, sharey=True).flat, QUANTITIES, strict=True):
        for index, run in enumerate(finished):
            value = run.checkpoints[-1]["model"][key]
            if value is not None:
                panel.plot([value], [run.eval_loss], "o", color=f"C{index}", label=run.run.name)
        (pair,) = (item for item in analysis.correlations if (item.first, item.second) == (key, LOSS))
        panel.set_title(pair.excluded or f"Pearson {pair.pearson:.2f}, Spearman {pair.spearman:.2f}", fontsize=9)
        panel.set_xlabel(f"{key} of the last model")
        panel.set_ylabel("held-out loss (nats per token)")
        panel.grid(alpha=0.3)
    figure.savefig(scatter, dpi=120)
    return [along, scatter]
