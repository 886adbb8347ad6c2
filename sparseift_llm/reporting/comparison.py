"""Tables and pictures from finished runs of `sparseift pretrain` or of a Trainer, which runs/folder.py reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseift_llm.runs.folder import RunFolder, read_folder, read_summary
from sparseift_llm.runs.formats import SUMMARY_NAME
from sparseift_llm.runs.same_data import check_same_data
from sparseift_llm.runs.trainer_summary import trainer_summary
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
_AXES = (("train_tokens", "training tokens"), ("train_flops", "training FLOPs"))
_STEPS = ("step", "optimizer steps")
WITH_RATIO = {key for _, key, _ in HEADLINES} - {"linear_sparsity"}


def comparison_table(runs: Sequence[str | Path]) -> str:
    """A markdown table of finished runs side by side; with two, a column of ratios second / first.

    Args:
        runs: output folders of `sparseift pretrain` or of a Trainer, the dense one first. What a Trainer's folder does
            not tell is left blank, and that its text may be another one is said below the table.

    Raises:
        ValueError: a run has not finished, or the runs differ in data or sequence length, so that their
            losses cannot be compared.
    """
    summaries = [summary_of(run) for run in runs]
    with_data = [(run, summary) for run, summary in zip(runs, summaries, strict=True) if "data" in summary["config"]]
    check_same_data([run for run, _ in with_data], [summary for _, summary in with_data])
    header = ["", *(Path(run).name for run in runs), *(["ratio"] if len(runs) == 2 else [])]
    lines = []
    for title, key, form in HEADLINES:
        values = [summary[key] for summary in summaries]
        cells = [title, *("" if value is None else form.format(value) for value in values)]
        if len(runs) == 2:
            has_ratio = key in WITH_RATIO and None not in values and values[0] != 0
            cells.append(f"{values[1] / values[0]:.3f}" if has_ratio else "")
        lines.append(cells)
    unknown = [Path(run).name for run, summary in zip(runs, summaries, strict=True) if "data" not in summary["config"]]
    return markdown_table(header, lines, "l" + "r" * (len(header) - 1)) + "\n\n" + _notes(summaries, unknown)


def summary_of(run: str | Path) -> dict[str, Any]:
    """The summary of a finished run, of `sparseift pretrain` or of a plain Trainer.

    Raises:
        ValueError: the run is missing, has not finished, or is damaged.
    """
    path = user_path(run)
    if path.is_dir() and not (path / SUMMARY_NAME).exists():
        folder = read_folder(path)
        if folder.trainer_state.is_there and not folder.recipe.is_there:
            return trainer_summary(folder)
    return read_summary(path)


def _notes(summaries: Sequence[dict[str, Any]], without_data: Sequence[str]) -> str:
    notes = [" ".join(NOTES)]
    if without_data:
        notes.append(
            f"Of {', '.join(without_data)} only what a Trainer writes is known: whether it had the same text as the "
            "others is not, and FLOPs, tokens and speed only where they were logged."
        )
    sparse = [summary["config"].get("sparse_ift") for summary in summaries]
    if any(values and values.get("structure") != "block" for values in sparse):
        notes.append(MASKED_NOTE)
    return "\n\n".join(notes) + "\n"


def loss_picture(runs: Sequence[str | Path], path: str | Path) -> None:
    """Draw training and held-out loss of all runs over training tokens and training FLOPs, or else over steps.

    An axis is drawn if all runs have logged it; a plain Trainer may have logged neither.

    Args:
        runs: output folders.
        path: the PNG to write.

    Raises:
        ValueError: a run has no metrics, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise ValueError("drawing needs matplotlib: pip install 'sparseift_llm[plot]'") from error
    folders = [read_folder(user_path(run)) for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if not folder.metrics.lines:
            raise ValueError(f"{run} has no metrics to draw")
    axes = [axis for axis in _AXES if all(_points(folder, axis[0], "loss") for folder in folders)] or [_STEPS]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, (key, label) in zip(panels, axes, strict=True):
        for index, (run, folder) in enumerate(zip(runs, folders, strict=True)):
            for name, style, title in (("loss", "-", "training"), ("eval_loss", "o--", "held-out")):
                points = _points(folder, key, name)
                width = 1.0 if name == "loss" else 2.0
                panel.plot(*zip(*points, strict=True), style, color=f"C{index}", linewidth=width, markersize=4,
                           alpha=0.5 if name == "loss" else 1.0, label=f"{Path(run).name}, {title}")  # fmt: skip
                if points and name == "eval_loss":
                    panel.annotate(f" {points[-1][1]:.3f}", points[-1], color=f"C{index}", va="center", fontsize=9)
        panel.set_xlabel(label)
        panel.xaxis.set_major_formatter(EngFormatter())
        panel.margins(x=0.1)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].legend()
    figure.suptitle(f"Training and held-out loss: {', '.join(Path(run).name for run in runs)}")
    with written_whole(user_path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _points(folder: RunFolder, x: str, y: str) -> list[tuple[float, float]]:
    """The points of a curve: of the lines of the log that have both values."""
    return [(line[x], line[y]) for line in folder.metrics.lines if x in line and y in line]
