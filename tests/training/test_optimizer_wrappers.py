"""Optimizers inside optimizers: masks follow all the same."""

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
