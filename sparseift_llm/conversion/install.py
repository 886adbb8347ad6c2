"""`sparsify` turns a dense GPT into its Sparse-IFT twin, `to_dense` gives back a stock model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparseift_llm.checkpoints.saving import GATHER, install_saving, restore_saving
from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.conversion.from_trained import check_has_weights, start_from
from sparseift_llm.conversion.scaling import scale_initial_weights
from sparseift_llm.families.registry import drop_in_of
from sparseift_llm.layers.base import SparseProjection, sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.layers.block_ffn import BlockFeedForward, can_be_fused
from sparseift_llm.layers.composite import CompositeProjection, Part
from sparseift_llm.layers.masked import MaskedProjection, masked_projection
from sparseift_llm.layers.sharding import is_sharded
from sparseift_llm.models.architectures import build_model
from sparseift_llm.models.layout import mark, missing_layers, unmark
from sparseift_llm.models.quirks import FEED_FORWARD_CHAINS
from sparseift_llm.planning.planner import LayerPlan, Plan, plan, record
from sparseift_llm.topology.blocks import random_columns
from sparseift_llm.topology.heads import random_mask_per_head
from sparseift_llm.topology.masks import derive_seed, random_mask


def sparsify(model: PreTrainedModel | PreTrainedConfig, config: SparseIFTConfig) -> PreTrainedModel:
    """Build the Sparse-IFT twin of a dense causal language model.

    The result is a transformers model with other widths and sparse projections. Unstructured, its weights hold exact
    zeros, and `save_pretrained` writes a stock checkpoint plus the packed masks. Block-sparse, it holds
    active tiles only, and so does its checkpoint: `load_pretrained` reads it, `to_dense` makes it stock. It is randomly
    initialised (set torch's seed before), except that parameters whose shape did not change keep the values of `model`,
    when a model is given: of a trained model the new projections know nothing, unless `init="pretrained"` starts them
    from its weights. The argument itself is not changed.

    Args:
        model: a dense model, or its config. Under `torch.device("meta")` nothing is allocated.
        config: the transformation.

    Returns:
        A new model of the same class, dtype and device; `print` shows each layer's sparsity.

    Raises:
        ValueError: as `plan` does; `init="pretrained"` without a model that has weights.

    Source: arXiv 2303.11525.
    """
    if config.init == "pretrained":
        check_has_weights(model)
    result = plan(model, config)
    if isinstance(model, PreTrainedConfig):
        dense_config = model
        sparse = build_model(result.hf_config)
    else:
        dense_config = model.config
        sparse = build_model(result.hf_config, meta=model.device.type == "meta", dtype=model.dtype)
        if type(sparse) is not type(model):
            raise ValueError(
                f"{type(model).__name__} is not {type(sparse).__name__}, the causal language model of its type; "
                "sparsify that one"
            )
        sparse.to(model.device)  # type: ignore[arg-type]  # transformers' decorator hides its signature
    sparse.config.sparse_ift = record(result, dense_config)
    mark(sparse.config, result.config)
    scale_initial_weights(sparse, result, sparse.config.sparse_ift["dense_sizes"])
    if isinstance(model, PreTrainedModel):
        _copy_unchanged(model, sparse)
        sparse.generation_config = copy.deepcopy(model.generation_config)
        sparse.train(model.training)
    install_sparse_layers(sparse, result)
    if config.init == "pretrained" and isinstance(model, PreTrainedModel):
        start_from(model, sparse, result)
    else:
        _set_initial_masks(sparse, config)
    return sparse


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """A stock transformers model with the same logits: to the bit if unstructured, to rounding if block-sparse.

    Args:
        model: a Sparse-IFT model; it is not changed.

    Returns:
        A copy with plain layers (zeros stay in the weights) and without the `sparse_ift` record.

    Raises:
        ValueError: `model` has no sparse layers, its weights are sharded, or it is no stock model because of a
            family's non-linearity.
    """
    if not sparse_layers(model):
        if getattr(model.config, "sparse_ift", None):
            raise ValueError(missing_layers(model.config))
        raise ValueError("the model has no sparse layers: it is dense already")
    if is_sharded(model):
        raise ValueError(f"to_dense needs whole weights; {GATHER}, then to_dense(load_pretrained(folder))")
    dense = copy.deepcopy(model)
    composites = {name: m for name, m in dense.named_modules() if isinstance(m, CompositeProjection)}
    for name, module in composites.items():
        _replace(dense, name, module.to_dense())
    for name, layer in sparse_layers(dense).items():
        _replace(dense, name, layer.to_dense())
    for name, module in list(dense.named_modules()):
        if isinstance(module, BlockFeedForward):
            _replace(dense, name, module.to_stock())
    restore_saving(dense)
    del dense.config.sparse_ift, dense._ddp_params_and_buffers_to_ignore
    unmark(dense.config)
    return dense


def install_sparse_layers(model: PreTrainedModel, plan: Plan, columns: Mapping[str, Tensor] | None = None) -> None:
    """Swap the planned projections of a widened stock model for sparse layers.

    Unstructured layers start with all weights active, block-sparse ones with random tiles, or with those in
    `columns` (by layer name, see `BlockSparseLinear`). From then on `save_pretrained` writes the masks,
    and DistributedDataParallel does not broadcast them.
    """
    seeds = count()

    def sparse_layer(dense: nn.Module, part: Part, dense_shape: tuple[int, int]) -> SparseProjection:
        seed = derive_seed(plan.config.seed, "initial mask", next(seeds))
        return _sparse_layer(dense, part, dense_shape, plan.config.block_size, seed, (columns or {}).get(part.name))

    for layer in plan.layers:
        dense = model.get_submodule(layer.name)
        if layer.rule is not None:
            make = partial(_make_part, dense, layer, sparse_layer)
            preserve = plan.config.init == "preserve"
            _replace(model, layer.name, drop_in_of(layer.rule).build(dense, layer.parts, make, preserve))
        elif layer.is_sparse:
            sparse = sparse_layer(dense, layer.matrices[0], layer.dense_shape)
            if layer.heads is not None and isinstance(sparse, MaskedProjection):
                sparse.balance_heads(*layer.heads)
            _replace(model, layer.name, sparse)
    _fuse_feed_forwards(model, plan)
    install_saving(model, plan.config)
    # every rank computes the same masks and indices; broadcasting them before each forward would be waste
    model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
        f"{prefix}{name}.{buffer}"
        for name, layer in sparse_layers(model).items()
        for buffer, _ in layer.named_buffers()
        for prefix in ("", "_orig_mod.")  # compiled before it was wrapped
    ]


def _make_part(
    replaced: nn.Module, layer: LayerPlan, sparse_layer: Callable[..., SparseProjection], part: Part, std: float
) -> nn.Module:
    """A fresh matrix of a drop-in family, on the device and in the dtype of the projection it helps replace."""
    weight: Tensor = replaced.weight  # type: ignore[assignment]
    linear = nn.Linear(part.shape[1], part.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    nn.init.normal_(linear.weight, std=std)
    linear.weight.requires_grad_(weight.requires_grad)
    if not part.is_sparse:
        return linear
    return sparse_layer(linear, replace(part, name=f"{layer.name}.{part.name}"), layer.dense_shape)


def _sparse_layer(
    dense: nn.Module,
    part: Part,
    dense_shape: tuple[int, int],
    block_size: int | None,
    seed: int,
    columns: Tensor | None,
) -> SparseProjection:
    if block_size is None:
        return masked_projection(dense, part.num_active, dense_shape)
    num_tiles = part.num_active // block_size**2
    if dense.weight.is_meta:
        columns = torch.empty(num_tiles, dtype=torch.int32, device="meta")
    elif columns is None:
        columns = random_columns(part.shape[0] // block_size, part.shape[1] // block_size, num_tiles, seed)
    return BlockSparseLinear(dense, columns, block_size, dense_shape)


def _fuse_feed_forwards(model: PreTrainedModel, plan: Plan) -> None:
    """Compute both projections of an FFN as one where both are block-sparse and a GELU stands between them."""
    chain = FEED_FORWARD_CHAINS.get(model.config.model_type)
    if chain is None:
        return
    for name in [layer.name.rpartition(".")[0] for layer in plan.layers if layer.kind == "mlp_out"]:
        mlp = model.get_submodule(name)
        if can_be_fused(mlp, chain):
            _replace(model, name, BlockFeedForward(mlp, chain))


def _set_initial_masks(model: PreTrainedModel, config: SparseIFTConfig) -> None:
    for index, layer in enumerate(sparse_layers(model).values()):
        if not isinstance(layer, MaskedProjection) or layer.weight.is_meta or config.dst.algorithm == "gmp":
            continue
        seed = derive_seed(config.seed, "initial mask", index)
        if layer.heads is None:
            mask = random_mask(layer.weight.shape, layer.num_active, seed)
        else:
            mask = random_mask_per_head(layer.weight.shape, layer.num_active, seed, layer.heads)
        layer.set_mask(mask.to(layer.weight.device))


@torch.no_grad()
def _copy_unchanged(source: nn.Module, target: nn.Module) -> None:
    values = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if parameter.shape == values[name].shape:
            parameter.copy_(values[name])
            parameter.requires_grad_(values[name].requires_grad)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
