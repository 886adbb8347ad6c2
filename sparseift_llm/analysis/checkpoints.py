"""`sparseift analyze`: spectral quantities of all checkpoints of runs, and how they go with the final loss.

Finds checkpoints, keeps what was computed in each run's `spectral.json`, and writes tables. The quantities are
computed in spectral.py, coefficients in correlation.py; pictures are in spectral_pictures.py.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from sparseift_llm.analysis.correlation import Correlation, correlate
from sparseift_llm.analysis.matrices import check_every_nth_layer
from sparseift_llm.analysis.spectral import MIN_MEAN_DEGREE, MIN_VERTICES, QUANTITIES, TOLERANCE, spectral_report
from sparseift_llm.checkpoints.loading import weight_files
from sparseift_llm.checkpoints.mask_file import MASKS_NAME, read_digest
from sparseift_llm.checkpoints.trainer_folder import is_complete, numbered_checkpoints
from sparseift_llm.runs.folder import read_folder, read_summary
from sparseift_llm.runs.formats import SPECTRAL_FORMAT, SPECTRAL_NAME, SUMMARY_NAME, TRAINER_STATE_NAME
from sparseift_llm.runs.reading import read_object
from sparseift_llm.runs.same_data import check_same_data
from sparseift_llm.utils.files import write_json, written_whole
from sparseift_llm.utils.outputs import user_path
from sparseift_llm.utils.tables import markdown_table

logger = logging.getLogger(__name__)
ANALYSIS_FORMAT = "sparseift_analysis_v1"
ANALYSIS_BEGINNING = rf'\{{\s*"format": "{ANALYSIS_FORMAT}"'  # a pattern, see refuse_foreign
ANALYSIS_NAME = "analysis.json"
TABLE_NAME = "analysis.csv"
LOSS = "eval_loss"


@dataclass(frozen=True)
class RunAnalysis:
    """One run.

    Args:
        run: its folder.
        checkpoints: entries of its `spectral.json` by step, ascending.
        excluded: folder -> why it was left out.
        eval_loss: held-out loss of the finished run, at the step of the last entry; None if there is none.
        no_loss: why there is none.
        summary: its `summary.json`, None where there is no loss.
    """

    run: Path
    checkpoints: tuple[dict[str, Any], ...]
    excluded: dict[str, str]
    eval_loss: float | None
    no_loss: str | None
    summary: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without what stands in `spectral.json`."""
        keys = ("step", "folder", "masks_digest", "model")
        return {
            "run": str(self.run),
            LOSS: self.eval_loss,
            "no_eval_loss": self.no_loss,
            "checkpoints": [{key: entry[key] for key in keys} for entry in self.checkpoints],
            "excluded": self.excluded,
        }


@dataclass(frozen=True)
class Analysis:
    """All runs, and the correlations across them."""

    settings: dict[str, Any]
    runs: tuple[RunAnalysis, ...]
    correlations: tuple[Correlation, ...]

    def to_dict(self) -> dict[str, Any]:
        """What `analysis.json` holds."""
        return {
            "format": ANALYSIS_FORMAT,
            "settings": self.settings,
            "runs": [run.to_dict() for run in self.runs],
            "correlations": [correlation.to_dict() for correlation in self.correlations],
        }


def analyze(runs: Sequence[str | Path], output: str | Path, every_nth_layer: int = 1) -> Analysis:
    """Analyse runs, and write `spectral.json` into each, `analysis.json` and `analysis.csv` into `output`.

    Args:
        runs: output folders of recipes/pretrain.py or of a Trainer; checkpoints and the final model are taken.
        output: a folder, made if it is not there.
        every_nth_layer: see `spectral_report`.

    Raises:
        ValueError: a run is not a folder or is given twice, no run has anything to analyse, or `every_nth_layer` is
            below 1.
        OSError: a file cannot be written.
    """
    check_every_nth_layer(every_nth_layer)
    folders, output = [user_path(run) for run in runs], user_path(output)
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give output folders of runs")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a run is given twice, which would count it twice in correlations")
    settings = make_settings(every_nth_layer)
    output.mkdir(parents=True, exist_ok=True)
    found = tuple(_analyze_run(folder, settings) for folder in folders)
    if not any(run.checkpoints for run in found):
        reasons = [f"{run.run} ({where}): {reason}" for run in found for where, reason in run.excluded.items()]
        raise ValueError("nothing to analyse: " + "; ".join(reasons))
    result = Analysis(settings, found, tuple(correlations(found)))
    write_json(output / ANALYSIS_NAME, result.to_dict())
    _write_table(output / TABLE_NAME, found)
    return result


def make_settings(every_nth_layer: int) -> dict[str, Any]:
    """What decides the numbers besides masks and weights; entries computed with other settings are not reused."""
    return {
        "every_nth_layer": every_nth_layer,
        "left_vertices": "input features",
        "isolated_vertices": "left out",
        "min_group_vertices": MIN_VERTICES,
        "min_mean_degree": MIN_MEAN_DEGREE,
        "singular_value_tolerance": TOLERANCE,
    }


# ---- one run


