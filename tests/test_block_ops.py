"""Block-sparse products of every kernel against a float64 dense matrix with the same zeros."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
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
from sparseift_llm.ops.block_linear import block_input_gradient_op, block_linear_op, block_weight_gradient_op
from sparseift_llm.topology import blocks

KERNELS = {"reference": block_reference, "blas": block_blas, "native": block_native}
NEEDS_COMPILER = pytest.mark.skipif(not block_native.is_available(), reason="no C++ compiler")
LAYOUTS = ("contiguous", "strided", "transposed", "expanded")
every_kernel = pytest.mark.parametrize("kernel", ["reference", "blas", pytest.param("native", marks=NEEDS_COMPILER)])
# what a sum is rounded to at each addition: float32, or wider for wider operands
SUM_DTYPE = {torch.float64: torch.float64}


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

    def expected(self, absolute: bool = False) -> dict[str, Tensor]:
        """The three products, or those of the operands' absolute values."""
        x, grad, dense = self.x.double(), self.grad.double(), self.dense
        bias = torch.zeros(self.out_features).double() if self.bias is None else self.bias.double()
        if absolute:
            x, grad, dense, bias = x.abs(), grad.abs(), dense.abs(), bias.abs()
        full = (grad.T @ x).view(self.num_rows, self.block_size, self.num_columns, self.block_size)
        rows = [((slot + 1) * self.num_rows - 1) // len(self.columns) for slot in range(len(self.columns))]
        tiles = [full[row, :, int(column)] for row, column in zip(rows, self.columns, strict=True)]
        return {"output": x @ dense.T + bias, "input": grad @ dense, "weight": torch.stack(tiles)}

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
    layout: str = "contiguous",
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def activation(width: int) -> Tensor:
        """(tokens, width); `expanded` is one row for all tokens, as the gradient of a sum is one number for all."""
        if layout == "strided":
            return normal(2 * tokens, width + 3)[::2, 1 : width + 1]
        if layout == "transposed":
            return normal(width, tokens).T
        return normal(1, width).expand(tokens, width) if layout == "expanded" else normal(tokens, width)

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
    """Largest error of each product's entries, of what a sum and one rounding to its dtype allow; nan: infinite."""
    result, magnitudes = {}, case.expected(absolute=True)
    counts = {"output": case.x.shape[1] + 1, "input": case.grad.shape[1], "weight": len(case.x)}
    kind, sums = torch.finfo(case.x.dtype), torch.finfo(SUM_DTYPE.get(case.x.dtype, torch.float32))
    for name, expected in case.expected().items():
        assert computed[name].shape == expected.shape, name
        assert computed[name].dtype == case.x.dtype, name
        if expected.numel():
            bound = counts[name] * sums.eps / 2 * magnitudes[name] + kind.eps / 2 * expected.abs() + kind.tiny
            error = float(((computed[name].double() - expected).abs() / bound).max())
            result[name] = error if error == error else float("inf")
    return result


def check(case: Case, kernel: ModuleType) -> None:
    found = errors(case, case.computed(kernel))
    assert max(found.values(), default=0.0) <= 1, found


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return make_case(
        tokens=draw(st.sampled_from([0, 1, 2, 5, 12, 13, 23, 24, 25, 33, 239, 241, 481, 613])),
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
        check(make_case(tokens=tokens, dtype=torch.float16), block_blas)


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


@NEEDS_COMPILER
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_native_bfloat16_keeps_special_values(value: float) -> None:
    case = make_case(dtype=torch.bfloat16)
    case.x[3, :] = value
    output = block_native.forward(case.x, case.weight, None, case.columns, case.out_features)
    assert not output[3].isfinite().any()
    assert output[:3].isfinite().all()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@NEEDS_COMPILER
def test_what_lay_in_scratch_memory_before_costs_no_time() -> None:
    """Denormal numbers take many processors tens of times as long: rows that only fill up must not hold them."""
    few, many = make_case(tokens=13, rows=8, columns=8, num_tiles=32), make_case(tokens=480, rows=8, columns=8)
    seconds: dict[float, list[float]] = {1.0: [], 1e-40: []}
    with one_thread():  # waiting for another one would count
        for _ in range(9):
            for value, times in seconds.items():
                for tensor in (many.x, many.grad):
                    tensor.fill_(value)
                many.computed(block_native)
                start = time.thread_time()
                few.computed(block_native)
                times.append(time.thread_time() - start)
    assert min(seconds[1e-40]) < 3 * min(seconds[1.0])


@NEEDS_COMPILER
def test_scratch_memory_is_counted_and_given_back() -> None:
    make_case().computed(block_native)
    assert block_native.scratch_bytes() > 7 * 16 * 16 * 4  # the tiles, packed
    block_native.release_scratch()
    assert block_native.scratch_bytes() == 0
    check(make_case(), block_native)


# ---- the operator


def operands(dtype: torch.dtype = torch.float64, tokens: int = 5, size: int = 4) -> tuple[Any, ...]:
    return operands_of(make_case(tokens=tokens, rows=2, columns=3, num_tiles=3, size=size, dtype=dtype))


def operands_of(case: Case) -> tuple[Any, ...]:
    assert case.bias is not None
    tensors = [tensor.clone().requires_grad_() for tensor in (case.x, case.weight, case.bias)]
    index = blocks.slots_by_column(case.columns, case.num_columns)
    return (*tensors, case.columns, *index, case.out_features)


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
    x, weight, _, columns, *by_column, out_features = given
    torch.library.opcheck(block_linear_op, given)
    grad = torch.randn(len(x), out_features)
    torch.library.opcheck(block_input_gradient_op, (grad, weight.detach(), *by_column, x.shape[1]))
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
    refused = [("native", "cpu", torch.float16, 16), ("native", "cuda", torch.float32, 16), ("blas", "cuda", None, 16)]
    for name, device, dtype, size in [*refused, ("triton", "cpu", torch.float64, 16), ("triton", "cuda", None, 8)]:
        monkeypatch.setenv("SPARSEIFT_BLOCK_KERNEL", name)
        with pytest.raises(ValueError, match=rf"{name}.*has no code for {size}x{size} tiles in .* on {device}; unset"):
            kernel_name(device, dtype or torch.float32, size)
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


def test_without_a_compiler_there_are_no_native_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    block_native._library.cache_clear()
    try:
        assert not block_native.is_available()
        assert "no C++ compiler 'no-such-compiler'" in caplog.text
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


@pytest.fixture
def tiny_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source that compiles in no time; the folder of the cache."""
    source = tmp_path / "tiny.cpp"
    source.write_text('extern "C" __attribute__((visibility("default"))) int one() { return 1; }')
    monkeypatch.setattr(block_native, "_SOURCES", [source])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    block_native._library.cache_clear()
    yield tmp_path / "cache" / "sparseift_llm"
    block_native._library.cache_clear()


def loaded() -> bool:
    """Whether the source of `tiny_source` is compiled, or found, and can be called."""
    block_native._library.cache_clear()
    library = block_native._library()
    return library is not None and library.one() == 1


@NEEDS_COMPILER
def test_a_damaged_library_is_compiled_again(tiny_source: Path) -> None:
    assert loaded()
    (library,) = tiny_source.iterdir()
    written, whole = library.stat().st_mtime_ns, library.read_bytes()
    assert loaded()
    assert library.stat().st_mtime_ns == written  # found
    library.unlink()  # the one that is loaded; cutting it off would cut off this process
    library.write_bytes(whole[:1000])
    assert loaded()
    assert library.read_bytes() == whole
    assert len(list(tiny_source.iterdir())) == 1


@NEEDS_COMPILER
def test_a_library_in_a_folder_that_cannot_be_written_is_used(
    tiny_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loaded()
    monkeypatch.setattr(block_native.os, "access", lambda _, mode: mode != block_native.os.W_OK)
    assert loaded()
    (library,) = tiny_source.iterdir()
    library.unlink()
    assert not loaded()


@NEEDS_COMPILER
def test_a_compiler_with_words(tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env c++")
    assert loaded()
    monkeypatch.setenv("CXX", 'c++ -DX="a')
    assert not loaded()


@NEEDS_COMPILER
def test_without_a_home(tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(block_native.tempfile, "gettempdir", lambda: str(tmp_path))
    assert loaded()
    (folder,) = tmp_path.glob("sparseift_llm_*")
    assert list(folder.glob("*.so"))
    monkeypatch.setattr(block_native.os, "getuid", lambda: 12345)
    (tmp_path / "sparseift_llm_12345").mkdir()
    assert not loaded()  # somebody else's folder


@NEEDS_COMPILER
def test_the_native_kernels_refuse_a_tile_they_have_no_code_for() -> None:
    for size in (2, 3, 6):
        with pytest.raises(RuntimeError, match=f"no code for block size {size}"):
            make_case(size=size, dtype=torch.float64).computed(block_native)
        assert kernel_name("cpu", torch.float64, size) == "blas"
