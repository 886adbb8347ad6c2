"""Tiny models with a wider residual stream, for the tests of Wide with scope `residual`. No tests stand here."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from sparseift_llm import DSTConfig, SparseIFTConfig, sparsify
from sparseift_llm.config.families import Wide
from tests.helpers.models import shake, tiny_model

STORAGES: dict[str, dict[str, Any]] = {
    "masks": {},
    "tiles": {"structure": "block", "block_size": 8},
    "mixed": {"structure": "block", "block_size": 8, "embedding": "unstructured"},
}


def residual(sparsity: float = 0.75, algorithm: str = "static", **options: Any) -> SparseIFTConfig:
    family = {key: options.pop(key) for key in ("embedding", "embedding_updates") if key in options}
    dst = DSTConfig(algorithm, update_every_steps=options.pop("every", 1))
    return SparseIFTConfig(family=Wide("residual", **family), sparsity=sparsity, dst=dst, **options)


def residual_model(arch: str = "llama", tied: bool = True, **options: Any) -> PreTrainedModel:
    """The twin of a tiny float64 model, no parameter of which is at a special value."""
    model = sparsify(tiny_model(arch, tie_word_embeddings=tied), residual(**options))
    shake(model)
    return model.eval()
