"""Stopping and resuming a Trainer run, bit for bit; and checkpoints whose masks are not to be trusted."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from sparseift_llm import SparseTrainingCallback
from sparseift_llm.checkpoints.mask_file import MASKS_NAME, read_masks
from tests.conftest import tiny_models_of
from tests.helpers import tiny_runs
from tests.helpers.tiny_runs import (
    controller_of,
    differences,
    final_state,
    make_trainer,
    masks,
    sparse_gpt2,
    sparse_trainer,
)

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}

pytestmark = [pytest.mark.usefixtures("every_structure"), pytest.mark.structures("unstructured", "block")]


def new_trainer(output_dir: Path | str, algorithm: str = "rigl", seed: int = 0, **options: Any) -> Trainer:
    """A run with dropout, so that random numbers matter; `seed` is that of the model only."""
    return sparse_trainer(sparse_gpt2(algorithm, seed=seed, dropout=0.1), output_dir, **{**SAVING, **options})


@pytest.fixture(scope="module")
def complete(
    every_structure: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Uninterrupted runs by algorithm: their folder, with a checkpoint after every step, and final state."""
    runs: dict[str, tuple[Path, dict[str, Any]]] = {}

    def run(algorithm: str) -> tuple[Path, dict[str, Any]]:
        if algorithm not in runs:
            trainer = new_trainer(tmp_path_factory.mktemp(algorithm), algorithm)
            trainer.train()
            runs[algorithm] = Path(str(trainer.args.output_dir)), final_state(trainer)
        return runs[algorithm]

    return run


Complete = Callable[[str], tuple[Path, dict[str, Any]]]


def test_a_checkpoint_of_weights_alone_is_not_resumed(tmp_path: Path) -> None:
    """The Trainer would begin optimizer and schedule again, and say nothing."""
    new_trainer(tmp_path, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"checkpoint-\d+ holds no optimizer state .*save_only_model=True"):
        new_trainer(tmp_path, save_only_model=True).train(resume_from_checkpoint=True)


def resumable(complete: Complete, folder: Path, step: int = 4, algorithm: str = "rigl") -> Path:
    """A copy of the run's checkpoint at `step` in `folder`, as if the run had stopped there."""
    checkpoint = folder / f"checkpoint-{step}"
    shutil.copytree(complete(algorithm)[0] / checkpoint.name, checkpoint)
    return checkpoint


# ---- bit for bit


@pytest.mark.support("resuming bit for bit in one process")
@pytest.mark.structures(*tiny_runs.STRUCTURES)
@pytest.mark.parametrize("step", [1, 4, 7])  # before any update, right after one, before the next
@pytest.mark.parametrize("algorithm", ["static", "set", "rigl", "gmp", "granet"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    algorithm: str, step: int, complete: Complete, tmp_path: Path
) -> None:
    expected = complete(algorithm)[1]
    resumable(complete, tmp_path, step, algorithm)
    trainer = new_trainer(tmp_path, algorithm)
    trainer.train(resume_from_checkpoint=True)
    assert not differences(expected, final_state(trainer))
    assert expected["counters"]["step"] == 12


def test_the_model_that_resumes_may_start_from_anything(complete: Complete, tmp_path: Path) -> None:
    """All of it comes from the checkpoint: weights and masks of the new process do not matter."""
    resumable(complete, tmp_path)
    trainer = new_trainer(tmp_path, seed=3)
    assert trainer.model is not None
    trainer.model.config.sparse_ift["transformation"]["seed"] = 0
    trainer.train(resume_from_checkpoint=True)
    assert not differences(complete("rigl")[1], final_state(trainer))


@pytest.mark.parametrize("algorithm", ["rigl", "static"])
def test_a_run_that_goes_on_with_other_updates_says_so(
    complete: Complete, algorithm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumable(complete, tmp_path)
    new_trainer(tmp_path, algorithm).train(resume_from_checkpoint=True)
    assert ("goes on with these: algorithm: 'rigl' -> 'static'\n" in caplog.text) == (algorithm == "static")


def test_runs_differ_where_they_should(complete: Complete, tmp_path: Path) -> None:
    """Fewer steps, or resuming without the right masks, is noticed by the comparison."""
    checkpoint = resumable(complete, tmp_path, 8)
    assert differences(complete("rigl")[1]["masks"], read_masks(resumable(complete, tmp_path, 4)))
    options = {**SAVING, "save_strategy": "no"}
    trainer = make_trainer(sparse_gpt2("rigl", dropout=0.1), tmp_path / "without", **options)  # no callback
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.model is not None
    # tiles cannot be told apart from the weights that they hold, so they come with them
    assert bool(differences(read_masks(checkpoint), masks(trainer.model))) == (tiny_runs.STRUCTURE == "unstructured")


@pytest.mark.parametrize("is_attached", [False, True])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_a_checkpoint_of_another_sparsity_is_refused(
    sparsity: float, is_attached: bool, complete: Complete, tmp_path: Path
) -> None:
    """Before the Trainer loads its weights, of which torch would say that they have other sizes."""
    checkpoint = resumable(complete, tmp_path)
    model = sparse_gpt2("rigl", sparsity=sparsity)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if is_attached:
        trainer = make_trainer(model, tmp_path, **SAVING)
        SparseTrainingCallback().attach(trainer)
    else:
        trainer = sparse_trainer(model, tmp_path, **SAVING)
    with pytest.raises(ValueError, match="is a checkpoint of another sparsity") as caught:
        trainer.train(resume_from_checkpoint=True if is_attached else str(checkpoint))
    assert f"{checkpoint} is a checkpoint of another sparsity: sparsity is 0.75 there, and {sparsity} here; " in str(
        caught.value
    )
    assert not differences(before, model.state_dict())


def test_another_sparsity_in_matrices_of_the_same_sizes_is_refused(complete: Complete, tmp_path: Path) -> None:
    """Weights and masks would fit, but have another number of active weights than the record says."""
    resumable(complete, tmp_path)
    model = sparse_gpt2("rigl")
    for layer in model.config.sparse_ift["layers"]:
        for matrix in layer["matrices"]:
            matrix["num_active"] -= 16
            matrix.pop("row_groups", None)
    with pytest.raises(ValueError, match=r"another sparsity: its projections have .* other numbers of active weights"):
        sparse_trainer(model, tmp_path, **SAVING).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_the_dense_model_is_refused(tmp_path: Path) -> None:
    sparse = sparse_gpt2("rigl")
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2)).double()
    make_trainer(dense, tmp_path, steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="another sparsity: its model is dense, and this one sparse; resume with"):
        sparse_trainer(sparse, tmp_path).train(resume_from_checkpoint=True)


