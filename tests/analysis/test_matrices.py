"""Sparse matrices of models and folders, and the reports made of them: every layout, and damage named."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from sparseift_llm import SparseIFTConfig, load_pretrained, save_export, sparsify, spectral_report
from sparseift_llm.analysis.matrices import matrix_source
from sparseift_llm.checkpoints.mask_file import digest, masks_of, read_digest
from sparseift_llm.config.transform import FamilyRule
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.composite import matrix_of
from tests.helpers.models import tiny_config, tiny_model

MASKED = SparseIFTConfig(sparsity=0.5)
LAYOUTS: dict[str, tuple[str, SparseIFTConfig]] = {
    "gpt2": ("gpt2", MASKED),
    "gpt_neox": ("gpt_neox", MASKED),
    "opt": ("opt", MASKED),
    "llama": ("llama", MASKED),
    "gemma": ("gemma", MASKED),
    "gpt2 in tiles": ("gpt2", SparseIFTConfig(sparsity=0.5, structure="block", block_size=4)),
    "llama, parallel": ("llama", SparseIFTConfig(family="parallel", sparsity=0.5)),
    "gpt2, doped in tiles": ("gpt2", SparseIFTConfig(family="doped", sparsity=0.5, structure="block", block_size=4)),
    "gpt2, rules": ("gpt2", SparseIFTConfig(sparsity=0.5, scope="ffn", rules=(FamilyRule("factorized", ("o",)),))),
}


def sparse(name: str = "gpt2", **changes: Any) -> PreTrainedModel:
    arch, config = LAYOUTS[name]
    return sparsify(tiny_model(arch, **changes), config)


@pytest.mark.parametrize("name", LAYOUTS)
def test_matrices_of_a_folder_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    model = sparse(name)
    model.save_pretrained(tmp_path)
    of_model, of_folder = matrix_source(model), matrix_source(tmp_path)
    assert of_model.masks_digest == of_folder.masks_digest == digest(masks_of(model)) == read_digest(tmp_path)
    layers = sparse_layers(model)
    pairs = list(zip(of_model.read(), of_folder.read(), strict=True))
    assert sorted(one.name for one, _ in pairs) == sorted(layers)
    for one, other in pairs:
        layer: Any = layers[one.name]
        # stock layers of GPT-2 keep weights as (in, out)
        expected = matrix_of(layer).T if getattr(layer.to_dense(), "nx", None) else matrix_of(layer)
        assert (one.kind, one.block_size) == (other.kind, other.block_size)
        assert torch.equal(one.mask, other.mask)
        assert torch.equal(one.weight, expected)
        assert torch.equal(other.weight, expected)
        expanded = one.mask.repeat_interleave(one.block_size, 0).repeat_interleave(one.block_size, 1)
        assert expanded.shape == expected.shape
        assert not expected[~expanded].any()
        assert int(expanded.sum()) == layer.count_active()


@pytest.mark.parametrize("name", LAYOUTS)
def test_exports_of_active_values_alone_are_read(name: str, tmp_path: Path) -> None:
    model = sparse(name)
    source = matrix_source(save_export(model, tmp_path / "export", format="sparse"))
    for one, other in zip(matrix_source(model).read(), source.read(), strict=True):
        assert torch.equal(one.mask, other.mask)
        assert torch.equal(one.weight, other.weight)


def test_reports_of_model_and_folder_are_equal_to_the_bit(tmp_path: Path) -> None:
    model = sparse()
    model.save_pretrained(tmp_path)
    report = spectral_report(tmp_path)
    assert report == spectral_report(model) == spectral_report(load_pretrained(tmp_path)) == spectral_report(tmp_path)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    values = report.to_dict()["layers"].values()
    for key in ("delta_r", "delta_r_imdb", "lambda", "lambda_imsg"):
        present = [row[key] for row in values if row[key] is not None]
        assert report.model[key] == (pytest.approx(sum(present) / len(present)) if present else None)
    assert report.model["num_layers"] == len(values) == 8
    assert report.model["num_excluded"] == sum(row["excluded"] is not None for row in values)
    assert {row["kind"] for row in values} == {"qkv", "o", "mlp_in", "mlp_out"}


def test_a_bfloat16_model_and_shards(tmp_path: Path) -> None:
    model = sparse(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert spectral_report(tmp_path) == spectral_report(model)


def test_every_nth_layer(tmp_path: Path) -> None:
    model = sparse(n_layer=5)
    every, third = spectral_report(model), spectral_report(model, every_nth_layer=3)
    assert third.layers == tuple(layer for layer in every.layers if layer.name.split(".")[2] in ("0", "3"))
    assert third.masks_digest == every.masks_digest
    with pytest.raises(ValueError, match="every_nth_layer must be at least 1, got 0"):
        spectral_report(model, every_nth_layer=0)


def test_progress_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sparseift_llm.analysis.spectral"):
        spectral_report(sparse())
    assert caplog.messages[-1] == "8 of 8: transformer.h.1.mlp.c_proj"


def test_a_report_does_not_change_threads() -> None:
    before = torch.get_num_threads()
    spectral_report(sparse())
    assert torch.get_num_threads() == before


# ---- damage


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _dense_config(folder: Path) -> None:
    tiny_config("gpt2").save_pretrained(folder)


def _no_masks(folder: Path) -> None:
    (folder / "sparse_masks.safetensors").unlink()


def _cut(name: str) -> Any:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])

    damage.__name__ = f"cut_{name}"
    return damage


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.0.attn.c_attn.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.0.attn.c_attn.weight"].fill_(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _masks_of_another_model(folder: Path) -> None:
    sparse(n_layer=1).save_pretrained(folder.parent / "other")
    (folder.parent / "other" / "sparse_masks.safetensors").rename(folder / "sparse_masks.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_config, "has no readable config.json"),
        (_dense_config, "the model is not a Sparse-IFT model"),
        (_no_masks, "sparse_masks.safetensors is missing"),
        (_cut("sparse_masks.safetensors"), "sparse_masks.safetensors is truncated or damaged"),
        (_no_weights, "the weights in .* are missing or damaged"),
        (_cut("model.safetensors"), "the weights in .* are missing or damaged"),
        (_without_a_tensor, "the weights in .* are missing or damaged: no transformer.h.0.attn.c_attn.weight"),
        (_other_weights, "are not those of its weights, first in transformer.h.0.attn.c_attn"),
        (_masks_of_another_model, "are of another model: transformer.h.1.attn.c_attn stands in only one of them"),
    ],
)
def test_damaged_folders_are_named(damage: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    sparse().save_pretrained(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        spectral_report(folder)


def test_tiles_of_other_places_are_refused(tmp_path: Path) -> None:
    sparse("gpt2 in tiles").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    columns = weights["transformer.h.1.mlp.c_fc.columns"]
    columns.copy_(columns.flip(0))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"are not those of its weights, first in transformer.h.1.mlp.c_fc"):
        spectral_report(tmp_path)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match="the model is not a Sparse-IFT model"):
        spectral_report(tiny_model("gpt2"))


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere has no readable config.json"):
        spectral_report(tmp_path / "nowhere")


def test_a_wrapped_model_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a transformers model or a folder, got Sequential: unwrap it"):
        spectral_report(nn.Sequential(sparse()))  # type: ignore[arg-type]
