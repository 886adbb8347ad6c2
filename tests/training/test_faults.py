"""Habits and accidents that would ruin masks without a word: each is an error that says what to do, or does no harm."""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from sparseift_llm import SparseTrainingController
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.masked import MaskedProjection
from tests.helpers.tiny_runs import batches, differences, first_sparse, masks, sparse_gpt2, train, weights_of

STEPS = 12
pytestmark = pytest.mark.usefixtures("either_structure")
both_structures = pytest.mark.structures("unstructured", "block")


@pytest.fixture(autouse=True)
def _clean_globals() -> Iterator[None]:
    """Leave no accelerate singleton behind."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(algorithm: str = "rigl", lr: float = 0.01, **options: Any) -> tuple[Any, Optimizer, SparseTrainingController]:
    model = sparse_gpt2(algorithm, **options)
    optimizer = AdamW(model.parameters(), lr=lr)
    return model, optimizer, SparseTrainingController(model, optimizer, STEPS)


# ---- a loss that is not finite


@pytest.mark.parametrize("algorithm", ["set", "gmp", "rigl"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_masks_change(algorithm: str, value: float) -> None:
    model, optimizer, controller = run(algorithm)
    train(model, optimizer, batches(2))
    before = masks(model)
    batch = next(batches(1))
    (model(input_ids=batch, labels=batch).loss * value).backward()
    optimizer.step()  # step 3 updates no masks
    optimizer.zero_grad()
    assert not all(layer.weight.isfinite().all() for layer in sparse_layers(model).values())
    with pytest.raises(RuntimeError, match=r"weight is not finite after step 4.*diverged|step 4 is not finite"):
        train(model, optimizer, batches(1))
    assert controller.step == 4
    assert not differences(before, masks(model))


# ---- weights without their masks


def trained_state(algorithm: str = "rigl") -> tuple[Any, Optimizer, SparseTrainingController]:
    model, optimizer, controller = run(algorithm)
    train(model, optimizer, batches(8))
    return model, optimizer, controller


@pytest.mark.structures("unstructured", "families")
@pytest.mark.parametrize("before_controller", [True, False])
@pytest.mark.parametrize("algorithm", ["static", "rigl", "gmp"])
def test_weights_loaded_without_their_masks_are_refused(algorithm: str, before_controller: bool) -> None:
    source, _, _ = trained_state("rigl")
    model = sparse_gpt2(algorithm, seed=3)
    optimizer = AdamW(model.parameters(), lr=0.0)
    if before_controller:
        model.load_state_dict(source.state_dict())
    SparseTrainingController(model, optimizer, STEPS)
    model.load_state_dict(source.state_dict())
    expected = weights_of(source)
    if algorithm == "gmp":  # which starts dense, so that any weights fit
        train(model, optimizer, batches(1))
        assert not differences(expected, weights_of(model))
        return
    with pytest.raises(ValueError, match=r"not 0 where its mask is, before step 1.*load_pretrained.*register_for"):
        train(model, optimizer, batches(1))
    assert not differences(expected, weights_of(model))  # nothing was destroyed


def test_weights_loaded_with_their_masks_are_trained() -> None:
    source, _, _ = trained_state()
    model = sparse_gpt2(seed=3)
    optimizer = AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    SparseTrainingController(model, optimizer, STEPS)
    model.load_state_dict(source.state_dict())
    for name, layer in sparse_layers(model).items():
        layer.load_topology(sparse_layers(source)[name].topology)
        if not isinstance(layer, MaskedProjection):
            layer.restore_buffers()
    train(model, optimizer, batches(1))
    assert not differences(weights_of(source), weights_of(model))


def accelerated(register: bool, seed: int = 0) -> tuple[Accelerator, Any, Any, SparseTrainingController]:
    accelerator = Accelerator(cpu=True)
    model = sparse_gpt2(seed=seed)
    model.config.sparse_ift["transformation"]["seed"] = 0
    prepared, optimizer = accelerator.prepare(model, AdamW(model.parameters(), lr=0.01))
    controller = SparseTrainingController(prepared, optimizer, STEPS)
    if register:
        accelerator.register_for_checkpointing(controller)
    return accelerator, prepared, optimizer, controller


@both_structures
@pytest.mark.parametrize("register", [True, False])
def test_a_state_loaded_without_the_controllers_is_refused(
    register: bool, either_structure: str, tmp_path: Path
) -> None:
    accelerator, model, optimizer, controller = accelerated(register)
    train(model, optimizer, batches(8))
    accelerator.save_state(str(tmp_path / "state"))
    expected = weights_of(model)
    controller.close()
    accelerator, model, optimizer, controller = accelerated(register, seed=5)
    accelerator.load_state(str(tmp_path / "state"))
    if register:
        train(model, optimizer, batches(1))
        assert controller.step == 9
        return
    message = {
        "unstructured": "not 0 where its mask is, before step 1",
        "block": "the optimizer has taken 8 steps, but the controller has counted 0.*accept_optimizer_steps",
    }[either_structure]
    with pytest.raises(ValueError, match=message):
        train(model, optimizer, batches(1))
    assert not differences(expected, weights_of(model))


@pytest.mark.parametrize("first", ["weights", "state"])
def test_state_and_weights_may_come_in_any_order(first: str) -> None:
    source, other, controller = trained_state()
    state = controller.state_dict()
    model, optimizer, again = run(seed=3)
    loads = [lambda: model.load_state_dict(source.state_dict()), lambda: again.load_state_dict(state)]
    for load in loads if first == "weights" else reversed(loads):
        load()
    optimizer.load_state_dict(other.state_dict())
    train(model, optimizer, batches(1))
    assert again.step == 9


@pytest.mark.structures("unstructured", "families")
def test_a_controllers_state_of_another_step_is_refused() -> None:
    source, optimizer, controller = run()
    data = batches(STEPS)
    train(source, optimizer, itertools.islice(data, 4))
    state = controller.state_dict()
    train(source, optimizer, itertools.islice(data, 4))
    model, _, again = run(seed=3)
    model.load_state_dict(source.state_dict())
    expected = weights_of(model)
    with pytest.raises(ValueError, match=r"of different steps: load weights and state from one checkpoint"):
        again.load_state_dict(state)
    assert not differences(expected, weights_of(model))


@both_structures
@pytest.mark.parametrize(
    ("make", "loads", "warns"),
    [
        (AdamW, True, False),
        (AdamW, False, True),
        (partial(SGD, momentum=0.9), False, True),
        (SGD, False, False),  # which has no state to lose
    ],
    ids=["loaded", "forgotten", "momentum forgotten", "no state"],
)
def test_an_optimizer_whose_state_was_forgotten_is_named_once(
    make: Callable[..., Optimizer], loads: bool, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    source = sparse_gpt2("rigl")
    first = make(source.parameters(), lr=0.01)
    controller = SparseTrainingController(source, first, STEPS)
    train(source, first, batches(8))
    assert "began anew" not in caplog.text
    model = sparse_gpt2("rigl", seed=3)
    optimizer = make(model.parameters(), lr=0.01)
    again = SparseTrainingController(model, optimizer, STEPS)
    again.load_state_dict(controller.state_dict())
    model.load_state_dict(source.state_dict())
    if loads:
        optimizer.load_state_dict(first.state_dict())
    train(model, optimizer, batches(2))
    assert caplog.text.count("went on at step 8, but the optimizer's state began anew") == warns


def test_weights_alone_may_be_fine_tuned_with_a_new_optimizer() -> None:
    model, _, controller = trained_state()
    controller.close()
    optimizer = AdamW(model.parameters(), lr=0.01)
    again = SparseTrainingController(model, optimizer, STEPS)
    train(model, optimizer, batches(STEPS))
    assert again.step == STEPS


@both_structures
def test_a_new_phase_with_the_same_optimizer_is_said_to_be_one() -> None:
    model, optimizer, controller = trained_state()
    controller.close()
    again = SparseTrainingController(model, optimizer, STEPS)
    with pytest.raises(ValueError, match=r"has taken 8 steps, but the controller has counted 0"):
        train(model, optimizer, batches(1))
    again.accept_optimizer_steps()
    train(model, optimizer, batches(STEPS))
    assert again.step == STEPS


@both_structures
def test_a_new_phase_is_seen_by_sgd_s_momentum_too() -> None:
    """SGD counts no steps, but what it keeps shows that there were some."""
    model = sparse_gpt2("rigl")
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    SparseTrainingController(model, optimizer, STEPS).close()
    again = SparseTrainingController(model, optimizer, STEPS)
    train(model, optimizer, batches(4))
    again.close()
    third = SparseTrainingController(model, optimizer, STEPS)
    with pytest.raises(ValueError, match=r"has taken a step, but the controller has counted 0"):
        train(model, optimizer, batches(1))
    third.accept_optimizer_steps()
    train(model, optimizer, batches(STEPS))
    assert third.step == STEPS


# ---- schedules


@pytest.mark.parametrize(
    ("algorithm", "every", "total", "warns"),
    [
        ("rigl", 100, 130, True), ("rigl", 100, 133, True), ("rigl", 100, 135, False), ("set", 9, 12, True),
        ("set", 8, 12, False), ("gmp", 100, 12, False), ("static", 100, 12, False),
    ],
)  # fmt: skip
@both_structures
def test_a_schedule_without_updates_is_said_to_be_one(
    algorithm: str, every: int, total: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = sparse_gpt2(algorithm, every=every)
    controller = SparseTrainingController(model, AdamW(model.parameters()), total)
    assert ("masks will never change: with update_every_steps=" in caplog.text) == warns
    assert warns == (algorithm != "static" and not any(map(controller.algorithm.is_update_step, range(total + 1))))


@both_structures
def test_a_schedule_changed_on_resume_is_named(caplog: pytest.LogCaptureFixture) -> None:
    _, _, controller = trained_state()
    state = controller.state_dict()
    run("rigl")[2].load_state_dict(state)
    assert "other mask updates" not in caplog.text
    run("set", every=3)[2].load_state_dict(state)
    assert "other mask updates, and the run goes on with these: " in caplog.text
    assert "algorithm: 'rigl' -> 'set', update_every_steps: 2 -> 3" in caplog.text
    assert "drop_fraction" not in caplog.text
    caplog.clear()
    run("set")[2].load_state_dict({key: value for key, value in state.items() if key != "schedule"})  # of 0.1.0
    assert "other mask updates" not in caplog.text


# ---- layers that a step does not use


def drop_layer(model: nn.Module, batch: Tensor, skipped: str) -> Tensor:
    """The loss with one projection's output replaced by zeros, as LayerDrop leaves out a layer."""
    layer = sparse_layers(model)[skipped]
    hook = layer.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    try:
        return model(input_ids=batch, labels=batch).loss
    finally:
        hook.remove()


