"""Checkpoints in other places than `output_dir/checkpoint-N`, or gone, of other steps, and folders like one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from sparseift_llm import SparseTrainingCallback, load_pretrained
from sparseift_llm.checkpoints.mask_file import MASKS_NAME, read_masks
from sparseift_llm.trainer.log import HISTORY_NAME
from tests.helpers.tiny_runs import (
    Rows,
    differences,
    final_state,
    make_trainer,
    masks,
    sparse_gpt2,
    sparse_trainer,
    violations,
)

pytestmark = [pytest.mark.usefixtures("either_structure"), pytest.mark.structures("unstructured", "block")]
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}


class Elsewhere(Trainer):
    """Puts its checkpoints into a folder of its own."""

    def _get_output_dir(self, trial: Any) -> str:
        return f"{self.args.output_dir}/deep/down"


def resumed(checkpoint: Path, folder: Path) -> dict[str, Any]:
    trainer = sparse_trainer(sparse_gpt2("rigl"), folder, **SAVING)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return final_state(trainer)


def test_checkpoints_elsewhere_are_whole_and_can_be_resumed(tmp_path: Path) -> None:
    plain = sparse_trainer(sparse_gpt2("rigl"), tmp_path / "plain", **SAVING)
    plain.train()
    trainer = sparse_trainer(sparse_gpt2("rigl"), tmp_path / "run", trainer_class=Elsewhere, **SAVING)
    trainer.train()
    checkpoint = tmp_path / "run" / "deep" / "down" / "checkpoint-4"
    usual = {path.name for path in (tmp_path / "plain" / "checkpoint-4").iterdir()}
    assert {path.name for path in checkpoint.iterdir()} == usual
    assert {MASKS_NAME, HISTORY_NAME} <= usual
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["SparseTrainingCallback"]["attributes"]["saved"]
    assert saved["checkpoint"] == str(checkpoint)
    assert not differences(final_state(plain), resumed(checkpoint, tmp_path / "other"))


@pytest.mark.support("hyperparameter search")
@pytest.mark.filterwarnings("ignore")  # of optuna's own
def test_a_search_for_hyperparameters(tmp_path: Path) -> None:
    """Every trial is a sparse run of its own, and its checkpoints, in folders of their own, can be resumed."""
    pytest.importorskip("optuna")
    callback = SparseTrainingCallback()
    trainer = make_trainer(sparse_gpt2("rigl"), tmp_path, **SAVING, eval_strategy="steps", eval_steps=12)
    trainer = Trainer(
        model_init=lambda trial: sparse_gpt2("rigl"),
        args=trainer.args,
        train_dataset=Rows(),
        eval_dataset=Rows(8, seed=8),
        callbacks=[callback],
    )
    best: Any = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
        n_trials=2, backend="optuna",
    )  # fmt: skip
    assert best.objective > 0
    for run in ("run-0", "run-1"):
        checkpoint = tmp_path / run / "checkpoint-4"
        assert {MASKS_NAME, HISTORY_NAME, "trainer_state.json"} <= {path.name for path in checkpoint.iterdir()}
        assert not (checkpoint / "saving.tmp").exists()
        model = load_pretrained(checkpoint)
        assert not differences(masks(model), read_masks(checkpoint))
    assert differences(
        read_masks(tmp_path / "run-0" / "checkpoint-12"), read_masks(tmp_path / "run-0" / "checkpoint-4")
    )
    state = resumed(tmp_path / "run-1" / "checkpoint-4", tmp_path / "again")
    assert state["counters"]["step"] == 12


# ---- the best checkpoint


BEST: dict[str, Any] = {
    "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3,
    "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False,
}  # fmt: skip


class Remove(TrainerCallback):
    """Removes files of the best checkpoint before it is loaded."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(str(state.best_model_checkpoint))
        if state.global_step < 12:
            return
        for name in self.names:
            (folder / name).unlink()
        if not self.names:
            shutil.rmtree(folder)


