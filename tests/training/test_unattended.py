"""Models whose masks nobody looks after: a forgotten controller is named, and zeros are not filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from transformers import AutoModelForCausalLM

from sparseift_llm import SparseTrainingController, load_pretrained, to_dense
from sparseift_llm.layers.base import sparse_layers
from tests.conftest import tiny_models_of
from tests.helpers.residual import residual_model
from tests.helpers.tiny_runs import batches, differences, sparse_gpt2, train, weights_of

STEPS = 12
pytestmark = pytest.mark.usefixtures("either_structure")


@pytest.mark.parametrize(("algorithm", "warns"), [("rigl", True), ("set", True), ("gmp", True), ("static", False)])
@pytest.mark.parametrize("controlled", [True, False])
def test_a_forgotten_controller_is_named_at_the_first_step(
    algorithm: str, warns: bool, controlled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = sparse_gpt2(algorithm)
    optimizer = SGD(model.parameters(), lr=0.01)
    if controlled:
        SparseTrainingController(model, optimizer, STEPS)
    train(model, optimizer, batches(2))
    assert caplog.text.count("its masks will stay as they are") == int(warns and not controlled)


def test_a_forgotten_controller_of_a_loaded_model_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sparse_gpt2("rigl").save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    train(model, SGD(model.parameters(), lr=0.01), batches(1))
    assert "SparseTrainingCallback" in caplog.text


def test_training_something_else_is_no_ones_business(caplog: pytest.LogCaptureFixture) -> None:
    model = sparse_gpt2("rigl")
    train(model, SGD([model.get_input_embeddings().weight], lr=0.01), batches(1))  # type: ignore[union-attr, list-item]
    for layer in sparse_layers(model).values():
        layer.weight.requires_grad_(False)
    train(model, SGD(model.parameters(), lr=0.01), batches(1))
    assert "stay as they are" not in caplog.text


@pytest.mark.structures("unstructured")
def test_a_stock_model_does_not_fill_in_its_zeros(tmp_path: Path) -> None:
    sparse = sparse_gpt2("rigl")
    sparse.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert not sparse_layers(model)
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"c_attn.weight holds the zeros.*load_pretrained.*del model"):
        train(model, SGD(model.parameters(), lr=0.01), batches(1))
    assert not differences(before, weights_of(model))
    del model.config.sparse_ift
    train(model, SGD(model.parameters(), lr=0.01), batches(1))
    dense = to_dense(sparse)
    train(dense, SGD(dense.parameters(), lr=0.01), batches(1))


@pytest.mark.structures("unstructured")
@pytest.mark.parametrize("tied", [True, False])
def test_a_stock_model_whose_embedding_alone_is_trained_does_not_fill_in_its_zeros(tied: bool, tmp_path: Path) -> None:
    residual_model("llama", tied).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    embedding = model.get_input_embeddings().weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is embedding)
    with pytest.raises(ValueError, match=r"embed_tokens.weight holds the zeros"):
        train(model, SGD([embedding], lr=0.01), batches(1))


@pytest.mark.structures("unstructured")
def test_zeros_of_a_dense_embedding_are_no_masks(tmp_path: Path) -> None:
    """Those of channels that a start from a trained model has added, which training fills by right."""
    sparse = residual_model("llama", embedding="dense", sparsity=0.5, accounting="whole_model", seq_len=16)
    with torch.no_grad():
        sparse.get_input_embeddings().weight[:, ::2] = 0  # type: ignore[index]
    sparse.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    train(model, SGD([model.get_input_embeddings().weight], lr=0.01), batches(1))


def as_stock(folder: Path) -> Any:
    """A masked model, loaded as the stock model that its folder also is."""
    with tiny_models_of("unstructured"):
        sparse_gpt2("rigl").save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def test_a_stock_model_that_is_unfrozen_later_is_noticed(tmp_path: Path) -> None:
    model = as_stock(tmp_path)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    for matrix in matrices:
        matrix.requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=0.01)
    train(model, optimizer, batches(2))
    for matrix in matrices:
        matrix.requires_grad_(True)
    before = weights_of(model)
    for _ in range(2):  # an error that is caught comes again
        with pytest.raises(ValueError, match="holds the zeros"):
            train(model, optimizer, batches(1))
    assert not differences(before, weights_of(model))


def test_a_stock_model_that_is_added_to_a_used_optimizer_is_noticed(tmp_path: Path) -> None:
    model, other = as_stock(tmp_path), torch.nn.Parameter(torch.zeros(2))
    optimizer = SGD([other], lr=0.01)
    other.grad = torch.ones(2)
    optimizer.step()
    optimizer.add_param_group({"params": list(model.parameters())})
    with pytest.raises(ValueError, match="holds the zeros"):
        train(model, optimizer, batches(1))


def test_a_second_phase_without_a_controller_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = sparse_gpt2("rigl")
    optimizer = SGD(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, STEPS)
    train(model, optimizer, batches(2))
    controller.close()
    assert "stay as they are" not in caplog.text
    train(model, SGD(model.parameters(), lr=0.01), batches(2))
    assert caplog.text.count("its masks will stay as they are") == 1


def test_only_a_trained_projection_matters_in_a_stock_model(tmp_path: Path) -> None:
    """Embeddings alone may be trained, and models that had no zeros are none of ours."""
    with tiny_models_of("unstructured"):
        sparse_gpt2("rigl").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    train(model, SGD([model.get_input_embeddings().weight], lr=0.01), batches(1))
