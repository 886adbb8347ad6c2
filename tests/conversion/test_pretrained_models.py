"""Models made with `init="pretrained"`: counts, records, training, checkpoints, seeds, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparseift_llm import (
    DSTConfig,
    SparseIFTConfig,
    SparseTrainingController,
    load_pretrained,
    optimizer_param_groups,
    plan,
    sparsify,
)
from sparseift_llm.checkpoints.mask_file import masks_of
from sparseift_llm.conversion.from_trained import start_from
from sparseift_llm.layers.base import sparse_layers
from tests.helpers.models import logits_of, tiny_config, tiny_model, token_ids
from tests.helpers.pretrained_starts import (
    FAMILIES,
    STORAGES,
    dense_model,
    every_family,
    every_structure,
    ffn_matrices,
    started,
)


@every_family
@every_structure
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_counts_records_training_and_checkpoints(family: str, structure: str, arch: str, tmp_path: Path) -> None:
    dst = DSTConfig("rigl", update_every_steps=2, drop_fraction=0.5)
    dense = dense_model(arch)
    before = copy.deepcopy(dense.state_dict())
    model = started(dense, family, structure, dst=dst)
    assert all(torch.equal(dense.state_dict()[name], value) for name, value in before.items())
    assert model.config.sparse_ift["transformation"]["init"] == "pretrained"
    planned = {
        layer.path_of(matrix): matrix.num_active
        for layer in plan(dense, SparseIFTConfig(init="pretrained", **FAMILIES[family], **STORAGES[structure])).layers
        for matrix in layer.matrices
        if matrix.is_sparse
    }
    assert {name: layer.count_active() for name, layer in sparse_layers(model).items()} == planned
    optimizer = torch.optim.AdamW(optimizer_param_groups(model, 1e-2))
    controller = SparseTrainingController(model, optimizer, 20)
    masks = {name: layer.current_mask().clone() for name, layer in sparse_layers(model).items()}
    losses = []
    for _ in range(5):
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    controller.close()
    assert losses[-1] < losses[0]
    assert any(not torch.equal(layer.current_mask(), masks[name]) for name, layer in sparse_layers(model).items())
    assert {name: layer.count_active() for name, layer in sparse_layers(model).items()} == planned
    model.eval().save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.sparse_ift["transformation"]["init"] == "pretrained"
    assert torch.equal(logits_of(loaded), logits_of(model))


@every_family
def test_gradual_pruning_starts_as_the_dense_model(family: str) -> None:
    dense = dense_model()
    sparse = started(dense, family, dst=DSTConfig("gmp"))
    if family == "factorized, sparse u only":  # its inner side is narrower than the rank
        return
    assert all(bool(layer.current_mask().all()) for layer in sparse_layers(sparse).values())
    torch.testing.assert_close(logits_of(sparse), logits_of(dense), rtol=1e-8, atol=1e-10)


@every_family
def test_it_depends_on_weights_and_seed_alone(family: str) -> None:
    dense, models = dense_model(), []
    for global_seed, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(global_seed)
        model = started(dense, family, seed=seed)
        models.append({**model.state_dict(), **masks_of(model)})
    same, other = ([torch.equal(models[0][name], model[name]) for name in model] for model in models[1:])
    assert all(same)
    assert all(other) == (family == "doped")  # which draws nothing


@every_family
@every_structure
def test_bfloat16(family: str, structure: str) -> None:
    model = started(dense_model("llama", torch.bfloat16), family, structure)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_frozen_layers_stay_frozen() -> None:
    dense = dense_model()
    for module in ffn_matrices(dense).values():
        for parameter in module.parameters():
            parameter.requires_grad_(False)
    for family in ("wide", "doped"):
        for name, parameter in started(dense, family).named_parameters():
            assert parameter.requires_grad == (".mlp." not in name), name


# ---- refusals


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"cannot widen heads.*use scope='ffn' or 'residual', or family='parallel'"),
        ({"family": "parallel"}, r"family='parallel' has nonlinearity='layernorm'.*use nonlinearity='none'"),
        ({"family": "factorized", "nonlinearity": "gelu"}, "'factorized' has nonlinearity='gelu'"),
        ({"family": "factorized", "nonlinearity": "layernorm"}, "'factorized' has nonlinearity='layernorm'"),
        ({"family": "doped", "rules": [{"family": "parallel", "targets": ["o"]}]}, "'parallel' has nonlinearity='laye"),
    ],
)
def test_what_cannot_start_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseIFTConfig.from_dict({"init": "pretrained", **values})


def test_weights_are_needed() -> None:
    config = SparseIFTConfig(init="pretrained", family="doped")
    with pytest.raises(ValueError, match="needs a model with weights, got GPT2Config"):
        sparsify(tiny_config("gpt2"), config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("gpt2"))
    with pytest.raises(ValueError, match="on the meta device"):
        sparsify(model, config)
    assert plan(tiny_config("gpt2"), config).ratio_linear == 1  # costs can be asked for before


def test_a_projection_without_a_start_is_an_error() -> None:
    config, dense = SparseIFTConfig(scope="ffn", init="pretrained"), tiny_model("gpt2")
    result = plan(dense, config)
    layers = tuple(replace(layer, kind="new") for layer in result.record.layers)
    unknown = replace(result.record, layers=layers)
    with pytest.raises(ValueError, match=r"no start for transformer\.h\.0\.mlp\.c_fc\.weight"):
        start_from(dense, sparsify(dense, config), unknown)


def test_a_parameter_without_a_start_is_an_error() -> None:
    config = SparseIFTConfig(scope="ffn", init="pretrained")
    other = tiny_model("gpt2", vocab_size=120)
    with pytest.raises(ValueError, match=r"no start for transformer\.wte\.weight of shape \(120, 32\)"):
        start_from(tiny_model("gpt2"), sparsify(other, config), plan(other, config).record)
