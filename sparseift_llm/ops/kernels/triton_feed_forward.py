"""A feed-forward block on a GPU: its elementwise work is done at the end of the products, see triton_product.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseift_llm.ops.kernels.base import FeedForwardShape, FusedFeedForward, Kept, Projection
from sparseift_llm.ops.kernels.triton_launch import Epilogue, Operand, empty_token_sums, product, weight_gradient


class TritonFeedForward(FusedFeedForward):
    """up writes what it computes and the activation; the gradient of down's input passes the activation at once."""

    def supports(self, shape: FeedForwardShape) -> bool:
        """Always true."""
        return True

    def forward(
        self, x: Tensor, up: Projection, gate: Projection | None, down: Projection, shape: FeedForwardShape
    ) -> tuple[Tensor, Kept]:
        """As `FusedFeedForward.forward`."""
        width = shape.hidden_features
        hidden = None if shape.keep == "nothing" else _like(x, width)
        gate_hidden = None if gate is None else _of(gate, x, width)
        active = _of(up, x, width, Epilogue(shape.activation, hidden, gate_hidden))
        y = _of(down, active, shape.out_features)
        if shape.keep == "nothing":
            return y, Kept(None, None, None)
        return y, Kept(hidden, gate_hidden, active if shape.keep == "all" else None)

    def gradient(
        self,
        grad: Tensor,
        x: Tensor,
        kept: Kept,
        up: Projection,
        gate: Projection | None,
        down: Projection,
        shape: FeedForwardShape,
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """As `FusedFeedForward.gradient`."""
        width, tokens, size = shape.hidden_features, len(x), up.weight.shape[1]
        needs_x, needs_up, needs_up_bias, needs_gate, needs_gate_bias, needs_down = needed
        hidden, gate_hidden, active = kept
        if hidden is None:
            hidden = _of(up, x, width)
            gate_hidden = None if gate is None else _of(gate, x, width)
        epilogue = Epilogue(
            shape.activation,
            hidden,
            gate_hidden,
            grad_gate=None if gate is None else _like(x, width),
            active=_like(x, width) if active is None and needs_down else None,
            sums=empty_token_sums(tokens, width, x.device) if needs_up_bias else None,
            gate_sums=empty_token_sums(tokens, width, x.device) if needs_gate_bias else None,
        )
        of_active = Operand.transposed(grad, down.weight, down.by_column)
        grad_hidden = product(of_active, None, shape.out_features, width, epilogue)
        active, grad_gate = epilogue.active if active is None else active, epilogue.grad_gate
        grad_x = None
        if needs_x:
            second = None
            if gate is not None and grad_gate is not None:
                second = Operand.transposed(grad_gate, gate.weight, gate.by_column)
            of_x = Operand.transposed(grad_hidden, up.weight, up.by_column)
            grad_x = product(of_x, None, width, x.shape[1], second=second)
        grad_gate_weight = None
        if needs_gate and gate is not None and grad_gate is not None:
            grad_gate_weight = weight_gradient(grad_gate, x, gate.columns, size)
        return [
            grad_x,
            weight_gradient(grad_hidden, x, up.columns, size) if needs_up else None,
            _total(epilogue.sums, x.dtype),
            grad_gate_weight,
            _total(epilogue.gate_sums, x.dtype),
            weight_gradient(grad, active, down.columns, size) if active is not None and needs_down else None,
        ]


def _of(projection: Projection, x: Tensor, width: int, epilogue: Epilogue | None = None) -> Tensor:
    return product(Operand(x, projection.weight, projection.columns), projection.bias, width, width, epilogue)


def _like(x: Tensor, width: int) -> Tensor:
    return torch.empty((len(x), width), dtype=x.dtype, device=x.device)


def _total(sums: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if sums is None else sums.sum(0).to(dtype)
