"""Initialisation and learning rates: measured variances, SµPar's folded multipliers, optimizer groups by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sparseift_llm import DSTConfig, SparseIFTConfig, optimizer_param_groups, plan, sparsify
from sparseift_llm.conversion import scaling
from sparseift_llm.conversion.scaling import fan_in_multipliers, scale_initial_weights
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.models.architectures import build_model
from sparseift_llm.models.fused_rows import RowPattern
from tests.helpers.models import ARCHS, shake, tiny_config, tiny_model, token_ids

SEPARATE_HEADS = {"hidden_size": 48, "head_dim": 8}  # 4 heads: attention is 32 wide
FINAL_NORMS = {
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
}


# ---- variance at initialisation


def output_variances(model: PreTrainedModel, names: list[str]) -> dict[str, float]:
    """Variance of each projection's outputs for inputs of variance 1, its bias left out."""
    generator = torch.Generator().manual_seed(0)
    variances = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        columns = layer.nx if hasattr(layer, "nx") else layer.in_features
        x = torch.randn(512, columns, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            output = layer(x) - (0 if layer.bias is None else layer.bias)
        variances[name] = output.var().item()
    return variances


def variance_ratios(arch: str, **choice: Any) -> dict[str, float]:
    """Sparse over dense output variance; sampling makes that off by 1-2%."""
    sizes = {"n_embd": 128} if arch == "gpt2" else {"hidden_size": 128, "intermediate_size": 288}
    config = tiny_config(arch, **sizes)
    torch.manual_seed(0)
    dense = build_model(config, dtype=torch.float64)
    sparse = sparsify(dense, SparseIFTConfig(**choice))
    before, after = (output_variances(model, list(sparse_layers(sparse))) for model in (dense, sparse))
    return {name: after[name] / before[name] for name in before}


def check_ratios(ratios: dict[str, float], expected: float) -> None:
    assert ratios
    for name, ratio in ratios.items():
        assert ratio == pytest.approx(expected, rel=0.08), name


@pytest.mark.parametrize("choice", [{}, {"sparsity": 0.5}, {"scope": "ffn"}, {"dst": DSTConfig(algorithm="gmp")}])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_preserve_keeps_the_output_variance(arch: str, choice: dict[str, Any]) -> None:
    check_ratios(variance_ratios(arch, init="preserve", **choice), 1.0)


def test_preserve_corrects_each_layer_of_an_uneven_distribution() -> None:
    check_ratios(variance_ratios("llama", init="preserve", distribution="erk"), 1.0)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_paper_does_not(arch: str) -> None:
    """Wide 75% has twice the inputs at a quarter of the density: half the variance."""
    ratios = variance_ratios(arch, init="paper")
    check_ratios(ratios, 0.5)
    with pytest.raises(AssertionError):
        check_ratios(ratios, 1.0)


def test_multipliers_by_hand() -> None:
    """Twice the inputs at 1/4 density; in scope `ffn`, 1 x the inputs in, 4 x the inputs out, at 1/4."""
    config = tiny_config("llama")
    assert set(fan_in_multipliers(plan(config, SparseIFTConfig()).record).values()) == {0.5}
    ffn = fan_in_multipliers(plan(config, SparseIFTConfig(scope="ffn")).record)
    assert {name.rsplit(".", 1)[-1]: value for name, value in ffn.items()} == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 1.0),
        "gate_proj": 0.25,
        "up_proj": 0.25,
        "down_proj": 1.0,
    }


# ---- SµPar against a model with explicit multipliers


