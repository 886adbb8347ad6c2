"""Active weights of queries, keys and values in tiny models whose rows are written down by hand. No tests here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparseift_llm import DSTConfig, SparseIFTConfig, sparsify
from sparseift_llm.layers.base import sparse_layers
from tests.helpers.decoders import decoder

HEAD = 16  # of the models of 75%: 4 heads of 8 become 4 of 16
# model -> changes of its config, and what each run of HEAD rows of its fused matrix is, over and over
FUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({}, "qqqqkkkkvvvv"),
    "gpt_neox": ({}, "qkv"),
    "falcon": ({"new_decoder_architecture": True}, "qqkv"),  # two heads of queries share a key
    "phi3": ({}, "qqqqkkvv"),
}
MODELS = (*FUSED, "llama")  # which has matrices of its own for 4 heads of queries and 2 of keys and values


def sparse_decoder(name: str, algorithm: str = "rigl", **options: Any) -> PreTrainedModel:
    """A Wide twin of 75% whose masks change at every step."""
    dense = decoder(name, **FUSED.get(name, ({}, ""))[0])
    dst = DSTConfig(algorithm, update_every_steps=1, drop_fraction=0.3, stop_fraction=1.0)
    return sparsify(dense, SparseIFTConfig(**{"dst": dst, **options}))


def kind_counts(model: PreTrainedModel) -> Tensor:
    """Active weights of q, k and v of every decoder layer, int64 (layers, 3)."""
    counts = torch.zeros(2, 3, dtype=torch.int64)
    name = model.config.model_type
    for path, layer in sparse_layers(model).items():
        index = int(next(part for part in path.split(".") if part.isdigit()))
        mask = layer.current_mask().T if hasattr(layer, "nf") else layer.current_mask()
        last = path.rpartition(".")[2]
        if name == "llama" and last in ("q_proj", "k_proj", "v_proj"):
            counts[index, "qkv".index(last[0])] += mask.sum()
        elif last in ("c_attn", "query_key_value", "qkv_proj"):
            for place, rows in enumerate(mask.split(HEAD)):
                kind = FUSED[name][1][place % len(FUSED[name][1])]
                counts[index, "qkv".index(kind)] += rows.sum()
    return counts
