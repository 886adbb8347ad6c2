"""What a dense model has that its config does not say: modules, settings and ties that were changed by hand.

A sparse twin is built from a config, so whatever was changed on the model itself would be gone. Each model is therefore
compared with the one that its config builds. What can be taken over is listed here, and put on the twin by
conversion/carry_over.py. The rest is refused by name.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparseift_llm.models.architectures import build_model

_PLAIN = (bool, int, float, str, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LIBRARIES = ("torch", "transformers", "accelerate", "sparseift_llm")  # whose hooks come back by themselves
_BY_ACCELERATE = {"_hf_hook", "_original_forward"}  # where it has replaced `forward`, to move or to cast tensors
_SHOWN = 3  # faults in one message


@dataclass(frozen=True)
class Changes:
    """What was changed on a model, as far as it can be put on another one.

    Args:
        stock: the model that the config builds, on the meta device.
        modules: path -> a module without weights that stands there instead of the config's, e.g. an activation.
        settings: path of a module -> name of an attribute -> value, where it is another than the config's.
        buffers: names of buffers that hold other values than the config's.
        stock_buffers: name -> what the config's buffers hold.
    """

    stock: PreTrainedModel
    modules: Mapping[str, nn.Module]
    settings: Mapping[str, Mapping[str, Any]]
    buffers: Sequence[str]
    stock_buffers: Mapping[str, Tensor]


def config_of(model: PreTrainedModel) -> PreTrainedConfig:
    """The config that describes a model, whose embeddings may have been tied or untied by hand; never changed itself.

    A model of another class than the causal language model of its type has its own config.
    """
    config = model.config
    if type(stock := build_model(config, meta=True)) is not type(model) or _ties(stock) == _ties(model):
        return config
    other = copy.deepcopy(config)
    other.tie_word_embeddings = not config.tie_word_embeddings
    return other if _ties(build_model(other, meta=True)) == _ties(model) else config


def changes_of(model: PreTrainedModel) -> Changes:
    """What `model` has beyond `config_of(model)`.

    Raises:
        ValueError: parameters, modules with weights, methods or hooks that no other model could take over, by name.
    """
    stock = build_model(config_of(model), meta=True)
    faults = [*_faults_of_parameters(model, stock), *_hooks(model)]
    modules: dict[str, nn.Module] = {}
    settings: dict[str, dict[str, Any]] = {}
    own, expected = _modules(model), _modules(stock)
    for path, module in own.items():
        if any(path.startswith(f"{above}.") for above in modules):
            continue
        other = expected.get(path)
        if type(other) is type(module):
            found, methods = _settings(module, other)
            settings |= {path: found} if found else {}
            faults += [f"{_at(path, name)} was replaced" for name in methods]
        elif next(module.parameters(), None) is None and (other is None or next(other.parameters(), None) is None):
            modules[path] = module
        else:
            stands = "nothing" if other is None else f"a {type(other).__name__}"
            faults.append(f"{path} is a {type(module).__name__} where its config has {stands}")
    faults += [f"{path} was taken out" for path in expected.keys() - own.keys() if not _is_below(path, modules)]
    if getattr(model, "_compiled_call_impl", None) is not None:
        faults.append("it was compiled in place")
    if faults:
        more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError(
            f"a sparse twin is built from the config, and what was changed on this {type(model).__name__} itself would "
            f"be lost: {'; '.join(faults[:_SHOWN])}{more}. Sparsify the model as its config describes it, and change "
            "the result"
        )
    with init_empty_weights():  # of parameters alone
        stock_buffers = dict(build_model(stock.config).named_buffers())
    buffers = [name for name, value in model.named_buffers() if _is_another(value, stock_buffers.get(name))]
    return Changes(stock, modules, settings, buffers, stock_buffers)


def _is_another(buffer: Tensor, stock: Tensor | None) -> bool:
    """Whether a buffer was changed, and not only computed on another device, or cast with the model."""
    if stock is None or buffer.is_meta or buffer.dtype != stock.dtype:
        return False
    return buffer.shape != stock.shape or not torch.allclose(buffer.double().cpu(), stock.double(), rtol=1e-5, atol=0)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))  # one activation may stand in several places


def _ties(model: nn.Module) -> set[frozenset[str]]:
    """The names of every parameter that has more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def _faults_of_parameters(model: PreTrainedModel, stock: PreTrainedModel) -> Iterator[str]:
    own = dict(model.named_parameters(remove_duplicate=False))
    expected = dict(stock.named_parameters(remove_duplicate=False))
    yield from (f"it has no parameter {name}" for name in expected if name not in own)
    for name, parameter in own.items():
        if name not in expected:
            yield f"the parameter {name} is not of its config"
        elif parameter.shape != expected[name].shape:
            sides, others = (" x ".join(map(str, value.shape)) for value in (parameter, expected[name]))
            yield f"{name} is {sides}, by its config {others}"
        elif parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            yield f"{name} has a hook"
    if own.keys() == expected.keys() and _ties(model) != _ties(stock):
        group = min(_ties(model) ^ _ties(stock), key=sorted)
        yield f"{' and '.join(sorted(group))} share weights, or do not, unlike by any config"


def _hooks(model: nn.Module) -> Iterator[str]:
    """Hooks of the user's own, which may hold on to this very model."""
    for path, module in _modules(model).items():
        hooks = [hook for kind in _HOOKS for hook in getattr(module, kind).values()]
        for hook in hooks:
            function = getattr(hook, "func", hook)  # of a partial
            if (getattr(function, "__module__", None) or "").partition(".")[0] not in _LIBRARIES:
                yield f"{path or 'the model'} has a hook ({getattr(function, '__qualname__', function)})"


def _settings(module: nn.Module, stock: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """Attributes of a module that are not those of the config's, and the names of methods that were replaced."""
    found, methods = {}, []
    own, expected = vars(module), vars(stock)
    for name, value in own.items():
        if name == "training" or (name.startswith("_") and name != "_loss_function"):
            continue
        if _is_plain(value) and name in expected and _is_plain(expected[name]) and value != expected[name]:
            found[name] = value
        elif _is_function(value) and name in expected and _is_function(expected[name]):
            found |= {name: value} if _identity(value) != _identity(expected[name]) else {}
        elif name == "_loss_function":
            found[name] = value
        elif callable(value) and name not in expected and hasattr(type(module), name):
            methods += [] if own.keys() & _BY_ACCELERATE else [name]
    return found, methods


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, list | tuple) and all(map(_is_plain, value)))


def _is_function(value: Any) -> bool:
    return isinstance(value, types.FunctionType | types.BuiltinFunctionType)


def _identity(function: Any) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_below(path: str, modules: Mapping[str, nn.Module]) -> bool:
    return any(path.startswith(f"{above}.") for above in modules)
