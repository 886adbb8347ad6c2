"""What the block-sparse operators are given: brought to one dtype under autocast, and checked.

The kernels behind the operators read memory by pointer, and know no derivatives but their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def check_operands(values: Iterable[Tensor | None], indices: Iterable[Tensor]) -> None:
    """Check the dtypes and devices of an operator's operands.

    A kernel would read memory of another dtype as what it expects. A custom operator with one operand on the meta
    device would compute nothing and return memory that nobody wrote.

    Args:
        values: activations, weights and biases; None stands for a bias that does not exist.
        indices: where the tiles are.

    Raises:
        ValueError: the values have several dtypes, an index is not int32, or they are on several devices.
    """
    operands, numbers = [tensor for tensor in values if tensor is not None], list(indices)
    if any(tensor.dtype != operands[0].dtype for tensor in operands):
        found = ", ".join(str(tensor.dtype) for tensor in operands)
        raise ValueError(f"input, weight and bias must have one dtype, got {found}; convert them, or use autocast")
    if any(tensor.dtype != torch.int32 for tensor in numbers):
        raise ValueError("a block-sparse layer's indices are no longer int32; change its dtype with `to`, not `type`")
    everything = (*operands, *numbers)
    if any(tensor.device != operands[0].device for tensor in everything):
        found = ", ".join(dict.fromkeys(str(tensor.device) for tensor in everything))
        raise ValueError(
            f"input, weight, bias and indices must be on one device, got {found}; move the whole model, and if it is "
            "offloaded, offload whole MLPs, not their projections (accelerate: preload_module_classes)"
        )


def autocast_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in the dtype of autocast where it is on, as `nn.functional.linear` would have them."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError if a tensor carries a tangent, which a custom operator would drop without a word."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "block-sparse layers have no forward-mode derivatives (torch.func.jvp); differentiate with backward()"
            )


def refuse_second_derivatives(ctx: Any, *_: Any) -> None:
    """The backward pass of an operator that is a gradient itself. Raises NotImplementedError, naming the way out."""
    raise NotImplementedError(
        "block-sparse layers have no second derivatives: a gradient that was taken with create_graph=True went through "
        "one and is differentiated again. Use structure='unstructured', whose layers have them, or to_dense(model)"
    )


def call_operator(operator: Callable[..., Any], *operands: Any, **options: Any) -> Any:
    """Call a custom operator; where torch.func cannot transform it, the error names the way out."""
    if torch.compiler.is_compiling():
        return operator(*operands, **options)
    try:
        return operator(*operands, **options)
    except RuntimeError as error:
        if "functorch transforms" not in str(error):
            raise
        raise NotImplementedError(
            "block-sparse layers cannot be transformed by torch.func (grad, vjp, jacrev, ...): differentiate with "
            "backward() or torch.autograd.grad, or use structure='unstructured' or to_dense(model)"
        ) from error
