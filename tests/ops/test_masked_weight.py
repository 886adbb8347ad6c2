"""The autograd function of unstructured sparsity against a float64 reference, each check with a planted fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseift_llm.ops.dense_gradient import DenseGradient
from sparseift_llm.ops.masked_weight import _MaskedGradient, masked_weight

INF = float("inf")


def sparse_pair(shape: tuple[int, ...], density: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float64 weight that is 0 where its mask is, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    return torch.randn(shape, generator=generator, dtype=torch.float64) * mask, mask


def check_gradient(weight: Tensor, mask: Tensor, upstream: Tensor) -> None:
    """The result is the weight itself, its gradient `upstream` times the mask."""
    ours, reference = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    result = masked_weight(ours, mask)
    assert torch.equal(result, weight)
    (result * upstream).sum().backward()
    (reference * mask * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, reference.grad, rtol=0, atol=0)
    assert ours.grad is not None
    assert torch.equal(ours.grad[~mask], torch.zeros_like(ours.grad[~mask]))


def check_sink(weight: Tensor, mask: Tensor, upstreams: list[Tensor]) -> None:
    """The sink holds the sum of the unmasked gradients."""
    sink = DenseGradient()
    leaf = weight.clone().requires_grad_()
    for upstream in upstreams:
        (masked_weight(leaf, mask, sink) * upstream).sum().backward()
    torch.testing.assert_close(sink.total, torch.stack(upstreams).sum(0), rtol=1e-14, atol=1e-14)


def two_upstreams(shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=3), st.floats(0, 1), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_gradient_is_masked_over_shapes_and_sparsities(shape: list[int], density: float, seed: int) -> None:
    weight, mask = sparse_pair(tuple(shape), density, seed)
    check_gradient(weight, mask, torch.randn(shape, dtype=torch.float64))


@given(st.integers(1, 5), st.integers(1, 5), st.floats(0, 1))
@settings(deadline=None, max_examples=20)
def test_sink_collects_the_dense_gradient_of_all_micro_batches(rows: int, columns: int, density: float) -> None:
    check_sink(*sparse_pair((rows, columns), density), two_upstreams((rows, columns)))


Gradients = tuple[Tensor, None, None, Tensor | None]  # of weight, mask, sink, and the sink's leaf


def unmasked_backward(ctx: Any, gradient: Tensor) -> Gradients:
    return gradient, None, None, None


def sink_after_the_mask(ctx: Any, gradient: Tensor) -> Gradients:
    (mask,) = ctx.saved_tensors
    masked = torch.where(mask, gradient, 0)
    return masked, None, None, masked


def sink_keeps_the_last(ctx: Any, gradient: Tensor) -> Gradients:
    (mask,) = ctx.saved_tensors
    ctx.sink.total = None
    return torch.where(mask, gradient, 0), None, None, gradient


def inverted_mask(ctx: Any, gradient: Tensor) -> Gradients:
    (mask,) = ctx.saved_tensors
    return torch.where(mask, 0, gradient), None, None, None


@pytest.mark.parametrize("fault", [unmasked_backward, inverted_mask])
def test_planted_fault_in_the_gradient_is_found(fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_MaskedGradient, "backward", staticmethod(fault))
    with pytest.raises(AssertionError):
        check_gradient(*sparse_pair((4, 3), 0.5), two_upstreams((4, 3))[0])


@pytest.mark.parametrize("fault", [sink_after_the_mask, sink_keeps_the_last])
def test_planted_fault_in_the_sink_is_found(fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_MaskedGradient, "backward", staticmethod(fault))
    with pytest.raises(AssertionError):
        check_sink(*sparse_pair((4, 3), 0.5), two_upstreams((4, 3)))


def test_infinite_gradient_of_an_inactive_weight_does_not_become_nan() -> None:
    weight = torch.tensor([1.0, 0.0, 0.0, 2.0], requires_grad=True)
    mask = torch.tensor([True, False, False, True])
    masked_weight(weight, mask).backward(torch.tensor([3.0, INF, float("nan"), -INF]))
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0, 0.0, 0.0, -INF]


def test_overflow_of_an_inactive_weight_is_seen_on_steps_that_need_it() -> None:
    """In float16 a gradient scaler has to skip such a step: the mask update could not rank what overflowed."""
    weight = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    masked_weight(weight, weight != 0, DenseGradient()).backward(torch.tensor([3.0, INF, 2.0]))
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0, INF, 0.0]


def test_sink_sums_in_float32_below_bfloat16() -> None:
    """256 + 1 = 257 has no bfloat16: summed there it would be 256."""
    weight = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    sink = DenseGradient()
    for upstream in (256.0, 1.0):
        masked_weight(weight, torch.tensor([True]), sink).backward(torch.tensor([upstream], dtype=torch.bfloat16))
    assert sink.total is not None
    assert sink.total.dtype == torch.float32
    assert sink.total.item() == 257.0
    assert weight.grad is not None
    assert weight.grad.item() == 256.0  # what bfloat16 makes of it


def test_sink_does_not_alias_the_gradient_it_was_given() -> None:
    gradient = torch.ones(2)
    sink = DenseGradient()
    sink.add(gradient)
    gradient.zero_()
    sink.add(torch.full((2,), 3.0))
    assert sink.total is not None
    assert sink.total.tolist() == [4.0, 4.0]


def test_gradcheck_on_the_active_subspace() -> None:
    """Numerical differentiation moves the active weights only, as training does."""
    mask = torch.tensor([[True, False, True], [False, True, True]])
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    active = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def loss(active: Tensor, x: Tensor) -> Tensor:
        weight = torch.zeros(2, 3, dtype=torch.float64).masked_scatter(mask, active)
        return torch.tanh(x @ masked_weight(weight, mask).T)

    assert torch.autograd.gradcheck(loss, (active, x))


def test_no_gradient_is_recorded_without_grad_mode() -> None:
    weight, mask = sparse_pair((2, 2), 0.5)
    sink = DenseGradient()
    with torch.no_grad():
        result = masked_weight(weight.requires_grad_(), mask, sink) @ torch.ones(2, dtype=torch.float64)
    assert not result.requires_grad
    assert sink.total is None
