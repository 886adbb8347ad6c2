"""How the C++ kernels are compiled, kept in a cache and found again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseift_llm.ops import native_library as builder
from sparseift_llm.ops.kernels.choice import kernel_name
from sparseift_llm.ops.kernels.native import NATIVE
from sparseift_llm.ops.native_library import native_library
from tests.helpers.block_cases import NEEDS_COMPILER, make_case


def test_without_a_compiler_there_are_no_native_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    native_library.cache_clear()
    try:
        assert not NATIVE.is_available()
        assert "no C++ compiler 'no-such-compiler'" in caplog.text
        with pytest.raises(RuntimeError, match="need Linux and a C\\+\\+ compiler"):
            make_case().computed(NATIVE)
    finally:
        native_library.cache_clear()


@NEEDS_COMPILER
def test_a_compiler_that_fails_is_reported_and_falls_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(builder, "_FLAGS", ("--no-such-flag",))
    native_library.cache_clear()
    try:
        assert not NATIVE.is_available()
        assert "no-such-flag" in caplog.text
        assert kernel_name("cpu", torch.float32, 64) == "blas"
    finally:
        native_library.cache_clear()
    assert not list(tmp_path.rglob("*.so"))


@pytest.fixture
def tiny_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source that compiles in no time; the folder of the cache."""
    source = tmp_path / "tiny.cpp"
    source.write_text('extern "C" __attribute__((visibility("default"))) int one() { return 1; }')
    monkeypatch.setattr(builder, "_SOURCES", [source])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native_library.cache_clear()
    yield tmp_path / "cache" / "sparseift_llm"
    native_library.cache_clear()


def loaded() -> bool:
    """Whether the source of `tiny_source` is compiled, or found, and can be called."""
    native_library.cache_clear()
    library = native_library()
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
    monkeypatch.setattr(builder.os, "access", lambda _, mode: mode != builder.os.W_OK)
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
    monkeypatch.setattr(builder.tempfile, "gettempdir", lambda: str(tmp_path))
    assert loaded()
    (folder,) = tmp_path.glob("sparseift_llm_*")
    assert list(folder.glob("*.so"))
    monkeypatch.setattr(builder.os, "getuid", lambda: 12345)
    (tmp_path / "sparseift_llm_12345").mkdir()
    assert not loaded()  # somebody else's folder
