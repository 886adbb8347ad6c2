"""Norms whose place and formula matter to SµPar: the one before the logits, and the one after the queries.

They are found on the model's modules, not in a list of model types.
"""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseift_llm.models.projections import decoder_layers

_QUERY_NORM = re.compile(r"q(uery)?_(layer)?norm")


def final_norm(model: PreTrainedModel) -> str:
    """Path of the norm before the logits, which is the last one beside the list of decoder layers.

    Raises:
        ValueError: there is no such norm, it has no weight, or a matrix outside the layers may come after it.
    """
    path, layers = decoder_layers(model)
    parent = path.rpartition(".")[0]
    known = {*layers.modules(), model.get_output_embeddings()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module not in known:
            raise ValueError(
                f"init='supar' scales a norm before the logits, but {name} stands there, too; use 'preserve'"
            )
    names = [name for name, child in model.get_submodule(parent).named_children() if is_norm(child)]
    if not names:
        raise ValueError(f"init='supar' needs a norm before the logits, {model.config.model_type} has none here")
    return _with_weight(model, f"{parent}.{names[-1]}")


def query_norm(model: PreTrainedModel, projection: str) -> str | None:
    """Path of the norm that undoes a scale of the projection that makes queries, or None.

    Raises:
        ValueError: it has no weight.
    """
    parent = projection.rpartition(".")[0]
    for name, child in model.get_submodule(parent).named_children():
        if _QUERY_NORM.fullmatch(name) and is_norm(child):
            return _with_weight(model, f"{parent}.{name}")
    return None


@torch.no_grad()
def norm_offset(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies: 0, or 1 (Gemma), found by trying.

    Raises:
        ValueError: neither.
    """
    weights = {name: weight for name, weight in norm.named_parameters() if name.endswith("weight")}
    if any(weight.is_meta for weight in weights.values()):
        return 0.0  # there are no values to scale
    for offset in (0.0, 1.0):
        trial = copy.deepcopy(norm)
        for name, parameter in trial.named_parameters():
            parameter.fill_(-offset if name in weights else 0.0)
        if not _apply(trial).any():
            return offset
    raise ValueError(f"a {type(norm).__name__} multiplies neither by its weight nor by 1 + weight; use init='preserve'")


def _apply(norm: nn.Module) -> Tensor:
    """What the norm gives for some vector; of a module with a norm per head, what the first of them gives."""
    for child in norm.children():
        if isinstance(child, nn.ModuleList):
            norm = child[0]
    weight = next(norm.parameters())
    x = torch.arange(1, weight.numel() + 1, dtype=weight.dtype, device=weight.device)
    output: Tensor = norm(x.view(1, *weight.shape))
    return output


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower()


def _with_weight(model: PreTrainedModel, name: str) -> str:
    if next(model.get_submodule(name).parameters(), None) is None:
        raise ValueError(f"init='supar' has to scale {name}, which has no weight; use init='preserve'")
    return name
