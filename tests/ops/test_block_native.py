"""The C++ kernels beyond their products: special values, threads, scratch memory, and how they are compiled."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseift_llm.ops.kernels import native as block_native
from sparseift_llm.ops.kernels.base import kernel_name
from tests.helpers.block_cases import NEEDS_COMPILER, check, make_case, num_threads


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
    results = []
    for threads in (1, 2):
        with num_threads(threads):
            results.append(case.computed(block_native))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


OUT_OF_MEMORY = """
import resource, torch
from sparseift_llm.ops.kernels import native as block_native
x, weight, columns = torch.ones(13, 512), torch.ones(256, 512, 512), torch.zeros(256, dtype=torch.int32)
block_native.forward(x[:, :512], weight[:1], None, columns[:1], 512)  # the library and its threads take memory, too
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))
try:
    block_native.forward(x, weight, None, columns, 256 * 512)
except torch.OutOfMemoryError as error:
    print("refused:", error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert (block_native.forward(x, weight, None, columns, 256 * 512) == 512).all()
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
