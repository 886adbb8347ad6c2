"""What could not be loaded is not saved."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from sparseift_llm import load_pretrained, to_dense
from sparseift_llm.layers.base import sparse_layers
from tests.checkpoints.test_saving import sparse_model
from tests.helpers.tiny_runs import make_trainer, sparse_gpt2, sparse_trainer


def test_weights_outside_the_mask_are_refused(tmp_path: Path) -> None:
    model = sparse_model()
    name, layer = next(iter(sparse_layers(model).items()))
    with torch.no_grad():
        layer.weight[~layer.mask] = 1e-6
    with pytest.raises(ValueError, match=rf"{name}\.weight is not 0 where its mask is.*load_pretrained"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    surplus = model.state_dict()
    model.save_pretrained(tmp_path / "model", state_dict={**surplus, f"{name}.weight": layer.weight * layer.mask})
    assert sparse_layers(load_pretrained(tmp_path / "model"))
    layer.zero_inactive()
    model.save_pretrained(tmp_path / "model")
    surplus[f"{name}.weight"] = torch.ones_like(layer.weight)
    with pytest.raises(ValueError, match="is not 0 where its mask is"):
        model.save_pretrained(tmp_path / "model", state_dict=surplus)


def test_a_resume_without_the_callback_stops_at_its_checkpoint(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 6}
    sparse_trainer(sparse_gpt2("rigl"), tmp_path, **options).train()
    trainer = make_trainer(sparse_gpt2("rigl"), tmp_path, **options, steps=18)
    with pytest.raises(ValueError, match="a run resumed without SparseTrainingCallback"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", ["wide", "tiles", "factorized"])
def test_a_base_model_of_own_layout_is_not_saved_alone(kind: str, tmp_path: Path) -> None:
    model = sparse_model(kind)
    if kind == "wide":
        model.base_model.save_pretrained(tmp_path)
        assert AutoModel.from_pretrained(tmp_path).num_parameters() == model.base_model.num_parameters()
        return
    for copied in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"saved and loaded whole.*to_dense"):
            copied.base_model.save_pretrained(tmp_path)
    if kind == "tiles":
        to_dense(model).base_model.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
