"""`init="pretrained"`: the sparse twin begins with the weights of a trained dense model, for continued pretraining.

What each family makes of a weight is the family's `start`, in families/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.conversion.install import parts_in
from sparseift_llm.families.base import TrainedProjection
from sparseift_llm.families.registry import drop_in_with, family_of
from sparseift_llm.families.trained_start import Start
from sparseift_llm.families.wide import widen
from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.layers.composite import Part
from sparseift_llm.layers.sharding import is_sharded
from sparseift_llm.layers.stock import is_conv1d, stock_matrix
from sparseift_llm.layers.tiled import TiledProjection
from sparseift_llm.models.architectures import sizes_of
from sparseift_llm.ops.tiles import tiles_of
from sparseift_llm.record.model_record import ModelRecord
from sparseift_llm.record.specs import LayerSpec, RowGroup
from sparseift_llm.topology.masks import derive_seed


def check_has_weights(model: PreTrainedModel | PreTrainedConfig) -> None:
    """Raise ValueError unless `model` holds weights to start from, whole and on a real device."""
    if isinstance(model, PreTrainedConfig):
        raise ValueError(
            f"init='pretrained' needs a model with weights, got {type(model).__name__}; load it with "
            "AutoModelForCausalLM.from_pretrained, or use init='preserve'"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("init='pretrained' needs a model with weights, got one on the meta device; load it first")
    if is_sharded(model):
        raise ValueError("init='pretrained' needs whole weights, got sharded ones; sparsify before fully_shard")


def check_start_is_chosen(model: PreTrainedModel, config: SparseIFTConfig, layers: Iterable[LayerSpec]) -> None:
    """Raise ValueError if `model` was loaded, and nobody said that its trained projections are to start afresh.

    Args:
        model: the dense model.
        config: the transformation as it was given; `init` is None if it does not say.
        layers: what the projections become.
    """
    lost = [layer.name for layer in layers if layer.is_replaced or layer.sparse_shape != layer.dense_shape]
    if config.init is not None or not lost or not _was_loaded(model):
        return
    try:
        replace(config, init="pretrained")
        keeping = "init='pretrained' starts them from their trained weights"
    except ValueError as error:
        keeping = f"their trained weights cannot be kept with these options ({error})"
    raise ValueError(
        f"the model comes from {model.name_or_path}, and {len(lost)} of its projections, first {lost[0]}, would get "
        "random weights in place of what they have learned; say which start is meant: "
        f"{keeping}; init='preserve' (or 'paper', 'supar') starts them afresh"
    )


def _was_loaded(model: PreTrainedModel) -> bool:
    """Whether a model holds weights that `from_pretrained` has read.

    Its name alone does not tell: a fresh model has that of the config it was built from. But transformers marks the
    parameters that it has loaded, and returns the model in evaluation mode, which a copy still is in.
    """
    is_marked = any(getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters())
    has_values = not any(parameter.is_meta for parameter in model.parameters())
    return bool(model.name_or_path) and has_values and (is_marked or not model.training)


@torch.no_grad()
def start_from(dense: PreTrainedModel, sparse: PreTrainedModel, record: ModelRecord) -> None:
    """Put the weights of `dense` into its fresh twin, whose parameters of unchanged shape have theirs already.

    The projections of Parallel compute what the dense ones did, to rounding. Factorized and Doped come as near as the
    truncated singular value decomposition and their active weights let them. A wider FFN keeps the largest
    weights of the dense units; new units have random weights before and zeros, some of them active, behind them.
    Under `gmp`, which starts with every weight active, nothing is left out yet.

    Args:
        dense: the trained model.
        sparse: what `sparsify` built of it, sparse layers installed; its weights and masks change.
        record: of `sparse`.

    Raises:
        ValueError: a parameter of another shape for which there is no start.
    """
    started, num_units = [], (sizes_of(dense.config).ffn, sizes_of(sparse.config).ffn)
    for index, layer in enumerate(record.layers):
        seed = derive_seed(record.transformation.seed, "pretrained start", index)
        old, new = dense.get_submodule(layer.name), sparse.get_submodule(layer.name)
        starts = _starts(old, layer, record.transformation, num_units, seed)
        for name, start in starts.items():
            _store(new.get_submodule(name), start)
        if starts and not layer.is_replaced:
            _adopt(old, new, num_units)
        started += [f"{layer.name}."] if starts else []
    values = dict(dense.named_parameters())
    for name, parameter in sparse.named_parameters():
        if not name.startswith(tuple(started)) and parameter.shape != values[name].shape:
            raise ValueError(f"init='pretrained' knows no start for {name} of shape {tuple(parameter.shape)}")


def _starts(
    old: nn.Module, layer: LayerSpec, config: SparseIFTConfig, num_units: tuple[int, int], seed: int
) -> dict[str, Start]:
    """The matrices of a projection by path inside its module; none where it is copied as it is."""
    if not layer.is_replaced and config.family != "wide":  # a rule leaves it dense, with its own sides
        return {}
    starts_dense = config.dst.starts_dense
    parts = tuple(replace(part, is_sparse=part.is_sparse and not starts_dense) for part in parts_in(layer))
    family = drop_in_with(layer.family, layer.options) if layer.is_replaced else family_of(config.family)
    trained = TrainedProjection(stock_matrix(old), layer.kind, num_units)
    groups = layer.matrices[0].row_groups
    if groups and not layer.is_replaced:
        return _starts_of_groups(trained, parts[0], groups, partial(family.start, tile=1, seed=seed))
    return family.start(trained, parts, config.block_size or 1, seed)


def _starts_of_groups(
    trained: TrainedProjection, part: Part, groups: Sequence[RowGroup], start: Callable[..., dict[str, Start]]
) -> dict[str, Start]:
    """The start of one fused matrix, as if each group of its rows, a gate or what it multiplies, were a matrix."""
    ratio = Fraction(trained.weight.shape[0], part.shape[0])
    starts: list[Start] = []
    for group in sorted(groups, key=lambda group: group.start):
        rows = trained.weight[int(group.start * ratio) : int(group.stop * ratio)]
        small = replace(part, shape=(group.num_rows, part.shape[1]), num_active=group.num_active)
        starts += start(replace(trained, weight=rows), (small,)).values()
    if not starts:
        return {}
    masks = [one.mask for one in starts if one.mask is not None]
    return {part.name: Start(torch.cat([one.values for one in starts]), torch.cat(masks) if masks else None)}


def _store(layer: nn.Module, start: Start) -> None:
    """Give `layer` the weights and, if it is sparse, the mask of `start`."""
    weight: Any = layer.weight
    mask, values = start.mask, start.values
    if is_conv1d(layer):
        mask, values = None if mask is None else mask.T, values.T
    if isinstance(layer, SparseProjection) and mask is not None:
        layer.set_mask(mask.to(weight.device))
    if isinstance(layer, TiledProjection):
        values = tiles_of(values, layer.columns, layer.block_size)
    weight.copy_(values)


def _adopt(old: nn.Module, new: nn.Module, num_units: tuple[int, int]) -> None:
    """Give a widened projection the bias, with zeros for new hidden units, and what is frozen."""
    for name, target in new.named_parameters(recurse=False):
        source: Any = getattr(old, name)
        target.requires_grad_(source.requires_grad)
        if name == "bias" and source.shape != target.shape:
            target.copy_(widen(source, num_units))
