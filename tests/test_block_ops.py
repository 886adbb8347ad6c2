"""Block-sparse products of every kernel against a float64 dense matrix with the same zeros."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from sparseift_llm.ops import block_blas, block_kernels, block_native, block_reference
from sparseift_llm.ops.block_kernels import kernel_name, use_block_kernel
from sparseift_llm.ops.block_linear import block_linear_op
from sparseift_llm.topology import blocks

KERNELS = {"reference": block_reference, "blas": block_blas, "native": block_native}
NEEDS_COMPILER = pytest.mark.skipif(not block_native.is_available(), reason="no C++ compiler")
every_kernel = pytest.mark.parametrize("kernel", ["reference", "blas", pytest.param("native", marks=NEEDS_COMPILER)])
# relative to the largest entry; bfloat16 keeps 8 bits, and rounds a result once
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3}


@dataclass
class Case:
    """Operands of one product, and the same matrix dense in float64."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    columns: Tensor
    grad: Tensor
    num_rows: int
    num_columns: int

    @property
    def block_size(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.num_rows * self.block_size

    @property
    def dense(self) -> Tensor:
        """(out, in), filled tile by tile with the slowest code there is."""
        size = self.block_size
        matrix = torch.zeros(self.out_features, self.num_columns * size, dtype=torch.float64)
        starts = [row * len(self.columns) // self.num_rows for row in range(self.num_rows + 1)]
        for row in range(self.num_rows):
            for slot in range(starts[row], starts[row + 1]):
                column = int(self.columns[slot])
                matrix[row * size : (row + 1) * size, column * size : (column + 1) * size] = self.weight[slot].double()
        return matrix

    def expected(self) -> dict[str, Tensor]:
        x, grad = self.x.double(), self.grad.double()
        bias = 0 if self.bias is None else self.bias.double()
        full = (grad.T @ x).view(self.num_rows, self.block_size, self.num_columns, self.block_size)
        rows = [((slot + 1) * self.num_rows - 1) // len(self.columns) for slot in range(len(self.columns))]
        tiles = [full[row, :, int(column)] for row, column in zip(rows, self.columns, strict=True)]
        return {"output": x @ self.dense.T + bias, "input": grad @ self.dense, "weight": torch.stack(tiles)}

    def computed(self, kernel: ModuleType) -> dict[str, Tensor]:
        order, starts = blocks.slots_by_column(self.columns, self.num_columns)
        in_features = self.num_columns * self.block_size
        return {
            "output": kernel.forward(self.x, self.weight, self.bias, self.columns, self.out_features),
            "input": kernel.input_gradient(self.grad, self.weight, order, starts, self.out_features, in_features),
            "weight": kernel.weight_gradient(self.grad, self.x, self.columns, self.block_size),
        }


def make_case(
    tokens: int = 37,
    rows: int = 3,
    columns: int = 5,
    num_tiles: int = 7,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    strided: bool = False,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def activation(width: int) -> Tensor:
        return normal(2 * tokens, width + 3)[::2, 1 : width + 1] if strided else normal(tokens, width)

    return Case(
        x=activation(columns * size),
        weight=normal(num_tiles, size, size),
        bias=normal(rows * size) if bias else None,
        columns=blocks.random_columns(rows, columns, num_tiles, seed),
        grad=activation(rows * size),
        num_rows=rows,
        num_columns=columns,
    )


def errors(case: Case, computed: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each product, relative to its largest entry; nan counts as infinite."""
    result = {}
    for name, expected in case.expected().items():
        assert computed[name].shape == expected.shape, name
        assert computed[name].dtype == case.x.dtype, name
        if expected.numel():
            scale = max(float(expected.abs().max()), 1e-30)
            difference = float((computed[name].double() - expected).abs().max()) / scale
            result[name] = difference if difference == difference else float("inf")
    return result


def check(case: Case, kernel: ModuleType) -> None:
    worst = max(errors(case, case.computed(kernel)).values(), default=0.0)
    assert worst <= TOLERANCE[case.x.dtype], errors(case, case.computed(kernel))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return make_case(
        tokens=draw(st.sampled_from([0, 1, 5, 23, 24, 25, 239, 241, 481, 613])),
        rows=rows,
        columns=columns,
        num_tiles=draw(st.integers(1, rows * columns)),
        size=draw(st.sampled_from([4, 8, 16, 32])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        bias=draw(st.booleans()),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


@every_kernel
@settings(max_examples=60)
@given(case=cases())
def test_products_equal_the_dense_ones(kernel: str, case: Case) -> None:
    check(case, KERNELS[kernel])


@every_kernel
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_tiles(kernel: str, size: int, dtype: torch.dtype) -> None:
    check(make_case(tokens=250, rows=2, columns=3, num_tiles=3, size=size, dtype=dtype), KERNELS[kernel])


@every_kernel
@pytest.mark.parametrize(
    ("rows", "columns", "num_tiles"),
    [(4, 4, 2), (1, 6, 3), (6, 1, 4), (3, 4, 12)],
    ids=["empty rows and columns", "one row", "one column", "dense"],
)
def test_uneven_tilings(kernel: str, rows: int, columns: int, num_tiles: int) -> None:
    check(make_case(rows=rows, columns=columns, num_tiles=num_tiles), KERNELS[kernel])


@NEEDS_COMPILER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_memory_may_hold_anything_before(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Fresh memory is often 0 by chance: with nan in it, an entry that no kernel writes shows."""
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> Tensor:
        tensor = empty(*shape, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    for tokens in (0, 1, 47, 500):
        case = make_case(tokens=tokens, rows=4, columns=4, num_tiles=2, dtype=dtype)  # two rows have no tile
        check(case, block_native)


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
    assert max(errors(broken, computed).values()) > 1e-2


@NEEDS_COMPILER
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_native_bfloat16_keeps_special_values(value: float) -> None:
    case = make_case(dtype=torch.bfloat16)
    case.x[3, :] = value
    output = block_native.forward(case.x, case.weight, None, case.columns, case.out_features)
    assert not output[3].isfinite().any()
    assert output[:3].isfinite().all()


@NEEDS_COMPILER
def test_native_results_do_not_depend_on_the_number_of_threads() -> None:
    case = make_case(tokens=700, rows=5, columns=5, num_tiles=12, size=32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(case.computed(block_native))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# ---- the operator


def operands(dtype: torch.dtype = torch.float64, tokens: int = 5, size: int = 4) -> tuple[Any, ...]:
    case = make_case(tokens=tokens, rows=2, columns=3, num_tiles=3, size=size, dtype=dtype)
    assert case.bias is not None
    tensors = [tensor.clone().requires_grad_() for tensor in (case.x, case.weight, case.bias)]
    return (*tensors, case.columns, *blocks.slots_by_column(case.columns, 3), 2 * size)


@pytest.fixture
def forced_kernel(request: pytest.FixtureRequest) -> Any:
    use_block_kernel(request.param)
    yield request.param
    use_block_kernel(None)


every_forced_kernel = pytest.mark.parametrize(
    "forced_kernel", ["reference", "blas", pytest.param("native", marks=NEEDS_COMPILER)], indirect=True
)


@every_forced_kernel
def test_gradcheck(forced_kernel: str) -> None:
    x, weight, bias, *rest = operands()
    assert torch.autograd.gradcheck(lambda *tensors: block_linear_op(*tensors, *rest), (x, weight, bias))


@every_forced_kernel
def test_opcheck(forced_kernel: str) -> None:
    torch.library.opcheck(block_linear_op, operands(torch.float32))


def test_gradcheck_notices_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_reference, "weight_gradient", lambda grad, x, columns, size: x.new_ones(3, 4, 4))
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
        monkeypatch.setattr(block_reference, "input_gradient", refuse)
        block_linear_op(x.detach(), weight, bias, *rest).sum().backward()
        assert weight.grad is not None
        monkeypatch.undo()
        monkeypatch.setattr(block_reference, "weight_gradient", refuse)
        block_linear_op(x, weight.detach(), bias.detach(), *rest).sum().backward()
        assert x.grad is not None
    finally:
        use_block_kernel(None)


# ---- choosing a kernel


def test_kernels_by_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_native, "is_available", lambda: True)
    monkeypatch.setattr(block_kernels.block_triton, "is_available", lambda: True)
    assert kernel_name("cpu", torch.float32, 16) == "native"
    assert kernel_name("cpu", torch.float16, 16) == "blas"
    assert kernel_name("cuda", torch.bfloat16, 16) == "triton"
    assert kernel_name("cuda", torch.bfloat16, 8) == "reference"
    assert kernel_name("cuda", torch.float64, 16) == "reference"
    monkeypatch.setattr(block_native, "is_available", lambda: False)
    assert kernel_name("cpu", torch.float32, 16) == "blas"


def test_a_kernel_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEIFT_BLOCK_KERNEL", "blas")
    assert kernel_name("cpu", torch.float32, 16) == "blas"
    use_block_kernel("reference")
    try:
        assert kernel_name("cpu", torch.float32, 16) == "reference"
    finally:
        use_block_kernel(None)
    monkeypatch.setenv("SPARSEIFT_BLOCK_KERNEL", "fast")
    with pytest.raises(ValueError, match=r"SPARSEIFT_BLOCK_KERNEL.*fast.*native"):
        kernel_name("cpu", torch.float32, 16)
    with pytest.raises(ValueError, match=r"block kernel.*nativ"):
        use_block_kernel("nativ")


def test_a_slow_choice_warns_once_and_names_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_native, "is_available", lambda: False)
    monkeypatch.setattr(block_kernels, "_warned", set())
    x, weight, bias, *rest = operands(torch.float32)
    with pytest.warns(UserWarning, match=r"12->8 with 4x4 tiles in torch.float32 on cpu runs on the 'blas' kernel"):
        block_linear_op(x, weight, bias, *rest)
    block_linear_op(x, weight, bias, *rest)  # warnings are errors here


# ---- compiling the native kernels


def test_without_a_compiler_there_are_no_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    block_native._library.cache_clear()
    try:
        assert not block_native.is_available()
        with pytest.raises(RuntimeError, match="need Linux and a C\\+\\+ compiler"):
            make_case().computed(block_native)
    finally:
        block_native._library.cache_clear()


@NEEDS_COMPILER
def test_a_compiler_that_fails_is_reported_and_falls_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(block_native, "_FLAGS", ("--no-such-flag",))
    block_native._library.cache_clear()
    try:
        assert not block_native.is_available()
        assert "no-such-flag" in caplog.text
        assert kernel_name("cpu", torch.float32, 64) == "blas"
    finally:
        block_native._library.cache_clear()
    assert not list(tmp_path.rglob("*.so"))


@NEEDS_COMPILER
def test_the_native_kernels_refuse_a_tile_they_have_no_code_for() -> None:
    with pytest.raises(RuntimeError, match="no code for block size 3"):
        make_case(size=3).computed(block_native)
