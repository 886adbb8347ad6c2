"""Models with 2:4 masks on the semi-structured kernels of torch: in training, and compressed for inference.

What runs where is said in ops/semi_structured.py, where the kernels are called.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.masked import MaskedProjection
from sparseift_llm.layers.stock import stock_matrix
from sparseift_llm.ops.semi_structured import check_pattern, compress, compressed_linear


class SemiStructuredLinear(nn.Module):
    """A 2:4 linear map for inference, whose weight is stored as the kernels read it: without its zeros.

    Args:
        layer: on a device and in a dtype that the kernels know; its bias is taken over.
    """

    compressed: Tensor

    def __init__(self, layer: MaskedProjection) -> None:
        super().__init__()
        matrix = stock_matrix(layer)
        self.out_features, self.in_features = matrix.shape
        self.register_buffer("compressed", compress(matrix), persistent=False)
        self.bias = layer.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of the weight."""
        with torch.autocast(input.device.type, enabled=False):
            return compressed_linear(input.to(self.compressed.dtype), self.compressed, self.bias)


def patterned_layers(model: nn.Module) -> dict[str, MaskedProjection]:
    """The sparse layers with 2:4 masks by module path, all of which the kernels can take.

    Raises:
        ValueError: there are none, or one has another pattern or sides that the kernels cannot take, by name.
    """
    layers = {
        name: layer
        for name, layer in sparse_layers(model).items()
        if isinstance(layer, MaskedProjection) and layer.pattern is not None
    }
    if not layers:
        raise ValueError(
            "the model has no n:m masks, which the semi-structured kernels need: make it with "
            "SparseIFTConfig(structure='2:4')"
        )
    for name, layer in layers.items():
        assert layer.pattern is not None
        rows, columns = stock_matrix(layer).shape
        try:
            check_pattern(layer.pattern, (rows, columns))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return layers


def use_semi_structured_kernels(model: nn.Module, enabled: bool = True) -> None:
    """From now on compute the outputs of 2:4 layers on torch's semi-structured kernels, in training too.

    A weight is compressed anew in every forward pass, because training changes it. Gradients of inputs are computed on
    the kernels if the masks are `transposable`, and the weight is compressed in the backward pass, too; otherwise they
    are dense products, as gradients of weights always are. The device and the dtype are looked at in the forward pass,
    because a Trainer moves the model later: an NVIDIA GPU of compute capability 8.0 or more, and float16 or bfloat16,
    by autocast or by the model's own dtype.

    Args:
        model: a Sparse-IFT model with `structure="2:4"`, wrapped or not; changed in place.
        enabled: False computes dense products with zeros again.

    Raises:
        ValueError: the model has no n:m masks, another pattern, or sides that are not multiples of 16.
    """
    for layer in patterned_layers(model).values():
        layer.uses_semi_structured_kernels = enabled
