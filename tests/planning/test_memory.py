"""Memory per token in a plan: what a wider residual stream adds, against what autograd really saves."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from sparseift_llm import sparsify
from sparseift_llm.cli.program import main
from sparseift_llm.planning.memory import token_memory
from sparseift_llm.planning.planner import plan
from tests.helpers.models import tiny_config
from tests.helpers.residual import residual


def saved_values(config: PreTrainedConfig, num_tokens: int, **options: Any) -> int:
    """Floats that autograd keeps of a real forward pass on the CPU, parameters left out."""
    model = sparsify(config, residual(0.5, **options)).train()
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters and tensor.is_floating_point():
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long), use_cache=False)
    assert output.logits is not None
    return sum(found.values())


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma"])
def test_activations_are_what_autograd_saves(arch: str) -> None:
    config = tiny_config(arch, vocab_size=100)
    wide = plan(config, residual(0.5)).hf_config
    per_token = (saved_values(config, 48) - saved_values(config, 16)) / 32
    assert token_memory(wide).activations == pytest.approx(per_token, rel=0.1)
    assert token_memory(config).activations < 0.95 * token_memory(wide).activations


def test_tiles_keep_less() -> None:
    """The gated FFN, 128 wide, keeps two of the four values that the stock one does, in two layers."""
    config = tiny_config("llama", vocab_size=104, hidden_size=32, intermediate_size=128)
    per_token = [
        (saved_values(config, 48, **options) - saved_values(config, 16, **options)) / 32
        for options in ({}, {"structure": "block", "block_size": 8})
    ]
    assert per_token[0] - per_token[1] == 2 * 2 * 128
    assert per_token[1] < token_memory(plan(config, residual(0.5)).hf_config).activations


def test_keys_and_values_stay() -> None:
    config = tiny_config("llama")
    assert token_memory(config).kv_cache == token_memory(plan(config, residual()).hf_config).kv_cache == 2 * 2 * 8 * 2


def test_plan_prints_both(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "llama-gpt3-small", "--scope", "residual", "--sparsity", "0.5", "--seq-len", "1024"]
    assert main(words) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split()[-1] for line in out.splitlines() if line}
    assert lines["KV cache"] == "1.0000"
    assert 1.2 < float(lines["activations kept for the backward pass"]) < 2
    assert lines["forward_flops_per_token"] == lines["linear_flops_per_token"] == "1.0000"
    assert main([*words, "--json", "--embedding", "dense"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["memory_values_per_token"]["dense"]["kv_cache"] == 2 * 768 * 12
    assert values["ratio_whole_model"] > 1.2
