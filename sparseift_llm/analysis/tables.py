"""An analysis as tables: every layer of every checkpoint in a CSV file, and the last models as Markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from sparseift_llm.analysis.correlation import Correlation
from sparseift_llm.analysis.results import LOSS, Analysis, RunAnalysis, labels
from sparseift_llm.analysis.spectral import QUANTITIES
from sparseift_llm.utils.files import written_whole
from sparseift_llm.utils.tables import markdown_table


def write_table(path: Path, runs: Sequence[RunAnalysis]) -> None:
    """One line for each layer of each checkpoint, and one, `model`, for their means."""
    columns = ("kind", "sparsity", "mean_degree_left", "mean_degree_right", *QUANTITIES, "excluded")
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "step", "folder", LOSS, "layer", *columns))
        for run in runs:
            for entry in run.checkpoints:
                is_last = entry is run.checkpoints[-1]
                about = (run.run, entry["step"], entry["folder"], run.eval_loss if is_last else None)
                for layer, row in (("model", entry["model"]), *entry["layers"].items()):
                    writer.writerow((*about, layer, *(row.get(column) for column in columns)))


def render(analysis: Analysis) -> str:
    """The last models and the correlations as markdown, and what was left out."""
    lines = [_table_of_models(analysis), "", "Last models, means over layers.", ""]
    found = [pair for pair in analysis.correlations if pair.excluded is None]
    if found:
        count = len(analysis.correlations)
        caution = f"{count} pairs are tested at once, and nothing is controlled for: no sign of a cause."
        lines += [_table_of_correlations(found), "", caution, ""]
    for reason in dict.fromkeys(pair.excluded for pair in analysis.correlations if pair.excluded):
        pairs = [f"{pair.first} and {pair.second}" for pair in analysis.correlations if pair.excluded == reason]
        which = "any pair" if len(pairs) == len(analysis.correlations) else ", ".join(pairs)
        lines.append(f"no correlation of {which}: {reason}")
    for run in analysis.runs:
        lines += [f"left out: {run.run} ({where}): {reason}" for where, reason in run.excluded.items()]
        lines += [f"no {LOSS} of {run.run}: {run.no_loss}"] if run.checkpoints and run.no_loss else []
    return "\n".join(lines)


def _table_of_models(analysis: Analysis) -> str:
    """The quantities of the last model of each run."""
    rows = []
    for label, run in zip(labels(analysis.runs), analysis.runs, strict=True):
        for entry in run.checkpoints[-1:]:
            values = (*(entry["model"][key] for key in QUANTITIES), run.eval_loss)
            rows.append((label, entry["step"], *map(_number, values)))
    return markdown_table(("run", "step", *QUANTITIES, LOSS), rows, "l" + "r" * (len(QUANTITIES) + 2))


def _table_of_correlations(pairs: Iterable[Correlation]) -> str:
    header = ("correlation of", "and", "runs", "Pearson (95%)", "p", "Spearman (95%)", "p")
    rows = (
        (
            pair.first,
            pair.second,
            pair.num_runs,
            _number(pair.pearson, pair.pearson_interval),
            _number(pair.pearson_p),
            _number(pair.spearman, pair.spearman_interval),
            _number(pair.spearman_p),
        )
        for pair in pairs
    )
    return markdown_table(header, rows, "llrlrlr")


def _number(value: float | None, interval: tuple[float, float] | None = None) -> str:
    text = "-" if value is None else f"{value:.4f}"
    return text if interval is None else f"{text} ({interval[0]:.2f} to {interval[1]:.2f})"
