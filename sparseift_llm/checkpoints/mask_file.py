"""Masks on disk: one safetensors file of packed bits beside a model's weights, and its digest.

Reads and writes the masks of a model; knows nothing of checkpoints, Trainers or optimizers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.sharding import gathered, reshard
from sparseift_llm.utils.files import written_whole

MASKS_NAME = "sparse_masks.safetensors"
_FORMAT = "sparseift_masks_v1"


def pack(mask: Tensor) -> Tensor:
    """Bool mask of any shape -> uint8 of ceil(n / 8) bytes, first entry in the highest bit, on the CPU."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`, a bool mask of `shape` on the CPU."""
    size = int(np.prod(shape))
    bits = np.unpackbits(packed.cpu().numpy(), count=size)
    return torch.from_numpy(bits.astype(bool)).view(shape)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a model's sparse layers by module path; unstructured ones are live, not copies."""
    return {name: layer.current_mask() for name, layer in sparse_layers(model).items()}


def digest(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bits; equal exactly when all masks are."""
    result = hashlib.sha256()
    for name, mask in sorted(masks.items()):
        result.update(f"{name}{tuple(mask.shape)}".encode())
        result.update(pack(mask).numpy().tobytes())
    return result.hexdigest()


@dataclass(frozen=True)
class PackedMasks:
    """The masks of a file as they are stored, an eighth of their size in memory.

    Args:
        packed: bits by module path, see `pack`.
        shapes: shape of every mask.
        digest: of all of them, see `digest`.
    """

    packed: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    digest: str

    def unpack(self, name: str) -> Tensor:
        """One mask, bool on the CPU."""
        return unpack(self.packed[name], self.shapes[name])

    def compute_digest(self) -> str:
        """What `digest` is if the bits are whole."""
        result = hashlib.sha256()
        for name, bits in sorted(self.packed.items()):
            result.update(f"{name}{self.shapes[name]}".encode())
            result.update(bits.numpy().tobytes())
        return result.hexdigest()


def save_masks(model: nn.Module, folder: str | Path) -> Path:
    """Write `sparse_masks.safetensors` into `folder`, atomically: the file is whole or absent.

    Returns:
        The file's path.
    """
    return write_masks(masks_of(model), Path(folder) / MASKS_NAME)


def write_masks(masks: Mapping[str, Tensor], path: Path) -> Path:
    """Write any bool masks to `path`, atomically, and return it."""
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    # one entry only: safetensors writes several in random order, and equal masks should be equal files
    header = {_FORMAT: json.dumps({"digest": digest(masks), "shapes": shapes}, sort_keys=True)}
    with written_whole(path) as temporary:
        save_file({name: pack(mask) for name, mask in masks.items()}, temporary, metadata=header)
    return path


def read_masks(folder: str | Path, name: str = MASKS_NAME) -> dict[str, Tensor]:
    """Read the masks in `folder`, checked against their digest.

    Args:
        folder: of a model or checkpoint.
        name: the file.

    Raises:
        ValueError: the file is missing, truncated, damaged or of another format, naming the file.
    """
    masks = read_packed_masks(folder, name)
    return {name: masks.unpack(name) for name in masks.shapes}


def read_packed_masks(folder: str | Path, name: str = MASKS_NAME) -> PackedMasks:
    """The masks in `folder` without unpacking them; arguments and errors as `read_masks`."""
    path = Path(folder) / name
    with _open(path) as (file, header):
        shapes = {name: tuple(map(int, shape)) for name, shape in header["shapes"].items()}
        masks = PackedMasks({name: file.get_tensor(name) for name in shapes}, shapes, str(header.get("digest")))
    if masks.compute_digest() != masks.digest:
        raise ValueError(f"{path} is damaged: its bits do not match its digest")
    return masks


def read_digest(folder: str | Path) -> str:
    """The digest that the mask file in `folder` records, without reading masks; errors as `read_masks`."""
    with _open(Path(folder) / MASKS_NAME) as (_, header):
        return str(header.get("digest"))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The file and its header, with errors that name it."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: without it the masks of this checkpoint are lost; restore the file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _FORMAT not in metadata:
                raise ValueError(f"{path} is not a mask file of format {_FORMAT!r}: it has {sorted(metadata)}")
            yield file, json.loads(metadata[_FORMAT])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor], where: str | Path, check_weights: bool = False) -> None:
    """Set every sparse layer's mask; weights that become inactive are set to 0.

    Args:
        model: a Sparse-IFT model.
        masks: one mask per sparse layer, by module path.
        where: their origin, for error messages.
        check_weights: the model's weights come from the same place, and must be those of the masks.

    Raises:
        ValueError: layers, shapes or numbers of tiles differ from the model's, or the weights are of another
            step than the masks; nothing is changed then.
    """
    reshard(model)
    layers = sparse_layers(model)
    if layers.keys() != masks.keys():
        different = sorted(layers.keys() ^ masks.keys())
        raise ValueError(f"the masks in {where} are of another model: layer {different[0]} stands in only one of them")
    for name, layer in layers.items():
        if masks[name].shape != layer.mask_shape:
            expected, found = tuple(layer.mask_shape), tuple(masks[name].shape)
            raise ValueError(
                f"the masks in {where} are of another model: {name} has shape {found}, expected {expected}"
            )
        if not layer.accepts(masks[name]):
            raise ValueError(
                f"the masks in {where} are of another model: {name} has other numbers of tiles per block-row, "
                "or of active weights per group of n:m neighbours"
            )
        with gathered(layer.weight):
            fits = not check_weights or layer.weights_fit(masks[name])
        if not fits:
            raise ValueError(
                f"the masks in {where} are not those of its weights, first in {name}: the folder was pieced together "
                "from two checkpoints; restore it"
            )
    for name, layer in layers.items():
        with gathered(layer.weight):
            layer.set_mask(masks[name].to(layer.topology.device))
