"""What the library knows of transformers' GPT classes: where projections are, and which config fields are widths.

Sizes themselves are computed in isoflop.py and families/.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.layers.composite import CompositeProjection
from sparseift_llm.layout import is_marked

_SPLIT_ATTENTION = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
}
_LLAMA_PROJECTIONS = {
    **_SPLIT_ATTENTION,
    "self_attn.o_proj": ("o",),
    "mlp.gate_proj": ("mlp_in",),
    "mlp.up_proj": ("mlp_in",),
    "mlp.down_proj": ("mlp_out",),
}


@dataclass(frozen=True)
class Architecture:
    """Names of one model type's config fields and projections.

    Args:
        projections: path inside a decoder layer -> the kinds it holds (several when fused).
        hidden, ffn, num_heads, num_layers: config fields.
        hidden_twins: further config fields that must equal the hidden size.
        final_norm: path of the norm before the logits, inside the model.
        rotary: whether heads carry rotary embeddings, which need an even size.
        qkv_layout: rows of a fused QKV matrix: `blocks` (all q, all k, all v) or `per_head`.
        norm_offset: what the norms add to their weight before multiplying (Gemma: 1).
        activation: the module between mlp_in and mlp_out, named from the parent of mlp_out, where it stands alone
            between them.
    """

    projections: Mapping[str, tuple[str, ...]]
    final_norm: str
    hidden: str = "hidden_size"
    ffn: str = "intermediate_size"
    num_heads: str = "num_attention_heads"
    num_layers: str = "num_hidden_layers"
    hidden_twins: tuple[str, ...] = ()
    rotary: bool = True
    qkv_layout: str | None = None
    norm_offset: float = 0.0
    activation: str | None = None


_LLAMA = Architecture(_LLAMA_PROJECTIONS, final_norm="model.norm")
ARCHITECTURES = {
    "gpt2": Architecture(
        {
            "attn.c_attn": ("q", "k", "v"),
            "attn.c_proj": ("o",),
            "mlp.c_fc": ("mlp_in",),
            "mlp.c_proj": ("mlp_out",),
        },
        final_norm="transformer.ln_f",
        hidden="n_embd",
        ffn="n_inner",
        num_heads="n_head",
        num_layers="n_layer",
        rotary=False,
        qkv_layout="blocks",
        activation="act",
    ),
    "gpt_neox": Architecture(
        {
            "attention.query_key_value": ("q", "k", "v"),
            "attention.dense": ("o",),
            "mlp.dense_h_to_4h": ("mlp_in",),
            "mlp.dense_4h_to_h": ("mlp_out",),
        },
        final_norm="gpt_neox.final_layer_norm",
        qkv_layout="per_head",
        activation="act",
    ),
    "opt": Architecture(
        {**_SPLIT_ATTENTION, "self_attn.out_proj": ("o",), "fc1": ("mlp_in",), "fc2": ("mlp_out",)},
        final_norm="model.decoder.final_layer_norm",
        ffn="ffn_dim",
        hidden_twins=("word_embed_proj_dim",),
        rotary=False,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": Architecture(_LLAMA_PROJECTIONS, final_norm="model.norm", norm_offset=1.0),
}


@dataclass(frozen=True)
class Projection:
    """One dense projection of a decoder layer.

    Args:
        name: module path in the model.
        kinds: what it computes, of q, k, v, o, mlp_in, mlp_out; several when fused.
        in_features, out_features: sides.
        layer_index: of its decoder layer.
        num_weights: of all its matrices, zeros included.
    """

    name: str
    kinds: tuple[str, ...]
    in_features: int
    out_features: int
    layer_index: int
    num_weights: int

    @property
    def kind(self) -> str:
        """The kinds as one word, e.g. `qkv` or `mlp_in`."""
        return "".join(self.kinds)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features


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


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The entry of `ARCHITECTURES` for a config.

    Raises:
        ValueError: mixture of experts, quantised, or a model type that is not supported.
    """
    if getattr(config, "quantization_config", None) is not None and not is_marked(config):
        raise ValueError("the model is quantised; sparsify needs float weights: load it without quantization_config")
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if getattr(config, name, None):
            raise ValueError(
                f"{config.model_type} is a mixture of experts ({name}={getattr(config, name)}), which is not "
                f"supported; use a dense architecture: {', '.join(ARCHITECTURES)}"
            )
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"model type {config.model_type!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    for name in ("is_encoder_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            raise ValueError(
                f"{config.model_type} with {name}=True is not supported; use a decoder-only language model"
            )
    architecture = ARCHITECTURES[config.model_type]
    hidden = getattr(config, architecture.hidden)
    for twin in architecture.hidden_twins:
        if getattr(config, twin) != hidden:
            raise ValueError(
                f"{config.model_type} with {twin}={getattr(config, twin)} other than {architecture.hidden}={hidden} "
                "is not supported; make them equal"
            )
    return architecture


