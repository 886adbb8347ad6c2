"""Mask metrics without a Trainer: an accelerate loop with a tracker, checkpoints of a loop, skipped steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import AdamW
from torch.utils.data import DataLoader

from sparseift_llm import SparseTrainingController
from sparseift_llm.metrics.mask_history import MaskMetrics
from sparseift_llm.metrics.step_probe import StepSample
from tests.helpers.tiny_runs import Rows, batches, differences, sparse_gpt2, train

pytestmark = pytest.mark.usefixtures("either_structure")
STEPS = 12
Logged = dict[int, dict[str, float]]


def accelerate_loop(folder: Path, epochs: int = 3, resume: bool = False) -> Logged:
    """Four optimizer steps of two micro-batches an epoch, all logged; a state is saved after the first epoch."""
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=2, log_with="tensorboard", project_dir=str(folder / f"resumed_{resume}")
    )
    accelerator.init_trackers("run")
    model = sparse_gpt2("rigl", seed=5 if resume else 0)
    model.config.sparse_ift["transformation"]["seed"] = 0
    optimizer: Any = AdamW(model.parameters(), lr=0.01)
    loader: Any = DataLoader(Rows(32), batch_size=4)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    controller = SparseTrainingController(model, optimizer, total_steps=STEPS)
    metrics = MaskMetrics(controller)
    accelerator.register_for_checkpointing(controller, metrics)
    if resume:
        accelerator.load_state(str(folder / "saved"))
    logged: Logged = {}
    for epoch in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                values = metrics.values()
                accelerator.log(values, step=controller.step)
                logged[controller.step] = {key: values[key] for key in values if key != "mask_update_seconds"}
        if epoch == 0 and not resume:
            accelerator.save_state(str(folder / "saved"))
    accelerator.end_training()
    controller.close()
    return logged


def test_an_accelerate_loop_and_its_tracker(tmp_path: Path) -> None:
    logged = accelerate_loop(tmp_path)
    assert list(logged) == list(range(1, STEPS + 1))
    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    reader = EventAccumulator(str(events)).Reload()
    for name in ("sparsity", "exploration", "exploration/mlp_in", "mask_churn", "drop_fraction", "mask_update_bytes"):
        shown = {event.step: event.value for event in reader.Scalars(name)}
        assert shown == {step: pytest.approx(values[name]) for step, values in logged.items() if name in values}
        assert shown
    # updates follow steps 2, 4, 6, 8
    assert logged[1]["exploration"] < logged[2]["exploration"] == logged[3]["exploration"] < logged[4]["exploration"]


def test_a_resumed_loop_reports_the_same(tmp_path: Path) -> None:
    whole = accelerate_loop(tmp_path)
    resumed = accelerate_loop(tmp_path, epochs=2, resume=True)
    assert not differences({step: whole[step] for step in range(5, STEPS + 1)}, resumed)
    assert {"mask_survival", "grad_norm_grown"} <= resumed[STEPS].keys()


def scaled_run(overflow: set[int]) -> list[dict[str, float]]:
    """The metrics after each good step; before those in `overflow`, one that the scaler skips."""
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, total_steps=STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    metrics, sample = MaskMetrics(controller, scaler), StepSample(model, controller.layers)
    found = []
    for number, batch in enumerate(batches(STEPS), start=1):
        for factor in (float("inf"), 1.0) if number in overflow else (1.0,):
            controller.begin_step()
            sample.begin()
            for part in batch.chunk(2):
                scaler.scale(model(input_ids=part, labels=part).loss / 2 * factor).backward()
            scaler.unscale_(optimizer)
            sample.end()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        values = {**metrics.values(), "grad_norm_active": float(sample.grad_norm)}  # type: ignore[arg-type]
        del values["mask_update_seconds"]
        found.append(values)
    return found


@pytest.mark.parametrize("overflow", [{1}, {4, 5, 6}])
def test_skipped_steps_leave_no_trace(overflow: set[int]) -> None:
    """Powers of two scale gradients without rounding, so that even norms are equal."""
    expected = scaled_run(set())
    assert not differences(expected, scaled_run(overflow))
    assert expected[-1]["grad_norm_grown"] < 10


def test_a_scaler_changes_no_metric() -> None:
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    metrics = MaskMetrics(SparseTrainingController(model, optimizer, total_steps=STEPS))
    train(model, optimizer, batches(STEPS), 2)
    values = metrics.values()
    for name, value in scaled_run(set())[-1].items():
        assert name == "grad_norm_active" or values[name] == pytest.approx(value, rel=1e-12)
