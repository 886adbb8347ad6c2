"""What a model keeps in memory per token: keys and values while it generates, and values for the backward pass.

Counted on the meta device from what autograd saves, so that no formula has to know the architecture.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from sparseift_llm.models.architectures import build_model, num_kv_heads, sizes_of, with_sizes
from sparseift_llm.planning.planner import Plan

_NUM_TOKENS = (2, 3)  # few, so that matrices of tokens times tokens, which fused attention does not keep, weigh little


@dataclass(frozen=True)
class TokenMemory:
    """Values (not bytes) that a stock model keeps for every token.

    Args:
        kv_cache: keys and values of all layers, while it generates.
        activations: what one forward pass up to the logits keeps for the backward pass. Masks change nothing about it.
            With tiles it is less: an FFN computed as one operator (`BlockFeedForward`) computes its activation again.
            Matrices of tokens times tokens are left out.
    """

    kv_cache: int
    activations: int


def memory_of_plan(plan: Plan) -> dict[str, dict[str, int]]:
    """`token_memory` of both models of a plan that changes widths alone, ready for JSON: `dense` and `sparse`."""
    before = plan.dense_model
    dense = with_sizes(plan.hf_config, before.hidden, before.ffn, before.head_dim)
    return {"dense": asdict(token_memory(dense)), "sparse": asdict(token_memory(plan.hf_config))}


def token_memory(hf_config: PreTrainedConfig) -> TokenMemory:
    """What a model with this config keeps per token.

    Raises:
        ValueError: the architecture is not supported.
    """
    sizes = sizes_of(hf_config)
    model = build_model(hf_config, meta=True).train()
    fewer, more = (_saved_values(model, number) for number in _NUM_TOKENS)  # the difference is without what all share
    kv_cache = 2 * num_kv_heads(hf_config) * sizes.head_dim * sizes.num_layers
    return TokenMemory(kv_cache, (more - fewer) // (_NUM_TOKENS[1] - _NUM_TOKENS[0]))


def _saved_values(model: PreTrainedModel, num_tokens: int) -> int:
    """Floats that autograd keeps of a forward pass on the meta device, parameters left out."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in parameters and tensor.is_floating_point():
            saved[key] = tensor
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens, mask = torch.zeros(1, num_tokens, dtype=torch.long), torch.zeros(1, 1, num_tokens, num_tokens)
        model(input_ids=tokens, attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in saved.values())
