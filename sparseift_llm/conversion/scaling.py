"""Initialisation and learning rates that correct for width and sparsity: `paper`, `preserve`, `supar`.

All corrections are folded into weights and optimizer groups, so that the model stays a stock one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparseift_llm.layers.base import plain_name
from sparseift_llm.layers.stock import is_conv1d
from sparseift_llm.models.architectures import sizes_of
from sparseift_llm.models.fused_rows import row_pattern
from sparseift_llm.models.norms import final_norm, norm_offset, query_norm
from sparseift_llm.models.projections import find_projections
from sparseift_llm.planning.planner import Plan, plan_of, read_record


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
        ValueError: `supar` on a model without a final norm, with norms or a fused QKV matrix that are not understood.

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
    factors = learning_rate_factors(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor, folded = factors.get(plain_name(name), (1.0, 1.0))
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


def learning_rate_factors(model: PreTrainedModel) -> dict[str, tuple[float, float]]:
    """Parameter name -> (SµPar's factor, factor folded into the weight); decay times rate ignores the latter.

    Parameters that are not named have (1, 1), as all have without `init="supar"`.
    """
    if not getattr(model.config, "sparse_ift", None):
        return {}
    config, dense_sizes = read_record(model.config)
    if config.init != "supar":
        return {}
    plan, sizes = plan_of(model), sizes_of(model.config)
    width, head = dense_sizes["hidden"] / sizes.hidden, math.sqrt(dense_sizes["head_dim"] / sizes.head_dim)
    factors = {f"{name}.weight": (1 / multiplier, 1.0) for name, multiplier in fan_in_multipliers(plan).items()}
    folded = {} if width == 1 else {final_norm(model): width}
    if head != 1:
        folded |= dict.fromkeys(_own_query_modules(model, plan), head)
    for name, factor in folded.items():
        for parameter, _ in model.get_submodule(name).named_parameters(prefix=name):
            factors[parameter] = (factors.get(parameter, (1.0, 1.0))[0], factor)
    return factors


def _scale_final_norm(model: PreTrainedModel, factor: float) -> None:
    if factor != 1:
        _scale_norm(model.get_submodule(final_norm(model)), factor)


def _scale_norm(norm: nn.Module, factor: float) -> None:
    offset = norm_offset(norm)
    for name, parameter in norm.named_parameters():
        is_weight = name.endswith("weight")
        parameter.copy_((parameter + offset) * factor - offset if is_weight else parameter * factor)


def _scale_queries(model: PreTrainedModel, plan: Plan, factor: float) -> None:
    if factor == 1:
        return
    for name in (own := _own_query_modules(model, plan)):
        module = model.get_submodule(name)
        if name in (layer.name for layer in plan.layers):
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


def _own_query_modules(model: PreTrainedModel, plan: Plan) -> list[str]:
    """Where scaling the queries means scaling a whole module: the query norm, else the query projection."""
    names = [(layer, query_norm(model, layer.name)) for layer in plan.layers if "q" in layer.kind]
    return [norm or layer.name for layer, norm in names if norm or layer.kind == "q"]
