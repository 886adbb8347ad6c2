"""`SparseTrainingCallback` in a plain Trainer: same masks as a plain loop, whatever else the Trainer does."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainerState

from sparseift_llm import SparseTrainingCallback, SparseTrainingController, load_pretrained
from sparseift_llm.checkpoints.mask_file import read_masks
from sparseift_llm.layers.base import sparse_layers
from tests.helpers.tiny_runs import (
    STRUCTURES,
    Rows,
    controller_of,
    differences,
    final_state,
    make_trainer,
    masks,
    sparse_gpt2,
    sparse_trainer,
    train,
    violations,
)

pytestmark = [pytest.mark.usefixtures("every_structure"), pytest.mark.structures("unstructured", "block")]


class Watch(TrainerCallback):
    """After each step: the masks, and whatever breaks the invariants."""

    def __init__(self) -> None:
        self.masks: list[dict[str, torch.Tensor]] = []
        self.violations: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.masks.append(masks(kwargs["model"]))
        self.violations += violations(kwargs["model"], getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]))


def mask_history(output_dir: Path, algorithm: str = "rigl", **options: Any) -> list[dict[str, torch.Tensor]]:
    watch = Watch()
    trainer = make_trainer(sparse_gpt2(algorithm), output_dir, SparseTrainingCallback(), watch, **options)
    trainer.train()
    assert watch.violations == []
    assert controller_of(trainer).step == 12
    return watch.masks


def changes(history: list[dict[str, torch.Tensor]]) -> list[int]:
    """Steps (from 2 on) after which masks differ from those one step before."""
    return [step for step in range(2, len(history) + 1) if differences(history[step - 2], history[step - 1])]


@pytest.mark.parametrize(
    ("algorithm", "steps"),
    [("static", []), ("set", [2, 4, 6, 8]), ("gmp", [2, 4, 6, 8, 9])],  # set ends before 9, which is 0.75 of 12
)
def test_masks_are_updated_on_schedule(algorithm: str, steps: list[int], tmp_path: Path) -> None:
    assert changes(mask_history(tmp_path, algorithm)) == steps


def test_accumulation_does_not_change_masks(tmp_path: Path) -> None:
    whole = mask_history(tmp_path)
    assert changes(whole)
    for size in (1, 2):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        assert not differences(whole, mask_history(tmp_path, **split))


def test_a_plain_loop_gives_the_same_masks(tmp_path: Path) -> None:
    """The callback adds nothing to what the controller does in a hand-written loop."""
    fixed = {"lr_scheduler_type": "constant", "max_grad_norm": 0, "optim": "adamw_torch"}
    by_trainer = mask_history(tmp_path, train_sampling_strategy="sequential", **fixed)
    model = sparse_gpt2("rigl")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    SparseTrainingController(model, optimizer, total_steps=12)
    history: list[dict[str, torch.Tensor]] = []
    data = (batch for _ in range(3) for batch in Rows().rows.split(4))
    train(
        model,
        optimizer,
        (batch for batch, _ in zip(data, range(12), strict=False)),
        1,
        lambda: history.append(masks(model)),
    )
    assert not differences(by_trainer, history)


def test_evaluation_and_saving_do_not_change_a_run(tmp_path: Path) -> None:
    def run(**options: Any) -> dict[str, Any]:
        trainer = sparse_trainer(sparse_gpt2("rigl"), tmp_path, **options)
        trainer.train()
        return final_state(trainer)

    assert not differences(run(), run(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1))


def test_counters_in_a_run(tmp_path: Path) -> None:
    model = sparse_gpt2("rigl")
    trainer = sparse_trainer(model, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    trainer.train()
    active = sum(layer.count_active() for layer in sparse_layers(model).values())
    # updates at 2, 4, 6, 8, before the stop at 9; accumulation steps do not count
    assert controller_of(trainer).counters() == {
        "step": 12,
        "active_weight_steps": 12 * active,
        "num_dense_gradient_steps": 4,
    }


def test_best_model_comes_with_its_masks(tmp_path: Path) -> None:
    model = sparse_gpt2("rigl")
    trainer = sparse_trainer(
        model,
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,  # random data: other data gets worse, so the best is not the last
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith("checkpoint-12")
    assert differences(read_masks(best), read_masks(tmp_path / "checkpoint-12"))
    assert not differences(read_masks(best), masks(model))
    stored = load_pretrained(best, dtype="auto")
    assert not differences(dict(stored.named_parameters()), dict(model.named_parameters()))
    trainer.save_model(str(tmp_path / "final"))
    assert not differences(read_masks(tmp_path / "final"), read_masks(best))


def test_training_twice_starts_a_new_count(tmp_path: Path) -> None:
    trainer = sparse_trainer(sparse_gpt2("rigl"), tmp_path)
    trainer.train()
    trainer.train()
    assert controller_of(trainer).step == 12
    assert controller_of(trainer).num_dense_gradient_steps == 4


class FailOnce(TrainerCallback):
    """Raises in the third step of the first run."""

    def __init__(self, message: str) -> None:
        self.message: str | None = message

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3 and self.message:
            message, self.message = self.message, None
            raise RuntimeError(message)


def test_training_again_after_an_interruption(tmp_path: Path) -> None:
    """The broken-off run's controller must not go on beside the new one's."""
    trainer = make_trainer(sparse_gpt2("rigl"), tmp_path, SparseTrainingCallback(), FailOnce("stop"))
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    first = controller_of(trainer)
    trainer.train()
    assert first.step == 3
    assert controller_of(trainer).step == 12


def test_automatic_batch_size(tmp_path: Path) -> None:
    """Running out of memory, the Trainer starts its loop again with smaller batches."""
    trainer = make_trainer(
        sparse_gpt2("rigl"),
        tmp_path,
        SparseTrainingCallback(),
        FailOnce("CUDA out of memory."),
        auto_find_batch_size=True,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    assert trainer._train_batch_size < 4
    assert controller_of(trainer).step == 12
    assert controller_of(trainer).num_dense_gradient_steps == 4


# ---- errors


class StandInHub:
    """Keeps what is uploaded, a folder for each upload."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uploads: list[Path] = []

    def create_repo(self, name: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, folder_path: str, ignore_patterns: list[str] | None = None, **_: Any) -> Any:
        self.uploads.append(self.root / str(len(self.uploads)))
        shutil.copytree(folder_path, self.uploads[-1], ignore=shutil.ignore_patterns(*ignore_patterns or ()))
        done: Future[None] = Future()
        done.set_result(None)
        return done