def test_the_best_checkpoint_is_gone_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a dense run does, the run warns and keeps what it has."""
    model = sparse_gpt2("rigl")
    trainer = make_trainer(model, tmp_path, SparseTrainingCallback(), Remove(), **BEST)
    trainer.train()
    assert "is not there any more: the model of the last step is kept" in caplog.text
    assert not differences(masks(model), read_masks(tmp_path / "checkpoint-12"))
    assert violations(model, trainer.optimizer.optimizer) == []  # type: ignore[arg-type, union-attr]
    trainer.save_model(str(tmp_path / "final"))
    load_pretrained(tmp_path / "final")


def test_only_the_masks_of_the_best_checkpoint_are_gone(tmp_path: Path) -> None:
    """Its weights were loaded, so the run must not end as if all were well."""
    trainer = make_trainer(sparse_gpt2("rigl"), tmp_path, SparseTrainingCallback(), Remove(MASKS_NAME), **BEST)
    with pytest.raises(ValueError, match=rf"{MASKS_NAME} is missing"):
        trainer.train()


# ---- folders that only look like checkpoints


@pytest.mark.parametrize("trains_first", [False, True])
def test_a_model_saved_by_hand_as_a_checkpoint_stays(trains_first: bool, tmp_path: Path) -> None:
    if trains_first:
        sparse_trainer(sparse_gpt2("rigl"), tmp_path, **SAVING).train()
    sparse_gpt2("rigl").save_pretrained(tmp_path / "checkpoint-100")
    before = sorted(path.name for path in tmp_path.iterdir())
    sparse_trainer(sparse_gpt2("rigl"), tmp_path).evaluate()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    load_pretrained(tmp_path / "checkpoint-100")


@pytest.mark.parametrize("trace", ["saving.tmp", "training_args.bin", "optimizer.pt", "rng_state_1.pth"])
def test_what_a_trainer_began_to_write_is_set_aside(trace: str, tmp_path: Path) -> None:
    sparse_gpt2("rigl").save_pretrained(tmp_path / "checkpoint-100")
    (tmp_path / "checkpoint-100" / trace).touch()
    sparse_trainer(sparse_gpt2("rigl"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["incomplete-checkpoint-100"]


def test_an_empty_folder_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-100").mkdir()
    sparse_trainer(sparse_gpt2("rigl"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["incomplete-checkpoint-100"]


def test_saving_by_hand_during_training_is_no_checkpoint(tmp_path: Path) -> None:
    """A folder of another name gets no mark and is not taken for the run's checkpoint."""

    class SaveByHand(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 4:
                model.save_pretrained(tmp_path / "mine")

    trainer = make_trainer(sparse_gpt2("rigl"), tmp_path / "run", SparseTrainingCallback(), SaveByHand(), **SAVING)
    trainer.train()
    assert not (tmp_path / "mine" / "saving.tmp").exists()
    assert (tmp_path / "run" / "checkpoint-4" / HISTORY_NAME).is_file()


def test_a_resume_with_other_updates_names_what_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sparse_trainer(sparse_gpt2("rigl"), tmp_path, **SAVING, steps=4).train()
    sparse_trainer(sparse_gpt2("set", every=3), tmp_path).train(resume_from_checkpoint=True)
    assert "algorithm: 'rigl' -> 'set', update_every_steps: 2 -> 3" in caplog.text
    assert "stop_fraction" not in caplog.text


@pytest.mark.parametrize("changes", [{"tokens_per_step": 64}, {"seq_len": 4}])
def test_a_resume_with_steps_of_another_size_is_refused(changes: dict[str, int], tmp_path: Path) -> None:
    """`train_flops` would count the steps before by the tokens of those after."""
    sizes = {"tokens_per_step": 32, "seq_len": 8}
    make_trainer(sparse_gpt2("rigl"), tmp_path, SparseTrainingCallback(**sizes), steps=4, **SAVING).train()
    callback = SparseTrainingCallback(**{**sizes, **changes})
    with pytest.raises(ValueError, match="the run's FLOPs would be counted wrongly; resume with "):
        make_trainer(sparse_gpt2("rigl"), tmp_path, callback, **SAVING).train(resume_from_checkpoint=True)
    for again in (SparseTrainingCallback(**sizes), SparseTrainingCallback()):
        make_trainer(sparse_gpt2("rigl"), tmp_path, again, **SAVING).train(resume_from_checkpoint=True)
