"""The one autograd function of unstructured sparsity: identity forward, masked gradient backward.

It stands between the parameter and the stock matrix product, so that autocast, compilation and
checkpointing see ordinary operations, and logits equal the stock model's to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DenseGradient:
    """Sums the dense weight gradients of a layer's micro-batches, in float32 or wider."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Add one micro-batch's gradient, of the weight's shape."""
        gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        self.total = gradient.clone() if self.total is None else self.total.add_(gradient)


class _MaskedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, sink: DenseGradient | None) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.sink = sink
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        if ctx.sink is not None:
            ctx.sink.add(gradient)
        # where, not *: an infinite gradient of an inactive weight must not become nan
        return torch.where(mask, gradient, 0), None, None


def masked_weight(weight: Tensor, mask: Tensor, sink: DenseGradient | None = None) -> Tensor:
    """`weight` itself, whose gradient arrives masked.

    Args:
        weight: parameter of any shape, exactly 0 where `mask` is 0.
        mask: bool tensor of the same shape.
        sink: collects the gradient before masking, when given.

    Returns:
        A view of `weight`. What reaches `weight.grad` is 0 wherever `mask` is.
    """
    masked: Tensor = _MaskedGradient.apply(weight, mask, sink)
    return masked
