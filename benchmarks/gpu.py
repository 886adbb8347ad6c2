"""Block-sparse products, feed-forward blocks and training steps on one CUDA GPU, measured against what is predicted.

    python benchmarks/gpu.py results.json            # a few minutes on an H200; most of it compilation
    python benchmarks/gpu.py results.json --dry      # tiny shapes in Triton's interpreter, to test this program

It prints a table and writes one JSON. Every product is checked against a float64 product with the same zeros first. All
configurations of the kernels are compiled beforehand in processes of their own, as many as there are cores. The formula
of the predictions is in docs/block.md, "Time on a GPU".
"""

from __future__ import annotations

import argparse
import heapq
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseift_llm.bench.measure import peak_bytes, queued_seconds
from sparseift_llm.ops.kernels import triton_tuning
from sparseift_llm.ops.kernels.choice import use_block_kernel
from sparseift_llm.ops.kernels.triton import TRITON
from sparseift_llm.ops.kernels.triton_launch import (
    MULTIPROCESSORS,
    Epilogue,
    Operand,
    empty_token_sums,
    product,
    token_pieces,
)
from sparseift_llm.topology import blocks
from sparseift_llm.utils.files import write_json
from sparseift_llm.utils.provenance import commit, machine, versions
from sparseift_llm.utils.tables import markdown_table

TENSOR_FLOPS, BYTES_PER_S = (
    650e12,
    4.8e12,
)  # of an H200: a large dense bfloat16 product, and its memory by its data sheet
START_STEPS = 2.3  # of 64 features: what a program takes besides its loop
STEP = 64


@dataclass(frozen=True)
class Setting:
    """What is measured: sizes, and how often."""

    device: str
    dtype: torch.dtype
    tokens: int
    hidden: int
    tile: int
    calls: int


REAL = Setting("cuda", torch.bfloat16, 16384, 768, 128, 30)
DRY = Setting("cpu", torch.float32, 70, 16, 16, 1)


@dataclass(frozen=True)
class Shape:
    """A block-sparse matrix of (rows, columns) tiles of which `tiles` are active."""

    name: str
    rows: int
    columns: int
    tiles: int


def shapes(setting: Setting) -> list[Shape]:
    """Those of an FFN hidden -> 4 hidden made Wide 75%, at the widths of scope `model` and of scope `ffn`."""
    side = setting.hidden // setting.tile
    tiles = 4 * side * side
    wide = [Shape("up", 8 * side, 2 * side, tiles), Shape("down", 2 * side, 8 * side, tiles)]
    return [*wide, Shape("up, scope ffn", 16 * side, side, tiles), Shape("down, scope ffn", side, 16 * side, tiles)]


# ---- what is predicted


def predicted_product(setting: Setting, counts: Sequence[int], written: int) -> float:
    """Seconds of a product whose output blocks have `counts` tiles, and that writes `written` bytes.

    Programs are handed out in order to the first of 2 * MULTIPROCESSORS places that is free, each with half of a
    multiprocessor's rate. A program takes START_STEPS and one step per 64 features.
    """
    block = 128
    step = 2 * block * setting.tile * STEP / (TENSOR_FLOPS / (2 * MULTIPROCESSORS))
    places = [0.0] * (2 * MULTIPROCESSORS)
    for count in sorted(counts, reverse=True):
        for _ in range(math.ceil(setting.tokens / block)):
            heapq.heappush(places, heapq.heappop(places) + (START_STEPS + count * setting.tile / STEP) * step)
    return max(max(places), written / BYTES_PER_S)


def predicted_weight_gradient(setting: Setting, tiles: int) -> float:
    """Seconds of a weight gradient: rounds of pieces on the busiest multiprocessor, and the pieces' sums in memory."""
    pieces = token_pieces(tiles, setting.tokens)
    whole = 2 * setting.tokens * setting.tile**2 / (TENSOR_FLOPS / MULTIPROCESSORS)
    passed_on = 8 * pieces * tiles * setting.tile**2 / BYTES_PER_S if pieces > 1 else 0.0
    return math.ceil(tiles * pieces / MULTIPROCESSORS) / pieces * whole + passed_on


# ---- what is compiled


def compile_beforehand(setting: Setting) -> None:
    """Fill Triton's cache on disk with every configuration that is tuned, in a process for each."""
    configs = len(triton_tuning.PRODUCT_CONFIGS)
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


