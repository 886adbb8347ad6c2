"""Embeddings and heads in tiles against `nn.Embedding` and `nn.Linear` with the same matrix; tied and not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sparseift_llm.layers import block_embedding
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.block_embedding import (
    BlockSparseEmbedding,
    BlockSparseLogits,
    TiedBlockLogits,
    VocabularyTiles,
)
from sparseift_llm.layers.tiled import TiledProjection
from sparseift_llm.ops.dense_gradient import DenseGradient
from sparseift_llm.topology.blocks import random_columns, rows_of_slots

SIZE, WIDTH = 4, 6  # of a tile, and of the hidden size in tiles


class LanguageModel(nn.Module):
    """An embedding, a non-linearity and a head: what the two ends of a decoder do with their matrices."""

    def __init__(self, embedding: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.embedding, self.head = embedding, head

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, vocabulary)."""
        return self.head(torch.tanh(self.embedding(ids)))


def columns_for(vocabulary: int, num_tiles: int, seed: int = 0) -> Tensor:
    return random_columns(-(-vocabulary // SIZE), WIDTH, num_tiles, seed)


def tied(
    vocabulary: int = 21, num_tiles: int = 14, dtype: torch.dtype = torch.float64, padding_idx: int | None = None
) -> LanguageModel:
    """21 tokens in six block-rows, the last of which has three rows of no token; two or three tiles in each."""
    torch.manual_seed(0)
    dense = nn.Embedding(vocabulary, WIDTH * SIZE, padding_idx=padding_idx, dtype=dtype)
    shape = (vocabulary, 10)
    embedding = BlockSparseEmbedding(dense, columns_for(vocabulary, num_tiles), SIZE, shape)
    return LanguageModel(embedding, TiedBlockLogits(nn.Linear(WIDTH * SIZE, vocabulary, bias=False), embedding))


def untied(bias: bool, vocabulary: int = 21, num_tiles: int = 14) -> LanguageModel:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(vocabulary, WIDTH * SIZE), nn.Linear(WIDTH * SIZE, vocabulary, bias=bias)
    return LanguageModel(
        BlockSparseEmbedding(embedding, columns_for(vocabulary, num_tiles), SIZE, (vocabulary, 10)),
        BlockSparseLogits(head, columns_for(vocabulary, num_tiles, seed=1), SIZE, (vocabulary, 10)),
    ).double()


def dense_twin(model: LanguageModel) -> LanguageModel:
    embedding = model.embedding.to_dense()
    head = model.head.to_dense(embedding) if isinstance(model.head, TiedBlockLogits) else model.head.to_dense()
    return LanguageModel(embedding, head)


def token_ids(vocabulary: int = 21) -> Tensor:
    """More tokens than the vocabulary has, so that ids repeat; the last one is among them."""
    ids = torch.randint(vocabulary, (3, 16), generator=torch.Generator().manual_seed(1))
    ids[0, :3] = vocabulary - 1
    return ids


def run(model: nn.Module, ids: Tensor, call: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a loss by parameter."""
    model.zero_grad()
    logits = (model if call is None else call)(ids)
    (logits.float() if logits.dtype == torch.bfloat16 else logits).square().mul(
        torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits).to(logits)
    ).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad.clone()
    return logits.detach(), gradients


def tiles_in(layer: TiledProjection, matrix: Tensor) -> Tensor:
    """The stored tiles of a dense matrix (vocabulary, hidden)."""
    padded = F.pad(matrix, (0, 0, 0, -len(matrix) % SIZE))
    rows = rows_of_slots(len(layer.columns), layer.num_rows).tolist()
    return torch.stack(
        [
            padded[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
            for row, column in zip(rows, layer.columns.tolist(), strict=True)
        ]
    )


def check_against_dense(model: LanguageModel, vocabulary: int = 21) -> None:
    """Logits and all gradients, those of the whole matrix included."""
    ids, twin = token_ids(vocabulary), dense_twin(model)
    expected, dense_gradients = run(twin, ids)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, VocabularyTiles)}
    for layer in layers.values():
        layer.dense_gradient = None
    for is_captured in (False, True):
        if is_captured:
            for layer in layers.values():
                layer.dense_gradient = DenseGradient()
        logits, gradients = run(model, ids)
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
        assert gradients.keys() == dense_gradients.keys()
        for name, found in gradients.items():
            layer = layers.get(name.removesuffix(".weight"))
            wanted = dense_gradients[name] if layer is None else tiles_in(layer, dense_gradients[name])
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    for name, layer in layers.items():
        total = layer.dense_gradient.total  # type: ignore[union-attr]
        assert total is not None
        assert total.shape == layer.gradient_shape
        assert not total[layer.out_features :].any()
        torch.testing.assert_close(
            total[: layer.out_features], dense_gradients[f"{name}.weight"], rtol=1e-11, atol=1e-11
        )


@pytest.mark.parametrize("padding_idx", [None, 5])
@pytest.mark.parametrize(
    ("vocabulary", "num_tiles"),
    [(21, 14), (24, 12), (21, 6), (21, 36), (21, 4), (3, 2)],
    ids=["padded", "whole", "one tile in a row", "dense", "rows without a tile", "one row"],
)
def test_tied_logits_and_gradients_are_the_dense_ones(vocabulary: int, num_tiles: int, padding_idx: int | None) -> None:
    model = tied(vocabulary, num_tiles, padding_idx=padding_idx if vocabulary > 5 else None)
    assert list(dict(model.named_parameters())) == ["embedding.weight"]
    check_against_dense(model, vocabulary)


@pytest.mark.parametrize("bias", [False, True])
def test_untied_logits_and_gradients_are_the_dense_ones(bias: bool) -> None:
    check_against_dense(untied(bias))


def test_columns_without_a_tile() -> None:
    model = tied(num_tiles=6)
    model.embedding.set_columns(torch.tensor([0, 0, 0, 5, 5, 5], dtype=torch.int32))
    nn.init.normal_(model.embedding.weight)
    model.embedding.zero_inactive()
    check_against_dense(model)


def next_row(*operands: Any) -> Tensor:
    """A fault: the row below is looked up."""
    weight, ids, *others = operands
    return LOOKUP(weight, (ids + 1) % 21, *others)


def detached(*operands: Any) -> Tensor:
    """A fault: of a tied matrix, look-ups give no gradient."""
    return LOOKUP(operands[0].detach(), *operands[1:])


def uncaptured(y: Tensor, *_: Any) -> Tensor:
    """A fault: the dense gradient has no part of the look-ups."""
    return y


LOOKUP = block_embedding.block_lookup_op


@pytest.mark.parametrize(
    ("name", "fault"),
    [("block_lookup_op", next_row), ("block_lookup_op", detached), ("capture_lookup_gradient", uncaptured)],
)
def test_faults_are_caught(name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_embedding, name, fault)
    with pytest.raises(AssertionError):
        check_against_dense(tied())


def test_ids_and_padding_are_those_of_a_stock_embedding() -> None:
    layer = tied(padding_idx=-1).embedding
    dense = layer.to_dense()
    assert layer.padding_idx == dense.padding_idx == 20
    for ids in (torch.tensor(7), token_ids()[:, :0], token_ids().int(), token_ids()[0].expand(2, 16)):
        assert torch.equal(layer(ids), dense(ids))
    for wrong in (21, 23, -1):
        with pytest.raises(IndexError):
            layer(torch.tensor([[0, wrong]]))
    layer(torch.tensor([20, 3])).sum().backward()
    dense(torch.tensor([20, 3])).sum().backward()
    assert torch.equal(layer.weight.grad, tiles_in(layer, dense.weight.grad))
    assert not dense.weight.grad[20].any()


def test_compiles_in_one_graph() -> None:
    model = tied(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for found, expected in zip(run(model, token_ids(), compiled), run(model, token_ids()), strict=True):
        if isinstance(found, Tensor):
            assert torch.equal(found, expected)
        else:
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_autocast_is_that_of_the_stock_layers() -> None:
    """Rows come in the dtype of the weight, logits in that of autocast."""
    model = tied(dtype=torch.float32)
    twin, ids = dense_twin(model), token_ids()
    _, exact = run(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.embedding(ids).dtype == twin.embedding(ids).dtype == torch.float32
        logits, gradients = run(model, ids)
        expected, dense_gradients = run(twin, ids)
    assert logits.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-2)
    found = gradients["embedding.weight"]
    assert found.dtype == torch.float32
    assert not torch.allclose(found, exact["embedding.weight"], rtol=1e-5)
    torch.testing.assert_close(
        found, tiles_in(model.embedding, dense_gradients["embedding.weight"]), rtol=1e-2, atol=1e-1
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_converted_and_columns_stay(dtype: torch.dtype) -> None:
    model = tied(dtype=torch.float32).to(dtype)
    assert model.embedding.weight.dtype == dtype
    assert model.head.weight is model.embedding.weight
    assert model.embedding.columns.dtype == torch.int32
    assert model(token_ids()).dtype == dtype


def test_on_the_meta_device_and_back() -> None:
    model, expected = tied(), tied()(token_ids())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.device("meta"):
        empty = tied()
    assert empty.embedding.weight.is_meta
    assert empty(token_ids().to("meta")).shape == expected.shape
    model.to("meta")
    assert not model.embedding.columns.is_meta
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="no longer share one parameter"):  # empty memory for each of the two
        model(token_ids())
    model.head.weight = model.embedding.weight  # as transformers' `tie_weights` does
    assert torch.equal(model(token_ids()), expected)


def test_state_dict_has_the_names_of_other_layers_in_tiles() -> None:
    model = tied()
    assert list(model.state_dict()) == ["embedding.weight", "embedding.columns", "head.weight"]
    assert list(untied(True).state_dict()) == [
        "embedding.weight", "embedding.columns", "head.weight", "head.bias", "head.columns",
    ]  # fmt: skip
    damaged = {**model.state_dict(), "embedding.columns": torch.full_like(model.embedding.columns, 7)}
    with pytest.raises(ValueError, match="columns must be distinct"):
        model.load_state_dict(damaged)


def test_a_copy_is_tied_to_itself() -> None:
    model = tied()
    other = copy.deepcopy(model)
    assert other.head.owner is other.embedding
    assert other.head.weight is other.embedding.weight
    assert other.head.weight is not model.head.weight
    nn.init.zeros_(other.embedding.weight)
    assert not other(token_ids()).any()
    assert model(token_ids()).any()


def test_a_head_that_lost_its_tie_is_an_error() -> None:
    model = tied()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"no longer share one parameter.*tie_weights"):
        model(token_ids())


def test_the_tied_matrix_is_one_sparse_layer() -> None:
    model = tied()
    assert list(sparse_layers(model)) == ["embedding"]
    layer = model.embedding
    assert layer.mask_shape == (6, 6)
    assert layer.count_active() == layer.weight.numel() == 14 * 16
    assert layer.dense_shape == (21, 10)
    assert "21, 24, tiles 4x4, sparsity=0.6111, active 224 of 576, replaces 10->21" in repr(model)


def test_a_mask_moves_both_uses() -> None:
    model = tied()
    layer = model.embedding
    mask = layer.current_mask().flip(1)
    changed = layer.set_mask(mask)
    assert torch.equal(layer.current_mask(), mask)
    assert not layer.weight[changed.flatten()].any()
    nn.init.normal_(layer.weight)
    layer.zero_inactive()
    check_against_dense(model)


def test_rows_of_no_token_stay_zero() -> None:
    """An optimizer may move weights whose gradient is 0; nothing else would set these to 0 again."""
    layer = tied().embedding
    assert not layer.dense_matrix()[21:].any()
    nn.init.normal_(layer.weight)
    before = layer.dense_matrix()
    layer.zero_inactive()
    assert torch.equal(layer.dense_matrix()[:21], before[:21])
    assert before[21:].any()
    assert not layer.dense_matrix()[21:].any()


def test_gemma_scales_what_it_looks_up() -> None:
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=21, hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    stock = AutoModelForCausalLM.from_config(config).get_input_embeddings().to(torch.bfloat16)
    layer = BlockSparseEmbedding(stock, columns_for(21, 36), SIZE, (21, 10))  # all tiles
    dense = layer.to_dense()
    assert type(dense) is type(stock)
    assert torch.equal(layer(token_ids()), stock(token_ids()))
    assert torch.equal(dense(token_ids()), stock(token_ids()))
    assert float(dense.embed_scale) == pytest.approx(24**0.5, rel=1e-2)


class Doubled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (nn.Embedding(21, 24, max_norm=1.0), "an embedding with max_norm=1.0 cannot be sparse"),
        (nn.Embedding(21, 24, scale_grad_by_freq=True), "an embedding with scale_grad_by_freq=True cannot be sparse"),
        (nn.Embedding(21, 24, sparse=True), "an embedding with sparse=True cannot be sparse"),
        (nn.Embedding(21, 22), "a hidden size of 22 is not a multiple of block_size=4"),
        (Doubled(21, 24), "a Doubled computes more than rows of its weight"),
    ],
)
def test_what_tiles_cannot_do_is_refused(dense: nn.Embedding, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockSparseEmbedding(dense, columns_for(21, 14), SIZE, (21, 10))


def test_a_tied_head_with_a_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="with a bias cannot be tied"):
        TiedBlockLogits(nn.Linear(24, 21), tied().embedding)
