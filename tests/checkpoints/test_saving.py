"""Pushing to the hub: the masks go with the weights, and so does a card that is right and never replaces the user's."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedModel

from sparseift_llm import DSTConfig, SparseIFTConfig, load_pretrained, plan, sparsify, to_dense
from sparseift_llm.checkpoints.card import model_card
from sparseift_llm.checkpoints.mask_file import MASKS_NAME
from sparseift_llm.planning.cost import cost_of
from tests.helpers.models import logits_of, tiny_config, tiny_model

CONFIGS: dict[str, dict[str, Any]] = {
    "wide": {},
    "tiles": {"structure": "block", "block_size": 8},
    "factorized": {"family": "factorized", "sparsity": 0.6},
}


class Hub:
    """Stands for huggingface_hub's functions: keeps what is uploaded, in place of sending it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for name in ("create_repo", "create_branch", "upload_folder", "create_commit"):
            monkeypatch.setattr(HfApi, name, lambda api, *args, _name=name, **kwargs: self.call(_name, *args, **kwargs))
        monkeypatch.setattr(ModelCard, "load", self.load)

    def call(self, name: str, repo_id: str = "", folder_path: Any = None, **kwargs: Any) -> Any:
        assert name != "create_commit"  # transformers' own upload
        self.calls.append((name, {"repo_id": repo_id, **kwargs}))
        if name == "upload_folder":
            for path in Path(folder_path).iterdir():
                if any(fnmatch.fnmatch(path.name, pattern) for pattern in kwargs["allow_patterns"]):
                    (self.folder / path.name).write_bytes(path.read_bytes())
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def load(self, name: str, **kwargs: Any) -> ModelCard:
        if not (self.folder / "README.md").is_file():
            raise EntryNotFoundError("no card")
        return ModelCard((self.folder / "README.md").read_text())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (tmp_path / "hub").mkdir()
    return Hub(tmp_path / "hub", monkeypatch)


def sparse_model(kind: str = "wide") -> PreTrainedModel:
    return sparsify(tiny_model("gpt2", torch.float32, n_embd=64), SparseIFTConfig(**CONFIGS[kind])).eval()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("shard_size", ["50GB", "60KB"])
def test_push_to_hub_uploads_a_model_that_loads(kind: str, shard_size: str, hub: Hub) -> None:
    model = sparse_model(kind)
    model.push_to_hub("me/tiny", private=True, commit_message="first", max_shard_size=shard_size, tags=["demo"])
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.calls[0][1] == {"repo_id": "me/tiny", "private": True, "exist_ok": True}
    assert hub.calls[1][1]["commit_message"] == "first"
    assert {"config.json", "generation_config.json", MASKS_NAME, "README.md"} <= {p.name for p in hub.folder.iterdir()}
    assert ModelCard.load("me/tiny").data.tags == ["sparse-ift", "gpt2", "demo"]
    loaded = load_pretrained(hub.folder)
    assert torch.equal(logits_of(loaded), logits_of(model))
    loaded.push_to_hub("me/tiny")  # a loaded model does as the first one


