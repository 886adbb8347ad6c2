"""Tiny dense configs, and costs counted from the modules of really built models. No tests stand here."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import nn
from transformers import (
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.models.architectures import build_model
from sparseift_llm.planning.planner import Plan, plan, plan_of_dense
from sparseift_llm.record.specs import LayerSpec

SEQ_LEN = 48
SPARSITIES = (0.0, 0.3, 0.5, 0.75, 0.9)
SCOPES = ("model", "ffn")

TOKENS: dict[str, Any] = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
COMMON: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA: dict[str, Any] = {**COMMON, "intermediate_size": 88, "num_key_value_heads": 2}
NEOX: dict[str, Any] = {**COMMON, "intermediate_size": 128, "rotary_pct": 0.25}
TINY: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": GPTNeoXConfig(**NEOX),
    "opt": OPTConfig(**COMMON, ffn_dim=128, word_embed_proj_dim=32),
    "llama": LlamaConfig(**LLAMA),
    "mistral": MistralConfig(**LLAMA),
    "qwen2": Qwen2Config(**LLAMA),
    "qwen3": Qwen3Config(**LLAMA, head_dim=16),
    "gemma": GemmaConfig(**LLAMA, head_dim=16),
}
NAMES = sorted(TINY)
PER_LAYER = {"gpt2": 4, "gpt_neox": 4, "opt": 6, "llama": 7, "mistral": 7, "qwen2": 7, "qwen3": 7, "gemma": 7}

every_architecture = pytest.mark.parametrize("name", NAMES)
every_scope = pytest.mark.parametrize("scope", SCOPES)
every_sparsity = pytest.mark.parametrize("sparsity", SPARSITIES)


@functools.cache
def planned(name: str, **options: Any) -> Plan:
    return plan(TINY[name], SparseIFTConfig(**options), seq_len=SEQ_LEN)


def planned_at_any_cost(name: str, **options: Any) -> Plan:
    """As `planned`, but projections that stay dense may grow, as version 0.1 had it."""
    return plan_of_dense(TINY[name], SparseIFTConfig(**options), seq_len=SEQ_LEN)


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


def num_sides(layer: LayerSpec) -> int:
    """Outputs and inputs of a layer; where queries, keys and values share a matrix, those of three matrices."""
    rows, columns = layer.sparse_shape
    return rows + columns * (3 if layer.kind == "qkv" else 1)


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
