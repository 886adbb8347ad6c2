"""Named dense models, and finding the transformers config behind a name, a file, a folder or a hub id; its weights."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Starcoder2Config,
)

from sparseift_llm.models.architectures import sizes_of
from sparseift_llm.utils.outputs import user_path
from sparseift_llm.utils.words import nearest

_GPT3 = {  # hidden, layers, heads: arXiv 2005.14165, table 2.1 (XL with 16 heads, so that they divide the width)
    "gpt3-small": (768, 12, 12),
    "gpt3-medium": (1024, 24, 16),
    "gpt3-large": (1536, 24, 16),
    "gpt3-xl": (2048, 24, 16),
}
_LLAMA_SHAPE = "llama-"  # the same widths with Llama's layers
_STARCODER2_SHAPE = "starcoder2-"  # the same widths with StarCoder2's
_FFN_MULTIPLE = 64  # of the inner side of a gated FFN, so that tiles of 64 fit a wide stream
PRESETS = (*_GPT3, *(f"{shape}{name}" for shape in (_LLAMA_SHAPE, _STARCODER2_SHAPE) for name in _GPT3), "llama-160m")


def preset_config(name: str) -> PreTrainedConfig:
    """The config of a preset. Raises KeyError for a name not in `PRESETS`.

    Scope `residual` needs heads whose size is a number of its own. `llama-gpt3-small` and `starcoder2-gpt3-small` have
    the hidden size, layers and heads of `gpt3-small`, and rotary positions. The first has three FFN matrices with as
    many weights as the two of `gpt3-small` have, to a multiple of 64. The second has its two, its LayerNorm, its GELU
    and its biases.
    """
    if name == "llama-160m":
        return LlamaConfig(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=2048,
        )
    hidden, num_layers, num_heads = _GPT3[name.removeprefix(_LLAMA_SHAPE).removeprefix(_STARCODER2_SHAPE)]
    if name.startswith(_STARCODER2_SHAPE):
        undeclared: dict[str, Any] = {"head_dim": hidden // num_heads}  # the model heeds it all the same
        return Starcoder2Config(
            vocab_size=50257,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            max_position_embeddings=2048,
            use_cache=False,
            **undeclared,
        )
    if name.startswith(_LLAMA_SHAPE):
        return LlamaConfig(
            vocab_size=50257,
            hidden_size=hidden,
            intermediate_size=_FFN_MULTIPLE * round(8 / 3 * hidden / _FFN_MULTIPLE),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=50256,
            eos_token_id=50256,
            use_cache=False,
        )
    return GPT2Config(
        n_embd=hidden, n_layer=num_layers, n_head=num_heads, n_positions=2048, vocab_size=50257, use_cache=False
    )


def load_config(model: str) -> PreTrainedConfig:
    """The dense config that `model` names.

    Args:
        model: a preset, a path to a config.json, a model folder, or a hub id.

    Raises:
        ValueError: none of these can be read; the message says what was tried.
    """
    if model in PRESETS:
        return preset_config(model)
    path = user_path(model)
    if model and path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise ValueError(f"{model} is a folder without config.json")
    if path.is_file():
        return _config_from_file(path)
    likely = difflib.get_close_matches(model, PRESETS, n=1, cutoff=0.8)
    if likely and "/" not in model:  # do not wait for the hub over a slip of the pen
        raise ValueError(f"{model!r} is not a preset; did you mean {likely[0]!r}? (presets: {', '.join(PRESETS)})")
    try:
        return AutoConfig.from_pretrained(model)  # a hub id: files and folders were taken above
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model!r} is not a preset ({', '.join(PRESETS)}){nearest(model, PRESETS)}, no config.json, "
            f"no model folder, and could not be loaded as a hub id: {str(error).splitlines()[0]}"
        ) from error


def load_trained(model: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A trained dense model with float32 weights.

    Args:
        model: a model folder, or a hub id.
        config: its config, with the same sizes.

    Raises:
        ValueError: a Sparse-IFT model, other sizes, or weights that are missing or damaged.
    """
    if getattr(config, "sparse_ift", None):
        raise ValueError(f"{model!r} is a Sparse-IFT model; start from a dense one, e.g. what to_dense gives")
    if sizes_of(config) != sizes_of(load_config(model)):
        raise ValueError(
            f"model.config changes sizes of {model!r}, whose weights have theirs: {sizes_of(load_config(model))}, now "
            f"{sizes_of(config)}; leave them as they are"
        )
    loader: Any = AutoModelForCausalLM
    try:
        trained, info = loader.from_pretrained(
            str(user_path(model)),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{model!r}: no weights could be loaded: {str(error).splitlines()[0]}") from error
    wrong = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if wrong:
        raise ValueError(f"the weights of {model!r} are missing or damaged: no {min(wrong)} of the model's shape")
    result: PreTrainedModel = trained
    return result


def _config_from_file(path: Path) -> PreTrainedConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"{path} is not a transformers config: it has no model_type")
    if values["model_type"] not in CONFIG_MAPPING:
        raise ValueError(f"{path} has model_type {values['model_type']!r}, which transformers does not know")
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:  # transformers validates each field with exceptions of its own
        raise ValueError(f"{path} is not a valid config: {error}") from error