def _analyze_run(run: Path, settings: dict[str, Any]) -> RunAnalysis:
    excluded: dict[str, str] = {}
    entries: dict[int, dict[str, Any]] = {}
    known = _read_known(run / SPECTRAL_NAME, settings)
    for step, folder in _candidates(run, excluded):
        if step in entries:
            continue  # the final model is that of the last checkpoint
        name = "." if folder == run else folder.name
        try:
            entries[step] = _entry(step, name, folder, known, settings["every_nth_layer"])
        except (ValueError, OSError) as error:  # OSError: a training run deletes old checkpoints
            excluded[name] = str(error)
            logger.warning("%s is left out: %s", folder, error)
            continue
        known.pop(name, None)
        _write_entries(run, settings, [*entries.values(), *known.values()])  # so that an interruption loses nothing
    if entries:
        last = max(entries)
        for entry in known.values():  # of checkpoints deleted since: they cannot be computed again
            if entry["step"] < last and not (run / entry["folder"]).exists():
                entries.setdefault(entry["step"], entry)
        _write_entries(run, settings, entries.values())
    else:
        reasons = set(excluded.values()) or {"holds neither a checkpoint nor a model"}
        excluded = {"all": reasons.pop()} if len(reasons) == 1 else excluded
    checkpoints = tuple(entries[key] for key in sorted(entries))
    summary, no_loss = _loss_of(run, checkpoints[-1]["step"] if checkpoints else None)
    return RunAnalysis(run, checkpoints, excluded, summary[LOSS] if summary else None, no_loss, summary)


def _write_entries(run: Path, settings: dict[str, Any], entries: Iterable[dict[str, Any]]) -> None:
    ordered = sorted(entries, key=lambda entry: entry["step"])
    write_json(run / SPECTRAL_NAME, {"format": SPECTRAL_FORMAT, "settings": settings, "checkpoints": ordered})


def _candidates(run: Path, excluded: dict[str, str]) -> Iterator[tuple[int, Path]]:
    """Folders to analyse and their steps, the final model first; others go to `excluded`."""
    if (run / CONFIG_NAME).is_file() or (run / MASKS_NAME).is_file():
        step = read_folder(run).step
        if step is None:
            excluded["."] = f"the step of this model is not known: no {SUMMARY_NAME} and no {TRAINER_STATE_NAME} has it"
        else:
            yield step, run
    for step, folder in numbered_checkpoints(run).items():
        if is_complete(folder):
            yield step, folder
        else:
            excluded[folder.name] = "was not written to its end"


def _entry(step: int, name: str, folder: Path, known: dict[str, Any], every_nth_layer: int) -> dict[str, Any]:
    """The entry of one folder for `spectral.json`, taken from there if masks and weights are the same files."""
    if not (folder / MASKS_NAME).exists() and "sparse_ift" not in read_object(folder / CONFIG_NAME).values:
        raise ValueError("a dense model, without masks to analyse")
    digest = read_digest(folder)
    # static masks have one digest at all steps, so files of weights must not have changed either
    files = [path for path in weight_files(folder) if path.is_file()]
    stamp = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    before = known.get(name)
    if before is not None and (before["step"], before["masks_digest"], before.get("weights")) == (step, digest, stamp):
        return dict(before)
    logger.info("analysing %s", folder)
    report = spectral_report(folder, every_nth_layer).to_dict()
    return {"step": step, "folder": name, **report, "weights": stamp}


def _read_known(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Entries of an earlier analysis with the same settings, by folder."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != SPECTRAL_FORMAT or values["settings"] != settings:
            return {}
        keys = {"step", "folder", "masks_digest", "layers", "model"}
        entries = [entry for entry in values["checkpoints"] if entry.keys() >= keys and type(entry["step"]) is int]
        return {entry["folder"]: entry for entry in entries}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged and will be written anew: %s", path, error)
        return {}


def _loss_of(run: Path, step: int | None) -> tuple[dict[str, Any] | None, str | None]:
    """The run's summary, or why it gives no loss that belongs to the model at `step`."""
    try:
        summary = read_summary(run)
    except ValueError as error:
        return None, str(error)
    loss = summary[LOSS]
    if not isinstance(loss, int | float) or not math.isfinite(loss):
        return None, f"{LOSS} is {loss!r}"
    if summary.get("step") != step:
        return None, f"{LOSS} is that of step {summary.get('step')}, the last model analysed that of step {step}"
    return summary, None


# ---- across runs


def correlations(runs: Sequence[RunAnalysis]) -> Iterator[Correlation]:
    """All pairs of the four quantities of each run's last model, and its final loss."""
    rows = [{**run.checkpoints[-1]["model"], LOSS: run.eval_loss} for run in runs if run.checkpoints]
    different = _different_data(runs)
    for first, second in itertools.combinations((*QUANTITIES, LOSS), 2):
        pairs = [(row[first], row[second]) for row in rows if row[first] is not None and row[second] is not None]
        if second == LOSS and different is not None:
            yield Correlation(first, second, len(pairs), excluded=different)
        else:
            yield correlate(first, second, pairs)


def _different_data(runs: Sequence[RunAnalysis]) -> str | None:
    finished = [(run.run, run.summary) for run in runs if run.summary is not None]
    try:
        check_same_data([run for run, _ in finished], [summary for _, summary in finished])
    except ValueError as error:
        return f"losses are not of the same data: {error}"
    except (KeyError, TypeError, AttributeError):
        return f"losses may not be of the same data: a {SUMMARY_NAME} does not say"
    return None


def _write_table(path: Path, runs: Sequence[RunAnalysis]) -> None:
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


def labels(runs: Sequence[RunAnalysis]) -> list[str]:
    """Folder names of the runs, or their paths where names are not unique."""
    names = [run.run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.run) for run in runs]


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
