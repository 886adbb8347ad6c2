"""Which comparisons `sparseift bench` makes: every row is a setting of the three contestants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

VARIANTS = ("dense", "masked", "block")


@dataclass(frozen=True)
class Row:
    """One comparison of a dense contestant with its masked and its block-sparse twin.

    Args:
        name: how `sparseift bench --only` calls it.
        level: `layer` for the forward and backward pass of an FFN, or `step` for a training step of a model. A step
            includes AdamW, and its share of a mask update.
        device: `cpu` or `cuda`.
        dtype: of the weights at level `layer`, and of autocast at level `step`.
        tile: side of a tile.
        tokens: number of tokens in one forward pass.
        hidden: hidden size of the dense contestant.
        model: at level `step`, the dense config: the name of a preset, or fields of a GPT2Config, or of a LlamaConfig
            for scope `residual`.
        seq_len: at level `step`, tokens per sequence.
        scope: of `Wide`. A layer has the widths that scope `model` or `residual` gives it.
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
    scope: Literal["model", "ffn", "residual"] = "model"

    @property
    def sparsity(self) -> float:
        """That of a stream twice as wide for scope `residual`, else of an FFN or a model with 75% zeros."""
        return 0.5 if self.scope == "residual" else 0.75


_SMALL_GPT: dict[str, Any] = {
    "n_embd": 512,
    "n_layer": 4,
    "n_head": 8,
    "n_positions": 256,
    "vocab_size": 4096,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_SMALL_LLAMA: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}
ROWS = {
    row.name: row
    for row in (
        Row("ffn_fp32", "layer", "cpu", torch.float32, 128, 2048),
        Row("ffn_bf16", "layer", "cpu", torch.bfloat16, 128, 2048),
        Row("step_cpu", "step", "cpu", torch.float32, 128, 2048, 512, _SMALL_GPT, 256, "ffn"),
        Row("residual_ffn_64", "layer", "cpu", torch.float32, 64, 2048, scope="residual"),
        Row("residual_ffn_128", "layer", "cpu", torch.float32, 128, 2048, scope="residual"),
        Row("residual_step_64", "step", "cpu", torch.float32, 64, 2048, 512, _SMALL_LLAMA, 256, "residual"),
        Row("residual_step_128", "step", "cpu", torch.float32, 128, 2048, 512, _SMALL_LLAMA, 256, "residual"),
        Row("ffn_gpu", "layer", "cuda", torch.bfloat16, 128, 16384),
        Row("step_gpu", "step", "cuda", torch.bfloat16, 128, 16384, 768, "gpt3-small", 1024, "ffn"),
    )
}
CROSSOVER = [
    Row(f"cross_{hidden}_{tile}", "layer", "cpu", torch.float32, tile, 1024, hidden)
    for hidden in (128, 256, 512, 1024)
    for tile in (16, 32, 64, 128)
]
