"""Recipes that start from a trained dense model: `model.from_pretrained`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparseift_llm import SparseIFTConfig
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.models.presets import load_config, load_trained
from sparseift_llm.runs import pretrain
from sparseift_llm.runs.recipe import ModelConfig, load_recipe
from tests.helpers.models import logits_of, tiny_model
from tests.helpers.pretrain_runs import read_json, tiny_recipe

FAMILY = "{family: parallel, nonlinearity: none, dst: {update_every_steps: 2}}"


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a finished dense run, beside its output folder `run`."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("dense"), max_steps=8)
    pretrain.main([str(recipe)])
    return recipe


def words(recipe: Path, output: Path, *more: str) -> list[str]:
    """Of a run that goes on from the dense run's model with its text and tokenizer."""
    run = recipe.parent / "run"
    model = json.dumps({"from_pretrained": str(run)})
    return [str(recipe), "--model", model, "--tokenizer", str(run), "--output_dir", str(output), *more]


@pytest.mark.parametrize("sparse_ift", ["null", FAMILY, "{scope: ffn}", "{family: doped}"])
def test_a_run_starts_where_the_dense_one_ended(dense_run: Path, tmp_path: Path, sparse_ift: str) -> None:
    run = dense_run.parent / "run"
    recipe, _, _, data = pretrain.prepare(words(dense_run, tmp_path / "out", "--sparse_ift", sparse_ift))
    model = pretrain.make_model(recipe, data).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert bool(sparse_layers(model)) == (sparse_ift != "null")
    dense = AutoModelForCausalLM.from_pretrained(run).eval()
    tokens = torch.stack([data.eval[index]["input_ids"] for index in range(4)])
    before, after = (m(input_ids=tokens, labels=tokens).loss.item() for m in (dense, model))
    assert after == pytest.approx(before, abs=1e-4 if sparse_ift in ("null", FAMILY) else 0.1)
    assert (recipe.sparse_ift is None) or recipe.sparse_ift.init == "pretrained"


def test_training_goes_on_and_resumes(dense_run: Path, tmp_path: Path) -> None:
    options = words(dense_run, tmp_path / "out", "--sparse_ift", FAMILY)
    pretrain.main(options)
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["eval_loss"] < read_json(dense_run.parent / "run" / "summary.json")["eval_loss"]
    assert summary["config"]["model"]["from_pretrained"] == str(dense_run.parent / "run")
    assert summary["config"]["sparse_ift"]["init"] == "pretrained"
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    pretrain.main([*options, "--resume_from_checkpoint", "true"])
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_another_start_may_be_asked_for(dense_run: Path, tmp_path: Path) -> None:
    recipe = load_recipe(dense_run, words(dense_run, tmp_path, "--sparse_ift", "{init: preserve}")[1:])
    assert recipe.sparse_ift is not None
    assert recipe.sparse_ift.init == "preserve"
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe.to_dict()))
    assert load_recipe(path) == recipe
    assert ModelConfig() == ModelConfig("gpt3-small")


@pytest.mark.parametrize(
    ("model", "sparse_ift", "message"),
    [
        ({"from_pretrained": "folder", "name": "gpt3-small"}, None, "model.name='gpt3-small' is for a freshly"),
        ({"from_pretrained": "folder", "init_truncation": 2.0}, None, "model.init_truncation=2.0 is for a freshly"),
        ({"from_pretrained": "folder"}, None, "knows the tokens of its own tokenizer; set data.tokenizer to it"),
        ({}, {"init": "pretrained", "scope": "ffn"}, "needs model.from_pretrained, a trained dense model"),
    ],
)
def test_contradictions_in_a_recipe(
    model: dict[str, Any], sparse_ift: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    values = {"model": model, "sparse_ift": sparse_ift, "training": {"output_dir": "out"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_a_tokenizer_with_more_entries_is_refused(dense_run: Path, tmp_path: Path) -> None:
    recipe, _, _, data = pretrain.prepare(words(dense_run, tmp_path / "out"))
    data.tokenizer.add_tokens(["<one more>"])
    with pytest.raises(ValueError, match=r"has 261 entries, but .* knows 260; set data.tokenizer"):
        pretrain.make_model(recipe, data)


# ---- the weights


def test_trained_weights_are_float32_and_whole(tmp_path: Path) -> None:
    dense = tiny_model("llama", torch.bfloat16).eval()
    dense.save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    config.attention_dropout = 0.1  # changes no size
    loaded = load_trained(str(tmp_path), config).eval()
    assert loaded.config.attention_dropout == 0.1
    torch.testing.assert_close(logits_of(loaded), logits_of(dense.float()))
    config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="changes sizes of"):
        load_trained(str(tmp_path), config)


@pytest.mark.parametrize("fault", ["missing tensor", "no file", "sparse"])
def test_other_weights_are_refused(fault: str, tmp_path: Path) -> None:
    dense = tiny_model("llama", torch.float32)
    state = dict(dense.state_dict())
    del state["model.norm.weight"]
    dense.save_pretrained(tmp_path, state_dict=state if fault == "missing tensor" else None)
    config = load_config(str(tmp_path))
    if fault == "no file":
        (tmp_path / "model.safetensors").unlink()
    if fault == "sparse":
        config.sparse_ift = SparseIFTConfig().to_dict()
    messages = {
        "missing tensor": "missing or damaged: no model.norm.weight of the model's shape",
        "no file": "no weights could be loaded",
        "sparse": "is a Sparse-IFT model",
    }
    with pytest.raises(ValueError, match=messages[fault]):
        load_trained(str(tmp_path), config)
