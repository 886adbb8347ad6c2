"""Rules, by which layers and kinds of one model have different families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparseift_llm import SparseIFTConfig, load_pretrained, plan, sparsify
from sparseift_llm.config.transform import FamilyRule
from sparseift_llm.families.registry import drop_in_of
from sparseift_llm.planning.cost import cost_of
from tests.families.test_families import composites
from tests.helpers.models import logits_of, tiny_config, tiny_model


def test_rules_mix_families_by_kind_and_layer() -> None:
    config = SparseIFTConfig(
        family="doped",
        rules=(
            FamilyRule("dense", layers="0"),
            FamilyRule("factorized", targets=("mlp_in", "mlp_out"), sparsity=0.5, nonlinearity="gelu"),
        ),
    )
    model = sparsify(tiny_config("gpt2", n_layer=3), config)
    first, second, third = model.transformer.h
    assert not composites(first)
    for block in (second, third):
        kinds = [type(module).__name__ for module in composites(block).values()]
        assert kinds == ["DopedProjection"] * 2 + ["FactorizedProjection"] * 2
    result = plan(tiny_config("gpt2", n_layer=3), config)
    assert result.ratio_whole_model == 1
    assert cost_of(model, result.seq_len) == result.sparse


def test_wide_ffn_with_another_family_in_attention(tmp_path: Path) -> None:
    rules = (FamilyRule("parallel", targets=("q", "k", "v", "o")),)
    config = SparseIFTConfig(scope="ffn", rules=rules)
    model = sparsify(tiny_model("gpt2"), config).eval()
    assert len(composites(model)) == 4
    assert type(model.transformer.h[0].mlp.c_fc).__name__ == "MaskedConv1D"
    assert plan(tiny_config("gpt2"), config).ratio_whole_model == 1
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load_pretrained(tmp_path, dtype=torch.float64)), logits_of(model))


@pytest.mark.parametrize("rule", [{"layers": "2-9"}, {"layers": "2", "targets": ("o",)}])
def test_a_rule_for_no_projection_is_refused(rule: dict[str, Any]) -> None:
    """The model has the layers 0 and 1; a rule that reaches beyond the last one is for those that there are."""
    config = SparseIFTConfig(family="parallel", nonlinearity="none", rules=[{"family": "dense", **rule}])
    with pytest.raises(ValueError, match=r"layers='2.* is for no projection of this llama, .* in the layers 0 to 1"):
        sparsify(tiny_config("llama"), config)
    reaching = SparseIFTConfig(family="parallel", nonlinearity="none", rules=[FamilyRule("dense", layers="1-9")])
    assert len(composites(sparsify(tiny_config("llama"), reaching))) == 7


def test_a_config_with_rules_survives_json() -> None:
    config = SparseIFTConfig(scope="ffn", rules=(FamilyRule("doped", targets=("o",), layers="0-2,5"),))
    assert SparseIFTConfig.from_dict(config.to_dict()) == config


def test_a_rule_for_a_part_of_a_fused_matrix_is_refused() -> None:
    config = SparseIFTConfig(family="doped", rules=(FamilyRule("parallel", targets=("q",)),))
    with pytest.raises(ValueError, match="q, k, v in one matrix"):
        plan(tiny_config("gpt2"), config)


def test_rules_that_replace_nothing_have_no_drop_in_family() -> None:
    with pytest.raises(ValueError, match="family='dense' puts nothing in the place of a projection"):
        drop_in_of(FamilyRule("dense"))


def test_a_layer_that_a_rule_leaves_dense_is_copied_under_a_trained_start() -> None:
    dense = tiny_model("gpt2")
    config = SparseIFTConfig(family="doped", init="pretrained", rules=(FamilyRule("dense", layers="0"),))
    sparse = sparsify(dense, config)
    for name in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj"):
        old, new = dense.transformer.h[0].get_submodule(name), sparse.transformer.h[0].get_submodule(name)
        assert torch.equal(new.weight, old.weight)
        assert torch.equal(new.bias, old.bias)
