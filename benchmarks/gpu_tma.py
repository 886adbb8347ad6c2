"""Every configuration of the Triton kernels that reads by TMA, on a Hopper GPU: is it right, and to the bit as without?

    python benchmarks/gpu_tma.py          # about a minute; it ends with 0 if all are
    python benchmarks/gpu_tma.py --dry    # small products in Triton's interpreter, to test this program

TMA is off unless SPARSEIFT_BLOCK_TMA=1 asks for it, because it was written without a GPU. Each configuration runs in a
process of its own, which is stopped if it takes long: a kernel that waits for a copy that never comes does not end.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
import triton
from gpu_products import DRY, LARGEST_ERROR, REAL, Setting, products, shapes

from sparseift_llm.ops.kernels import triton_tuning
from sparseift_llm.ops.kernels.triton_descriptors import has_tma, use_tma

SECONDS = 180  # for all configurations; they run at the same time
PRODUCT_CONFIGS = triton_tuning.with_tma(triton_tuning.PRODUCT_CONFIGS)
WEIGHT_GRADIENT_CONFIGS = triton_tuning.with_tma(triton_tuning.WEIGHT_GRADIENT_CONFIGS)
NUM_CONFIGS = max(len(PRODUCT_CONFIGS), len(WEIGHT_GRADIENT_CONFIGS))


def setting_of(is_dry: bool) -> Setting:
    """As gpu.py's, but with a number of tokens that nothing divides, and dry with tiles that TMA can read."""
    if is_dry:
        return replace(DRY, dtype=torch.bfloat16, hidden=64, tile=64)
    return replace(REAL, tokens=4099)


def use_configuration(index: int, is_described: bool) -> None:
    """Configuration `index` of each kernel alone, which starts again where a kernel has fewer, with TMA or without."""
    kernels = (triton_tuning.product, triton_tuning.weight_gradient)
    for kernel, configs in zip(kernels, (PRODUCT_CONFIGS, WEIGHT_GRADIENT_CONFIGS), strict=True):
        sizes, warps, stages = configs[index % len(configs)]
        sizes = {**sizes, "tma": int(is_described)}
        kernel.configs = [triton.Config(sizes, num_warps=warps, num_stages=stages)]


def problems_of(setting: Setting, index: int) -> list[str]:
    """What is wrong with a configuration; nothing, if nothing is."""
    use_tma(True)
    found = []
    for shape in shapes(setting)[:2]:
        for one in products(setting, shape):
            use_configuration(index, False)
            expected = one.run()
            use_configuration(index, True)
            result = one.run()
            error = one.error(result)
            name = f"{shape.name}, {one.name}, configuration {index}"
            if not error < LARGEST_ERROR:
                found.append(f"{name}: relative error {error:.2e}")
            elif not torch.equal(result, expected):
                found.append(f"{name}: other bits than without TMA")
    return found


def outcomes(commands: Sequence[Sequence[str]], seconds: float) -> list[str | None]:
    """Runs commands at the same time; why each failed, or None. Those that take longer are killed."""
    end = time.monotonic() + seconds
    running: list[Any] = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    found: list[str | None] = []
    for process in running:
        try:
            _, errors = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            found.append(f"did not end within {seconds:.0f} s")
        else:
            last = (errors.strip() or f"ended with {process.returncode}").splitlines()[-1]
            found.append(last if process.returncode else None)
    return found


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dry", action="store_true", help="small products in Triton's interpreter")
    parser.add_argument("--configuration", type=int, help="this one alone, in this process")
    arguments = parser.parse_args(words)
    if not arguments.dry and not (torch.cuda.is_available() and has_tma(torch.device("cuda"))):
        print("there is no CUDA GPU with TMA (compute capability 9.0 or more) here", file=sys.stderr)
        return 2
    if arguments.configuration is not None:
        torch.manual_seed(0)
        problems = problems_of(setting_of(arguments.dry), arguments.configuration)
        print("\n".join(problems), file=sys.stderr)
        return 1 if problems else 0
    command = [sys.executable, __file__, *(["--dry"] if arguments.dry else [])]
    reasons = outcomes([[*command, "--configuration", str(index)] for index in range(NUM_CONFIGS)], SECONDS)
    for index, reason in enumerate(reasons):
        print(f"TMA, configuration {index}: {reason or 'right, and the same bits as without'}")
    return 1 if any(reasons) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
