"""`BlockSparseLinear`: parity, compilation, autocast, checkpointing, masks, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from sparseift_llm import SparseIFTConfig, sparsify
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.ops.dense_gradient import DenseGradient
from sparseift_llm.topology.blocks import random_columns
from tests.helpers.models import tiny_model

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
    """Output and gradients of input, weight and bias; by `backward()`, which alone captures dense gradients."""
    y = (layer if run is None else run)(x)
    weighted = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    weighted.backward()
    gradients = []
    for leaf in (x, *layer.parameters()):
        assert leaf.grad is not None
        gradients.append(leaf.grad)
        leaf.grad = None
    return (y, *gradients)


def relative_error(found: Tensor, expected: Tensor) -> float:
    expected = expected.detach().double()
    return float((found.detach().double() - expected).abs().max() / expected.abs().max())


@every_kind
def test_parity_with_its_dense_twin(kind: str) -> None:
    layer = make(kind)
    dense, x = layer.to_dense(), inputs(layer)
    assert type(dense) is (Conv1D if kind == "conv1d" else nn.Linear)
    found = backward(layer, x)
    expected = backward(dense, x)
    for index in (0, 1, *range(3, len(found))):
        torch.testing.assert_close(found[index], expected[index], rtol=1e-10, atol=1e-10)
    of_dense = expected[2].T if kind == "conv1d" else expected[2]
    for slot, column in enumerate(layer.columns.tolist()):
        row = ((slot + 1) * 3 - 1) // 5
        tile = of_dense[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        torch.testing.assert_close(found[2][slot], tile, rtol=1e-10, atol=1e-10)


def test_capture_is_the_dense_gradient() -> None:
    layer = make()
    dense, x = layer.to_dense(), inputs(layer)
    expected = backward(dense, x)
    layer.dense_gradient = DenseGradient()
    found = backward(layer, x)
    assert layer.dense_gradient.total is not None
    torch.testing.assert_close(layer.dense_gradient.total, expected[2], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-10)


def test_compiles_in_one_graph() -> None:
    layer = make(dtype=torch.float32)
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
    memory = [table.data_ptr() for table in layer.index[1]]
    weight = layer.weight.detach().clone()
    changed = layer.set_mask(torch.tensor([[False, False, True], [True, True, False]]))
    assert layer.columns.tolist() == [2, 0, 1]
    assert changed.flatten().tolist() == [True, False, True]
    assert not layer.weight[[0, 2]].any()
    assert torch.equal(layer.weight[1], weight[1])
    assert layer.slots_by_column.tolist() == [1, 2, 0]
    assert layer.rows_by_column.tolist() == [1, 1, 0]
    assert layer.column_starts.tolist() == [0, 1, 2, 3]
    assert [table.data_ptr() for table in layer.index[1]] == memory  # of which a captured CUDA graph goes on reading


def test_a_mask_with_other_counts_is_refused_and_changes_nothing() -> None:
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    mask = layer.current_mask()
    mask[0] = ~mask[0]
    mask[0, :2] = True
    for wrong in (mask, torch.ones(2, 2, dtype=torch.bool)):
        with pytest.raises(ValueError, match="the number of tiles in a block-row is fixed"):
            layer.set_mask(wrong)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_the_mask_is_made_from_the_columns_at_each_call() -> None:
    layer = make(rows=2, columns=3, num_tiles=3, size=4)
    layer.set_columns(torch.tensor([1, 0, 2], dtype=torch.int32))
    mask = layer.current_mask()
    assert mask.tolist() == [[False, True, False], [True, False, True]]
    assert mask.shape == layer.mask_shape == (2, 3)
    assert layer.num_weights == 2 * 3 * 16
    assert layer.count_active() == int(mask.sum()) * layer.unit_size == layer.weight.numel() == 3 * 16
    mask.fill_(True)  # the layer does not notice
    assert int(layer.current_mask().sum()) == 3
    assert not hasattr(layer, "mask")  # an attribute would hide what it costs


def test_state_dict_carries_the_tiles() -> None:
    first, second = make(), make()
    second.set_mask(second.current_mask().flip(1))
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
    with pytest.raises(ValueError, match="columns must be distinct"):
        layer.load_state_dict(state)


def test_a_side_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match="a side of 12 is not a multiple of block_size=8"):
        BlockSparseLinear(nn.Linear(16, 12), torch.tensor([0]), 8, (6, 8))


def test_repr_says_what_it_is() -> None:
    layer = make()
    expected = "in_features=32, out_features=24, tiles 8x8, sparsity=0.5833, active 320 of 768, replaces 4->3"
    assert layer.extra_repr() == expected


# ---- models


def test_meta_models_take_no_memory() -> None:
    with torch.device("meta"):
        model = sparsify(tiny_model("gpt2").config, SparseIFTConfig(structure="block", block_size=8))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert "tiles 8x8" in repr(model)
