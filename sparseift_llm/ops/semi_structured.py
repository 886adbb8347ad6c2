"""Products with 2:4 matrices on the semi-structured kernels of torch, which skip the zeros on NVIDIA GPUs.

What runs where: the output is computed on those kernels, from a weight that is compressed first. The kernels want the
zeros along the side that is summed over, and in the gradient of the input that is the other side. So this gradient is
computed on them if the mask is 2:4 along both sides, from the transposed weight, which is compressed in turn; otherwise
it is a dense product. The gradient of the weight always is one. It is masked where the weight comes from
(masked_weight.py).

Source: https://docs.pytorch.org/docs/stable/sparse.html, "Sparse Semi-Structured Tensors".
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PATTERN = (2, 4)
DTYPES = (torch.float16, torch.bfloat16)
MIN_CAPABILITY = (8, 0)
SIDE_MULTIPLE = 16  # of both sides, as cuSPARSELt asks


def check_pattern(pattern: tuple[int, int], shape: tuple[int, int]) -> None:
    """Refuse matrices that the kernels do not know, whatever the device.

    Args:
        pattern: (n, m).
        shape: (out, in).

    Raises:
        ValueError: another pattern than 2:4, or sides that are not multiples of 16.
    """
    if pattern != PATTERN:
        raise ValueError(
            f"the semi-structured kernels know the pattern 2:4 alone, not {pattern[0]}:{pattern[1]}; make the model "
            "with structure='2:4', or run it dense, with its zeros, as it is"
        )
    if any(side % SIDE_MULTIPLE for side in shape):
        raise ValueError(
            f"the semi-structured kernels need sides that are multiples of {SIDE_MULTIPLE}, not {shape[0]} x "
            f"{shape[1]}; make the model with width_multiple={SIDE_MULTIPLE}, or run it dense, with its zeros, as it is"
        )


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse devices and dtypes without these kernels.

    Args:
        device: of the operands.
        dtype: of the product; under autocast that of autocast.

    Raises:
        ValueError: not a CUDA device of compute capability 8.0 or more, or neither float16 nor bfloat16.
    """
    if device.type != "cuda":
        raise ValueError(
            f"the semi-structured kernels need an NVIDIA GPU, and the model is on {device.type}; move it with "
            "model.to('cuda'), or run it dense, with its zeros, as it is"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise ValueError(
            f"the semi-structured kernels need compute capability 8.0 (Ampere) or more, and "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; run the model dense, as it is"
        )
    if dtype not in DTYPES:
        raise ValueError(
            f"the semi-structured kernels compute in float16 or bfloat16, not in {str(dtype).removeprefix('torch.')}; "
            "use model.to(torch.bfloat16), or in training autocast to bfloat16"
        )


def compress(weight: Tensor) -> Tensor:
    """The weight as the kernels read it: half of its values, and where they stand.

    Args:
        weight: (out, in) on a device and in a dtype that `check_device` takes, at most 2 of 4 neighbours not 0.

    Returns:
        A tensor of torch's class for such matrices, which `F.linear` takes.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor", category=UserWarning)
        return torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())


def compressed_linear(x: Tensor, compressed: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) and what `compress` gave of (out, in) -> (..., out), contiguous; bias is (out,) or None."""
    y = F.linear(x.reshape(-1, x.shape[-1]).contiguous(), compressed, bias)
    return y.contiguous().view(*x.shape[:-1], compressed.shape[0])


@torch.library.custom_op("sparseift::semi_structured_product", mutates_args=())
def _opaque_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `_product` computes, for torch.compile, which cannot look into compressed tensors."""
    check_device(x.device, x.dtype)
    return compressed_linear(x, compress(weight), bias)


@_opaque_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (T, in), a 2:4 matrix (out, in) with its zeros, bias (out,) or None -> (T, out), on the kernels."""
    if torch.compiler.is_compiling():
        return _opaque_product(x, weight, bias)
    return compressed_linear(x, compress(weight), bias)


class _SemiStructuredLinear(torch.autograd.Function):
    """x (T, in), weight (out, in), bias (out,) or None -> (T, out), all of one dtype.

    `transposable` says that the weight is 2:4 along both sides.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposable: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposable = transposable
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = None
        if needs_x:
            grad_x = _product(gradient, weight.T, None) if ctx.transposable else gradient @ weight
        return grad_x, gradient.T @ x if needs_weight else None, gradient.sum(0) if needs_bias else None, None


def semi_structured_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, transposable: bool = False) -> Tensor:
    """`F.linear` on the semi-structured kernels, with a dense gradient of the weight; follows autocast as it does.

    Args:
        x: (..., in).
        weight: (out, in), a 2:4 matrix with its zeros.
        bias: (out,) or None.
        transposable: the weight is 2:4 along both sides, so that the gradient of `x` is computed on the kernels, too.

    Returns:
        (..., out).

    Raises:
        ValueError: as `check_pattern` and `check_device`.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    check_pattern(PATTERN, (weight.shape[0], weight.shape[1]))
    if not torch.compiler.is_compiling():
        check_device(x.device, dtype)
    if torch.is_autocast_enabled(kind):
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        y: Tensor = _SemiStructuredLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, transposable)
    return y.view(*x.shape[:-1], weight.shape[0])
