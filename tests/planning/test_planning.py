"""Plans against counts made independently from the modules of models that are really built."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GPT2Config,
)

from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.models.architectures import build_model, sizes_of
from sparseift_llm.models.presets import load_config
from sparseift_llm.planning.cost import count_flops
from sparseift_llm.planning.planner import plan
from tests.helpers.planned_models import (
    PER_LAYER,
    SEQ_LEN,
    TINY,
    TOKENS,
    check_costs,
    dense_model,
    every_architecture,
    every_scope,
    every_sparsity,
    num_sides,
    planned,
    weight_shapes,
)


@every_architecture
def test_dense_costs_equal_a_really_built_model(name: str) -> None:
    model = dense_model(name)
    shapes = weight_shapes(model)
    assert len(shapes) == 2 * PER_LAYER[name]
    dense = planned(name).dense
    assert dense.linear_active_params == sum(rows * columns for rows, columns in shapes.values())
    assert dense.topology_bytes == 0
    check_costs(model, dense)
    assert {layer.name: layer.dense_shape for layer in planned(name).layers} == shapes


@every_sparsity
@every_scope
@every_architecture
def test_the_widened_model_builds_runs_and_costs_what_was_planned(name: str, scope: str, sparsity: float) -> None:
    result = planned(name, scope=scope, sparsity=sparsity)
    model = build_model(result.hf_config)
    assert {layer.name: layer.sparse_shape for layer in result.layers} == weight_shapes(model)
    check_costs(model, result.sparse)
    masked = {layer.name for layer in result.layers if layer.is_sparse}
    shapes = weight_shapes(model)
    assert result.sparse.topology_bytes == sum(shapes[layer][0] * shapes[layer][1] for layer in masked)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert logits.shape == (1, 3, 97)
    assert bool(logits.isfinite().all())


@every_sparsity
@every_scope
@every_architecture
def test_each_sparse_projection_has_exactly_its_twins_count(name: str, scope: str, sparsity: float) -> None:
    result = planned(name, scope=scope, sparsity=sparsity)
    twins = weight_shapes(dense_model(name))
    for layer in result.layers:
        rows, columns = twins[layer.name]
        assert layer.num_active == rows * columns
        assert layer.num_active <= layer.num_weights
        assert layer.is_sparse == (scope == "model" or "mlp" in layer.kind)
        if not layer.is_sparse:
            assert layer.sparse_shape == layer.dense_shape
    assert result.ratio_linear == 1.0
    assert result.sparse.linear_active_params == result.dense.linear_active_params


@every_architecture
def test_scope_ffn_keeps_the_whole_models_flops(name: str) -> None:
    result = planned(name, scope="ffn", sparsity=0.75)
    assert result.sparse.flops == result.dense.flops
    assert result.ratio_whole_model == 1.0


@every_scope
@every_architecture
def test_sparsity_zero_changes_nothing(name: str, scope: str) -> None:
    result = planned(name, scope=scope, sparsity=0.0)
    assert all(layer.sparse_shape == layer.dense_shape and layer.sparsity == 0 for layer in result.layers)
    assert result.sparse.flops == result.dense.flops
    assert result.sparse.stored_params == result.dense.stored_params


@every_architecture
def test_the_dense_config_and_model_are_left_alone(name: str) -> None:
    before = TINY[name].to_dict()
    result = plan(TINY[name], SparseIFTConfig(sparsity=0.75), seq_len=SEQ_LEN)
    assert TINY[name].to_dict() == before
    assert type(result.hf_config) is type(TINY[name])
    assert plan(dense_model(name), SparseIFTConfig(sparsity=0.75), seq_len=SEQ_LEN).to_dict() == result.to_dict()


@every_architecture
def test_count_flops_of_config_and_model_agree_with_the_plan(name: str) -> None:
    assert count_flops(TINY[name], SEQ_LEN) == planned(name).dense.flops
    assert count_flops(dense_model(name), SEQ_LEN) == planned(name).dense.flops


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("gpt2", {"qkv": (192, 64), "o": (64, 64), "mlp_in": (256, 64), "mlp_out": (64, 256)}),
        ("gpt_neox", {"qkv": (192, 64), "o": (64, 64), "mlp_in": (256, 64), "mlp_out": (64, 256)}),
        ("opt", {"q": (64, 64), "k": (64, 64), "mlp_in": (256, 64), "mlp_out": (64, 256)}),
        ("llama", {"q": (64, 64), "k": (32, 64), "o": (64, 64), "mlp_in": (176, 64), "mlp_out": (64, 176)}),
        ("qwen3", {"q": (128, 64), "k": (64, 64), "o": (64, 128), "mlp_in": (176, 64), "mlp_out": (64, 176)}),
        ("gemma", {"q": (128, 64), "v": (64, 64), "o": (64, 128), "mlp_in": (176, 64), "mlp_out": (64, 176)}),
    ],
)
def test_75_percent_doubles_every_side(name: str, shapes: dict[str, tuple[int, int]]) -> None:
    result = planned(name, sparsity=0.75)
    found = {layer.kind: layer.sparse_shape for layer in result.layers}
    assert {kind: found[kind] for kind in shapes} == shapes
    assert {layer.sparsity for layer in result.layers} == {0.75}


def test_gpt3_small_equals_the_published_sizes() -> None:
    half = plan(load_config("gpt3-small"), SparseIFTConfig(sparsity=0.5), seq_len=1024)
    assert (sizes_of(half.hf_config).hidden, sizes_of(half.hf_config).ffn) == (1092, 4368)
    assert round(half.dense.flops.forward / 1e6, 1) == 284.8
    assert round(half.ratio_whole_model, 2) == 1.17
    assert {round(layer.sparsity, 5) for layer in half.layers} == {0.50537}
    wide = plan(load_config("gpt3-small"), SparseIFTConfig(sparsity=0.75), seq_len=1024)
    assert (sizes_of(wide.hf_config).hidden, sizes_of(wide.hf_config).ffn) == (1536, 6144)
    assert round(wide.sparse.flops.forward / 1e6, 1) == 399.8
    assert round(wide.ratio_whole_model, 2) == 1.40
    assert wide.ratio_linear == 1.0


# ---- whole-model accounting and ERK


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.75, 0.9, 0.95])
@every_scope
@every_architecture
def test_whole_model_accounting_is_iso_flop_or_refused(
    name: str, scope: str, sparsity: float, distribution: str
) -> None:
    config = SparseIFTConfig(
        scope=scope, sparsity=sparsity, accounting="whole_model", seq_len=SEQ_LEN, distribution=distribution
    )
    linears = planned(name, scope=scope, sparsity=sparsity)
    around = linears.sparse.flops.attention + linears.sparse.flops.logit
    around += 2 * sum(layer.num_weights for layer in linears.layers if not layer.is_sparse)
    if around >= linears.dense.flops.forward:
        message = r"accounting='whole_model' cannot be met: .* MFLOP per token; lower sparsity"
        with pytest.raises(ValueError, match=message):
            plan(TINY[name], config)
        return
    result = plan(TINY[name], config)
    assert result.seq_len == SEQ_LEN
    assert result.ratio_whole_model == pytest.approx(1.0, abs=1e-3)
    assert all(0 <= layer.num_active <= layer.num_weights for layer in result.layers)


def test_whole_model_accounting_that_cannot_be_met_is_refused() -> None:
    config = GPT2Config(**{**TOKENS, "vocab_size": 5000}, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    whole = SparseIFTConfig(sparsity=0.75, accounting="whole_model", seq_len=SEQ_LEN)
    message = r"cannot be met: .* lower sparsity=0\.75, use scope='ffn' or a smaller vocabulary"
    with pytest.raises(ValueError, match=message):
        plan(config, whole)


def test_whole_model_density_of_gpt3_small() -> None:
    config = SparseIFTConfig(sparsity=0.75, accounting="whole_model", seq_len=1024)
    result = plan(load_config("gpt3-small"), config)
    assert {round(1 - layer.sparsity, 3) for layer in result.layers} == {0.081}
    assert result.ratio_whole_model == pytest.approx(1.0, abs=1e-6)


def test_whole_model_accounting_refuses_to_be_shown_at_another_length() -> None:
    config = SparseIFTConfig(sparsity=0.5, accounting="whole_model", seq_len=64)
    assert plan(TINY["gpt2"], config, seq_len=64).ratio_whole_model == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(ValueError, match="seq_len"):
        plan(TINY["gpt2"], config, seq_len=16)


@every_scope
@every_architecture
def test_erk_keeps_the_total_and_favours_small_layers(name: str, scope: str) -> None:
    result = planned(name, scope=scope, sparsity=0.75, distribution="erk")
    assert result.ratio_linear == 1.0
    chosen = [layer for layer in result.layers if layer.is_sparse]
    assert all(0 < layer.num_active <= layer.num_weights for layer in chosen)
    free = [layer for layer in chosen if layer.num_active < layer.num_weights]
    per_side = [layer.num_active / num_sides(layer) for layer in free]
    assert max(per_side) - min(per_side) <= 2 / min(num_sides(layer) for layer in free)
