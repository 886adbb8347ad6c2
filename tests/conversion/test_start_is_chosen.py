"""A model that was loaded, and nobody says whether its projections start from their trained weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparseift_llm import SparseIFTConfig, load_pretrained, sparsify, to_dense
from sparseift_llm.config.rules import FamilyRule
from tests.helpers.models import logits_of, tiny_model

LOADED: dict[str, dict[str, Any]] = {
    "wide": {},
    "wide tiles": {"structure": "block", "block_size": 8},
    "ffn": {"scope": "ffn"},
    "parallel": {"family": "parallel"},
    "parallel, linear": {"family": "parallel", "nonlinearity": "none"},
    "doped tiles": {"family": "doped", "structure": "block", "block_size": 8},
    "rules": {"scope": "ffn", "sparsity": 0.5, "rules": (FamilyRule("doped", targets=("q", "k", "v", "o")),)},
}


@pytest.mark.parametrize("options", LOADED.values(), ids=LOADED)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_trained_weights_are_not_dropped_unasked(arch: str, options: dict[str, Any], tmp_path: Path) -> None:
    tiny_model(arch).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = SparseIFTConfig(**{"sparsity": 0.75, **options})
    with pytest.raises(ValueError, match=f"the model comes from {tmp_path}, and .* random weights in place") as raised:
        sparsify(loaded, config)
    can_be_kept = "init='pretrained' starts them from their trained weights" in str(raised.value)
    for init in ("preserve", "paper"):
        assert sparsify(loaded, replace(config, init=init)).config.sparse_ift["transformation"]["init"] == init
    if can_be_kept:
        sparsify(loaded, replace(config, init="pretrained"))
    else:
        with pytest.raises(ValueError, match="init='pretrained'") as refused:
            replace(config, init="pretrained")
        assert f"cannot be kept with these options ({refused.value})" in str(raised.value)
    assert can_be_kept == (options not in (LOADED["wide"], LOADED["wide tiles"], LOADED["parallel"]))


def test_what_has_no_trained_weights_or_loses_none_needs_no_word(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sparsify(loaded.config, SparseIFTConfig()).config.sparse_ift["transformation"]["init"] == "preserve"
    sparsify(tiny_model("llama"), SparseIFTConfig())
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert fresh.name_or_path == str(tmp_path), "which says nothing about its weights"
    sparsify(fresh, SparseIFTConfig())
    same = sparsify(loaded, SparseIFTConfig(sparsity=0.0))
    assert torch.equal(logits_of(same), logits_of(loaded))
    with torch.device("meta"):
        sparsify(AutoModelForCausalLM.from_config(loaded.config), SparseIFTConfig())


def test_dense_copies_and_exports_count_as_trained(tmp_path: Path) -> None:
    sparsify(tiny_model("gpt2"), SparseIFTConfig()).save_pretrained(tmp_path / "sparse")
    dense = to_dense(load_pretrained(tmp_path / "sparse"))
    dense.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for model in (dense, loaded, copy.deepcopy(loaded), loaded.to(torch.bfloat16).train()):
        with pytest.raises(ValueError, match="the model comes from "):
            sparsify(model, SparseIFTConfig())
