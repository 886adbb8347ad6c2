"""A tiny random model of any model type of transformers, from its own default config. No tests stand here."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.helpers.models import VOCAB, shake

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
_ROPES = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
_SPECIAL: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "cohere_compass_text": {"rope_parameters": _ROPES},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2}},
    "deepseek_v3": {"num_hidden_layers": 4},  # layers with experts come after dense ones
    "dots1": {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_shared_experts": 1},
    "flint": {"num_hidden_layers": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["full_attention"] * 2, "num_dense_layers": 0},
    "minicpm3": {"num_key_value_heads": 4},
    "opt": {"word_embed_proj_dim": 32},
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    # loading, transformers sets its padding row to 0
    "youtu": {"num_key_value_heads": 4, "head_dim": 4, "pad_token_id": None},
}
# Model types whose default config is left as it is: its sizes depend on each other, and it is refused anyway.
_AS_IT_IS = ("bamba", "dots3_note_text", "granitemoehybrid", "mamba2", "zamba", "zamba2")

FFN_FIXED = ("bloom", "gpt_neox_japanese", "mpt", "openai-gpt")  # no config field sets their FFN's inner size
LATENT = ("minicpm3", "youtu")  # low-rank attention, whose widths are further config fields
# One of every layout, and whatever differs in how a config gives its widths: tested in training.
DISTINCT = (
    "apertus", "bert", "biogpt", "bloom", "codegen", "cohere", "ctrl", "diffllama", "falcon", "gemma2", "gemma3_text",
    "glm", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gptj", "granite", "helium", "lfm2",
    "llama", "minicpm3", "modernbert-decoder", "mpt", "nanochat", "nemotron", "olmo2", "openai-gpt", "opt",
    "persimmon", "phi", "phi3", "qwen3", "stablelm", "starcoder2", "xglm", "youtu",
)  # fmt: skip
SUPPORTED = (
    *DISTINCT,
    "arcee", "bert-generation", "big_bird", "bitnet", "camembert", "cohere2", "cohere_compass_text", "cwm",
    "data2vec-text", "electra", "ernie", "ernie4_5", "exaone4", "gemma", "glm4", "gpt-sw3", "granite_swa",
    "hunyuan_v1_dense", "hyperclovax", "internlm3", "iquestcoder", "jais2", "megatron-bert", "ministral", "ministral3",
    "mistral", "olmo", "olmo3", "qwen2", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
    "seed_oss", "smollm3", "vaultgemma", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip

REFUSED: dict[str, tuple[str, ...]] = {
    "is_encoder_decoder=True is not supported": (
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "musicgen", "musicgen_melody",
        "mvp", "pegasus", "plbart", "prophetnet", "whisper",
    ),
    "is made of several models": (
        "blt", "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified",
        "gemma4_unified_assistant", "git", "got_ocr2", "llama4", "mllama", "moshi", "moss_transcribe_diarize",
        "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp",
    ),
    r"\.\d\..*(expert|input_linear).* is of a mixture of experts": (
        "afmoe", "aria_text", "axk1", "axk2", "cohere2_moe", "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v4",
        "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "glm4_moe", "glm4_moe_lite", "gpt_oss",
        "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4",
        "inkling2_text", "inkling_text", "jamba", "jetmoe", "kimi_linear", "kolibri1", "laguna", "lfm2_moe",
        "llama4_text", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text", "mixtral",
        "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen4_exp_text",
        "solar_open", "zaya",
    ),
    "is in a Conv1d, not in a Linear": (
        "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "lfm3", "mamba", "mamba2", "olmo_hybrid",
        "qwen3_5_text", "recurrent_gemma", "zamba", "zamba2",
    ),
    "is in a (RwkvSelfAttention|XLNetRelativeAttention), not in a Linear": ("rwkv", "xlnet"),
    "is in an attention but none of q, k, v, o by its name": (
        "beam", "deepseek_v32", "doge", "glm_moe_dsa", "reformer",
    ),
    "by its shape and name, the in or out of an MLP": ("gemma3n_text", "xlstm"),
    "has MLP weights": ("xmod",),
    "has attention weights": ("xlm",),
    "cross-attention": ("trocr",),
    "has no list of": ("hrm_text", "longcat_flash"),
    "has layers of different sizes": ("dots3_note_text", "gemma4_text", "gemma4_unified_text"),
    "each token sees the later ones": ("cpmant",),
}  # fmt: skip


def decoder_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The default config of a model type with standard sizes made tiny and without dropout; `changes` override it."""
    if model_type == "gemma4_assistant":  # its own default is not valid
        sizes = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
        changes["text_config"] = CONFIG_MAPPING["gemma4_text"](**sizes).to_dict()
        return CONFIG_MAPPING[model_type](**changes)
    default = CONFIG_MAPPING[model_type]()
    if model_type in _AS_IT_IS:
        return default
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
    return model.eval()
