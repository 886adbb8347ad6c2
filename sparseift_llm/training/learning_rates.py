"""Learning rates: parameter groups for embeddings, width and sparsity (`supar`), and the schedule of the recipes.

The initial weights that go with them are in conversion/scaling.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.conversion.scaling import fan_in_multipliers, logit_multiplier, own_query_modules
from sparseift_llm.layers.base import plain_name
from sparseift_llm.models.architectures import sizes_of
from sparseift_llm.models.norms import final_norm
from sparseift_llm.models.wrappers import pretrained_model
from sparseift_llm.record.model_record import has_record
from sparseift_llm.utils.numbers import check_number


def optimizer_param_groups(
    model: PreTrainedModel,
    lr: float,
    weight_decay: float = 0.0,
    embedding_lr_factor: float = 1.0,
    head_lr_factor: float | None = None,
    decayed: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an Adam-type optimizer: no decay on vectors, rates of embeddings, SµPar's learning rates.

    For a dense model, `paper`, `preserve` and `pretrained` every group has `lr`, but for embeddings and head. Under
    `supar` a projection's is lr / m (see `fan_in_multipliers`), and parameters that carry a folded factor (final norm,
    queries that have a matrix or norm of their own) have it on their learning rate, too. With a fused
    QKV matrix the queries share its learning rate.

    The factors of embeddings and head leave the product of decay and learning rate as it is: the decay of their
    matrices is divided by the factor. Groups with the rate `lr` come first, so that a log of the first group's rate
    shows it.

    Args:
        model: dense or Sparse-IFT model, compiled or not.
        lr: peak learning rate of the dense base model.
        weight_decay: decoupled decay, of matrices unless `decayed` says otherwise.
        embedding_lr_factor: times the rate of input embeddings and learned positions. A matrix that is both embedding
            and output head counts as an embedding.
        head_lr_factor: times the rate of an output head with weights of its own; None leaves that rate as it is.
        decayed: names of the parameters that have weight decay, such as `Trainer.get_decay_parameter_names(model)`
            gives; None means those with two dimensions or more.

    Returns:
        Groups with `params`, `lr`, `weight_decay`, ready for `torch.optim.AdamW`.

    Raises:
        ValueError: a rate or decay is no finite number of at least 0, a factor no finite number above 0, or
            `head_lr_factor` is given for a model whose head is its embedding, or that has no head.

    Source: SµPar, arXiv 2405.15743, table 1.
    """
    check_number("lr", lr)
    check_number("weight_decay", weight_decay)
    model = pretrained_model(model)  # names in one that is compiled are others
    own_factors = group_factors(model, embedding_lr_factor, head_lr_factor)
    factors = learning_rate_factors(model)
    decayed = None if decayed is None else {plain_name(name) for name in decayed}
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor, folded = factors.get(plain_name(name), (1.0, 1.0))
            folded *= own_factors.get(id(parameter), 1.0)
            has_decay = parameter.ndim >= 2 if decayed is None else plain_name(name) in decayed
            decay = weight_decay / folded if has_decay else 0.0
            groups[lr * factor * folded, decay].append(parameter)
    found = [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
    return sorted(found, key=lambda group: group["lr"] != lr) if own_factors else found


def group_factors(model: PreTrainedModel, embedding_lr_factor: float, head_lr_factor: float | None) -> dict[int, float]:
    """`id` of a parameter of embeddings or head -> factor on its learning rate; empty if both factors change nothing.

    Raises:
        ValueError: see `optimizer_param_groups`.
    """
    check_number("embedding_lr_factor", embedding_lr_factor, above_0=True)
    if head_lr_factor is not None:
        check_number("head_lr_factor", head_lr_factor, above_0=True)
    factors: dict[int, float] = {}
    if embedding_lr_factor != 1:
        factors = {id(parameter): embedding_lr_factor for parameter in embedding_parameters(model)}
    if head_lr_factor is None:
        return factors
    head = head_parameters(model)
    if not head:
        lacks = "no output head" if model.get_output_embeddings() is None else "an output head tied to its embedding"
        raise ValueError(
            f"head_lr_factor={head_lr_factor!r} is given, but {type(model).__name__} has {lacks}; leave head_lr_factor "
            "out (embedding_lr_factor is that of a tied matrix), or untie them with tie_word_embeddings=False"
        )
    if head_lr_factor != 1:
        factors |= {id(parameter): head_lr_factor for parameter in head}
    return factors


def embedding_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights of input embeddings, tied or not, and of learned positions."""
    modules = [
        model.get_input_embeddings(),
        *(module for module in model.modules() if isinstance(module, nn.Embedding)),
    ]
    found = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    return list(found.values())


def head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights of an output head that is not tied to the input embedding, with its bias; else nothing."""
    head = model.get_output_embeddings()
    if head is None:
        return []
    embeddings = {id(parameter) for parameter in embedding_parameters(model)}
    parameters = list(head.parameters())
    return [] if any(id(parameter) in embeddings for parameter in parameters) else parameters


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
    width, head = 1 / logit_multiplier(record, sizes.hidden), math.sqrt(dense.head_dim / sizes.head_dim)
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
