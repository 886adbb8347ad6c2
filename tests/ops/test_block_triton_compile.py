"""The Triton kernels in Triton's own tuner and compiler, in a subprocess without its interpreter; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparseift_llm.ops.kernels import triton as block_triton
from tests.helpers.paths import ROOT

pytest.importorskip("triton", reason="triton is not installed")


def compiled(folder: Path, capability: int, dtype: str, *tiles: int) -> list[dict[str, Any]]:
    """What the compiler made of real calls on tiles of these sizes, for a GPU of a compute capability."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    script = ROOT / "tests" / "helpers" / "block_triton_script.py"
    words = [str(script), str(block_triton.__file__), str(capability), dtype, *map(str, tiles)]
    command = [sys.executable, "-W", "error", *words]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=250)
    assert finished.returncode == 0, finished.stderr
    found: list[dict[str, Any]] = json.loads(finished.stdout)
    return found


@pytest.mark.parametrize(
    ("capability", "dtype"), [(80, "bfloat16"), (90, "float32"), (90, "float16"), (100, "bfloat16")]
)
def test_kernels_compile_for_gpus(tmp_path: Path, capability: int, dtype: str) -> None:
    kernels = compiled(tmp_path, capability, dtype, 128)
    assert {kernel["kernel"] for kernel in kernels} == {"_product_kernel", "_weight_gradient_kernel"}
    assert all(kernel["tensor_cores"] == (dtype != "float32") for kernel in kernels)


def test_kernels_compile_for_a_gpu_with_wide_copies_in_little_shared_memory(tmp_path: Path) -> None:
    """The tuner and the compiler on real calls, for sm_90; an A100 offers 163 KiB of shared memory."""
    kernels = compiled(tmp_path, 90, "bfloat16", 16, 256)
    # per tile size: the product and its transpose, and the weight gradient, each with two configurations
    assert [kernel["kernel"] for kernel in kernels].count("_product_kernel") == 8
    assert [kernel["kernel"] for kernel in kernels].count("_weight_gradient_kernel") >= 3
    for kernel in kernels:
        assert kernel["shared_bytes"] <= 163 * 1024
        # of all operands, in as many blocks as there are buffers: else the compiler does not see what lies together
        assert kernel["bytes_copied_by_16"] >= 0.9 * kernel["shared_bytes"]
        assert kernel["tensor_cores"]