@pytest.mark.support("LayerDrop: layers that a step does not use keep their masks")
@pytest.mark.structures("unstructured", "families", "block", "family_tiles")
@pytest.mark.parametrize("micro_batches", [1, None])
def test_a_layer_that_a_step_does_not_use_keeps_its_mask(
    micro_batches: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, STEPS, micro_batches)
    name = first_sparse(model, "attn.c_attn")
    with caplog.at_level(logging.WARNING):
        for step, batch in enumerate(batches(STEPS), start=1):
            before = masks(model)
            drop_layer(model, batch, name).backward() if step == 4 else model(
                input_ids=batch, labels=batch
            ).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            after = masks(model)
            changed = {key for key in after if not torch.equal(before[key], after[key])}
            assert bool(changed) == (step in (2, 4, 6, 8))
            assert (name in changed) == (step in (2, 6, 8))
    assert controller.num_dense_gradient_steps == 4
    assert "was not used" not in caplog.text


@both_structures
def test_a_layer_that_is_never_used_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, _ = run()
    name = first_sparse(model, "attn.c_attn")
    for batch in batches(STEPS):
        drop_layer(model, batch, name).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert caplog.text.count(f"{name} was not used") == 1


# ---- two controllers at a time


def stance() -> str:
    return str(torch._dynamo.eval_frame._stance.stance)


