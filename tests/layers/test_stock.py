"""`Linear` and `Conv1D` as one kind of layer: the weight as (out, in), and making the stock layer again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparseift_llm.layers.stock import is_conv1d, stock_layer, stock_layer_of, stock_matrix


def stock(as_conv1d: bool) -> nn.Module:
    """3 inputs, 2 outputs."""
    torch.manual_seed(0)
    layer: nn.Module = Conv1D(2, 3) if as_conv1d else nn.Linear(3, 2)
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    return layer


@pytest.mark.parametrize("as_conv1d", [False, True])
def test_the_matrix_is_what_the_layer_multiplies_with(as_conv1d: bool) -> None:
    layer, x = stock(as_conv1d), torch.randn(4, 3)
    assert is_conv1d(layer) == as_conv1d
    matrix = stock_matrix(layer)
    assert matrix.shape == (2, 3)
    assert not matrix.requires_grad
    torch.testing.assert_close(layer(x), F.linear(x, matrix, layer.bias))  # type: ignore[arg-type]


@pytest.mark.parametrize("as_conv1d", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_layer_around_its_own_matrix_is_the_same_layer(as_conv1d: bool, requires_grad: bool) -> None:
    layer = stock(as_conv1d)
    again = stock_layer_of(
        stock_matrix(layer).clone(), layer.bias, as_conv1d=as_conv1d, requires_grad=requires_grad, training=False
    )
    assert type(again) is type(layer)
    assert repr(again) == repr(layer)
    assert again.weight.requires_grad == requires_grad
    assert again.weight.is_contiguous()  # type: ignore[operator]
    assert not again.training
    x = torch.randn(4, 3)
    assert torch.equal(again(x), layer(x))


def test_parameters_are_shared_and_a_missing_bias_stays_missing() -> None:
    weight = nn.Parameter(torch.randn(2, 3))
    layer = stock_layer(weight, None, as_conv1d=False, training=True)
    assert layer.weight is weight
    assert layer.bias is None
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert (layer.in_features, layer.out_features) == (3, 2)
