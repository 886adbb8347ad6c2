"""Rows of fused matrices by kind: by hand, and by what a model computes when rows of one kind are zeroed or changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from sparseift_llm.models.fused_rows import RowPattern, row_pattern
from sparseift_llm.models.projections import Projection, find_projections
from tests.helpers.decoders import SUPPORTED, decoder
from tests.helpers.models import VOCAB

# Model type and changes of its config: every order of rows that is known, heads that share keys included.
FUSED_ATTENTION: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "openai-gpt": {},
    "mpt": {},
    "phi3": {},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "bloom": {},
    "persimmon": {"qk_layernorm": False},  # its norm gives queries of 0 a bias
    "codegen": {},
    "falcon grouped": {"new_decoder_architecture": True},
    "falcon shared": {"new_decoder_architecture": False, "multi_query": True},
    "falcon apart": {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4},
    "gpt_bigcode shared": {"multi_query": True},
    "gpt_bigcode apart": {"multi_query": False},
}
TOKENS = torch.arange(12).reshape(1, 12) % VOCAB


def fused(name: str) -> tuple[Any, Projection, Any]:
    """A model, its first layer's fused projection, and that projection's module."""
    model: Any = decoder(name.split()[0], **FUSED_ATTENTION.get(name, {})).eval()
    projection = next(p for p in find_projections(model) if len(p.kinds) == 3)
    return model, projection, model.get_submodule(projection.name)


@torch.no_grad()
def change(module: Any, rows: Tensor, factor: float) -> None:
    """Scale the rows of a projection; 0 leaves a bias of 0 as well, another factor draws new values."""
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    for tensor in (weight, *([] if module.bias is None else [module.bias])):
        tensor[rows] = torch.randn_like(tensor[rows]) * factor


@torch.no_grad()
def attention_output(model: Any, projection: Projection) -> Tensor:
    """What the first layer's output projection is given, (1, T, attention width)."""
    output = next(p for p in find_projections(model) if p.kinds == ("o",))
    seen: list[Tensor] = []
    hook = model.get_submodule(output.name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    model(TOKENS)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", FUSED_ATTENTION)
def test_values_are_the_rows_without_which_attention_gives_nothing(name: str) -> None:
    torch.manual_seed(0)
    model, projection, module = fused(name)
    pattern = row_pattern(projection, model.config)
    assert pattern is not None
    assert pattern.num_rows == projection.out_features
    assert attention_output(model, projection).abs().max() > 0
    change(module, pattern.rows("v"), 0)
    assert attention_output(model, projection).abs().max() == 0


@pytest.mark.parametrize("name", FUSED_ATTENTION)
@pytest.mark.parametrize(("zeroed", "drawn"), [("q", "k"), ("k", "q")])
def test_without_queries_keys_do_not_matter_and_the_other_way_round(name: str, zeroed: str, drawn: str) -> None:
    torch.manual_seed(0)
    model, projection, module = fused(name)
    pattern = row_pattern(projection, model.config)
    assert pattern is not None
    change(module, pattern.rows(zeroed), 0)
    before = attention_output(model, projection)
    change(module, pattern.rows(drawn), 1)
    torch.testing.assert_close(attention_output(model, projection), before, rtol=1e-10, atol=1e-12)
    change(module, pattern.rows("v")[:1], 1)
    assert not torch.allclose(attention_output(model, projection), before, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt_neox", "codegen", "falcon grouped"])
def test_the_check_catches_rows_in_blocks_where_they_are_interleaved(name: str) -> None:
    torch.manual_seed(0)
    model, projection, module = fused(name)
    pattern = row_pattern(projection, model.config)
    assert pattern is not None
    numbers = {kind: len(pattern.rows(kind)) for kind in ("q", "k", "v")}
    wrong = RowPattern(tuple(numbers.items()))
    change(module, wrong.rows("v"), 0)
    assert attention_output(model, projection).abs().max() > 0


@pytest.mark.parametrize("model_type", ["glm", "glm4", "modernbert-decoder", "phi3"])
def test_gates_are_half_of_a_fused_ffn_matrix(model_type: str) -> None:
    torch.manual_seed(0)
    model: Any = decoder(model_type).eval()
    projection = next(p for p in find_projections(model) if p.kinds == ("mlp_in",))
    output = next(p for p in find_projections(model) if p.kinds == ("mlp_out",))
    pattern = row_pattern(projection, model.config)
    assert pattern is not None
    assert pattern.kinds == ("gate", "up")
    module = model.get_submodule(projection.name)
    seen: list[Tensor] = []
    model.get_submodule(output.name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    unit = 5  # one hidden unit needs both of its rows: without either it gives nothing, and no other unit changes
    for kind in ("gate", "up"):
        kept = module.weight.detach().clone()
        seen.clear()
        with torch.no_grad():
            model(TOKENS)
            module.weight[pattern.rows(kind)[unit]] = 0
            model(TOKENS)
            module.weight.copy_(kept)
        before, after = seen[:2]
        assert before[..., unit].abs().max() > 0
        assert after[..., unit].abs().max() == 0
        torch.testing.assert_close(after[..., unit + 1 :], before[..., unit + 1 :], rtol=1e-10, atol=1e-12)


def test_latent_attention_has_its_own_rows() -> None:
    model: Any = decoder("minicpm3")
    first, second = (p for p in find_projections(model) if p.layer_index == 0 and p.kinds == ("k", "v"))
    assert row_pattern(first, model.config) == RowPattern((("kv", 16), ("k", 4)))
    assert row_pattern(second, model.config) == RowPattern((("k", 8), ("v", 8)), 4)


def test_grouped_queries_get_their_own_numbers_of_rows() -> None:
    model, projection, _ = fused("falcon grouped")  # four heads of 8, two of keys
    assert row_pattern(projection, model.config) == RowPattern((("q", 16), ("k", 8), ("v", 8)), 2)
    model, projection, _ = fused("phi3")
    assert row_pattern(projection, model.config) == RowPattern((("q", 32), ("k", 16), ("v", 16)))


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_every_supported_model_has_known_rows(model_type: str) -> None:
    model: Any = decoder(model_type)
    for projection in find_projections(model):
        pattern = row_pattern(projection, model.config)
        assert pattern is None or pattern.num_rows == projection.out_features


def test_an_order_that_is_not_known_is_an_error() -> None:
    model, projection, _ = fused("bloom")
    model.config.model_type = "bloom_of_tomorrow"
    with pytest.raises(ValueError, match="order bloom_of_tomorrow keeps their rows is not known"):
        row_pattern(projection, model.config)
