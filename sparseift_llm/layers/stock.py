"""The stock layers that sparse ones take the place of: `nn.Linear`, GPT-2's `Conv1D`, and embeddings.

Everything else in this package sees a weight as (out, in). Whether a layer stores it so (a `Conv1D` does not) is asked
here only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_PLAIN_EMBEDDING = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer stores its weight as (in, out); true of `Conv1D` and of classes that inherit from it."""
    return isinstance(layer, Conv1D)


def stock_matrix(layer: nn.Module) -> Tensor:
    """The weight of a `Linear` or `Conv1D` as (out, in): a view without gradient."""
    weight: Any = layer.weight
    matrix: Tensor = weight.detach()
    return matrix.T if is_conv1d(layer) else matrix


def stock_layer(weight: nn.Parameter, bias: Any, *, as_conv1d: bool, training: bool) -> nn.Module:
    """A `Linear` or `Conv1D` around parameters that exist; nothing is copied.

    Args:
        weight: (out, in), or (in, out) for a `Conv1D`.
        bias: the parameter (out,), or None.
        as_conv1d: which of the two classes.
        training: the mode of the new layer.
    """
    first, second = weight.shape
    layer: nn.Module
    with torch.device("meta"):
        layer = Conv1D(second, first) if as_conv1d else nn.Linear(second, first, bias=False)
    layer.weight, layer.bias = weight, bias
    return layer.train(training)


def stock_layer_of(matrix: Tensor, bias: Any, *, as_conv1d: bool, requires_grad: bool, training: bool) -> nn.Module:
    """A `Linear` or `Conv1D` with the (out, in) `matrix` as its weight. Arguments as of `stock_layer`."""
    stored = matrix.T.contiguous() if as_conv1d else matrix
    return stock_layer(nn.Parameter(stored, requires_grad), bias, as_conv1d=as_conv1d, training=training)


def embedding_scale(embedding: nn.Embedding) -> float | None:
    """What a stock embedding multiplies its rows by, as Gemma's does; None for a plain `nn.Embedding`.

    Raises:
        ValueError: the class computes something else, or the embedding has an option that looks at whole rows.
    """
    for name, plain in _PLAIN_EMBEDDING.items():
        if getattr(embedding, name) != plain:
            raise ValueError(f"an embedding with {name}={getattr(embedding, name)} cannot be sparse; leave it out")
    if type(embedding).forward is nn.Embedding.forward:
        return None
    scale = getattr(embedding, "scalar_embed_scale", None)  # the buffer beside it may be on the meta device
    if not isinstance(scale, int | float):
        raise ValueError(f"a {type(embedding).__name__} computes more than rows of its weight, so it cannot be sparse")
    return float(scale)
