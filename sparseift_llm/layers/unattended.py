"""Notices, when an optimizer steps, that it trains a Sparse-IFT model whose masks nobody looks after.

Two such cases exist. Masks that a config wants updated stay as they are, because no controller (no callback) was
created: a warning. Or an unstructured Wide model was loaded as the stock model that its folder also is, without masks,
so that training would fill in its zeros: an error. The first is known from models that get sparse layers, see `watch`.
For the second nothing of this package takes part in loading, so a hook on the registration of submodules, which
torch calls while any model is built, remembers models whose config has a `sparse_ift` record.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sparseift_llm.layers.base import SparseProjection, sparse_layers
from sparseift_llm.record.model_record import RECORD_KEY, ModelRecord, transformation_values

logger = logging.getLogger(__name__)
_sparse_models: WeakSet[nn.Module] = WeakSet()
_recorded_models: WeakSet[nn.Module] = WeakSet()
_attended: WeakSet[SparseProjection] = WeakSet()
_seen: WeakKeyDictionary[Optimizer, frozenset[int]] = WeakKeyDictionary()  # what it trained when it was looked at


def watch(model: nn.Module) -> None:
    """From now on a warning is due if `model`, which has sparse layers, is trained without a controller."""
    _sparse_models.add(model)


def attend(layers: Iterable[SparseProjection]) -> None:
    """A controller looks after these layers."""
    _attended.update(layers)


def leave(layers: Iterable[SparseProjection]) -> None:
    """A controller no longer looks after these layers. Whoever trains them next with a new optimizer needs another."""
    _attended.difference_update(layers)


def is_attended(layers: Iterable[SparseProjection]) -> bool:
    """Whether a controller looks after any of these layers."""
    return any(layer in _attended for layer in layers)


def _remember(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if _record(parent):
        _recorded_models.add(parent)


def _record(model: nn.Module) -> Mapping[str, Any]:
    return transformation_values(getattr(vars(model).get("config"), "sparse_ift", None))


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    """Look at an optimizer when it steps first, and when it trains other parameters than before (unfrozen, or added).

    Nothing is looked at in a compiled step.

    Raises:
        ValueError: it trains a model that lost its masks.
    """
    if torch.compiler.is_compiling() or not (_sparse_models or _recorded_models):
        return
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    owned = frozenset(id(parameter) for parameter in parameters if parameter.requires_grad)
    before = _seen.get(optimizer)
    if owned == before:
        return
    for model in list(_sparse_models):
        _warn_of_fixed_masks(model, owned - (before or frozenset()))
    for model in list(_recorded_models):
        _check_masks_are_there(model, owned)
    _seen[optimizer] = owned  # not before: an error that is caught comes again


def _warn_of_fixed_masks(model: nn.Module, owned: frozenset[int]) -> None:
    algorithm = _record(model).get("dst", {}).get("algorithm", "static")
    if algorithm == "static":
        return
    trained = [layer for layer in sparse_layers(model).values() if id(layer.weight) in owned and not layer.is_frozen]
    if trained and not any(layer in _attended for layer in trained):
        logger.warning(
            "a Sparse-IFT model with algorithm=%r is trained, but its masks will stay as they are, because no "
            "SparseTrainingController follows the optimizer (in a Trainer: pass callbacks=[SparseTrainingCallback()]); "
            "if that is meant, use algorithm='static'", algorithm
        )  # fmt: skip


def _check_masks_are_there(model: nn.Module, owned: frozenset[int]) -> None:
    if not _record(model) or any(isinstance(module, SparseProjection) for module in model.modules()):
        return
    sparse = _recorded_as_sparse(model)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2 or id(weight) not in owned or not weight.requires_grad:
            continue
        if sparse is None:
            is_sparse = not isinstance(module, nn.Embedding)
        else:  # the model may be a part of the recorded one, such as the decoder without its head
            is_sparse = any(whole == name or whole.endswith(f".{name}") for whole in sparse)
        if is_sparse and float((weight == 0).float().mean()) > _record(model).get("sparsity", 0.0) / 2 > 0:
            raise ValueError(
                f"{name}.weight holds the zeros of a Sparse-IFT model, but the model was loaded without its masks, so "
                "training would fill them in: load it with sparseift_llm.load_pretrained(folder); to train it as a "
                "dense model, del model.config.sparse_ift first"
            )


def _recorded_as_sparse(model: nn.Module) -> set[str] | None:
    """Module paths of the matrices with zeros, in the whole recorded model; None if its record, of format 1, has none.

    Other matrices may have zeros by right: those of channels that a start from a trained model has added.
    """
    values = getattr(vars(model).get("config"), RECORD_KEY)
    if "format" not in values:
        return None
    layers = ModelRecord.from_dict(values).layers
    owners = {layer.name for layer in layers if layer.is_sparse}
    return owners | {layer.name for layer in layers if layer.tied_to in owners}


register_module_module_registration_hook(_remember)
register_optimizer_step_pre_hook(_before_step)