def sizes_of(config: PreTrainedConfig) -> Sizes:
    """Read a config's widths. Raises ValueError as `architecture_of` does."""
    architecture = architecture_of(config)
    hidden = getattr(config, architecture.hidden)
    num_heads = getattr(config, architecture.num_heads)
    return Sizes(
        hidden=hidden,
        ffn=getattr(config, architecture.ffn) or 4 * hidden,  # GPT-2 leaves n_inner None for 4 x
        head_dim=getattr(config, "head_dim", None) or hidden // num_heads,
        num_heads=num_heads,
        num_layers=getattr(config, architecture.num_layers),
        vocab=config.vocab_size,
    )


def head_dim_is_free(config: PreTrainedConfig) -> bool:
    """Whether the head size is set apart from the hidden size (Qwen3, Gemma) instead of following from it."""
    sizes = sizes_of(config)
    return getattr(config, "head_dim", None) is not None and sizes.attention_width != sizes.hidden


def valid_head_dim(config: PreTrainedConfig, head_dim: int) -> bool:
    """Whether rotary embeddings, where there are any, cover an even number of a head's dimensions."""
    if not architecture_of(config).rotary:
        return True
    rope = getattr(config, "rope_parameters", None) or {}
    return int(head_dim * rope.get("partial_rotary_factor", 1.0)) % 2 == 0


def with_sizes(config: PreTrainedConfig, hidden: int, ffn: int, head_dim: int) -> PreTrainedConfig:
    """A copy of `config` with other widths; heads, layers and vocabulary stay."""
    architecture = architecture_of(config)
    rope = getattr(config, "rope_parameters", None) or {}
    if head_dim != sizes_of(config).head_dim and any(isinstance(value, list) for value in rope.values()):
        raise ValueError(
            f"rope_parameters of type {rope.get('rope_type')!r} list a factor per head dimension, so heads cannot "
            "grow; use scope='ffn'"
        )
    config = copy.deepcopy(config)
    setattr(config, architecture.hidden, hidden)
    setattr(config, architecture.ffn, ffn)
    for twin in architecture.hidden_twins:
        setattr(config, twin, hidden)
    if getattr(config, "head_dim", None) is not None:
        config.head_dim = head_dim
    return config


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


def find_projections(model: PreTrainedModel) -> list[Projection]:
    """All attention and MLP projections of the decoder layers, layer by layer.

    Raises:
        ValueError: the architecture is not supported, or a decoder layer lacks a projection
            that it should have.
    """
    architecture = architecture_of(model.config)
    found = []
    for layer_index, (prefix, layer) in enumerate(_decoder_layers(model)):
        for path, kinds in architecture.projections.items():
            try:
                module = layer.get_submodule(path)
            except AttributeError:
                raise ValueError(
                    f"{prefix}.{path} is missing in {type(model).__name__}; this version of transformers "
                    "lays the architecture out differently"
                ) from None
            name, (inputs, outputs) = f"{prefix}.{path}", _in_out(module, f"{prefix}.{path}")
            found.append(Projection(name, kinds, inputs, outputs, layer_index, _num_weights(module)))
    return found


def _decoder_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    num_layers = sizes_of(model.config).num_layers
    decoder = model.get_decoder()
    prefixes = {module: name for name, module in model.named_modules()}
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            for index, layer in enumerate(module):
                yield f"{prefixes[module]}.{index}", layer
            return
    raise ValueError(f"{type(model).__name__} has no list of {num_layers} decoder layers")


def _num_weights(module: nn.Module) -> int:
    if not isinstance(module, CompositeProjection):
        return math.prod(_in_out(module, ""))
    inner = [child for child in module.modules() if isinstance(child, nn.Linear | BlockSparseLinear)]
    return sum(child.in_features * child.out_features for child in inner)


def _in_out(module: nn.Module, name: str) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Linear | BlockSparseLinear | CompositeProjection):
        return module.in_features, module.out_features
    raise ValueError(f"{name} is a {type(module).__name__}, not a Linear or Conv1D, so it cannot be made sparse")
