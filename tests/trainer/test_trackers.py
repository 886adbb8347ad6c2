"""Trackers beside TensorBoard get the metrics, too: the real packages, offline. The extra `dev` has both."""

from __future__ import annotations

import json
import sqlite3
import struct
import time
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
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    kept = run(tmp_path / "run", "wandb")
    wandb.finish()
    (written,) = tmp_path.rglob("offline-run-*/run-*.wandb")
    end = time.monotonic() + 60  # its process may write the last block of the file after `finish` has returned
    while len(rows := [row for row in histories(written) if "train/loss" in row]) < STEPS and time.monotonic() < end:
        time.sleep(0.1)
    check_rows(rows, kept)


def histories(path: Path) -> list[dict[str, Any]]:
    """The logged rows in a file that wandb keeps offline.

    After seven bytes that name the format, the file is a log of LevelDB: blocks of 32,768 bytes, and in them parts of
    records behind a checksum (4 bytes), a length (2) and a kind (1: whole, 2: first part, 3: middle, 4: last part).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32_768 - place % 32_768 < 7:  # too short for a part: filled with zeros
            place += 32_768 - place % 32_768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = Record.FromString(parts)
            parts = b""
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def check_rows(rows: list[dict[str, Any]], kept: list[dict[str, Any]]) -> None:
    """Every line of the Trainer's own log is there, with its values."""
    assert len(rows) == len(kept) == STEPS
    assert set(rows[-1]) >= EXPECTED
    for row, entry in zip(rows, kept, strict=True):
        for key in ("exploration", "loss", "grad_norm_active"):
            assert row[f"train/{key}"] == pytest.approx(entry[key])


@pytest.mark.structures("unstructured")
@pytest.mark.usefixtures("either_structure")
@pytest.mark.filterwarnings("ignore")  # of trackio's own
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    kept = run(tmp_path / "run", "trackio")
    (path,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as connection:
        rows = [json.loads(row) for (row,) in connection.execute("SELECT metrics FROM metrics ORDER BY step")]
    check_rows([row for row in rows if "train/loss" in row], kept)
