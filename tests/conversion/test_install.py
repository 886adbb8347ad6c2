"""Layers installed from specifications: what does not fit the model, or cannot be built, is an error that names it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import PreTrainedModel

from sparseift_llm import SparseIFTConfig
from sparseift_llm.conversion.install import install_sparse_layers, remove_sparse_layers
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.models.architectures import build_model
from sparseift_llm.planning.planner import plan_of_dense
from sparseift_llm.record.specs import LayerSpec
from tests.helpers.models import tiny_config

FC = "transformer.h.0.mlp.c_fc"


def stock_and_layers(family: str = "wide", **options: Any) -> tuple[PreTrainedModel, tuple[LayerSpec, ...]]:
    """A stock model of the planned widths on the meta device, and its specifications."""
    result = plan_of_dense(tiny_config("gpt2"), SparseIFTConfig(family=family, **options))
    return build_model(result.hf_config, meta=True), result.layers


def changed(layers: tuple[LayerSpec, ...], which: str = FC, **changes: Any) -> list[LayerSpec]:
    return [dataclasses.replace(layer, **changes) if layer.name == which else layer for layer in layers]


def changed_matrix(layers: tuple[LayerSpec, ...], **changes: Any) -> list[LayerSpec]:
    (layer,) = [layer for layer in layers if layer.name == FC]
    first, *rest = layer.matrices
    return changed(layers, matrices=(dataclasses.replace(first, **changes), *rest))


def test_installing_and_removing() -> None:
    for family in ("wide", "parallel", "factorized", "doped"):
        options = {"nonlinearity": "none"} if family == "parallel" else {}
        model, layers = stock_and_layers(family, **options)
        before = {name: type(module) for name, module in model.named_modules()}
        install_sparse_layers(model, layers)
        expected = [layer.path_of(matrix) for layer in layers for matrix in layer.matrices if matrix.is_sparse]
        assert sorted(sparse_layers(model)) == sorted(expected)
        for layer in layers:
            for matrix in layer.matrices:
                module: Any = sparse_layers(model).get(layer.path_of(matrix))
                if module is not None:
                    assert (module.num_active, module.dense_shape) == (matrix.num_active, layer.dense_shape)
                    assert tuple(module.mask.shape) == (matrix.shape[::-1] if matrix.transposed else matrix.shape)
        remove_sparse_layers(model)
        assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("side", [0, 1])
def test_other_sides_than_the_specification_are_refused(side: int) -> None:
    """The widths of the config are checked by the record's own shapes, of layers that stay dense, too."""
    for options in ({}, {"targets": ("q", "k", "v")}):
        model, layers = stock_and_layers(**options)
        (layer,) = [layer for layer in layers if layer.name == FC]
        shape = [*layer.matrices[0].shape]
        shape[side] += 8
        message = (
            rf"record in the config of the model is damaged: it stands for {FC} of {shape[0]} x {shape[1]}, but the"
        )
        with pytest.raises(ValueError, match=message):
            install_sparse_layers(model, changed_matrix(layers, shape=tuple(shape)))


def test_a_drop_in_family_keeps_the_sides_of_the_dense_projection() -> None:
    model, layers = stock_and_layers("doped")
    with pytest.raises(ValueError, match=rf"it stands for {FC} of 136 x 32, but the config has 128 x 32"):
        install_sparse_layers(model, changed(layers, dense_shape=(136, 32)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transformer.h.7.mlp.c_fc", r"transformer\.h\.7\.mlp\.c_fc is not a module of GPT2LMHeadModel"),
        ("transformer.ln_f", r"transformer\.ln_f is not a projection in GPT2LMHeadModel, but a LayerNorm"),
    ],
)
def test_names_of_something_else_are_refused(name: str, message: str) -> None:
    model, layers = stock_and_layers()
    with pytest.raises(ValueError, match=message):
        install_sparse_layers(model, changed(layers, name=name))


def test_weights_stored_the_other_way_round_are_refused() -> None:
    model, layers = stock_and_layers()
    with pytest.raises(ValueError, match="has transposed=False, but is a Conv1D"):
        install_sparse_layers(model, changed_matrix(layers, transposed=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "embedding"}, "is not a projection in GPT2LMHeadModel, but a Conv1D"),
        ({"tied_to": "transformer.wte", "matrices": ()}, r"has a matrix tied to transformer\.wte .* cannot build"),
        (
            {"tied_to": "transformer.wte", "matrices": (), "kind": "logits"},
            "are not embedding and output head of",
        ),
    ],
)
def test_ends_that_are_no_ends_are_refused(changes: dict[str, Any], message: str) -> None:
    model, layers = stock_and_layers()
    with pytest.raises(ValueError, match=message):
        install_sparse_layers(model, changed(layers, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": "n:m", "pattern": (2, 4)}, f"{FC} has structure 'n:m'"),
    ],
)
def test_matrices_this_version_cannot_build_are_refused(changes: dict[str, Any], message: str) -> None:
    model, layers = stock_and_layers()
    with pytest.raises(
        ValueError, match=f"{message} .* cannot build; load the model with the version of sparseift_llm"
    ):
        install_sparse_layers(model, changed(changed_matrix(layers, **changes), kind="embedding"))  # type: ignore[arg-type]
    assert not sparse_layers(model)  # all are checked before the first is installed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "hashed"}, "family='hashed' is not one of"),
        ({"options": {"rank": 3}}, "options: unknown key 'rank'"),
        ({"options": {"nonlinearity": "relu"}}, "nonlinearity='relu' is not one of"),
    ],
)
def test_unknown_families_and_options_are_refused(changes: dict[str, Any], message: str) -> None:
    model, layers = stock_and_layers("factorized")
    with pytest.raises(ValueError, match=f"{FC} cannot be built as family .*{message}.*that saved it"):
        install_sparse_layers(model, changed(layers, **changes))


def test_matrices_of_another_family_are_refused() -> None:
    model, layers = stock_and_layers("factorized")
    with pytest.raises(ValueError, match=f"{FC} cannot be built as family 'doped'"):
        install_sparse_layers(model, changed(layers, family="doped", options={}))
