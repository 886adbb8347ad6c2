"""Whether a saved model is a stock one, and what its config.json says if not.

A model of own layout has parameters that no stock class has. Its config names this package under
`quantization_config`, transformers' only hook that may swap modules before weights are read (see loading.py).
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from sparseift_llm.config.transform import SparseIFTConfig

QUANT_METHOD = "sparse_ift"


def has_own_layout(config: SparseIFTConfig) -> bool:
    """Whether models of this transformation have parameters of their own: all but unstructured Wide ones."""
    return (
        config.structure == "block" or config.family != "wide" or any(rule.family != "dense" for rule in config.rules)
    )


def is_marked(hf_config: PreTrainedConfig) -> bool:
    """Whether `quantization_config` is there and names this package."""
    values: Any = getattr(hf_config, "quantization_config", None) or {}
    method = values.get("quant_method") if isinstance(values, dict) else getattr(values, "quant_method", None)
    return method == QUANT_METHOD


def mark(
    hf_config: PreTrainedConfig, config: SparseIFTConfig, packed_by: str | None = None, always: bool = False
) -> None:
    """Make `quantization_config` say how the weights are stored; there is none where they are a stock model's.

    Args:
        hf_config: changed in place.
        config: the transformation.
        packed_by: only active values of unstructured matrices are stored, in the order of the masks that have this
            digest (see export.py).
        always: also where they are a stock model's, so that loading it gives sparse layers.
    """
    unmark(hf_config)
    if packed_by is not None:
        hf_config.quantization_config = {"quant_method": QUANT_METHOD, "packed_by": packed_by}
    elif always or has_own_layout(config):
        hf_config.quantization_config = {"quant_method": QUANT_METHOD}


def unmark(hf_config: PreTrainedConfig) -> None:
    """Take this package's `quantization_config` off, in place."""
    if is_marked(hf_config):
        del hf_config.quantization_config


def missing_layers(hf_config: PreTrainedConfig | None) -> str:
    """What to say of a model without sparse layers."""
    if getattr(hf_config, "sparse_ift", None):
        return "the Sparse-IFT model was loaded without its masks: load it with sparseift_llm.load_pretrained(folder)"
    return "the model has no sparse layers: call sparsify(model, config) first"
