"""Backward passes besides the step's own: which of them count for growth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from sparseift_llm import SparseTrainingCallback, SparseTrainingController
from sparseift_llm.layers.base import sparse_layers
from tests.helpers.tiny_runs import (
    batches,
    controller_of,
    differences,
    make_trainer,
    masks,
    sparse_gpt2,
    train,
    violations,
)

STEPS = 12
pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
pytestmark = [pytest.mark.usefixtures("either_structure"), pytest.mark.structures("unstructured", "block")]


def plain_masks(algorithm: str = "rigl", micro_batches: int | None = 1) -> dict[str, Tensor]:
    model = sparse_gpt2(algorithm)
    optimizer = SGD(model.parameters(), lr=0.5)
    SparseTrainingController(model, optimizer, STEPS, micro_batches)
    train(model, optimizer, batches(STEPS))
    return masks(model)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch).loss


def spare_batch(step: int) -> Tensor:
    return next(batches(1, seed=1000 + step))


def read_a_norm(model: nn.Module, optimizer: Any, batch: Tensor, step: int) -> None:
    parameters = list(model.parameters())
    torch.autograd.grad(loss_of(model, spare_batch(step)), parameters)
    loss_of(model, batch).backward()
    torch.autograd.grad(loss_of(model, spare_batch(step)), parameters)


def throw_a_batch_away(model: nn.Module, optimizer: Any, batch: Tensor, step: int) -> None:
    (1000 * loss_of(model, spare_batch(step))).backward()
    optimizer.zero_grad()
    loss_of(model, batch).backward()


def throw_a_batch_away_in_place(model: nn.Module, optimizer: Any, batch: Tensor, step: int) -> None:
    (1000 * loss_of(model, spare_batch(step))).backward()
    optimizer.zero_grad(set_to_none=False)
    loss_of(model, batch).backward()


def delete_gradients(model: nn.Module, optimizer: Any, batch: Tensor, step: int) -> None:
    (1000 * loss_of(model, spare_batch(step))).backward()
    for parameter in model.parameters():
        parameter.grad = None
    loss_of(model, batch).backward()


PASSES = [read_a_norm, throw_a_batch_away, throw_a_batch_away_in_place, delete_gradients]


@pytest.mark.parametrize("micro_batches", [1, None])
@pytest.mark.parametrize("passes", PASSES)
def test_growth_comes_from_the_gradients_of_the_step(passes: Callable[..., None], micro_batches: int | None) -> None:
    model = sparse_gpt2("rigl")
    optimizer = SGD(model.parameters(), lr=0.5)
    controller = SparseTrainingController(model, optimizer, STEPS, micro_batches)
    for step, batch in enumerate(batches(STEPS)):
        passes(model, optimizer, batch, step)
        optimizer.step()
        optimizer.zero_grad()
    assert controller.num_dense_gradient_steps == 4
    assert not differences(plain_masks(), masks(model))


def test_accumulated_passes_still_add_up_beside_thrown_away_ones() -> None:
    model = sparse_gpt2("rigl")
    optimizer = SGD(model.parameters(), lr=0.5)
    SparseTrainingController(model, optimizer, STEPS)
    for step, batch in enumerate(batches(STEPS)):
        loss_of(model, spare_batch(step)).backward()
        optimizer.zero_grad()
        for part in batch.chunk(2):
            (loss_of(model, part) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not differences(plain_masks(), masks(model))


def test_a_gradient_that_is_thrown_away_and_not_made_again_grows_nothing() -> None:
    model = sparse_gpt2("rigl", every=1)
    optimizer = SGD(model.parameters(), lr=0.5)
    SparseTrainingController(model, optimizer, STEPS)
    before = masks(model)
    loss_of(model, spare_batch(0)).backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="no dense gradient reached step 1"):
        optimizer.step()
    assert not differences(before, masks(model))


@pytest.mark.support("second-order optimizers (AdaHessian, Sophia, Hessian-vector products)")
@pytest.mark.structures("unstructured", "families")
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
@pytest.mark.parametrize("create", ["backward", "grad"])
def test_products_with_the_hessian_are_no_growth(create: str) -> None:
    model = sparse_gpt2("rigl")
    model.config._attn_implementation = "eager"  # torch has no second derivative of the fused one
    optimizer = SGD(model.parameters(), lr=0.5)
    SparseTrainingController(model, optimizer, STEPS)
    weights = [layer.weight for layer in sparse_layers(model).values()]
    plain = sparse_gpt2("rigl")
    plain.config._attn_implementation = "eager"
    other = SGD(plain.parameters(), lr=0.5)
    SparseTrainingController(plain, other, STEPS)
    train(plain, other, batches(STEPS))
    generator = torch.Generator().manual_seed(0)
    for batch in batches(STEPS):
        loss = loss_of(model, batch)
        if create == "backward":
            loss.backward(create_graph=True)
            first = [weight.grad for weight in weights]
        else:
            first = list(torch.autograd.grad(loss, weights, create_graph=True))
        directions = [torch.randn(weight.shape, generator=generator, dtype=weight.dtype) for weight in weights]
        products = torch.autograd.grad(first, weights, directions, retain_graph=create == "grad")
        assert any(product.any() for product in products)
        if create == "grad":
            loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.detach()
        optimizer.step()
        optimizer.zero_grad()
    assert not differences(masks(plain), masks(model))


@pytest.mark.support("second-order optimizers (AdaHessian, Sophia, Hessian-vector products)")
@pytest.mark.structures("unstructured", "families")
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
@pytest.mark.parametrize("name", ["AdaHessian", "SophiaH"])
def test_second_order_optimizers(name: str) -> None:
    """Their passes besides the step's are not captured: the total is the dense gradient of the step's own loss."""
    model = sparse_gpt2("rigl")
    model.config._attn_implementation = "eager"
    optimizer = getattr(pytorch_optimizer, name)(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, STEPS)
    captured: list[dict[str, Tensor]] = []
    for batch in batches(STEPS):
        loss_of(model, batch).backward(create_graph=True)
        sinks = {key: layer.dense_gradient for key, layer in sparse_layers(model).items()}
        captured.append({key: s.total.clone() for key, s in sinks.items() if s is not None and s.total is not None})
        controller.listeners = [
            lambda key, old, new, growth: torch.testing.assert_close(growth, captured[-1][key].abs(), rtol=0, atol=0)
        ]
        optimizer.step()
        optimizer.zero_grad()
        assert violations(model, optimizer) == []
    assert controller.num_dense_gradient_steps == 4
    assert sum(bool(entry) for entry in captured) == 4


@pytest.mark.support("second-order optimizers (AdaHessian, Sophia, Hessian-vector products)", refused=True)
@pytest.mark.structures("block", "family_tiles")
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
@pytest.mark.filterwarnings("ignore:sparseift. an autograd kernel was not registered:UserWarning")
def test_tiles_have_no_second_derivatives() -> None:
    model = sparse_gpt2("rigl")
    model.config._attn_implementation = "eager"
    optimizer = pytorch_optimizer.AdaHessian(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, STEPS)
    before = masks(model)
    loss_of(model, next(batches(1))).backward(create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.step()
    assert not differences(before, masks(model))


def sam(parameters: Any) -> Any:
    return pytorch_optimizer.SAM(parameters, SGD, rho=0.5, lr=0.5)


@pytest.mark.support("optimizers inside others (Lookahead, SAM, ScheduleFree)")
@pytest.mark.parametrize("micro_batches", [1, None])
@pytest.mark.parametrize("by_hand", [True, False])
def test_sharpness_aware_minimisation_grows_by_its_second_pass(by_hand: bool, micro_batches: int | None) -> None:
    model = sparse_gpt2("rigl")
    optimizer = sam(model.parameters())
    controller = SparseTrainingController(model, optimizer, STEPS, micro_batches)
    seen: list[Tensor] = []
    first, *_ = sparse_layers(model)
    controller.listeners.append(lambda name, old, new, growth: seen.append(growth) if name == first else None)
    expected: list[Tensor] = []
    for batch in batches(STEPS):

        def second_pass(batch: Tensor = batch) -> Tensor:
            loss = loss_of(model, batch)
            twin = sparse_gpt2("rigl")
            twin.load_state_dict(model.state_dict())
            layer = sparse_layers(twin)[first]
            for name, other in sparse_layers(twin).items():
                other.load_topology(sparse_layers(model)[name].topology)
                other.restore_buffers() if hasattr(other, "columns") else None
            alone = SGD(twin.parameters(), lr=0.0)
            lone = SparseTrainingController(twin, alone, 1000)
            from sparseift_llm.ops.dense_gradient import DenseGradient

            layer.dense_gradient = DenseGradient()
            loss_of(twin, batch).backward()
            assert layer.dense_gradient.total is not None
            expected.append(layer.growth_scores(layer.dense_gradient.total))
            lone.close()
            loss.backward()
            return loss

        loss_of(model, batch).backward()
        if by_hand:
            optimizer.first_step(zero_grad=True)
            second_pass()
            optimizer.second_step(zero_grad=True)
        else:
            optimizer.step(second_pass)
            optimizer.zero_grad()
    assert controller.step == STEPS
    assert len(seen) == 4
    for found, step in zip(seen, (2, 4, 6, 8), strict=True):
        torch.testing.assert_close(found, expected[step - 1], rtol=1e-9, atol=1e-12)


# ---- several uses in one loss


def two_forwards(model: nn.Module, batch: Tensor) -> Tensor:
    return (loss_of(model, batch) + loss_of(model, batch.flip(0))) / 2


@pytest.mark.support("several forward passes in one loss (R-Drop, contrastive, distillation)")
@pytest.mark.structures("unstructured", "block", "families", "family_tiles")
@pytest.mark.parametrize("micro_batches", [1, None])
def test_two_forwards_in_one_loss_are_one_backward_pass(micro_batches: int | None) -> None:
    """The same loss computed twice has the same gradient, so the same masks."""
    model = sparse_gpt2("rigl")
    optimizer = SGD(model.parameters(), lr=0.5)
    SparseTrainingController(model, optimizer, STEPS, micro_batches)
    for batch in batches(STEPS):
        two_forwards(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not differences(plain_masks(), masks(model))


@pytest.mark.support("several forward passes in one loss (R-Drop, contrastive, distillation)")
def test_two_forwards_in_a_trainer(tmp_path: Path) -> None:
    trainer = make_trainer(sparse_gpt2("rigl"), tmp_path, SparseTrainingCallback())
    trainer.compute_loss = lambda model, inputs, **_: two_forwards(model, inputs["input_ids"])  # type: ignore[method-assign, assignment]
    trainer.train()
    assert controller_of(trainer).num_dense_gradient_steps == 4


def test_two_backward_passes_in_a_trainers_step(tmp_path: Path) -> None:
    """The callback has to be told: an error says how."""

    def run(callback: SparseTrainingCallback) -> Any:
        trainer = make_trainer(sparse_gpt2("rigl"), tmp_path, callback, train_sampling_strategy="sequential")

        def training_step(model: nn.Module, inputs: Any, *_: Any) -> Tensor:
            for part in inputs["input_ids"].chunk(2):
                loss = loss_of(model, part) / 2
                trainer.accelerator.backward(loss)
            return loss.detach()

        trainer.training_step = training_step  # type: ignore[method-assign, assignment]
        trainer.train()
        return trainer

    with pytest.raises(RuntimeError, match=r"second backward pass.*SparseTrainingCallback\(backward_passes=\.\.\.\)"):
        run(SparseTrainingCallback())
    trainer = run(SparseTrainingCallback(backward_passes=2))
    plain = make_trainer(sparse_gpt2("rigl"), tmp_path, SparseTrainingCallback(), train_sampling_strategy="sequential")
    plain.train()
    assert not differences(masks(plain.model), masks(trainer.model))  # type: ignore[arg-type]
    for number in (0, 1.5):
        with pytest.raises(ValueError, match=f"backward_passes must be a whole number of at least 1, got {number}"):
            SparseTrainingCallback(backward_passes=number)  # type: ignore[arg-type]
