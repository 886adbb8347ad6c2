"""A feed-forward block from the three products of a kernel and torch's activation, one after the other.

For kernels without code of their own for the whole block, or for its activation. It holds what it computes whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparseift_llm.ops.activations import activation_named
from sparseift_llm.ops.kernels.base import FeedForwardShape, FusedFeedForward, Kept, Kernel, Projection


@dataclass(frozen=True)
class ComposedFeedForward(FusedFeedForward):
    """The block on one kernel."""

    kernel: Kernel

    def supports(self, shape: FeedForwardShape) -> bool:
        """Always true."""
        return True

    def forward(
        self, x: Tensor, up: Projection, gate: Projection | None, down: Projection, shape: FeedForwardShape
    ) -> tuple[Tensor, Kept]:
        """As `FusedFeedForward.forward`."""
        hidden, gate_hidden, active = self._active(x, up, gate, shape)
        y = self.kernel.forward(active, down.weight, down.bias, down.columns, shape.out_features)
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
        hidden, gate_hidden, active = kept
        function = activation_named(shape.activation)
        if hidden is None:
            hidden, gate_hidden, active = self._active(x, up, gate, shape)
        needs_x, needs_up, needs_up_bias, needs_gate, needs_gate_bias, needs_down = needed
        grad_active = self.kernel.input_gradient(
            grad, down.weight, down.by_column, shape.out_features, shape.hidden_features
        )
        if gate is None or gate_hidden is None:
            grad_hidden, grad_gate = function.backward(grad_active, hidden), None
        else:
            grad_hidden = grad_active * function.value(gate_hidden)
            grad_gate = function.backward(grad_active * hidden, gate_hidden)
        if active is None and needs_down:
            active = function.value(hidden) if gate_hidden is None else function.value(gate_hidden) * hidden
        grad_x = None
        if needs_x:
            grad_x = self._input_gradient(grad_hidden, up, x.shape[1])
            if gate is not None and grad_gate is not None:
                grad_x = grad_x + self._input_gradient(grad_gate, gate, x.shape[1])
        size = up.weight.shape[1]
        return [
            grad_x,
            self.kernel.weight_gradient(grad_hidden, x, up.columns, size) if needs_up else None,
            grad_hidden.sum(0) if needs_up_bias else None,
            self.kernel.weight_gradient(grad_gate, x, gate.columns, size)
            if gate is not None and grad_gate is not None and needs_gate
            else None,
            grad_gate.sum(0) if grad_gate is not None and needs_gate_bias else None,
            self.kernel.weight_gradient(grad, active, down.columns, size)
            if active is not None and needs_down
            else None,
        ]

    def _active(
        self, x: Tensor, up: Projection, gate: Projection | None, shape: FeedForwardShape
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """What up gives, what gate gives, and the activation that enters down."""
        function = activation_named(shape.activation)
        hidden = self.kernel.forward(x, up.weight, up.bias, up.columns, shape.hidden_features)
        if gate is None:
            return hidden, None, function.value(hidden)
        gate_hidden = self.kernel.forward(x, gate.weight, gate.bias, gate.columns, shape.hidden_features)
        return hidden, gate_hidden, function.value(gate_hidden) * hidden

    def _input_gradient(self, grad: Tensor, projection: Projection, in_features: int) -> Tensor:
        return self.kernel.input_gradient(grad, projection.weight, projection.by_column, grad.shape[1], in_features)
