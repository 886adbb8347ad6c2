"""Plans against counts made independently from the modules of models that are really built.

Every supported architecture is planned at tiny sizes, in both scopes, at several sparsities.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    T5Config,
)
from transformers.pytorch_utils import Conv1D

from sparseift_llm.architectures import ARCHITECTURES, build_model, sizes_of
from sparseift_llm.config import SparseIFTConfig
from sparseift_llm.families.wide import wide_config
from sparseift_llm.planning import Plan, count_flops, plan, plan_of, read_record, record
from sparseift_llm.presets import load_config

SEQ_LEN = 48
SPARSITIES = (0.0, 0.3, 0.5, 0.75, 0.9)
SCOPES = ("model", "ffn")

_TOKENS: dict[str, Any] = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA: dict[str, Any] = {**_COMMON, "intermediate_size": 88, "num_key_value_heads": 2}
_NEOX: dict[str, Any] = {**_COMMON, "intermediate_size": 128, "rotary_pct": 0.25}
TINY: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": GPTNeoXConfig(**_NEOX),
    "opt": OPTConfig(**_COMMON, ffn_dim=128, word_embed_proj_dim=32),
    "llama": LlamaConfig(**_LLAMA),
    "mistral": MistralConfig(**_LLAMA),
    "qwen2": Qwen2Config(**_LLAMA),
    "qwen3": Qwen3Config(**_LLAMA, head_dim=16),
    "gemma": GemmaConfig(**_LLAMA, head_dim=16),
}
NAMES = sorted(ARCHITECTURES)
PER_LAYER = {"gpt2": 4, "gpt_neox": 4, "opt": 6, "llama": 7, "mistral": 7, "qwen2": 7, "qwen3": 7, "gemma": 7}

every_architecture = pytest.mark.parametrize("name", NAMES)
every_scope = pytest.mark.parametrize("scope", SCOPES)
every_sparsity = pytest.mark.parametrize("sparsity", SPARSITIES)


@functools.cache
def planned(name: str, **options: Any) -> Plan:
    return plan(TINY[name], SparseIFTConfig(**options), seq_len=SEQ_LEN)


@functools.cache
def dense_model(name: str) -> PreTrainedModel:
    return build_model(TINY[name])


def weight_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear map but the LM head, by the parameter itself."""
    shapes = {}
    for name, module in model.named_modules():
        if module is model.get_output_embeddings():
            continue
        if isinstance(module, Conv1D):
            shapes[name] = (module.weight.shape[1], module.weight.shape[0])
        elif isinstance(module, nn.Linear):
            shapes[name] = (module.weight.shape[0], module.weight.shape[1])
    return shapes


