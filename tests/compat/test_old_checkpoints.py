"""Checkpoints that older versions wrote load bit for bit; fixtures/ holds them, and the scripts that made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparseift_llm import load_pretrained
from sparseift_llm.checkpoints.mask_file import MASKS_NAME
from sparseift_llm.layers.base import sparse_layers
from tests.helpers.scripts import load_script

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = ("v0.1.0",)
STOCK = ("erk_targets", "gmp", "heads", "heads_fused", "wide", "whole_model_untied")  # load without this package
KINDS = (
    *STOCK, "block_wide", "doped", "doped_packed", "factorized", "factorized_tiles", "ffn_rules", "parallel", "rules",
    "whole_model_resized", "wide_packed",
)  # fmt: skip


def check(model: Any, folder: Path) -> None:
    script = load_script(folder.parent / "make.py")
    assert script.digests(model) == json.loads((folder.parent / "expected.json").read_text())[folder.name]
    expected = load_file(folder.parent / "expected.safetensors")[folder.name]
    torch.testing.assert_close(script.logits(model), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_an_older_version(version: str, kind: str) -> None:
    folder = FIXTURES / version / kind
    check(load_pretrained(folder), folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    if kind in STOCK:  # without masks
        assert not sparse_layers(loaded)
        expected = load_file(folder.parent / "expected.safetensors")[kind]
        torch.testing.assert_close(
            load_script(FIXTURES / version / "make.py").logits(loaded), expected, rtol=1e-10, atol=1e-12
        )
    else:
        check(loaded, folder)


def test_the_check_catches_a_weight_and_a_mask_that_changed() -> None:
    folder = FIXTURES / "v0.1.0" / "wide"
    model: Any = load_pretrained(folder)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] += 1e-6
    with pytest.raises(AssertionError):
        check(model, folder)
    model = load_pretrained(folder)
    layer = next(iter(sparse_layers(model).values()))
    layer.mask[layer.mask.logical_not()] = True
    with pytest.raises(AssertionError):
        check(model, folder)


def test_the_fixtures_are_small() -> None:
    for version in VERSIONS:
        files = [path for path in (FIXTURES / version).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert sum(path.stat().st_size for path in files) < 260_000
        assert {path.parent.name for path in files if path.name == MASKS_NAME} == set(KINDS)
