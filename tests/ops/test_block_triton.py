"""The Triton kernels against a float64 dense product with the same zeros, in Triton's interpreter where no GPU is.

What the compiler makes of them is in test_block_triton_compile.py, their choices are in test_block_triton_choices.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseift_llm.ops.kernels import triton_code, triton_launch, triton_tuning
from sparseift_llm.ops.kernels.triton import TRITON
from sparseift_llm.topology.blocks import by_column
from tests.helpers.block_triton_cases import CHECKS, DEVICE, DTYPES, Problem, check, check_forward, problem, run

triton = pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(autouse=True)
def one_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning every little shape takes minutes on a GPU, and the interpreter has one configuration only."""
    for kernel in (triton_tuning.product, triton_tuning.weight_gradient):
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])


def test_the_kernels_run_here() -> None:
    assert TRITON.is_available(), "no GPU: TRITON_INTERPRET must be set before triton is imported"


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    first_column = draw(st.integers(0, columns - 1))
    return problem(
        draw(st.sampled_from((16, 32))),
        rows,
        columns,
        draw(st.integers(0, rows * (columns - first_column))),
        draw(st.integers(0, 70)),
        draw(st.sampled_from(DTYPES)),
        bias=draw(st.booleans()),
        first_column=first_column,
        seed=draw(st.integers(0, 1000)),
    )


