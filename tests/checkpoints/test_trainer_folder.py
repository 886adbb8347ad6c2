"""Trainer checkpoints: half-written ones are set aside, the resumed one is found by its masks, loading checks masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparseift_llm import SparseIFTConfig, load_pretrained, sparsify
from sparseift_llm.checkpoints.mask_file import MASKS_NAME, digest, masks_of, save_masks
from sparseift_llm.checkpoints.trainer_folder import (
    find_resumed_checkpoint,
    last_complete_checkpoint,
    read_trainer_state,
    set_aside_incomplete,
)
from sparseift_llm.layers.base import sparse_layers
from tests.helpers.models import tiny_config, tiny_model

STATE = {"global_step": 5, "log_history": [{"loss": 1.5}]}
BROKEN: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "truncated": json.dumps(STATE).encode()[:-3],
    "garbage": b"\xff\xfe\x00 not json",
    "no mapping": b"[1, 2]",
    "zeros": bytes(100),  # what a crash of the machine can leave of a file
}


def checkpoint(folder: Path, step: int, state: bytes | None = json.dumps(STATE).encode()) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    if state is not None:
        (path / "trainer_state.json").write_bytes(state)
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- complete or not


def test_read_trainer_state(tmp_path: Path) -> None:
    assert read_trainer_state(checkpoint(tmp_path, 1)) == STATE
    assert read_trainer_state(tmp_path / "nowhere") is None
    assert read_trainer_state(tmp_path / "checkpoint-1" / "model.safetensors") is None


@pytest.mark.parametrize("kind", BROKEN)
def test_half_written_checkpoints_are_set_aside_whole(tmp_path: Path, kind: str) -> None:
    checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 10, BROKEN[kind])
    (tmp_path / "runs").mkdir()
    moved = set_aside_incomplete(tmp_path)
    assert moved == [tmp_path / "incomplete-checkpoint-10"]
    assert names(tmp_path) == {"checkpoint-5", "incomplete-checkpoint-10", "runs"}
    assert (moved[0] / "model.safetensors").read_bytes() == b"weights"
    assert read_trainer_state(tmp_path / "checkpoint-5") == STATE
    assert set_aside_incomplete(tmp_path) == []


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = json.dumps(STATE, indent=2).encode()
    path = checkpoint(tmp_path, 1, whole)
    for length in range(len(whole)):
        (path / "trainer_state.json").write_bytes(whole[:length])
        assert read_trainer_state(path) is None


def test_several_set_aside_under_one_name(tmp_path: Path) -> None:
    expected = ["incomplete-checkpoint-7", "incomplete-checkpoint-7.2", "incomplete-checkpoint-7.3"]
    for index, name in enumerate(expected):
        path = checkpoint(tmp_path, 7, None)
        (path / "mark").write_text(str(index))
        assert set_aside_incomplete(tmp_path) == [tmp_path / name]
    assert names(tmp_path) == set(expected)
    assert [(tmp_path / name / "mark").read_text() for name in expected] == ["0", "1", "2"]


def test_the_user_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint(tmp_path, 7, None)
    set_aside_incomplete(tmp_path)
    assert "checkpoint-7 was not written to its end" in caplog.text
    assert "incomplete-checkpoint-7" in caplog.text


def test_other_names_are_left_alone(tmp_path: Path) -> None:
    """The Trainer resumes from `checkpoint-<number>` only; a folder that a user named is not half a checkpoint."""
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "my-checkpoint-3").mkdir()
    (tmp_path / "checkpoint-8").write_text("a file")
    assert set_aside_incomplete(tmp_path) == []
    assert names(tmp_path) == {"checkpoint-best", "my-checkpoint-3", "checkpoint-8"}


def test_last_complete_checkpoint(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    assert last_complete_checkpoint(tmp_path) is None
    for step in (5, 20, 100):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 200, b"{")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"  # by number, not by name
    assert "incomplete-checkpoint-200" in names(tmp_path)


def test_last_complete_checkpoint_when_all_are_half_written(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5, None)
    assert last_complete_checkpoint(str(tmp_path)) is None


# ---- where a resumed run came from


def recorded(digest: str, name: str = "SparseTrainingCallback") -> bytes:
    exported: dict[str, Any] = {"args": {}, "attributes": {"saved": {"masks_digest": digest}}}
    return json.dumps({"stateful_callbacks": {name: exported}}).encode()


def test_the_candidate_with_the_digest_is_found(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path, 1, recorded("abc")), checkpoint(tmp_path, 2, recorded("def"))
    plain, broken = checkpoint(tmp_path, 3), checkpoint(tmp_path, 4, b"{")
    listed = checkpoint(tmp_path, 5, b'{"stateful_callbacks": {"SparseTrainingCallback": [1]}}')
    candidates = [None, True, tmp_path / "nowhere", plain, broken, listed, str(first), second]
    assert find_resumed_checkpoint(candidates, "SparseTrainingCallback", "abc") == first  # type: ignore[arg-type]
    assert find_resumed_checkpoint(candidates, "SparseTrainingCallback", "def") == second  # type: ignore[arg-type]


@pytest.mark.parametrize("state", [recorded("other"), recorded("abc", name="OtherCallback"), b"{}", None])
def test_no_candidate_has_the_digest(tmp_path: Path, state: bytes | None) -> None:
    path = checkpoint(tmp_path, 1, state)
    with pytest.raises(ValueError, match=rf"not found in any of: {path}; set TrainingArguments"):
        find_resumed_checkpoint([path, None], "SparseTrainingCallback", "abc")


# ---- loading


STORAGES: dict[str, dict[str, Any]] = {"unstructured": {}, "block": {"structure": "block", "block_size": 8}}


@pytest.fixture(scope="module", params=STORAGES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    config = SparseIFTConfig(**STORAGES[request.param])
    sparsify(tiny_model("llama", dtype=torch.float32), config).save_pretrained(folder)
    return folder


def storage_of(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "config.json").read_text())["sparse_ift"]["transformation"]
    return STORAGES[values["structure"]]


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_load_pretrained_passes_its_options_on(saved: Path) -> None:
    model = load_pretrained(saved, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for layer in sparse_layers(load_pretrained(str(saved))).values():
        assert torch.count_nonzero(layer.weight) == layer.num_active
        assert torch.equal(layer.magnitude() != 0, layer.current_mask())


def test_a_loaded_model_saves_its_masks_again(saved: Path, tmp_path: Path) -> None:
    model = load_pretrained(saved)
    layer = next(iter(sparse_layers(model).values()))
    layer.set_mask(layer.current_mask().roll(1, dims=1))
    assert digest(masks_of(model)) != digest(masks_of(load_pretrained(saved)))
    model.save_pretrained(tmp_path)
    assert digest(masks_of(load_pretrained(tmp_path))) == digest(masks_of(model))


def test_load_pretrained_without_masks(copied: Path) -> None:
    (copied / MASKS_NAME).unlink()
    with pytest.raises(ValueError, match=rf"{MASKS_NAME} is missing"):
        load_pretrained(copied)
    if not storage_of(copied):
        AutoModelForCausalLM.from_pretrained(copied)  # for inference the weights are enough


def test_load_pretrained_with_damaged_masks(copied: Path) -> None:
    masks = copied / MASKS_NAME
    masks.write_bytes(masks.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{MASKS_NAME} is truncated or damaged"):
        load_pretrained(copied)


def test_load_pretrained_with_the_masks_of_another_model(copied: Path) -> None:
    storage = storage_of(copied)
    save_masks(sparsify(tiny_config("llama", intermediate_size=80), SparseIFTConfig(**storage)), copied)
    message = r"another model: .*gate_proj has shape \(160, 64\), expected \(144, 64\)"
    with pytest.raises(ValueError, match="the masks in .* are not those of its weights" if storage else message):
        load_pretrained(copied)


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_load_pretrained_without_a_parameter(copied: Path, damage: str) -> None:
    """Not filled with random values, as transformers does it."""
    tensors = load_file(copied / "model.safetensors")
    value = tensors.pop("model.norm.weight")
    if damage == "shorter":
        tensors["model.norm.weight"] = value[:-1].contiguous()
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"weights in {copied} are missing or damaged: no model\.norm\.weight"):
        load_pretrained(copied)


def test_load_pretrained_of_a_dense_model(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a Sparse-IFT model"):
        load_pretrained(tmp_path)


def test_load_pretrained_with_a_damaged_record(copied: Path) -> None:
    path = copied / "config.json"
    config = json.loads(path.read_text())
    config["sparse_ift"]["sparsty"] = 0.5
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="sparsty"):
        load_pretrained(copied)
