"""Masks on disk: packing, digest, and that a missing, damaged or foreign file is an error that changes nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from sparseift_llm.checkpoints import mask_file
from sparseift_llm.checkpoints.mask_file import (
    MASKS_NAME,
    apply_masks,
    digest,
    masks_of,
    pack,
    read_masks,
    save_masks,
    unpack,
)
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.layers.masked import masked_projection
from sparseift_llm.topology.blocks import random_columns
from sparseift_llm.topology.masks import random_mask

MASKS = st.lists(st.integers(0, 5), max_size=3).flatmap(
    lambda shape: st.integers(0, 2**31).map(
        lambda seed: torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    )
)

every_structure = pytest.mark.parametrize("structure", ["unstructured", "block"])


def small_model(rows: int = 3, names: tuple[str, ...] = ("a", "b"), structure: str = "unstructured") -> nn.Module:
    """7 of 5 x 3, 5 x 4, ... units active: weights, or tiles of 4x4."""
    torch.manual_seed(0)
    model = nn.ModuleDict()
    for index, name in enumerate(names):
        if structure == "block":
            columns = random_columns(rows + index, 5, 7, seed=index)
            model[name] = BlockSparseLinear(nn.Linear(20, 4 * (rows + index)), columns, 4, (2, 2))
        else:
            layer = masked_projection(nn.Linear(5, rows + index), 7, (2, 2))
            layer.set_mask(random_mask(layer.weight.shape, 7, seed=index))
            model[name] = layer
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_ten_bits_by_hand() -> None:
    """11010000 01 -> 208 and, padded with zeros at its end, 01000000 = 64."""
    mask = torch.tensor([[True, True, False, True, False], [False, False, False, False, True]])
    assert pack(mask).tolist() == [208, 64]
    assert pack(mask).dtype == torch.uint8
    assert torch.equal(unpack(torch.tensor([208, 64], dtype=torch.uint8), (2, 5)), mask)


@given(MASKS)
@settings(deadline=None)
def test_pack_and_unpack_are_inverse(mask: Tensor) -> None:
    packed = pack(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    restored = unpack(packed, tuple(mask.shape))
    assert restored.dtype == torch.bool
    assert torch.equal(restored, mask)


def test_pack_reads_a_transposed_mask_in_logical_order() -> None:
    mask = torch.tensor([[True, False], [True, False], [False, False]])
    assert torch.equal(pack(mask.T), pack(mask.T.contiguous()))


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), position=st.integers(0, 24))
@settings(deadline=None)
def test_digest_changes_with_any_bit(rows: int, columns: int, position: int) -> None:
    mask = random_mask(torch.Size((rows, columns)), rows * columns // 2, seed=0)
    changed = mask.clone()
    changed.view(-1)[position % mask.numel()] ^= True
    assert digest({"a": mask}) == digest({"a": mask.clone()})
    assert digest({"a": mask}) != digest({"a": changed})


def test_digest_changes_with_names_and_shapes_but_not_with_order() -> None:
    x, y = torch.tensor([True, False, True, True]), torch.tensor([False, False])
    reference = digest({"a": x, "b": y})
    assert digest({"b": y, "a": x}) == reference
    assert len({reference, digest({"a": y, "b": x}), digest({"a": x, "c": y}), digest({"a": x})}) == 4
    assert digest({"a": x, "b": y.view(1, 2)}) != reference
    assert digest({"a": x.view(2, 2), "b": y}) != reference


@every_structure
def test_save_and_read_give_the_same_masks(structure: str, tmp_path: Path) -> None:
    model = small_model(structure=structure)
    path = save_masks(model, tmp_path)
    assert path == tmp_path / MASKS_NAME
    assert [file.name for file in tmp_path.iterdir()] == [MASKS_NAME]
    masks = read_masks(tmp_path)
    assert masks.keys() == masks_of(model).keys() == {"a", "b"}
    for name, mask in masks_of(model).items():
        assert torch.equal(masks[name], mask)
    other = small_model(structure=structure)
    before = {}
    for name, layer in sparse_layers(other).items():
        layer.set_mask(
            torch.ones_like(layer.current_mask())
            if structure == "unstructured"
            else layer.current_mask().roll(1, dims=1)
        )
        nn.init.ones_(layer.weight)
        before[name] = layer.current_mask().clone()
    apply_masks(other, masks, tmp_path)
    assert digest(masks_of(other)) == digest(masks_of(model))
    for name, layer in sparse_layers(other).items():  # kept where active before and now, 0 elsewhere
        kept = before[name] & masks[name]
        assert kept.any()
        assert torch.equal(layer.magnitude(), kept * float(layer.unit_size))


def test_masks_of_gives_the_live_masks() -> None:
    model = small_model()
    masks_of(model)["a"].fill_(True)
    assert bool(sparse_layers(model)["a"].current_mask().all())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{MASKS_NAME} is missing"):
        read_masks(tmp_path)


def test_file_truncated_at_any_length(tmp_path: Path) -> None:
    path = save_masks(small_model(), tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{MASKS_NAME} is truncated or damaged"):
            read_masks(tmp_path)


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    """Each bit in turn: an error that names the file, or a flip without effect (white space, padding bits)."""
    model = small_model()
    path = save_masks(model, tmp_path)
    whole, expected = path.read_bytes(), digest(masks_of(model))
    unnoticed = set()
    for index in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[index // 8] ^= 1 << index % 8
        path.write_bytes(flipped)
        try:
            masks = read_masks(tmp_path)
        except ValueError as error:
            assert MASKS_NAME in str(error)  # noqa: PT017 (which flips raise is what is being asked)
        else:
            assert digest(masks) == expected
            unnoticed.add(chr(whole[index // 8]) if index // 8 < len(whole) - 5 else "padding")
    assert unnoticed <= {" ", ",", "padding"}


def test_flipped_payload_is_named_as_damage(tmp_path: Path) -> None:
    path = save_masks(small_model(), tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[-2] ^= 0b1000
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="do not match its digest"):
        read_masks(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "sparseift_masks_v2"}])
def test_other_formats(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"a": torch.zeros(1, dtype=torch.uint8)}, tmp_path / MASKS_NAME, metadata=metadata)
    with pytest.raises(ValueError, match=r"is not a mask file of format 'sparseift_masks_v1'"):
        read_masks(tmp_path)


@pytest.mark.parametrize("key", ["shapes", "digest"])
def test_header_without_a_field(tmp_path: Path, key: str) -> None:
    header = {"shapes": {"a": [8]}, "digest": "0"}
    del header[key]
    metadata = {"sparseift_masks_v1": json.dumps(header)}
    save_file({"a": torch.zeros(1, dtype=torch.uint8)}, tmp_path / MASKS_NAME, metadata=metadata)
    with pytest.raises(ValueError, match=r"damaged"):
        read_masks(tmp_path)


@every_structure
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"rows": 4}, r"a has shape \(4, 5\), expected \(3, 5\)"),
        ({"names": ("a", "c")}, "layer b stands in only one"),
        ({"names": ("a", "b", "c")}, "layer c stands in only one"),
        ({"names": ("a",)}, "layer b stands in only one"),
    ],
)
def test_masks_of_another_model_change_nothing(structure: str, other: dict[str, Any], message: str) -> None:
    model = small_model(structure=structure)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        apply_masks(model, masks_of(small_model(structure=structure, **other)), "somewhere")
    assert_unchanged(model, before)


@pytest.mark.parametrize("late", ["another total", "the same total"])
def test_a_late_difference_in_tiles_leaves_the_earlier_layers_alone(late: str) -> None:
    """A mask of weights may hold any number of them; of tiles, each block-row has its own for ever."""
    model = small_model(structure="block")
    masks = {name: mask.roll(1, dims=1) for name, mask in masks_of(model).items()}
    if late == "the same total":
        masks["b"] = masks["b"].roll(1, dims=0)
    else:
        masks["b"][0] = True
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"somewhere are of another model: b has other numbers of tiles per block-row"):
        apply_masks(model, masks, "somewhere")
    assert_unchanged(model, before)


@every_structure
def test_a_late_shape_difference_leaves_the_earlier_layers_alone(structure: str) -> None:
    model = small_model(structure=structure)
    masks = {"a": masks_of(model)["a"].roll(1, dims=1), "b": torch.zeros(3, 5, dtype=torch.bool)}
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"somewhere.*b has shape \(3, 5\), expected \(4, 5\)"):
        apply_masks(model, masks, "somewhere")
    assert_unchanged(model, before)


@every_structure
def test_planted_fault_a_change_after_an_error_is_found(structure: str) -> None:
    model = small_model(structure=structure)
    before = snapshot(model)
    layer = sparse_layers(model)["a"]
    layer.set_mask(layer.current_mask().roll(1, dims=1))
    with pytest.raises(AssertionError, match=r"a\.(mask|weight|columns)"):
        assert_unchanged(model, before)


def test_a_crash_while_saving_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    path = save_masks(model, tmp_path)
    before, old_digest = path.read_bytes(), digest(masks_of(model))

    def crash(tensors: dict[str, Tensor], filename: Path, metadata: dict[str, str]) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(mask_file, "save_file", crash)
    changed = copy.deepcopy(model)
    sparse_layers(changed)["a"].set_mask(torch.zeros(3, 5, dtype=torch.bool))
    with pytest.raises(OSError, match="no space left"):
        save_masks(changed, tmp_path)
    assert path.read_bytes() == before
    assert digest(read_masks(tmp_path)) == old_digest
    monkeypatch.undo()
    save_masks(changed, tmp_path)
    assert digest(read_masks(tmp_path)) == digest(masks_of(changed)) != old_digest