@both_structures
def test_one_controller_does_not_disarm_another() -> None:
    """Both share the compiler's stance: it stays eager until the last one that needs it has finished."""
    often, rare = (sparse_gpt2("rigl", every=every) for every in (2, 3))
    optimizers = [AdamW(model.parameters(), lr=0.01) for model in (often, rare)]
    controllers = [SparseTrainingController(m, o, STEPS) for m, o in zip((often, rare), optimizers, strict=True)]
    seen = []
    for batch in batches(6):
        seen.append(stance())
        for model, optimizer in zip((often, rare), optimizers, strict=True):
            train(model, optimizer, iter([batch]))
            armed = [any(x.dense_gradient is not None for x in sparse_layers(m).values()) for m in (often, rare)]
            assert stance() == ("force_eager" if any(armed) else "default")
    assert seen == ["default", "force_eager", "force_eager", "force_eager", "default", "force_eager"]
    for controller in controllers:
        controller.close()
    assert stance() == "default"


def test_a_controller_that_is_gone_needs_nothing_any_more() -> None:
    model = sparse_gpt2("rigl", every=1)
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, STEPS)
    assert stance() == "force_eager"
    del optimizer
    gc.collect()
    assert stance() == "default"


def test_a_stance_of_the_users_comes_back() -> None:
    with torch.compiler.set_stance("eager_on_recompile"):
        _model, _, controller = run(every=1)
        assert stance() == "force_eager"
        controller.close()
        assert stance() == "eager_on_recompile"
