"""Which backend an optimizer needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.training.backends.base import OptimizerBackend
from sparseift_llm.training.backends.torch import TorchBackend, optimizers_in, unwrap_accelerate
from sparseift_llm.training.backends.zero import ZeroBackend, zero_optimizer
from sparseift_llm.training.compatibility import (
    check_model,
    check_optimizer,
    pretrained_model,
    warn_of_learning_rates,
)


def backend_of(optimizer: Any, model: nn.Module, layers: Mapping[str, SparseProjection]) -> OptimizerBackend:
    """The backend for `optimizer`, after checking that it and `model` are supported.

    Args:
        optimizer: what the controller was given.
        model: what the controller was given; its weights are sharded, if at all, and not gathered.
        layers: its sparse layers.

    Raises:
        ValueError: as `ZeroBackend`, `check_model` and `check_optimizer` do.
    """
    zero = zero_optimizer(optimizer)
    if zero is not None:
        backend = ZeroBackend(zero, layers)
        check_model(model, is_zero=True)
        return backend
    outermost = unwrap_accelerate(optimizer)
    check_model(model)
    check_optimizer(outermost, optimizers_in(outermost), model, layers)
    warn_of_learning_rates(outermost, pretrained_model(model))
    return TorchBackend(outermost, layers)
