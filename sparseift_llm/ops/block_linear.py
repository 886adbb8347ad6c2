"""y = x W^T + bias, or gelu(x) W^T + bias, for a block-sparse W, as a custom operator with gradients; picks the kernel.

The kernels are in block_native.py (CPU), block_blas.py (CPU without a compiler), block_triton.py (GPU)
and block_reference.py (anywhere). All arguments are explained there.
"""

from __future__ import annotations

import os
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseift_llm.ops import block_blas, block_native, block_reference, block_triton
from sparseift_llm.strict import check_choice

KERNELS = {"native": block_native, "blas": block_blas, "triton": block_triton, "reference": block_reference}
ENVIRONMENT_VARIABLE = "SPARSEIFT_BLOCK_KERNEL"
_SMALLEST_FAST_BLOCK = {"native": 16, "blas": 64, "triton": 16}
_forced: str | None = None
_warned: set[tuple[Any, ...]] = set()


def use_block_kernel(name: str | None) -> None:
    """Force a kernel for all block-sparse layers: native, blas, triton or reference; None: choose by device and shape.

    The environment variable SPARSEIFT_BLOCK_KERNEL does the same.

    Raises:
        ValueError: another name.
    """
    global _forced
    if name is not None:
        check_choice("block kernel", name, tuple(KERNELS))
    _forced = name


def kernel_name(device: str, dtype: torch.dtype, block_size: int) -> str:
    """The kernel that products of these operands run on: the forced one, or the fastest that supports them."""
    forced = _forced_kernel()
    if forced:
        check_choice(ENVIRONMENT_VARIABLE, forced, tuple(KERNELS))
        return forced
    if device == "cpu":
        return "native" if dtype in block_native.DTYPES and block_native.is_available() else "blas"
    is_triton_dtype = dtype in (torch.float32, torch.bfloat16, torch.float16)
    if device == "cuda" and block_size >= 16 and is_triton_dtype and block_triton.is_available():
        return "triton"
    return "reference"


def _forced_kernel() -> str | None:
    return _forced or os.environ.get(ENVIRONMENT_VARIABLE)


def _kernel(x: Tensor, weight: Tensor, out_features: int, in_features: int) -> ModuleType:
    device, size = x.device.type, weight.shape[1]
    name = kernel_name(device, x.dtype, size)
    shape = (name, device, x.dtype, size, in_features, out_features)
    if size < _SMALLEST_FAST_BLOCK.get(name, 1 << 30) and shape not in _warned and not _forced_kernel():
        _warned.add(shape)
        warnings.warn(
            f"block-sparse {in_features}->{out_features} with {size}x{size} tiles in {x.dtype} on {device} runs on the "
            f"{name!r} kernel, which can be slower than a masked dense layer; use larger tiles (block_size), or on a "
            "GPU install triton, on a CPU a C++ compiler",
            stacklevel=2,
        )
    return KERNELS[name]


@torch.library.custom_op("sparseift::block_linear", mutates_args=())
def block_linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    slots_by_column: Tensor,
    column_starts: Tensor,
    out_features: int,
    gelu: bool,
) -> Tensor:
    """x (T, in), or gelu(x), weight (N, b, b), bias (out,) -> (T, out)."""
    if not x.dtype == weight.dtype == (x.dtype if bias is None else bias.dtype):
        found = [str(tensor.dtype) for tensor in (x, weight, bias) if tensor is not None]
        raise ValueError(
            f"input, weight and bias must have one dtype, got {', '.join(found)}; convert them, or use autocast"
        )
    kernel = _kernel(x, weight, out_features, x.shape[1])
    if not gelu:
        return kernel.forward(x, weight, bias, columns, out_features)
    if kernel is block_native:
        return block_native.forward(x, weight, bias, columns, out_features, gelu=True)
    return kernel.forward(F.gelu(x, approximate="tanh"), weight, bias, columns, out_features)


@block_linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    slots_by_column: Tensor,
    column_starts: Tensor,
    out_features: int,
    gelu: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op("sparseift::block_input_gradient", mutates_args=())
def block_input_gradient_op(
    grad: Tensor,
    weight: Tensor,
    slots_by_column: Tensor,
    column_starts: Tensor,
    in_features: int,
    before_gelu: Tensor | None,
) -> Tensor:
    """grad (T, out), weight (N, b, b) -> (T, in); with `before_gelu` (T, in) through gelu as well."""
    assert grad.dtype == weight.dtype
    kernel = _kernel(grad, weight, grad.shape[1], in_features)
    arguments = (grad, weight, slots_by_column, column_starts, grad.shape[1], in_features)
    if before_gelu is None:
        return kernel.input_gradient(*arguments)
    if kernel is block_native:
        return block_native.input_gradient(*arguments, before_gelu=before_gelu)
    return torch.ops.aten.gelu_backward(kernel.input_gradient(*arguments), before_gelu, approximate="tanh")


@block_input_gradient_op.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    slots_by_column: Tensor,
    column_starts: Tensor,
    in_features: int,
    before_gelu: Tensor | None,
) -> Tensor:
    return grad.new_empty(grad.shape[0], in_features)


@torch.library.custom_op("sparseift::block_weight_gradient", mutates_args=())
def block_weight_gradient_op(grad: Tensor, x: Tensor, weight: Tensor, columns: Tensor, gelu: bool) -> Tensor:
    """grad (T, out), x (T, in), or gelu(x) -> the gradient of weight (N, b, b)."""
    assert grad.dtype == x.dtype
    kernel = _kernel(grad, weight, grad.shape[1], x.shape[1])
    if not gelu:
        return kernel.weight_gradient(grad, x, columns, weight.shape[1])
    if kernel is block_native:
        return block_native.weight_gradient(grad, x, columns, weight.shape[1], gelu=True)
    return kernel.weight_gradient(grad, F.gelu(x, approximate="tanh"), columns, weight.shape[1])


@block_weight_gradient_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, columns: Tensor, gelu: bool) -> Tensor:
    return weight.new_empty(weight.shape, dtype=x.dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, columns, slots_by_column, column_starts, _, gelu = inputs
    ctx.save_for_backward(x, weight, columns, slots_by_column, column_starts)
    ctx.has_bias, ctx.gelu = bias is not None, gelu


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, columns, slots_by_column, column_starts = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x = grad_weight = grad_bias = None
    if needs_x:
        before_gelu = x if ctx.gelu else None
        grad_x = block_input_gradient_op(grad, weight, slots_by_column, column_starts, x.shape[1], before_gelu)
    if needs_weight:
        grad_weight = block_weight_gradient_op(grad, x, weight, columns, ctx.gelu)
    if ctx.has_bias and needs_bias:
        grad_bias = grad.sum(0)
    return grad_x, grad_weight, grad_bias, None, None, None, None, None


torch.library.register_autograd("sparseift::block_linear", _backward, setup_context=_save_for_backward)
