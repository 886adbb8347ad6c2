"""An embedding, and the logits, whose matrix is stored in tiles: one parameter for both where a model ties them.

The vocabulary is the row side of the matrix, and the hidden stream its column side. The vocabulary need not be a
multiple of the tile: the last block-row then has rows of no token, which stay 0 and are cut off from the logits.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseift_llm.layers.sharding import local, part_of
from sparseift_llm.layers.stock import embedding_scale, stock_layer, stock_matrix
from sparseift_llm.layers.tiled import TiledProjection
from sparseift_llm.ops.block_linear import block_linear
from sparseift_llm.ops.block_lookup import NO_PADDING, block_lookup_op
from sparseift_llm.ops.dense_gradient import capture_dense_gradient, capture_lookup_gradient
from sparseift_llm.ops.operands import autocast_operands, call_operator, refuse_forward_mode


class VocabularyTiles(TiledProjection):
    """A sparse matrix (vocabulary, hidden) in tiles; R * b rows are stored, and those behind the vocabulary are 0.

    Attributes:
        out_features: the number of tokens, as the tokeniser and the model's config have it.
        in_features: the hidden size, a multiple of `block_size`.
    """

    def _store_vocabulary(self, dense: Any, columns: Tensor, block_size: int, dense_shape: tuple[int, int]) -> None:
        """As `_store`, of the weight of `dense`. Raises ValueError if the hidden size is not a multiple of the tile."""
        matrix = stock_matrix(dense)
        self.out_features, self.in_features = int(matrix.shape[0]), int(matrix.shape[1])
        if self.in_features % block_size:
            raise ValueError(
                f"a hidden size of {self.in_features} is not a multiple of block_size={block_size}; choose another one"
            )
        padded = F.pad(matrix, (0, 0, 0, -self.out_features % block_size))
        self._store(padded, columns, block_size, dense_shape, bool(dense.weight.requires_grad))
        self.train(dense.training)

    @property
    def num_padded_rows(self) -> int:
        """Rows of the last block-row that are no token's."""
        return self.num_rows * self.block_size - self.out_features

    def logits(self, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """(..., hidden) -> (..., vocabulary), the product with the transposed matrix.

        Args:
            input: hidden states.
            weight: the tiles, where another module holds the same parameter; by default this layer's.
            bias: (vocabulary,) or None.

        Returns:
            Logits of the vocabulary alone. If it is not a multiple of the tile, their rows are apart in memory.
        """
        weight = self.weight if weight is None else weight
        refuse_forward_mode(input, weight, bias)
        x, tiles, bias = autocast_operands(input.reshape(-1, self.in_features), weight, bias)
        if bias is not None and self.num_padded_rows:
            bias = F.pad(bias, (0, self.num_padded_rows))
        y: Tensor = call_operator(block_linear, x, tiles, bias, *self.index, self.num_rows * self.block_size)
        if self.dense_gradient is not None and weight.requires_grad:
            y = capture_dense_gradient(y, x, self.dense_gradient)
        if self.num_padded_rows:
            y = y[:, : self.out_features]
        # No view for autograd, as the output of `F.linear` is none: FSDP2 warns of models that return views.
        logits: Tensor = torch.ops.aten._unsafe_view(y, (*input.shape[:-1], self.out_features))
        return logits

    @torch.no_grad()
    def zero_inactive(self) -> None:
        """Set the rows that are no token's to exactly 0, for optimizers that move weights whose gradient is 0."""
        if not self.num_padded_rows:
            return
        size, num_tiles = self.block_size, len(self.columns)
        is_last = (
            torch.arange(num_tiles, device=self.columns.device) >= (self.num_rows - 1) * num_tiles // self.num_rows
        )
        is_padded = torch.arange(size, device=self.columns.device) >= size - self.num_padded_rows
        surplus = (is_last[:, None] & is_padded)[:, :, None]
        local(self.weight).masked_fill_(part_of(surplus, self.weight), 0)

    def extra_repr(self) -> str:
        size = self.block_size
        return f"{self.out_features}, {self.in_features}, tiles {size}x{size}, {self.describe()}"

    def _dense_weight(self) -> nn.Parameter:
        """The matrix (vocabulary, hidden) as a new parameter."""
        return nn.Parameter(self.dense_matrix()[: self.out_features].contiguous(), self.weight.requires_grad)


class BlockSparseEmbedding(VocabularyTiles):
    """An embedding whose matrix is stored in tiles.

    Where the model's head is tied to it, a `TiedBlockLogits` shares its parameter. The mask, the columns and the dense
    gradients of both uses are this layer's alone.

    Args:
        dense: the embedding to replace: `nn.Embedding`, or a subclass that multiplies by `embed_scale`, as Gemma's
            does. The weights of the active tiles are copied from it.
        columns: the block-column of every tile, int32 (N,), see `TiledProjection`.
        block_size: b; the hidden size is a multiple of it.
        dense_shape: (vocabulary, hidden) of the dense twin.

    Attributes:
        weight: the tiles (N, b, b), each (vocabulary, hidden).
        num_embeddings, embedding_dim: the vocabulary and the hidden size, as of `nn.Embedding`.
        padding_idx: the token whose row gets no gradient from look-ups, or None.
        embed_scale: what rows are multiplied by when they are looked up, or None.

    Raises:
        ValueError: the hidden size is not a multiple of `block_size`, `columns` are not valid, or `dense` does more
            than looking up rows.
    """

    def __init__(self, dense: nn.Embedding, columns: Tensor, block_size: int, dense_shape: tuple[int, int]) -> None:
        super().__init__()
        self.embed_scale = embedding_scale(dense)
        self._store_vocabulary(dense, columns, block_size, dense_shape)
        self.bias = None
        self.num_embeddings, self.embedding_dim = self.out_features, self.in_features
        self.padding_idx = dense.padding_idx
        # The stock module without its weight, for `to_dense`; in a tuple, because it is not a child of this module.
        shell = copy.copy(dense)
        shell._parameters = {}
        self._shell = (shell,)

    def forward(self, input: Tensor) -> Tensor:
        """Token ids (...) -> (..., hidden), in the dtype of the weight."""
        refuse_forward_mode(self.weight)
        ids, padding_idx = input.reshape(-1), NO_PADDING if self.padding_idx is None else self.padding_idx
        y: Tensor = call_operator(
            block_lookup_op, self.weight, ids, self.columns, self.out_features, self.in_features, padding_idx
        )
        if self.dense_gradient is not None and self.weight.requires_grad:
            y = capture_lookup_gradient(y, ids, self.num_rows * self.block_size, padding_idx, self.dense_gradient)
        if self.embed_scale is not None:
            y = y * torch.full((), self.embed_scale, dtype=y.dtype, device=y.device)
        return y.view(*input.shape, self.in_features)

    @torch.no_grad()
    def to_dense(self) -> nn.Embedding:
        (shell,) = self._shell
        dense = copy.copy(shell)
        dense._parameters = {"weight": self._dense_weight()}
        dense._buffers = dict(shell._buffers)
        if self.embed_scale is not None:
            stock_dtype = shell.get_buffer("embed_scale").dtype  # that of the model when it was built
            dense.embed_scale = torch.tensor(self.embed_scale, dtype=stock_dtype, device=self.weight.device)
        return dense.train(self.training)


class BlockSparseLogits(VocabularyTiles):
    """The output head of a model that does not tie it to the embedding: logits by a matrix that is stored in tiles.

    Args:
        dense: the `nn.Linear` to replace. Its bias is taken over, and the weights of the active tiles are copied.
        columns, block_size, dense_shape: as of `BlockSparseEmbedding`.

    Raises:
        ValueError: the hidden size is not a multiple of `block_size`, or `columns` are not valid.
    """

    def __init__(self, dense: nn.Linear, columns: Tensor, block_size: int, dense_shape: tuple[int, int]) -> None:
        super().__init__()
        self._store_vocabulary(dense, columns, block_size, dense_shape)
        self.bias = dense.bias

    def forward(self, input: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocabulary)."""
        return self.logits(input, bias=self.bias)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        return stock_layer(self._dense_weight(), self.bias, as_conv1d=False, training=self.training)


def check_shared(head: Tensor, embedding: Tensor) -> None:
    """Raise RuntimeError unless the weights of tied logits and of their embedding are one parameter."""
    if head is not embedding and not embedding.is_meta:  # which is offloaded, then
        raise RuntimeError(
            "the output head and the embedding no longer share one parameter, so that they would be trained apart: "
            "call model.tie_weights() after weights were replaced, and with FSDP2 keep both in one fully_shard group"
        )


def check_tied_head(head: nn.Module) -> None:
    """Raise ValueError if a head cannot be tied to an embedding in tiles.

    Transformers would cut its bias to the number of tiles whenever it ties the weights.
    """
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            "an output head with a bias cannot be tied to an embedding in tiles; untie the two "
            "(tie_word_embeddings=False), or set embedding='unstructured'"
        )


class TiedBlockLogits(nn.Module):
    """The output head of a model that ties it to its embedding. It is no sparse layer of its own.

    Args:
        dense: the head to replace, whose mode is taken over.
        owner: the embedding, which has the matrix and its mask.

    Attributes:
        weight: the owner's parameter itself, so that a state dict, an optimizer and FSDP see a tied weight.

    Raises:
        ValueError: see `check_tied_head`.
    """

    weight: Tensor

    def __init__(self, dense: nn.Module, owner: BlockSparseEmbedding) -> None:
        super().__init__()
        check_tied_head(dense)
        self.weight = owner.weight
        self.in_features, self.out_features = owner.in_features, owner.out_features
        # In a tuple, because the embedding is not a child of this module.
        self._owner = (owner,)
        self.train(dense.training)

    @property
    def owner(self) -> BlockSparseEmbedding:
        """The embedding that has the weight and the mask."""
        return self._owner[0]

    def forward(self, input: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocabulary).

        Raises:
            RuntimeError: the weights are no longer one parameter.
        """
        check_shared(self.weight, self.owner.weight)
        return self.owner.logits(input, self.weight)

    def to_dense(self, embedding: nn.Embedding) -> nn.Module:
        """The stock head around the weight of the stock embedding."""
        weight: Any = embedding.weight
        return stock_layer(weight, None, as_conv1d=False, training=self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tied to the embedding"
