"""A pretraining run killed with SIGKILL again and again ends with the bits of one that was never killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.paths import ROOT
from tests.helpers.pretrain_runs import ENVIRONMENT, RIGL, curve, read_json, tiny_recipe
from tests.helpers.scripts import load_script
from tests.helpers.tiny_runs import differences


def start(*runs: tuple[list[str], list[Any] | None]) -> tuple[list[int], str]:
    """Run killed_pretrain.py: the step after which each process began, and all that was printed."""
    listed = json.dumps([{"words": words, "kill": kill} for words, kill in runs])
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.killed_pretrain", listed],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    marker = "begins after step "
    begins = [int(line.removeprefix(marker)) for line in done.stdout.splitlines() if line.startswith(marker)]
    return begins, done.stdout + done.stderr


def trained(run: Path) -> dict[str, Any]:
    """Everything that two equal runs share: weights and masks to the byte, optimizer, scheduler, curve, totals."""
    checkpoint = run / "checkpoint-12"
    files = [*run.glob("*.safetensors"), *checkpoint.glob("*.safetensors")]
    summary = read_json(run / "summary.json")
    layers = run / "layers.jsonl"
    return {
        "layers": layers.read_text() if layers.is_file() else None,  # none of a dense run
        "files": {str(path.relative_to(run)): path.read_bytes() for path in files},
        "optimizer": torch.load(checkpoint / "optimizer.pt", weights_only=True),
        "scheduler": torch.load(checkpoint / "scheduler.pt", weights_only=True),
        "curve": curve(run),
        "summary": {
            key: value
            for key, value in summary.items()
            if not key.endswith(("seconds", "per_second", "timed_steps"))
            and key not in ("config", "machine", "command", "commit")
        },
    }


def epochs_of_checkpoints(run: Path) -> dict[int, float]:
    return {line["step"]: line["epoch"] for line in curve(run) if line["step"] in (4, 8)}


def assert_equal_runs(first: Path, second: Path) -> None:
    expected, found = trained(first), trained(second)
    assert "model.safetensors" in expected["files"]
    assert expected["optimizer"]["state"]
    assert any("eval_loss" in line for line in expected["curve"])
    assert {"loss", "grad_norm", "learning_rate"} <= expected["curve"][0].keys()
    assert (expected["layers"] is None) == ("exploration" not in expected["curve"][0])
    assert not differences(expected, found)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """As many threads as the killed processes have: sums of another number of parts differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_a_rigl_run_killed_at_five_points(tmp_path: Path) -> None:
    recipe = str(tiny_recipe(tmp_path, RIGL, num_words=150))
    load_script("recipes/pretrain.py").main([recipe])
    epochs = epochs_of_checkpoints(tmp_path / "run")
    assert 0 < epochs[4] < 1 < epochs[8] < 2  # both within an epoch, not the same one
    again = [recipe, "--output_dir", str(tmp_path / "killed"), "--resume_from_checkpoint", "true"]
    begins, printed = start(
        (again, ["in_micro_batch", 3]),  # before the first checkpoint
        (again, ["in_micro_batch", 12]),  # between checkpoints
        (again, ["in_metrics", 8]),  # while a metrics line is written
        (again, ["in_file", "optimizer.pt"]),  # while a checkpoint is written
        (again, ["in_trainer_state", 12]),  # at its very end
        (again, None),
    )
    assert begins == [0, 0, 4, 4, 4, 8]
    assert printed.count("has no complete checkpoint yet: starting at step 0") == 2
    assert (tmp_path / "killed" / "incomplete-checkpoint-8").is_dir()
    assert (tmp_path / "killed" / "incomplete-checkpoint-12").is_dir()
    assert (tmp_path / "run" / "sparse_masks.safetensors").is_file()
    assert_equal_runs(tmp_path / "run", tmp_path / "killed")

    earlier = tmp_path / "run" / "checkpoint-4"
    for name in ("model.safetensors", "sparse_masks.safetensors"):  # training moved both: equality means something
        assert (earlier / name).read_bytes() != (tmp_path / "run" / name).read_bytes()


@pytest.mark.usefixtures("_one_thread")
def test_a_dense_run_killed_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    recipe = str(tiny_recipe(tmp_path, num_words=130))
    load_script("recipes/pretrain.py").main([recipe])
    assert epochs_of_checkpoints(tmp_path / "run")[4] == 1.0  # just at the end of an epoch
    again = [recipe, "--output_dir", str(tmp_path / "killed"), "--resume_from_checkpoint", "true"]
    begins, _ = start((again, ["in_trainer_state", 8]), (again, None))
    assert begins == [0, 4]
    assert (tmp_path / "killed" / "incomplete-checkpoint-8").is_dir()
    assert_equal_runs(tmp_path / "run", tmp_path / "killed")


@pytest.mark.parametrize("storage", [{}, {"structure": "block", "block_size": 4}], ids=["unstructured", "block"])
def test_a_run_resumed_after_its_last_checkpoint_only_finishes(storage: dict[str, Any], tmp_path: Path) -> None:
    """Killed between the last checkpoint and the summary, as a job that ran out of time may be."""
    pretrain = load_script("recipes/pretrain.py")
    recipe = str(tiny_recipe(tmp_path, {**RIGL, **storage}, max_steps=4))
    pretrain.main([recipe])
    run = tmp_path / "run"
    summary, model = read_json(run / "summary.json"), (run / "model.safetensors").read_bytes()
    lines = {json.dumps(line) for line in curve(run)}
    (run / "summary.json").unlink()
    (run / "model.safetensors").unlink()
    pretrain.main([recipe, "--resume_from_checkpoint", "true"])
    again = read_json(run / "summary.json")
    for key in ("step", "train_tokens", "train_flops", "eval_loss"):
        assert again[key] == summary[key], key
    assert (run / "model.safetensors").read_bytes() == model
    assert any(name.endswith(".columns") for name in load_file(run / "model.safetensors")) == bool(storage)
    assert {json.dumps(line) for line in curve(run)} == lines
    assert again["tokens_per_second"] > 0
