"""What a kernel of block-sparse products is: the protocol that the four implementations beside this file follow.

How one of them is chosen is in choice.py. Legend: T is the number of tokens, b the side of a tile and N the number of
stored tiles ("slots"), which are grouped by block-row (see topology/blocks.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Tiles = tuple[Tensor, Tensor, Sequence[Tensor]]  # weight, columns and the tables of `topology.blocks.ByColumn`


class FusedFeedForward(Protocol):
    """Two block-sparse products with a GELU (tanh formula) between them, in one pass over the tokens.

    A kernel offers this when it can keep the activation between the products in cache: the activation of a widened
    FFN is its largest tensor, and is then never written to memory. Without it, the operator calls the kernel's three
    products and torch's GELU one after the other.
    """

    def forward(
        self,
        x: Tensor,
        up: Tensor,
        up_bias: Tensor | None,
        up_columns: Tensor,
        hidden_features: int,
        down: Tensor,
        down_bias: Tensor | None,
        down_columns: Tensor,
        out_features: int,
    ) -> Tensor:
        """gelu(x @ U.T + up_bias) @ D.T + down_bias.

        Args:
            x: (T, in).
            up: the tiles (N, b, b) of U (hidden, in), each (out, in).
            up_bias: (hidden,) or None.
            up_columns: the block-column of every tile of U, int32 (N,).
            hidden_features: rows of U and columns of D.
            down: the tiles (M, b, b) of D (out, hidden).
            down_bias: (out,) or None.
            down_columns: the block-column of every tile of D, int32 (M,).
            out_features: rows of D.

        Returns:
            (T, out).
        """
        ...

    def gradient(
        self,
        grad: Tensor,
        x: Tensor,
        up_tiles: Tiles,
        up_bias: Tensor | None,
        hidden_features: int,
        down_tiles: Tiles,
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients of x, up, up_bias and down; the activation is computed again.

        Args:
            grad: (T, out), the gradient of what `forward` returned.
            x: (T, in), as in `forward`.
            up_tiles: (weight, columns, by_column) of U, see `Kernel`.
            up_bias: (hidden,) or None.
            hidden_features: rows of U and columns of D.
            down_tiles: the same three of D.
            needed: which of the four gradients are wanted.

        Returns:
            The four gradients, with None for those that are not wanted.
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
