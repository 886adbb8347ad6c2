"""Block-sparse products, feed-forward blocks and training steps on one CUDA GPU, measured against what is predicted.

    python benchmarks/gpu.py results.json            # a few minutes on an H200; most of it compilation
    python benchmarks/gpu.py results.json --dry      # tiny shapes in Triton's interpreter, to test this program

It prints a table and writes one JSON. Every product is checked against a float64 product with the same zeros first. All
configurations of the kernels are compiled beforehand in processes of their own, as many as there are cores. Those that
read by TMA are checked before (gpu_tma.py), and take part only if all are right. The formula of the predictions is in
docs/block.md, "On a GPU".
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
import torch.nn.functional as F
from gpu_products import (
    DRY,
    LARGEST_ERROR,
    REAL,
    Setting,
    Shape,
    normal,
    predicted_feed_forward,
    products,
    shapes,
)
from torch import Tensor

from sparseift_llm.bench.measure import peak_bytes, queued_seconds
from sparseift_llm.ops.kernels import triton_tuning
from sparseift_llm.ops.kernels.choice import use_block_kernel
from sparseift_llm.ops.kernels.triton_descriptors import TMA_VARIABLE, is_wanted
from sparseift_llm.utils.files import write_json
from sparseift_llm.utils.provenance import commit, machine, versions
from sparseift_llm.utils.tables import markdown_table

# ---- what is compiled


def compile_beforehand(setting: Setting) -> None:
    """Fill Triton's cache on disk with every configuration that is tuned, in a process for each."""
    configs = len(triton_tuning.PRODUCT_CONFIGS)
    if is_wanted():
        configs += len(triton_tuning.with_tma(triton_tuning.PRODUCT_CONFIGS))
    with ProcessPoolExecutor(min(configs, os.cpu_count() or 1), get_context("spawn")) as pool:
        list(pool.map(compile_configuration, [setting] * configs, range(configs)))


def compile_configuration(setting: Setting, index: int) -> None:
    """Launch everything that is measured once, with one configuration of each kernel."""
    use_block_kernel("triton")
    triton_tuning.use_one_configuration(index)
    once = Results(setting, is_timed=False)
    measure_products(once, shapes(setting)[0])
    measure_feed_forwards(once)


# ---- what is measured


class Results:
    """Rows of the table: what was measured, its rate, and what was predicted."""

    def __init__(self, setting: Setting, is_timed: bool = True) -> None:
        self.setting = setting
        self.is_timed = is_timed
        self.rows: list[dict[str, Any]] = []

    def time(self, name: str, run: Callable[[], Any], **facts: Any) -> float:
        """Median seconds of queued calls, after calls that tune and warm up. `facts`: flops, bytes, predicted_s."""
        calls, seconds = self.setting.calls, math.nan
        if self.is_timed:
            queued_seconds([run] * min(3, calls), self.setting.device)
            seconds = statistics.median(queued_seconds([run] * calls, self.setting.device))
            print(f"{name}: {seconds * 1e6:.1f} us", file=sys.stderr, flush=True)
        else:
            run()
        self.rows.append({"name": name, "seconds": seconds, **facts})
        return seconds

    def table(self) -> str:
        cells = []
        for row in self.rows:
            microseconds = row["seconds"] * 1e6
            rate = ""
            if row.get("flops"):
                rate = f"{row['flops'] / row['seconds'] / 1e12:,.0f} TFLOP/s"
            elif row.get("bytes"):
                rate = f"{row['bytes'] / row['seconds'] / 1e12:.2f} TB/s"
            predicted = row.get("predicted_s")
            ratio = f"{row['seconds'] / predicted:.2f}x" if predicted else ""
            expected = f"{predicted * 1e6:,.0f}" if predicted else ""
            cells.append((row["name"], f"{microseconds:,.1f}", rate, expected, ratio, row.get("note", "")))
        header = ("what", "us", "rate", "predicted us", "measured / predicted", "note")
        return markdown_table(header, cells, "lrrrrl")


def measure_ceilings(results: Results) -> None:
    """A copy, a large product, and the dense FFN's six products."""
    setting = results.setting
    large = normal(setting, 1 << (30 if setting is REAL else 10))
    results.time("copy", large.clone, bytes=2 * large.nbytes)
    del large
    side = 8192 if setting is REAL else 64
    left, right = normal(setting, side, side), normal(setting, side, side)
    results.time(f"dense product, sides {side}", lambda: left @ right, flops=2 * side**3)
    inputs, outputs = setting.hidden, 4 * setting.hidden
    flops = 2 * setting.tokens * inputs * outputs
    for name, (width, height) in {"up": (inputs, outputs), "down": (outputs, inputs)}.items():
        x, weight, grad = normal(setting, setting.tokens, width), normal(setting, height, width), None
        grad = normal(setting, setting.tokens, height)
        calls = (lambda x=x, w=weight: F.linear(x, w), lambda g=grad, w=weight: g @ w, lambda g=grad, x=x: g.T @ x)
        for part, call in zip(("forward", "input gradient", "weight gradient"), calls, strict=True):
            results.time(f"dense {name}, {part}", call, flops=flops)


