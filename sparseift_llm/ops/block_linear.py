"""y = x W^T + bias for a block-sparse W, as a custom operator with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseift_llm.ops.eager import Gradient, Operator
from sparseift_llm.ops.kernels.choice import kernel_for
from sparseift_llm.ops.operands import check_operands, refuse_second_derivatives


def _block_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    by_column: list[Tensor],
    out_features: int,
) -> Tensor:
    """x (T, in), weight (N, b, b), bias (out,) and the tables of `TileIndex.index` -> (T, out)."""
    check_operands((x, weight, bias), (columns, *by_column))
    return kernel_for(x, weight, out_features, x.shape[1]).forward(x, weight, bias, columns, out_features)


block_linear_op = torch.library.custom_op("sparseift::block_linear", _block_linear, mutates_args=())


@block_linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    by_column: list[Tensor],
    out_features: int,
) -> Tensor:
    check_operands((x, weight, bias), (columns, *by_column))
    return x.new_empty(x.shape[0], out_features)


def _block_input_gradient(grad: Tensor, weight: Tensor, by_column: list[Tensor], in_features: int) -> Tensor:
    """grad (T, out), weight (N, b, b) -> (T, in)."""
    check_operands((grad, weight), by_column)
    kernel = kernel_for(grad, weight, grad.shape[1], in_features)
    return kernel.input_gradient(grad, weight, by_column, grad.shape[1], in_features)


block_input_gradient_op = torch.library.custom_op(
    "sparseift::block_input_gradient", _block_input_gradient, mutates_args=()
)


@block_input_gradient_op.register_fake
def _(grad: Tensor, weight: Tensor, by_column: list[Tensor], in_features: int) -> Tensor:
    check_operands((grad, weight), by_column)
    return grad.new_empty(grad.shape[0], in_features)


def _block_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """grad (T, out), x (T, in) -> the gradient of weight (N, b, b)."""
    check_operands((grad, x, weight), (columns,))
    kernel = kernel_for(grad, weight, grad.shape[1], x.shape[1])
    return kernel.weight_gradient(grad, x, columns, weight.shape[1])


block_weight_gradient_op = torch.library.custom_op(
    "sparseift::block_weight_gradient", _block_weight_gradient, mutates_args=()
)


@block_weight_gradient_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    check_operands((grad, x, weight), (columns,))
    return weight.new_empty(weight.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, columns, by_column, _ = inputs
    ctx.save_for_backward(x, weight, columns, *by_column)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, columns, *by_column = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x = grad_weight = grad_bias = None
    if needs_x:
        grad_x = Gradient(block_input_gradient_op, _block_input_gradient)(grad, weight, by_column, x.shape[1])
    if needs_weight:
        grad_weight = Gradient(block_weight_gradient_op, _block_weight_gradient)(grad, x, weight, columns)
    if ctx.has_bias and needs_bias:
        grad_bias = grad.sum(0)
    return grad_x, grad_weight, grad_bias, None, [None] * len(by_column), None


torch.library.register_autograd("sparseift::block_linear", _backward, setup_context=_save_for_backward)
for _gradient in ("block_input_gradient", "block_weight_gradient"):
    torch.library.register_autograd(f"sparseift::{_gradient}", refuse_second_derivatives)
block_linear = Operator(block_linear_op, _block_linear, _save_for_backward, _backward)
