"""Tiny random models of every supported architecture, for all tests. No tests stand here."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sparseift_llm import SparseTrainingController
from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.layers.ends import TiedLogits
from sparseift_llm.layers.masked import MaskedProjection

VOCAB = 100
SPLIT_ARCHS = ("opt", "llama", "mistral", "qwen2", "qwen3", "gemma")
FUSED_ARCHS = ("gpt2", "gpt_neox")
ARCHS = (*FUSED_ARCHS, *SPLIT_ARCHS)

_COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
}
_FIELDS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    },
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "pad_token_id": 1,  # OPT counts positions from its padding token
    },
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": None},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "gemma": {**_LLAMA, "head_dim": 16, "num_key_value_heads": 1},
}


def tiny_config(arch: str, **changes: Any) -> PreTrainedConfig:
    """A dense config of two layers, without dropout; `changes` override its fields.

    The llama-likes have grouped-query attention; in Qwen3 and Gemma the head size is set apart from the hidden size.
    """
    return AutoConfig.for_model(arch, **{**_COMMON, **_FIELDS[arch], **changes})


def tiny_model(arch: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A dense model with no parameter at a special value: biases are not 0 and norms not 1."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(arch, **changes), dtype=dtype)
    shake(model)
    return model


@torch.no_grad()
def shake(model: nn.Module, std: float = 0.1) -> None:
    """Add noise to every parameter, so that no bias stays 0 and no norm stays 1; inactive weights stay 0."""
    for module in model.modules():
        if isinstance(module, TiedLogits):  # its weight is the embedding's
            continue
        is_masked = isinstance(module, MaskedProjection)
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn_like(parameter) * std
            parameter.add_(noise * module.mask if is_masked and name == "weight" else noise)


def stored_part(layer: SparseProjection, dense: Tensor) -> Tensor:
    """What the layer keeps of a dense weight's gradient, in its own layout: entries under its mask, or its tiles."""
    if not isinstance(layer, BlockSparseLinear):
        return dense * layer.mask
    matrix, size = dense.T if layer.is_conv1d else dense, layer.block_size
    tiles, num_tiles = [], len(layer.columns)
    for slot, column in enumerate(layer.columns.tolist()):
        row = next(row for row in range(layer.num_rows) if slot < (row + 1) * num_tiles // layer.num_rows)
        tiles.append(matrix[row * size : (row + 1) * size, column * size : (column + 1) * size])
    return torch.stack(tiles)


def token_ids(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Random token ids (B, T)."""
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def trained(
    model: PreTrainedModel, num_steps: int = 3, lr: float = 1e-2
) -> tuple[SparseTrainingController, torch.optim.Optimizer]:
    """The controller, planned for 8 steps, and the optimizer, after `num_steps` steps of AdamW on `token_ids()`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    controller = SparseTrainingController(model, optimizer, total_steps=8)
    for _ in range(num_steps):
        model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return controller, optimizer


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    """Logits (B, T, vocabulary) on `token_ids()`."""
    logits: Tensor = model(input_ids=token_ids(), use_cache=False).logits
    return logits


def gradients_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gradients of the language modelling loss on `token_ids()` by parameter name; `model` is not changed."""
    model = copy.deepcopy(model)
    model.zero_grad(set_to_none=True)
    model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        gradients[name] = parameter.grad
    return gradients