def measure_products(results: Results, shape: Shape) -> None:
    """The products of a shape; checked first."""
    for one in products(results.setting, shape):
        error = one.error(one.run())
        if not error < LARGEST_ERROR:
            raise SystemExit(f"{shape.name}, {one.name} is wrong: relative error {error:.2e}")
        results.time(f"{shape.name}, {one.name}", one.run, flops=one.flops, predicted_s=one.predicted)
        kernel = triton_tuning.weight_gradient if one.name == "weight gradient" else triton_tuning.product
        results.rows[-1]["note"] = f"error {error:.1e}; {short_name(kernel.best_config)}"


def short_name(config: Any) -> str:
    """E.g. `128 tokens, 8 warps, 3 stages, TMA`."""
    sizes = config.kwargs
    size = f"{sizes['token_block']} tokens" if "token_block" in sizes else f"{1 + sizes['paired']} tile(s)"
    return f"{size}, {config.num_warps} warps, {config.num_stages} stages" + (", TMA" if sizes.get("tma") else "")


def measure_feed_forwards(results: Results) -> None:
    """The FFN, forward and backward: dense, masked and block-sparse, eager and as a CUDA graph, and peak memory."""
    from sparseift_llm.bench.layer import feed_forwards
    from sparseift_llm.bench.rows import Row

    setting = results.setting
    row = Row("gpu", "layer", setting.device, setting.dtype, setting.tile, setting.tokens, setting.hidden)
    for name, layer in feed_forwards(row).items():
        layer = layer.to(setting.device, setting.dtype)
        width = setting.hidden * (1 if name == "dense" else 2)
        x = normal(setting, setting.tokens, width).requires_grad_()
        grad = normal(setting, setting.tokens, width)

        def both(layer: Any = layer, x: Tensor = x, grad: Tensor = grad) -> None:
            layer.zero_grad()
            x.grad = None
            layer(x).backward(grad)

        predicted = {"predicted_s": predicted_feed_forward(setting)} if name == "block" else {}
        results.time(f"FFN {name}, eager", both, **predicted)
        results.rows[-1]["note"] = f"peak {peak_bytes(both, setting.device) / 1e6:,.0f} MB"
        replay = captured(both) if setting.device == "cuda" else None
        if replay is not None:
            results.time(f"FFN {name}, CUDA graph", replay, **predicted)


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """`run` as a CUDA graph, after the calls on a side stream that torch's documentation asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure_steps(results: Results) -> None:
    """A training step of GPT-3 Small, scope `ffn`: forward and backward, eager and as a CUDA graph, and with AdamW."""
    from sparseift_llm.bench.rows import ROWS
    from sparseift_llm.bench.step import models_of

    row = ROWS["step_gpu"]
    for name, model in models_of(row).items():
        tokens = torch.randint(model.config.vocab_size, (row.tokens // row.seq_len, row.seq_len), device=row.device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def passes(model: Any = model, tokens: Tensor = tokens) -> None:
            model.zero_grad()
            with torch.autocast(row.device, row.dtype):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()

        def step(passes: Callable[[], None] = passes, optimizer: Any = optimizer) -> None:
            passes()
            optimizer.step()

        results.time(f"step {name}, eager", step)
        results.rows[-1]["note"] = f"peak {peak_bytes(step, row.device) / 1e9:,.2f} GB"
        results.time(f"passes {name}, eager", passes)
        try:
            replay = captured(passes)
        except RuntimeError as problem:  # what a model of transformers does on the host may not be captured
            print(f"passes {name}: no CUDA graph, {problem}", file=sys.stderr)
        else:
            results.time(f"passes {name}, CUDA graph", replay)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path, help="where the JSON is written")
    parser.add_argument("--dry", action="store_true", help="tiny shapes in Triton's interpreter")
    parser.add_argument("--no-tma", action="store_true", help="leave the configurations that read by TMA out")
    parser.add_argument("--no-step", action="store_true", help="leave the training steps out")
    arguments = parser.parse_args(words)
    if not arguments.dry and not torch.cuda.is_available():
        print("there is no CUDA GPU here; --dry tests this program without one", file=sys.stderr)
        return 2
    setting = DRY if arguments.dry else REAL
    results = Results(setting)
    torch.manual_seed(0)
    use_block_kernel("triton")
    if not arguments.dry:
        os.environ[TMA_VARIABLE] = "1" if not arguments.no_tma and tma_works() else "0"
        compile_beforehand(setting)
    measure_ceilings(results)
    for shape in shapes(setting):
        measure_products(results, shape)
    measure_feed_forwards(results)
    if not arguments.dry and not arguments.no_step:
        measure_steps(results)
    gpu = "Triton's interpreter" if arguments.dry else torch.cuda.get_device_name()
    found = {"gpu": gpu, "tma": is_wanted(), "rows": results.rows, "configurations": configurations()}
    write_json(arguments.output, {**found, "machine": machine(), "versions": versions(), "commit": commit()})
    print(f"{gpu}\n\n{results.table()}")
    return 0


def tma_works() -> bool:
    """Whether gpu_tma.py found every configuration that reads by TMA right; what it found is on standard error."""
    check = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("gpu_tma.py"))], stdout=sys.stderr, check=False
    )
    return check.returncode == 0


def configurations() -> dict[str, dict[str, str]]:
    """What the tuner chose: kernel -> what it depends on -> configuration."""
    kernels = {"product": triton_tuning.product, "weight gradient": triton_tuning.weight_gradient}
    return {name: {str(key): str(config) for key, config in kernel.cache.items()} for name, kernel in kernels.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
