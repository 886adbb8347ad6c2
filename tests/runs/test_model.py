"""The model of a recipe: what the recipe says of its config is what the model has, or is refused by name."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from sparseift_llm.config import SparseIFTConfig
from sparseift_llm.data.options import DataConfig
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.runs.model import make_model, model_config
from sparseift_llm.runs.pretrain import checked_model
from sparseift_llm.runs.recipe import ModelConfig, Recipe

SMALL = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}


class Tokenizer:
    """As much of a tokenizer as a model's config needs."""

    bos_token_id, eos_token_id, pad_token_id = None, 3, None

    def __len__(self) -> int:
        return 300


def recipe(config: dict[str, Any], sparse: bool = False) -> Recipe:
    sparse_ift = SparseIFTConfig(sparsity=0.5) if sparse else None
    return Recipe(ModelConfig(config={**SMALL, **config}), DataConfig(seq_len=16), sparse_ift, {"output_dir": "run"})


DATA: Any = SimpleNamespace(tokenizer=Tokenizer())


@pytest.mark.parametrize("sparse", [False, True])
def test_vocabulary_and_special_tokens_are_the_tokenizers(sparse: bool) -> None:
    model = make_model(recipe({}, sparse), DATA)
    config = model.config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (300, 3, 3, None)
    assert model.get_input_embeddings().weight.shape[0] == 300


@pytest.mark.parametrize("sparse", [False, True])
def test_what_the_recipe_says_of_tokens_counts(sparse: bool) -> None:
    model = make_model(recipe({"vocab_size": 320, "eos_token_id": 0, "pad_token_id": 7}, sparse), DATA)
    config = model.config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (320, 3, 0, 7)
    assert model.get_input_embeddings().weight.shape[0] == 320


def test_a_vocabulary_below_the_tokenizers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.config\.vocab_size=299 is below the 300 entries of data\.tokenizer"):
        make_model(recipe({"vocab_size": 299}), DATA)


def test_a_cache_is_used_if_the_recipe_says_so() -> None:
    assert model_config(recipe({})).use_cache is False
    assert model_config(recipe({"use_cache": True})).use_cache is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_lyer": 2}, "model.config: gpt2 has no field 'n_lyer'; did you mean 'n_layer'?"),
        ({"n_layer": -1}, "model.config.n_layer must be at least 1, got -1"),
        ({"n_layer": 0}, "model.config.n_layer must be at least 1, got 0"),
        ({"n_layer": 2.0}, "model.config.n_layer must be int, got float: 2.0"),
        ({"n_head": "2"}, "model.config.n_head must be int, got str: '2'"),
        ({"n_embd": True}, "model.config.n_embd must be int, got bool: True"),
        ({"attn_pdrop": -0.1}, "model.config.attn_pdrop must be at least 0, got -0.1"),
        ({"activation_function": 3}, "model.config.activation_function must be str, got int: 3"),
        ({"scale_attn_weights": "yes"}, "model.config.scale_attn_weights must be bool, got str: 'yes'"),
        ({"eos_token_id": -1}, "model.config.eos_token_id"),
        ({"n_inner": "64"}, "model.config.n_inner='64' is refused by gpt2: TypeError: "),
    ],
)
def test_impossible_values_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        model_config(recipe(changes))


def test_query_heads_that_cannot_share_key_value_heads_are_refused() -> None:
    config = ModelConfig(name="llama-160m", config={"num_attention_heads": 3, "num_key_value_heads": 2})
    with pytest.raises(ValueError, match="num_attention_heads=3 must be a multiple of num_key_value_heads=2"):
        model_config(Recipe(config, DataConfig(seq_len=16), None, {"output_dir": "run"}))


def test_values_that_look_unusual_but_are_fine() -> None:
    changes = {"attn_pdrop": 0, "eos_token_id": 0, "n_inner": 40, "initializer_range": 1}
    config = model_config(recipe(changes))
    assert {key: getattr(config, key) for key in changes} == changes


@pytest.mark.parametrize("on_kernels", [False, True])
def test_semi_structured_kernels_are_switched_on_by_the_recipe(on_kernels: bool) -> None:
    model = ModelConfig(config=SMALL, semi_structured_kernels=on_kernels)
    sparse_ift = SparseIFTConfig(structure="2:4", width_multiple=16)
    layers: Any = sparse_layers(
        checked_model(Recipe(model, DataConfig(seq_len=16), sparse_ift, {"output_dir": "run"}), DATA)
    )
    assert {layer.uses_semi_structured_kernels for layer in layers.values()} == {on_kernels}


@pytest.mark.parametrize("structure", ["unstructured", "block", "1:2"])
def test_semi_structured_kernels_are_refused_without_2_4_masks(structure: str) -> None:
    model = ModelConfig(config=SMALL, semi_structured_kernels=True)
    with pytest.raises(ValueError, match=rf"needs sparse_ift.structure='2:4', got '{structure}'"):
        Recipe(model, DataConfig(seq_len=16), SparseIFTConfig(structure=structure), {"output_dir": "run"})


def test_the_dense_twin_of_a_recipe_with_semi_structured_kernels_is_built_without_them() -> None:
    model = ModelConfig(config=SMALL, semi_structured_kernels=True)
    dense = checked_model(Recipe(model, DataConfig(seq_len=16), None, {"output_dir": "run"}), DATA)
    assert not sparse_layers(dense)
