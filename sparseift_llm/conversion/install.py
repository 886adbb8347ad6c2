"""Sparse layers in place of a stock model's projections, as specifications say, and stock layers in place of them.

Nothing here computes a size: `install_sparse_layers` is what a fresh twin, a checkpoint and an export are built by, and
all of them bring the specifications. What values the layers start with is decided in twin.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseift_llm.families.registry import drop_in_with
from sparseift_llm.layers import unattended
from sparseift_llm.layers.base import SparseProjection, sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.layers.block_embedding import BlockSparseEmbedding, BlockSparseLogits, TiedBlockLogits
from sparseift_llm.layers.block_ffn import BlockFeedForward, can_be_fused
from sparseift_llm.layers.composite import CompositeProjection, Part
from sparseift_llm.layers.ends import MaskedEmbedding, TiedLogits, tied_logits
from sparseift_llm.layers.masked import MaskedProjection, masked_projection
from sparseift_llm.layers.stock import is_conv1d
from sparseift_llm.models.projections import stock_shape
from sparseift_llm.models.quirks import FEED_FORWARD_CHAINS, GATED_FEED_FORWARD_CHAINS
from sparseift_llm.record.fields import LATER_VERSION, damaged
from sparseift_llm.record.specs import ENDS, LayerSpec, MatrixSpec


def install_sparse_layers(
    model: PreTrainedModel,
    layers: Iterable[LayerSpec],
    columns: Mapping[str, Tensor] | None = None,
    preserve: bool = False,
) -> None:
    """Swap the projections of a stock model, which has their widths already, for sparse layers, in place.

    Masked weights start with all of them active. DistributedDataParallel does not broadcast the layers' buffers.

    Args:
        model: a stock model, on any device.
        layers: a specification for every projection, and perhaps for embedding and logits; those that stay dense are
            only checked.
        columns: of every matrix with tiles, by module path (see `BlockSparseLinear`); not needed on the meta device.
        preserve: fresh matrices of drop-in families start with about the output variance of the projection.

    Raises:
        ValueError: a projection is missing or has other sides than its specification, or the specification asks for
            what this version cannot build.
    """
    layers = tuple(layers)
    for layer in layers:
        _check_supported(layer)
    for layer, stock in [(layer, _stock_module(model, layer)) for layer in layers]:
        if layer.tied_to is not None:
            _tie(model, layer, stock)
        elif layer.is_replaced:
            _replace(model, layer.name, _composite(stock, layer, columns or {}, preserve))
        elif layer.is_sparse:
            sparse = _sparse_layer(stock, layer, layer.matrices[0], columns or {})
            if layer.kind in ENDS:
                sparse.role = layer.kind
                if isinstance(sparse, MaskedProjection):
                    sparse.divide_rows()  # every word keeps its number of weights
            _replace(model, layer.name, sparse)
    _fuse_feed_forwards(model, layers)
    unattended.watch(model)
    # every rank computes the same masks and indices; broadcasting them before each forward would be waste
    model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
        f"{prefix}{name}.{buffer}"
        for name, layer in sparse_layers(model).items()
        for buffer, _ in layer.named_buffers()
        for prefix in ("", "_orig_mod.")  # compiled before it was wrapped
    ]


def remove_sparse_layers(model: PreTrainedModel) -> None:
    """Put stock layers in place of all sparse ones, in place: zeros are filled in, and the logits stay.

    Raises:
        ValueError: a family's non-linearity has no stock twin.
    """
    composites = {name: m for name, m in model.named_modules() if isinstance(m, CompositeProjection)}
    for name, module in composites.items():
        _replace(model, name, module.to_dense())
    remove_ends(model)
    for name, layer in sparse_layers(model).items():
        _replace(model, name, layer.to_dense())
    for name, module in list(model.named_modules()):
        if isinstance(module, BlockFeedForward):
            _replace(model, name, module.to_stock())
    del model._ddp_params_and_buffers_to_ignore


def remove_ends(model: PreTrainedModel) -> None:
    """Put stock layers in place of a sparse embedding and of sparse logits, in place, with zeros filled in."""
    for name, layer in sparse_layers(model).items():
        if layer.role != "projection":
            _replace(model, name, layer.to_dense())
    for name, head in tied_logits(model).items():
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        _replace(model, name, head.to_dense(embedding))


def parts_in(layer: LayerSpec) -> tuple[Part, ...]:
    """The matrices of a projection as the families take them; names are paths inside its module."""
    return tuple(
        Part(m.path, m.shape, m.num_active, m.is_sparse, pattern=m.pattern, transposable=m.transposable)
        for m in layer.matrices
    )


def _check_supported(layer: LayerSpec) -> None:
    """Refuse what a record may hold, but this version does not build."""
    unknown = [f"a matrix tied to {layer.tied_to}"] if layer.tied_to is not None and layer.kind != "logits" else []
    if layer.kind in ENDS:
        unknown += ["structure 'n:m'" for matrix in layer.matrices if matrix.pattern is not None]
    if unknown:
        raise ValueError(
            f"{layer.name} has {unknown[0]} by the sparse_ift record in config.json, which this version cannot build; "
            f"{LATER_VERSION}"
        )


def _stock_module(model: PreTrainedModel, layer: LayerSpec) -> nn.Module:
    """The stock module in whose place `layer` stands, of the sides that the specification names."""
    try:
        module = model.get_submodule(layer.name)
    except AttributeError as error:
        raise damaged(layer.name, f"is not a module of {type(model).__name__}") from error
    found = _embedding_shape(module) if layer.kind == "embedding" else stock_shape(module)
    if found is None:
        raise damaged(layer.name, f"is not a projection in {type(model).__name__}, but a {type(module).__name__}")
    if layer.tied_to is not None:  # it has the owner's sides
        return module
    size = layer.matrices[0].block_size
    if layer.kind in ENDS and size is not None:
        found = (-(-found[0] // size) * size, found[1])  # a vocabulary is filled up to whole tiles
    if found != layer.sparse_shape:
        where = model.config.name_or_path or "the model"
        raise ValueError(
            f"the sparse_ift record in the config of {where} is damaged: it stands for {layer.name} of "
            f"{layer.sparse_shape[0]} x {layer.sparse_shape[1]}, but the config has {found[0]} x {found[1]}"
        )
    matrix = layer.matrices[0]
    if not layer.is_replaced and matrix.transposed != (is_conv1d(module) and matrix.block_size is None):
        raise damaged(f"{layer.name}.matrices", f"has transposed={matrix.transposed}, but is a {type(module).__name__}")
    return module


def _embedding_shape(module: nn.Module) -> tuple[int, int] | None:
    """(vocabulary, hidden) of a stock embedding; None for any other module."""
    if not isinstance(module, nn.Embedding) or isinstance(module, SparseProjection):
        return None
    return module.num_embeddings, module.embedding_dim


def _tie(model: PreTrainedModel, layer: LayerSpec, stock: nn.Module) -> None:
    """Let logits use the mask of the embedding, whose weight they share. The embedding is in its place already."""
    owner = model.get_submodule(layer.tied_to or "")
    if (owner, stock) != (model.get_input_embeddings(), model.get_output_embeddings()):
        raise damaged(layer.name, f"and {layer.tied_to} are not embedding and output head of {type(model).__name__}")
    if not model.config.tie_word_embeddings:
        raise damaged(layer.name, f"is tied to {layer.tied_to}, but the config says tie_word_embeddings=False")
    assert isinstance(stock, nn.Linear)
    if isinstance(owner, MaskedEmbedding):
        _replace(model, layer.name, TiedLogits(stock, owner))
    elif isinstance(owner, BlockSparseEmbedding):
        _replace(model, layer.name, TiedBlockLogits(stock, owner))


def _composite(
    stock: nn.Module, layer: LayerSpec, columns: Mapping[str, Tensor], preserve: bool
) -> CompositeProjection:
    """A drop-in family's module with fresh matrices, on the device and in the dtype of the projection."""
    make = partial(_make_part, stock, layer, {matrix.path: matrix for matrix in layer.matrices}, columns)
    try:
        return drop_in_with(layer.family, layer.options).build(stock, parts_in(layer), make, preserve)
    except ValueError as error:
        raise damaged(
            layer.name, f"cannot be built as family {layer.family!r} ({error}), or {LATER_VERSION}"
        ) from error


