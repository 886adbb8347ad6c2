"""Size and FLOPs of a model that exists, dense or sparse: `cost_of` and `count_flops`.

What a transformation would cost before it is built is in planner.py; the formulas are in isoflop.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from sparseift_llm import isoflop
from sparseift_llm.layers.base import SparseProjection, sparse_layers
from sparseift_llm.layers.block_embedding import TiedBlockLogits
from sparseift_llm.layers.ends import TiedLogits
from sparseift_llm.layers.masked import MaskedProjection
from sparseift_llm.models.architectures import build_model, sizes_of
from sparseift_llm.models.projections import Projection, attention_widths, find_projections


@dataclass(frozen=True)
class ModelCost:
    """Size and FLOPs of one model at one sequence length.

    Args:
        linear_active_params: active weights of the decoder's projections.
        linear_params: weights of these projections, zeros included.
        stored_params: parameters in memory, zeros included, tied ones once.
        flops: forward FLOPs per token.
        topology_bytes: bytes of masks, or of tile indices.
        masked_zeros: zeros that products go through: those under the masks of projections and of the output head. Zeros
            outside of tiles are not among them.
    """

    linear_active_params: int
    linear_params: int
    stored_params: int
    flops: isoflop.FlopCount
    topology_bytes: int = 0
    masked_zeros: int = 0

    def to_dict(self) -> dict[str, int]:
        """The fields printed by `sparseift plan --json`."""
        return {
            "linear_active_params": self.linear_active_params,
            "stored_params": self.stored_params,
            "linear_flops_per_token": self.flops.linear,
            "attention_flops_per_token": self.flops.attention,
            "logit_flops_per_token": self.flops.logit,
            "forward_flops_per_token": self.flops.forward,
            "train_state_bytes": isoflop.train_state_bytes(self.stored_params, self.topology_bytes),
        }


def cost_of(model: PreTrainedModel | PreTrainedConfig, seq_len: int) -> ModelCost:
    """Size and FLOPs of a dense or Sparse-IFT model, from the masks as they are now.

    Args:
        model: a causal language model, or the config of a dense one.
        seq_len: tokens per sequence; attention is counted in full, not causal.

    Raises:
        ValueError: the architecture is not supported.
    """
    if isinstance(model, PreTrainedConfig):
        model = build_model(model, meta=True)
    layers, head = sparse_layers(model).values(), sparse_head(model)
    zeros = {layer: layer.num_weights - layer.count_active() for layer in layers if layer.role == "projection"}
    projections = find_projections(model)
    total = sum(projection.num_weights for projection in projections)
    num_active = total - sum(zeros.values())
    num_logit_weights = None
    if head is not None:
        num_logit_weights = head.count_active()
        zeros[head] = head.num_weights - num_logit_weights
    return ModelCost(
        num_active,
        total,
        model.num_parameters(),
        model_flops(model, projections, num_active, seq_len, num_logit_weights=num_logit_weights),
        topology_bytes=sum(layer.topology_bytes for layer in layers),
        masked_zeros=sum(number for layer, number in zeros.items() if isinstance(layer, MaskedProjection)),
    )


def count_flops(model: PreTrainedModel | PreTrainedConfig, seq_len: int) -> isoflop.FlopCount:
    """Forward FLOPs per token of a dense or Sparse-IFT model; arguments and errors as `cost_of`."""
    return cost_of(model, seq_len).flops


def sparse_head(model: PreTrainedModel) -> SparseProjection | None:
    """The sparse layer whose matrix makes the logits, which is the embedding's where they are tied; None if dense."""
    head = model.get_output_embeddings()
    layer = head.owner if isinstance(head, TiedLogits | TiedBlockLogits) else head
    return layer if isinstance(layer, SparseProjection) else None


def model_flops(
    model: PreTrainedModel,
    projections: Sequence[Projection],
    num_active: int,
    seq_len: int,
    vocab_size: int | None = None,
    num_logit_weights: int | None = None,
) -> isoflop.FlopCount:
    """Forward FLOPs per token of a model with `num_active` active weights in its projections.

    Args:
        model: gives hidden size and vocabulary.
        projections: of the model.
        num_active: their active weights.
        seq_len: tokens per sequence.
        vocab_size: stands in for that of the model's config.
        num_logit_weights: active weights of the output head; None if it is dense.
    """
    sizes = sizes_of(model.config)
    widths = attention_widths(projections)  # of queries and of values; layers may differ
    flops = isoflop.forward_flops(num_active, seq_len, sum(widths) // 2, 1, sizes.hidden, vocab_size or sizes.vocab)
    if num_logit_weights is None:
        return flops
    return dataclasses.replace(flops, logit=isoflop.linear_flops(num_logit_weights))