def attention_flops(model: PreTrainedModel) -> int:
    """Scores and values from the shape of the query projections: 2 * T * width each, per layer."""
    total = 0
    for name, (rows, _) in weight_shapes(model).items():
        if name.endswith((".c_attn", ".query_key_value")):
            total += 4 * SEQ_LEN * (rows // 3)
        elif name.endswith(".q_proj"):
            total += 4 * SEQ_LEN * rows
    return total


def check_costs(model: PreTrainedModel, planned_cost: Any) -> None:
    assert planned_cost.flops.attention == attention_flops(model) > 0
    assert planned_cost.flops.logit == 2 * model.get_output_embeddings().weight.numel()
    assert planned_cost.flops.linear == 2 * planned_cost.linear_active_params
    assert planned_cost.linear_params == sum(rows * columns for rows, columns in weight_shapes(model).values())
    assert planned_cost.stored_params == sum(parameter.numel() for parameter in model.parameters())


# ---- counts


@every_architecture
def test_dense_costs_equal_a_really_built_model(name: str) -> None:
    model = dense_model(name)
    shapes = weight_shapes(model)
    assert len(shapes) == 2 * PER_LAYER[name]
    dense = planned(name).dense
    assert dense.linear_active_params == sum(rows * columns for rows, columns in shapes.values())
    assert dense.num_masked == 0
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
    assert result.sparse.num_masked == sum(shapes[layer][0] * shapes[layer][1] for layer in masked)
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
    config = GPT2Config(**{**_TOKENS, "vocab_size": 5000}, n_embd=32, n_layer=2, n_head=4, n_positions=64)
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
    per_side = [layer.num_active / sum(layer.sparse_shape) for layer in free]
    assert max(per_side) - min(per_side) <= 2 / min(sum(layer.sparse_shape) for layer in free)


# ---- targets and exclude


@pytest.mark.parametrize(
    ("options", "sparse_kinds"),
    [
        ({"targets": ("mlp_in",)}, {"mlp_in"}),
        ({"targets": ("q", "k", "v")}, {"q", "k", "v"}),
        ({"exclude": ("mlp_out", "o")}, {"q", "k", "v", "mlp_in"}),
        ({"targets": ("q", "o"), "exclude": ("q",)}, {"o"}),
        ({"scope": "ffn", "exclude": ("mlp_out",)}, {"mlp_in"}),
    ],
)
def test_targets_and_exclude(options: dict[str, Any], sparse_kinds: set[str]) -> None:
    result = planned("llama", sparsity=0.75, **options)
    assert {layer.kind for layer in result.layers if layer.is_sparse} == sparse_kinds
    for layer in result.layers:
        rows, columns = layer.dense_shape if layer.is_sparse else layer.sparse_shape
        assert layer.num_active == rows * columns
    assert result.sparse.linear_active_params == sum(layer.num_active for layer in result.layers)
    assert result.sparse.num_masked == sum(layer.num_weights for layer in result.layers if layer.is_sparse)


@pytest.mark.parametrize("options", [{"targets": ("q",)}, {"targets": ("q", "v", "o")}, {"exclude": ("k",)}])
@pytest.mark.parametrize(
    ("name", "layer"), [("gpt2", "transformer.h.0.attn.c_attn"), ("gpt_neox", "gpt_neox.layers.0.attention.query_key")]
)
def test_a_part_of_a_fused_projection_is_refused(name: str, layer: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(layer) + r".* holds q, k, v in one matrix.*targets/exclude"):
        plan(TINY[name], SparseIFTConfig(**options))


def test_a_whole_fused_projection_can_be_chosen_or_left_dense() -> None:
    chosen = planned("gpt2", sparsity=0.75, targets=("q", "k", "v"))
    assert {layer.kind for layer in chosen.layers if layer.is_sparse} == {"qkv"}
    left = planned("gpt2", sparsity=0.75, exclude=("q", "k", "v"))
    assert {layer.kind for layer in left.layers if not layer.is_sparse} == {"qkv"}


@pytest.mark.parametrize(
    "options", [{"targets": ("o",), "exclude": ("o",)}, {"scope": "ffn", "exclude": ("mlp_in", "mlp_out")}]
)
def test_nothing_to_make_sparse_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"no projection of gpt2 .*\['mlp_in', 'mlp_out', 'o', 'qkv'\]: change targets"
    ):
        plan(TINY["gpt2"], SparseIFTConfig(**options))


# ---- models that are refused


