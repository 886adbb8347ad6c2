"""Helpers of the tests of `init="pretrained"`: the families with a start, and dense models. Not a test module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparseift_llm import SparseIFTConfig, sparsify
from sparseift_llm.config.transform import FamilyRule
from sparseift_llm.planning.planner import plan
from tests.helpers.models import ARCHS, tiny_model

FAMILIES: dict[str, dict[str, Any]] = {
    "parallel": {"family": "parallel", "nonlinearity": "none"},
    "factorized": {"family": "factorized"},
    "factorized, sparse u only": {"family": "factorized", "sparse_u_only": True},
    "doped": {"family": "doped"},
    "wide": {"scope": "ffn"},
    "wide, doped attention": {"scope": "ffn", "rules": (FamilyRule("doped", targets=("q", "k", "v", "o")),)},
}
STORAGES: dict[str, dict[str, Any]] = {
    "unstructured": {},
    "block": {"structure": "block", "block_size": 8},
    "2:4": {"structure": "2:4"},
    "2:4 transposable": {"structure": "2:4", "transposable": True},
}
FFN = {"gpt2": "n_inner", "opt": "ffn_dim"}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_structure = pytest.mark.parametrize("structure", STORAGES)
every_arch = pytest.mark.parametrize("arch", ARCHS)


def dense_model(arch: str = "gpt2", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """With room for tiles of 8 in four branches."""
    hidden = {"gpt2": "n_embd"}.get(arch, "hidden_size")
    sizes = {hidden: 64, FFN.get(arch, "intermediate_size"): 128}
    return tiny_model(arch, dtype, **sizes, **({"word_embed_proj_dim": 64} if arch == "opt" else {}))


def started(dense: PreTrainedModel, family: str, structure: str = "unstructured", **changes: Any) -> PreTrainedModel:
    return sparsify(dense, SparseIFTConfig(init="pretrained", **{**FAMILIES[family], **STORAGES[structure], **changes}))


def matrix_of(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    return (weight.T if isinstance(module, Conv1D) else weight).detach()


def ffn_matrices(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The FFN projections by name."""
    config = SparseIFTConfig(scope="ffn", sparsity=0.0)
    return {layer.name: model.get_submodule(layer.name) for layer in plan(model, config).layers if "mlp" in layer.kind}
