"""What sparse training is refused on, before the first step, with an error that says what to use instead."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel

from sparseift_llm.layers.base import SparseProjection, plain_name
from sparseift_llm.models.wrappers import pretrained_model as pretrained_model
from sparseift_llm.training.learning_rates import embedding_parameters, head_parameters, learning_rate_factors

logger = logging.getLogger(__name__)
DISTRIBUTED = "DistributedDataParallel or FSDP2 (torch.distributed.fsdp.fully_shard)"
NO_ZERO = (
    "of DeepSpeed only ZeRO stages 1 to 3 are supported: give the controller engine and engine.optimizer of a "
    f'"zero_optimization" config; or use {DISTRIBUTED}'
)
_QUANTISING = ("bitsandbytes", "torchao")


def check_model(model: nn.Module, is_zero: bool = False) -> None:
    """Refuse wrappers and adapters that mask updates would not reach.

    Args:
        model: what the controller is given.
        is_zero: whether the optimizer is DeepSpeed ZeRO's.

    Raises:
        ValueError: DeepSpeed without ZeRO, FSDP1, DataParallel, or PEFT adapters.
    """
    for module in model.modules():
        package = type(module).__module__.partition(".")[0]
        if package == "deepspeed" and not is_zero:
            raise ValueError(NO_ZERO)
        if package == "peft":
            raise ValueError(
                "PEFT adapters on a Sparse-IFT model are not supported: merging them would fill in the zeros. Adapt "
                "to_dense(model) instead, or fine-tune the sparse model itself"
            )
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(f"FSDP1 (FullyShardedDataParallel) flattens weights; use {DISTRIBUTED}")
        if isinstance(module, DataParallel):
            raise ValueError(f"torch.nn.DataParallel is not supported: start one process per GPU and use {DISTRIBUTED}")


def check_optimizer(
    optimizer: Any, optimizers: Sequence[Any], model: nn.Module, layers: Mapping[str, SparseProjection]
) -> None:
    """Refuse optimizers whose steps or state cannot be reached, and weights that they do not own.

    Args:
        optimizer: the outermost one.
        optimizers: it, and those inside it.
        model: what the controller was given.
        layers: its sparse layers.

    Raises:
        ValueError: neither a torch optimizer nor a wrapper of one, a quantised or paged one, sharding other than
            FSDP2's, a sparse weight that takes gradients but is not in the optimizer, or no sparse weight that takes
            gradients.
    """
    for found in optimizers:
        _check_package(found)
    is_wrapper = len(optimizers) > 1 and all(hasattr(optimizer, name) for name in ("step", "state", "param_groups"))
    if not isinstance(optimizer, Optimizer) and not is_wrapper:
        raise ValueError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer, so it cannot be followed")
    if all(layer.is_frozen for layer in layers.values()):
        raise ValueError(
            "all sparse weights are frozen (requires_grad=False), so no mask can change; unfreeze some, or train "
            "without the callback or controller"
        )
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    is_sharded_by_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    for name, layer in layers.items():
        if isinstance(layer.weight, DTensor):
            _check_sharding(name, layer.weight, is_sharded_by_fsdp)
        if id(layer.weight) not in owned and not layer.is_frozen:
            dense = "the projection dense with SparseIFTConfig(exclude=...)"
            if layer.role != "projection":
                dense = "embedding and logits dense with embedding='dense', or freeze them with requires_grad_(False)"
            raise ValueError(
                f"{name}.weight is not in the optimizer; create the optimizer after sparsify (and after fully_shard), "
                f"from model.parameters(), or leave {dense}"
            )


def _check_package(optimizer: Any) -> None:
    package = type(optimizer).__module__.partition(".")[0]
    if package == "deepspeed":
        raise ValueError(NO_ZERO)
    if package in _QUANTISING:
        raise ValueError(
            f"{type(optimizer).__name__} of {package} (8-bit or paged state) is not supported: state of single weights "
            "cannot be reset there; use torch.optim.AdamW or another optimizer with floating-point state"
        )


def warn_of_learning_rates(optimizer: Any, model: PreTrainedModel) -> None:
    """Log a warning unless, under `init="supar"`, learning rates are in the proportions that it asks for.

    Embeddings and the output head are left out, because their rates may have factors of the user's choice.
    """
    if not (factors := learning_rate_factors(model)):
        return
    rates = {
        id(parameter): float(group.get("initial_lr", group["lr"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    free = {id(parameter) for parameter in (*embedding_parameters(model), *head_parameters(model))}
    base_rates = [
        rates[id(parameter)] / math.prod(factors.get(plain_name(name), (1.0, 1.0)))
        for name, parameter in model.named_parameters()
        if id(parameter) in rates and id(parameter) not in free
    ]
    if base_rates and max(base_rates) > 1.01 * min(base_rates):
        logger.warning(
            "init='supar' has a learning rate of its own for every width and sparsity, and the optimizer's are others: "
            "build it with optimizer_param_groups(model, lr)"
        )


def _check_sharding(name: str, weight: DTensor, is_sharded_by_fsdp: bool) -> None:
    kinds = {type(placement) for placement in weight.placements}
    if not is_sharded_by_fsdp or not kinds <= {Shard, Replicate}:
        raise ValueError(
            f"{name}: weights sharded as {weight.placements} (tensor parallelism) are not supported; use {DISTRIBUTED}"
        )
