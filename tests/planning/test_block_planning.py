"""Plans of block-sparse models against the models that are then built: widths, tiles, bytes, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sparseift_llm import SparseIFTConfig, isoflop, sparsify
from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.families.wide import WideFamily
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.models.architectures import sizes_of
from sparseift_llm.planning import allocation
from sparseift_llm.planning.cost import cost_of
from sparseift_llm.planning.planner import Plan, plan
from tests.helpers.planned_models import (
    LLAMA,
    SEQ_LEN,
    TINY,
    attention_flops,
    dense_model,
    every_architecture,
    every_scope,
    num_sides,
    weight_shapes,
)

every_distribution = pytest.mark.parametrize("distribution", ["uniform", "erk"])
every_accounting = pytest.mark.parametrize(
    ("accounting", "sparsity", "size"), [("linears", 0.75, 4), ("linears", 0.5, 8), ("whole_model", 0.5, 8)]
)


def config(size: int | None = 8, **options: Any) -> SparseIFTConfig:
    return SparseIFTConfig(structure="block", block_size=size, **options)


@functools.cache
def planned(name: str, size: int, **options: Any) -> Plan:
    return plan(TINY[name], config(size, seq_len=SEQ_LEN, **options))


def twins(name: str, result: Plan) -> int:
    """Weights of the dense twins of all sparse projections, from the modules of the dense model."""
    shapes = weight_shapes(dense_model(name))
    return sum(shapes[layer.name][0] * shapes[layer.name][1] for layer in result.layers if layer.is_sparse)


# ---- the plan


def check_totals(name: str, result: Plan) -> None:
    """Exactly the dense twins' weights where whole tiles can make them up, to half a tile otherwise."""
    size = result.config.block_size
    assert size is not None
    chosen = [layer for layer in result.layers if layer.is_sparse]
    total, wanted = sum(layer.num_active for layer in chosen), twins(name, result)
    if result.config.accounting == "linears":
        assert abs(total - wanted) <= size**2 / 2
        assert total == wanted or wanted % size**2
    else:
        difference = result.sparse.flops.forward - result.dense.flops.forward
        assert abs(difference) <= size**2 + 1  # half a tile at 2 FLOPs a weight, and an odd FLOP
    for layer in chosen:
        assert layer.num_active % size**2 == 0
        assert layer.sparse_shape[0] // size <= layer.num_active // size**2 <= layer.num_weights // size**2
        assert not [side for side in layer.sparse_shape if side % size]
    for layer in result.layers:
        assert layer.is_sparse == (result.config.scope == "model" or "mlp" in layer.kind)
        if not layer.is_sparse:
            assert layer.num_active == layer.num_weights


