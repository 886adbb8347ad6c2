"""Optimizers inside optimizers, and backward passes besides the step's own: masks follow all the same."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

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
schedulefree = pytest.importorskip("schedulefree")
pytestmark = [pytest.mark.usefixtures("either_structure"), pytest.mark.structures("unstructured", "block")]


class TimmLookahead(Optimizer):
    """As timm's: passes `isinstance(..., Optimizer)` without `Optimizer.__init__`, so that hooks on it never fire."""

    def __init__(self, base_optimizer: Optimizer, alpha: float = 0.5, k: int = 3) -> None:
        self._optimizer_step_pre_hooks: Any = OrderedDict()
        self._optimizer_step_post_hooks: Any = OrderedDict()
        self._base_optimizer = base_optimizer
        self.param_groups = base_optimizer.param_groups
        self.defaults = base_optimizer.defaults
        self.state = defaultdict(dict)
        self.alpha, self.k, self.count = alpha, k, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self._base_optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self._base_optimizer.state[parameter]
                    slow = state.setdefault("lookahead_slow_buff", parameter.detach().clone())
                    slow.lerp_(parameter, self.alpha)
                    parameter.copy_(slow)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return self._base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        self._base_optimizer.load_state_dict(state_dict)
        self.param_groups = self._base_optimizer.param_groups


class Outer:
    """No torch optimizer at all, but one that holds one, and writes weights after its step."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        self.slow = {p: p.detach().clone() for group in base.param_groups for p in group["params"]}

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base.step(closure)
        for parameter, slow in self.slow.items():
            parameter.lerp_(slow, 0.1)  # towards where it was at the start, dropped weights, too


def schedule_free(parameters: list[nn.Parameter]) -> Any:
    optimizer = schedulefree.AdamWScheduleFree(parameters, lr=0.01, foreach=False)
    optimizer.train()
    return optimizer


def wrapped_schedule_free(parameters: list[nn.Parameter]) -> Any:
    optimizer = schedulefree.ScheduleFreeWrapper(SGD(parameters, lr=0.5))
    optimizer.train()
    return optimizer


WRAPPERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "pytorch_optimizer Lookahead": lambda p: pytorch_optimizer.Lookahead(AdamW(p, lr=0.01), k=3),
    "Lookahead of Lookahead": lambda p: TimmLookahead(pytorch_optimizer.Lookahead(AdamW(p, lr=0.01), k=2)),
    "timm Lookahead": lambda p: TimmLookahead(AdamW(p, lr=0.01)),
    "another class": lambda p: Outer(AdamW(p, lr=0.01)),
    "ScheduleFree": schedule_free,
    "ScheduleFreeWrapper": wrapped_schedule_free,
    "pytorch_optimizer Lion": lambda p: pytorch_optimizer.Lion(p, lr=0.002),
}


@pytest.mark.support("optimizers inside others (Lookahead, SAM, ScheduleFree)")
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_keep_inactive_weights_at_zero(name: str) -> None:
    """Also on the steps on which they write weights after the inner step, and in what they keep of weights."""
    model = sparse_gpt2("rigl")
    optimizer = WRAPPERS[name](list(model.parameters()))
    controller = SparseTrainingController(model, optimizer, STEPS)
    history = [masks(model)]

    def look() -> None:
        assert controller.step == len(history)
        assert violations(model, optimizer) == []
        history.append(masks(model))

    train(model, optimizer, batches(STEPS), after_step=look)
    changed = [step for step in range(1, STEPS + 1) if differences(history[step - 1], history[step])]
    assert changed == [2, 4, 6, 8]
    controller.close()
    train(model, optimizer, batches(1))
    assert controller.step == STEPS


def test_a_wrapper_with_slots_cannot_be_looked_into(either_structure: str) -> None:
    class Slotted:
        __slots__ = ("optimizer",)

        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    model = sparse_gpt2("rigl")
    with pytest.raises(ValueError, match=r"Slotted is not a torch.optim.Optimizer, so it cannot be followed"):
        SparseTrainingController(model, Slotted(AdamW(model.parameters())), STEPS)


def test_a_wrapper_that_the_controller_was_not_told_of_is_noticed(either_structure: str) -> None:
    """Its writing is refused at the next update; tiles have no inactive weights that it could write to."""
    model = sparse_gpt2("rigl")
    inner = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, inner, STEPS)
    optimizer: Any = Outer(inner)
    if either_structure == "block":
        train(model, optimizer, batches(STEPS))
        return
    with pytest.raises(ValueError, match=r"is not 0 where its mask is, before step 4.*the outermost optimizer"):
        train(model, optimizer, batches(STEPS))


@pytest.mark.parametrize("name", ["timm Lookahead", "pytorch_optimizer Lookahead"])
def test_wrappers_in_a_trainer(name: str, tmp_path: Path) -> None:
    model = sparse_gpt2("rigl")
    optimizer = WRAPPERS[name](list(model.parameters()))
    trainer = make_trainer(model, tmp_path, SparseTrainingCallback())
    trainer.optimizer = optimizer
    trainer.train()
    assert controller_of(trainer).step == STEPS
    assert controller_of(trainer).num_dense_gradient_steps == 4
    assert violations(model, optimizer) == []


class NeverStepped(AdamW):
    """Does its work in a method of another name, as SAM does, without an inner optimizer."""

    def second_step(self) -> None:
        type(self).__mro__[1].step.__wrapped__(self)  # type: ignore[attr-defined]


def test_a_trainer_whose_steps_are_not_counted_is_stopped(tmp_path: Path) -> None:
    model = sparse_gpt2("rigl")
    trainer = make_trainer(model, tmp_path, SparseTrainingCallback())
    trainer.optimizer = NeverStepped(model.parameters(), lr=0.01)
    inner = trainer.optimizer

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        loss = type(trainer).training_step(trainer, *args, **kwargs)
        inner.second_step()
        inner.step = lambda closure=None: None  # type: ignore[method-assign]
        return loss

    trainer.training_step = training_step  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"has taken step 1, but the controller has counted 0 steps.*NeverStepped"):
        trainer.train()


# ---- which passes count for growth


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
    with pytest.raises(ValueError, match="backward_passes must be at least 1, got 0"):
        SparseTrainingCallback(backward_passes=0)
