"""What the library knows of transformers' configs: which models are decoders, and which fields are widths.

Where projections are is found in projections.py; sizes themselves are computed in isoflop.py and families/.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparseift_llm.models.quirks import HIDDEN_TWINS, SEE_LATER_TOKENS
from sparseift_llm.record.quantization_mark import is_marked

# Names of one thing in different configs; a config's own `attribute_map` covers hidden size, heads and layers.
_FFN_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dim_ff", "dff")
_HEAD_DIM_FIELDS = ("head_dim", "dim_head")
_KV_HEADS_FIELDS = ("num_key_value_heads", "num_kv_heads")
_OWN_PARTS = ("attn_config", "ffn_config")  # sub-configs of a plain decoder; any other one is of another model
DEFAULT_FFN_RATIO = 4  # of hidden sizes, where a config leaves the FFN's inner size out


@dataclass(frozen=True)
class Sizes:
    """The widths of a decoder. `head_dim` times `num_heads` is the attention width."""

    hidden: int
    ffn: int
    head_dim: int
    num_heads: int
    num_layers: int
    vocab: int

    @property
    def attention_width(self) -> int:
        return self.head_dim * self.num_heads


def check_config(config: PreTrainedConfig) -> None:
    """Refuse what is not a decoder-only language model of float weights, as far as its config tells.

    Raises:
        ValueError: quantised, encoder-decoder, cross-attending, bidirectional, more than a text model, or no causal
            language model at all.
    """
    name = config.model_type
    if getattr(config, "quantization_config", None) is not None and not is_marked(config):
        raise ValueError("the model is quantised; sparsify needs float weights: load it without quantization_config")
    for flag in ("is_encoder_decoder", "add_cross_attention"):
        if getattr(config, flag, False):
            raise ValueError(f"{name} with {flag}=True is not supported; use a decoder-only language model")
    parts = [part for part in config.sub_configs if part not in _OWN_PARTS]
    if parts or config.get_text_config(decoder=True) is not config:
        raise ValueError(
            f"{name} is made of several models ({', '.join(parts)}), which is not supported; use a language model "
            "alone, e.g. of its text_config"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model type {name!r} has no causal language model in transformers, so it is not supported")
    if getattr(config, "is_heterogeneous", False):
        raise ValueError(f"{name} has layers of different sizes (per_layer_config), which is not supported")
    if name in SEE_LATER_TOKENS:
        raise ValueError(f"{name} is not a GPT: each token sees the later ones, too; use a causal language model")
    # other configs have a left-over field `is_decoder` that says nothing
    if hasattr(config, "add_cross_attention") and not getattr(config, "is_decoder", True):
        raise ValueError(f"{name} with is_decoder=False sees later tokens, too; set is_decoder=True")
    for twin in HIDDEN_TWINS.get(name, ()):
        if getattr(config, twin) != config.hidden_size:
            raise ValueError(
                f"{name} with {twin}={getattr(config, twin)} other than hidden_size={config.hidden_size} is not "
                "supported; make them equal"
            )


def sizes_of(config: PreTrainedConfig) -> Sizes:
    """The widths that a config gives. `families.wide.check_widths` compares them with the projections of the model.

    Raises:
        ValueError: as `check_config` does.
    """
    check_config(config)
    hidden, num_heads = config.hidden_size, config.num_attention_heads
    return Sizes(
        hidden=hidden,
        ffn=_first(config, _FFN_FIELDS) or DEFAULT_FFN_RATIO * hidden,
        head_dim=_first(config, _HEAD_DIM_FIELDS) or hidden // num_heads,
        num_heads=num_heads,
        num_layers=config.num_hidden_layers,
        vocab=config.vocab_size,
    )


def num_kv_heads(config: PreTrainedConfig) -> int:
    """Number of heads of keys and values, which groups of query heads may share."""
    return _first(config, _KV_HEADS_FIELDS) or int(config.num_attention_heads)


def head_dim_is_free(config: PreTrainedConfig) -> bool:
    """Whether the config sets the head size by itself (Qwen3, Gemma), instead of dividing the hidden size by heads."""
    sizes = sizes_of(config)
    return _first(config, _HEAD_DIM_FIELDS) is not None and sizes.attention_width != sizes.hidden


def valid_head_dim(config: PreTrainedConfig, head_dim: int) -> bool:
    """Whether rotary embeddings, where there are any, cover an even number of a head's dimensions."""
    return all(int(head_dim * rope.get("partial_rotary_factor", 1.0)) % 2 == 0 for rope in _ropes(config))