def check_distribution(name: str, result: Plan) -> None:
    """Uniform: each layer within a tile of its dense twin, or of the common density; ERK: of what its sides ask for."""
    size = result.config.block_size
    assert size is not None
    chosen = [layer for layer in result.layers if layer.is_sparse]
    total, unit = sum(layer.num_active for layer in chosen), size**2
    shapes = weight_shapes(dense_model(name))
    if result.config.distribution == "uniform":
        density = Fraction(total, sum(layer.num_weights for layer in chosen))
        for layer in chosen:
            rows, columns = shapes[layer.name]
            linears = result.config.accounting == "linears"
            ideal = Fraction(rows * columns * total, twins(name, result)) if linears else density * layer.num_weights
            assert abs(layer.num_active - ideal) < unit
    else:
        free = [layer for layer in chosen if layer.num_active < layer.num_weights]
        per_side = [Fraction(layer.num_active, unit * (num_sides(layer) // size)) for layer in free]
        assert max(per_side) - min(per_side) <= Fraction(2, min(num_sides(layer) // size for layer in free))


def check_plan(name: str, result: Plan) -> None:
    check_totals(name, result)
    check_distribution(name, result)


@every_accounting
@every_distribution
@every_scope
@every_architecture
def test_widths_totals_and_shares(
    name: str, scope: str, distribution: str, accounting: str, sparsity: float, size: int
) -> None:
    result = planned(name, size, scope=scope, distribution=distribution, accounting=accounting, sparsity=sparsity)
    check_plan(name, result)
    sizes, dense = sizes_of(result.hf_config), sizes_of(TINY[name])
    assert (sizes.hidden % size, sizes.ffn % size) == (0, 0)
    assert (sizes.num_heads, sizes.num_layers) == (dense.num_heads, dense.num_layers)
    if scope == "ffn":
        assert (sizes.hidden, sizes.head_dim) == (dense.hidden, dense.head_dim)
        assert sizes.ffn == pytest.approx(dense.ffn / (1 - sparsity), abs=size / 2)
    else:
        step = sizes.num_heads * size  # hidden sizes are multiples of the heads, too
        assert sizes.hidden == pytest.approx(dense.hidden / (1 - sparsity) ** 0.5, abs=step / 2)


ODD = LlamaConfig(**{**LLAMA, "num_hidden_layers": 1, "intermediate_size": 85})


def test_a_remainder_of_half_a_tile_by_hand() -> None:
    """Scope `ffn`: 3 x 85 x 32 weights are 127.5 tiles of 64; 128 are shared as 43 + 43 + 42, the tie by order."""
    result = plan(ODD, config(8, scope="ffn", sparsity=0.75), SEQ_LEN)
    chosen = [layer for layer in result.layers if layer.is_sparse]
    assert [layer.sparse_shape for layer in chosen] == [(344, 32), (344, 32), (32, 344)]  # 4 x 85 = 340 to 43 tiles
    assert [layer.num_active // 64 for layer in chosen] == [43, 43, 42]
    assert result.sparse.linear_active_params - result.dense.linear_active_params == 32
    assert result.ratio_linear == 1 + 32 / result.dense.linear_active_params


def test_a_remainder_of_a_quarter_of_a_tile_by_hand() -> None:
    dense = LlamaConfig(**{**LLAMA, "num_hidden_layers": 1, "intermediate_size": 86, "hidden_size": 24})
    # 3 x 86 x 24 = 6192 = 96.75 tiles -> 97, each layer's 32.25 scaled to 32.33
    result = plan(dense, config(8, scope="ffn", sparsity=0.5), SEQ_LEN)
    assert [layer.num_active // 64 for layer in result.layers if layer.is_sparse] == [33, 32, 32]
    assert result.sparse.linear_active_params - result.dense.linear_active_params == 16


@every_architecture
@every_scope
def test_at_sparsity_zero_every_tile_is_active(name: str, scope: str) -> None:
    result = planned(name, 8, scope=scope, sparsity=0.0)
    assert all(layer.num_active == layer.num_weights for layer in result.layers)
    assert result.sparse.flops == result.dense.flops
    assert result.sparse.stored_params == result.dense.stored_params


Parts = list[list[tuple[int, int]]]


def uniform_in_weights(parts: Parts, twins: list[int], total: int, config: Any) -> list[list[int]]:
    """A fault: as many tiles as there should be weights."""
    return [[min(twin, rows * columns)] for twin, ((rows, columns),) in zip(twins, parts, strict=True)]


def one_too_few(parts: Parts, twins: list[int], total: int, config: Any) -> list[list[int]]:
    """A fault: the last layer lacks a tile."""
    counts = SHARE_UNITS(parts, twins, total, config)
    return [*counts[:-1], [counts[-1][0] - 1]]


def one_moved(parts: Parts, twins: list[int], total: int, config: Any) -> list[list[int]]:
    """A fault: the total is right, two layers are not."""
    counts = SHARE_UNITS(parts, twins, total, config)
    return [[counts[0][0] - 1], *counts[1:-1], [counts[-1][0] + 1]]


SHARE_UNITS = allocation._share_units


@pytest.mark.parametrize("fault", [uniform_in_weights, one_too_few, one_moved])
def test_the_checks_catch_faults(fault: Callable[..., list[list[int]]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "_share_units", fault)
    result = plan(TINY["llama"], config(8, sparsity=0.75), SEQ_LEN)
    with pytest.raises(AssertionError):
        check_plan("llama", result)


def test_a_width_that_is_no_multiple_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "_check_sides", lambda *_: None)
    widen = WideFamily.sparse_config
    monkeypatch.setattr(
        WideFamily, "sparse_config", lambda self, dense, _: widen(self, dense, SparseIFTConfig(sparsity=0.5))
    )
    result = plan(TINY["llama"], config(8, sparsity=0.5), SEQ_LEN)
    with pytest.raises(AssertionError):
        check_totals("llama", result)


# ---- the model that is built from it


def check_built(model: PreTrainedModel, result: Plan) -> None:
    """Counts of the plan against parameters, buffers and tiles of the model."""
    layers, size = sparse_layers(model), result.config.block_size
    assert size is not None
    assert layers.keys() == {layer.name for layer in result.layers if layer.is_sparse}
    index_bytes = 0
    for layer in result.layers:
        if not layer.is_sparse:
            continue
        built = layers[layer.name]
        assert isinstance(built, BlockSparseLinear)
        assert built.weight.shape == (layer.num_active // size**2, size, size)
        assert (built.out_features, built.in_features) == layer.sparse_shape
        assert (built.num_active, built.count_active()) == (layer.num_active, layer.num_active)
        assert built.dense_shape == layer.dense_shape
        fan_in = built.current_mask().sum(1)
        assert int(fan_in.max()) - int(fan_in.min()) <= 1 <= int(fan_in.min())
        index_bytes += sum(buffer.numel() * buffer.element_size() for buffer in built.buffers())
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert (result.sparse.stored_params, result.sparse.topology_bytes) == (stored, index_bytes)
    assert result.sparse.to_dict()["train_state_bytes"] == 16 * stored + index_bytes
    assert result.sparse.flops.attention == attention_flops_of(model)
    assert cost_of(model, SEQ_LEN) == result.sparse
    assert read_record(model.config) == result.record


def attention_flops_of(model: PreTrainedModel) -> int:
    """Counted on the stock model of the same config, whose projections have a shape of their own."""
    return attention_flops(AutoModelForCausalLM.from_config(model.config))


@every_distribution
@every_scope
@every_architecture
def test_the_built_model_costs_what_was_planned(name: str, scope: str, distribution: str) -> None:
    result = planned(name, 8, scope=scope, distribution=distribution, sparsity=0.75)
    model = sparsify(TINY[name], config(8, scope=scope, distribution=distribution, sparsity=0.75, seq_len=SEQ_LEN))
    check_built(model, result)
    assert result.sparse.stored_params < AutoModelForCausalLM.from_config(result.hf_config).num_parameters()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert logits.shape == (1, 3, 97)
    assert bool(logits.isfinite().all())


@every_architecture
def test_the_built_model_with_whole_model_accounting(name: str) -> None:
    options: dict[str, Any] = {"accounting": "whole_model", "sparsity": 0.5, "seq_len": SEQ_LEN}
    check_built(sparsify(TINY[name], config(8, **options)), plan(TINY[name], config(8, **options)))


@pytest.mark.parametrize("fault", ["stored_params", "topology_bytes", "other tiles"])
def test_the_check_of_the_built_model_catches_faults(fault: str) -> None:
    options: dict[str, Any] = {"sparsity": 0.75, "seq_len": SEQ_LEN}
    result, model = plan(TINY["opt"], config(8, **options)), sparsify(TINY["opt"], config(8, **options))
    check_built(model, result)
    if fault == "other tiles":
        model = sparsify(TINY["opt"], config(8, distribution="erk", **options))
    else:
        cost = dataclasses.replace(result.sparse, **{fault: getattr(result.sparse, fault) - 4})
        result = dataclasses.replace(result, sparse=cost)
    with pytest.raises(AssertionError):
        check_built(model, result)


def test_bytes_by_hand() -> None:
    """GPT-2's c_attn of 96 -> 192 x 64 in tiles of 8: 24 x 8, of which 48; three indices of int32."""
    result = planned("gpt2", 8, sparsity=0.75)
    qkv = result.layers[0]
    assert (qkv.sparse_shape, qkv.num_active) == ((192, 64), 48 * 64)
    assert isoflop.block_index_bytes(48, 8) == 4 * (3 * 48 + 2 * 8 + 1)
    tiles = {"qkv": (48, 8), "o": (16, 8), "mlp_in": (64, 8), "mlp_out": (64, 32)}
    assert result.sparse.topology_bytes == 2 * sum(
        4 * (3 * number + 2 * columns + 1) for number, columns in tiles.values()
    )


@every_scope
@every_architecture
def test_a_meta_model_is_planned_and_sparsified_without_memory(name: str, scope: str) -> None:
    options = config(8, scope=scope, sparsity=0.75)
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(TINY[name])
        inside = sparsify(TINY[name], options)
    for model in (inside, sparsify(dense, options)):
        assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert model.num_parameters() == planned(name, 8, scope=scope, sparsity=0.75).sparse.stored_params
        assert "tiles 8x8, sparsity=0.75" in repr(model).replace("gelu first, ", "")
