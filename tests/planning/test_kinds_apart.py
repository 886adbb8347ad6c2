"""Plans in which the kinds of a fused matrix are counted apart: groups, allocations, refusals, and older records."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig

from sparseift_llm import DSTConfig, SparseIFTConfig, sparsify
from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.models import fused_rows
from sparseift_llm.planning.planner import Plan, plan
from sparseift_llm.record.model_record import ModelRecord
from tests.helpers.decoders import decoder, decoder_config
from tests.helpers.planned_models import LLAMA

APART = LlamaConfig(**LLAMA)
FUSED = Phi3Config(**LLAMA)  # the same sizes, with q, k and v in one matrix, and gate and up in one


def by_kind(result: Plan) -> dict[str, list[int]]:
    """Active weights of every kind, layer by layer; those of a gate and of what it multiplies have one name."""
    found: dict[str, list[int]] = {}
    for layer in result.layers:
        (matrix,) = layer.matrices
        for kind, number in [(x.kind, x.num_active) for x in matrix.row_groups] or [(layer.kind, layer.num_active)]:
            found.setdefault({"gate": "mlp_in", "up": "mlp_in"}.get(kind, kind), []).append(number)
    return found


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
@pytest.mark.parametrize("accounting", ["linears", "whole_model"])
def test_fused_and_apart_get_one_allocation(distribution: str, accounting: str) -> None:
    """Grouped queries, so that q, k and v differ in shape."""
    config = SparseIFTConfig(distribution=distribution, accounting=accounting, seq_len=48, sparsity=0.6)
    fused, apart = by_kind(plan(FUSED, config)), by_kind(plan(APART, config))
    assert sum(map(sum, fused.values())) == sum(map(sum, apart.values()))
    assert fused.keys() == apart.keys()
    for kind in fused:
        assert max(abs(a - b) for a, b in zip(fused[kind], apart[kind], strict=True)) <= 1  # of equal remainders
    if distribution == "erk":
        together = SparseIFTConfig(distribution="erk", kinds_apart=False, sparsity=0.6)
        qkv = next(layer for layer in plan(FUSED, together).layers if layer.kind == "qkv")
        assert abs(qkv.num_active - sum(fused[kind][0] for kind in "qkv")) > 100  # what one matrix would have got


def test_groups_of_a_fused_matrix_by_hand() -> None:
    layers = {layer.kind: layer for layer in plan(FUSED, SparseIFTConfig()).layers}
    qkv = layers["qkv"].matrices[0]
    assert qkv.shape == (128, 64)
    assert [(x.kind, x.start, x.stop, x.num_active) for x in qkv.row_groups] == [
        ("q", 0, 64, 1024), ("k", 64, 96, 512), ("v", 96, 128, 512),
    ]  # fmt: skip
    gates = layers["mlp_in"].matrices[0]
    assert [(x.kind, x.start, x.stop, x.num_active) for x in gates.row_groups] == [
        ("gate", 0, 176, 88 * 32), ("up", 176, 352, 88 * 32),
    ]  # fmt: skip
    assert layers["o"].matrices[0].row_groups == ()


@pytest.mark.parametrize("options", [{"kinds_apart": False}, {"structure": "block", "block_size": 8}])
def test_there_are_none_without_it_nor_with_tiles(options: dict[str, Any]) -> None:
    for layer in plan(FUSED, SparseIFTConfig(**options)).layers:
        assert layer.matrices[0].row_groups == ()


@pytest.mark.parametrize("family", ["parallel", "doped", "factorized"])
def test_parts_of_drop_in_families_whose_outputs_are_the_projections(family: str) -> None:
    result = plan(FUSED, SparseIFTConfig(family=family))
    qkv = next(layer for layer in result.layers if layer.kind == "qkv")
    grouped = [matrix.path for matrix in qkv.matrices if matrix.row_groups]
    assert grouped == [matrix.path for matrix in qkv.matrices if matrix.is_sparse and matrix.path != "u"]
    model = sparsify(FUSED, SparseIFTConfig(family=family))
    for matrix in qkv.matrices:
        if matrix.row_groups:
            mask = sparse_layers(model)[qkv.path_of(matrix)].current_mask()
            assert [int(mask[group.rows].sum()) for group in matrix.row_groups] == [
                group.num_active for group in matrix.row_groups
            ]


def test_a_trained_gate_and_what_it_multiplies_start_apart() -> None:
    dense = decoder("phi3")
    config = SparseIFTConfig(scope="ffn", init="pretrained", sparsity=0.5)
    model = sparsify(dense, config)
    layer = next(layer for layer in read_record(model.config).layers if layer.kind == "mlp_in")
    sparse: Any = model.get_submodule(layer.name)
    assert layer.matrices[0].row_groups
    for group in layer.matrices[0].row_groups:
        assert int(sparse.mask[group.rows].sum()) == group.num_active
        old = dense.get_submodule(layer.name).weight.chunk(2)[["gate", "up"].index(group.kind)]  # type: ignore[index]
        found = sparse.weight[group.rows][: len(old)]
        kept = sparse.mask[group.rows][: len(old)]
        assert torch.equal(found[kept], old[kept])
        assert old[kept].abs().min() > old[~kept].abs().max()  # the largest of its own rows


# ---- orders of rows that are not known


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> PreTrainedConfig:
    monkeypatch.setattr(fused_rows, "QKV_LAYOUTS", {})
    return decoder_config("gpt2")


@pytest.mark.support("fused q, k, v in an unknown order of rows, where masks change", refused=True)
@pytest.mark.parametrize("options", [{"dst": DSTConfig("rigl")}, {"dst": DSTConfig("gmp")}, {"distribution": "erk"}])
def test_an_unknown_order_is_refused_with_the_way_out(unknown: PreTrainedConfig, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"c_attn holds .* not known, so that .*kinds_apart=False.*exclude q, k, v"):
        plan(unknown, SparseIFTConfig(**options))
    assert plan(unknown, SparseIFTConfig(**options, kinds_apart=False)).ratio_linear == 1.0
    whole_model: dict[str, Any] = {"accounting": "whole_model", "seq_len": 8, "sparsity": 0.5}
    assert plan(unknown, SparseIFTConfig(**options, exclude=("q", "k", "v"), **whole_model)).layers


def test_static_masks_do_not_need_to_know(unknown: PreTrainedConfig) -> None:
    assert plan(unknown, SparseIFTConfig(dst=DSTConfig("static"))).ratio_linear == 1.0


# ---- as they were begun


def test_a_record_without_the_option_goes_on_with_one_budget() -> None:
    model = sparsify(FUSED, SparseIFTConfig(kinds_apart=False))
    values = model.config.sparse_ift
    del values["transformation"]["kinds_apart"]
    record = ModelRecord.from_dict(values)
    assert record.transformation.kinds_apart is False
    assert SparseIFTConfig().kinds_apart is True
