"""The model that a recipe describes: dense or its Sparse-IFT twin, freshly initialised or from trained weights."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from sparseift_llm.conversion.install import sparsify
from sparseift_llm.conversion.scaling import truncate_weights
from sparseift_llm.data.loading import LoadedData
from sparseift_llm.models.architectures import build_model, set_tokenizer_fields
from sparseift_llm.models.presets import load_config, load_trained
from sparseift_llm.runs.recipe import Recipe


def make_model(recipe: Recipe, data: LoadedData) -> PreTrainedModel:
    """Build the recipe's model, with the vocabulary and the special tokens of the data's tokenizer.

    Raises:
        ValueError: the tokenizer has more entries than a trained model, or see `model_config` and `sparsify`.
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
    model = sparsify(config, recipe.sparse_ift) if recipe.sparse_ift else build_model(config)
    if recipe.model.init_truncation is not None:
        truncate_weights(model, recipe.model.init_truncation)
    return model


def model_config(recipe: Recipe) -> PreTrainedConfig:
    """The dense config that the recipe names, with the recipe's changes.

    Raises:
        ValueError: a changed field does not exist, or sequences are longer than the model's positions.
    """
    name = recipe.model.from_pretrained or recipe.model.name
    assert name is not None  # ModelConfig sees to it
    config = load_config(name)
    for key, value in recipe.model.config.items():
        if not hasattr(config, key):
            raise ValueError(f"model.config: {config.model_type} has no field {key!r}")
        setattr(config, key, value)
    max_positions = getattr(config, "max_position_embeddings", None)
    if max_positions is not None and recipe.data.seq_len > max_positions:
        raise ValueError(f"data.seq_len={recipe.data.seq_len} is above the model's {max_positions} positions")
    config.use_cache = False
    return config
