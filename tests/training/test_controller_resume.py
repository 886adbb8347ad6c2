"""Plain and accelerate loops: saving and going on bit for bit, accumulation, and skipped steps of a gradient scaler."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from sparseift_llm import DSTConfig, SparseTrainingController
from sparseift_llm.layers.base import sparse_layers
from tests.helpers.tiny_runs import Rows, ToyModel, batches, differences, masks, snapshot, sparse_gpt2, train

ALGORITHMS = ["static", "set", "rigl", "gmp", "granet"]

pytestmark = pytest.mark.usefixtures("every_structure")


@pytest.fixture(autouse=True)
def _no_singletons() -> Iterator[None]:
    """Leave no accelerate singleton behind."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def new_run(algorithm: str, seed: int = 0) -> tuple[nn.Module, Optimizer, SparseTrainingController]:
    model = sparse_gpt2(algorithm, seed=seed)
    optimizer = AdamW(model.parameters(), lr=0.01)
    return model, optimizer, SparseTrainingController(model, optimizer, total_steps=12)


# ---- plain loop


@pytest.mark.parametrize("stop_at", [1, 3, 4, 7])  # before any update, armed, right after one, near the end
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_saving_and_loading_changes_nothing(algorithm: str, stop_at: int) -> None:
    model, optimizer, controller = new_run(algorithm)
    train(model, optimizer, batches(12))
    expected = {**snapshot(model, optimizer), "counters": controller.counters()}

    model, optimizer, controller = new_run(algorithm)
    data = batches(12)
    train(model, optimizer, itertools.islice(data, stop_at))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict(), controller.state_dict()), file)
    file.seek(0)
    assert differences(expected, {**snapshot(model, optimizer), "counters": controller.counters()})
    controller.close()

    model, optimizer, controller = new_run(algorithm, seed=5)  # other weights; loading replaces everything
    model.config.sparse_ift["transformation"]["seed"] = 0
    controller.close()
    controller = SparseTrainingController(model, optimizer, total_steps=12)
    weights, moments, state = torch.load(file, weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    controller.load_state_dict(state)
    train(model, optimizer, data)
    assert not differences(expected, {**snapshot(model, optimizer), "counters": controller.counters()})


def test_state_dict_is_a_copy() -> None:
    model, optimizer, controller = new_run("rigl")
    state = controller.state_dict()
    kept = {name: value.clone() for name, value in state["masks"].items()}
    train(model, optimizer, batches(4))
    assert state["step"] == 0
    assert not differences(state["masks"], kept)
    assert differences(controller.state_dict()["masks"], kept)


def test_loading_arms_the_capture_for_the_step_that_comes() -> None:
    """An update is due at the first step after resuming: its dense gradient must be captured."""
    model, optimizer, controller = new_run("rigl")
    train(model, optimizer, batches(3))
    state = controller.state_dict()
    controller.close()
    model, optimizer, controller = new_run("rigl")
    assert all(layer.dense_gradient is None for layer in sparse_layers(model).values())
    controller.load_state_dict(state)
    assert all(layer.dense_gradient is not None for layer in sparse_layers(model).values())
    controller.load_state_dict({**state, "step": 4})
    assert all(layer.dense_gradient is None for layer in sparse_layers(model).values())


# ---- accelerate


def accelerated(seed: int = 0, accumulate: int = 2) -> tuple[Accelerator, Any, Any, Any, SparseTrainingController]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = sparse_gpt2("rigl", seed=seed)
    model.config.sparse_ift["transformation"]["seed"] = 0
    optimizer = AdamW(model.parameters(), lr=0.01)
    loader: DataLoader[Any] = DataLoader(Rows(32), batch_size=8 // accumulate)  # type: ignore[arg-type]
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    controller = SparseTrainingController(prepared, optimizer, total_steps=12)
    accelerator.register_for_checkpointing(controller)
    return accelerator, prepared, optimizer, loader, controller


def accelerate_epochs(run: tuple[Any, ...], epochs: int) -> list[int]:
    """Four optimizer steps an epoch; returns the controller's step after each micro-batch."""
    accelerator, model, optimizer, loader, controller = run
    seen = []
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            seen.append(controller.step)
    return seen


def test_accumulate_counts_optimizer_steps_only() -> None:
    assert accelerate_epochs(accelerated(accumulate=2), 1) == [0, 1, 1, 2, 2, 3, 3, 4]


def test_accumulate_does_not_change_masks() -> None:
    def final(accumulate: int) -> dict[str, Tensor]:
        run = accelerated(accumulate=accumulate)
        accelerate_epochs(run, 3)
        assert run[4].counters()["step"] == 12
        assert run[4].num_dense_gradient_steps == 4
        return masks(run[1])

    assert not differences(final(1), final(4))


def test_save_state_and_load_state(tmp_path: Path) -> None:
    run = accelerated()
    accelerate_epochs(run, 1)
    run[0].save_state(str(tmp_path / "saved"))
    accelerate_epochs(run, 2)
    expected = {**snapshot(run[1], run[2].optimizer), "counters": run[4].counters()}
    run[4].close()

    run = accelerated(seed=5)
    run[0].load_state(str(tmp_path / "saved"))
    assert run[4].step == 4
    assert differences(expected["masks"], masks(run[1]))
    accelerate_epochs(run, 2)
    assert not differences(expected, {**snapshot(run[1], run[2].optimizer), "counters": run[4].counters()})


# ---- gradient scaler


def scaled_run(
    broken: set[int], fused: bool = False, begin_step: bool = True
) -> tuple[dict[str, Tensor], SparseTrainingController]:
    """12 good steps of two micro-batches under a scaler; before the steps in `broken`, one whose loss overflows."""
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01, fused=fused)
    controller = SparseTrainingController(model, optimizer, total_steps=12)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(batch: Tensor, factor: float) -> None:
        if begin_step:
            controller.begin_step()
        for part, scale in zip(batch.chunk(2), (1.0, factor), strict=True):
            scaler.scale(model(input_ids=part, labels=part).loss / 2 * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    for number, batch in enumerate(batches(12), start=1):
        if number in broken:
            step(next(batches(1, seed=number)), float("inf"))
            assert controller.step == number - 1
        step(batch, 1.0)
        assert controller.step == number
    return masks(model), controller


def test_scaling_does_not_change_masks() -> None:
    model, optimizer, _ = new_run("rigl")
    train(model, optimizer, batches(12), 2)
    assert not differences(masks(model), scaled_run(set())[0])


@pytest.mark.support("GradScaler, skipped steps")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("broken", [{1}, {3}, {4}, {4, 5, 6}])  # updates follow steps 2, 4, 6, 8
def test_skipped_steps_leave_no_trace_in_masks(broken: set[int], fused: bool) -> None:
    """Neither in the count of steps nor in the gradients that RigL grows by."""
    expected, reference = scaled_run(set(), fused)
    found, controller = scaled_run(broken, fused)
    assert not differences(expected, found)
    assert controller.counters() == reference.counters()


@pytest.mark.parametrize("broken", [{1}, {3}, {4}, {4, 5, 6}])
def test_skipped_steps_leave_no_trace_without_begin_step_either(broken: set[int]) -> None:
    """`zero_grad()` after the skipped step is enough: gradients that are gone count for nothing."""
    assert not differences(scaled_run(set())[0], scaled_run(broken, begin_step=False)[0])


def test_a_skipped_update_step_whose_gradients_are_kept_is_an_error() -> None:
    """Without `zero_grad()` and `begin_step()` they would be grown by."""
    model, optimizer, _ = new_run("rigl")
    train(model, optimizer, batches(1))
    batch = next(batches(1))
    (model(input_ids=batch, labels=batch).loss * float("inf")).backward()  # of a step that is skipped
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.nan_to_num_(1.0, 1.0, -1.0)
    model(input_ids=batch, labels=batch).loss.backward()
    with pytest.raises(RuntimeError, match=r"not finite.*begin_step"):
        optimizer.step()


def test_begin_step_forgets_the_gradients_so_far() -> None:
    gradient = torch.ones(2, 4)
    model = ToyModel(gradient, torch.ones(2, 4, dtype=torch.bool), DSTConfig("rigl", update_every_steps=1))
    controller = SparseTrainingController(model, SGD(model.parameters(), lr=0.1), total_steps=100)
    model.loss(gradient * 5).backward()
    controller.begin_step()
    model.loss(gradient * 2).backward()
    model.loss(gradient).backward()
    assert model.layer.dense_gradient is not None
    assert model.layer.dense_gradient.total is not None
    assert torch.equal(model.layer.dense_gradient.total, gradient * 3)
