"""The spectral quantities of one run: which of its checkpoints are analysed, and what `spectral.json` keeps of them.

A checkpoint is computed once. It is taken from `spectral.json` as long as its masks, its weights and the settings are
the same, so that a run that trains on is analysed step by step, and an interruption loses nothing.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from sparseift_llm.analysis.results import LOSS, RunAnalysis
from sparseift_llm.analysis.spectral import MIN_MEAN_DEGREE, MIN_VERTICES, TOLERANCE, spectral_report
from sparseift_llm.checkpoints.loading import weight_files
from sparseift_llm.checkpoints.mask_file import MASKS_NAME, read_digest
from sparseift_llm.checkpoints.trainer_folder import is_complete, numbered_checkpoints
from sparseift_llm.runs.folder import read_folder, read_summary
from sparseift_llm.runs.formats import SPECTRAL_FORMAT, SPECTRAL_NAME, SUMMARY_NAME, TRAINER_STATE_NAME
from sparseift_llm.runs.lenient_json import read_object
from sparseift_llm.utils.files import write_json

logger = logging.getLogger(__name__)


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


def analyze_run(run: Path, settings: dict[str, Any]) -> RunAnalysis:
    """Analyse the checkpoints and the final model of one run, and write its `spectral.json`.

    Args:
        run: its folder.
        settings: see `make_settings`.
    """
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
