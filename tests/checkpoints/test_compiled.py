"""Compiled models are saved, exported and made dense as if they had not been compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparseift_llm import SparseIFTConfig, load_pretrained, save_export, sparsify, to_dense
from tests.helpers.models import logits_of, shake, tiny_config
from tests.helpers.tiny_runs import differences, masks

KINDS: dict[str, dict[str, Any]] = {
    "wide": {},
    "tiles": {"structure": "block", "block_size": 8},
    "parallel": {"family": "parallel", "nonlinearity": "none"},
    "doped tiles": {"family": "doped", "structure": "block", "block_size": 8},
}


def compiled(part: nn.Module) -> Any:
    return torch.compile(part, backend="eager")


def layer_by_layer(model: PreTrainedModel) -> PreTrainedModel:
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = compiled(layer)
    return model


def mlps(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
        layer.mlp = compiled(layer.mlp)
    return model


def both(model: PreTrainedModel) -> Any:
    return compiled(layer_by_layer(model))


WAYS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "the model": compiled,
    "each layer": layer_by_layer,
    "each MLP": mlps,
    "layers and model": both,
    "wrapped": lambda model: nn.DataParallel(compiled(model)),
}
every_way = pytest.mark.parametrize("way", WAYS)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_arch = pytest.mark.parametrize("arch", ["gpt2", "llama"])


def models(arch: str, kind: str, way: str) -> tuple[PreTrainedModel, Any]:
    """A sparse model, and a compiled copy of it."""
    torch.manual_seed(0)
    model = sparsify(tiny_config(arch), SparseIFTConfig(**KINDS[kind])).eval()
    shake(model)
    return model, WAYS[way](copy.deepcopy(model))


def check_equal(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    assert not differences(dict(found.named_parameters()), dict(expected.named_parameters()))
    assert not differences(masks(found), masks(expected))
    assert torch.equal(logits_of(found), logits_of(expected))


@every_arch
@every_kind
@every_way
def test_a_sparse_export(way: str, kind: str, arch: str, tmp_path: Path) -> None:
    model, other = models(arch, kind, way)
    save_export(other, tmp_path / "out", "sparse")
    check_equal(load_pretrained(tmp_path / "out"), model)


@every_arch
@every_kind
@every_way
def test_dense_copies_and_exports(way: str, kind: str, arch: str, tmp_path: Path) -> None:
    model, other = models(arch, kind, way)
    dense = to_dense(other)
    expected = to_dense(model)
    assert [(name, type(module)) for name, module in dense.named_modules()] == [
        (name, type(module)) for name, module in expected.named_modules()
    ]
    assert torch.equal(logits_of(dense), logits_of(expected))
    save_export(other, tmp_path / "out", "dense")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits_of(expected))


@every_arch
@every_kind
@every_way
@pytest.mark.parametrize("with_state", [False, True])
def test_an_ordinary_checkpoint(with_state: bool, way: str, kind: str, arch: str, tmp_path: Path) -> None:
    model, other = models(arch, kind, way)
    saved = other.module if isinstance(other, nn.DataParallel) else other
    saved.save_pretrained(tmp_path, **({"state_dict": other.state_dict()} if with_state else {}))
    check_equal(load_pretrained(tmp_path), model)


def test_what_holds_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear holds no transformers model"):
        to_dense(nn.Linear(2, 2))  # type: ignore[arg-type]
