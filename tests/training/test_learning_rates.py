"""Learning rates of embeddings, learned positions and output heads; those of `supar` are in conversion/test_scaling."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from sparseift_llm import DSTConfig, SparseIFTConfig, SparseTrainingController, optimizer_param_groups, sparsify
from sparseift_llm.runs.trainer import Pretrainer
from sparseift_llm.training import learning_rates
from tests.helpers.decoders import DISTINCT, FFN_FIXED, decoder
from tests.helpers.models import tiny_model

GPT2 = {"transformer.wte.weight", "transformer.wpe.weight"}
OPT = {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"}
LLAMA = {"model.embed_tokens.weight"}
LLAMA_HEAD = {"lm_head.weight"}


def rates(model: PreTrainedModel, **factors: float) -> dict[str, tuple[float, float]]:
    """Learning rate and decay by parameter name, at a rate of 0.5 and a decay of 0.1."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = optimizer_param_groups(model, 0.5, 0.1, **factors)  # type: ignore[arg-type]
    found = [(names[parameter], group) for group in groups for parameter in group["params"]]
    assert len(found) == len(names) == len(dict(found))  # every parameter once
    return {name: (group["lr"], group["weight_decay"]) for name, group in found}


def check_rates(model: PreTrainedModel, embeddings: set[str], head: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Embeddings at 4 times the rate and, where there is one of its own, the head at half of it."""
    found = rates(model, embedding_lr_factor=4.0, **({"head_lr_factor": 0.5} if head else {}))
    assert embeddings | head <= found.keys()
    for name, (rate, decay) in found.items():
        is_matrix = model.get_parameter(name).ndim == 2
        assert rate == (2.0 if name in embeddings else 0.25 if name in head else 0.5), name
        assert rate * decay == pytest.approx(0.05 if is_matrix else 0.0), name


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("arch", "changes", "embeddings", "head"),
    [
        ("gpt2", {}, GPT2, set()),
        ("opt", {"tie_word_embeddings": True}, OPT, set()),
        ("llama", {"tie_word_embeddings": True}, LLAMA, set()),
        ("llama", {"tie_word_embeddings": False}, LLAMA, LLAMA_HEAD),
    ],
)
def test_rates_by_hand(arch: str, changes: dict[str, bool], embeddings: set[str], head: set[str], sparse: bool) -> None:
    model = tiny_model(arch, **changes)
    check_rates(sparsify(model, SparseIFTConfig()) if sparse else model, embeddings, head)


def test_planted_fault_positions_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_rates, "embedding_parameters", lambda model: [model.get_input_embeddings().weight])
    check_rates(tiny_model("llama", tie_word_embeddings=True), LLAMA)
    with pytest.raises(AssertionError, match="embed_positions"):
        check_rates(tiny_model("opt"), OPT)


def test_an_untied_head_keeps_the_base_rate() -> None:
    found = rates(tiny_model("llama", tie_word_embeddings=False), embedding_lr_factor=4.0)
    assert found["lm_head.weight"] == (0.5, 0.1)
    assert found["model.embed_tokens.weight"] == (2.0, 0.025)


def test_factors_of_one_are_the_groups_without_factors() -> None:
    model = tiny_model("gpt2")
    assert rates(model, embedding_lr_factor=1.0) == rates(model)
    assert set(rates(model).values()) == {(0.5, 0.1), (0.5, 0.0)}


def decayed_by_the_trainer_of_a_recipe(model: PreTrainedModel, factor: float, folder: Path) -> set[str]:
    """Names of the parameters that its optimizer decays."""
    args = TrainingArguments(str(folder), weight_decay=0.1, use_cpu=True, report_to="none")
    trainer = Pretrainer(model=model, args=args)
    trainer.recipe = SimpleNamespace(sparse_ift=None, training={"embedding_lr_factor": factor})
    groups = trainer.create_optimizer().param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for group in groups if group["weight_decay"] for parameter in group["params"]}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("arch", [*DISTINCT, "hyperclovax", "granite_swa", "roberta-prelayernorm"])
def test_factors_do_not_change_which_parameters_have_decay(arch: str, sparse: bool, tmp_path: Path) -> None:
    """By the names of some types' parameters, the Trainer decays others than matrices, or not all of them."""
    model = decoder(arch, torch.float32)
    model = sparsify(model, SparseIFTConfig(scope="ffn")) if sparse and arch not in FFN_FIXED else model
    without, with_factor = (decayed_by_the_trainer_of_a_recipe(model, factor, tmp_path) for factor in (1.0, 3.0))
    assert without == with_factor != set()


def test_the_first_group_has_the_base_rate_which_is_what_a_trainer_logs() -> None:
    model = tiny_model("gpt2")
    assert next(model.parameters()) is model.get_input_embeddings().weight  # would be first otherwise
    assert [group["lr"] for group in optimizer_param_groups(model, 0.5, 0.1, 3.0)] == [0.5, 0.5, 1.5]


def test_with_supar_the_factors_are_multiplied() -> None:
    model = sparsify(tiny_model("llama", tie_word_embeddings=False).config, SparseIFTConfig(init="supar"))
    plain, found = rates(model), rates(model, embedding_lr_factor=4.0)
    for name, (rate, decay) in plain.items():
        factor = 4.0 if name in LLAMA else 1.0
        assert found[name] == (rate * factor, pytest.approx(decay / factor)), name
    assert len({rate for rate, _ in plain.values()}) > 1


def test_rates_of_embeddings_are_not_taken_for_a_mistake_under_supar(caplog: pytest.LogCaptureFixture) -> None:
    sparse_ift = SparseIFTConfig(init="supar", dst=DSTConfig(algorithm="set"))
    model = sparsify(tiny_model("llama", tie_word_embeddings=False).config, sparse_ift)
    with caplog.at_level(logging.WARNING):
        for factors, is_warned in (((4.0, 0.5), False), (None, True)):
            groups = model.parameters() if factors is None else optimizer_param_groups(model, 0.1, 0.0, *factors)
            SparseTrainingController(model, torch.optim.AdamW(groups, lr=0.1), 10).close()
            assert ("optimizer_param_groups" in caplog.text) == is_warned


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, True, "3"])
def test_factors_are_positive_finite_numbers(value: object) -> None:
    for name in ("embedding_lr_factor", "head_lr_factor"):
        with pytest.raises(ValueError, match=f"{name} must be a finite number above 0, got "):
            optimizer_param_groups(tiny_model("gpt2"), 0.5, 0.1, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1e-3, math.inf, math.nan, True, "1e-3"])
