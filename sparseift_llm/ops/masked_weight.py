"""The one autograd function of unstructured sparsity: identity forward, masked gradient backward.

It stands between the parameter and the stock matrix product, so that autocast, compilation and
checkpointing see ordinary operations, and logits equal the stock model's to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseift_llm.ops.dense_gradient import DenseGradient


class _MaskedGradient(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, mask: Tensor, sink: DenseGradient | None) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, DenseGradient | None], output: Tensor) -> None:
        _, mask, ctx.sink = inputs
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        if ctx.sink is not None:
            ctx.sink.add(gradient)
            mask = mask | ~gradient.isfinite()  # a gradient scaler must see what overflowed, and skip the step
        # where, not *: an infinite gradient of an inactive weight must not become nan
        return torch.where(mask, gradient, 0), None, None


def masked_weight(weight: Tensor, mask: Tensor, sink: DenseGradient | None = None) -> Tensor:
    """`weight` itself, whose gradient arrives masked.

    Args:
        weight: parameter of any shape, exactly 0 where `mask` is 0.
        mask: bool tensor of the same shape.
        sink: collects the gradient before masking, when given.

    Returns:
        A view of `weight`. What reaches `weight.grad` is 0 wherever `mask` is; with a sink, except for what is not
        finite.
    """
    masked: Tensor = _MaskedGradient.apply(weight, mask, sink)
    return masked
