"""Every optimizer keeps inactive weights and their state at exactly 0, through steps and mask updates."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.optim import SGD, Adagrad, AdamW, NAdam, Optimizer, RMSprop

from sparseift_llm import SparseTrainingController
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from tests.helpers.tiny_runs import batches, differences, masks, sparse_gpt2, train, violations


class Lion(Optimizer):
    """Sign of an interpolated momentum; weight decay decoupled."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                momentum = state.setdefault("exp_avg", torch.zeros_like(parameter))
                direction = momentum.lerp(parameter.grad, 1 - group["betas"][0]).sign()
                parameter.mul_(1 - 0.1 * group["lr"]).sub_(direction, alpha=group["lr"])
                momentum.lerp_(parameter.grad, 1 - group["betas"][1])


class Drifting(Optimizer):
    """Moves every weight, whatever its gradient."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(0.01)


class Quantised(Optimizer):
    """Keeps its momentum as integers."""

    def __init__(self, params: Any, dtype: torch.dtype) -> None:
        super().__init__(params, {"dtype": dtype})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = torch.ones_like(parameter, dtype=group["dtype"])


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: AdamW(p, lr=0.01, foreach=False),
    "adamw_amsgrad": lambda p: AdamW(p, lr=0.01, amsgrad=True),
    "adamw_foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: AdamW(p, lr=0.01, fused=True, amsgrad=True),
    "adam_coupled_decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "sgd_momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adagrad": lambda p: Adagrad(p, lr=0.05),
    "rmsprop": lambda p: RMSprop(p, lr=0.005, momentum=0.9, centered=True),
    "nadam": lambda p: NAdam(p, lr=0.01),
    "torch_adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "transformers_adafactor": lambda p: transformers.Adafactor(p, lr=0.01, beta1=0.9, relative_step=False),
    "lion": lambda p: Lion(p, lr=0.002),
}


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [*((name, "rigl") for name in OPTIMIZERS), ("adamw", "set"), ("adamw", "gmp"), ("lion", "gmp")],
)
@pytest.mark.usefixtures("either_structure")
def test_inactive_weights_and_state_stay_zero(name: str, algorithm: str) -> None:
    model = sparse_gpt2(algorithm, every=3)
    optimizer = OPTIMIZERS[name](model.parameters())
    check_invariants(model, optimizer, algorithm)


@pytest.mark.usefixtures("either_structure")
def test_the_check_catches_state_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseift_llm.training.backends.torch.zero_state", lambda *_: None)
    model = sparse_gpt2("rigl", every=3)
    with pytest.raises(AssertionError):
        check_invariants(model, AdamW(model.parameters(), lr=0.01), "rigl")


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch without Muon")
def test_muon() -> None:
    model = sparse_gpt2("rigl", every=3)
    optimizer = torch.optim.Muon([layer.weight for layer in sparse_layers(model).values()], lr=0.02)
    check_invariants(model, optimizer, "rigl")


def slots(model: Any) -> dict[str, Tensor]:
    """Which tile every slot of the block-sparse layers holds."""
    layers = sparse_layers(model).items()
    return {name: layer.columns.clone() for name, layer in layers if isinstance(layer, BlockSparseLinear)}


def left_behind(model: Any, optimizer: Optimizer, before: dict[str, Tensor]) -> list[str]:
    """What a slot that has just got another tile kept of the old one: a weight, or per-element optimizer state."""
    found = []
    for name, columns in before.items():
        layer = sparse_layers(model)[name]
        weight, changed = layer.weight, layer.columns != columns
        state = {key: value for key, value in optimizer.state[weight].items() if isinstance(value, Tensor)}
        values = {"weight": weight, **{key: value for key, value in state.items() if value.shape == weight.shape}}
        found += [f"{name}.{key}" for key, value in values.items() if value[changed].any()]
    return found


def check_invariants(model: Any, optimizer: Optimizer, algorithm: str) -> None:
    """30 steps with updates on every third up to 22: exact zeros after each, and training does take place."""
    controller = SparseTrainingController(model, optimizer, total_steps=30)
    planned = {name: layer.num_active for name, layer in sparse_layers(model).items()}
    weights = {name: layer.weight.detach().clone() for name, layer in sparse_layers(model).items()}
    history, held = [masks(model)], slots(model)

    def check() -> None:
        nonlocal held
        assert violations(model, optimizer) == []
        assert left_behind(model, optimizer, held) == []
        held = slots(model)
        history.append(masks(model))
        if algorithm != "gmp":
            assert {name: layer.count_active() for name, layer in sparse_layers(model).items()} == planned

    train(model, optimizer, batches(30), 2, check)
    assert controller.step == 30
    assert {name: layer.count_active() for name, layer in sparse_layers(model).items()} == planned
    assert [step for step in range(1, 31) if differences(history[step - 1], history[step])][:6] == [*range(3, 19, 3)]
    for name, layer in sparse_layers(model).items():
        assert layer.weight.isfinite().all()
        if isinstance(layer, BlockSparseLinear):
            assert (layer.weight != weights[name]).float().mean() > 0.9
            continue
        kept = layer.current_mask() & history[0][name]
        assert (layer.weight != weights[name])[kept].float().mean() > 0.9


def test_muon_moves_inactive_weights_unless_they_are_masked_again() -> None:
    """The reason for re-masking: masked gradients alone do not hold Muon's inactive weights at 0."""
    model = sparse_gpt2("static")
    optimizer = torch.optim.Muon([layer.weight for layer in sparse_layers(model).values()], lr=0.02)
    controller = SparseTrainingController(model, optimizer, total_steps=10)
    train(model, optimizer, batches(2))
    assert violations(model, optimizer) == []
    controller.close()
    train(model, optimizer, batches(1))
    assert len(violations(model, optimizer)) == len(sparse_layers(model))


