"""y = down(f(up(x))), or down(f(gate(x)) * up(x)), for block-sparse projections, as a custom operator with gradients.

A widened activation is large, so what is kept of it until the backward pass is a setting (`keep_activations`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparseift_llm.ops.eager import Gradient, Operator
from sparseift_llm.ops.kernels.base import FeedForwardShape, FusedFeedForward, Kept, Projection
from sparseift_llm.ops.kernels.choice import kernel_for
from sparseift_llm.ops.kernels.composed import ComposedFeedForward
from sparseift_llm.ops.operands import check_operands, refuse_second_derivatives
from sparseift_llm.utils.words import check_choice

KEEP = ("nothing", "hidden", "all")
KEEP_VARIABLE = "SPARSEIFT_BLOCK_KEEP"
_keep: str | None = os.environ.get(KEEP_VARIABLE) or None


def keep_activations(keep: str | None) -> None:
    """Say what block-sparse feed-forward blocks keep in memory between their forward and their backward pass.

    The environment variable SPARSEIFT_BLOCK_KEEP does the same, if it is set before the first import.

    Args:
        keep: `nothing`: the up projection is computed again. `hidden`: what it gave, tokens * hidden * element size
            bytes per block, and as much for a gate; the activation is computed again, which costs one more write of it.
            `all`: the activation, too, as much again. None stands for `hidden`, except on a CPU with the GELU (tanh
            formula) and no gate. There it stands for `nothing`, with which no time is lost to single layers.

    Raises:
        ValueError: another word.
    """
    global _keep
    if keep is not None:
        check_choice("keep", keep, KEEP)
    _keep = keep


def kept_on(device: str, activation: str, is_gated: bool) -> str:
    """What is kept on a type of device for the backward pass of such a block.

    Raises:
        ValueError: SPARSEIFT_BLOCK_KEEP is another word than `keep_activations` takes.
    """
    if _keep is None:
        return "nothing" if device == "cpu" and activation == "gelu_tanh" and not is_gated else "hidden"
    check_choice(KEEP_VARIABLE, _keep, KEEP)
    return _keep


def _block_feed_forward(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    up_columns: Tensor,
    up_by_column: list[Tensor],
    gate: Tensor | None,
    gate_bias: Tensor | None,
    gate_columns: Tensor | None,
    gate_by_column: list[Tensor],
    down: Tensor,
    down_bias: Tensor | None,
    down_columns: Tensor,
    down_by_column: list[Tensor],
    hidden_features: int,
    out_features: int,
    activation: str,
    keep: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (T, in), weights and indices of the projections -> y (T, out), and what is kept for the backward pass.

    That is, see `Kept`, what up gives, what gate gives, and the activation: (T, hidden) where it is kept, else
    (0, hidden). Without a gate its four arguments are None, None, None and an empty list.
    """
    projections = (
        Projection(up, up_bias, up_columns, up_by_column),
        _gate(gate, gate_bias, gate_columns, gate_by_column),
        Projection(down, down_bias, down_columns, down_by_column),
    )
    _check((x,), projections)
    shape = FeedForwardShape(hidden_features, out_features, activation, gate is not None, keep)
    y, kept = _implementation(x, up, shape).forward(x, *projections, shape)
    nothing = [x.new_empty(0, hidden_features) if tensor is None else tensor for tensor in kept]
    return y, nothing[0], nothing[1], nothing[2]


block_feed_forward_op = torch.library.custom_op("sparseift::block_feed_forward", _block_feed_forward, mutates_args=())


