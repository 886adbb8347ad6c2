"""Runs that end by SIGKILL at the worst moments and go on with plain `resume_from_checkpoint=True`, bit for bit.

The runs themselves are in trainer_script.py.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import tiny_models_of
from tests.helpers.paths import ROOT
from tests.helpers.tiny_runs import differences

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
    ("structure", "name"), [(structure, name) for structure, names in OF_STRUCTURE.items() for name in names]
)


def run_script(*runs: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-W", "error", "-m", "tests.helpers.trainer_script", json.dumps(runs)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


Resumed = Callable[[str], Path]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """By structure, a folder as `killed_and_resumed` leaves it."""

    @functools.cache
    def folder(structure: str) -> Path:
        base = tmp_path_factory.mktemp(structure)
        with tiny_models_of(structure):
            killed_and_resumed(base, OF_STRUCTURE[structure])
        return base

    return folder


def killed_and_resumed(base: Path, names: list[str]) -> None:
    """One folder per case, killed and gone on to its end; `NAME.pt` and `reference.pt` hold final states.

    The case `waiting` is killed but not resumed yet.
    """
    runs = [run_options(base, "reference")]
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


def run_options(base: Path, name: str) -> dict[str, Any]:
    return {"output_dir": str(base / name), "result": str(base / f"{name}.pt")}


@every_case
def test_a_killed_run_ends_as_if_it_had_not_been(structure: str, name: str, resumed: Resumed) -> None:
    expected = torch.load(resumed(structure) / "reference.pt", weights_only=True)
    found = torch.load(resumed(structure) / f"{name}.pt", weights_only=True)
    assert expected.pop("first_step") == 0
    assert found.pop("first_step") == CASES[name][2]
    assert len(expected["log"]) == 12
    assert expected["weights"]["transformer.h.0.mlp.c_fc.weight"].ndim == {"unstructured": 2, "block": 3}[structure]
    assert not differences(expected, found)


@every_case
def test_half_written_checkpoints_are_kept_out_of_the_way(structure: str, name: str, resumed: Resumed) -> None:
    """The last checkpoint is in place, and a folder cut short has been renamed, not deleted and not resumed."""
    _, limit, first_step, left = CASES[name]
    complete = ["checkpoint-12"] if limit == 1 else ["checkpoint-12", "checkpoint-4", "checkpoint-8"]
    cut = "checkpoint-4" if first_step == 8 else "checkpoint-8"
    found = sorted(path.name for path in (resumed(structure) / name).iterdir() if path.is_dir())
    assert found == complete + ([f"incomplete-{cut}"] if cut in left else [])


@pytest.mark.parametrize("structure", OF_STRUCTURE)
def test_resuming_in_another_interpreter(structure: str, resumed: Resumed) -> None:
    """Nothing is shared with the killed process but its files."""
    base = resumed(structure)
    with tiny_models_of(structure):
        done = run_script({**run_options(base, "waiting"), "resume": True})
    assert done.returncode == 0, done.stderr
    expected = torch.load(base / "reference.pt", weights_only=True)
    found = torch.load(base / "waiting.pt", weights_only=True)
    assert (expected.pop("first_step"), found.pop("first_step")) == (0, 4)
    assert not differences(expected, found)
