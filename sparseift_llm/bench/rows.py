"""`sparseift bench`: what a dense layer or model, its masked twin and its block-sparse twin cost, side by side.

The three take turns in one run and medians are compared, because absolute times on a shared machine are noise.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, PreTrainedModel

from sparseift_llm import isoflop
from sparseift_llm.bench.measure import peak_bytes, seconds_of, take_turns
from sparseift_llm.config.transform import DSTConfig, SparseIFTConfig
from sparseift_llm.conversion.install import sparsify
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.layers.block_ffn import BlockFeedForward
from sparseift_llm.layers.masked import masked_projection
from sparseift_llm.models.architectures import build_model
from sparseift_llm.models.presets import load_config
from sparseift_llm.planning.planner import count_flops
from sparseift_llm.topology.blocks import random_columns, tile_mask
from sparseift_llm.training.controller import SparseTrainingController
from sparseift_llm.utils.provenance import commit, machine, versions
from sparseift_llm.utils.tables import markdown_table

SPARSITY = 0.75
UPDATE_EVERY_STEPS = 100
VARIANTS = ("dense", "masked", "block")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        name: what `--only` takes.
        level: `layer` (an FFN made Wide 75%, scope model; forward and backward) or `step` (a training step of a
            GPT-2 with scope ffn; AdamW and the amortised mask update included).
        device: `cpu` or `cuda`.
        dtype: of weights at level `layer`, of autocast at level `step`.
        tile: block size.
        tokens: per forward pass.
        hidden: of the dense twin.
        model: `step`: the dense config, a preset's name or GPT-2 fields.
        seq_len: `step`: tokens per sequence.
    """

    name: str
    level: str
    device: str
    dtype: torch.dtype
    tile: int
    tokens: int
    hidden: int = 768
    model: str | dict[str, Any] = ""
    seq_len: int = 0


_SMALL_GPT: dict[str, Any] = {
    "n_embd": 512,
    "n_layer": 4,
    "n_head": 8,
    "n_positions": 256,
    "vocab_size": 4096,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ROWS = {
    row.name: row
    for row in (
        Row("ffn_fp32", "layer", "cpu", torch.float32, 128, 2048),
        Row("ffn_bf16", "layer", "cpu", torch.bfloat16, 128, 2048),
        Row("step_cpu", "step", "cpu", torch.float32, 128, 2048, 512, _SMALL_GPT, 256),
        Row("ffn_gpu", "layer", "cuda", torch.bfloat16, 128, 16384),
        Row("step_gpu", "step", "cuda", torch.bfloat16, 128, 16384, 768, "gpt3-small", 1024),
    )
}
CROSSOVER = [
    Row(f"cross_{hidden}_{tile}", "layer", "cpu", torch.float32, tile, 1024, hidden)
    for hidden in (128, 256, 512, 1024)
    for tile in (16, 32, 64, 128)
]


def bench(rows: list[Row], repeats: int = 9) -> dict[str, Any]:
    """Measure `rows` one after the other.

    Args:
        rows: of `ROWS` or `CROSSOVER`.
        repeats: turns of each contestant, after two that are not counted.

    Returns:
        JSON-ready: `rows` and the machine, versions and commit they belong to. Times are medians in seconds.

    Raises:
        ValueError: a row needs a CUDA device and there is none.
    """
    for row in rows:
        if row.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"{row.name} needs a CUDA device, and there is none here; choose another row with --only")
    measured = [_measure_layer(row, repeats) if row.level == "layer" else _measure_step(row, repeats) for row in rows]
    return {"rows": measured, "machine": machine(), "versions": versions(), "commit": commit()}


def render(result: Mapping[str, Any]) -> str:
    """The result as a Markdown table."""
    header = ("what", "device, dtype", "tile", "tokens", "dense", "masked", "block", "floor")
    cells = [
        (
            row["name"],
            f"{row['device']}, {row['dtype']}",
            row["tile"],
            row["tokens"],
            f"{row['dense_s'] * 1e3:.1f} ms",
            f"{row['ratio_masked']:.2f}x",
            f"{row['ratio_block']:.2f}x",
            f"{row['floor_s'] / row['dense_s']:.2f}x",
        )
        for row in result["rows"]
    ]
    return markdown_table(header, cells, "llrrrrrr")


