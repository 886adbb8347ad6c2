"""The mark in config.json by which transformers lets this package swap modules before it reads weights.

A model that no stock class can hold names this package under `quantization_config`, the only hook in transformers that
comes before weights are read (see checkpoints/transformers_hook.py). Nothing is quantised.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from sparseift_llm.record.model_record import ModelRecord

QUANT_METHOD = "sparse_ift"


def is_marked(hf_config: PreTrainedConfig) -> bool:
    """Whether `quantization_config` is there and names this package."""
    values: Any = getattr(hf_config, "quantization_config", None) or {}
    method = values.get("quant_method") if isinstance(values, dict) else getattr(values, "quant_method", None)
    return method == QUANT_METHOD


def mark(hf_config: PreTrainedConfig, record: ModelRecord, packed_by: str | None = None, always: bool = False) -> None:
    """Make `quantization_config` say how the weights are stored; there is none where they are a stock model's.

    Args:
        hf_config: changed in place.
        record: of the model.
        packed_by: only active values of unstructured matrices are stored, in the order of the masks that have this
            digest (see checkpoints/export.py).
        always: also where the weights are a stock model's, so that loading gives sparse layers.
    """
    unmark(hf_config)
    if packed_by is not None:
        hf_config.quantization_config = {"quant_method": QUANT_METHOD, "packed_by": packed_by}
    elif always or record.has_own_layout:
        hf_config.quantization_config = {"quant_method": QUANT_METHOD}


def unmark(hf_config: PreTrainedConfig) -> None:
    """Take this package's `quantization_config` off, in place."""
    if is_marked(hf_config):
        del hf_config.quantization_config
