"""Records of format 1, which versions up to 0.1.0 wrote: what they stand for, and which damage is named."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from transformers import PreTrainedConfig

from sparseift_llm import SparseIFTConfig
from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.checkpoints.upgrade import dense_config_of
from sparseift_llm.models.architectures import sizes_of
from sparseift_llm.planning.cost import cost_of
from tests.helpers.planned_models import SEQ_LEN, TINY, every_architecture, every_scope, planned


def with_record(name: str, **options: Any) -> PreTrainedConfig:
    """The config of a saved model with a record as version 0.1.0 wrote it."""
    result, sizes = planned(name, **options), sizes_of(TINY[name])
    config = type(result.hf_config).from_dict(result.hf_config.to_dict())
    widths = {"hidden": sizes.hidden, "ffn": sizes.ffn, "head_dim": sizes.head_dim}
    config.sparse_ift = json.loads(
        json.dumps({**result.config.to_dict(), "dense_sizes": widths, "dense_vocab_size": sizes.vocab})
    )
    return config


@every_scope
@every_architecture
def test_the_plan_is_worked_out_again(name: str, scope: str) -> None:
    options: dict[str, Any] = {"scope": scope, "sparsity": 0.6, "distribution": "erk"}
    config = with_record(name, **options)
    before = copy.deepcopy(config.to_dict())
    assert read_record(config) == planned(name, **options).record
    assert config.to_dict() == before


def test_a_vocabulary_resized_since_changes_costs_not_weights() -> None:
    config = with_record("gpt2", sparsity=0.5, accounting="whole_model", seq_len=SEQ_LEN)
    vocab_size = config.vocab_size
    before = read_record(config)
    dense_before = cost_of(dense_config_of(config, before.dense_model), SEQ_LEN)
    config.vocab_size = 2 * vocab_size
    after = read_record(config)
    assert after == before
    assert after.dense_model.vocab == vocab_size
    dense_after = cost_of(dense_config_of(config, after.dense_model), SEQ_LEN)
    assert dense_after.flops.linear == dense_before.flops.linear
    assert dense_after.flops.logit == 2 * dense_before.flops.logit
    del config.sparse_ift["dense_vocab_size"]  # as in the oldest folders: it can only be the one that the config has
    assert read_record(config).layers != before.layers
    config.vocab_size = vocab_size
    assert read_record(config) == before


def test_a_model_without_a_record_is_refused() -> None:
    with pytest.raises(ValueError, match="not a Sparse-IFT model"):
        read_record(TINY["gpt2"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"sparsity": 2}, "sparsity must be in"),
        ({"sparsty": 0.5}, "unknown key 'sparsty'"),
        ({"sparsity": 0.75}, "is damaged: it stands for .*hidden=64.*, but the config has .*hidden=44"),
        ({"dense_sizes": {"hidden": 32}}, "dense_sizes"),
        ({"dense_sizes": None}, "dense_sizes"),
        ({"dense_sizes": {"hidden": "32", "ffn": 128, "head_dim": 8}}, "dense_sizes"),
        ({"dense_vocab_size": "100"}, "dense_vocab_size"),
        ({"dense_vocab_size": 0}, "dense_vocab_size"),
    ],
)
def test_a_damaged_record_is_refused(damage: dict[str, Any], message: str) -> None:
    config = with_record("gpt2", sparsity=0.5)
    assert read_record(config)
    config.sparse_ift = {**config.sparse_ift, **damage}
    with pytest.raises(ValueError, match=message):
        read_record(config)


def test_neither_format_is_refused() -> None:
    config = with_record("gpt2", sparsity=0.5)
    config.sparse_ift = SparseIFTConfig().to_dict()
    with pytest.raises(ValueError, match=r"has neither a format, .* nor dense_sizes"):
        read_record(config)
