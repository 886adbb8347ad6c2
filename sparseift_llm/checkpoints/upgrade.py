"""Format 2 of a record in format 1: the only place where the plan of a saved model is worked out again.

Format 1, which versions up to 0.1.0 wrote, holds the options of the transformation and the dense sizes. Sizes and
active counts followed from them by the formulas of the planner. The upgrade uses today's formulas; that they still give
what was saved is proved by the checkpoints in tests/compat/fixtures. If a formula has to change, the old one must be
kept here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from sparseift_llm.config.as_begun import as_begun
from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.models.architectures import sizes_of, with_sizes
from sparseift_llm.planning.planner import plan_of_dense
from sparseift_llm.record.fields import damaged, is_integer
from sparseift_llm.record.model_record import RECORD_KEY, DenseSizes, ModelRecord
from sparseift_llm.record.quantization_mark import unmark


def upgraded(values: Mapping[str, Any], hf_config: PreTrainedConfig) -> ModelRecord:
    """The record that format 2 would hold for a model saved in format 1. Nothing is changed.

    Args:
        values: what stands under `sparse_ift`.
        hf_config: the model's config, `sparse_ift` included. Its vocabulary may have been resized since.

    Raises:
        ValueError: `values` is damaged, or stands for other widths than those of `hf_config`.
    """
    options = dict(values)
    if "dense_sizes" not in options:
        raise damaged(RECORD_KEY, "has neither a format, as later versions write it, nor dense_sizes, as older ones do")
    widths, vocab_size = options.pop("dense_sizes"), options.pop("dense_vocab_size", None)
    valid = isinstance(widths, dict) and widths.keys() == {"hidden", "ffn", "head_dim"}
    if not valid or not all(is_integer(size, 1) for size in widths.values()):
        raise damaged(f"{RECORD_KEY}.dense_sizes", f"is {widths!r}")
    if vocab_size is None:  # the oldest folders: it can only be the one that the config has
        vocab_size = sizes_of(hf_config).vocab
    if not is_integer(vocab_size, 1):
        raise damaged(f"{RECORD_KEY}.dense_vocab_size", f"is {vocab_size!r}")
    dense_model = DenseSizes(widths["hidden"], widths["ffn"], widths["head_dim"], vocab_size)
    config = SparseIFTConfig.from_dict(as_begun(options))
    try:
        plan = plan_of_dense(dense_config_of(hf_config, dense_model), config, vocab_size=vocab_size)
    except ValueError:
        raise
    except Exception as error:  # transformers and torch refuse sizes with exceptions of their own
        raise ValueError(
            f"the config with the sparse_ift record describes no model that can be built: {error}"
        ) from error
    expected, found = sizes_of(plan.hf_config), sizes_of(hf_config)
    if expected != found:
        raise ValueError(
            f"the sparse_ift record in the config of {hf_config.name_or_path or 'the model'} is damaged: it stands for "
            f"{expected}, but the config has {found}"
        )
    return plan.record


def dense_config_of(hf_config: PreTrainedConfig, dense_model: DenseSizes) -> PreTrainedConfig:
    """The stock config of the dense model that a Sparse-IFT model was made of, with the vocabulary that it has now."""
    config = with_sizes(hf_config, dense_model.hidden, dense_model.ffn, dense_model.head_dim)
    delattr(config, RECORD_KEY)
    unmark(config)
    return config
