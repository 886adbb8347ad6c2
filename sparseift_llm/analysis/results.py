"""What an analysis finds: the checkpoints of each run with their quantities, and the correlations across runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseift_llm.analysis.correlation import Correlation

ANALYSIS_FORMAT = "sparseift_analysis_v1"
ANALYSIS_BEGINNING = rf'\{{\s*"format": "{ANALYSIS_FORMAT}"'  # a pattern, see refuse_foreign
ANALYSIS_NAME = "analysis.json"
TABLE_NAME = "analysis.csv"
LOSS = "eval_loss"


@dataclass(frozen=True)
class RunAnalysis:
    """What the analysis of one run has found.

    Args:
        run: the folder of the run.
        checkpoints: the entries of its `spectral.json`, by ascending step.
        excluded: the folders that were left out, each with the reason.
        eval_loss: held-out loss of the finished run at the step of the last entry, None if it is not known.
        no_loss: why that loss is not known, None if it is.
        summary: the contents of `summary.json`, None where the loss is not known.
    """

    run: Path
    checkpoints: tuple[dict[str, Any], ...]
    excluded: dict[str, str]
    eval_loss: float | None
    no_loss: str | None
    summary: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """What `analysis.json` holds of this run. The layers are left out, because `spectral.json` has them."""
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


def labels(runs: Sequence[RunAnalysis]) -> list[str]:
    """Folder names of the runs, or their paths where names are not unique."""
    names = [run.run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.run) for run in runs]