def test_weights_that_an_optimizer_moves_without_gradient_are_masked_before_the_update() -> None:
    """Inactive weights must not count as active, nor a grown one start from where the optimizer drifted to."""
    model = sparse_gpt2("rigl", every=1)
    optimizer = Drifting(model.parameters())
    SparseTrainingController(model, optimizer, total_steps=100)
    before = masks(model)
    train(model, optimizer, batches(1))
    for name, layer in sparse_layers(model).items():
        grown = layer.current_mask() & ~before[name]
        assert grown.any()
        assert not layer.weight[grown].any()
    assert violations(model, optimizer) == []


@pytest.mark.support("fused and foreach optimizers")
@pytest.mark.usefixtures("either_structure")
def test_fused_and_foreach_agree_with_the_plain_loop_on_masks() -> None:
    def final(name: str) -> dict[str, Tensor]:
        model = sparse_gpt2("rigl")
        optimizer = OPTIMIZERS[name](model.parameters())
        SparseTrainingController(model, optimizer, total_steps=12)
        train(model, optimizer, batches(12))
        return masks(model)

    assert not differences(final("adamw"), final("adamw_foreach"))


@pytest.mark.support("capturable AdamW")
@pytest.mark.usefixtures("either_structure")
@pytest.mark.parametrize("way", ["fused", "compiled"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own
def test_capturable_agrees_with_the_plain_loop_on_masks(way: str) -> None:
    """On a CPU torch has capturable steps that are fused, or compiled; update steps of RigL run eagerly."""

    def final(capturable: bool) -> dict[str, Tensor]:
        model = sparse_gpt2("rigl" if way == "fused" else "set")
        lr: Any = torch.tensor(0.01) if capturable and way == "compiled" else 0.01
        optimizer = AdamW(model.parameters(), lr=lr, fused=way == "fused", capturable=capturable)
        controller = SparseTrainingController(model, optimizer, total_steps=12)
        if capturable and way == "compiled":
            torch._dynamo.reset()
            optimizer.step = torch.compile(optimizer.step, backend="aot_eager")  # type: ignore[method-assign]
        train(model, optimizer, batches(12))
        assert controller.step == 12
        assert violations(model, optimizer) == []
        return masks(model)

    assert not differences(final(capturable=False), final(capturable=True))


@pytest.mark.support("capturable AdamW, unfused, in eager steps on a CPU", refused=True)
@pytest.mark.usefixtures("either_structure")
def test_capturable_steps_that_torch_has_on_no_cpu() -> None:
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01, capturable=True)
    SparseTrainingController(model, optimizer, total_steps=12)
    with pytest.raises(AssertionError, match=r"If capturable=True, params and state_steps must be on supported"):
        train(model, optimizer, batches(1))


@pytest.mark.usefixtures("either_structure")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_integer_state_is_refused(dtype: torch.dtype) -> None:
    model = sparse_gpt2("set")
    optimizer = Quantised(model.parameters(), dtype)
    SparseTrainingController(model, optimizer, total_steps=100)
    first = re.escape(next(iter(sparse_layers(model))))
    message = rf"{first}: Quantised keeps 'momentum' as {dtype}"
    with pytest.raises(ValueError, match=message):
        train(model, optimizer, batches(2))


def test_other_optimizer_state_is_left_alone() -> None:
    """Step counts and factored moments are no per-element state: an update must not reset them."""
    model = sparse_gpt2("rigl", every=3)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=100)
    train(model, optimizer, batches(3))
    for layer in sparse_layers(model).values():
        state = optimizer.state[layer.weight]
        assert state["step"] == 3
        assert state["row_var"].count_nonzero() > 0
