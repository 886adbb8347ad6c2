"""Projections that grow but stay dense break the promise of equal FLOPs: refused, with a way out that works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseift_llm import SparseIFTConfig, load_pretrained, plan, sparsify
from tests.helpers.planned_models import NAMES, SEQ_LEN, TINY, planned_at_any_cost

CHOICES: dict[str, dict[str, Any]] = {
    "the FFN's first side": {"scope": "ffn", "exclude": ("mlp_in",)},
    "the FFN's second side": {"scope": "ffn", "exclude": ("mlp_out",)},
    "queries, keys and values": {"exclude": ("q", "k", "v")},
    "the output of attention": {"exclude": ("o",)},
    "all but the FFN": {"targets": ("mlp_in", "mlp_out")},
}
STRUCTURES: dict[str, dict[str, Any]] = {"masks": {}, "tiles": {"structure": "block", "block_size": 4}}
WAY_OUT = re.compile(r"'whole_model' with seq_len=48.*?(?:sparsity=(0\.\d+), the highest|or make them sparse)")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("choice", CHOICES)
def test_the_way_out_leads_to_equal_cost(choice: str, structure: str, name: str) -> None:
    options = {"sparsity": 0.75, **CHOICES[choice], **STRUCTURES[structure]}
    ratio = planned_at_any_cost(name, **options).ratio_linear
    assert ratio > 1.05
    with pytest.raises(ValueError, match=f"would cost {ratio:.2f} times the dense model's FLOPs; ") as raised:
        plan(TINY[name], SparseIFTConfig(**options), seq_len=SEQ_LEN)
    found = WAY_OUT.search(str(raised.value))
    assert found, raised.value
    sparsity = float(found[1]) if found[1] else 0.75
    options = {**options, "accounting": "whole_model", "seq_len": SEQ_LEN}
    better = plan(TINY[name], SparseIFTConfig(**{**options, "sparsity": sparsity}))
    assert better.ratio_whole_model == pytest.approx(1, abs=2e-3)
    if found[1]:
        with pytest.raises(ValueError, match=r"cannot be met|would leave outputs without any input"):
            plan(TINY[name], SparseIFTConfig(**{**options, "sparsity": sparsity + 0.01}))


@pytest.mark.parametrize(
    ("options", "ratio"), [({"scope": "ffn", "exclude": ("mlp_in",)}, "2.00"), ({"exclude": ("q", "k", "v")}, "1.75")]
)
def test_ratios_by_hand(options: dict[str, Any], ratio: str) -> None:
    """GPT-2 has 12 d^2 weights per layer: 4 in either FFN matrix, which grow fourfold, and 3 in q, k and v."""
    with pytest.raises(ValueError, match=rf"would cost {ratio} times"):
        sparsify(TINY["gpt2"], SparseIFTConfig(sparsity=0.75, **options))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.0, "exclude": ("o",)},
        {"family": "parallel", "exclude": ("o",)},
        {"family": "doped", "targets": ("mlp_in", "mlp_out")},
        {"family": "factorized", "exclude": ("mlp_in",)},
        {"scope": "ffn", "exclude": ("o",)},
    ],
)
def test_what_stays_dense_and_as_it_is_costs_nothing_more(options: dict[str, Any], name: str) -> None:
    assert plan(TINY[name], SparseIFTConfig(**options)).ratio_linear == 1


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_checkpoint_of_such_a_model_still_loads(
    structure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sparseift_llm.planning.planner.check_equal_cost", lambda *_: None)
        model = sparsify(TINY["gpt2"], SparseIFTConfig(exclude=("q", "k", "v"), **STRUCTURES[structure]))
    model.save_pretrained(tmp_path)
    model, loaded = model.eval(), load_pretrained(tmp_path)
    tokens = torch.arange(8)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
