"""Initial weights that correct for width and sparsity: `paper`, `preserve`, `supar`.

All corrections are folded into weights, so that the model stays a stock one. The learning rates that go with `supar`
are in training/learning_rates.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparseift_llm.layers.stock import embedding_scale, is_conv1d
from sparseift_llm.models.architectures import sizes_of
from sparseift_llm.models.fused_rows import row_pattern
from sparseift_llm.models.norms import final_norm, norm_offset, query_norm
from sparseift_llm.models.projections import find_projections
from sparseift_llm.record.model_record import ModelRecord
from sparseift_llm.record.specs import ENDS, LayerSpec


def fan_in_multipliers(record: ModelRecord) -> dict[str, float]:
    """Active inputs per output of each projection over those of its dense twin, at the start of training.

    This is m_d * m_rho in SµPar: 0.5 for Wide 75% (scope `model`), twice the inputs at a quarter of the density.
    Drop-in families scale their own matrices and are left out, and so are embeddings, whose rows are looked up, and
    logits, see `logit_multiplier`.
    """
    starts_dense = record.transformation.dst.starts_dense
    return {
        layer.name: (layer.num_weights if starts_dense else layer.num_active)
        / (layer.sparse_shape[0] * layer.dense_shape[1])
        for layer in record.layers
        if not layer.is_replaced and layer.kind not in ENDS
    }


def logit_multiplier(record: ModelRecord, hidden: int) -> float:
    """Active inputs of every logit over those in the dense model: m_d where the head is dense, 1 where it is sparse.

    Args:
        record: of the model.
        hidden: its hidden size.
    """
    heads = [layer for layer in record.layers if layer.kind == "logits"]
    owners = {layer.name: layer for layer in record.layers}
    if heads and owners[heads[0].tied_to or heads[0].name].is_sparse:
        return 1.0
    return hidden / record.dense_model.hidden


@torch.no_grad()
def scale_initial_weights(model: PreTrainedModel, record: ModelRecord) -> None:
    """Rescale a freshly built widened model in place, as the `init` of its transformation says.

    `paper` and `pretrained` change nothing. `preserve` multiplies each projection's weights by 1 / sqrt(m), m as in
    `fan_in_multipliers`, so that outputs have the dense layer's variance; a sparse embedding's by 1 / sqrt(density), so
    that the stream that it begins has, and the factor sqrt(hidden) of Gemma's embeddings is taken back. `supar` does
    that too, divides the logits by `logit_multiplier` (in the final norm) and scales attention scores by 1 / head size
    instead of its root (in the queries). Logits that are tied to a sparse embedding have its larger weights, so they
    begin 1 / sqrt(density) times as large as the dense model's under both. Gemma's begin about as large as the dense
    model's: its factor has grown with the hidden size, so the weights need not.

    Args:
        model: widened model with stock initialisation, before masks.
        record: of the model it will be.

    Raises:
        ValueError: `supar` on a model without a final norm, with norms or a fused QKV matrix that are not understood.

    Source: SµPar, arXiv 2405.15743, table 1.
    """
    if record.transformation.init in ("paper", "pretrained"):
        return
    for name, multiplier in fan_in_multipliers(record).items():
        model.get_submodule(name).weight.mul_(1 / math.sqrt(multiplier))  # type: ignore[operator]
    _scale_embedding(model, record)
    if record.transformation.distribution == "erk" and not record.transformation.dst.starts_dense:
        _even_out_kinds(model, record.layers)
    if record.transformation.init == "supar":
        sizes, dense = sizes_of(model.config), record.dense_model
        _scale_final_norm(model, 1 / logit_multiplier(record, sizes.hidden))
        _scale_queries(model, record.layers, math.sqrt(dense.head_dim / sizes.head_dim))


def own_query_modules(model: PreTrainedModel, layers: Iterable[LayerSpec]) -> list[str]:
    """Where scaling the queries means scaling a whole module: the query norm, else the query projection.

    There is none where the queries share a matrix with the keys and values.
    """
    names = [(layer, query_norm(model, layer.name)) for layer in layers if "q" in layer.kind]
    return [norm or layer.name for layer, norm in names if norm or layer.kind == "q"]


@torch.no_grad()
def truncate_weights(model: PreTrainedModel, num_deviations: float) -> None:
    """Redraw initial weights farther from 0 than `num_deviations` standard deviations, in place.

    Gives normal initialisation truncated as in the authors' recipes, for every matrix; zeros of
    inactive weights stay. Uses torch's global generator.
    """
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            std = parameter[parameter != 0].std()
            outside = parameter.abs() > num_deviations * std
            while outside.any():
                parameter[outside] = torch.randn(int(outside.sum()), dtype=parameter.dtype, device=std.device) * std
                outside = parameter.abs() > num_deviations * std


def _even_out_kinds(model: PreTrainedModel, layers: Iterable[LayerSpec]) -> None:
    """Where the kinds in a fused matrix differ in density, give each the output variance that the matrix has."""
    for layer in layers:
        for matrix in () if layer.is_replaced else layer.matrices:
            module: Any = model.get_submodule(layer.name)
            weight = module.weight.T if is_conv1d(module) else module.weight
            density = matrix.num_active / matrix.num_weights
            for group in matrix.row_groups:
                own_density = group.num_active / (group.num_rows * matrix.shape[1])
                weight[group.rows] *= math.sqrt(density / own_density)


def _scale_embedding(model: PreTrainedModel, record: ModelRecord) -> None:
    for layer in record.layers:
        if layer.kind == "embedding":
            embedding = model.get_submodule(layer.name)
            assert isinstance(embedding, nn.Embedding)
            factor = 1 / math.sqrt(1 - layer.sparsity)
            if embedding_scale(embedding) is not None:  # the root of the hidden size
                factor *= math.sqrt(record.dense_model.hidden / embedding.embedding_dim)
            embedding.weight.mul_(factor)


def _scale_final_norm(model: PreTrainedModel, factor: float) -> None:
    if factor != 1:
        _scale_norm(model.get_submodule(final_norm(model)), factor)


def _scale_norm(norm: nn.Module, factor: float) -> None:
    offset = norm_offset(norm)
    for name, parameter in norm.named_parameters():
        is_weight = name.endswith("weight")
        parameter.copy_((parameter + offset) * factor - offset if is_weight else parameter * factor)


def _scale_queries(model: PreTrainedModel, layers: Sequence[LayerSpec], factor: float) -> None:
    if factor == 1:
        return
    for name in (own := own_query_modules(model, layers)):
        module = model.get_submodule(name)
        if name in (layer.name for layer in layers):
            for parameter in module.parameters():
                parameter.mul_(factor)
        else:
            _scale_norm(module, factor)
    for projection in () if own else find_projections(model):
        pattern = row_pattern(projection, model.config) if "q" in projection.kinds else None
        if pattern is not None:
            module = model.get_submodule(projection.name)
            for part in module.parameters():  # a weight as (out, in), or a bias
                rows = part.T if is_conv1d(module) and part.ndim == 2 else part
                rows[pattern.rows("q")] *= factor
