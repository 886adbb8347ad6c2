"""The matrices at both ends of a model with a mask: the input embedding, and logits that are tied to it.

Both are one matrix of a row per word, (vocabulary, hidden). An output head with weights of its own is a `MaskedLinear`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseift_llm.layers.base import plain_name
from sparseift_llm.layers.block_embedding import TiedBlockLogits, check_shared
from sparseift_llm.layers.masked import MaskedProjection
from sparseift_llm.layers.stock import embedding_scale, stock_layer
from sparseift_llm.ops.masked_weight import masked_weight


def check_embedding(embedding: nn.Module) -> None:
    """Raise ValueError unless `MaskedEmbedding` can stand in the place of a stock embedding."""
    assert isinstance(embedding, nn.Embedding)
    embedding_scale(embedding)


class MaskedEmbedding(MaskedProjection, nn.Embedding):
    """An embedding whose rows are sparse, each with as many active entries.

    Args:
        dense: the embedding to replace; its parameter is taken over, not copied.
        num_active: active weights according to the plan, a multiple of the vocabulary.
        dense_shape: (vocabulary, hidden) in the dense model.

    Raises:
        ValueError: as `embedding_scale` does.
    """

    embed_scale: Tensor

    def __init__(self, dense: nn.Embedding, num_active: int, dense_shape: tuple[int, int]) -> None:
        scale = embedding_scale(dense)
        nn.Embedding.__init__(
            self, dense.num_embeddings, dense.embedding_dim, dense.padding_idx, _weight=dense.weight.detach()
        )
        self._adopt(dense, num_active, dense_shape)
        self.divide_rows()
        self._stock_class = type(dense)
        self.scalar_embed_scale = scale
        if scale is not None:
            self.register_buffer("embed_scale", cast(Tensor, dense.embed_scale), persistent=False)

    def extra_repr(self) -> str:
        return f"{nn.Embedding.extra_repr(self)}, {self.describe()}"

    def forward(self, input: Tensor) -> Tensor:
        """Token ids (...) -> (..., hidden)."""
        rows = F.embedding(input, self._masked_weight(), self.padding_idx)
        return rows if self.scalar_embed_scale is None else rows * self.embed_scale.to(self.weight.dtype)

    @property
    def topology_bytes(self) -> int:
        return self.mask.numel() * self.mask.element_size()  # without the scale

    def restore_buffers(self) -> None:
        super().restore_buffers()
        if self.scalar_embed_scale is not None:
            self.embed_scale.fill_(self.scalar_embed_scale)

    def to_dense(self) -> nn.Module:
        """The stock embedding around the same parameter."""
        options: dict[str, Any] = {} if self.scalar_embed_scale is None else {"embed_scale": self.scalar_embed_scale}
        with torch.device("meta"):
            dense = self._stock_class(self.num_embeddings, self.embedding_dim, self.padding_idx, **options)
        dense.weight = self.weight
        if options:
            dense.embed_scale = self.embed_scale
        return dense.train(self.training)


class TiedLogits(nn.Linear):
    """An output head whose weight is that of a sparse embedding. The mask is the embedding's, and counted there.

    Both uses add to one gradient, masked, and to one dense gradient where RigL asks for it.

    Args:
        dense: the head to replace; its bias is taken over.
        owner: the embedding.
    """

    def __init__(self, dense: nn.Linear, owner: MaskedEmbedding) -> None:
        super().__init__(dense.in_features, dense.out_features, bias=False, device="meta")
        self.weight, self.bias = owner.weight, dense.bias
        self._owner = (owner,)  # in a tuple, so that the embedding is not a module of the head, too
        self.train(dense.training)

    @property
    def owner(self) -> MaskedEmbedding:
        """The embedding that has the weight and the mask."""
        return self._owner[0]

    def forward(self, input: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocabulary).

        Raises:
            RuntimeError: the weights are no longer one parameter.
        """
        owner = self.owner
        check_shared(self.weight, owner.weight)
        return F.linear(input, masked_weight(self.weight, owner.mask, owner.dense_gradient), self.bias)

    def to_dense(self, embedding: nn.Embedding) -> nn.Module:
        """The stock head around the weight of the stock embedding."""
        weight: Any = embedding.weight
        return stock_layer(weight, self.bias, as_conv1d=False, training=self.training)


def tied_logits(model: nn.Module) -> dict[str, TiedLogits | TiedBlockLogits]:
    """The heads of a model that share the weight of a sparse embedding, by module path; one at most in practice."""
    kinds = (TiedLogits, TiedBlockLogits)
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, kinds)}


def share_tied_weights(model: nn.Module) -> None:
    """Let tied logits have the parameter that their embedding has now."""
    for head in tied_logits(model).values():
        head.weight = head.owner.weight