def test_save_pretrained_with_push_to_hub(tmp_path: Path, hub: Hub) -> None:
    model = sparse_model()
    folder = tmp_path / "run"
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    model.save_pretrained(folder, push_to_hub=True, revision="try", create_pr=True)
    assert [name for name, _ in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[0][1]["repo_id"] == "run"
    assert hub.calls[2][1]["repo_id"] == "me/run"
    assert hub.calls[2][1]["revision"] == "try"
    assert hub.calls[2][1]["create_pr"] is True
    names = {path.name for path in hub.folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", MASKS_NAME, "README.md"}
    assert (hub.folder / MASKS_NAME).read_bytes() == (folder / MASKS_NAME).read_bytes()
    assert torch.equal(logits_of(load_pretrained(hub.folder)), logits_of(model))


def test_other_ranks_upload_nothing(tmp_path: Path, hub: Hub) -> None:
    sparse_model().save_pretrained(tmp_path / "run", is_main_process=False, push_to_hub=True)
    assert not hub.calls


def test_saving_alone_writes_no_card(tmp_path: Path, hub: Hub) -> None:
    sparse_model().save_pretrained(tmp_path / "run")
    assert not (tmp_path / "run" / "README.md").exists()
    assert not hub.calls


def test_a_card_of_the_user_stays_in_the_folder(tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "README.md").write_text("# My model\n")
    sparse_model().save_pretrained(folder, push_to_hub=True, repo_id="me/tiny")
    assert (folder / "README.md").read_text() == (hub.folder / "README.md").read_text() == "# My model\n"


@pytest.mark.parametrize("local", [None, "# Older\n"])
def test_a_card_of_the_user_stays_on_the_hub(local: str | None, tmp_path: Path, hub: Hub) -> None:
    (hub.folder / "README.md").write_text("# Written on the hub\n")
    folder = tmp_path / "run"
    folder.mkdir()
    if local:
        (folder / "README.md").write_text(local)
    model = sparse_model()
    model.save_pretrained(folder, push_to_hub=True, repo_id="me/tiny")
    model.push_to_hub("me/tiny")
    assert (hub.folder / "README.md").read_text() == "# Written on the hub\n"
    assert (folder / "README.md").is_file() == bool(local)
    assert (hub.folder / MASKS_NAME).is_file()


def test_a_card_of_ours_is_brought_up_to_date(tmp_path: Path, hub: Hub) -> None:
    for kind in ("wide", "factorized"):
        model = sparse_model(kind)
        model.save_pretrained(tmp_path / "run", push_to_hub=True, repo_id="me/tiny")
        assert f"| family | {kind}" in (hub.folder / "README.md").read_text()


def test_a_dense_copy_is_pushed_as_any_stock_model() -> None:
    dense = to_dense(sparse_model())
    assert "push_to_hub" not in vars(dense)
    assert "save_pretrained" not in vars(dense)


# ---- the card


def rows(card: ModelCard) -> dict[str, str]:
    """The card's table."""
    lines = [line.split("|") for line in card.content.splitlines() if line.startswith("| ")]
    return {key.strip(): value.strip() for _, key, value, _ in lines}


def test_the_figures_are_those_of_the_plan() -> None:
    config = SparseIFTConfig(family="factorized", sparsity=0.6)
    result = plan(tiny_config("gpt2"), config)
    model = sparsify(tiny_config("gpt2"), config)
    found = rows(model_card(model, "me/tiny"))
    sparse = [part for layer in result.layers for part in layer.matrices if part.is_sparse]
    realised = 1 - sum(part.num_active for part in sparse) / sum(part.num_weights for part in sparse)
    assert found["family"] == "factorized"
    assert found["structure"] == "unstructured"
    assert found["sparsity asked for"] == "0.6"
    assert found["sparsity of the sparse matrices"] == f"{realised:.6f}"
    assert found["linear parameters, active"] == "24,576 (dense: 24,576)"  # 2 layers of 12 * 32**2
    assert found["parameters, stored"] == f"{model.num_parameters():,} (dense: {result.dense.stored_params:,})"
    assert found["linear FLOPs per token"] == "49,152 (dense: 49,152; 1.000x)"
    # attention 4 * 64 positions * 32 * 2 layers, logits 2 * 32 * 100
    assert found["whole-model (T=64) FLOPs per token"] == "71,936 (dense: 71,936; 1.000x)"
    assert found["the dense model's sizes"] == "hidden 32, ffn 128, head_dim 8, heads 4, layers 2, vocabulary 100"


def test_the_dense_sizes_are_those_before_widening() -> None:
    config = SparseIFTConfig(sparsity=0.75, structure="block", block_size=8, dst=DSTConfig("set"))
    model = sparsify(tiny_config("llama"), config)
    found = rows(model_card(model, "tiny"))
    assert found["family"] == "wide, scope `model`"
    assert found["structure"] == "block, tiles 8"
    assert found["masks"] == "set"
    assert found["the dense model's sizes"] == "hidden 32, ffn 72, head_dim 8, heads 4, layers 2, vocabulary 100"
    ratio = cost_of(model, 64).flops.forward / plan(tiny_config("llama"), config).dense.flops.forward
    assert ratio > 1
    assert found["whole-model (T=64) FLOPs per token"].endswith(f"; {ratio:.3f}x)")


def test_how_to_load_it(tmp_path: Path) -> None:
    """Each card's lines run, and give the model."""
    for kind in ("wide", "factorized"):
        model = sparse_model(kind)
        folder = tmp_path / kind
        model.save_pretrained(folder)
        card = model_card(model, str(folder))
        assert card.data.pipeline_tag == "text-generation"
        _, code, _ = card.content.split("```")
        names: dict[str, Any] = {}
        exec(code.removeprefix("python"), names)
        assert torch.equal(logits_of(names["model"]), logits_of(model))
        assert ("without it, loading is an error" in code) == (kind == "factorized")
        assert "quantization_config" in json.loads((folder / "config.json").read_text()) or kind == "wide"