@given(problems())
@settings(max_examples=30)
def test_products_equal_the_dense_reference(given: Problem) -> None:
    check(given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tile", "slots"), [(16, 13), (32, 7), (64, 5), (128, 3), (256, 3)])
def test_every_tile_size_and_dtype(tile: int, slots: int, dtype: torch.dtype) -> None:
    """Rows are uneven, and tiles of 256 are split over programs."""
    check(problem(tile, 2, slots // 2 + 2, slots, 37, dtype))


@pytest.mark.usefixtures("sums_in_order")
@pytest.mark.parametrize("token_block", [128, 256])
def test_every_tuned_token_block(token_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(16, 2, 3, 5, 2 * token_block + 3)
    first = run(given)
    configs = [triton.Config({"token_block": token_block}, num_warps=8, num_stages=3)]
    monkeypatch.setattr(triton_tuning.product, "configs", configs)
    check(given)
    assert all(torch.equal(first[name], value) for name, value in run(given).items()), "configurations differ in bits"


@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("tile", [16, 64])
def test_thin_products(tile: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of 64 is split over two programs here."""
    configs = [triton.Config({"token_block": triton_tuning.THIN}, num_warps=4, num_stages=4)]
    monkeypatch.setattr(triton_tuning.product, "configs", configs)
    check(problem(tile, 2, 3, 5, tokens, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "pieces"), [(200, 3), (290, 2)])
def test_weight_gradients_summed_in_pieces_of_the_tokens(
    tokens: int, pieces: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_launch, "token_pieces", lambda programs, tokens: pieces)
    given = problem(32, 2, 3, 5, tokens, dtype)
    gradient = run(given)["weight_gradient"]
    CHECKS["weight_gradient"](given, gradient)
    assert torch.equal(gradient, run(given)["weight_gradient"])
    monkeypatch.setattr(triton_code, "add_pieces_kernel", OnlyTheFirstPiece())
    with pytest.raises(AssertionError, match="error"):
        CHECKS["weight_gradient"](given, run(given)["weight_gradient"])


@pytest.mark.usefixtures("sums_in_order")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tile", "rows", "slots"), [(16, 2, 5), (16, 3, 1), (32, 2, 8), (256, 2, 3)])
def test_weight_gradients_of_two_tiles_in_a_program(
    tile: int, rows: int, slots: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even and odd numbers of tiles in a block-row, and none."""
    given = problem(tile, rows, slots // rows + 2, slots, 37, dtype)
    single = run(given)["weight_gradient"]
    config = triton.Config({"paired": 1}, num_warps=8, num_stages=3)
    monkeypatch.setattr(triton_tuning.weight_gradient, "configs", [config])
    paired = run(given)["weight_gradient"]
    CHECKS["weight_gradient"](given, paired)
    assert torch.equal(single, paired), "configurations differ in bits"


class OnlyTheFirstPiece:
    """A planted fault in the place of the kernel that adds pieces."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda sums, gradient, *rest, **options: gradient.copy_(sums[0])


def test_many_token_blocks_pass_through_the_outputs_in_groups_of_eight() -> None:
    check(problem(16, 3, 2, 5, 64 * 10 + 1))


def test_no_tokens() -> None:
    given = problem(16, 2, 3, 5, 0)
    results = run(given)
    assert results["forward"].shape == (0, 32)
    assert results["input_gradient"].shape == (0, 48)
    assert torch.equal(results["weight_gradient"], torch.zeros_like(given.weight))


def test_empty_block_rows_give_the_bias_and_empty_block_columns_no_gradient() -> None:
    given = problem(16, 3, 4, 1, 5, first_column=2)
    results = run(given)
    assert given.rows() == [2]
    assert given.bias is not None
    assert torch.equal(results["forward"][:, :32], given.bias[:32].expand(5, 32))
    assert torch.equal(results["input_gradient"][:, :32], torch.zeros(5, 32, device=DEVICE))
    assert torch.equal(run(replace(given, bias=None))["forward"][:, :32], torch.zeros(5, 32, device=DEVICE))
    check(given)


def test_no_tiles_at_all() -> None:
    given = problem(16, 2, 2, 0, 3)
    assert run(given)["weight_gradient"].shape == (0, 16, 16)
    check(given)


def inside_nan(matrix: Tensor) -> Tensor:
    """A view of the same values with unit inner stride, surrounded by nan that no kernel may read."""
    tokens, width = matrix.shape
    surrounding = torch.full((tokens + 9, width + 48), torch.nan, dtype=matrix.dtype, device=DEVICE)
    view = surrounding[4 : tokens + 4, 16 : width + 16]
    return view.copy_(matrix)


def with_inner_stride(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous().T


def one_row_for_all(matrix: Tensor) -> Tensor:
    """As the gradient of a sum: every row is the same memory."""
    return matrix[:1].expand(matrix.shape)


@pytest.mark.parametrize("layout", [inside_nan, with_inner_stride, one_row_for_all])
@pytest.mark.parametrize("tile", [16, 64])
def test_strided_activations_and_gradients(tile: int, layout: Callable[[Tensor], Tensor]) -> None:
    given = problem(tile, 2, 3, 5, 19)
    check(replace(given, x=layout(given.x), grad=layout(given.grad)))


def test_non_contiguous_weight() -> None:
    given = problem(16, 2, 3, 5, 7)
    check(replace(given, weight=given.weight.mT.contiguous().mT))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # of the interpreter's numpy
def test_an_infinity_reaches_only_the_outputs_that_use_it() -> None:
    """A masked number must be 0 on both sides of the product: 0 times infinity is nan."""
    given = problem(16, 2, 3, 3, 5)
    given = replace(
        given,
        columns=torch.tensor([1, 0, 2], dtype=torch.int32, device=DEVICE),
        by_column=by_column(torch.tensor([1, 0, 2], dtype=torch.int32, device=DEVICE), 2, 3),
    )
    assert given.rows() == [0, 1, 1]
    infinite = replace(given, x=given.x.clone(), grad=given.grad.clone())
    infinite.x[:, 0], infinite.grad[:, 0] = torch.inf, torch.inf
    expected, results = run(given), run(infinite)
    assert torch.equal(results["forward"][:, :16], expected["forward"][:, :16])
    assert not results["forward"][:, 16:].isfinite().any()
    assert torch.equal(results["input_gradient"][:, :16], expected["input_gradient"][:, :16])
    assert not results["input_gradient"][:, 16:32].isfinite().any()
    assert torch.equal(results["weight_gradient"][2], expected["weight_gradient"][2])


def test_tiles_beyond_those_given_are_not_read() -> None:
    given = problem(16, 2, 3, 3, 5)
    surrounding = torch.full((9, 16, 16), torch.nan, device=DEVICE)
    check(replace(given, weight=surrounding[3:6].copy_(given.weight)))


@pytest.mark.parametrize("tokens", [1, 65])
def test_every_number_of_the_results_is_written_and_none_beside_them(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers: list[Tensor] = []

    def poisoned(shape: tuple[int, ...], **kwargs: Any) -> Tensor:
        size = torch.Size(shape).numel()
        buffers.append(torch.full((size + 20000,), torch.nan, **kwargs))
        return buffers[-1][10000 : 10000 + size].view(shape)

    given = problem(16, 3, 4, 2, tokens, first_column=2)
    monkeypatch.setattr(torch, "empty", poisoned)
    results = run(given)
    assert [result.data_ptr() for result in results.values()] == [buffer[10000:].data_ptr() for buffer in buffers]
    for result, buffer in zip(results.values(), buffers, strict=True):
        assert not result.isnan().any()
        assert buffer.isnan().sum() == 20000


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    given = problem(32, 3, 4, 8, 150, dtype)
    first, second = run(given), run(given)
    for name in first:
        assert torch.equal(first[name], second[name])


def test_offsets_beyond_two_to_the_31(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows, 2**30 numbers apart, in a sparse file of which only these rows are ever touched."""
    if DEVICE == "cpu":  # the interpreter would copy the whole storage onto itself
        monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda self, *_: self)
        storage = torch.from_file(str(tmp_path / "rows"), shared=True, size=2**31 + 32, dtype=torch.float16)
    else:
        storage = torch.empty(2**31 + 32, dtype=torch.float16, device=DEVICE)
    given = problem(16, 2, 2, 3, 3, torch.float16)
    x = storage.as_strided((3, 32), (2**30, 1)).copy_(given.x)
    check(replace(given, x=x))
    check(replace(given, grad=x.copy_(given.grad)))


def last_slot_skipped(given: Problem) -> Problem:
    starts = given.by_column.starts.clone()
    starts[-1] -= 1
    weight = given.weight.clone()
    weight[-1] = 0
    return replace(given, weight=weight, by_column=given.by_column._replace(starts=starts))


def columns_shifted(given: Problem) -> Problem:
    tables = given.by_column
    return replace(given, columns=given.columns.roll(1), by_column=tables._replace(slots=tables.slots.roll(1)))


def tiles_transposed(given: Problem) -> Problem:
    return replace(given, weight=given.weight.mT.contiguous())


def last_token_lost(given: Problem) -> Problem:
    x, grad = given.x.clone(), given.grad.clone()
    x[-1], grad[-1] = 0, 0
    return replace(given, x=x, grad=grad)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((name, fault) for name in CHECKS for fault in (columns_shifted, last_token_lost)),
        *((name, fault) for name in ("forward", "input_gradient") for fault in (last_slot_skipped, tiles_transposed)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planted_fault_is_found(name: str, fault: Callable[[Problem], Problem], dtype: torch.dtype) -> None:
    given = problem(16, 2, 3, 5, 19, dtype)
    CHECKS[name](given, run(given)[name])
    with pytest.raises(AssertionError, match="error"):
        CHECKS[name](given, run(fault(given))[name])


def test_a_partial_sum_in_bfloat16_is_found() -> None:
    """The bound tells a sum that is float32 throughout from one that goes through bfloat16 on the way."""
    given = problem(16, 2, 9, 18, 40, torch.bfloat16, bias=False)
    odd = torch.arange(144, device=DEVICE) % 2
    halves = [run(replace(given, x=given.x * part))["forward"] for part in (odd, 1 - odd)]
    with pytest.raises(AssertionError, match="error"):
        check_forward(given, halves[0] + halves[1])
