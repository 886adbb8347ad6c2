"""Runs that end by SIGKILL at the worst moments and go on with plain `resume_from_checkpoint=True`, bit for bit.

The runs themselves are in trainer_script.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_runs import differences

ROOT = Path(__file__).parent.parent
SIGKILLED = -signal.SIGKILL

# what kills the run, the limit on checkpoints, the step it must go on from, what it leaves behind
CASES = {
    "between": ("between", 0, 4, ["checkpoint-4"]),
    "after_update": ("after_update", 0, 4, ["checkpoint-4"]),
    "before_masks": ("before_masks", 0, 4, ["checkpoint-4", "checkpoint-8"]),
    "in_optimizer": ("in_optimizer", 0, 4, ["checkpoint-4", "checkpoint-8"]),
    "before_state": ("before_state", 0, 4, ["checkpoint-4", "checkpoint-8"]),
    "empty_state": ("empty_state", 0, 4, ["checkpoint-4", "checkpoint-8"]),
    "half_state": ("half_state", 0, 4, ["checkpoint-4", "checkpoint-8"]),
    "between_limit_1": ("between", 1, 4, ["checkpoint-4"]),
    "half_state_limit_1": ("half_state", 1, 4, ["checkpoint-4", "checkpoint-8"]),
    "in_rotation_limit_1": ("in_rotation", 1, 8, ["checkpoint-4", "checkpoint-8"]),
}


def run_script(*runs: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-W", "error", "-m", "tests.trainer_script", json.dumps(runs)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def folders(path: Path) -> list[str]:
    return sorted(folder.name for folder in path.iterdir() if folder.is_dir())


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per case, each holding what a killed run left; and `reference.pt`, an uninterrupted run's state."""
    base = tmp_path_factory.mktemp("killed")
    runs: list[dict[str, Any]] = [{"output_dir": str(base / "reference"), "result": str(base / "reference.pt")}]
    for name, (kill, limit, _, _) in CASES.items():
        runs.append({"output_dir": str(base / name), "result": str(base / f"{name}.pt"), "kill": kill, "limit": limit})
    done = run_script(*runs)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0] + [SIGKILLED] * len(CASES), done.stderr
    return base


@pytest.fixture(scope="module")
def resumed(killed: Path) -> Path:
    """The same folder after every killed run has gone on to its end."""
    for name, (*_, left) in CASES.items():
        assert folders(killed / name) == left, name
        assert not (killed / f"{name}.pt").exists()
    runs = [
        {"output_dir": str(killed / name), "result": str(killed / f"{name}.pt"), "resume": True, "limit": limit}
        for name, (_, limit, _, _) in CASES.items()
    ]
    done = run_script(*runs)
    assert json.loads(done.stdout.splitlines()[-1]) == [0] * len(CASES), done.stderr
    return killed


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_ends_as_if_it_had_not_been(name: str, resumed: Path) -> None:
    expected = torch.load(resumed / "reference.pt", weights_only=True)
    found = torch.load(resumed / f"{name}.pt", weights_only=True)
    assert expected.pop("first_step") == 0
    assert found.pop("first_step") == CASES[name][2]
    assert len(expected["log"]) == 12
    assert not differences(expected, found)


@pytest.mark.parametrize("name", CASES)
def test_half_written_checkpoints_are_kept_out_of_the_way(name: str, resumed: Path) -> None:
    """The last checkpoint is in place, and a folder cut short has been renamed, not deleted and not resumed."""
    _, limit, first_step, left = CASES[name]
    complete = ["checkpoint-12"] if limit == 1 else ["checkpoint-12", "checkpoint-4", "checkpoint-8"]
    cut = "checkpoint-4" if first_step == 8 else "checkpoint-8"
    assert folders(resumed / name) == complete + ([f"incomplete-{cut}"] if cut in left else [])


@pytest.mark.parametrize("algorithm", ["gmp"])
def test_killed_and_resumed_in_interpreters_of_their_own(algorithm: str, tmp_path: Path) -> None:
    """Nothing is shared with the killed process but its files."""
    run = {"output_dir": str(tmp_path / "run"), "result": str(tmp_path / "run.pt"), "algorithm": algorithm}
    assert run_script({**run, "kill": "half_state"}).returncode == SIGKILLED
    done = run_script({**run, "resume": True})
    assert done.returncode == 0, done.stderr
    reference = {**run, "output_dir": str(tmp_path / "reference"), "result": str(tmp_path / "reference.pt")}
    assert run_script(reference).returncode == 0
    expected = torch.load(tmp_path / "reference.pt", weights_only=True)
    found = torch.load(tmp_path / "run.pt", weights_only=True)
    assert (expected.pop("first_step"), found.pop("first_step")) == (0, 4)
    assert not differences(expected, found)
