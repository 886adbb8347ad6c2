"""What the compiler makes of the Triton kernels, in a subprocess without the interpreter; no GPU is needed.

The suite compiles the configurations that stand for all, in about a minute. All of a tile, in twelve minutes:
`SPARSEIFT_COMPILE_ALL=128 python -m pytest tests/ops/test_block_triton_compile.py`. The same command in an environment
with `pip install triton==3.6.0` shows the compiler of an older torch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from sparseift_llm.ops.activations import ACTIVATIONS
from tests.helpers.paths import ROOT

pytest.importorskip("triton", reason="triton is not installed")

ALL = os.environ.get("SPARSEIFT_COMPILE_ALL")  # a tile
SECONDS = 3600 if ALL else 280
pytestmark = pytest.mark.timeout(SECONDS + 100)
REGISTERS = 65536  # of a multiprocessor of a Hopper GPU
SHARED_BYTES = 227 * 1024  # the same
# Of each product on an H100 or H200: the most tokens, warps and stages, and two programs on a multiprocessor
CHOSEN = [
    "128:forward:128/8/3", "128:forward:16/4/4", "128:input_gradient:256/8/4", "64:input_gradient:128/4/3",
    "128:weight_gradient:0/4/4", "128:weight_gradient:1/8/4", "128:up_gelu_tanh:128/8/3",
    "128:up_gelu_tanh_gated:128/4/3", "128:down_gradient_gelu_tanh:128/8/3", "128:down_gradient_silu_gated:256/8/4",
    "128:forward:tma/256/8/4", "64:input_gradient:tma/128/8/3", "128:weight_gradient:tma/1/8/4",
    "128:down_gradient_gelu_tanh:tma/128/8/3",
]  # fmt: skip
THIN = [f"128:{product}:16/{rest}" for product in ("forward", "up_gelu_tanh") for rest in ("4/4", "2/5", "4/6")]
OTHER_GPUS = [
    ("80", "bfloat16", "64/4/3"), ("90", "float32", "64/4/3"), ("90", "float16", "tma/128/8/3"),
    ("100", "bfloat16", "64/4/3"), ("100", "bfloat16", "tma/128/8/3"),
]  # fmt: skip


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the compiler made of real calls, see helpers/block_triton_script.py."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    cases = [f"90:bfloat16:{case}" for case in ((ALL, *THIN) if ALL else CHOSEN)]
    cases += [f"{capability}:{dtype}:64:forward:{config}" for capability, dtype, config in OTHER_GPUS]
    command = [sys.executable, "-W", "error", "-m", "tests.helpers.block_triton_script", str(folder), *cases]
    finished = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert finished.returncode == 0, finished.stderr
    found: list[dict[str, Any]] = json.loads(finished.stdout)
    return found


@pytest.fixture(scope="module")
def hopper(kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [kernel for kernel in kernels if (kernel["capability"], kernel["dtype"]) == ("90", "bfloat16")]


def sizes_of(kernel: dict[str, Any]) -> tuple[int, int, int]:
    """Tokens, or whether tiles are paired; warps; stages. Of the kernel that adds pieces, 0, warps and 0."""
    *sizes, warps, stages = kernel["config"].removeprefix("tma/").split("/") if "/" in kernel["config"] else "080"
    return int(sizes[0]), int(warps), int(stages)


def test_the_chosen_configurations_are_compiled(hopper: list[dict[str, Any]]) -> None:
    found = {f"{kernel['tile']}:{kernel['product']}:{kernel['config']}" for kernel in hopper}
    assert {case for case in CHOSEN if not ALL or case.startswith(f"{ALL}:")} <= found
    if ALL:
        assert len({kernel["product"] for kernel in hopper}) == 5 + 4 * len(ACTIVATIONS)


def test_products_run_on_the_tensor_cores_of_a_hopper_gpu(hopper: list[dict[str, Any]]) -> None:
    for kernel in hopper:
        is_thin = sizes_of(kernel)[0] == 16  # fewer rows than wgmma has
        if kernel["product"] != "add_pieces":
            assert (kernel["wgmma"] > 0, kernel["mma_sync"] > 0) == (not is_thin, is_thin), kernel


def test_nothing_is_spilled_and_the_intended_programs_fit_on_a_multiprocessor(hopper: list[dict[str, Any]]) -> None:
    for kernel in hopper:
        assert kernel["spills"] == kernel["stack_bytes"] == 0, kernel
        size, warps, stages = sizes_of(kernel)
        # 3 stages are there for two programs that share a multiprocessor, but for 256 tokens or two tiles. A gated
        # derivative of 128 tokens takes more registers, and a gated ReLU a few.
        has_more = re.match("(down_|up_relu).*_gated", kernel["product"])
        is_large = size in (256, 1) or ((size, warps) == (128, 8) and has_more)
        programs = 2 if stages == 3 and not is_large else 1
        threads, allocated = 32 * warps, -(-kernel["registers"] // 8) * 8
        assert programs * threads * allocated <= REGISTERS, kernel
        assert programs * kernel["shared_bytes"] <= SHARED_BYTES, kernel


def test_memory_is_copied_and_written_16_bytes_at_a_time(hopper: list[dict[str, Any]]) -> None:
    for kernel in hopper:
        assert set(kernel["copies_by_size"]) <= {"16"}, kernel
        if sizes_of(kernel)[0] == 16:
            continue
        stored = kernel["stores_by_size"]
        sums = {"b32", "v2.b32"} if kernel["product"].startswith("down_gradient") else set()  # a row of them a piece
        assert set(stored) - sums == {"v4.b32"}, kernel


def test_there_are_as_many_operand_buffers_as_stages(hopper: list[dict[str, Any]]) -> None:
    """An index that is looked up in the step that uses it would take every second stage."""
    for kernel in hopper:
        if kernel["wgmma"]:
            assert kernel["buffers"] == [sizes_of(kernel)[2]], kernel


def test_the_tma_copies_operands_where_it_is_asked_to_and_nothing_else_does(hopper: list[dict[str, Any]]) -> None:
    for kernel in hopper:
        is_asked = kernel["config"].startswith("tma/")
        assert (kernel["bulk_copies"] > 0) == is_asked, kernel
        assert not (is_asked and kernel["copies_by_size"]), kernel


def test_no_loop_divides_or_calls(hopper: list[dict[str, Any]]) -> None:
    for kernel in hopper:
        loops = kernel["in_loops"]
        assert sum(count for name, count in loops.items() if name.startswith(("HGMMA", "HMMA", "LDG"))) > 0, kernel
        found = [name for name in loops if name.startswith(("CALL", "I2F", "F2I", "MUFU"))]
        assert not found, (kernel, found)


@pytest.mark.parametrize(("capability", "dtype", "config"), OTHER_GPUS)
def test_kernels_compile_for_other_gpus_and_dtypes(
    kernels: list[dict[str, Any]], capability: str, dtype: str, config: str
) -> None:
    wanted = (capability, dtype, config)
    (kernel,) = [k for k in kernels if (k["capability"], k["dtype"], k["config"]) == wanted]
    assert kernel["spills"] == 0
    assert (kernel["bulk_copies"] > 0) == config.startswith("tma/")
    assert (kernel["wgmma"] + kernel["mma_sync"] + kernel["tcgen05"] > 0) == (dtype != "float32")