def test_uploads_while_training_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = StandInHub(tmp_path / "hub")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    options = {"push_to_hub": True, "hub_strategy": "every_save", "hub_always_push": True}
    sparse_trainer(sparse_gpt2(), tmp_path / "run", save_strategy="steps", save_steps=3, **options).train()
    assert len(hub.uploads) == 4
    for upload, step in zip(hub.uploads, (3, 6, 9, 12), strict=True):
        uploaded, saved = (load_pretrained(folder) for folder in (upload, tmp_path / "run" / f"checkpoint-{step}"))
        assert sparse_layers(uploaded)
        assert not differences(uploaded.state_dict(), saved.state_dict())
        assert not differences(masks(uploaded), masks(saved))


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=1, eos_token_id=0))
    with pytest.raises(ValueError, match=r"no sparse layers.*sparsify"):
        make_trainer(dense, tmp_path, SparseTrainingCallback()).train()


@pytest.mark.support("DeepSpeed in the Trainer, DeepSpeed without ZeRO", refused=True)
@pytest.mark.structures(*STRUCTURES)
@pytest.mark.parametrize("option", [{"deepspeed": "config.json"}, {"fsdp": True, "fsdp_config": {"xla": True}}])
def test_sharded_training_is_refused(option: dict[str, Any]) -> None:
    args = SimpleNamespace(**{"deepspeed": None, "fsdp": None, "n_gpu": 1, "output_dir": ".", **option})
    state: Any = SimpleNamespace(global_step=0, max_steps=10)
    model = sparse_gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"DeepSpeed or XLA's FSDP; use DistributedDataParallel, or FSDP2"):
        SparseTrainingCallback().on_train_begin(args, state, None, model=model, optimizer=optimizer)  # type: ignore[arg-type]


def test_more_than_one_gpu_in_one_process_is_refused() -> None:
    """`nn.DataParallel` runs copies of the model on other devices, whose gradients cannot be captured together."""
    args = SimpleNamespace(deepspeed=None, fsdp=None, output_dir=".", n_gpu=2)
    model = sparse_gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state: Any = SimpleNamespace(global_step=0, max_steps=10)
    with pytest.raises(ValueError, match=r"2 GPUs in one process"):
        SparseTrainingCallback().on_train_begin(args, state, None, model=model, optimizer=optimizer)  # type: ignore[arg-type]


def test_a_trainer_without_training_needs_no_sparse_model(tmp_path: Path) -> None:
    trainer: Trainer = sparse_trainer(sparse_gpt2(), tmp_path)
    assert trainer.evaluate()["eval_loss"] > 0