def normal(setting: Setting, *shape: int) -> Tensor:
    return torch.randn(*shape, device=setting.device, dtype=setting.dtype)


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
    """The three products of a shape, and those of a feed-forward block with their elementwise work; checked first."""
    setting = results.setting
    tile, tokens = setting.tile, setting.tokens
    rows, columns = shape.rows * tile, shape.columns * tile
    places = blocks.random_columns(shape.rows, shape.columns, shape.tiles, 0).to(setting.device)
    tables = blocks.by_column(places, shape.rows, shape.columns)
    weight, bias = normal(setting, shape.tiles, tile, tile) / tile**0.5, normal(setting, rows)
    x, grad = normal(setting, tokens, columns), normal(setting, tokens, rows)
    of_slot = blocks.rows_of_slots(shape.tiles, shape.rows).to(setting.device)
    dense = torch.zeros(shape.rows, shape.columns, tile, tile, device=setting.device, dtype=torch.float64)
    dense[of_slot, places.long()] = weight.double()
    dense = dense.transpose(1, 2).reshape(rows, columns)
    flops = 2 * tokens * shape.tiles * tile**2
    per_row = torch.bincount(of_slot, minlength=shape.rows).tolist()
    per_column = tables.starts.diff().tolist()

    def checked(name: str, run: Callable[[], Tensor], expected: Tensor, predicted: float) -> None:
        error = float((run().double() - expected).norm() / expected.norm())
        if not error < 1e-2:
            raise SystemExit(f"{shape.name}, {name} is wrong: relative error {error:.2e}")
        results.time(f"{shape.name}, {name}", run, flops=flops, predicted_s=predicted, note=f"error {error:.1e}")

    out_bytes, in_bytes = (tokens * width * x.element_size() for width in (rows, columns))
    y, grad_x = x.double() @ dense.T + bias.double(), grad.double() @ dense
    straight, transposed = Operand(x, weight, places), Operand.transposed(grad, weight, tables)
    forward = predicted_product(setting, per_row, out_bytes)
    checked("forward", lambda: product(straight, bias, rows, rows), y, forward)
    hidden = torch.empty_like(grad)
    with_gelu = Epilogue("gelu_tanh", hidden)
    checked(
        "forward and GELU",
        lambda: product(straight, bias, rows, rows, with_gelu),
        F.gelu(y, approximate="tanh"),
        predicted_product(setting, per_row, 2 * out_bytes),
    )
    del y
    backward = predicted_product(setting, per_column, in_bytes)
    checked("input gradient", lambda: product(transposed, None, rows, columns), grad_x, backward)
    sums = empty_token_sums(tokens, columns, x.device)
    with_derivative = Epilogue("gelu_tanh", x, active=torch.empty_like(x), sums=sums)
    slope = torch.ops.aten.gelu_backward(grad_x, x.double(), approximate="tanh")
    checked(
        "input gradient and GELU's",
        lambda: product(transposed, None, rows, columns, with_derivative),
        slope,
        predicted_product(setting, per_column, 3 * in_bytes),
    )
    del grad_x, slope
    full = (grad.double().T @ x.double()).view(shape.rows, tile, shape.columns, tile).transpose(1, 2)
    expected = full[of_slot, places.long()]
    time = predicted_weight_gradient(setting, shape.tiles)
    checked("weight gradient", lambda: TRITON.weight_gradient(grad, x, places, tile), expected, time)


def predicted_feed_forward(setting: Setting) -> float:
    """Seconds of both passes of the block-sparse FFN: its six products, and the sum of the last bias' gradient."""
    up, down, *_ = shapes(setting)
    wide, narrow = (setting.tokens * shape.rows * setting.tile * 2 for shape in (up, down))
    total = predicted_product(setting, [up.tiles // up.rows] * up.rows, 2 * wide)
    total += predicted_product(setting, [down.tiles // down.rows] * down.rows, narrow)
    total += predicted_product(setting, [down.tiles // down.columns] * down.columns, 3 * wide)
    total += predicted_product(setting, [up.tiles // up.columns] * up.columns, narrow)
    return total + 2 * predicted_weight_gradient(setting, up.tiles) + narrow / BYTES_PER_S


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
        compile_beforehand(setting)
    measure_ceilings(results)
    for shape in shapes(setting):
        measure_products(results, shape)
    measure_feed_forwards(results)
    if not arguments.dry and not arguments.no_step:
        measure_steps(results)
    gpu = "Triton's interpreter" if arguments.dry else torch.cuda.get_device_name()
    found = {"gpu": gpu, "rows": results.rows, "configurations": configurations(), "machine": machine()}
    write_json(arguments.output, {**found, "versions": versions(), "commit": commit()})
    print(f"{gpu}\n\n{results.table()}")
    return 0


def configurations() -> dict[str, dict[str, str]]:
    """What the tuner chose: kernel -> what it depends on -> configuration."""
    kernels = {"product": triton_tuning.product, "weight gradient": triton_tuning.weight_gradient}
    return {name: {str(key): str(config) for key, config in kernel.cache.items()} for name, kernel in kernels.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
