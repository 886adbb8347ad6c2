"""The runs of a page: a run folder with a name, its newest masks, and the pieces that a page would like to have.

What a folder holds is read by runs/folder.py; nothing in a run's folder makes this raise an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseift_llm.reporting.page.degrees import Masks, newest_masks
from sparseift_llm.reporting.page.words import unique_names
from sparseift_llm.runs.folder import RunFolder, read_folder
from sparseift_llm.runs.formats import (
    EVALUATIONS,
    LAYERS_NAME,
    METRICS_NAME,
    RECIPE_NAME,
    SPECTRAL_NAME,
    SUMMARY_NAME,
    TRAINER_STATE_NAME,
)
from sparseift_llm.utils.outputs import user_path

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        name: the end of its path that tells it from the other runs.
        files: what its folder holds.
        masks: the newest masks, None if there are none that can be read.
        mask_problems: what is wrong with masks that are newer than these.
    """

    name: str
    files: RunFolder
    masks: Masks | None
    mask_problems: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The path of its folder."""
        return self.files.path

    @property
    def state(self) -> str:
        """`finished`, `unfinished` or `broken`."""
        return "broken" if self.mask_problems else self.files.state

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is not simply finished; for the reader."""
        files = self.files
        return (*files.problems, *self.mask_problems, *files.open_ends, *files.remarks)

    @property
    def is_readable(self) -> bool:
        """Whether a file that makes a folder a run could be read, at least in part."""
        return self.files.is_readable

    @property
    def summary(self) -> Values:
        """The contents of `summary.json`, empty if there is none."""
        return self.files.summary.values

    @property
    def recipe(self) -> Values:
        """The contents of `recipe.json`, empty if there is none."""
        return self.files.recipe.values

    @property
    def metrics(self) -> tuple[Values, ...]:
        """The lines of the log."""
        return self.files.metrics.lines

    @property
    def layers(self) -> tuple[Values, ...]:
        """The lines of `layers.jsonl`."""
        return self.files.layers.lines

    @property
    def spectral(self) -> tuple[Values, ...]:
        """The checkpoints of `spectral.json`, by step."""
        return self.files.spectral

    @property
    def evaluations(self) -> Mapping[str, Values]:
        """File name -> result file of an evaluation."""
        return self.files.evaluations

    @property
    def config(self) -> Values:
        """The whole configuration, in the sections of a recipe."""
        return self.files.config

    @property
    def last_step(self) -> int | None:
        """The step of the last log line."""
        return self.metrics[-1]["step"] if self.metrics else None

    @property
    def missing(self) -> tuple[str, ...]:
        """Optional pieces that are not there."""
        keys = {key for line in self.metrics for key in line}
        pieces = {
            f"{SUMMARY_NAME} (headline numbers)": self.files.summary.is_there,
            f"{RECIPE_NAME} (configuration)": self.files.recipe.is_there or bool(self.config),
            f"{METRICS_NAME} (curves)": bool(self.metrics),
            "held-out losses along training": "eval_loss" in keys,
            f"{EVALUATIONS} (evaluation on tasks)": bool(self.evaluations),
        }
        if self.masks or self.config.get("sparse_ift"):
            pieces |= {
                "masks (degree maps)": bool(self.masks),
                f"{LAYERS_NAME} (mask evolution by layer)": bool(self.layers),
                f"{SPECTRAL_NAME} (spectral curves)": bool(self.spectral),
            }
        return tuple(piece for piece, is_there in pieces.items() if not is_there)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the folders of runs.

    Raises:
        ValueError: a path is not a folder, one is given twice, there are none, or none of them holds a readable run.
    """
    paths = [user_path(folder) for folder in folders]
    if not paths:
        raise ValueError("give at least one run: an output folder of `sparseift pretrain` or of a Trainer")
    read = [read_folder(path) for path in paths]
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise ValueError(f"{paths[index]} is given twice")
    runs = [_run(files, name) for files, name in zip(read, unique_names(resolved), strict=True)]
    if not any(run.is_readable for run in runs):
        found = " | ".join(f"{run.folder}: {'; '.join(run.reasons)}" for run in runs)
        raise ValueError(
            "no run to report on; a report is about output folders of `sparseift pretrain`, which hold "
            f"{SUMMARY_NAME}, {RECIPE_NAME} or {METRICS_NAME}, or of a Trainer, which hold {TRAINER_STATE_NAME} or "
            f"{LAYERS_NAME}. Found: {found}"
        )
    return runs


def _run(files: RunFolder, name: str) -> Run:
    masks, problems = newest_masks(files.path, files.summary.values, files.kinds)
    return Run(name, files, masks, tuple(problems))
