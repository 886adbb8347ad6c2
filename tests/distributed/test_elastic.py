"""Runs on two ranks that are killed, or go on with one, two or four ranks. The runs are in elastic_script.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseift_llm.checkpoints.mask_file import read_masks
from sparseift_llm.checkpoints.trainer_folder import is_complete
from tests.distributed.torchrun import run_ranks, start_ranks
from tests.helpers.tiny_runs import differences, final_state, sparse_gpt2, sparse_trainer

SCRIPT = "tests.distributed.elastic_script"
pytestmark = [pytest.mark.usefixtures("every_structure"), pytest.mark.structures("unstructured", "block", "families")]
Whole = tuple[Path, list[dict[str, Any]]]


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, num_ranks: int, **options: Any) -> list[dict[str, Any]]:
    monkeypatch.setenv("SPARSEIFT_TEST_RUN", json.dumps(options))
    folder.mkdir(exist_ok=True)
    return run_ranks(SCRIPT, ("trainer",), folder, num_ranks)["trainer"]


@pytest.fixture(scope="module")
def uninterrupted(every_structure: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    """Runs on two ranks with and without dropout: their folders, and what both ranks ended with."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    names = ("whole", "without_dropout")
    return {name: (folder / name, ranks) for name, ranks in run_ranks(SCRIPT, names, folder).items()}


@pytest.fixture(scope="module")
def whole(uninterrupted: dict[str, Whole]) -> Whole:
    return uninterrupted["whole"]


@pytest.fixture(scope="module")
def without_dropout(uninterrupted: dict[str, Whole]) -> Whole:
    return uninterrupted["without_dropout"]


def check_trajectory(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """The same masks to the bit, the same losses and weights to rounding."""
    assert not differences(expected["masks"], found["masks"])
    assert expected["counters"] == found["counters"]
    for entry, other in zip(expected["log"], found["log"], strict=True):
        assert other["step"] == entry["step"]
        assert other["loss"] == pytest.approx(entry["loss"], rel=1e-4)  # the Trainer rounds what it logs
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.support("two ranks' checkpoint on one and four ranks")
def test_two_ranks_checkpoint_on_four_ranks(
    without_dropout: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(without_dropout[0] / "out" / "checkpoint-4", tmp_path / "run" / "out" / "checkpoint-4")
    for rank in run(monkeypatch, tmp_path / "run", 4, resume=True):
        check_trajectory(without_dropout[1][0], rank)


@pytest.mark.support("two ranks' checkpoint on one and four ranks")
def test_two_ranks_checkpoint_on_one(without_dropout: Whole, tmp_path: Path) -> None:
    shutil.copytree(without_dropout[0] / "out" / "checkpoint-4", tmp_path / "checkpoint-4")
    trainer = sparse_trainer(sparse_gpt2("rigl"), tmp_path)
    trainer.train(resume_from_checkpoint=True)
    check_trajectory(without_dropout[1][0], final_state(trainer))


def test_a_trajectory_of_another_optimizer_state_is_noticed(without_dropout: Whole, tmp_path: Path) -> None:
    """So that equality above means something: momentum of step 8 under the step counts of step 4."""
    checkpoints = without_dropout[0] / "out"
    shutil.copytree(checkpoints / "checkpoint-4", tmp_path / "checkpoint-4")
    state, later = (torch.load(checkpoints / f"checkpoint-{step}" / "optimizer.pt") for step in (4, 8))
    for index, values in state["state"].items():
        values["exp_avg"] = later["state"][index]["exp_avg"]
    torch.save(state, tmp_path / "checkpoint-4" / "optimizer.pt")
    trainer = sparse_trainer(sparse_gpt2("rigl"), tmp_path)
    trainer.train(resume_from_checkpoint=True)
    with pytest.raises(AssertionError):
        check_trajectory(without_dropout[1][0], final_state(trainer))


def test_an_optimizer_of_a_later_checkpoint_is_refused(without_dropout: Whole, tmp_path: Path) -> None:
    shutil.copytree(without_dropout[0] / "out" / "checkpoint-4", tmp_path / "checkpoint-4")
    shutil.copy(without_dropout[0] / "out" / "checkpoint-8" / "optimizer.pt", tmp_path / "checkpoint-4")
    trainer = sparse_trainer(sparse_gpt2("rigl"), tmp_path)
    with pytest.raises(ValueError, match="has taken 8 steps, but the controller has counted 4"):
        trainer.train(resume_from_checkpoint=True)


KILLED = {
    "unstructured": ("update", []),
    "block": ("random_state", ["incomplete-checkpoint-8"]),
    "families": ("random_state", ["incomplete-checkpoint-8"]),
}  # either way: what differs between structures is within one process, and test_callback_kill.py has it


@pytest.mark.support("SIGKILL of a rank, then resuming")
def test_a_killed_rank_ends_the_job_and_the_run_goes_on(
    every_structure: str, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank does not hang; the resumed run ends with the bits of one that was never killed."""
    where, aside = KILLED[every_structure]
    monkeypatch.setenv("SPARSEIFT_TEST_RUN", json.dumps({"kill": where, "dropout": 0.1}))
    done = start_ranks(SCRIPT, "trainer", tmp_path)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL) received" in done.stdout
    assert is_complete(tmp_path / "out" / "checkpoint-4")
    read_masks(tmp_path / "out" / "checkpoint-4")
    resumed = run(monkeypatch, tmp_path, 2, dropout=0.1, resume=True)
    for rank, expected in zip(resumed, whole[1], strict=True):
        assert not differences(expected, rank)
    found = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert found == ["checkpoint-12", "checkpoint-4", "checkpoint-8", *aside]


def test_every_ranks_random_state_belongs_to_a_complete_checkpoint(whole: Whole, tmp_path: Path) -> None:
    source = whole[0] / "out" / "checkpoint-8"
    assert is_complete(source)
    for name in ("rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"):
        for cut in (None, 0.0, 0.5):
            folder = tmp_path / f"{name}-{cut}"
            shutil.copytree(source, folder)
            content = (folder / name).read_bytes()
            (folder / name).unlink()
            if cut is not None:
                (folder / name).write_bytes(content[: int(len(content) * cut)])
            assert not is_complete(folder)


@pytest.mark.support("checkpoints pieced together from two steps", refused=True)
@pytest.mark.parametrize("weights_step", [4, 8])
def test_a_checkpoint_pieced_together_is_refused(weights_step: int, whole: Whole, tmp_path: Path) -> None:
    """Weights of one step, masks and the rest of another."""
    other = 12 - weights_step
    shutil.copytree(whole[0] / "out" / f"checkpoint-{other}", tmp_path / f"checkpoint-{other}")
    weights = whole[0] / "out" / f"checkpoint-{weights_step}" / "model.safetensors"
    shutil.copy(weights, tmp_path / f"checkpoint-{other}" / "model.safetensors")
    trainer = sparse_trainer(sparse_gpt2("rigl"), tmp_path)
    with pytest.raises(ValueError, match=r"not those of its weights, first in .*pieced together from two checkpoints"):
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{other}"))
    assert trainer.state.global_step == other
