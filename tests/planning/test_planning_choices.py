"""What a plan lets one choose, refuses, records and prints."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    T5Config,
)

from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.planning.planner import plan
from tests.helpers.planned_models import (
    COMMON,
    LLAMA,
    SEQ_LEN,
    TINY,
    TOKENS,
    planned,
    planned_at_any_cost,
)

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
    result = planned_at_any_cost("llama", sparsity=0.75, **options)
    assert {layer.kind for layer in result.layers if layer.is_sparse} == sparse_kinds
    for layer in result.layers:
        rows, columns = layer.dense_shape if layer.is_sparse else layer.sparse_shape
        assert layer.num_active == rows * columns
    assert result.sparse.linear_active_params == sum(layer.num_active for layer in result.layers)
    assert result.sparse.topology_bytes == sum(layer.num_weights for layer in result.layers if layer.is_sparse)


@pytest.mark.parametrize("options", [{"targets": ("q",)}, {"targets": ("q", "v", "o")}, {"exclude": ("k",)}])
@pytest.mark.parametrize(
    ("name", "layer"), [("gpt2", "transformer.h.0.attn.c_attn"), ("gpt_neox", "gpt_neox.layers.0.attention.query_key")]
)
def test_a_part_of_a_fused_projection_is_refused(name: str, layer: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(layer) + r".* holds q, k, v in one matrix.*targets/exclude"):
        plan(TINY[name], SparseIFTConfig(**options))


def test_a_whole_fused_projection_can_be_chosen_or_left_dense() -> None:
    chosen = planned_at_any_cost("gpt2", sparsity=0.75, targets=("q", "k", "v"))
    assert {layer.kind for layer in chosen.layers if layer.is_sparse} == {"qkv"}
    left = planned_at_any_cost("gpt2", sparsity=0.75, exclude=("q", "k", "v"))
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
    **LLAMA,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MixtralConfig(num_hidden_layers=1),
            r"experts\.gate_up_proj \(8 x 28672 x 4096\) is of a mixture of experts",
        ),
        (Qwen2MoeConfig(num_hidden_layers=1), "mixture of experts, which is not supported; use a dense architecture"),
        (LlamaConfig(**_QUANTISED), "quantised.*without quantization_config"),
        (T5Config(num_layers=1), "t5 with is_encoder_decoder=True is not supported; use a decoder-only"),
        (BertConfig(num_hidden_layers=1), "bert with is_decoder=False sees later tokens"),
        (OPTConfig(**COMMON, ffn_dim=128, word_embed_proj_dim=16), "word_embed_proj_dim=16 .*make them equal"),
        (
            GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True),
            "cross",
        ),
    ],
    ids=["mixtral", "qwen2_moe", "quantised", "t5", "bert", "opt-projected", "gpt2-cross-attention"],
)
def test_unsupported_models_are_refused(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(config, SparseIFTConfig())


def test_a_sparse_ift_config_is_refused() -> None:
    config = GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4)
    config.sparse_ift = SparseIFTConfig().to_dict()
    with pytest.raises(ValueError, match="already a Sparse-IFT model"):
        plan(config, SparseIFTConfig())


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
        "family": "wide",
        "matrices": [{"name": "model.layers.0.self_attn.q_proj", "shape": [64, 64], "num_active": 1024}],
    }
    # q, o: 32 x 32; k, v: 16 x 32; gate, up, down: 88 x 32; two layers
    assert values["dense"]["linear_active_params"] == 2 * (2 * 1024 + 2 * 512 + 3 * 2816)
    assert values["dense"]["linear_flops_per_token"] == 2 * values["dense"]["linear_active_params"]
    assert values["dense"]["attention_flops_per_token"] == 4 * SEQ_LEN * 32 * 2
    assert values["dense"]["logit_flops_per_token"] == 2 * 32 * 97
    assert values["dense"]["train_state_bytes"] == 16 * values["dense"]["stored_params"]
    masked = 4 * 2 * (2 * 1024 + 2 * 512 + 3 * 2816)
    assert values["sparse"]["train_state_bytes"] == 16 * values["sparse"]["stored_params"] + masked