def with_sizes(
    config: PreTrainedConfig, hidden: int, ffn: int, head_dim: int, pin_head_dim: bool = False
) -> PreTrainedConfig:
    """A copy of `config` with other widths. The numbers of heads, layers and tokens stay.

    Some configs hold a number that scales the attention scores. It is changed with the head size, so that scores keep
    their variance.

    Args:
        config: the model's.
        hidden, ffn, head_dim: the new widths.
        pin_head_dim: write the head size down even where the config does not declare it. Many models look for it
            there; whether this one does is to be seen on the model.

    Raises:
        ValueError: no field of the config sets a width that changes.
    """
    sizes = sizes_of(config)
    for rope in _ropes(config):
        if head_dim != sizes.head_dim and any(isinstance(value, list) for value in rope.values()):
            raise ValueError(
                f"rope_parameters of type {rope.get('rope_type')!r} list a factor per head dimension, so heads cannot "
                "grow; use scope='ffn'"
            )
    config = copy.deepcopy(config)
    config.hidden_size = hidden
    ffn_field = next((name for name in _FFN_FIELDS if _can_set(config, name)), None)
    if ffn_field is not None:
        setattr(config, ffn_field, ffn)
    elif ffn != DEFAULT_FFN_RATIO * hidden:
        raise ValueError(
            f"{config.model_type} has no config field for the FFN's inner size, so it stays at {DEFAULT_FFN_RATIO} "
            "times the hidden size; use a family that needs none (parallel, factorized, doped)"
        )
    for twin in HIDDEN_TWINS.get(config.model_type, ()):
        setattr(config, twin, hidden)
    for name in _HEAD_DIM_FIELDS:
        if _can_set(config, name) and getattr(config, name) is not None:
            setattr(config, name, head_dim)
    if pin_head_dim and _first(config, _HEAD_DIM_FIELDS) is None:
        config.head_dim = head_dim
    if head_dim != sizes.head_dim:
        _scale_attention(config, head_dim / sizes.head_dim)
    return config


def _scale_attention(config: PreTrainedConfig, factor: float) -> None:
    scalar = getattr(config, "query_pre_attn_scalar", None)  # Gemma 2 and 3 divide scores by its root
    if scalar:
        config.query_pre_attn_scalar = round(scalar * factor) if isinstance(scalar, int) else scalar * factor
    if isinstance(getattr(config, "attention_multiplier", None), float):  # Granite multiplies scores by it
        config.attention_multiplier *= factor**-0.5


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The parameters of a config's rotary embeddings: of none, of one, or of one per kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or ([rope] if rope else [])


def _first(config: PreTrainedConfig, names: tuple[str, ...]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((int(value) for value in values if value is not None), None)


def _can_set(config: PreTrainedConfig, name: str) -> bool:
    return hasattr(config, name) and not isinstance(getattr(type(config), name, None), property)


def set_tokenizer_fields(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make `config` fit a tokenizer, in place: vocabulary size and special token ids."""
    config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    if config.bos_token_id is None:
        config.bos_token_id = config.eos_token_id


def build_model(config: PreTrainedConfig, meta: bool = False, **kwargs: Any) -> PreTrainedModel:
    """A freshly initialised causal language model; on the meta device (no memory, no values) if `meta`."""
    if meta:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **kwargs)
    return AutoModelForCausalLM.from_config(config, **kwargs)
