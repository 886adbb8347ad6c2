"""Products with 2:4 matrices: what is refused, and gradients, whose products are dense, with the kernels replaced.

The kernels themselves are on GPUs alone: benchmarks/semi_structured.py checks them there.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseift_llm.ops import semi_structured
from sparseift_llm.ops.masked_weight import masked_weight
from sparseift_llm.ops.semi_structured import check_device, check_pattern, semi_structured_linear
from sparseift_llm.topology.groups import InputGroups
from sparseift_llm.topology.transposable import TransposableBlocks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """The dense product in place of the kernels, in any dtype; gives the dtypes of the weights that were compressed."""
    seen: list[torch.dtype] = []

    def compress(weight: Tensor) -> Tensor:
        seen.append(weight.dtype)
        return weight.detach().clone()

    monkeypatch.setattr(semi_structured, "compress", compress)
    monkeypatch.setattr(semi_structured, "check_device", lambda device, dtype: None)
    return seen


def operands(dtype: torch.dtype, transposable: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (2, 3, 64), a 2:4 weight (128, 64) with its mask, and a bias."""
    torch.manual_seed(0)
    groups = TransposableBlocks(2, 4) if transposable else InputGroups(0, 128 * 16)
    mask = groups.first_mask(torch.Size((128, 64)), 128 * 32, 0)
    weight = torch.randn(128, 64, dtype=dtype).masked_fill(~mask, 0)
    return torch.randn(2, 3, 64, dtype=dtype), weight, mask, torch.randn(128, dtype=dtype)


def _masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, transposable: bool) -> Tensor:
    return semi_structured_linear(x, masked_weight(weight, mask), bias, transposable)


# dynamo's own warning, about any autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("has_bias", [True, False])
def test_output_and_gradients_are_the_dense_ones(
    without_kernels: list[torch.dtype], has_bias: bool, transposable: bool, compiled: bool
) -> None:
    """Of a compiled product as well, which is one graph."""
    x, weight, mask, bias = operands(torch.float64, transposable)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    others = [t.clone().requires_grad_() for t in (x, weight, bias)]
    linear = torch.compile(_masked_linear, fullgraph=True, backend="aot_eager") if compiled else _masked_linear
    y = linear(leaves[0], leaves[1], mask, leaves[2] if has_bias else None, transposable)
    expected = F.linear(others[0], others[1], others[2] if has_bias else None)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous()
    gradient = torch.randn_like(expected)
    y.backward(gradient)
    expected.backward(gradient)
    assert len(without_kernels) == (2 if transposable else 1)
    torch.testing.assert_close(leaves[0].grad, others[0].grad)
    assert others[1].grad is not None
    torch.testing.assert_close(leaves[1].grad, others[1].grad * mask)
    assert (leaves[2].grad is None) == (not has_bias)
    if has_bias:
        torch.testing.assert_close(leaves[2].grad, others[2].grad)


def test_another_matrix_in_place_of_the_transpose_is_seen(
    without_kernels: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the comparison must catch, in the backward pass, whose product has no bias."""
    product = semi_structured._product

    def wrong(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight.flip(0) if bias is None else weight, bias)

    monkeypatch.setattr(semi_structured, "_product", wrong)
    with pytest.raises(AssertionError):
        test_output_and_gradients_are_the_dense_ones(without_kernels, True, True, False)


def test_frozen_operands_get_no_gradient(without_kernels: list[torch.dtype]) -> None:
    x, weight, _, bias = operands(torch.float64)
    x.requires_grad_()
    semi_structured_linear(x, weight, bias).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_a_second_derivative_is_an_error_and_no_wrong_number(without_kernels: list[torch.dtype]) -> None:
    x, weight, _, _ = operands(torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(semi_structured_linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_autocast_compresses_in_its_dtype_and_gradients_have_that_of_the_parameters(
    without_kernels: list[torch.dtype],
) -> None:
    x, weight, mask, bias = operands(torch.float32)
    leaf = weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = semi_structured_linear(x, masked_weight(leaf, mask), bias)
        expected = F.linear(x, weight, bias)
    y.sum().backward()
    assert without_kernels == [torch.bfloat16]
    assert y.dtype == expected.dtype == torch.bfloat16
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float32
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("pattern", [(1, 4), (2, 8), (4, 8), (1, 2)])
def test_other_patterns_are_refused(pattern: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"2:4 alone, not {pattern[0]}:{pattern[1]}; .* structure='2:4'"):
        check_pattern(pattern, (64, 64))


@pytest.mark.parametrize("shape", [(64, 72), (72, 64), (1092, 768)])
def test_sides_are_refused_that_the_kernels_cannot_take(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"multiples of 16, not {shape[0]} x {shape[1]}; .* width_multiple=16"):
        check_pattern((2, 4), shape)
    check_pattern((2, 4), (48, 80))


def test_other_devices_and_dtypes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"NVIDIA GPU, and the model is on cpu; .* dense, with its zeros"):
        check_device(CPU, torch.bfloat16)
    with pytest.raises(ValueError, match="the model is on cpu"):
        semi_structured_linear(*operands(torch.float32)[:2])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(ValueError, match=r"compute capability 8\.0 .* Tesla V100 has 7\.0"):
        check_device(CUDA, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match=r"float16 or bfloat16, not in float32; .* autocast"):
        check_device(CUDA, torch.float32)
    check_device(CUDA, torch.bfloat16)
