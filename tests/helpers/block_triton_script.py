"""Compiles the Triton kernels for a GPU on any machine: a stub stands in for the driver, nothing is launched.

Unlike the interpreter it runs the tuner and the compiler on the arguments of a real call. Prints a JSON list with one
object per compiled kernel. Arguments: the path of kernels/triton.py, so that transformers is not imported, the compute
capability (90 for an H100), a dtype, and tiles' sizes.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget


class StubDriver:
    """What tuning and compilation ask of a CUDA driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def benchmark(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
            call()
            return [1.0 for _ in quantiles]

        return benchmark


def compile_instead_of_launch(kernel: Any, compiled: dict[Any, dict[str, Any]]) -> None:
    """Every launch of `kernel` only compiles it, with the first and the last configuration, and notes the outcome."""
    compile_or_launch = kernel.fn.run

    def run(*args: Any, warmup: bool, **kwargs: Any) -> None:
        result = compile_or_launch(*args, warmup=True, **kwargs)
        sizes = re.findall(r"cp\.async\.\w+\.shared\.global\S* \[.*?\], \[.*?\], (\w+)", result.asm["ptx"])
        compiled[result] = {
            "kernel": kernel.fn.__name__,
            "shared_bytes": result.metadata.shared,
            "bytes_copied_by_16": sum(int(size, 0) == 16 for size in sizes) * 16 * 32 * result.metadata.num_warps,
            "tensor_cores": "mma" in result.asm["ptx"],
        }

    kernel.fn.run = run
    kernel.configs = [kernel.configs[0], kernel.configs[-1]]


def main() -> None:
    path, capability, dtype_name, *tiles = sys.argv[1:]
    specification = importlib.util.spec_from_file_location("block_triton", path)
    assert specification is not None
    assert specification.loader is not None
    module: Any = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.TRITON.is_available = lambda: True
    triton.runtime.driver.set_active(StubDriver(int(capability)))
    compiled: dict[Any, dict[str, Any]] = {}
    compile_instead_of_launch(module._product_kernel, compiled)
    compile_instead_of_launch(module._weight_gradient_kernel, compiled)
    columns, starts = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([0, 1, 3], dtype=torch.int32)
    dtype = getattr(torch, dtype_name)
    for tile in map(int, tiles):
        weight, x = torch.zeros(3, tile, tile, dtype=dtype), torch.zeros(100, 2 * tile, dtype=dtype)
        module.TRITON.forward(x, weight, x[0], columns, 2 * tile)
        module.TRITON.input_gradient(x, weight, torch.arange(3, dtype=torch.int32), starts, 2 * tile, 2 * tile)
        module.TRITON.weight_gradient(x, x, columns, tile)
    print(json.dumps(list(compiled.values())))


if __name__ == "__main__":
    main()