def test_a_model_that_was_given_to_a_trainer_loads_other_states_as_ever(tmp_path: Path) -> None:
    """The hook is for Trainers, and goes with a copy or a pickle of the model."""
    model = sparse_gpt2("rigl")
    sparse_trainer(model, tmp_path)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.load_state_dict(model.state_dict())
        sparse_trainer(copied, tmp_path)
        assert len(copied._load_state_dict_pre_hooks) == len(model._load_state_dict_pre_hooks) == 1


def test_restoring_callback_states(complete: Complete, tmp_path: Path) -> None:
    resumable(complete, tmp_path)
    trainer = new_trainer(tmp_path, restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=True)
    assert not differences(complete("rigl")[1], final_state(trainer))


def test_checkpoints_after_restoring_callback_states_know_where_they_are(complete: Complete, tmp_path: Path) -> None:
    """They can be resumed by path from another output folder like any other checkpoint."""
    resumable(complete, tmp_path / "first")
    trainer = new_trainer(tmp_path / "first", restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=True)
    again = new_trainer(tmp_path / "second")
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-8"))
    assert not differences(complete("rigl")[1], final_state(again))


# ---- where the checkpoint lies


def test_a_checkpoint_named_by_its_path(complete: Complete, tmp_path: Path) -> None:
    folder, expected = complete("rigl")
    trainer = new_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert not differences(expected, final_state(trainer))


def test_a_checkpoint_moved_elsewhere(complete: Complete, tmp_path: Path) -> None:
    """Its old folder is gone; a checkpoint of the same step in the output folder is another run's."""
    other = new_trainer(tmp_path / "out", seed=1, max_steps=4)
    other.train()
    moved = first_home_gone(resumable(complete, tmp_path / "moved"))
    trainer = new_trainer(tmp_path / "out", resume_from_checkpoint=str(moved))
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    assert not differences(complete("rigl")[1], final_state(trainer))


def test_a_moved_checkpoint_without_a_hint_is_refused(complete: Complete, tmp_path: Path) -> None:
    """Never the masks of the same-numbered checkpoint in the output folder."""
    other = new_trainer(tmp_path / "out", seed=1, max_steps=4)
    other.train()
    moved = first_home_gone(resumable(complete, tmp_path / "moved"))
    trainer = new_trainer(tmp_path / "out")
    with pytest.raises(ValueError, match=r"not found.*TrainingArguments\.resume_from_checkpoint"):
        trainer.train(resume_from_checkpoint=str(moved))


