"""Damaged checkpoints of block-sparse models: an error that names the folder, and every file as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparseift_llm import load_pretrained
from sparseift_llm.checkpoints.mask_file import MASKS_NAME, save_masks
from sparseift_llm.layers.base import sparse_layers
from tests.checkpoints.test_block_checkpoint import INDEX, WEIGHTS, block_model, check_equal


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    block_model(num_hidden_layers=1).save_pretrained(folder / "whole")
    block_model(num_hidden_layers=1).save_pretrained(folder / "sharded", max_shard_size="40KB")
    return folder


@pytest.fixture(params=["whole"])
def copied(saved: Path, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for path in (saved / request.param).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


in_shards = pytest.mark.parametrize("copied", ["sharded"], indirect=True)
Q = "model.layers.0.self_attn.q_proj"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(folder: Path, message: str) -> None:
    """Loading fails with a message that names the folder, and leaves every file as it was."""
    before = files(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert files(folder) == before


def change(folder: Path, **changes: Callable[[Tensor], Tensor] | None) -> None:
    """Rewrite the weights with tensors of layer Q changed, or left out where None."""
    tensors = load_file(folder / WEIGHTS)
    for part, changed in changes.items():
        value = tensors.pop(f"{Q}.{part}")
        if changed is not None:
            tensors[f"{Q}.{part}"] = changed(value).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_rewriting_alone_does_no_damage(copied: Path) -> None:
    change(copied, columns=lambda columns: columns, weight=lambda weight: weight)
    check_equal(load_pretrained(copied), block_model(num_hidden_layers=1))


def last_again(columns: Tensor) -> Tensor:
    """The last block-row holds its second tile twice."""
    return torch.cat([columns[:-2], columns[-1:], columns[-1:]])


@pytest.mark.parametrize(
    "changed",
    [
        last_again,
        lambda columns: columns + 1,
        lambda columns: columns - 1,
        lambda columns: columns + (1 << 30),
        lambda columns: columns[:-1],
        lambda columns: columns[:0],
        lambda columns: torch.cat([columns, columns[:1]]),
        lambda columns: columns[:, None],
        None,
    ],
    ids=["twice", "one up", "one down", "far away", "too few", "none", "too many", "another rank", "missing"],
)
def test_damaged_columns(changed: Callable[[Tensor], Tensor] | None, copied: Path) -> None:
    change(copied, columns=changed)
    refused(copied, rf"weights in .* missing or damaged: {Q} should hold 16 tiles of 8x8 and their columns, distinct")


@pytest.mark.parametrize(
    "changed",
    [
        lambda weight: weight[:-1],
        lambda weight: torch.cat([weight, weight]),
        lambda weight: weight.view(-1, 8),
        lambda weight: weight.view(-1),
        lambda weight: weight.view(-1, 4, 4)[:16],  # as many tiles, of another size
        lambda weight: weight[:, :4],
        lambda weight: weight[:, :0],
        None,
    ],
    ids=["too few", "too many", "matrix", "vector", "smaller tiles", "half tiles", "empty tiles", "missing"],
)
def test_weights_of_a_wrong_shape(changed: Callable[[Tensor], Tensor] | None, copied: Path) -> None:
    change(copied, weight=changed)
    refused(copied, rf"weights in .* missing or damaged: {Q} should hold 16 tiles of 8x8")


def test_columns_and_weights_one_tile_short(copied: Path) -> None:
    change(copied, weight=lambda weight: weight[:-1], columns=lambda columns: columns[:-1])
    refused(copied, rf"{Q} should hold 16 tiles")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_other_parameters_are_not_made_up(name: str, damage: str, copied: Path) -> None:
    """transformers gives a parameter that a checkpoint lacks random values, and says so in its log only."""
    tensors = load_file(copied / WEIGHTS)
    value = tensors.pop(name)
    if damage == "shorter":
        tensors[name] = value[:-1].contiguous()
    save_file(tensors, copied / WEIGHTS, metadata={"format": "pt"})
    refused(copied, rf"weights in .* missing or damaged: no {name}")


def missing(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [missing, truncated, empty])
def test_a_damaged_weights_file(damage: Callable[[Path], None], copied: Path) -> None:
    damage(copied / WEIGHTS)
    refused(copied, r"weights in .* are missing or damaged")


@in_shards
@pytest.mark.parametrize("damage", [missing, truncated, empty])
def test_a_damaged_shard(damage: Callable[[Path], None], copied: Path) -> None:
    damage(sorted(copied.glob("model-*.safetensors"))[1])
    refused(copied, r"weights in .* are missing or damaged")


@in_shards
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"weight_map": 3}', b"{}", b"\xff\xfe", b'{"weight_map": {}}']
)
def test_a_damaged_index(content: bytes, copied: Path) -> None:
    (copied / INDEX).write_bytes(content)
    refused(copied, r"weights in .* are missing or damaged")


def test_masks_that_are_missing_or_damaged(copied: Path) -> None:
    masks = copied / MASKS_NAME
    whole = masks.read_bytes()
    masks.write_bytes(whole[:-1])
    refused(copied, f"{MASKS_NAME} is truncated or damaged")
    masks.unlink()
    refused(copied, f"{MASKS_NAME} is missing")


def test_masks_of_other_weights(copied: Path) -> None:
    """A tile in the mask that the weights do not hold: neither is trusted."""
    model = block_model(num_hidden_layers=1)
    layer = list(sparse_layers(model).values())[-1]
    layer.set_mask(layer.current_mask().roll(1, dims=1))
    save_masks(model, copied)
    refused(copied, "the masks in .* are not those of its weights; restore the folder")


def other_tiles(values: dict[str, Any]) -> None:
    values["sparse_ift"]["layers"][0]["matrices"][0]["block_size"] = 4


def other_shape(values: dict[str, Any]) -> None:
    values["sparse_ift"]["layers"][0]["matrices"][0]["shape"] = [48, 64]


def other_width(values: dict[str, Any]) -> None:
    values["hidden_size"] = 48


def other_options(values: dict[str, Any]) -> None:
    """What was asked for sets sizes when a model is made, and seeds growth that is still to come."""
    values["sparse_ift"]["transformation"].update({"seed": 1, "sparsity": 0.5})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_tiles, rf"{Q} should hold 64 tiles of 4x4"),
        (other_shape, rf"sparse_ift record in the config of .* is damaged: .*{Q} of 48 x 64, but .* has 64 x 64"),
        (other_width, rf"sparse_ift record in the config of .* is damaged: .*{Q} of 64 x 64, but .* has 64 x 48"),
        (other_options, None),
    ],
)
def test_a_record_that_differs_from_the_weights(
    damage: Callable[[dict[str, Any]], None], message: str | None, copied: Path
) -> None:
    path = copied / "config.json"
    values = json.loads(path.read_text())
    damage(values)
    path.write_text(json.dumps(values))
    if message is None:
        check_equal(load_pretrained(copied), block_model(num_hidden_layers=1))
    else:
        refused(copied, message)
