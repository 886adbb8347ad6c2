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

# with tiles: the columns are in the weights' file, so a kill between it and the masks, and one within the update
OF_STRUCTURE = {"unstructured": [*CASES], "block": ["after_update", "before_masks", "half_state"]}
every_case = pytest.mark.parametrize(
    ("every_structure", "name"),
    [(structure, name) for structure, names in OF_STRUCTURE.items() for name in names],
    indirect=["every_structure"],
)


def run_script(*runs: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-W", "error", "-m", "tests.trainer_script", json.dumps(runs)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def resumed(every_structure: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per case, killed and gone on to its end; `NAME.pt` and `reference.pt` hold final states.

    The case `waiting` is killed but not resumed yet.
    """
    base = tmp_path_factory.mktemp("killed")
    runs = [run_options(base, "reference")]
    names = OF_STRUCTURE[every_structure]
    for name in names:
        kill, limit, _, _ = CASES[name]
        runs.append({**run_options(base, name), "kill": kill, "limit": limit})
        runs.append({**run_options(base, name), "resume": True, "limit": limit})
    runs.append({**run_options(base, "waiting"), "kill": "half_state"})
    done = run_script(*runs)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes.pop(0)[0] == 0, done.stderr
    assert outcomes.pop() == [SIGKILLED, ["checkpoint-4", "checkpoint-8"]], done.stderr
    for name in names:
        *_, left = CASES[name]
        assert outcomes.pop(0) == [SIGKILLED, left], f"{name}: {done.stderr}"
        assert outcomes.pop(0)[0] == 0, f"{name}: {done.stderr}"
    return base


def run_options(base: Path, name: str) -> dict[str, Any]:
    return {"output_dir": str(base / name), "result": str(base / f"{name}.pt")}


@every_case
def test_a_killed_run_ends_as_if_it_had_not_been(name: str, resumed: Path) -> None:
    expected = torch.load(resumed / "reference.pt", weights_only=True)
    found = torch.load(resumed / f"{name}.pt", weights_only=True)
    assert expected.pop("first_step") == 0
    assert found.pop("first_step") == CASES[name][2]
    assert len(expected["log"]) == 12
    assert not differences(expected, found)


@every_case
def test_half_written_checkpoints_are_kept_out_of_the_way(name: str, resumed: Path) -> None:
    """The last checkpoint is in place, and a folder cut short has been renamed, not deleted and not resumed."""
    _, limit, first_step, left = CASES[name]
    complete = ["checkpoint-12"] if limit == 1 else ["checkpoint-12", "checkpoint-4", "checkpoint-8"]
    cut = "checkpoint-4" if first_step == 8 else "checkpoint-8"
    found = sorted(path.name for path in (resumed / name).iterdir())
    assert found == complete + ([f"incomplete-{cut}"] if cut in left else [])


@pytest.mark.parametrize("every_structure", OF_STRUCTURE, indirect=True)
def test_resuming_in_another_interpreter(resumed: Path) -> None:
    """Nothing is shared with the killed process but its files."""
    done = run_script({**run_options(resumed, "waiting"), "resume": True})
    assert done.returncode == 0, done.stderr
    expected = torch.load(resumed / "reference.pt", weights_only=True)
    found = torch.load(resumed / "waiting.pt", weights_only=True)
    assert (expected.pop("first_step"), found.pop("first_step")) == (0, 4)
    assert not differences(expected, found)
