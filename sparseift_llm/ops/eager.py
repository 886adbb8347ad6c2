"""The way past torch's dispatcher: an operator in eager mode on a GPU, where small batches wait for the host.

A custom operator is what torch.compile, tracing and dispatch modes need, and costs several times the host time of a
plain autograd function. So an operator has both ways in, with one forward and one backward function behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

DEVICES = ("cuda",)  # on a CPU the products themselves take longer than the dispatcher


@dataclass(frozen=True)
class Operator:
    """An operator with gradients.

    Attributes:
        custom: the custom operator, with its gradients registered.
        function: what it computes.
        save: (ctx, inputs, output), as `torch.library.register_autograd` takes it as `setup_context`.
        backward: (ctx, *gradients), the same.
    """

    custom: Callable[..., Any]
    function: Callable[..., Any]
    save: Callable[..., None]
    backward: Callable[..., tuple[Any, ...]]

    def __call__(self, *inputs: Any) -> Any:
        if not _is_plain(inputs):
            return self.custom(*inputs)
        return _Plain.apply(*inputs, self) if torch.is_grad_enabled() else self.function(*inputs)


@dataclass(frozen=True)
class Gradient:
    """An operator that computes gradients, called from an `Operator.backward`; its own gradients are an error.

    Attributes:
        custom: the custom operator, which refuses to be differentiated.
        function: what it computes.
    """

    custom: Callable[..., Any]
    function: Callable[..., Any]

    def __call__(self, *inputs: Any) -> Any:
        # with create_graph=True gradients are enabled here, and a second derivative has to be refused
        is_direct = _is_plain(inputs) and not torch.is_grad_enabled()
        return self.function(*inputs) if is_direct else self.custom(*inputs)


class _Plain(torch.autograd.Function):
    """An `Operator`, its last input, on the others."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *given, operator = inputs
        output = operator.function(*given)
        ctx.operator = operator
        ctx.set_materialize_grads(False)
        operator.save(ctx, tuple(given), output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        found = ctx.operator.backward(ctx, *gradients)
        return (*(None if isinstance(gradient, list) else gradient for gradient in found), None)


def _is_plain(inputs: tuple[Any, ...]) -> bool:
    """Whether nothing but autograd has to know of a call: all tensors are ordinary ones, and nothing watches."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    return all(type(tensor) in (Tensor, nn.Parameter) and tensor.device.type in DEVICES for tensor in tensors)
