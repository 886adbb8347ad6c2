"""Learning rates: parameter groups that correct for width and sparsity (`supar`), and the schedule of the recipes.

The initial weights that go with them are in conversion/scaling.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.conversion.scaling import fan_in_multipliers, own_query_modules
from sparseift_llm.layers.base import plain_name
from sparseift_llm.models.architectures import sizes_of
from sparseift_llm.models.norms import final_norm
from sparseift_llm.record.model_record import has_record


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


def learning_rate_factors(model: PreTrainedModel) -> dict[str, tuple[float, float]]:
    """Parameter name -> (SµPar's factor, factor folded into the weight); decay times rate ignores the latter.

    Parameters that are not named have (1, 1), as all have without `init="supar"`.
    """
    if not has_record(model.config):
        return {}
    record = read_record(model.config)
    if record.transformation.init != "supar":
        return {}
    dense, sizes = record.dense_model, sizes_of(model.config)
    width, head = dense.hidden / sizes.hidden, math.sqrt(dense.head_dim / sizes.head_dim)
    factors = {f"{name}.weight": (1 / multiplier, 1.0) for name, multiplier in fan_in_multipliers(record).items()}
    folded = {} if width == 1 else {final_norm(model): width}
    if head != 1:
        folded |= dict.fromkeys(own_query_modules(model, record.layers), head)
    for name, factor in folded.items():
        for parameter, _ in model.get_submodule(name).named_parameters(prefix=name):
            factors[parameter] = (factors.get(parameter, (1.0, 1.0))[0], factor)
    return factors


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
