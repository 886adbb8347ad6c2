"""`read_record`: the record of a Sparse-IFT model from its config, whatever version of this package wrote it."""

from __future__ import annotations

from transformers import PreTrainedConfig

from sparseift_llm.checkpoints.upgrade import upgraded
from sparseift_llm.record.model_record import RECORD_KEY, ModelRecord


def read_record(hf_config: PreTrainedConfig) -> ModelRecord:
    """The record in a transformers config; the config is not changed.

    A record of format 1 is upgraded, which builds two models on the meta device. One of format 2 is only parsed.

    Raises:
        ValueError: there is none, or it is damaged or of a later version.
    """
    values = getattr(hf_config, RECORD_KEY, None)
    if not values:
        raise ValueError(
            "the model is not a Sparse-IFT model (no sparse_ift record in its config): call sparsify first"
        )
    if isinstance(values, dict) and "format" not in values:
        return upgraded(values, hf_config)
    return ModelRecord.from_dict(values)


def write_record(hf_config: PreTrainedConfig, record: ModelRecord) -> None:
    """Let a config carry `record`, in the format of this version, in place."""
    setattr(hf_config, RECORD_KEY, record.to_dict())