def folded_and_explicit(arch: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same shaken widened model under `supar`, and under `preserve` with SµPar's multipliers in the forward."""
    changes = SEPARATE_HEADS if arch in ("qwen3", "gemma") else {}
    config = tiny_config(arch, **changes)
    plans = {init: plan(config, SparseIFTConfig(init=init)) for init in ("supar", "preserve")}
    torch.manual_seed(0)
    folded = build_model(plans["supar"].hf_config, dtype=torch.float64, attn_implementation="eager")
    shake(folded, std=0.3)
    explicit = copy.deepcopy(folded)
    scale_initial_weights(folded, plans["supar"].record)
    scale_initial_weights(explicit, plans["preserve"].record)
    scaled = [module for module in explicit.modules() if hasattr(module, "scaling")]
    assert len(scaled) == 2
    for module in scaled:
        module.scaling *= 0.5**0.5  # 1 / head size for its root, the head size being twice the dense one
    return folded, explicit


def check_multipliers(folded: PreTrainedModel, explicit: PreTrainedModel) -> None:
    """Equal attention in every layer, and half the logits (twice the dense width)."""
    with torch.no_grad():
        ours, expected = (m(input_ids=token_ids(), output_attentions=True) for m in (folded, explicit))
    assert len(ours.attentions) == 2
    for attention, expected_attention in zip(ours.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(attention, expected_attention, rtol=0, atol=1e-6)  # a float32 softmax
    torch.testing.assert_close(ours.logits, expected.logits * 0.5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
def test_supar_equals_explicit_multipliers(arch: str) -> None:
    check_multipliers(*folded_and_explicit(arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_planted_fault_queries_not_scaled(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_scale_queries", lambda *_: None)
    with pytest.raises(AssertionError):
        check_multipliers(*folded_and_explicit(arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_planted_fault_logits_not_scaled(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_scale_final_norm", lambda *_: None)
    with pytest.raises(AssertionError):
        check_multipliers(*folded_and_explicit(arch))


def test_planted_fault_layout_of_gpt_neox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queries are interleaved by head; the first third of the rows is not them."""
    width = folded_and_explicit("gpt_neox")[0].config.hidden_size
    blocks = RowPattern((("q", width), ("k", width), ("v", width)))
    monkeypatch.setattr(scaling, "row_pattern", lambda *_: blocks)
    with pytest.raises(AssertionError):
        check_multipliers(*folded_and_explicit("gpt_neox"))


def test_planted_fault_norm_offset_of_gemma(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_offset(model: PreTrainedModel, factor: float) -> None:
        model.get_parameter("model.norm.weight").mul_(factor)

    monkeypatch.setattr(scaling, "_scale_final_norm", without_offset)
    with pytest.raises(AssertionError):
        check_multipliers(*folded_and_explicit("gemma"))


def test_supar_needs_a_final_norm() -> None:
    config = tiny_config("opt", do_layer_norm_before=False)
    with pytest.raises(ValueError, match="init='supar' needs a norm before the logits"):
        sparsify(config, SparseIFTConfig(init="supar"))
    sparsify(config, SparseIFTConfig(init="preserve"))


# ---- optimizer groups


def rates(model: PreTrainedModel, lr: float = 1.0, weight_decay: float = 0.0) -> dict[str, tuple[float, float]]:
    """Learning rate and decay by parameter name; every trainable parameter must stand in exactly one group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer_param_groups(model, lr, weight_decay):
        assert group.keys() == {"params", "lr", "weight_decay"}
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = (group["lr"], group["weight_decay"])
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return found


@pytest.mark.parametrize("init", [None, "paper", "preserve"])
def test_without_supar_there_are_two_groups(init: str | None) -> None:
    model = tiny_model("gpt2")
    if init is not None:
        model = sparsify(model, SparseIFTConfig(init=init))
    assert len(optimizer_param_groups(model, 0.5, 0.1)) == 2
    for name, (lr, decay) in rates(model, 0.5, 0.1).items():
        assert (lr, decay) == (0.5, 0.1 if model.get_parameter(name).ndim == 2 else 0.0), name


@pytest.mark.parametrize("arch", ARCHS)
def test_supar_rates_by_hand(arch: str) -> None:
    """Wide 75%: projections at lr / 0.5, the final norm at half the rate, what is scaled by 1/sqrt(2) at that."""
    changes = SEPARATE_HEADS if arch in ("qwen3", "gemma") else {}
    model = sparsify(tiny_config(arch, **changes), SparseIFTConfig(init="supar"))
    projections = {f"{name}.weight" for name in sparse_layers(model)}
    own_queries = {"gpt2": "none", "gpt_neox": "none", "qwen3": "q_norm"}.get(arch, "q_proj")
    factors = {f"{FINAL_NORMS.get(arch, 'model.norm')}.{part}": 0.5 for part in ("weight", "bias")}
    factors |= {name: 0.5**0.5 for name, _ in model.named_parameters() if own_queries in name}
    assert len(factors) > 2 or own_queries == "none"
    for name, (lr, decay) in rates(model, 1.0, 0.1).items():
        factor = factors.get(name, 1.0)
        assert lr == pytest.approx((2.0 if name in projections else 1.0) * factor), name
        # decay acts times the rate; the folded factor is taken out of that product
        assert decay == pytest.approx(0.1 / factor if model.get_parameter(name).ndim == 2 else 0.0), name


def test_supar_rates_of_an_uneven_distribution() -> None:
    model = sparsify(tiny_config("llama"), SparseIFTConfig(init="supar", distribution="erk"))
    multipliers = fan_in_multipliers(plan(tiny_config("llama"), SparseIFTConfig(distribution="erk")).record)
    found = rates(model)
    name = "model.layers.0.mlp.up_proj"
    assert multipliers[name] != 0.5
    assert found[f"{name}.weight"][0] == pytest.approx(1 / multipliers[name])


def test_frozen_parameters_stand_in_no_group() -> None:
    model = sparsify(tiny_config("llama"), SparseIFTConfig(init="supar"))
    model.get_parameter("lm_head.weight").requires_grad_(False)
    assert "lm_head.weight" not in rates(model)


def test_a_step_of_adamw_moves_each_parameter_by_its_rate() -> None:
    """Adam's first step is lr * sign(gradient), wherever there is a gradient."""
    torch.manual_seed(0)
    model = sparsify(tiny_model("llama"), SparseIFTConfig(init="supar"))
    expected = rates(model, lr=1e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(optimizer_param_groups(model, 1e-3), eps=1e-15)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).abs()
        assert moved.max().item() == pytest.approx(expected[name][0], rel=1e-3), name
    for name, layer in sparse_layers(model).items():
        assert torch.count_nonzero(layer.weight[~layer.mask]) == 0, name


# ---- coordinate check


def logit_change(sparsity: float, init: str) -> float:
    """Mean change of the logits over 8 steps of Adam on one batch; the width is 32/sqrt(1-s)."""
    torch.manual_seed(0)
    model = sparsify(tiny_config("llama"), SparseIFTConfig(sparsity=sparsity, init=init))
    x = token_ids(8, 16)
    optimizer = torch.optim.Adam(optimizer_param_groups(model, 4e-3))
    with torch.no_grad():
        before = model(input_ids=x).logits
    for _ in range(8):
        optimizer.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(input_ids=x).logits - before).abs().mean())


def test_coordinate_check() -> None:
    """Four times the width and 1/16 the density: under `supar` training moves logits as in the dense model, not more.

    Measured: 0.7 times as far under `supar` (random parts average out), 2.5 times under `paper`.
    """
    dense = logit_change(0.0, "supar")
    assert 0.5 * dense < logit_change(0.9375, "supar") < 1.1 * dense
    assert logit_change(0.9375, "paper") > 2 * dense