def _make_part(
    stock: nn.Module,
    layer: LayerSpec,
    matrices: Mapping[str, MatrixSpec],
    columns: Mapping[str, Tensor],
    part: Part,
    std: float,
) -> nn.Module:
    weight: Tensor = stock.weight  # type: ignore[assignment]
    linear = nn.Linear(part.shape[1], part.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    nn.init.normal_(linear.weight, std=std)
    linear.weight.requires_grad_(weight.requires_grad)
    return _sparse_layer(linear, layer, matrices[part.name], columns) if part.is_sparse else linear


def _sparse_layer(
    dense: nn.Module, layer: LayerSpec, matrix: MatrixSpec, columns: Mapping[str, Tensor]
) -> SparseProjection:
    if matrix.block_size is None and isinstance(dense, nn.Embedding):
        return MaskedEmbedding(dense, matrix.num_active, layer.dense_shape)
    if matrix.block_size is None:
        masked = masked_projection(dense, matrix.num_active, layer.dense_shape)
        masked.divide(matrix)
        return masked
    if dense.weight.is_meta:
        places = torch.empty(matrix.num_active // matrix.block_size**2, dtype=torch.int32, device="meta")
    else:
        places = columns[layer.path_of(matrix)]
    if isinstance(dense, nn.Embedding):
        return BlockSparseEmbedding(dense, places, matrix.block_size, layer.dense_shape)
    if layer.kind == "logits":
        assert isinstance(dense, nn.Linear)
        return BlockSparseLogits(dense, places, matrix.block_size, layer.dense_shape)
    return BlockSparseLinear(dense, places, matrix.block_size, layer.dense_shape)


def _fuse_feed_forwards(model: PreTrainedModel, layers: Iterable[LayerSpec]) -> None:
    """Compute the projections of an FFN as one where all are block-sparse, with a known activation between them."""
    model_type = model.config.model_type
    is_gated = model_type in GATED_FEED_FORWARD_CHAINS
    chain = (GATED_FEED_FORWARD_CHAINS if is_gated else FEED_FORWARD_CHAINS).get(model_type)
    if chain is None:
        return
    for name in [layer.name.rpartition(".")[0] for layer in layers if layer.kind == "mlp_out"]:
        mlp = model.get_submodule(name)
        if can_be_fused(mlp, chain, is_gated):
            _replace(model, name, BlockFeedForward(mlp, chain, is_gated))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