def test_rates_and_decay_are_finite_numbers(value: Any) -> None:
    """torch looks at an optimizer's own rate alone, not at those of groups."""
    for name, arguments in (("lr", (value, 0.1)), ("weight_decay", (0.1, value))):
        with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 0, got "):
            optimizer_param_groups(tiny_model("gpt2"), *arguments)


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("arch", ["gpt2", "opt"])
def test_a_tied_head_has_no_rate_of_its_own(arch: str, factor: float) -> None:
    with pytest.raises(ValueError, match=f"head_lr_factor={factor} is given, but .* tied to its embedding; leave"):
        optimizer_param_groups(tiny_model(arch), 0.5, head_lr_factor=factor)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("wrap", ["compiled", "compiled layers", "DataParallel"])
def test_a_wrapped_model_has_the_same_groups(wrap: str, arch: str) -> None:
    """A compiled model has other names, by which the rate of the final norm was not found."""
    model = sparsify(tiny_model(arch, tie_word_embeddings=True), SparseIFTConfig(init="supar"))
    expected = optimizer_param_groups(model, 0.5, 0.1, embedding_lr_factor=4.0)
    wrapped: Any = model
    if wrap == "compiled layers":
        layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
        for index, layer in enumerate(layers):
            layers[index] = torch.compile(layer, backend="eager")
    else:
        wrapped = torch.compile(model, backend="eager") if wrap == "compiled" else nn.DataParallel(model)
    found = optimizer_param_groups(wrapped, 0.5, 0.1, embedding_lr_factor=4.0)
    assert len({group["lr"] for group in expected}) > 2

    def by_parameter(groups: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
        return {id(value): (group["lr"], group["weight_decay"]) for group in groups for value in group["params"]}

    assert by_parameter(found) == by_parameter(expected)
