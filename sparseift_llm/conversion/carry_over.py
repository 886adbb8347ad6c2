"""Puts on a fresh twin what the dense model had beyond its config, as models/beyond_config.py finds it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from sparseift_llm.models.beyond_config import Changes

_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


@torch.no_grad()
def carry_over(model: PreTrainedModel, changes: Changes, twin: PreTrainedModel) -> None:
    """Take over what stands on modules that no sparse layer replaces, in place, before there are any.

    These are modules without weights, settings such as a rate of dropout, dtypes of single parameters, whether they are
    trained, and buffers that were changed.

    Args:
        model: the dense model; it is not changed.
        changes: of `model`.
        twin: a stock model, perhaps of other widths.

    Raises:
        ValueError: a module, a setting or a buffer was changed that depends on the widths, which the twin has not.
    """
    memo: dict[int, Any] = {}  # what was shared stays shared
    has_other_widths = any(twin.get_parameter(name).shape != own.shape for name, own in model.named_parameters())
    for path, module in changes.modules.items():
        if has_other_widths and any(buffer.ndim > 0 for buffer in module.buffers()):
            raise ValueError(_depends_on_widths(path, f"a {type(module).__name__} with tensors of its own"))
        parent, _, name = path.rpartition(".")
        twin.get_submodule(parent).add_module(name, copy.deepcopy(module, memo))
    for path, settings in changes.settings.items():
        place, stock = twin.get_submodule(path), changes.stock.get_submodule(path)
        for name, value in settings.items():
            if getattr(place, name, None) != getattr(stock, name, None) and name != "_loss_function":
                raise ValueError(_depends_on_widths(f"{path}.{name}", repr(value)))
            setattr(place, name, copy.copy(value))
    for name, parameter in twin.named_parameters():
        source = model.get_parameter(name)
        parameter.data = parameter.data.to(source.dtype)
        parameter.requires_grad_(source.requires_grad)
    for name in changes.buffers:
        buffer, stock_buffer = twin.get_buffer(name), changes.stock_buffers[name]
        if buffer.shape != stock_buffer.shape or not torch.allclose(buffer.cpu(), stock_buffer, rtol=1e-5, atol=0):
            raise ValueError(_depends_on_widths(name, "a tensor"))
        buffer.copy_(model.get_buffer(name))


def _depends_on_widths(name: str, value: str) -> str:
    return (
        f"{name} was changed by hand to {value}, and depends on the widths of the model, which are others in its twin; "
        "sparsify the model as its config describes it, and change the result"
    )


def carry_over_modes(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """Take over how the modules are run, in place: training or not, activation checkpointing, inputs with gradients."""
    twin.generation_config = copy.deepcopy(model.generation_config)
    twin.train(model.training)
    for path, module in model.named_modules():
        place = twin.get_submodule(path)
        if place.training != module.training:
            place.train(module.training)
        if hasattr(module, _CHECKPOINTING[0]):
            for name in _CHECKPOINTING:
                if name in vars(module):
                    setattr(place, name, getattr(module, name))
    if getattr(model, "_require_grads_hooks", None):
        twin.enable_input_require_grads()
