"""`DenseGradient`: where a sparse layer's backward leaves the gradient of all its weights, zeros included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DenseGradient:
    """Sums the dense weight gradients of a layer's micro-batches, in float32 or wider.

    Args:
        reduce: applied to the gradient at once, so that only its result is kept. Right only when
            one backward pass on one process makes up the whole optimizer step.

    Attributes:
        total: the sum so far, or what `reduce` made of it; None before the first backward pass.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        self.total: Tensor | None = None
        self.reduce = reduce

    def add(self, gradient: Tensor) -> None:
        """Add one micro-batch's gradient, of the dense weight's shape.

        Raises:
            RuntimeError: a second gradient arrives although the first was reduced.
        """
        gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        if self.reduce is not None:
            if self.total is not None:
                raise RuntimeError(
                    "a second backward pass reached a sparse layer within one optimizer step, but the controller was "
                    "told micro_batches=1; give it the number of backward passes per step, or leave it out"
                )
            self.total = self.reduce(gradient)
        else:
            self.total = gradient.clone() if self.total is None else self.total.add_(gradient)


class _Capture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, sink: DenseGradient) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        ctx.mark_dirty(y)  # a view of it would be an output that models may not add to in place, as Falcon does
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        if x.dtype == torch.float16:  # an entry of an inactive tile may overflow, which no gradient scaler would see
            gradient_t, x = gradient.T.float(), x.float()
        else:
            gradient_t = gradient.T
        with torch.autocast(x.device.type, enabled=False):
            ctx.sink.add(gradient_t @ x)
        return gradient, None, None


def capture_dense_gradient(y: Tensor, x: Tensor, sink: DenseGradient) -> Tensor:
    """`y` itself; its backward pass adds the dense weight gradient of y = x W^T to `sink`.

    Args:
        y: (tokens, out), an intermediate result.
        x: (tokens, in), of the same dtype.
        sink: gets (out, in).
    """
    captured: Tensor = _Capture.apply(y, x.detach(), sink)
    return captured
