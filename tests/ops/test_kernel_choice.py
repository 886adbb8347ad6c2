"""Which kernel block-sparse products run on: by device, dtype and tile, forced, and warned about."""

from __future__ import annotations

import re

import pytest
import torch

from sparseift_llm.ops.block_linear import block_linear_op
from sparseift_llm.ops.kernels import choice
from sparseift_llm.ops.kernels.choice import kernel_for, kernel_name, use_block_kernel
from sparseift_llm.ops.kernels.native import NATIVE
from sparseift_llm.ops.kernels.triton import TRITON
from tests.ops.test_block_linear import operands


def test_kernels_by_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NATIVE, "is_available", lambda: True)
    monkeypatch.setattr(TRITON, "is_available", lambda: True)
    assert kernel_name("cpu", torch.float32, 16) == "native"
    assert kernel_name("cpu", torch.float16, 16) == "blas"
    assert kernel_name("cuda", torch.bfloat16, 16) == "triton"
    assert kernel_name("cuda", torch.bfloat16, 8) == "reference"
    assert kernel_name("cuda", torch.float64, 16) == "reference"
    monkeypatch.setattr(NATIVE, "is_available", lambda: False)
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
    monkeypatch.setattr(NATIVE, "is_available", lambda: False)
    monkeypatch.setattr(choice, "_warned", set())
    x, weight, bias, *rest = operands(torch.float32)
    with pytest.warns(UserWarning, match=r"12->8 with 4x4 tiles in torch.float32 on cpu runs on the 'blas' kernel"):
        block_linear_op(x, weight, bias, *rest)
    block_linear_op(x, weight, bias, *rest)  # warnings are errors here


@pytest.mark.parametrize(
    ("dtype", "size", "has_compiler", "advice"),
    [
        (torch.float32, 16, False, "install a C++ compiler (on Linux), or use larger tiles"),
        (torch.float32, 8, True, "use larger tiles"),
        (torch.float16, 16, True, "use float32 or bfloat16"),
    ],
)
def test_a_slow_choice_says_what_to_change(
    dtype: torch.dtype, size: int, has_compiler: bool, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NATIVE, "is_available", lambda: has_compiler)
    monkeypatch.setattr(choice, "_warned", set())
    x, weight = torch.zeros(1, size, dtype=dtype), torch.zeros(1, size, size, dtype=dtype)
    with pytest.warns(UserWarning, match=rf"slower than a masked dense layer; {re.escape(advice)}"):
        kernel_for(x, weight, size, size)