def first_home_gone(checkpoint: Path) -> Path:
    """Let the checkpoint's own record of its place point nowhere, as after moving it."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    saved = state["stateful_callbacks"]["SparseTrainingCallback"]["attributes"]["saved"]
    saved["checkpoint"] = "/nowhere/checkpoint-4"
    path.write_text(json.dumps(state))
    return checkpoint


# ---- damaged checkpoints


def missing(file: Path, complete: Complete) -> None:
    file.unlink()


def truncated(file: Path, complete: Complete) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path, complete: Complete) -> None:
    file.write_bytes(b"")


def bit_flipped(file: Path, complete: Complete) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def of_another_step(file: Path, complete: Complete) -> None:
    shutil.copy(complete("rigl")[0] / "checkpoint-2" / MASKS_NAME, file)


def of_another_width(file: Path, complete: Complete) -> None:
    sparse_gpt2(hidden=24).save_pretrained(file.parent / "other")
    shutil.copy(file.parent / "other" / MASKS_NAME, file)


def of_another_seed(file: Path, complete: Complete) -> None:
    sparse_gpt2(seed=1).save_pretrained(file.parent / "other")
    shutil.copy(file.parent / "other" / MASKS_NAME, file)


def of_another_config(file: Path, complete: Complete) -> None:
    """Of a model of another family or storage, or of another sparsity."""
    other = "families" if tiny_runs.STRUCTURE in ("unstructured", "block") else "unstructured"
    with tiny_models_of(other):
        sparse_gpt2(sparsity=0.5).save_pretrained(file.parent / "other")
    shutil.copy(file.parent / "other" / MASKS_NAME, file)


@pytest.mark.support("damaged mask files", refused=True)
@pytest.mark.structures(*tiny_runs.STRUCTURES)
@pytest.mark.parametrize(
    "damage",
    [
        missing, truncated, empty, bit_flipped,
        of_another_step, of_another_width, of_another_seed, of_another_config,
    ],
)  # fmt: skip
def test_damaged_masks_are_refused(
    damage: Callable[[Path, Complete], None], complete: Complete, tmp_path: Path
) -> None:
    checkpoint = resumable(complete, tmp_path)
    damage(checkpoint / MASKS_NAME, complete)
    trainer = new_trainer(tmp_path)
    with pytest.raises(ValueError, match=rf"masks.*{checkpoint}|{checkpoint}.*masks"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4  # not a step further


def test_a_flipped_bit_anywhere_in_a_mask_file_is_noticed(complete: Complete, tmp_path: Path) -> None:
    """One flipped bit in every third byte: either an error, or (in free-form header text) the same masks."""
    original = (complete("rigl")[0] / "checkpoint-4" / MASKS_NAME).read_bytes()
    expected = read_masks(complete("rigl")[0] / "checkpoint-4")
    file = tmp_path / MASKS_NAME
    messages = []
    for position, bit in zip(range(0, len(original), 3), itertools.cycle((1, 64, 8, 2, 128, 32, 4, 16)), strict=False):
        data = bytearray(original)
        data[position] ^= bit
        file.write_bytes(bytes(data))
        try:
            found = read_masks(tmp_path)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert not differences(expected, found)
    assert len(messages) > 0.9 * len(original) / 3
    assert all(str(file) in message for message in messages)


def test_a_checkpoint_of_a_run_without_the_callback_is_refused(tmp_path: Path) -> None:
    make_trainer(sparse_gpt2("rigl"), tmp_path, steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match=r"step 2 was not written with SparseTrainingCallback.*new run"):
        sparse_trainer(sparse_gpt2("rigl"), tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("cut", ["missing", "empty", "half"])
def test_half_written_checkpoints_are_set_aside(cut: str, complete: Complete, tmp_path: Path) -> None:
    resumable(complete, tmp_path, 4)
    state = resumable(complete, tmp_path, 5) / "trainer_state.json"
    content = state.read_text()
    state.unlink()
    if cut != "missing":
        state.write_text(content[: len(content) // 2] if cut == "half" else "")
    trainer = new_trainer(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "incomplete-checkpoint-5"]
    trainer.train(resume_from_checkpoint=True)
    assert not differences(complete("rigl")[1], final_state(trainer))
    assert (tmp_path / "incomplete-checkpoint-5").is_dir()  # nothing is deleted


def test_only_numbered_checkpoints_are_set_aside(complete: Complete, tmp_path: Path) -> None:
    """A folder that the user keeps beside them is none of the callback's business."""
    resumable(complete, tmp_path)
    for name in ("checkpoint-final", "checkpoint-4-backup", "other"):
        (tmp_path / name).mkdir()
    new_trainer(tmp_path)
    names = ["checkpoint-4", "checkpoint-4-backup", "checkpoint-final", "other"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_the_callback_is_found_under_a_name_of_its_own(complete: Complete) -> None:
    """What `trainer_state.json` holds is plain JSON: counters, a digest, a path."""
    folder = complete("rigl")[0]
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"][SparseTrainingCallback.__name__]["attributes"]["saved"]
    assert saved["step"] == 4
    assert saved["num_dense_gradient_steps"] == 2
    assert saved["checkpoint"] == str(folder / "checkpoint-4")
    assert len(saved["masks_digest"]) == 64


def test_counters_go_on(complete: Complete, tmp_path: Path) -> None:
    resumable(complete, tmp_path, 7)
    trainer = new_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    counters = controller_of(trainer).counters()
    assert counters == complete("rigl")[1]["counters"]
    assert counters["num_dense_gradient_steps"] == 4
