"""Compiles the Triton kernels for a GPU on any machine: a stub stands in for the driver, nothing is launched.

Unlike the interpreter it runs the tuner and the compiler on the arguments of a real call. Prints a JSON list with one
object per compiled kernel: what its machine code (SASS), its PTX and its layout (TTGIR) say.

    python -m tests.helpers.block_triton_script FOLDER CAPABILITY:DTYPE:TILE[:PRODUCT[:CONFIGURATION]]...

FOLDER is for files on the way. CAPABILITY is a compute capability (90 for an H100 or H200). A configuration is named
as `name_of` does: `256/8/4` stands for 256 tokens, 8 warps and 4 stages, and of a weight gradient `1/4/3` for two tiles
(0: one tile), 4 warps and 3 stages; `tma/256/8/4` for the same with TMA. What is left out stands for all.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import networkx
import torch
import triton
from triton.backends.compiler import GPUTarget

from sparseift_llm.ops.activations import ACTIVATIONS
from sparseift_llm.ops.kernels import triton_code, triton_descriptors, triton_launch, triton_tuning
from sparseift_llm.ops.kernels.triton import TRITON
from sparseift_llm.ops.kernels.triton_launch import Epilogue, Operand
from sparseift_llm.topology.blocks import ByColumn

PROGRAMS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TOKENS = 1024


class StubDriver:
    """What tuning and compilation ask of a CUDA driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device, and each capability needs its own

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def benchmark(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
            call()
            return [1.0 for _ in quantiles]

        return benchmark


def name_of(arguments: dict[str, Any]) -> str:
    """E.g. `256/8/4`: tokens, or whether tiles are paired; warps; stages. TMA comes before them."""
    sizes = [arguments[name] for name in ("token_block", "paired", "num_warps", "num_stages") if name in arguments]
    return "/".join(map(str, ["tma", *sizes] if arguments.get("tma") else sizes))


def instructions_in_loops(sass: str) -> Counter[str]:
    """How often each instruction stands where the program can come again: in a cycle of its branches.

    Where code stands says little: a rarely taken part of a loop is at the end of the program.
    """
    lines = sass.splitlines()
    labels = {match[1]: number for number, line in enumerate(lines) if (match := re.match(r"(\.L_x_\d+):", line))}
    steps = networkx.DiGraph()
    for number, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*?`\((\.L_x_\d+)\)", line)
        if target and target[1] in labels:
            steps.add_edge(number, labels[target[1]])
        if not re.match(r"\s+/\*[0-9a-f]+\*/\s+(BRA `|EXIT|RET)", line):  # without a condition
            steps.add_edge(number, number + 1)
    loops = [part for part in networkx.strongly_connected_components(steps) if len(part) > 1]
    return Counter(name for number in sorted(set().union(*loops)) if (name := instruction_of(lines[number])))


def instruction_of(line: str) -> str | None:
    match = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_.]+)", line)
    return match[1] if match else None


