"""A tiny random model of any model type of transformers, from its own default config. No tests stand here."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.models import VOCAB, shake

# Field names as configs spell them; each model type takes those that it has.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dim_ff", "dff"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    "rotary_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "embedding_size": 32,
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "is_decoder": True,
}
_DROPOUTS = ("dropout", "drop", "pdrop")
# What is not a size, or a size of another name that has to fit the others.
_SPECIAL: dict[str, dict[str, Any]] = {
    "opt": {"word_embed_proj_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"block_auto_adjust_ff_dim": False},
}


def decoder_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The default config of a model type with standard sizes made tiny and without dropout; `changes` override it."""
    default = CONFIG_MAPPING[model_type]()
    fields = default.to_dict()
    values = {name: size for name, size in _SIZES.items() if name in fields}
    for name, value in fields.items():
        if name.endswith(_DROPOUTS) and isinstance(value, float):
            values[name] = 0.0
    return CONFIG_MAPPING[model_type](**{**values, **_SPECIAL.get(model_type, {}), **changes})


def decoder(model_type: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """Random, with no parameter at a special value, and no random part in its forward pass."""
    torch.manual_seed(0)
    config = decoder_config(model_type, **changes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shake(model)
    return model
