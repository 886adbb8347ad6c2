"""Widths of the Wide family: valid, near what was asked, and never below the dense ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    GPTNeoXConfig,
    PreTrainedConfig,
)

from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.families.registry import family_of
from sparseift_llm.models.architectures import build_model, sizes_of
from sparseift_llm.planning.planner import plan
from tests.helpers.planned_models import (
    NAMES,
    NEOX,
    SCOPES,
    TINY,
)


def rotary_size(config: PreTrainedConfig, head_dim: int) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    return int(head_dim * rope.get("partial_rotary_factor", 1.0)) if rope else 0


@given(
    name=st.sampled_from(NAMES),
    scope=st.sampled_from(SCOPES),
    sparsity=st.floats(0, 0.95),
    multiple=st.sampled_from([1, 2, 3, 8, 16]),
)
def test_widths_are_valid_and_near_what_was_asked(name: str, scope: str, sparsity: float, multiple: int) -> None:
    dense = sizes_of(TINY[name])
    transform = SparseIFTConfig(scope=scope, sparsity=sparsity, width_multiple=multiple)
    config = family_of(transform.family).sparse_config(TINY[name], transform)
    wide = sizes_of(config)
    assert (wide.num_heads, wide.num_layers, wide.vocab) == (dense.num_heads, dense.num_layers, dense.vocab)
    if scope == "ffn":
        assert (wide.hidden, wide.head_dim) == (dense.hidden, dense.head_dim)
        assert sparsity == 0 or (wide.ffn % multiple == 0 and abs(wide.ffn - dense.ffn / (1 - sparsity)) <= multiple)
        return
    assert rotary_size(config, wide.head_dim) % 2 == 0
    factor = (1 / (1 - sparsity)) ** 0.5
    # a valid head size is at most 2.5 away (partial rotary), for each of 4 heads, times what a multiple of 3 costs
    assert abs(wide.hidden - dense.hidden * factor) <= 2.5 * 4 * max(3, multiple / 4)
    assert abs(wide.head_dim - dense.head_dim * factor) <= 2.5 * max(3, multiple / 4)
    assert abs(wide.ffn / dense.ffn - wide.hidden / dense.hidden) <= multiple / dense.ffn + 12 / dense.hidden
    if dense.attention_width == dense.hidden:
        assert wide.attention_width == wide.hidden
    if sparsity > 0:
        assert wide.hidden % multiple == 0


@given(name=st.sampled_from(NAMES), scope=st.sampled_from(SCOPES), sparsity=st.floats(0.01, 0.95))
@example(name="gpt_neox", scope="model", sparsity=0.1484375)
@settings(max_examples=25, deadline=None)
def test_realised_sparsity_at_real_sizes_is_near_what_was_asked(name: str, scope: str, sparsity: float) -> None:
    dense = TINY[name].__class__.from_dict({**TINY[name].to_dict(), **REAL_SIZES[name]})
    for layer in plan(dense, SparseIFTConfig(scope=scope, sparsity=sparsity)).layers:
        if layer.is_sparse:
            # a head of 64 may have to be 2.5 wider or narrower (partial rotary), and weights go with the square
            assert layer.sparsity == pytest.approx(sparsity, abs=2 * 2.5 / 64)


_REAL: dict[str, Any] = {"hidden_size": 768, "num_attention_heads": 12}
_REAL_LLAMA: dict[str, Any] = {**_REAL, "intermediate_size": 2000, "num_key_value_heads": 4, "head_dim": 64}
REAL_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 768, "n_head": 12},
    "gpt_neox": {**_REAL, "intermediate_size": 3072},
    "opt": {**_REAL, "ffn_dim": 3072, "word_embed_proj_dim": 768},
    "llama": _REAL_LLAMA,
    "mistral": _REAL_LLAMA,
    "qwen2": {key: value for key, value in _REAL_LLAMA.items() if key != "head_dim"},
    "qwen3": {**_REAL_LLAMA, "head_dim": 128},
    "gemma": {**_REAL_LLAMA, "head_dim": 128},
}


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
@pytest.mark.parametrize(
    ("scope", "sparsity", "multiple"), [("ffn", 0.1, 100), ("model", 0.05, 20), ("model", 0.3, 64), ("ffn", 0.2, 256)]
)
def test_rounding_never_leaves_less_room_than_the_dense_model(
    scope: str, sparsity: float, multiple: int, distribution: str
) -> None:
    config = SparseIFTConfig(scope=scope, sparsity=sparsity, width_multiple=multiple, distribution=distribution)
    result = plan(TINY["gpt2"], config)
    assert all(0 <= layer.sparsity < 1 for layer in result.layers)
    assert result.ratio_linear == 1.0


@pytest.mark.parametrize("rotary_pct", [0.25, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("sparsity", [0.2, 0.45, 0.6, 0.85])
def test_partial_rotary_heads_run_at_every_width(rotary_pct: float, sparsity: float) -> None:
    dense = GPTNeoXConfig(**{**NEOX, "rotary_pct": rotary_pct})
    result = plan(dense, SparseIFTConfig(sparsity=sparsity))
    assert rotary_size(result.hf_config, sizes_of(result.hf_config).head_dim) % 2 == 0
    with torch.no_grad():
        logits = build_model(result.hf_config)(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert bool(logits.isfinite().all())