_QUANTISED: dict[str, Any] = {
    **_LLAMA,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MixtralConfig(num_hidden_layers=1), "mixtral is a mixture of experts .*=8.* which is not supported"),
        (Qwen2MoeConfig(num_hidden_layers=1), "qwen2_moe is a mixture of experts"),
        (LlamaConfig(**_QUANTISED), "quantised.*without quantization_config"),
        (T5Config(num_layers=1), "'t5' is not supported; supported: gpt2, gpt_neox, opt, llama"),
        (BertConfig(num_hidden_layers=1, is_decoder=True), "'bert' is not supported; supported: gpt2"),
        (OPTConfig(**_COMMON, ffn_dim=128, word_embed_proj_dim=16), "word_embed_proj_dim=16 .*make them equal"),
        (
            GPT2Config(**_TOKENS, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True),
            "cross",
        ),
    ],
    ids=["mixtral", "qwen2_moe", "quantised", "t5", "bert", "opt-projected", "gpt2-cross-attention"],
)
def test_unsupported_models_are_refused(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(config, SparseIFTConfig())


def test_a_sparse_ift_config_is_refused() -> None:
    config = GPT2Config(**_TOKENS, n_embd=32, n_layer=2, n_head=4)
    config.sparse_ift = SparseIFTConfig().to_dict()
    with pytest.raises(ValueError, match="already a Sparse-IFT model"):
        plan(config, SparseIFTConfig())


# ---- the record that a Sparse-IFT model carries


def with_record(name: str, **options: Any) -> PreTrainedConfig:
    result = planned(name, **options)
    config = type(result.hf_config).from_dict(result.hf_config.to_dict())
    config.sparse_ift = json.loads(json.dumps(record(result, TINY[name])))
    return config


@every_scope
@every_architecture
def test_a_plan_is_worked_out_again_from_its_record(name: str, scope: str) -> None:
    model = build_model(with_record(name, scope=scope, sparsity=0.6, distribution="erk"), meta=True)
    again = plan_of(model, SEQ_LEN)
    assert again.to_dict() == planned(name, scope=scope, sparsity=0.6, distribution="erk").to_dict()


def test_a_model_without_a_record_is_refused() -> None:
    with pytest.raises(ValueError, match="not a Sparse-IFT model"):
        plan_of(dense_model("gpt2"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"sparsity": 2}, "sparsity must be in"),
        ({"sparsty": 0.5}, "unknown key 'sparsty'"),
        ({"dense_sizes": {"hidden": 32}}, "dense_sizes"),
        ({"dense_sizes": None}, "dense_sizes"),
        ({"dense_sizes": {"hidden": "32", "ffn": 128, "head_dim": 8}}, "dense_sizes"),
    ],
)
def test_a_damaged_record_is_refused(damage: dict[str, Any], message: str) -> None:
    config = with_record("gpt2", sparsity=0.5)
    config.sparse_ift = {**config.sparse_ift, **damage}
    with pytest.raises(ValueError, match=message):
        read_record(config)


# ---- sequence length and output


def test_the_sequence_length_defaults_to_the_config_then_to_the_model() -> None:
    assert plan(TINY["gpt2"], SparseIFTConfig(), seq_len=7).seq_len == 7
    assert plan(TINY["gpt2"], SparseIFTConfig(seq_len=9)).seq_len == 9
    assert plan(TINY["gpt2"], SparseIFTConfig(seq_len=9), seq_len=7).seq_len == 7
    assert plan(TINY["gpt2"], SparseIFTConfig()).seq_len == 64


@pytest.mark.parametrize("seq_len", [0, -3])
def test_a_sequence_length_below_one_is_refused(seq_len: int) -> None:
    with pytest.raises(ValueError, match="seq_len"):
        plan(TINY["gpt2"], SparseIFTConfig(), seq_len=seq_len)


def test_to_dict_is_json_with_the_figures_of_the_plan() -> None:
    result = planned("llama", sparsity=0.75)
    values = json.loads(json.dumps(result.to_dict()))
    assert values["config"] == result.config.to_dict()
    assert (values["model_type"], values["seq_len"]) == ("llama", SEQ_LEN)
    assert values["ratio_linear"] == 1.0
    assert values["ratio_whole_model"] == result.ratio_whole_model > 1
    assert len(values["layers"]) == 14
    assert values["layers"][0] == {
        "name": "model.layers.0.self_attn.q_proj",
        "kind": "q",
        "dense_shape": [32, 32],
        "sparse_shape": [64, 64],
        "num_active": 1024,
        "sparsity": 0.75,
    }
    # q, o: 32 x 32; k, v: 16 x 32; gate, up, down: 88 x 32; two layers
    assert values["dense"]["linear_active_params"] == 2 * (2 * 1024 + 2 * 512 + 3 * 2816)
    assert values["dense"]["linear_flops_per_token"] == 2 * values["dense"]["linear_active_params"]
    assert values["dense"]["attention_flops_per_token"] == 4 * SEQ_LEN * 32 * 2
    assert values["dense"]["logit_flops_per_token"] == 2 * 32 * 97
    assert values["dense"]["train_state_bytes"] == 16 * values["dense"]["stored_params"]
    masked = 4 * 2 * (2 * 1024 + 2 * 512 + 3 * 2816)
    assert values["sparse"]["train_state_bytes"] == 16 * values["sparse"]["stored_params"] + masked


# ---- widths over many sparsities


def rotary_size(config: PreTrainedConfig, head_dim: int) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    return int(head_dim * rope.get("partial_rotary_factor", 1.0)) if rope else 0


