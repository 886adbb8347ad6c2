"""Initialisation and learning rates that correct for width and sparsity: `paper`, `preserve`, `supar`.

All corrections are folded into weights and optimizer groups, so that the model stays a stock one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseift_llm.architectures import architecture_of, sizes_of
from sparseift_llm.planning import Plan, plan_of, read_record


def fan_in_multipliers(plan: Plan) -> dict[str, float]:
    """Active inputs per output of each projection over those of its dense twin, at the start of training.

    This is m_d * m_rho in SµPar: 0.5 for Wide 75% (scope `model`), twice the inputs at a quarter of the density.
    """
    starts_dense = plan.config.dst.algorithm == "gmp"
    multipliers = {}
    for layer in plan.layers:
        if layer.rule is not None:  # a drop-in family scales its own matrices
            continue
        num_active = layer.num_weights if starts_dense else layer.num_active
        multipliers[layer.name] = num_active / (layer.sparse_shape[0] * layer.dense_shape[1])
    return multipliers


@torch.no_grad()
def scale_initial_weights(model: PreTrainedModel, plan: Plan, dense_sizes: dict[str, int]) -> None:
    """Rescale a freshly built widened model in place, as `plan.config.init` says.

    `paper` and `pretrained` change nothing. `preserve` multiplies each projection's weights by 1 / sqrt(m), m as in
    `fan_in_multipliers`, so that outputs have the dense layer's variance. `supar` does that too,
    divides the logits by the width multiplier (in the final norm) and scales attention scores
    by 1 / head size instead of its root (in the queries).

    Args:
        model: widened model with stock initialisation, before masks.
        plan: its plan.
        dense_sizes: `hidden`, `ffn`, `head_dim` of the dense model.

    Raises:
        ValueError: `supar` on a model without a final norm.

    Source: SµPar, arXiv 2405.15743, table 1.
    """
    if plan.config.init in ("paper", "pretrained"):
        return
    for name, multiplier in fan_in_multipliers(plan).items():
        model.get_submodule(name).weight.mul_(1 / math.sqrt(multiplier))  # type: ignore[operator]
    if plan.config.init == "supar":
        sizes = sizes_of(model.config)
        _scale_final_norm(model, dense_sizes["hidden"] / sizes.hidden)
        _scale_queries(model, plan, math.sqrt(dense_sizes["head_dim"] / sizes.head_dim))


def optimizer_param_groups(model: PreTrainedModel, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for an Adam-type optimizer: no decay on vectors, and SµPar's learning rates.

    For a dense model, `paper`, `preserve` and `pretrained` every group has `lr`. Under `supar` a projection's
    is lr / m (see `fan_in_multipliers`), and parameters that carry a folded factor (final norm,
    queries that have a matrix or norm of their own) have it on their learning rate, too. With a fused
    QKV matrix the queries share its learning rate.

    Args:
        model: dense or Sparse-IFT model.
        lr: peak learning rate of the dense base model.
        weight_decay: decoupled decay for matrices.

    Returns:
        Groups with `params`, `lr`, `weight_decay`, ready for `torch.optim.AdamW`.

    Source: SµPar, arXiv 2405.15743, table 1.
    """
    factors = _learning_rate_factors(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor, folded = factors.get(name, (1.0, 1.0))
            decay = weight_decay / folded if parameter.ndim >= 2 else 0.0
            groups[lr * factor * folded, decay].append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


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


def cosine_to_plateau(warmup_steps: int, decay_steps: int, min_lr_rate: float) -> Callable[[int], float]:
    """Learning-rate factor: linear warmup, cosine down to `min_lr_rate` at `decay_steps`, then constant.

    >>> schedule = cosine_to_plateau(10, 110, 0.1)
    >>> [round(schedule(step), 3) for step in (5, 10, 60, 110, 200)]
    [0.5, 1.0, 0.55, 0.1, 0.1]
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
        return min_lr_rate + (1 - min_lr_rate) * (1 + math.cos(math.pi * progress)) / 2

    return factor


def _learning_rate_factors(model: PreTrainedModel) -> dict[str, tuple[float, float]]:
    """Parameter name -> (SµPar's factor, factor folded into the weight); decay times rate ignores the latter."""
    if not getattr(model.config, "sparse_ift", None):
        return {}
    config, dense_sizes = read_record(model.config)
    if config.init != "supar":
        return {}
    plan, sizes, architecture = plan_of(model), sizes_of(model.config), architecture_of(model.config)
    width, head = dense_sizes["hidden"] / sizes.hidden, math.sqrt(dense_sizes["head_dim"] / sizes.head_dim)
    factors = {f"{name}.weight": (1 / multiplier, 1.0) for name, multiplier in fan_in_multipliers(plan).items()}
    for part in ("weight", "bias"):
        factors[f"{architecture.final_norm}.{part}"] = (1.0, width)
    for name in _own_query_modules(model, plan):
        factors[f"{name}.weight"] = (factors.get(f"{name}.weight", (1.0, 1.0))[0], head)
        factors[f"{name}.bias"] = (1.0, head)
    return factors


def _scale_final_norm(model: PreTrainedModel, factor: float) -> None:
    architecture = architecture_of(model.config)
    if not _has(model, architecture.final_norm):
        raise ValueError(f"init='supar' needs a norm before the logits, {model.config.model_type} has none here")
    offset = architecture.norm_offset
    for name, parameter in model.get_submodule(architecture.final_norm).named_parameters():
        parameter.copy_((parameter + offset) * factor - offset if name == "weight" else parameter * factor)


def _scale_queries(model: PreTrainedModel, plan: Plan, factor: float) -> None:
    own = _own_query_modules(model, plan)
    for name in own:
        module = model.get_submodule(name)
        for parameter in module.parameters():
            parameter.mul_(factor)
    if not own:
        for layer in plan.layers:
            if layer.kind == "qkv":
                for part in model.get_submodule(layer.name).parameters():
                    _query_part(part, model).mul_(factor)


def _own_query_modules(model: PreTrainedModel, plan: Plan) -> list[str]:
    """Where scaling the queries means scaling a whole module: the query norm, else the query projection."""
    names = []
    for layer in plan.layers:
        if layer.kind == "q":
            norm = layer.name.rsplit(".", 1)[0] + ".q_norm"  # a norm after the projection would undo its scale
            names.append(norm if _has(model, norm) else layer.name)
    return names


def _query_part(parameter: Tensor, model: PreTrainedModel) -> Tensor:
    """The entries of a fused QKV weight or bias that make queries, as a view."""
    sizes, layout = sizes_of(model.config), architecture_of(model.config).qkv_layout
    if layout == "blocks":  # Conv1D: outputs are the last dimension, q comes first
        return parameter[..., : sizes.attention_width]
    return parameter.unflatten(0, (sizes.num_heads, 3, sizes.head_dim))[:, 0]


def _has(model: nn.Module, name: str) -> bool:
    parent, _, child = name.rpartition(".")
    return getattr(model.get_submodule(parent), child, None) is not None
