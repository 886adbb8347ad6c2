"""Which gradients reach clipping, optimizers and RigL: exact under accumulation, compilation and checkpointing.

Each check of exactness is shown to fail on a planted fault.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

from sparseift_llm import DSTConfig, SparseTrainingController
from sparseift_llm.layers.base import SparseProjection, sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.ops.dense_gradient import DenseGradient
from tests.helpers.models import stored_part
from tests.helpers.tiny_runs import STORAGES, ToyModel, batches, dense_twin, differences, masks, sparse_gpt2, train

# ---- accumulation


def mask_history(num_micro: int) -> list[dict[str, Tensor]]:
    """Masks after each of 10 steps with batches of 8 rows, in `num_micro` parts each; updates at 2, 4, 6."""
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, total_steps=10)
    history: list[dict[str, Tensor]] = []
    train(model, optimizer, batches(10), num_micro, lambda: history.append(masks(model)))
    assert controller.counters()["step"] == 10
    assert controller.num_dense_gradient_steps == 3
    return history


def check_accumulation() -> None:
    reference = mask_history(1)
    assert [bool(differences(a, b)) for a, b in pairwise(reference)].count(True) == 3
    for num_micro in (2, 4, 8):
        assert not differences(reference, mask_history(num_micro))


@pytest.mark.support("gradient accumulation")
@pytest.mark.usefixtures("either_structure")
def test_masks_do_not_depend_on_accumulation() -> None:
    check_accumulation()


def keep_last(self: DenseGradient, gradient: Tensor) -> None:
    self.total = gradient.detach().clone()


def keep_first(self: DenseGradient, gradient: Tensor) -> None:
    self.total = gradient.detach().clone() if self.total is None else self.total


def sum_of_magnitudes(self: DenseGradient, gradient: Tensor) -> None:
    self.total = gradient.detach().abs() if self.total is None else self.total + gradient.detach().abs()


@pytest.mark.usefixtures("either_structure")
@pytest.mark.parametrize("fault", [keep_last, keep_first, sum_of_magnitudes])
def test_the_check_of_accumulation_catches_faults(fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenseGradient, "add", fault)
    with pytest.raises(AssertionError):
        check_accumulation()


# ---- against a dense model


def armed_model() -> nn.Module:
    """A model whose next backward passes capture dense gradients."""
    model = sparse_gpt2("rigl", every=1)
    SparseTrainingController(model, SGD(model.parameters(), lr=0.1), total_steps=100)
    return model


def dense_gradients(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """Gradients of a model of stock layers with the same weights."""
    dense = dense_twin(model)
    dense(input_ids=batch, labels=batch).loss.backward()
    return {name: value.grad for name, value in dense.named_parameters() if value.grad is not None}


def captured(layer: SparseProjection) -> Tensor:
    """The captured gradient in the layout of the stock weight."""
    assert layer.dense_gradient is not None
    assert layer.dense_gradient.total is not None
    total = layer.dense_gradient.total
    return total.T if isinstance(layer, BlockSparseLinear) and layer.is_conv1d else total


def check_captured(exact: bool) -> None:
    """Both what is captured and what reaches `.grad`: to the bit, or to rounding where kernels differ."""
    model, batch = armed_model(), next(batches(1))
    expected = dense_gradients(model, batch)
    model(input_ids=batch, labels=batch).loss.backward()
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-11, "atol": 1e-14}
    for name, layer in sparse_layers(model).items():
        dense = expected[f"{name}.weight"]
        torch.testing.assert_close(captured(layer), dense, **tolerance)
        active = stored_part(layer, dense)
        torch.testing.assert_close(layer.weight.grad, active, **tolerance)
        inactive_norm = (dense.square().sum() - active.square().sum()).sqrt()
        assert inactive_norm > 0.1 * dense.norm()  # a masked gradient would not pass


def test_the_dense_gradient_is_a_dense_models_gradient(either_structure: str) -> None:
    check_captured(exact="block_size" not in STORAGES[either_structure])


def without_first_row(self: DenseGradient, gradient: Tensor) -> None:
    """A fault: part of the gradient is lost."""
    self.total = gradient * (torch.arange(len(gradient)) > 0)[:, None]


def test_the_check_of_the_dense_gradient_catches_a_lost_part(
    either_structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DenseGradient, "add", without_first_row)
    with pytest.raises(AssertionError):
        check_captured(exact="block_size" not in STORAGES[either_structure])


def test_gradients_of_all_other_parameters_are_a_dense_models(either_structure: str) -> None:
    model, batch = armed_model(), next(batches(1))
    expected = dense_gradients(model, batch)
    model(input_ids=batch, labels=batch).loss.backward()
    sparse = {f"{name}.weight" for name in sparse_layers(model)}
    others = {name: value.grad for name, value in model.named_parameters() if name not in sparse}
    assert others
    if "block_size" not in STORAGES[either_structure]:
        assert not differences(others, {name: expected[name] for name in others})
    for name, gradient in others.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13)


@pytest.mark.support("activation checkpointing, reentrant or not")
@pytest.mark.usefixtures("either_structure")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # new name: 5.23
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_captures_once(use_reentrant: bool) -> None:
    model, batch = armed_model(), next(batches(1))
    expected = dense_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})  # type: ignore[operator]
    model.train()
    model(input_ids=batch, labels=batch).loss.backward()
    for name, layer in sparse_layers(model).items():
        torch.testing.assert_close(captured(layer), expected[f"{name}.weight"], rtol=1e-11, atol=1e-14)


def test_a_layer_used_twice_in_one_pass_sums_both_uses() -> None:
    toy = ToyModel(torch.ones(2, 4, dtype=torch.float64), torch.ones(2, 4, dtype=torch.bool), armed_config())
    SparseTrainingController(toy, SGD(toy.parameters(), lr=0.1), total_steps=100)
    first, second = torch.arange(8.0).view(2, 4).double(), torch.full((2, 4), -3.0).double()
    (toy.loss(first) + checkpoint(toy.loss, second, use_reentrant=False)).backward()
    assert toy.layer.dense_gradient is not None
    assert torch.equal(toy.layer.dense_gradient.total, first + second)  # type: ignore[arg-type]


def armed_config() -> DSTConfig:
    return DSTConfig("rigl", update_every_steps=1, stop_fraction=1.0)


# ---- clipping


@pytest.mark.usefixtures("either_structure")
@pytest.mark.parametrize("armed", [False, True])
def test_clipping_sees_masked_gradients_only(armed: bool) -> None:
    model, batch = sparse_gpt2("rigl", every=1 if armed else 50), next(batches(1))
    SparseTrainingController(model, SGD(model.parameters(), lr=0.1), total_steps=100)
    layers = sparse_layers(model)
    assert all((layer.dense_gradient is not None) == armed for layer in layers.values())
    gradients = dense_gradients(model, batch)
    unmasked = torch.stack([value.square().sum() for value in gradients.values()]).sum().sqrt()
    for name, layer in layers.items():
        gradients[f"{name}.weight"] = stored_part(layer, gradients[f"{name}.weight"])
    expected = torch.stack([value.square().sum() for value in gradients.values()]).sum().sqrt()
    assert unmasked > 1.01 * expected  # so that a norm of dense gradients would be noticed

    model(input_ids=batch, labels=batch).loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=expected.item() / 2)
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, gradients[name] / 2, rtol=1e-5, atol=1e-12)


# ---- compilation


@pytest.mark.support("torch.compile of the model")
@pytest.mark.usefixtures("either_structure")
# warnings of dynamo's own, about any autograd.Function and about any tensor it looks at
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_and_eager_runs_have_the_same_masks() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def run(compiled: bool) -> list[dict[str, Tensor]]:
        model = sparse_gpt2("rigl", every=3)
        wrapped = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = AdamW(model.parameters(), lr=0.01)
        SparseTrainingController(wrapped, optimizer, total_steps=10)  # type: ignore[arg-type]
        history: list[dict[str, Tensor]] = []
        train(wrapped, optimizer, batches(10), 2, lambda: history.append(masks(wrapped)))  # type: ignore[arg-type]
        return history

    eager = run(compiled=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    compiled = run(compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # ordinary steps did run compiled
    assert [bool(differences(a, b)) for a, b in pairwise(eager)].count(True) == 2
    assert not differences(eager, compiled)
