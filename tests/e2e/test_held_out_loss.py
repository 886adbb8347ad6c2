"""The held-out loss of a run is that of all held-out text in nats, whatever its training does to labels and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparseift_llm.runs import pretrain
from tests.helpers.pretrain_runs import curve, read_json, tiny_recipe

STATIC = {"sparsity": 0.75, "dst": {"algorithm": "static"}}


def held_out_losses(folder: Path, **training: Any) -> list[float]:
    """Of a run with constant weights: after two steps, after four, and in its summary."""
    folder.mkdir()
    pretrain.main([str(tiny_recipe(folder, STATIC, max_steps=4, eval_steps=2, learning_rate=0.0, **training))])
    logged = [line["eval_loss"] for line in curve(folder / "run") if "eval_loss" in line]
    return [*logged, read_json(folder / "run" / "summary.json")["eval_loss"]]


@pytest.mark.parametrize(
    "training",
    [
        {"label_smoothing_factor": 0.3},
        {"neftune_noise_alpha": 5.0},
        {"dataloader_drop_last": True, "per_device_eval_batch_size": 5},  # of 8 sequences
        {"dataloader_drop_last": True, "per_device_eval_batch_size": 32},  # which would leave none
    ],
)
def test_what_training_does_is_not_done_to_held_out_text(tmp_path: Path, training: dict[str, Any]) -> None:
    plain = held_out_losses(tmp_path / "plain")
    assert len(plain) == 4
    assert held_out_losses(tmp_path / "other", **training) == pytest.approx(plain, rel=1e-6)


def test_the_model_is_saved_before_its_last_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the evaluation, such as too little memory, leaves a trained model."""

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("sparseift_llm.runs.trainer.Pretrainer.evaluate", fail)
    with pytest.raises(MemoryError):
        pretrain.main([str(tiny_recipe(tmp_path, STATIC, max_steps=4, eval_strategy="no"))])
    assert (tmp_path / "run" / "model.safetensors").is_file()
