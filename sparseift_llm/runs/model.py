"""The model that a recipe describes: dense or its Sparse-IFT twin, freshly initialised or from trained weights."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from transformers import PreTrainedConfig, PreTrainedModel

from sparseift_llm.api import sparsify
from sparseift_llm.config.parsing import checked
from sparseift_llm.conversion.scaling import truncate_weights
from sparseift_llm.data.loading import LoadedData
from sparseift_llm.models.architectures import build_model, set_tokenizer_fields
from sparseift_llm.models.presets import load_config, load_trained
from sparseift_llm.runs.recipe import Recipe
from sparseift_llm.utils.words import nearest


def make_model(recipe: Recipe, data: LoadedData) -> PreTrainedModel:
    """Build the recipe's model, with the vocabulary and the special tokens of the data's tokenizer.

    Raises:
        ValueError: the tokenizer has more entries than the model, or see `model_config` and `sparsify`.
    """
    config = model_config(recipe)
    if recipe.model.from_pretrained is not None:
        if len(data.tokenizer) > config.vocab_size:
            raise ValueError(
                f"data.tokenizer has {len(data.tokenizer)} entries, but {recipe.model.from_pretrained} knows "
                f"{config.vocab_size}; set data.tokenizer to the model's own"
            )
        dense = load_trained(recipe.model.from_pretrained, config)
        return sparsify(dense, recipe.sparse_ift) if recipe.sparse_ift else dense
    set_tokenizer_fields(config, data.tokenizer)
    _change(config, recipe.model.config)  # what the recipe says of tokens counts
    if config.vocab_size < len(data.tokenizer):
        raise ValueError(
            f"model.config.vocab_size={config.vocab_size} is below the {len(data.tokenizer)} entries of "
            "data.tokenizer; leave it out to have as many, or raise it"
        )
    try:
        build_model(config, meta=True)
    except KeyError as error:  # of a name in one of transformers' tables, such as an activation
        raise ValueError(
            f"model.config: {config.model_type} knows no {error}; look at its fields that are names"
        ) from error
    model = sparsify(config, recipe.sparse_ift) if recipe.sparse_ift else build_model(config)
    if recipe.model.init_truncation is not None:
        truncate_weights(model, recipe.model.init_truncation)
    return model


def model_config(recipe: Recipe) -> PreTrainedConfig:
    """The dense config that the recipe names, with the recipe's changes.

    Raises:
        ValueError: a changed field does not exist, has another type or an impossible value, sequences are longer than
            the model's positions, or query heads cannot share key-value heads evenly.
    """
    name = recipe.model.from_pretrained or recipe.model.name
    assert name is not None  # ModelConfig sees to it
    config = load_config(name)
    config.use_cache = False
    _change(config, recipe.model.config)
    check_positions(config, recipe.data.seq_len, "data.seq_len")
    _check_heads(config)
    return config


def check_positions(config: PreTrainedConfig, seq_len: int, option: str) -> None:
    """Refuse sequences that are longer than a model's positions.

    Args:
        config: of the model.
        seq_len: tokens per sequence.
        option: the name of the option that says so, for the message.

    Raises:
        ValueError: the model has fewer positions.
    """
    max_positions = getattr(config, "max_position_embeddings", None)
    if max_positions is not None and seq_len > max_positions:
        raise ValueError(f"{option}={seq_len} is above the model's {max_positions} positions")


def _check_heads(config: PreTrainedConfig) -> None:
    """transformers would find out in the first attention."""
    heads, shared = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise ValueError(
            f"model.config: num_attention_heads={heads} must be a multiple of num_key_value_heads={shared}"
        )


def _change(config: PreTrainedConfig, changes: dict[str, Any]) -> None:
    """Set fields of a transformers config, which checks the types of some.

    Raises:
        ValueError: a field that does not exist, or a value that it cannot have.
    """
    for key, value in changes.items():
        if not hasattr(config, key):
            raise ValueError(f"model.config: {config.model_type} has no field {key!r}{nearest(key, vars(config))}")
        value = _like(getattr(config, key), value, key)
        try:
            setattr(config, key, value)
        except Exception as error:  # of transformers' own kinds
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"model.config.{key}={value!r} is refused by {config.model_type}: {reason}") from error


def _like(own: Any, value: Any, key: str) -> Any:
    """`value` for a field of a transformers config, to judge by the value `own` that the field has.

    A whole number above 0 is a size or a count, so another one has to be above 0, too; token ids may be 0.
    """
    if value is None or type(own) not in (int, float, bool, str):
        return value
    kind: Any = type(own)
    if kind is int and key.endswith("_token_id"):
        kind = Annotated[int, Field(ge=0)] | list[int]
    elif kind is int and own > 0:
        kind = Annotated[int, Field(ge=1)]
    elif kind is float and own >= 0:
        kind = Annotated[float, Field(ge=0)]
    return checked(kind, value, f"model.config.{key}")