def render_crossover(result: Mapping[str, Any]) -> str:
    """A result of `CROSSOVER` as a Markdown table: block over dense, and masked over dense, by width and tile."""
    ratios = {(row["hidden"], row["tile"]): row for row in result["rows"]}
    hiddens, tiles = (sorted({key[index] for key in ratios}) for index in (0, 1))
    header = ["dense hidden size", "masked", *(f"tile {tile}" for tile in tiles)]
    rows = []
    for hidden in hiddens:
        masked = statistics.median(ratios[hidden, tile]["ratio_masked"] for tile in tiles)
        rows.append([hidden, f"{masked:.2f}x", *(f"{ratios[hidden, tile]['ratio_block']:.2f}x" for tile in tiles)])
    return markdown_table(header, rows, "r" * len(header))


class FeedForward(nn.Module):
    """up, GELU, down: one FFN, whose layers may be of any kind."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = up, nn.GELU(approximate="tanh"), down

    def forward(self, x: Tensor) -> Tensor:
        """(T, hidden) -> (T, hidden)."""
        y: Tensor = self.down(self.act(self.up(x)))
        return y


def _feed_forwards(row: Row) -> dict[str, nn.Module]:
    """The dense FFN of sides (hidden, 4 hidden), and its Wide 75% twins of twice those sides with equal tiles."""
    hidden = row.hidden
    dense = FeedForward(nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden))
    pairs = []
    for index, (inputs, outputs) in enumerate(((2 * hidden, 8 * hidden), (8 * hidden, 2 * hidden))):
        wide, dense_shape = nn.Linear(inputs, outputs), (outputs // 2, inputs // 2)
        rows, columns = outputs // row.tile, inputs // row.tile
        slots = random_columns(rows, columns, int((1 - SPARSITY) * rows * columns), seed=index)
        block = BlockSparseLinear(wide, slots, row.tile, dense_shape)
        masked = masked_projection(wide, block.num_active, dense_shape)
        tiles = tile_mask(slots, rows, columns)
        masked.set_mask(tiles.repeat_interleave(row.tile, 0).repeat_interleave(row.tile, 1))
        pairs.append((masked, block))
    return {
        "dense": dense,
        "masked": FeedForward(pairs[0][0], pairs[1][0]),
        "block": BlockFeedForward(FeedForward(pairs[0][1], pairs[1][1]), ("up", "act", "down")),
    }


def _measure_layer(row: Row, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    layers = {name: layer.to(row.device, row.dtype) for name, layer in _feed_forwards(row).items()}
    width = {"dense": row.hidden, "masked": 2 * row.hidden, "block": 2 * row.hidden}
    x = {
        name: torch.randn(row.tokens, width[name], device=row.device, dtype=row.dtype, requires_grad=True)
        for name in VARIANTS
    }
    gradient = {name: torch.randn_like(x[name]) for name in VARIANTS}
    outputs: dict[str, Tensor] = {}

    def forward(name: str) -> None:
        layers[name].zero_grad()
        x[name].grad = None
        outputs[name] = layers[name](x[name])

    def backward(name: str) -> None:
        outputs.pop(name).backward(gradient[name])

    def both(name: str) -> None:
        forward(name)
        backward(name)

    parts = {name: {"forward_s": partial(forward, name), "backward_s": partial(backward, name)} for name in VARIANTS}
    times = take_turns(parts, row.device, repeats)
    total = {name: statistics.median(map(sum, zip(*times[name].values(), strict=True))) for name in VARIANTS}
    num_active = 8 * row.hidden**2
    flops = isoflop.TRAINING_FACTOR * isoflop.linear_flops(num_active) * row.tokens
    # input, output and their gradients, each written once and read once; what is in between can stay in cache
    traffic = 4 * row.tokens * (2 + 2) * row.hidden * x["dense"].element_size()
    states = {
        name: sum(2 * p.nbytes for p in layer.parameters()) + _buffer_bytes(layer) for name, layer in layers.items()
    }
    peaks = {name: peak_bytes(partial(both, name), row.device) for name in VARIANTS}
    split = {
        f"{name}_{part}": statistics.median(values)
        for name in ("dense", "block")
        for part, values in times[name].items()
    }
    return {**_row(row, total, _floor(row, flops, traffic), states, peaks), **split}


def _measure_step(row: Row, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    models = _models(row)
    optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}
    vocab, batch = models["dense"].config.vocab_size, row.tokens // row.seq_len
    tokens = torch.randint(vocab, (batch, row.seq_len), device=row.device)

    def step(name: str) -> None:
        with torch.autocast(row.device, row.dtype, enabled=row.dtype != torch.float32):
            loss = models[name](input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    times = take_turns({name: {"step": partial(step, name)} for name in VARIANTS}, row.device, repeats)
    total = {name: statistics.median(times[name]["step"]) for name in VARIANTS}
    step_peaks = {name: peak_bytes(partial(step, name), row.device) for name in VARIANTS}
    sparse = ("masked", "block")
    controllers = [SparseTrainingController(models[name], optimizers[name], 10**6, micro_batches=1) for name in sparse]
    updates = take_turns({name: {"step": partial(step, name)} for name in sparse}, row.device, max(3, repeats // 3))
    update_peaks = {name: peak_bytes(partial(step, name), row.device) for name in sparse}
    for controller in controllers:
        controller.close()
    update_s = {name: statistics.median(updates[name]["step"]) for name in sparse}
    for name in sparse:
        total[name] += max(0.0, update_s[name] - total[name]) / UPDATE_EVERY_STEPS
    states = {name: _state_bytes(models[name], optimizers[name]) for name in VARIANTS}
    flops = count_flops(models["block"], row.seq_len).training * row.tokens
    traffic = 2 * states["block"]  # the optimizer reads and writes all of it once
    return {
        **_row(row, total, _floor(row, flops, traffic), states, step_peaks),
        **{f"{name}_update_step_s": update_s[name] for name in sparse},
        **{f"{name}_update_step_peak_bytes": update_peaks[name] for name in sparse},
        "update_every_steps": UPDATE_EVERY_STEPS,
    }


def _models(row: Row) -> dict[str, PreTrainedModel]:
    """The dense model and its twins, Wide 75% in the FFN; masks would change on every step once a controller runs."""
    fields: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    # one kernel instead of eight elementwise ones: the baseline should be as good as it gets
    fields["activation_function"] = "gelu_pytorch_tanh"
    config = GPT2Config(**row.model) if isinstance(row.model, dict) else load_config(row.model)
    for key, value in fields.items():
        setattr(config, key, value)
    dst = DSTConfig("rigl", update_every_steps=1)
    masked = SparseIFTConfig(scope="ffn", sparsity=SPARSITY, dst=dst)
    block = SparseIFTConfig(scope="ffn", sparsity=SPARSITY, dst=dst, structure="block", block_size=row.tile)
    models = {
        "dense": build_model(copy.deepcopy(config)),
        "masked": sparsify(config, masked),
        "block": sparsify(config, block),
    }
    return {name: model.to(row.device) for name, model in models.items()}  # type: ignore[arg-type]


def _floor(row: Row, flops: float, traffic: float) -> float:
    """Seconds below which this machine hardly goes: FLOPs at its GEMM rate or bytes at its copy bandwidth.

    The rate is the better one of the row's dtype and float32: CPUs may multiply bfloat16 more slowly.
    """
    gemm = min(_gemm_seconds(row, dtype) for dtype in {row.dtype, torch.float32})
    source = torch.zeros(32 << 20, device=row.device)
    target = torch.zeros_like(source)
    copying = statistics.median(seconds_of(lambda: target.copy_(source), row.device) for _ in range(7))
    return max(flops * gemm / (2 * row.tokens * 768 * 3072), traffic * copying / (2 * source.nbytes))


def _gemm_seconds(row: Row, dtype: torch.dtype) -> float:
    """Of a (tokens, 768) x (768, 3072) product."""
    left = torch.randn(row.tokens, 768, device=row.device, dtype=dtype)
    right = torch.randn(768, 3072, device=row.device, dtype=dtype)
    return statistics.median(seconds_of(lambda: left @ right, row.device) for _ in range(7))


def _row(
    row: Row, total: Mapping[str, float], floor: float, states: Mapping[str, int], peaks: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "name": row.name,
        "level": row.level,
        "device": row.device,
        "dtype": str(row.dtype).removeprefix("torch."),
        "tile": row.tile,
        "tokens": row.tokens,
        "hidden": row.hidden,
        **{f"{name}_s": total[name] for name in VARIANTS},
        "ratio_masked": total["masked"] / total["dense"],
        "ratio_block": total["block"] / total["dense"],
        "floor_s": floor,
        "ratio_floor": total["block"] / floor,
        "state_bytes_ratio": states["block"] / states["dense"],
        "state_bytes_ratio_masked": states["masked"] / states["dense"],
        **{f"{name}_peak_bytes": peaks[name] for name in VARIANTS},
    }


def _buffer_bytes(module: nn.Module) -> int:
    return sum(buffer.nbytes for buffer in module.buffers())


def _state_bytes(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, gradients, optimizer state, and masks or tile indices, as they are in memory."""
    parameters = sum(2 * parameter.nbytes for parameter in model.parameters())
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return parameters + sum(value.nbytes for value in moments) + sum(map(_buffer_bytes, sparse_layers(model).values()))
