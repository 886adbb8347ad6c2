"""y = gelu(x U^T + bias) D^T + bias for block-sparse U and D, as a custom operator with gradients.

A widened activation is large: on a CPU it is never written to memory, and the backward pass computes it again. GELU is
the tanh formula.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseift_llm.ops.kernels.base import Tiles
from sparseift_llm.ops.kernels.choice import kernel_for
from sparseift_llm.ops.operands import check_operands, refuse_second_derivatives

gelu = partial(F.gelu, approximate="tanh")


@torch.library.custom_op("sparseift::block_feed_forward", mutates_args=())
def block_feed_forward_op(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    up_columns: Tensor,
    up_by_column: list[Tensor],
    hidden_features: int,
    down: Tensor,
    down_bias: Tensor | None,
    down_columns: Tensor,
    down_by_column: list[Tensor],
    out_features: int,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """x (T, in), up (N, b, b), up_bias (hidden,), down (M, b, b), down_bias (out,) -> (T, out), activation.

    The second result is the activation before GELU (T, hidden) if `keep_hidden`, else (0, hidden).
    """
    check_operands((x, up, up_bias, down, down_bias), (up_columns, *up_by_column, down_columns, *down_by_column))
    kernel = kernel_for(x, up, hidden_features, x.shape[1])
    if kernel.fused is not None and not keep_hidden:
        y = kernel.fused.forward(
            x, up, up_bias, up_columns, hidden_features, down, down_bias, down_columns, out_features
        )
        return y, x.new_empty(0, hidden_features)
    hidden = kernel.forward(x, up, up_bias, up_columns, hidden_features)
    y = kernel.forward(gelu(hidden), down, down_bias, down_columns, out_features)
    return y, hidden if keep_hidden else x.new_empty(0, hidden_features)


@block_feed_forward_op.register_fake
def _(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    up_columns: Tensor,
    up_by_column: list[Tensor],
    hidden_features: int,
    down: Tensor,
    down_bias: Tensor | None,
    down_columns: Tensor,
    down_by_column: list[Tensor],
    out_features: int,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    check_operands((x, up, up_bias, down, down_bias), (up_columns, *up_by_column, down_columns, *down_by_column))
    return x.new_empty(x.shape[0], out_features), x.new_empty(x.shape[0] if keep_hidden else 0, hidden_features)


@torch.library.custom_op("sparseift::block_feed_forward_gradient", mutates_args=())
def block_feed_forward_gradient_op(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    up_columns: Tensor,
    up_by_column: list[Tensor],
    down: Tensor,
    down_columns: Tensor,
    down_by_column: list[Tensor],
    needed: list[bool],
) -> list[Tensor]:
    """grad (T, out) and the forward pass's operands -> the gradients of x, up, up_bias and down.

    Args:
        hidden: the forward pass's second result.
        needed: which of the four are wanted; the others are returned empty.
    """
    up_tiles, down_tiles = (up, up_columns, up_by_column), (down, down_columns, down_by_column)
    check_operands((grad, x, hidden, up, up_bias, down), (up_columns, *up_by_column, down_columns, *down_by_column))
    kernel = kernel_for(x, up, hidden.shape[1], x.shape[1])
    if kernel.fused is not None and not len(hidden):
        gradients = kernel.fused.gradient(grad, x, up_tiles, up_bias, hidden.shape[1], down_tiles, needed)
    else:
        gradients = _composed_gradients(grad, x, hidden, up_tiles, up_bias, down_tiles, needed)
    return [x.new_empty(0) if gradient is None else gradient for gradient in gradients]


def _composed_gradients(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    up_tiles: Tiles,
    up_bias: Tensor | None,
    down_tiles: Tiles,
    needed: list[bool],
) -> list[Tensor | None]:
    (up, up_columns, up_by_column), (down, down_columns, down_by_column) = up_tiles, down_tiles
    features = hidden.shape[1]
    kernel = kernel_for(x, up, features, x.shape[1])
    if len(hidden) != len(x):
        hidden = kernel.forward(x, up, up_bias, up_columns, features)
    needs_x, needs_up, needs_bias, needs_down = needed
    grad_hidden = kernel.input_gradient(grad, down, down_by_column, grad.shape[1], features)
    grad_hidden = torch.ops.aten.gelu_backward(grad_hidden, hidden, approximate="tanh")
    return [
        kernel.input_gradient(grad_hidden, up, up_by_column, features, x.shape[1]) if needs_x else None,
        kernel.weight_gradient(grad_hidden, x, up_columns, up.shape[1]) if needs_up else None,
        grad_hidden.sum(0) if needs_bias else None,
        kernel.weight_gradient(grad, gelu(hidden), down_columns, down.shape[1]) if needs_down else None,
    ]


@block_feed_forward_gradient_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    up_columns: Tensor,
    up_by_column: list[Tensor],
    down: Tensor,
    down_columns: Tensor,
    down_by_column: list[Tensor],
    needed: list[bool],
) -> list[Tensor]:
    shapes = (x.shape, up.shape, hidden.shape[1:], down.shape)
    return [x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, needed, strict=True)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, up, up_bias, up_columns, up_by_column, _, down, down_bias, down_columns, down_by_column, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(
        x, output[1], up, up_bias, up_columns, down, down_columns, *up_by_column, *down_by_column
    )  # fmt: skip
    ctx.has_down_bias = down_bias is not None


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    needed = [needs[index] for index in (0, 1, 2, 6)]
    gradients: list[Tensor | None] = [None] * 4
    x, hidden, up, up_bias, up_columns, down, down_columns, *tables = ctx.saved_tensors
    half = len(tables) // 2
    if any(needed):
        found = block_feed_forward_gradient_op(
            grad, x, hidden, up, up_bias, up_columns, tables[:half], down, down_columns, tables[half:], needed
        )
        gradients = [gradient if wanted else None for gradient, wanted in zip(found, needed, strict=True)]
    grad_x, grad_up, grad_up_bias, grad_down = gradients
    grad_down_bias = grad.sum(0) if ctx.has_down_bias and needs[7] else None
    no_index = (None, [None] * half, None)
    return grad_x, grad_up, grad_up_bias, *no_index, grad_down, grad_down_bias, *no_index, None


torch.library.register_autograd("sparseift::block_feed_forward", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("sparseift::block_feed_forward_gradient", refuse_second_derivatives)
