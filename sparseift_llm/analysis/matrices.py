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
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.sharding import whole
from sparseift_llm.layers.stock import is_conv1d
from sparseift_llm.models.architectures import build_model
from sparseift_llm.models.projections import find_projections
from sparseift_llm.ops.tiles import dense_weight
from sparseift_llm.planning.planner import plan_of, read_record
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
    """

    name: str
    kind: str
    shape: tuple[int, int]
    is_transposed: bool


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
    block_size, entries = matrix_entries(model.config, every_nth_layer, set(layers), "the model")

    def read() -> Iterator[SparseMatrix]:
        for entry in entries:
            layer: Any = layers[entry.name]
            columns = layer.columns.cpu() if block_size else None
            weight = whole(layer.weight.detach()).cpu()
            yield _matrix(entry, layer.current_mask().cpu(), weight, columns, block_size)

    return MatrixSource(digest(masks_of(model)), len(entries), read)


def _source_of_folder(folder: Path, every_nth_layer: int) -> MatrixSource:
    try:
        hf_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers validates each field with exceptions of its own
        raise ValueError(f"{folder} has no readable config.json: {str(error).splitlines()[0]}") from error
    read_record(hf_config)
    masks = read_packed_masks(folder)
    block_size, entries = matrix_entries(hf_config, every_nth_layer, set(masks.shapes), folder)
    weights = _Weights(folder)
    return MatrixSource(masks.digest, len(entries), lambda: _read_folder(folder, entries, masks, weights, block_size))


def _read_folder(
    folder: Path, entries: list[MatrixEntry], masks: PackedMasks, weights: _Weights, block_size: int | None
) -> Iterator[SparseMatrix]:
    for entry in entries:
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
        matrix = _matrix(entry, mask, weight, columns, block_size)
        if matrix.shape != entry.shape:
            raise ValueError(
                f"the masks in {folder} are of another model: {entry.name} has shape {matrix.shape}, "
                f"expected {entry.shape}"
            )
        yield matrix


def _matrix(
    entry: MatrixEntry, mask: Tensor, weight: Tensor, columns: Tensor | None, block_size: int | None
) -> SparseMatrix:
    if block_size is not None:
        assert columns is not None
        weight = dense_weight(weight, columns, mask.shape[0] * block_size, mask.shape[1] * block_size)
    elif entry.is_transposed:
        mask, weight = mask.T, weight.T
    return SparseMatrix(entry.name, entry.kind, mask, block_size or 1, weight)


def matrix_entries(
    hf_config: PreTrainedConfig, every_nth_layer: int, names: set[str], where: str | Path
) -> tuple[int | None, list[MatrixEntry]]:
    """The side of a tile, and what is known without weights of the sparse matrices of the chosen decoder layers."""
    try:
        stock = build_model(hf_config, meta=True)
        plan = plan_of(stock)
    except ValueError:
        raise
    except Exception as error:  # transformers and torch refuse sizes with exceptions of their own
        raise ValueError(f"the config of {where} describes no model that can be built: {error}") from error
    found = [
        (projection.layer_index, layer, part)
        for projection, layer in zip(find_projections(stock), plan.layers, strict=True)
        for part in layer.matrices
        if part.is_sparse
    ]
    different = sorted({part.name for _, _, part in found} ^ names)
    if different:
        raise ValueError(f"the masks in {where} are of another model: {different[0]} stands in only one of them")
    keeps_storage = {layer.name for _, layer, _ in found if plan.config.block_size is None and layer.rule is None}
    entries = [
        MatrixEntry(
            part.name,
            layer.kind,
            part.shape,
            layer.name in keeps_storage and is_conv1d(stock.get_submodule(layer.name)),
        )
        for layer_index, layer, part in found
        if layer_index % every_nth_layer == 0
    ]
    if not entries:
        raise ValueError(f"every_nth_layer={every_nth_layer} leaves no sparse matrix of {where}; choose a smaller one")
    return plan.config.block_size, entries


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
