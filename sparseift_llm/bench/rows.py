"""Which comparisons `sparseift bench` makes: every row is a setting of the three contestants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

VARIANTS = ("dense", "masked", "block")
SPARSITY = 0.75


@dataclass(frozen=True)
class Row:
    """One comparison of a dense contestant with its masked and its block-sparse twin.

    Args:
        name: how `sparseift bench --only` calls it.
        level: `layer` for the forward and backward pass of an FFN that is made Wide 75% with scope `model`, or `step`
            for a training step of a GPT-2 with scope `ffn`. A step includes AdamW, and its share of a mask update.
        device: `cpu` or `cuda`.
        dtype: of the weights at level `layer`, and of autocast at level `step`.
        tile: side of a tile.
        tokens: number of tokens in one forward pass.
        hidden: hidden size of the dense contestant.
        model: at level `step`, the dense config: the name of a preset, or fields of a GPT2Config.
        seq_len: at level `step`, tokens per sequence.
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
