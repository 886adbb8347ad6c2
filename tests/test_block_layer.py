"""`BlockSparseLinear` in a model: parity, compilation, autocast, checkpointing, masks, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from sparseift_llm import SparseIFTConfig, sparsify, to_dense
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.block import AppliedByNextLayer, BlockSparseLinear
from sparseift_llm.ops.dense_gradient import DenseGradient
from sparseift_llm.topology.blocks import random_columns
from tests.models import gradients_of, logits_of, tiny_model

KINDS = ("linear", "linear_without_bias", "conv1d")
every_kind = pytest.mark.parametrize("kind", KINDS)


def stock(kind: str, columns: int, rows: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = Conv1D(rows, columns) if kind == "conv1d" else nn.Linear(columns, rows, bias=kind == "linear")
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.to(dtype)


def make(
    kind: str = "linear", rows: int = 3, columns: int = 4, num_tiles: int = 5, size: int = 8, dtype: Any = None
) -> BlockSparseLinear:
    dense = stock(kind, columns * size, rows * size, dtype or torch.float64)
    return BlockSparseLinear(dense, random_columns(rows, columns, num_tiles, 0), size, (rows, columns))


def inputs(layer: BlockSparseLinear, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 7, layer.in_features, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def backward(layer: nn.Module, x: Tensor, run: Any = None) -> tuple[Tensor, ...]:
    """Output and gradients of input, weight and bias."""
    y = (layer if run is None else run)(x)
    weighted = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    return (y, *torch.autograd.grad(weighted, [x, *layer.parameters()]))


def relative_error(found: Tensor, expected: Tensor) -> float:
    expected = expected.detach().double()
    return float((found.detach().double() - expected).abs().max() / expected.abs().max())


@every_kind
@pytest.mark.parametrize("gelu", [False, True])
def test_parity_with_its_dense_twin(kind: str, gelu: bool) -> None:
    layer = make(kind)
    layer.applies_gelu = gelu
    dense, x = layer.to_dense(), inputs(layer)
    assert type(dense) is (Conv1D if kind == "conv1d" else nn.Linear)
    found = backward(layer, x)
    expected = backward(dense, x, lambda x: dense(F.gelu(x, approximate="tanh") if gelu else x))
    for index in (0, 1, *range(3, len(found))):
        torch.testing.assert_close(found[index], expected[index], rtol=1e-10, atol=1e-10)
    of_dense = expected[2].T if kind == "conv1d" else expected[2]
    for slot, column in enumerate(layer.columns.tolist()):
        row = ((slot + 1) * 3 - 1) // 5
        tile = of_dense[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        torch.testing.assert_close(found[2][slot], tile, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 8, 16, 64])
def test_fused_gelu_in_lower_precision(dtype: torch.dtype, size: int) -> None:
    layer = make(size=size, dtype=dtype)
    layer.applies_gelu = True
    x = (inputs(layer).detach() * 3).to(dtype).requires_grad_()
    twin = make(size=size, dtype=torch.float64)
    with torch.no_grad():
        for mine, source in zip(twin.parameters(), layer.parameters(), strict=True):
            mine.copy_(source)
    exact = backward(twin, x.detach().double().requires_grad_(), lambda x: twin(F.gelu(x, approximate="tanh")))
    tolerance = 3e-6 if dtype == torch.float32 else 2e-2  # the test itself sums the bias gradient in bfloat16
    for found, expected in zip(backward(layer, x), exact, strict=True):
        assert relative_error(found, expected) < tolerance


def test_fused_gelu_far_from_zero() -> None:
    layer = make(dtype=torch.float32)
    layer.applies_gelu = True
    x = torch.tensor([-1e4, -90.0, -20.0, -5.0, 0.0, 5.0, 20.0, 1e4]).repeat(4).view(1, 32).requires_grad_()
    assert all(value.isfinite().all() for value in backward(layer, x))
    dense = copy.deepcopy(layer.to_dense()).double()
    reference = backward(dense, x.detach().double().requires_grad_(), lambda x: dense(F.gelu(x, approximate="tanh")))
    for index in (0, 1):
        torch.testing.assert_close(backward(layer, x)[index].double(), reference[index], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("gelu", [False, True])
def test_capture_is_the_dense_gradient(gelu: bool) -> None:
    layer = make()
    layer.applies_gelu = gelu
    dense, x = layer.to_dense(), inputs(layer)
    expected = backward(dense, x, lambda x: dense(F.gelu(x, approximate="tanh") if gelu else x))
    layer.dense_gradient = DenseGradient()
    found = backward(layer, x)
    assert layer.dense_gradient.total is not None
    torch.testing.assert_close(layer.dense_gradient.total, expected[2], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gelu", [False, True])
def test_compiles_in_one_graph(gelu: bool) -> None:
    layer = make(dtype=torch.float32)
    layer.applies_gelu = gelu
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = inputs(layer, torch.float32)
    for found, expected in zip(backward(layer, x, compiled), backward(layer, x), strict=True):
        assert torch.equal(found, expected)


def test_autocast_computes_in_its_dtype() -> None:
    layer = make(dtype=torch.float32)
    x = inputs(layer, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, *gradients = backward(layer, x)
    assert output.dtype == torch.bfloat16
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3
    exact = backward(layer, x)
    for found, expected in zip((output, *gradients), exact, strict=True):
        assert 0 < relative_error(found, expected) < 2e-2


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    layer, x = make(), inputs(make())
    layer.dense_gradient = DenseGradient()
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.sum().backward()
    captured, layer.dense_gradient = layer.dense_gradient.total, DenseGradient()
    x2 = x.detach().clone().requires_grad_()
    first = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(x2).sum().backward()
    assert torch.equal(first, layer.weight.grad)
    assert captured is not None
    assert torch.equal(captured, layer.dense_gradient.total)
    assert torch.equal(x.grad, x2.grad)


# ---- masks


def test_set_mask_reassigns_slots_by_hand() -> None:
    layer = make(rows=2, columns=3, num_tiles=3, size=4)  # one tile in row 0, two in row 1
    layer.columns.copy_(torch.tensor([1, 0, 2]))
    layer._index_columns()
    weight = layer.weight.detach().clone()
    changed = layer.set_mask(torch.tensor([[False, False, True], [True, True, False]]))
    assert layer.columns.tolist() == [2, 0, 1]
    assert changed.flatten().tolist() == [True, False, True]
    assert not layer.weight[[0, 2]].any()
    assert torch.equal(layer.weight[1], weight[1])
    assert layer.slots_by_column.tolist() == [1, 2, 0]
    assert layer.column_starts.tolist() == [0, 1, 2, 3]


def test_a_mask_with_other_counts_is_refused_and_changes_nothing() -> None:
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    mask = layer.mask
    mask[0] = ~mask[0]
    mask[0, :2] = True
    for wrong in (mask, torch.ones(2, 2, dtype=torch.bool)):
        with pytest.raises(ValueError, match="the number of tiles in a block-row is fixed"):
            layer.set_mask(wrong)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_state_dict_carries_the_tiles() -> None:
    first, second = make(), make()
    second.set_mask(second.mask.flip(1))
    assert not torch.equal(first.columns, second.columns)
    second.load_state_dict(first.state_dict())
    x = inputs(first)
    for found, expected in zip(backward(second, x), backward(first, x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("columns", [[0, 0, 1, 2, 3], [0, 1, 2, 4, 0], [-1, 0, 1, 0, 1]])
def test_damaged_columns_are_refused(columns: list[int]) -> None:
    layer = make()
    state = {**layer.state_dict(), "columns": torch.tensor(columns, dtype=torch.int32)}
    if columns == [0, 0, 1, 2, 3]:
        state["columns"] = torch.tensor([0, 1, 1, 2, 3], dtype=torch.int32)  # twice 1 in the second row
    with pytest.raises(ValueError, match="columns are damaged"):
        layer.load_state_dict(state)


def test_a_side_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match="a side of 12 is not a multiple of block_size=8"):
        BlockSparseLinear(nn.Linear(16, 12), torch.tensor([0]), 8, (6, 8))


def test_repr_says_what_it_is() -> None:
    layer = make()
    layer.applies_gelu = True
    expected = (
        "in_features=32, out_features=24, tiles 8x8, gelu first, sparsity=0.5833, active 320 of 768, replaces 4->3"
    )
    assert layer.extra_repr() == expected


# ---- models


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu", "relu"])
def test_a_models_activation_is_fused_where_it_is_the_tanh_gelu(activation: str) -> None:
    config = SparseIFTConfig(structure="block", block_size=8)
    model = sparsify(tiny_model("gpt2", activation_function=activation), config)
    fused = activation in ("gelu_new", "gelu_pytorch_tanh")
    for block in model.transformer.h:
        assert block.mlp.c_proj.applies_gelu == fused
        assert isinstance(block.mlp.act, AppliedByNextLayer) == fused
    dense = to_dense(model)
    assert not any(isinstance(module, AppliedByNextLayer) for module in dense.modules())
    torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=1e-9, atol=1e-9)
    mine, stock_gradients = gradients_of(model), gradients_of(dense)
    tiles = {f"{name}.weight" for name in sparse_layers(model)}
    for name in mine.keys() - tiles:
        torch.testing.assert_close(mine[name], stock_gradients[name], rtol=1e-7, atol=1e-9)


def test_meta_models_take_no_memory() -> None:
    with torch.device("meta"):
        model = sparsify(tiny_model("gpt2").config, SparseIFTConfig(structure="block", block_size=8))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert "tiles 8x8" in repr(model)


def test_operands_of_unequal_dtypes_are_refused() -> None:
    """The kernels read memory as what they are told it is."""
    layer = make(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"one dtype.*float64.*float32"):
        layer(inputs(layer, torch.float64))
    layer.bias.data = layer.bias.data.double()
    with pytest.raises(ValueError, match="one dtype"):
        layer(inputs(layer, torch.float32))
