"""What a kernel of block-sparse products is: the protocol that the four implementations beside this file follow.

How one of them is chosen is in choice.py. Legend: T is the number of tokens, b the side of a tile and N the number of
stored tiles ("slots"), which are grouped by block-row (see topology/blocks.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Projection(NamedTuple):
    """A block-sparse linear map.

    Attributes:
        weight: the tiles (N, b, b), each (out, in).
        bias: (out,) or None.
        columns: the block-column of every tile, int32 (N,).
        by_column: the four tables of `topology.blocks.ByColumn`.
    """

    weight: Tensor
    bias: Tensor | None
    columns: Tensor
    by_column: Sequence[Tensor]


class FeedForwardShape(NamedTuple):
    """What a feed-forward block is, but for its weights.

    Attributes:
        hidden_features: rows of up and gate, columns of down.
        out_features: rows of down.
        activation: a name of `ops.activations.ACTIVATIONS`.
        is_gated: whether there is a gate.
        keep: what stays in memory until the backward pass, see `Kept`: `nothing`, `hidden` (all but the activation) or
            `all`.
    """

    hidden_features: int
    out_features: int
    activation: str
    is_gated: bool
    keep: str


class Kept(NamedTuple):
    """What a forward pass keeps for the backward pass, each (T, hidden); what is None is computed again there.

    Attributes:
        hidden: what up gave.
        gate: what gate gave.
        active: the activation that entered down.
    """

    hidden: Tensor | None
    gate: Tensor | None
    active: Tensor | None


class FusedFeedForward(Protocol):
    """down(f(up(x))), or with a gate down(f(gate(x)) * up(x)), computed as one.

    The activation of a widened FFN is its largest tensor. A kernel offers this when it can do without the passes over
    memory that separate operators make: without the activation itself, if it stays in cache, or without the passes
    between the products. Otherwise `ComposedFeedForward` calls the kernel's products and torch's activation.
    """

    def supports(self, shape: FeedForwardShape) -> bool:
        """Whether there is code for such a block."""
        ...

    def forward(
        self, x: Tensor, up: Projection, gate: Projection | None, down: Projection, shape: FeedForwardShape
    ) -> tuple[Tensor, Kept]:
        """The block for x (T, in): y (T, out), and what `shape.keep` asks for."""
        ...

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
        """The gradients of x and of the weights and biases of up and gate, and of the weight of down.

        Args:
            grad: (T, out), the gradient of y.
            x: (T, in), as in `forward`.
            kept: what `forward` returned.
            up: as in `forward`, and so are the others.
            gate: as in `forward`.
            down: as in `forward`.
            shape: as in `forward`.
            needed: which of the six are wanted: x, up's weight and bias, gate's weight and bias, down's weight.

        Returns:
            The six gradients, with None for those that are not wanted.
        """
        ...


class Kernel(Protocol):
    """The three products that training a linear layer with a block-sparse weight W takes, on one kind of hardware.

    It is cut here for three reasons. First, the three products are all that differs between hardware: gradients,
    autocast, compilation, the capture of dense gradients and the storage of tiles exist once, above this line.
    Second, they take plain tensors and no layer, so that a kernel can be tested alone against a dense float64 product.
    Third, they are three functions and not one with flags because each needs another index: the forward product reads
    tiles row by row, the input gradient column by column, and the weight gradient visits each tile once.

    An implementation sums in float32 or wider, gives the same bits for the same call, and knows of no other one.

    Attributes:
        name: what `SPARSEIFT_BLOCK_KERNEL` takes.
        dtypes: what it has code for; None stands for every floating dtype.
        smallest_fast_tile: the smallest side of a tile with which it is known to be faster than a dense product with
            zeros; None if it never is.
        remedy: what a user can do where it is not available.
        fused: a feed-forward block in one pass, or None.
    """

    @property
    def name(self) -> str: ...

    @property
    def dtypes(self) -> tuple[torch.dtype, ...] | None: ...

    @property
    def smallest_fast_tile(self) -> int | None: ...

    @property
    def remedy(self) -> str: ...

    @property
    def fused(self) -> FusedFeedForward | None: ...

    def is_available(self) -> bool:
        """Whether it can run on this machine, as far as compilers and libraries go."""
        ...

    def supports(self, device: str, dtype: torch.dtype, block_size: int) -> bool:
        """Whether it has code for tiles of this side and dtype on this type of device."""
        ...

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, out_features: int) -> Tensor:
        """x @ W.T + bias.

        Args:
            x: (T, in), with any row stride.
            weight: the tiles (N, b, b) of W, each (out, in).
            bias: (out,) or None.
            columns: the block-column of every tile, int32 (N,).
            out_features: rows of W, a multiple of b.

        Returns:
            (T, out_features), in the dtype of x.
        """
        ...

    def input_gradient(
        self, grad: Tensor, weight: Tensor, by_column: Sequence[Tensor], out_features: int, in_features: int
    ) -> Tensor:
        """grad @ W.

        Args:
            grad: (T, out_features), with any row stride.
            weight: the tiles (N, b, b) of W, each (out, in).
            by_column: the four tables of `topology.blocks.ByColumn`.
            out_features: rows of W, a multiple of b.
            in_features: columns of W, a multiple of b.

        Returns:
            (T, in_features), in the dtype of grad; 0 where a block-column has no tile.
        """
        ...

    def weight_gradient(self, grad: Tensor, x: Tensor, columns: Tensor, block_size: int) -> Tensor:
        """The stored tiles of grad.T @ x.

        Args:
            grad: (T, out), with any row stride.
            x: (T, in), with any row stride.
            columns: the block-column of every tile, int32 (N,).
            block_size: b.

        Returns:
            (N, b, b), in the dtype of x.
        """
        ...
