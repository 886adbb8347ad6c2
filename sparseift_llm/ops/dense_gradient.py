"""`DenseGradient`: where a sparse layer's backward leaves the gradient of all its weights, zeros included."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from sparseift_llm.ops.block_lookup import sum_rows


class DenseGradient:
    """Sums the dense weight gradients of a layer's backward passes, in float32 or wider.

    Autograd itself delivers them. A layer gives its operations a `leaf`, a tensor of zeros of the dense weight's shape,
    and their backward returns the dense gradient as the gradient of that leaf. So exactly those passes count that also
    add to the weight's `.grad`: `autograd.grad`, and the products with a Hessian that second-order optimizers take
    through it, leave nothing here, and several uses of a layer in one loss arrive as one sum.

    Args:
        reduce: applied to the gradient at once, so that only its result is kept. Right only when
            one backward pass on one process makes up the whole optimizer step.

    Attributes:
        total: the sum so far, or what `reduce` made of it; None before the first backward pass.
        is_thrown_away: whether the gradients that `total` goes with have been thrown away since, for example by
            `zero_grad()`; None if nobody can tell.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        self.total: Tensor | None = None
        self.reduce = reduce
        self.is_thrown_away: Callable[[], bool] | None = None
        self._leaf: Tensor | None = None

    def leaf(self, shape: torch.Size, like: Tensor) -> Tensor | None:
        """What an operation takes as one more input, so that its dense gradient arrives here.

        Args:
            shape: of the dense gradient.
            like: a tensor of the weight's dtype, on its device.

        Returns:
            Zeros of `shape` that take no memory, or None where no gradient is recorded.
        """
        if not torch.is_grad_enabled():
            return None
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self._leaf is None or (self._leaf.dtype, self._leaf.device) != (dtype, like.device):
            leaf = torch.zeros((), dtype=dtype, device=like.device).expand(shape).requires_grad_()
            leaf.register_post_accumulate_grad_hook(partial(_deliver, ref(self)))
            self._leaf = leaf
        return self._leaf

    def forget_thrown_away(self) -> None:
        """Start again from nothing if the gradients that `total` goes with are gone."""
        if self.total is not None and self.is_thrown_away is not None and self.is_thrown_away():
            self.total = None

    def add(self, gradient: Tensor) -> None:
        """Add one backward pass's gradient, of the dense weight's shape.

        Raises:
            RuntimeError: a second gradient arrives although the first was reduced.
        """
        gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        if self.reduce is not None:
            if self.total is not None:
                raise RuntimeError(
                    "a second backward pass reached a sparse layer within one optimizer step, but the controller was "
                    "told micro_batches=1; give it the number of backward passes per step, or leave it out (in a "
                    "Trainer: SparseTrainingCallback(backward_passes=...)). If there was one pass only, a layer was "
                    "used twice under reentrant activation checkpointing: use use_reentrant=False"
                )
            self.total = self.reduce(gradient)
        else:
            self.total = gradient.clone() if self.total is None else self.total.add_(gradient)

    def __getstate__(self) -> dict[str, Any]:
        """Copies of a model get no gradients of the original's passes."""
        return {**vars(self), "_leaf": None, "is_thrown_away": None}


def _deliver(sink: ref[DenseGradient], leaf: Tensor) -> None:
    """Autograd has added to the leaf's gradient all that one backward pass had for it."""
    gradient, leaf.grad = leaf.grad, None
    target = sink()
    if target is not None and gradient is not None:
        target.add(gradient)


class _Capture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, sink: DenseGradient, leaf: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        ctx.mark_dirty(y)  # a view of it would be an output that models may not add to in place, as Falcon does
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, Tensor]:
        (x,) = ctx.saved_tensors
        ctx.sink.forget_thrown_away()
        if x.dtype == torch.float16:  # an entry of an inactive tile may overflow, which no gradient scaler would see
            gradient_t, x = gradient.T.float(), x.float()
        else:
            gradient_t = gradient.T
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            dense = gradient_t @ x
        return gradient, None, None, dense


def capture_dense_gradient(y: Tensor, x: Tensor, sink: DenseGradient) -> Tensor:
    """`y` itself; its backward pass gives the dense weight gradient of y = x W^T to `sink`.

    Args:
        y: (tokens, out), an intermediate result.
        x: (tokens, in), of the same dtype.
        sink: gets (out, in).
    """
    leaf = sink.leaf(torch.Size((y.shape[1], x.shape[1])), x)
    if leaf is None:
        return y
    captured: Tensor = _Capture.apply(y, x.detach(), sink, leaf)
    return captured


class _CaptureLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, ids: Tensor, padding_idx: int, sink: DenseGradient, leaf: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.num_rows, ctx.sink = padding_idx, len(leaf), sink
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, Tensor]:
        (ids,) = ctx.saved_tensors
        ctx.sink.forget_thrown_away()
        return gradient, None, None, None, sum_rows(gradient.detach(), ids, ctx.num_rows, ctx.padding_idx)


def capture_lookup_gradient(y: Tensor, ids: Tensor, num_rows: int, padding_idx: int, sink: DenseGradient) -> Tensor:
    """`y` itself; its backward pass gives the dense gradient of the matrix whose rows `ids` were looked up to `sink`.

    Args:
        y: (tokens, width), an intermediate result.
        ids: (tokens,).
        num_rows: of the matrix.
        padding_idx: the row that gets no gradient, or -1.
        sink: gets (num_rows, width).
    """
    leaf = sink.leaf(torch.Size((num_rows, y.shape[1])), y)
    if leaf is None:
        return y
    captured: Tensor = _CaptureLookup.apply(y, ids, padding_idx, sink, leaf)
    return captured
