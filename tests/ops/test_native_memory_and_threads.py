"""The C++ kernels beyond their products: special values, threads, scratch memory, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from sparseift_llm.ops.kernels.choice import kernel_name
from sparseift_llm.ops.kernels.native import NATIVE
from tests.helpers.block_cases import NEEDS_COMPILER, check, make_case, num_threads


@NEEDS_COMPILER
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_native_bfloat16_keeps_special_values(value: float) -> None:
    case = make_case(dtype=torch.bfloat16)
    case.x[3, :] = value
    output = NATIVE.forward(case.x, case.weight, None, case.columns, case.out_features)
    assert not output[3].isfinite().any()
    assert output[:3].isfinite().all()


@NEEDS_COMPILER
def test_native_results_do_not_depend_on_the_number_of_threads() -> None:
    case = make_case(tokens=700, rows=5, columns=5, num_tiles=12, size=32)
    results = []
    for threads in (1, 2):
        with num_threads(threads):
            results.append(case.computed(NATIVE))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


OUT_OF_MEMORY = """
import resource, torch
from sparseift_llm.ops.kernels.native import NATIVE
x, weight, columns = torch.ones(13, 512), torch.ones(256, 512, 512), torch.zeros(256, dtype=torch.int32)
NATIVE.forward(x[:, :512], weight[:1], None, columns[:1], 512)  # the library and its threads take memory, too
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))
try:
    NATIVE.forward(x, weight, None, columns, 256 * 512)
except torch.OutOfMemoryError as error:
    print("refused:", error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert (NATIVE.forward(x, weight, None, columns, 256 * 512) == 512).all()
print("done")
"""


@NEEDS_COMPILER
def test_too_little_memory_is_an_error_that_can_be_caught() -> None:
    """As torch's own, which searches for a batch size rely on, and not the end of the process."""
    found = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [
        "refused: the native block kernels ran out of memory. Use smaller batches", "done"
    ]  # fmt: skip


@NEEDS_COMPILER
def test_what_lay_in_scratch_memory_before_costs_no_time() -> None:
    """Denormal numbers take many processors tens of times as long: rows that only fill up must not hold them."""
    few, many = make_case(tokens=13, rows=8, columns=8, num_tiles=32), make_case(tokens=480, rows=8, columns=8)
    seconds: dict[float, list[float]] = {1.0: [], 1e-40: []}
    with num_threads(1):  # waiting for another one would count
        for _ in range(9):
            for value, times in seconds.items():
                for tensor in (many.x, many.grad):
                    tensor.fill_(value)
                many.computed(NATIVE)
                start = time.thread_time()
                few.computed(NATIVE)
                times.append(time.thread_time() - start)
    assert min(seconds[1e-40]) < 3 * min(seconds[1.0])


@NEEDS_COMPILER
def test_sums_of_small_tiles_stay_in_registers_too() -> None:
    """In memory, as a compiler leaves them that does not unroll the loops over them, they take over twice as long."""
    cases = {size: make_case(tokens=480, rows=256 // size, columns=256 // size, num_tiles=(256 // size) ** 2, size=size)
             for size in (16, 64)}  # fmt: skip
    seconds: dict[int, list[float]] = {size: [] for size in cases}
    with num_threads(1):
        for _ in range(30):
            for size, case in cases.items():
                start = time.thread_time()
                NATIVE.forward(case.x, case.weight, case.bias, case.columns, case.out_features)
                seconds[size].append(time.thread_time() - start)
    assert min(seconds[16]) < 1.5 * min(seconds[64])


@NEEDS_COMPILER
def test_scratch_memory_is_counted_and_given_back() -> None:
    make_case().computed(NATIVE)
    assert NATIVE.scratch_bytes() > 7 * 16 * 16 * 4  # the tiles, packed
    NATIVE.release_scratch()
    assert NATIVE.scratch_bytes() == 0
    check(make_case(), NATIVE)


@NEEDS_COMPILER
def test_the_native_kernels_refuse_a_tile_they_have_no_code_for() -> None:
    for size in (2, 3, 6):
        with pytest.raises(RuntimeError, match=f"no code for block size {size}"):
            make_case(size=size, dtype=torch.float64).computed(NATIVE)
        assert kernel_name("cpu", torch.float64, size) == "blas"
