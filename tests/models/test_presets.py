"""Presets, config files and model folders; every name that cannot be read must fail offline and say why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, Starcoder2Config

from sparseift_llm.models.architectures import build_model, sizes_of
from sparseift_llm.models.presets import PRESETS, load_config, preset_config

TINY: dict[str, Any] = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment at import


@pytest.mark.parametrize(
    ("name", "hidden", "ffn", "num_layers", "num_heads", "vocab"),
    [
        ("gpt3-small", 768, 3072, 12, 12, 50257),
        ("gpt3-medium", 1024, 4096, 24, 16, 50257),
        ("gpt3-large", 1536, 6144, 24, 16, 50257),
        ("gpt3-xl", 2048, 8192, 24, 16, 50257),
        ("llama-160m", 768, 3072, 12, 12, 32000),
        ("llama-gpt3-small", 768, 2048, 12, 12, 50257),
        ("llama-gpt3-medium", 1024, 2752, 24, 16, 50257),
        ("llama-gpt3-large", 1536, 4096, 24, 16, 50257),
        ("llama-gpt3-xl", 2048, 5440, 24, 16, 50257),
        ("starcoder2-gpt3-small", 768, 3072, 12, 12, 50257),
        ("starcoder2-gpt3-xl", 2048, 8192, 24, 16, 50257),
    ],
)
def test_presets(name: str, hidden: int, ffn: int, num_layers: int, num_heads: int, vocab: int) -> None:
    sizes = sizes_of(load_config(name))
    assert (sizes.hidden, sizes.ffn, sizes.num_layers, sizes.num_heads, sizes.vocab) == (
        hidden,
        ffn,
        num_layers,
        num_heads,
        vocab,
    )
    assert sizes.attention_width == hidden


def test_every_preset_is_listed() -> None:
    gpt3 = ("gpt3-small", "gpt3-medium", "gpt3-large", "gpt3-xl")
    shapes = (f"{shape}-{name}" for shape in ("llama", "starcoder2") for name in gpt3)
    assert (*gpt3, *shapes, "llama-160m") == PRESETS
    types = [*[GPT2Config] * 4, *[LlamaConfig] * 4, *[Starcoder2Config] * 4, LlamaConfig]
    assert [type(load_config(name)) for name in PRESETS] == types
    with pytest.raises(KeyError):
        preset_config("gpt3-tiny")


@pytest.mark.parametrize("size", ["small", "medium", "large", "xl"])
def test_a_llama_shape_has_the_weights_of_its_gpt3(size: str) -> None:
    """Per layer: four attention matrices, and three FFN matrices with about the weights of two."""
    gpt, llama = sizes_of(load_config(f"gpt3-{size}")), load_config(f"llama-gpt3-{size}")
    assert 3 * llama.intermediate_size == pytest.approx(2 * gpt.ffn, rel=0.01)
    assert llama.tie_word_embeddings


def per_layer(name: str) -> dict[str, int]:
    """Weights and biases of the first decoder layer."""
    model = build_model(load_config(name), meta=True)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {name.partition(".0.")[2]: size for name, size in sizes.items() if ".0." in name}


@pytest.mark.parametrize("size", ["small", "xl"])
def test_a_starcoder2_shape_has_the_parameters_of_its_gpt3(size: str) -> None:
    """Per layer all of them, biases and norms included; positions are not learned, and embeddings are tied."""
    layers = [per_layer(f"{shape}gpt3-{size}") for shape in ("", "starcoder2-")]
    assert sum(layers[0].values()) == sum(layers[1].values())
    config = load_config(f"starcoder2-gpt3-{size}")
    assert (config.tie_word_embeddings, config.bos_token_id, config.eos_token_id) == (True, 50256, 50256)


def test_two_loads_do_not_share_a_config() -> None:
    load_config("gpt3-small").n_embd = 1
    assert load_config("gpt3-small").n_embd == 768


def check_tiny(config: PreTrainedConfig) -> None:
    assert type(config) is LlamaConfig
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (32, 88, 4)


def test_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "any_name.json"
    path.write_text(json.dumps(TINY))
    check_tiny(load_config(str(path)))


def test_a_model_folder(tmp_path: Path) -> None:
    LlamaConfig(**{key: value for key, value in TINY.items() if key != "model_type"}).save_pretrained(tmp_path)
    check_tiny(load_config(str(tmp_path)))
    check_tiny(load_config(str(tmp_path / "config.json")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt3-smal", "'gpt3-smal' is not a preset; did you mean 'gpt3-small'? (presets: gpt3-small, gpt3-medium, "),
        ("no-one/nothing", "no config.json, no model folder, and could not be loaded as a hub id: "),
        ("a/b/c", "could not be loaded as a hub id: "),
        ("missing/folder/config.json", "'missing/folder/config.json' is not a preset"),
    ],
)
def test_a_name_that_is_nothing(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_config(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON: "),
        ("", "is not valid JSON: "),
        ("[]", "is not a transformers config: it has no model_type"),
        ('{"hidden_size": 32}', "is not a transformers config: it has no model_type"),
        ('{"model_type": "nope"}', "nope"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}', "not a multiple"),
    ],
)
def test_a_broken_config_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(path))}.*{re.escape(message)}"):
        load_config(str(path))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"model\.safetensors is not valid JSON"):
        load_config(str(path))


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} is a folder without config.json")):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"hidden_size": 32}', "model_type"),
        ('{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}', "not a multiple"),
    ],
)
def test_a_folder_with_a_broken_config(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(tmp_path))}.*{message}"):
        load_config(str(tmp_path))