@given(
    name=st.sampled_from(NAMES),
    scope=st.sampled_from(SCOPES),
    sparsity=st.floats(0, 0.95),
    multiple=st.sampled_from([1, 2, 3, 8, 16]),
)
def test_widths_are_valid_and_near_what_was_asked(name: str, scope: str, sparsity: float, multiple: int) -> None:
    dense = sizes_of(TINY[name])
    config = wide_config(TINY[name], SparseIFTConfig(scope=scope, sparsity=sparsity, width_multiple=multiple))
    wide = sizes_of(config)
    assert (wide.num_heads, wide.num_layers, wide.vocab) == (dense.num_heads, dense.num_layers, dense.vocab)
    if scope == "ffn":
        assert (wide.hidden, wide.head_dim) == (dense.hidden, dense.head_dim)
        assert sparsity == 0 or (wide.ffn % multiple == 0 and abs(wide.ffn - dense.ffn / (1 - sparsity)) <= multiple)
        return
    assert rotary_size(config, wide.head_dim) % 2 == 0
    factor = (1 / (1 - sparsity)) ** 0.5
    # a valid head size is at most 2.5 away (partial rotary), for each of 4 heads, times what a multiple of 3 costs
    assert abs(wide.hidden - dense.hidden * factor) <= 2.5 * 4 * max(3, multiple / 4)
    assert abs(wide.head_dim - dense.head_dim * factor) <= 2.5 * max(3, multiple / 4)
    assert abs(wide.ffn / dense.ffn - wide.hidden / dense.hidden) <= multiple / dense.ffn + 12 / dense.hidden
    if dense.attention_width == dense.hidden:
        assert wide.attention_width == wide.hidden
    if sparsity > 0:
        assert wide.hidden % multiple == 0


@given(name=st.sampled_from(NAMES), scope=st.sampled_from(SCOPES), sparsity=st.floats(0.01, 0.95))
@settings(max_examples=25, deadline=None)
def test_realised_sparsity_at_real_sizes_is_near_what_was_asked(name: str, scope: str, sparsity: float) -> None:
    dense = TINY[name].__class__.from_dict({**TINY[name].to_dict(), **REAL_SIZES[name]})
    for layer in plan(dense, SparseIFTConfig(scope=scope, sparsity=sparsity)).layers:
        if layer.is_sparse:
            assert layer.sparsity == pytest.approx(sparsity, abs=0.06)


_REAL: dict[str, Any] = {"hidden_size": 768, "num_attention_heads": 12}
_REAL_LLAMA: dict[str, Any] = {**_REAL, "intermediate_size": 2000, "num_key_value_heads": 4, "head_dim": 64}
REAL_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 768, "n_head": 12},
    "gpt_neox": {**_REAL, "intermediate_size": 3072},
    "opt": {**_REAL, "ffn_dim": 3072, "word_embed_proj_dim": 768},
    "llama": _REAL_LLAMA,
    "mistral": _REAL_LLAMA,
    "qwen2": {key: value for key, value in _REAL_LLAMA.items() if key != "head_dim"},
    "qwen3": {**_REAL_LLAMA, "head_dim": 128},
    "gemma": {**_REAL_LLAMA, "head_dim": 128},
}


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
@pytest.mark.parametrize(
    ("scope", "sparsity", "multiple"), [("ffn", 0.1, 100), ("model", 0.05, 20), ("model", 0.3, 64), ("ffn", 0.2, 256)]
)
def test_rounding_never_leaves_less_room_than_the_dense_model(
    scope: str, sparsity: float, multiple: int, distribution: str
) -> None:
    config = SparseIFTConfig(scope=scope, sparsity=sparsity, width_multiple=multiple, distribution=distribution)
    result = plan(TINY["gpt2"], config)
    assert all(0 <= layer.sparsity < 1 for layer in result.layers)
    assert result.ratio_linear == 1.0


@pytest.mark.parametrize("rotary_pct", [0.25, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("sparsity", [0.2, 0.45, 0.6, 0.85])
def test_partial_rotary_heads_run_at_every_width(rotary_pct: float, sparsity: float) -> None:
    dense = GPTNeoXConfig(**{**_NEOX, "rotary_pct": rotary_pct})
    result = plan(dense, SparseIFTConfig(sparsity=sparsity))
    assert rotary_size(result.hf_config, sizes_of(result.hf_config).head_dim) % 2 == 0
    with torch.no_grad():
        logits = build_model(result.hf_config)(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert bool(logits.isfinite().all())
