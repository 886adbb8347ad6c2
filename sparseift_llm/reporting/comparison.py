"""Tables and pictures from finished runs; what is in a run folder is read by runs/folder.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseift_llm.runs.folder import read_folder, read_summary
from sparseift_llm.runs.same_data import check_same_data
from sparseift_llm.utils.files import written_whole
from sparseift_llm.utils.outputs import user_path
from sparseift_llm.utils.tables import markdown_table

COMPARISON_NAME = "comparison.md"
PICTURE_NAME = "loss.png"

HEADLINES = (  # title, summary key, format
    ("held-out loss (nats/token)", "eval_loss", "{:.4f}"),
    ("held-out perplexity", "perplexity", "{:.2f}"),
    ("held-out bits per byte", "bits_per_byte", "{:.4f}"),
    ("active linear parameters", "linear_active_params", "{:,}"),
    ("stored parameters", "stored_params", "{:,}"),
    ("linear sparsity", "linear_sparsity", "{:.4f}"),
    ("linear FLOPs/token (forward)", "linear_flops_per_token", "{:,}"),
    ("whole-model FLOPs/token (forward)", "forward_flops_per_token", "{:,}"),
    ("training FLOPs, whole model", "train_flops", "{:.4g}"),
    ("training tokens", "train_tokens", "{:,}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
)
NOTES = (
    "FLOPs count multiply-adds of projections, attention and logits; norms and elementwise work are left out.",
    "One seed each: differences smaller than the spread between seeds mean nothing.",
)
MASKED_NOTE = (
    "Unstructured masks are multiplied at the cost of the stored, dense matrix: fewer tokens/s at equal FLOPs."
)
COMPARISON_BEGINNING = rf"\|  \|.*\n\| --- \|.*\n\| {re.escape(HEADLINES[0][0])} \|"  # a pattern, see refuse_foreign
WITH_RATIO = {key for _, key, _ in HEADLINES} - {"linear_sparsity"}


def comparison_table(runs: Sequence[str | Path]) -> str:
    """A markdown table of finished runs side by side; with two, a column of ratios second / first.

    Args:
        runs: output folders of recipes/pretrain.py, the dense one first.

    Raises:
        ValueError: a run has not finished, or the runs differ in data or sequence length, so that their
            losses cannot be compared.
    """
    summaries = [read_summary(user_path(run)) for run in runs]
    check_same_data(runs, summaries)
    header = ["", *(Path(run).name for run in runs), *(["ratio"] if len(runs) == 2 else [])]
    lines = []
    for title, key, form in HEADLINES:
        cells = [title, *(form.format(summary[key]) for summary in summaries)]
        if len(runs) == 2:
            cells.append(f"{summaries[1][key] / summaries[0][key]:.3f}" if key in WITH_RATIO else "")
        lines.append(cells)
    return markdown_table(header, lines, "l" + "r" * (len(header) - 1)) + "\n\n" + _notes(summaries)


def _notes(summaries: Sequence[dict[str, Any]]) -> str:
    notes = [" ".join(NOTES)]
    sparse = [summary["config"].get("sparse_ift") for summary in summaries]
    if any(values and values.get("structure") != "block" for values in sparse):
        notes.append(MASKED_NOTE)
    return "\n\n".join(notes) + "\n"


def loss_picture(runs: Sequence[str | Path], path: str | Path) -> None:
    """Draw training and held-out loss of all runs over training tokens and training FLOPs.

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
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, key, label in zip(panels, ("train_tokens", "train_flops"), ("tokens", "FLOPs"), strict=True):
        for index, (run, folder) in enumerate(zip(runs, folders, strict=True)):
            metrics = folder.metrics.lines
            if not metrics:
                raise ValueError(f"{run} has no metrics to draw")
            for name, style, title in (("loss", "-", "training"), ("eval_loss", "o--", "held-out")):
                points = [(line[key], line[name]) for line in metrics if name in line]
                width = 1.0 if name == "loss" else 2.0
                panel.plot(*zip(*points, strict=True), style, color=f"C{index}", linewidth=width, markersize=4,
                           alpha=0.5 if name == "loss" else 1.0, label=f"{Path(run).name}, {title}")  # fmt: skip
        panel.set_xlabel(f"training {label}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].legend()
    with written_whole(user_path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
