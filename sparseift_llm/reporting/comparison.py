"""The table of finished runs of `sparseift pretrain` or of a Trainer, side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparseift_llm.runs.folder import read_folder, read_summary
from sparseift_llm.runs.formats import SUMMARY_NAME
from sparseift_llm.runs.same_data import check_same_data
from sparseift_llm.runs.trainer_summary import trainer_summary
from sparseift_llm.utils.outputs import user_path
from sparseift_llm.utils.tables import markdown_table
from sparseift_llm.utils.units import readable_flops

COMPARISON_NAME = "comparison.md"

HEADLINES: tuple[tuple[str, str, Callable[[float], str]], ...] = (  # title, summary key, value in words
    ("held-out loss (nats/token)", "eval_loss", "{:.4f}".format),
    ("held-out perplexity", "perplexity", "{:.2f}".format),
    ("held-out bits per byte", "bits_per_byte", "{:.4f}".format),
    ("active linear parameters", "linear_active_params", "{:,}".format),
    ("stored parameters", "stored_params", "{:,}".format),
    ("linear sparsity", "linear_sparsity", "{:.4f}".format),
    ("linear FLOPs/token (forward)", "linear_flops_per_token", "{:,}".format),
    ("whole-model FLOPs/token (forward)", "forward_flops_per_token", "{:,}".format),
    ("training FLOPs, whole model", "train_flops", readable_flops),
    ("training tokens", "train_tokens", "{:,}".format),
    ("tokens/s", "tokens_per_second", "{:,.0f}".format),
)
NOTES = (
    "FLOPs count multiply-adds of projections, attention and logits; norms and elementwise work are left out.",
    "One seed each: differences smaller than the spread between seeds mean nothing.",
    "A difference is one between models if both have their best rates, which `sparseift sweep` finds.",
)
MASKED_NOTE = (
    "Unstructured masks are multiplied at the cost of the stored, dense matrix: fewer tokens/s at equal FLOPs."
)
COMPARISON_BEGINNING = rf"\|  \|.*\n\| --- \|.*\n\| {re.escape(HEADLINES[0][0])} \|"  # a pattern, see refuse_foreign
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
        cells = [title, *("" if value is None else form(value) for value in values)]
        if len(runs) == 2:
            has_ratio = key in WITH_RATIO and None not in values and values[0] != 0
            cells.append(f"{values[1] / values[0]:.3f}" if has_ratio else "")
        lines.append(cells)
    lines += _rate_lines(summaries, len(header))
    unknown = [Path(run).name for run, summary in zip(runs, summaries, strict=True) if "data" not in summary["config"]]
    return markdown_table(header, lines, "l" + "r" * (len(header) - 1)) + "\n\n" + _notes(summaries, unknown)


def _rate_lines(summaries: Sequence[dict[str, Any]], num_cells: int) -> list[list[str]]:
    """Learning rates as rows of the table, without ratios; none where no run's settings give one."""
    rates: dict[str, list[str]] = {"learning rate": [], "learning rate of embeddings": []}
    for summary in summaries:
        training = summary["config"].get("training", {})
        rate = training.get("learning_rate")
        factors = (1, training.get("embedding_lr_factor", 1))
        for cells, factor in zip(rates.values(), factors, strict=True):
            cells.append("" if rate is None else f"{rate * factor:g}")
    rows = [[title, *cells] for title, cells in rates.items() if any(cells)]
    return [row + [""] * (num_cells - len(row)) for row in rows]


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
