"""The sparse matrices of a model, or of a saved one, one at a time: masks and weights as (out, in), for analysis.

From a folder only what is asked for is read, and no model is built. What is computed from them is in spectral.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from sparseift_llm.checkpoints.loading import weight_files
from sparseift_llm.checkpoints.mask_file import PackedMasks, digest, masks_of, read_packed_masks
from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.sharding import whole
from sparseift_llm.ops.tiles import dense_weight
from sparseift_llm.topology.blocks import are_valid, tile_mask


@dataclass(frozen=True)
class SparseMatrix:
    """One masked matrix.

    Args:
        name: module path.
        kind: of the projection it belongs to, e.g. `qkv` or `mlp_in`.
        mask: bool, one entry per weight (out, in), or per tile (out / block_size, in / block_size).
        block_size: side of a tile, 1 if the mask's units are weights.
        weight: (out, in), zeros filled in.
    """

    name: str
    kind: str
    mask: Tensor
    block_size: int
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return int(self.weight.shape[0]), int(self.weight.shape[1])


@dataclass(frozen=True)
class MatrixSource:
    """The sparse matrices of one model.

    Args:
        masks_digest: of all masks, see `mask_file.digest`; also of those that are not read.
        num_matrices: how many `read` yields.
        read: an iterator over them in the model's order; each is read, or gathered, when it is its turn.
    """

    masks_digest: str
    num_matrices: int
    read: Callable[[], Iterator[SparseMatrix]]


@dataclass(frozen=True)
class MatrixEntry:
    """What a config tells of a sparse matrix.

    Args:
        name: module path.
        kind: of the projection it belongs to.
        shape: (out, in).
        is_transposed: whether mask and weight are stored as (in, out), as a `Conv1D`'s are.
        block_size: side of a tile; None if the mask's units are weights.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    is_transposed: bool
    block_size: int | None


def check_every_nth_layer(every_nth_layer: int) -> None:
    """Raise ValueError unless it is at least 1."""
    if every_nth_layer < 1:
        raise ValueError(f"every_nth_layer must be at least 1, got {every_nth_layer}")


def matrix_source(model_or_folder: PreTrainedModel | str | Path, every_nth_layer: int = 1) -> MatrixSource:
    """Find the sparse matrices of a Sparse-IFT model.

    Args:
        model_or_folder: a model, or a folder that `save_pretrained` or a Trainer wrote.
        every_nth_layer: take decoder layers 0, n, 2n, ... only.

    Raises:
        ValueError: no Sparse-IFT model, or config, masks or weights are missing, damaged or do not fit together;
            reading a matrix raises it, too.
    """
    check_every_nth_layer(every_nth_layer)
    if isinstance(model_or_folder, PreTrainedModel):
        return _source_of_model(model_or_folder, every_nth_layer)
    if not isinstance(model_or_folder, str | Path):
        raise ValueError(f"expected a transformers model or a folder, got {type(model_or_folder).__name__}: unwrap it")
    return _source_of_folder(Path(model_or_folder), every_nth_layer)


def _source_of_model(model: PreTrainedModel, every_nth_layer: int) -> MatrixSource:
    layers = sparse_layers(model)
    entries = matrix_entries(model.config, every_nth_layer, set(layers), "the model")

    def read() -> Iterator[SparseMatrix]:
        for entry in entries:
            layer: Any = layers[entry.name]
            columns = layer.columns.cpu() if entry.block_size else None
            weight = whole(layer.weight.detach()).cpu()
            yield _matrix(entry, layer.current_mask().cpu(), weight, columns)

    return MatrixSource(digest(masks_of(model)), len(entries), read)


def _source_of_folder(folder: Path, every_nth_layer: int) -> MatrixSource:
    try:
        hf_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers validates each field with exceptions of its own
        raise ValueError(f"{folder} has no readable config.json: {str(error).splitlines()[0]}") from error
    read_record(hf_config)
    masks = read_packed_masks(folder)
    entries = matrix_entries(hf_config, every_nth_layer, set(masks.shapes), folder)
    weights = _Weights(folder)
    return MatrixSource(masks.digest, len(entries), lambda: _read_folder(folder, entries, masks, weights))


def _read_folder(
    folder: Path, entries: list[MatrixEntry], masks: PackedMasks, weights: _Weights
) -> Iterator[SparseMatrix]:
    for entry in entries:
        block_size = entry.block_size
        mask, weight = masks.unpack(entry.name), weights.read(f"{entry.name}.weight")
        columns = weights.read(f"{entry.name}.columns") if block_size else None
        if columns is None and weight.shape == (int(mask.sum()),):  # an export of active values alone
            weight = weight.new_zeros(mask.shape).masked_scatter_(mask, weight)
        if columns is None:
            fits = weight.shape == mask.shape and not weight[~mask].any()
        else:
            fits = weight.shape == (len(columns), block_size, block_size) and mask.dim() == 2
            fits = fits and are_valid(columns, *mask.shape) and torch.equal(tile_mask(columns, *mask.shape), mask)
        if not fits:
            raise ValueError(f"the masks in {folder} are not those of its weights, first in {entry.name}; restore it")
        matrix = _matrix(entry, mask, weight, columns)
        if matrix.shape != entry.shape:
            raise ValueError(
                f"the masks in {folder} are of another model: {entry.name} has shape {matrix.shape}, "
                f"expected {entry.shape}"
            )
        yield matrix


def _matrix(entry: MatrixEntry, mask: Tensor, weight: Tensor, columns: Tensor | None) -> SparseMatrix:
    if (size := entry.block_size) is not None:
        assert columns is not None
        weight = dense_weight(weight, columns, mask.shape[0] * size, mask.shape[1] * size)
    elif entry.is_transposed:
        mask, weight = mask.T, weight.T
    return SparseMatrix(entry.name, entry.kind, mask, entry.block_size or 1, weight)


def matrix_entries(
    hf_config: PreTrainedConfig, every_nth_layer: int, names: set[str], where: str | Path
) -> list[MatrixEntry]:
    """What is known without weights of the sparse matrices of the chosen decoder layers.

    Args:
        hf_config: the model's, with its record.
        every_nth_layer: take decoder layers 0, n, 2n, ... only.
        names: of all sparse matrices that the model's masks are for.
        where: the masks' origin, for error messages.

    Raises:
        ValueError: the record is damaged, has other matrices than `names`, or none in the layers chosen.
    """
    found = [(layer, m) for layer in read_record(hf_config).layers for m in layer.matrices if m.is_sparse]
    different = sorted({layer.path_of(matrix) for layer, matrix in found} ^ names)
    if different:
        raise ValueError(f"the masks in {where} are of another model: {different[0]} stands in only one of them")
    entries = [
        MatrixEntry(layer.path_of(matrix), layer.kind, matrix.shape, matrix.transposed, matrix.block_size)
        for layer, matrix in found
        if (layer.layer_index or 0) % every_nth_layer == 0
    ]
    if not entries:
        raise ValueError(f"every_nth_layer={every_nth_layer} leaves no sparse matrix of {where}; choose a smaller one")
    return entries


class _Weights:
    """The tensors of a folder's safetensors files, each read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}
        try:
            for path in weight_files(folder):
                file = safe_open(path, framework="pt")
                self.files.update(dict.fromkeys(file.keys(), file))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"the weights in {folder} are missing or damaged: {error}") from error

    def read(self, name: str) -> Tensor:
        if name not in self.files:
            raise ValueError(f"the weights in {self.folder} are missing or damaged: no {name}")
        tensor: Tensor = self.files[name].get_tensor(name)
        return tensor
