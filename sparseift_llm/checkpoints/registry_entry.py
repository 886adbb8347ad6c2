"""The entry of this package in transformers' registry of quantizers. Importing this file makes the entry.

The file is imported while transformers imports its own modules, before `PreTrainedModel` exists (see registration.py).
So it uses only modules of transformers that are complete by then. The loader itself is imported when a model needs it.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparseift_llm.record.quantization_mark import QUANT_METHOD


@register_quantization_config(QUANT_METHOD)
class LayoutConfig(QuantizationConfigMixin):
    """What `quantization_config` in config.json says; the transformation itself stands under `sparse_ift`.

    Args:
        quant_method: `sparse_ift`.
        packed_by: see `quantization_mark.mark`.

    Raises:
        ValueError: there is another field, so the folder was written by a later version.
    """

    def __init__(self, quant_method: str = QUANT_METHOD, packed_by: str | None = None, **unknown: Any) -> None:
        if unknown:
            raise ValueError(
                f"quantization_config in config.json has {sorted(unknown)}, which this version of sparseift_llm does "
                "not know; load the model with the version that saved it"
            )
        self.quant_method: Any = quant_method
        self.packed_by = packed_by


@register_quantizer(QUANT_METHOD)
class LayoutLoaderOnDemand(HfQuantizer):
    """Constructs a `LayoutLoader`, whose module is imported at that moment."""

    def __new__(cls, *args: Any, **kwargs: Any) -> HfQuantizer:  # type: ignore[misc]  # not an instance of cls
        from sparseift_llm.checkpoints.transformers_hook import LayoutLoader

        return LayoutLoader(*args, **kwargs)
