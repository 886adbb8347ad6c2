"""Block-sparse products of every kernel against a float64 dense matrix with the same zeros, and as an operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from sparseift_llm.ops.block_linear import block_input_gradient_op, block_linear_op, block_weight_gradient_op
from sparseift_llm.ops.kernels.blas import BLAS
from sparseift_llm.ops.kernels.choice import KERNELS, use_block_kernel
from sparseift_llm.ops.kernels.reference import REFERENCE
from sparseift_llm.topology import blocks
from tests.helpers.block_cases import LAYOUTS, NEEDS_COMPILER, Case, check, errors, make_case

every_kernel = pytest.mark.parametrize("kernel", ["reference", "blas", pytest.param("native", marks=NEEDS_COMPILER)])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return make_case(
        tokens=draw(st.sampled_from([0, 1, 2, 3, 5, 6, 7, 12, 13, 23, 24, 25, 33, 239, 241, 481, 613])),
        rows=rows,
        columns=columns,
        num_tiles=draw(st.integers(1, rows * columns)),
        size=draw(st.sampled_from([4, 8, 16, 32])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**20)),
    )


@every_kernel
@settings(max_examples=60)
@given(case=cases())
def test_products_equal_the_dense_ones(kernel: str, case: Case) -> None:
    check(case, KERNELS[kernel])


def test_half_precision_on_a_cpu() -> None:
    for tokens in (3, 37):
        check(make_case(tokens=tokens, dtype=torch.float16), BLAS)


@every_kernel
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_tiles(kernel: str, size: int, dtype: torch.dtype) -> None:
    check(make_case(tokens=250, rows=2, columns=3, num_tiles=3, size=size, dtype=dtype), KERNELS[kernel])


@every_kernel
@pytest.mark.parametrize("tokens", range(1, 14))
def test_few_tokens(kernel: str, tokens: int) -> None:
    check(make_case(tokens=tokens), KERNELS[kernel])


@every_kernel
@pytest.mark.parametrize(
    ("rows", "columns", "num_tiles"),
    [(4, 4, 2), (1, 6, 3), (6, 1, 4), (3, 4, 12)],
    ids=["empty rows and columns", "one row", "one column", "dense"],
)
def test_uneven_tilings(kernel: str, rows: int, columns: int, num_tiles: int) -> None:
    check(make_case(rows=rows, columns=columns, num_tiles=num_tiles), KERNELS[kernel])


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_memory_may_hold_anything_before(
    monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype
) -> None:
    """Fresh memory is often 0 by chance: with nan in it, an entry that no kernel writes shows."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def poisoned(*shape: Any, **options: Any) -> Tensor:
        tensor = empty(*shape, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(Tensor, "new_empty", lambda tensor, *shape: new_empty(tensor, *shape).fill_(torch.nan))
    for tokens in (0, 1, 47, 500):
        case = make_case(tokens=tokens, rows=4, columns=4, num_tiles=2, dtype=dtype)  # two rows have no tile
        check(case, KERNELS[kernel])


@every_kernel
@pytest.mark.parametrize("fault", ["column", "slot", "bias", "transposed tile", "last token"])
def test_faults_are_caught(kernel: str, fault: str) -> None:
    case = make_case()
    computed = case.computed(KERNELS[kernel])
    broken = make_case()
    if fault == "column":
        broken.columns = (case.columns + 1) % case.num_columns
    elif fault == "slot":
        broken.weight[-1] = 0
    elif fault == "bias":
        broken.bias = None
    elif fault == "transposed tile":
        broken.weight[0] = case.weight[0].T
    else:
        broken.x[-1] = 0
    assert max(errors(broken, computed).values()) > 100


@every_kernel
def test_partial_sums_in_bfloat16_are_caught(kernel: str) -> None:
    """Rounded 240 tokens at a time, a sum is off by no more than a few roundings of its result."""
    case = make_case(tokens=480, dtype=torch.bfloat16)
    grads, inputs = case.grad.split(240), case.x.split(240)
    parts = [KERNELS[kernel].weight_gradient(*pair, case.columns, 16) for pair in zip(grads, inputs, strict=True)]
    assert errors(case, {**case.computed(KERNELS[kernel]), "weight": parts[0] + parts[1]})["weight"] > 1


# ---- the operator


def operands(dtype: torch.dtype = torch.float64, tokens: int = 5, size: int = 4) -> tuple[Any, ...]:
    return operands_of(make_case(tokens=tokens, rows=2, columns=3, num_tiles=3, size=size, dtype=dtype))


def operands_of(case: Case) -> tuple[Any, ...]:
    assert case.bias is not None
    tensors = [tensor.clone().requires_grad_() for tensor in (case.x, case.weight, case.bias)]
    tables = blocks.by_column(case.columns, case.num_rows, case.num_columns)
    return (*tensors, case.columns, list(tables), case.out_features)


@pytest.fixture
def forced_kernel(request: pytest.FixtureRequest) -> Any:
    use_block_kernel(request.param)
    yield request.param
    use_block_kernel(None)


cpu_kernels = ["reference", "blas", pytest.param("native", marks=NEEDS_COMPILER)]
interpreted = pytest.param("triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter"))


@pytest.mark.parametrize("forced_kernel", cpu_kernels, indirect=True)
def test_gradcheck(forced_kernel: str) -> None:
    x, weight, bias, *rest = operands()
    assert torch.autograd.gradcheck(lambda *tensors: block_linear_op(*tensors, *rest), (x, weight, bias))


@pytest.mark.parametrize("forced_kernel", [*cpu_kernels, interpreted], indirect=True)
def test_opcheck(forced_kernel: str) -> None:
    given = operands(torch.float32, size=16)
    x, weight, _, columns, by_column, out_features = given
    torch.library.opcheck(block_linear_op, given)
    grad = torch.randn(len(x), out_features)
    torch.library.opcheck(block_input_gradient_op, (grad, weight.detach(), by_column, x.shape[1]))
    torch.library.opcheck(block_weight_gradient_op, (grad, x.detach(), weight.detach(), columns))


@pytest.mark.parametrize("forced_kernel", [*cpu_kernels, interpreted], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_operator(forced_kernel: str, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    x, weight, bias, *rest = operands_of(case)
    output = block_linear_op(x, weight, bias, *rest)
    output.backward(case.grad)
    found = errors(case, {"output": output.detach(), "input": x.grad, "weight": weight.grad})
    assert max(found.values()) <= (2 if forced_kernel == "triton" else 1), found  # the interpreter cuts bfloat16 off
    torch.testing.assert_close(bias.grad.double(), case.grad.double().sum(0), rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_gradcheck_notices_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REFERENCE, "weight_gradient", lambda grad, x, columns, size: x.new_ones(3, 4, 4))
    use_block_kernel("reference")
    try:
        x, weight, bias, *rest = operands()
        with pytest.raises(GradcheckError):
            torch.autograd.gradcheck(lambda *tensors: block_linear_op(*tensors, *rest), (x, weight, bias))
    finally:
        use_block_kernel(None)


def test_only_the_gradients_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("not needed")

    use_block_kernel("reference")
    try:
        x, weight, bias, *rest = operands()
        monkeypatch.setattr(REFERENCE, "input_gradient", refuse)
        block_linear_op(x.detach(), weight, bias, *rest).sum().backward()
        assert weight.grad is not None
        monkeypatch.undo()
        monkeypatch.setattr(REFERENCE, "weight_gradient", refuse)
        block_linear_op(x, weight.detach(), bias.detach(), *rest).sum().backward()
        assert x.grad is not None
    finally:
        use_block_kernel(None)
