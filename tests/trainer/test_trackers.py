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
EXPECTED = {"train/loss", "train/sparsity", "train/exploration", "train/mask_churn", "train/sparsity/qkv"}


def run(folder: Path, tracker: str) -> list[dict[str, Any]]:
    """Train with a tracker; what the Trainer itself keeps of its log, for comparison."""
    trainer = make_trainer(sparse_gpt2("rigl"), folder, SparseTrainingCallback(), report_to=tracker, run_name="tiny")
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def check(rows: list[dict[str, Any]], kept: list[dict[str, Any]]) -> None:
    """The tracker has the metrics of every step, as the Trainer has them."""
    rows = [row for row in rows if "train/loss" in row]
    assert len(rows) == len(kept) == STEPS
    assert set(rows[-1]) >= EXPECTED
    for row, entry in zip(rows, kept, strict=True):
        assert row["train/exploration"] == pytest.approx(entry["exploration"])
        assert row["train/loss"] == pytest.approx(entry["loss"])


@pytest.mark.structures("unstructured")
@pytest.mark.usefixtures("either_structure")
@pytest.mark.filterwarnings("ignore")  # of wandb's own
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    kept = run(tmp_path / "run", "wandb")
    wandb.finish()
    (path,) = tmp_path.rglob("offline-run-*/run-*.wandb")
    store, rows = DataStore(), []
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    check(rows, kept)


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
    check(rows, kept)
