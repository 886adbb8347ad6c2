"""Which output rows of a fused matrix compute which kind: queries, keys, values, or an FFN's gate.

A fused matrix is several projections of one input in one weight. A reference implementation with a matrix for each
gives each its own sparsity, so whoever deals out weights has to know the rows of each kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from sparseift_llm.models.architectures import num_kv_heads, sizes_of
from sparseift_llm.models.projections import Projection
from sparseift_llm.models.quirks import CODEGEN_CHUNKS, FUSED_GATES, LATENT_ATTENTION, QKV_LAYOUTS


@dataclass(frozen=True)
class RowPattern:
    """The kinds of a matrix's output rows, as a pattern that repeats.

    Args:
        pattern: pairs of a kind and a number of consecutive rows, e.g. `(("q", 64), ("k", 64), ("v", 64))`.
        repeats: how often the pattern follows itself; pattern rows times repeats are all rows of the matrix.

    >>> RowPattern((("q", 2), ("k", 1)), 2).labels()
    ['q', 'q', 'k', 'q', 'q', 'k']
    """

    pattern: tuple[tuple[str, int], ...]
    repeats: int = 1

    @property
    def num_rows(self) -> int:
        """Rows of the whole matrix."""
        return self.repeats * sum(number for _, number in self.pattern)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds in the order of their first row."""
        return tuple(dict.fromkeys(kind for kind, _ in self.pattern))

    def labels(self) -> list[str]:
        """The kind of every row."""
        return [kind for kind, number in self.pattern for _ in range(number)] * self.repeats

    def rows(self, kind: str) -> Tensor:
        """Numbers of the rows of `kind`, int64, ascending."""
        return torch.tensor([row for row, label in enumerate(self.labels()) if label == kind], dtype=torch.int64)


def row_pattern(projection: Projection, config: PreTrainedConfig) -> RowPattern | None:
    """The kinds of the rows of a projection, or None where all its rows are of one kind.

    Args:
        projection: of a model with this config.
        config: the model's config; its model type says how fused matrices are ordered.

    Raises:
        ValueError: the matrix is fused, but the order of its rows is not known for this model type.
    """
    sizes = sizes_of(config)
    if projection.kinds == ("mlp_in",) and projection.out_features == 2 * sizes.ffn:
        if config.model_type not in FUSED_GATES:
            raise _unknown(projection, config)
        return RowPattern((("gate", sizes.ffn), ("up", sizes.ffn)))
    if len(projection.kinds) == 1:
        return None
    pattern = _latent_rows(projection, config) if config.model_type in LATENT_ATTENTION else _qkv_rows(config)
    if pattern is None or pattern.num_rows != projection.out_features:
        raise _unknown(projection, config)
    return pattern


def _qkv_rows(config: PreTrainedConfig) -> RowPattern | None:
    sizes, num_kv, layout = sizes_of(config), num_kv_heads(config), QKV_LAYOUTS.get(config.model_type)
    head = sizes.head_dim
    if layout == "bigcode":
        num_kv = 1 if config.multi_query else sizes.num_heads
        layout = "blocks" if config.multi_query else "per_head"
    if layout == "falcon":
        if not config.new_decoder_architecture:
            num_kv = 1 if config.multi_query else sizes.num_heads
        return RowPattern((("q", sizes.num_heads // num_kv * head), ("k", head), ("v", head)), num_kv)
    if layout == "per_head":
        return RowPattern((("q", head), ("k", head), ("v", head)), sizes.num_heads)
    if layout == "codegen":
        width = sizes.attention_width // CODEGEN_CHUNKS
        return RowPattern((("q", width), ("v", width), ("k", width)), CODEGEN_CHUNKS)
    if layout == "blocks":
        return RowPattern((("q", sizes.attention_width), ("k", num_kv * head), ("v", num_kv * head)))
    return None


def _latent_rows(projection: Projection, config: PreTrainedConfig) -> RowPattern:
    """The rows of a fused matrix of latent attention.

    The matrix that reads the hidden state makes a latent that all heads share, and a rotary key. The one that reads
    the latent makes the keys and values of each head.
    """
    if projection.in_features == config.hidden_size:
        return RowPattern((("kv", config.kv_lora_rank), ("k", config.qk_rope_head_dim)))
    return RowPattern((("k", config.qk_nope_head_dim), ("v", config.v_head_dim)), config.num_attention_heads)


def _unknown(projection: Projection, config: PreTrainedConfig) -> ValueError:
    return ValueError(
        f"{projection.name} holds several projections in one matrix ({', '.join(projection.kinds)}, "
        f"{projection.out_features} rows), but in which order {config.model_type} keeps their rows is not known"
    )
