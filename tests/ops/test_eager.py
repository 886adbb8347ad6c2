"""The way past the dispatcher, taken here on a CPU: what it computes, what it refuses, and when it is not taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparseift_llm.ops import eager
from sparseift_llm.ops.block_feed_forward import block_feed_forward, block_feed_forward_op
from sparseift_llm.ops.block_linear import block_linear, block_linear_op
from sparseift_llm.ops.eager import Operator
from sparseift_llm.ops.operands import call_operator
from tests.helpers.block_feed_forward_cases import make_case
from tests.ops.test_block_linear import operands

OPERATORS = {"linear": (block_linear, block_linear_op), "feed forward": (block_feed_forward, block_feed_forward_op)}


@pytest.fixture(params=OPERATORS)
def given(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, list[Any]]:
    """An operator, its custom twin, which fails if it is called, and operands."""
    monkeypatch.setattr(eager, "DEVICES", ("cpu",))
    operator, custom = OPERATORS[request.param]
    if request.param == "linear":
        return operator, custom, list(operands())
    arguments = make_case(tokens=5, size=4, dtype=torch.float64, gated=True).arguments("hidden")
    is_leaf = [isinstance(value, Tensor) and value.is_floating_point() for value in arguments]
    leaves = [value.clone().requires_grad_() if leaf else value for value, leaf in zip(arguments, is_leaf, strict=True)]
    return operator, custom, leaves


def refused(*_: Any) -> None:
    raise AssertionError("the custom operator was called")


def without_custom(operator: Operator) -> Operator:
    return Operator(refused, operator.function, operator.save, operator.backward)


def results(operator: Any, arguments: list[Any]) -> list[Tensor]:
    leaves = [value for value in arguments if isinstance(value, Tensor) and value.requires_grad]
    output = operator(*arguments)
    y = output if isinstance(output, Tensor) else output[0]
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)]


def test_it_computes_what_the_custom_operator_does(given: tuple[Any, Any, list[Any]]) -> None:
    operator, custom, arguments = given
    for one, other in zip(results(without_custom(operator), arguments), results(custom, arguments), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        output = without_custom(operator)(*arguments)
    assert not (output if isinstance(output, Tensor) else output[0]).requires_grad


def test_second_derivatives_are_refused(given: tuple[Any, Any, list[Any]]) -> None:
    operator, _, arguments = given
    output = operator(*arguments)
    y = output if isinstance(output, Tensor) else output[0]
    (gradient,) = torch.autograd.grad(y.sin().sum(), arguments[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        gradient.sum().backward()


def test_functional_transforms_are_refused(given: tuple[Any, Any, list[Any]]) -> None:
    operator, _, (x, *others) = given

    def loss(x: Tensor) -> Tensor:
        output = call_operator(operator, x, *others)
        return (output if isinstance(output, Tensor) else output[0]).sum()

    with pytest.raises(NotImplementedError, match=r"cannot be transformed by torch\.func"):
        torch.func.grad(loss)(x.detach())


class Watch(TorchDispatchMode):
    """Notes the operators that are called, as profilers and selective checkpointing do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_custom_operator(given: tuple[Any, Any, list[Any]]) -> None:
    operator, _, arguments = given
    with Watch() as watch:
        operator(*arguments)
    assert any(name.startswith("sparseift.block_") for name in watch.seen)


def test_compiled_it_is_the_custom_operator(given: tuple[Any, Any, list[Any]]) -> None:
    operator, custom, arguments = given
    compiled = torch.compile(lambda *inputs: operator(*inputs), fullgraph=True, backend="aot_eager")
    for one, other in zip(results(compiled, arguments), results(custom, arguments), strict=True):
        assert torch.equal(one, other)


def test_on_a_cpu_and_for_other_tensors_the_custom_operator_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Tensor):
        pass

    x = torch.ones(2)
    assert not eager._is_plain((x,))
    monkeypatch.setattr(eager, "DEVICES", ("cpu",))
    assert eager._is_plain((x, None, 3))
    assert not eager._is_plain((x.as_subclass(Other),))
    assert not eager._is_plain((x, x.to("meta")))