def facts_of(compiled: Any, folder: Path) -> dict[str, Any]:
    """What the compiler made of one kernel."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])

    def output_of(*command: str) -> str:
        return subprocess.run([*command, str(binary)], capture_output=True, text=True, check=True).stdout

    usage = output_of(str(PROGRAMS / "cuobjdump"), "--dump-resource-usage")
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert resources is not None, usage
    sass = output_of(str(PROGRAMS / "nvdisasm"), "-c")
    everywhere = Counter(name for line in sass.splitlines() if (name := instruction_of(line)))
    ptx, layout = compiled.asm["ptx"], compiled.asm["ttgir"]
    copies = Counter(
        int(size, 0) for size in re.findall(r"cp\.async\.\w+\.shared\.global\S* \[.*?\], \[.*?\], (\w+)", ptx)
    )
    return {
        "registers": int(resources[1]),
        "stack_bytes": int(resources[2]) + int(resources[3]),
        "spills": sum(count for name, count in everywhere.items() if name.startswith(("STL", "LDL"))),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "tcgen05": len(re.findall(r"tcgen05\.mma", ptx)),
        "mma_sync": len(re.findall(r"\bmma\.sync", ptx)),
        "copies_by_size": {str(size): count for size, count in copies.items()},
        "bulk_copies": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "stores_by_size": dict(Counter(re.findall(r"st\.global\S*?\.(v\d\.b\d+|b\d+)", ptx))),
        "buffers": sorted(
            {int(n) for n in re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x\d+x\w?f\d+", layout)}
        ),
        "in_loops": dict(instructions_in_loops(sass)),
    }


def compile_instead_of_launch(kernel: Any, found: list[tuple[str, str, Any]]) -> None:
    """Every launch of a kernel only compiles it, and notes the product, the configuration and the outcome."""
    function = kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel
    compile_or_launch = function.run

    def run(*args: Any, warmup: bool, **kwargs: Any) -> None:
        result = compile_or_launch(*args, warmup=True, **kwargs)
        if all(result is not other for _, _, other in found):  # the chosen one is launched again
            name = CALLED[-1] if kernel in TUNED else "add_pieces"
            found.append((name, name_of(kwargs), result))

    function.run = run


TUNED = (triton_tuning.product, triton_tuning.weight_gradient)
CALLED: list[str] = [""]  # the product that is being computed


def products(tile: int, dtype: torch.dtype, tokens: int) -> dict[str, Callable[[], Any]]:
    """Calls by name: the three products, and those of a feed-forward block with each activation, gated or not."""
    columns, starts = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([0, 1, 3], dtype=torch.int32)
    weight, x = torch.zeros(3, tile, tile, dtype=dtype), torch.zeros(tokens, 2 * tile, dtype=dtype)
    by_column = ByColumn(torch.arange(3, dtype=torch.int32), columns, starts, starts[:2])
    straight, transposed = Operand(x, weight, columns), Operand.transposed(x, weight, by_column)
    width, sums = 2 * tile, triton_launch.empty_token_sums(tokens, 2 * tile, x.device)
    found: dict[str, Callable[[], Any]] = {
        "forward": lambda: TRITON.forward(x, weight, x[0], columns, width),
        "input_gradient": lambda: TRITON.input_gradient(x, weight, by_column, width, width),
        "two_input_gradients": lambda: triton_launch.product(transposed, None, width, width, second=transposed),
        "weight_gradient": lambda: TRITON.weight_gradient(x, x, columns, tile),
    }
    for name in ACTIVATIONS:
        for gate, suffix in ((None, ""), (x, "_gated")):
            up = Epilogue(name, x, gate)
            down = Epilogue(name, x, gate, gate, x, sums, None if gate is None else sums)
            found[f"up_{name}{suffix}"] = partial(triton_launch.product, straight, x[0], width, width, up)
            found[f"down_gradient_{name}{suffix}"] = partial(
                triton_launch.product, transposed, None, width, width, down
            )
    return found


def main() -> None:
    folder, *cases = sys.argv[1:]
    triton_launch.is_available = lambda: True
    triton_descriptors.use_tma(True)
    every = {kernel: list(kernel.configs) for kernel in TUNED}
    found: list[tuple[str, str, Any]] = []
    for kernel in (*TUNED, triton_code.add_pieces_kernel):
        compile_instead_of_launch(kernel, found)
    rows = []
    for case in cases:
        capability, dtype, tile, product, wanted = (*case.split(":"), "", "")[:5]
        triton.runtime.driver.set_active(StubDriver(int(capability)))
        triton_descriptors.has_tma = lambda device, capability=capability: int(capability) >= 90
        if wanted and all(name_of(config.all_kwargs()) != wanted for kernel in TUNED for config in every[kernel]):
            raise SystemExit(f"no kernel has a configuration {wanted}")
        for kernel in TUNED:
            configs = [config for config in every[kernel] if name_of(config.all_kwargs()) == wanted]
            kernel.configs = configs or every[kernel]
            kernel.cache.clear()
        triton_tuning._tuned_buckets.clear()
        found.clear()
        tokens = triton_tuning.THIN if wanted.startswith(f"{triton_tuning.THIN}/") else TOKENS
        for name, call in products(int(tile), getattr(torch, dtype), tokens).items():
            if product in ("", name):
                CALLED.append(name)
                call()
        where = {"capability": capability, "dtype": dtype, "tile": int(tile)}
        rows += [
            {**where, "product": name, "config": config, **facts_of(result, Path(folder))}
            for name, config, result in found
        ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
