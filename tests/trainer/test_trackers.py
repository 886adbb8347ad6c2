"""Trackers beside TensorBoard get the metrics, too: the real packages, offline. Skipped where they are not installed.

They bring 100 MB and 170 MB, so no extra of this package has them. To run these tests:

    pip install --target /tmp/trackers wandb trackio
    PYTHONPATH=/tmp/trackers python -m pytest tests/trainer/test_trackers.py
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from sparseift_llm import SparseTrainingCallback
from tests.helpers.tiny_runs import make_trainer, sparse_gpt2

STEPS = 12
EXPECTED = {f"train/{key}" for key in ("loss", "exploration", "mask_churn", "mask_survival", "grad_norm_active")}


def run(folder: Path, tracker: str) -> list[dict[str, Any]]:
    """Train with a tracker; what the Trainer itself keeps of its log, for comparison."""
    trainer = make_trainer(sparse_gpt2("rigl"), folder, SparseTrainingCallback(), report_to=tracker, run_name="tiny")
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.structures("unstructured")
@pytest.mark.usefixtures("either_structure")
@pytest.mark.filterwarnings("ignore")  # of wandb's own
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    kept = run(tmp_path / "run", "wandb")
    summary = dict(wandb.run.summary)  # the last value of each key; wandb cannot read histories offline
    wandb.finish()
    assert set(summary) >= EXPECTED
    for key in ("exploration", "loss", "mask_survival", "mask_churn"):
        assert summary[f"train/{key}"] == pytest.approx(kept[-1][key])
    (written,) = tmp_path.rglob("offline-run-*/run-*.wandb")
    assert b"train/mask_survival" in written.read_bytes()


@pytest.mark.structures("unstructured")
@pytest.mark.usefixtures("either_structure")
@pytest.mark.filterwarnings("ignore")  # of trackio's own
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    kept = run(tmp_path / "run", "trackio")
    (path,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as connection:
        rows = [json.loads(row) for (row,) in connection.execute("SELECT metrics FROM metrics ORDER BY step")]
    rows = [row for row in rows if "train/loss" in row]
    assert len(rows) == len(kept) == STEPS
    assert set(rows[-1]) >= EXPECTED
    for row, entry in zip(rows, kept, strict=True):
        for key in ("exploration", "loss", "grad_norm_active"):
            assert row[f"train/{key}"] == pytest.approx(entry[key])
