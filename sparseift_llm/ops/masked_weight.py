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
    generate_vmap_rule = True  # for gradients per sequence, vmap(grad(loss))

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, sink: DenseGradient | None, leaf: Tensor | None) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, DenseGradient | None, Tensor | None], output: Tensor
    ) -> None:
        _, mask, sink, leaf = inputs
        ctx.sink = sink if leaf is not None else None
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        (mask,) = ctx.saved_tensors
        dense = None
        if ctx.sink is not None:
            ctx.sink.forget_thrown_away()
            dense = gradient.detach()
            mask = mask | ~dense.isfinite()  # a gradient scaler must see what overflowed, and skip the step
        # where, not *: an infinite gradient of an inactive weight must not become nan
        return torch.where(mask, gradient, 0), None, None, dense


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
    leaf = sink.leaf(mask.shape, weight) if sink is not None and weight.requires_grad else None
    masked: Tensor = _MaskedGradient.apply(weight, mask, sink, leaf)
    return masked
