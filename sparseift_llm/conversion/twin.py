"""A fresh Sparse-IFT twin of a dense model: the widened model, its initial values, sparse layers and first masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparseift_llm.conversion.carry_over import carry_over, carry_over_modes
from sparseift_llm.conversion.from_trained import start_from
from sparseift_llm.conversion.install import install_sparse_layers
from sparseift_llm.conversion.scaling import scale_initial_weights
from sparseift_llm.conversion.wide_stream import set_starting_masks, starting_columns, widen_trained
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.masked import MaskedProjection
from sparseift_llm.models.architectures import build_model
from sparseift_llm.models.beyond_config import changes_of
from sparseift_llm.planning.planner import Plan
from sparseift_llm.record.model_record import ModelRecord
from sparseift_llm.topology.blocks import random_columns
from sparseift_llm.topology.connected import reconnect
from sparseift_llm.topology.masks import derive_seed, random_rows, random_scores


def build_twin(model: PreTrainedModel | PreTrainedConfig, plan: Plan) -> PreTrainedModel:
    """Build the Sparse-IFT twin that `plan` describes; its config does not say yet what it is.

    Args:
        model: the dense model, or its config, of which `plan` was made; it is not changed.
        plan: what to build.

    Raises:
        ValueError: `model` is not of the class that transformers has for causal language models of its type, has what
            no twin can take over (see `changes_of`), or its weights cannot start the twin as `init` asks.
    """
    if isinstance(model, PreTrainedConfig):
        sparse = build_model(plan.hf_config)
    else:
        sparse = build_model(plan.hf_config, meta=model.device.type == "meta", dtype=model.dtype)
        if type(sparse) is not type(model):
            raise ValueError(
                f"{type(model).__name__} is not {type(sparse).__name__}, the causal language model of its type; "
                "sparsify that one"
            )
        sparse.to(model.device)  # type: ignore[arg-type]  # transformers' decorator hides its signature
    record = plan.record
    scale_initial_weights(sparse, record)
    if isinstance(model, PreTrainedModel):
        carry_over(model, changes_of(model), sparse)
        _copy_unchanged(model, sparse)
    trained = model if plan.config.init == "pretrained" and isinstance(model, PreTrainedModel) else None
    if trained is not None and plan.config.scope == "residual":
        _start_wide_stream(trained, sparse, record)
    else:
        columns = {} if sparse.device.type == "meta" else _initial_columns(record)
        install_sparse_layers(sparse, plan.layers, columns, preserve=plan.config.init == "preserve")
        if trained is not None:
            start_from(trained, sparse, record)
        else:
            _set_initial_masks(sparse, record)
    if isinstance(model, PreTrainedModel):
        carry_over_modes(model, sparse)
    return sparse


def _start_wide_stream(dense: PreTrainedModel, sparse: PreTrainedModel, record: ModelRecord) -> None:
    """Put trained weights into a stock model with a wider stream, then sparse layers, whose first masks they decide."""
    widen_trained(dense, sparse, record)
    install_sparse_layers(sparse, record.layers, starting_columns(sparse, record))
    set_starting_masks(sparse, record)


def _initial_columns(record: ModelRecord) -> dict[str, Tensor]:
    """Random places of the tiles of every matrix that has some, by module path."""
    sparse = [(layer.path_of(m), m) for layer in record.layers for m in layer.matrices if m.is_sparse]
    columns, connected = {}, record.transformation.dst.keeps_connected("block")
    for index, (path, matrix) in enumerate(sparse):
        if size := matrix.block_size:
            seed = derive_seed(record.transformation.seed, "initial mask", index)
            rows, width = matrix.shape[0] // size, matrix.shape[1] // size
            columns[path] = random_columns(rows, width, matrix.num_active // size**2, seed, connected)
    return columns


def _set_initial_masks(model: PreTrainedModel, record: ModelRecord) -> None:
    """Random masks for matrices that are stored with their zeros; under `gmp` all projections are active at first."""
    config = record.transformation
    for index, layer in enumerate(sparse_layers(model).values()):
        if not isinstance(layer, MaskedProjection) or layer.weight.is_meta:
            continue
        seed = derive_seed(config.seed, "initial mask", index)
        if layer.role != "projection":
            mask = random_rows(layer.mask_shape, layer.num_active // layer.mask_shape[0], seed)
        elif config.dst.starts_dense:
            continue
        else:
            mask = layer.groups.first_mask(layer.mask_shape, layer.num_active, seed)
            if config.dst.keeps_connected("unstructured"):
                mask = reconnect(mask, random_scores(layer.mask_shape, seed), layer.groups, layer.lines)
        layer.set_mask(mask.to(layer.weight.device))


@torch.no_grad()
def _copy_unchanged(source: nn.Module, target: nn.Module) -> None:
    values = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if parameter.shape == values[name].shape:
            parameter.copy_(values[name])