@block_feed_forward_op.register_fake
def _(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    up_columns: Tensor,
    up_by_column: list[Tensor],
    gate: Tensor | None,
    gate_bias: Tensor | None,
    gate_columns: Tensor | None,
    gate_by_column: list[Tensor],
    down: Tensor,
    down_bias: Tensor | None,
    down_columns: Tensor,
    down_by_column: list[Tensor],
    hidden_features: int,
    out_features: int,
    activation: str,
    keep: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    projections = (
        Projection(up, up_bias, up_columns, up_by_column),
        _gate(gate, gate_bias, gate_columns, gate_by_column),
        Projection(down, down_bias, down_columns, down_by_column),
    )
    _check((x,), projections)
    kept = (keep != "nothing", keep != "nothing" and gate is not None, keep == "all")
    hidden, gate_hidden, active = (x.new_empty(x.shape[0] if is_kept else 0, hidden_features) for is_kept in kept)
    return x.new_empty(x.shape[0], out_features), hidden, gate_hidden, active


def _block_feed_forward_gradient(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    gate_hidden: Tensor,
    active: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    up_columns: Tensor,
    up_by_column: list[Tensor],
    gate: Tensor | None,
    gate_bias: Tensor | None,
    gate_columns: Tensor | None,
    gate_by_column: list[Tensor],
    down: Tensor,
    down_columns: Tensor,
    down_by_column: list[Tensor],
    activation: str,
    needed: list[bool],
) -> list[Tensor]:
    """grad (T, out) and the forward pass's operands -> the gradients of `FusedFeedForward.gradient`.

    Args:
        hidden, gate_hidden, active: what the forward pass kept.
        needed: which of the six are wanted; the others are returned empty.
    """
    projections = (
        Projection(up, up_bias, up_columns, up_by_column),
        _gate(gate, gate_bias, gate_columns, gate_by_column),
        Projection(down, None, down_columns, down_by_column),
    )
    _check((grad, x, hidden, gate_hidden, active), projections)
    kept = Kept(*(tensor if len(tensor) else None for tensor in (hidden, gate_hidden, active)))
    keep = "nothing" if kept.hidden is None else "hidden" if kept.active is None else "all"
    shape = FeedForwardShape(hidden.shape[1], grad.shape[1], activation, gate is not None, keep)
    gradients = _implementation(x, up, shape).gradient(grad, x, kept, *projections, shape, needed)
    return [x.new_empty(0) if gradient is None else gradient for gradient in gradients]


block_feed_forward_gradient_op = torch.library.custom_op(
    "sparseift::block_feed_forward_gradient", _block_feed_forward_gradient, mutates_args=()
)


@block_feed_forward_gradient_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    gate_hidden: Tensor,
    active: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    up_columns: Tensor,
    up_by_column: list[Tensor],
    gate: Tensor | None,
    gate_bias: Tensor | None,
    gate_columns: Tensor | None,
    gate_by_column: list[Tensor],
    down: Tensor,
    down_columns: Tensor,
    down_by_column: list[Tensor],
    activation: str,
    needed: list[bool],
) -> list[Tensor]:
    bias = hidden.shape[1:]
    shapes = (x.shape, up.shape, bias, (0,) if gate is None else gate.shape, bias, down.shape)
    return [x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, needed, strict=True)]


def _gate(
    weight: Tensor | None, bias: Tensor | None, columns: Tensor | None, by_column: Sequence[Tensor]
) -> Projection | None:
    return None if weight is None or columns is None else Projection(weight, bias, columns, by_column)


def _check(activations: Sequence[Tensor], projections: Sequence[Projection | None]) -> None:
    present = [projection for projection in projections if projection is not None]
    values = [tensor for projection in present for tensor in (projection.weight, projection.bias)]
    indices = [table for projection in present for table in (projection.columns, *projection.by_column)]
    check_operands((*activations, *values), indices)


def _implementation(x: Tensor, up: Tensor, shape: FeedForwardShape) -> FusedFeedForward:
    kernel = kernel_for(x, up, shape.hidden_features, x.shape[1])
    return kernel.fused if kernel.fused is not None and kernel.fused.supports(shape) else ComposedFeedForward(kernel)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *up, up_tables, gate, gate_bias, gate_columns, gate_tables, down, down_bias, down_columns, down_tables = inputs[
        :13
    ]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(
        x, *output[1:], *up, gate, gate_bias, gate_columns, down, down_columns, *up_tables, *down_tables, *gate_tables
    )
    ctx.num_tables, ctx.num_gate_tables, ctx.has_down_bias = len(up_tables), len(gate_tables), down_bias is not None
    ctx.activation = inputs[15]


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    needed = [needs[index] for index in (0, 1, 2, 5, 6, 9)]
    gradients: list[Tensor | None] = [None] * 6
    if any(needed):
        x, hidden, gate_hidden, active, *rest = ctx.saved_tensors
        up, gate, down, tables = rest[:3], rest[3:6], rest[6:8], rest[8:]
        end = 2 * ctx.num_tables
        found = Gradient(block_feed_forward_gradient_op, _block_feed_forward_gradient)(
            grad, x, hidden, gate_hidden, active, *up, tables[: end // 2], *gate, tables[end:],
            *down, tables[end // 2 : end], ctx.activation, needed,
        )  # fmt: skip
        gradients = [gradient if wanted else None for gradient, wanted in zip(found, needed, strict=True)]
    grad_x, grad_up, grad_up_bias, grad_gate, grad_gate_bias, grad_down = gradients
    grad_down_bias = grad.sum(0) if ctx.has_down_bias and needs[10] else None
    no_tables, no_gate_tables = [None] * ctx.num_tables, [None] * ctx.num_gate_tables
    return (
        grad_x, grad_up, grad_up_bias, None, no_tables, grad_gate, grad_gate_bias, None, no_gate_tables,
        grad_down, grad_down_bias, None, no_tables, None, None, None, None,
    )  # fmt: skip


torch.library.register_autograd("sparseift::block_feed_forward", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("sparseift::block_feed_forward_gradient", refuse_second_derivatives)
block_feed_forward = Operator(block_feed_forward_op, _block_feed_forward, _save_for_backward, _backward)
