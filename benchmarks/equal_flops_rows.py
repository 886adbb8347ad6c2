"""What the study at equal whole-model FLOPs compares: the rows, the dense models, and rates to train them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

WIDTHS = (64, 128, 256, 1024)
SEEDS = (0, 1, 2)
LAYERS = (2, 8)
# Llama normalises by the mean square and gates its FFN; StarCoder2 has GPT-2's LayerNorm, GELU and biases, and Llama's
# rotary positions, so that the size of its heads does not follow from its width.
ARCHITECTURES = ("llama", "starcoder2")
FFN_MATRICES: Mapping[str, int] = {"llama": 3, "starcoder2": 2}
HEAD_DIM, VOCAB, SEQ_LEN = 32, 1024, 128
WEIGHT_DECAY = 0.1  # the recipe's
# The recipe's tokens are 41 for each projection weight at width 64 (10 with eight layers), and 10 at 128. More tokens
# make that 10 at larger widths, too. Width 1024, with 26M weights in projections, is for a GPU.
MAX_STEPS: Mapping[int, int] = {64: 1000, 128: 1000, 256: 2000, 1024: 4000}
BATCH_SIZE: Mapping[int, int] = {64: 32, 128: 32, 256: 64, 1024: 512}
IN_BFLOAT16 = (1024,)


@dataclass(frozen=True, order=True)
class Baseline:
    """The dense model that rows are compared with.

    Args:
        width: its hidden size.
        layers: its decoder layers.
        architecture: one of `ARCHITECTURES`.
    """

    width: int
    layers: int = LAYERS[0]
    architecture: str = ARCHITECTURES[0]

    @classmethod
    def from_name(cls, name: str) -> Baseline:
        """The one whose `str` is `name`."""
        found = re.fullmatch(r"width(\d+)(?:-layers(\d+))?(?:-([a-z]\w*))?", name)
        if found is None:
            raise ValueError(f"{name!r} names no dense model")
        width, layers, architecture = found.groups()
        return cls(int(width), int(layers or LAYERS[0]), architecture or ARCHITECTURES[0])

    @property
    def title(self) -> str:
        """Of its table."""
        parts = [f"width {self.width}"]
        parts += [f"{self.layers} layers"] if self.layers != LAYERS[0] else []
        return ", ".join(parts + ([self.architecture] if self.architecture != ARCHITECTURES[0] else []))

    def __str__(self) -> str:
        layers = f"-layers{self.layers}" if self.layers != LAYERS[0] else ""
        architecture = f"-{self.architecture}" if self.architecture != ARCHITECTURES[0] else ""
        return f"width{self.width}{layers}{architecture}"


@dataclass(frozen=True, order=True)
class Rates:
    """The learning rates of a run, and its regularisation.

    Args:
        rate: of all parameters but the embedding.
        embedding_factor: how many times that rate the embedding has.
        weight_decay: of all matrices.
        attention_dropout: the share of attention weights that are dropped, the only dropout that a Llama has.
    """

    rate: float
    embedding_factor: float
    weight_decay: float = WEIGHT_DECAY
    attention_dropout: float = 0.0

    @property
    def is_regularised(self) -> bool:
        """Whether regularisation is another than the recipe's."""
        return (self.weight_decay, self.attention_dropout) != (WEIGHT_DECAY, 0.0)

    @property
    def word(self) -> str:
        """For the command line; regularisation is left out where it is the recipe's."""
        numbers = [self.rate, self.embedding_factor]
        if self.is_regularised:
            numbers += [self.weight_decay, self.attention_dropout]
        return ",".join(f"{number:g}" for number in numbers)

    def neighbours(self, regularises: bool = False) -> list[Rates]:
        """Twice and half of each rate.

        Where it `regularises`, also three times and a third of the weight decay, and 0.1 more and less dropout.
        """
        found = [replace(self, rate=self.rate * by) for by in (2, 0.5)]
        found += [replace(self, embedding_factor=self.embedding_factor * by) for by in (2, 0.5)]
        if regularises:
            found += [replace(self, weight_decay=float(f"{self.weight_decay * by:.1g}")) for by in (3, 1 / 3)]
            dropouts = [round(self.attention_dropout + by, 1) for by in (0.1, -0.1)]
            found += [replace(self, attention_dropout=dropout) for dropout in dropouts if 0 <= dropout < 1]
        return found

    def __str__(self) -> str:
        decay = "" if self.weight_decay == WEIGHT_DECAY else f"-wd{self.weight_decay:g}"
        dropout = f"-drop{self.attention_dropout:g}" if self.attention_dropout else ""
        return f"lr{self.rate:g}-emb{self.embedding_factor:g}{decay}{dropout}"


@dataclass(frozen=True)
class Row:
    """A model that is compared.

    Args:
        name: safe as a folder's name.
        title: the table's first cell.
        start: where the search for rates begins.
        sparse: `SparseIFTConfig` as a mapping; None for a dense model.
        shape: width of the dense model with two layers -> fields of the model's config; None leaves them as they are.
        widths: those of the dense models that it can be compared with.
        tokens: how many times the usual training tokens it has.
    """

    name: str
    title: str
    start: Rates
    sparse: Mapping[str, Any] | None = None
    shape: Callable[[int], Mapping[str, Any]] | None = None
    widths: tuple[int, ...] = WIDTHS
    tokens: float = 1

    def exists_at(self, baseline: Baseline) -> bool:
        """Whether it can be compared with that dense model."""
        return baseline.width in self.widths and (self.shape is None or baseline == Baseline(baseline.width))

    def config(self, baseline: Baseline) -> dict[str, Any]:
        """Fields of its model's config, before it is made sparse."""
        return {**dense_shape(baseline), **(self.shape(baseline.width) if self.shape else {})}


def dense_shape(baseline: Baseline) -> dict[str, Any]:
    """Fields of the dense model's config: heads of 32, and an FFN of about 8 width^2 weights."""
    width = baseline.width
    return {
        "hidden_size": width,
        "intermediate_size": width * 11 // 4 if FFN_MATRICES[baseline.architecture] == 3 else width * 4,
        "num_hidden_layers": baseline.layers,
        "num_attention_heads": width // HEAD_DIM,
        "num_key_value_heads": width // HEAD_DIM,
        "head_dim": HEAD_DIM,
    }


def tokens_per_weight(baseline: Baseline, row: Row) -> float:
    """Training tokens for each weight of the dense model's projections."""
    shape = dense_shape(baseline)
    weights = shape["num_hidden_layers"] * projection_weights(shape, FFN_MATRICES[baseline.architecture])
    return MAX_STEPS[baseline.width] * row.tokens * BATCH_SIZE[baseline.width] * SEQ_LEN / weights


def other_shape(width: int, hidden: float, heads: float, layers: int = LAYERS[0]) -> dict[str, Any]:
    """A dense Llama of another shape with the FLOPs of the usual one, by the choice of its FFN's inner side.

    Args:
        width: hidden size of the usual one.
        hidden, heads: its hidden size, and the size of its heads together, as multiples of `width`.
        layers: its decoder layers.
    """
    usual = dense_shape(Baseline(width))
    hidden_size, head_dim = int(width * hidden), int(HEAD_DIM * heads)
    attention = 8 * hidden_size * width * heads + 4 * SEQ_LEN * width * heads
    around = layers * attention + 2 * hidden_size * VOCAB
    left = forward_flops(usual) - around
    shape = {"hidden_size": hidden_size, "num_hidden_layers": layers, "head_dim": head_dim}
    return {**usual, **shape, "intermediate_size": round(left / layers / (6 * hidden_size))}


def forward_flops(shape: Mapping[str, Any], ffn_matrices: int = 3) -> float:
    """FLOPs of a token's forward pass in a dense model; attention is counted in full, as everywhere in this project."""
    attention = 4 * SEQ_LEN * shape["num_attention_heads"] * shape["head_dim"]
    return (
        shape["num_hidden_layers"] * (2 * projection_weights(shape, ffn_matrices) + attention)
        + 2 * shape["hidden_size"] * VOCAB
    )


def projection_weights(shape: Mapping[str, Any], ffn_matrices: int = 3) -> int:
    """Weights of the projections of one layer of a dense model."""
    heads = shape["num_attention_heads"] * shape["head_dim"]
    return int(shape["hidden_size"] * (4 * heads + ffn_matrices * shape["intermediate_size"]))


STATIC = {"dst": {"algorithm": "static"}}


def residual(k: int, **fields: Any) -> dict[str, Any]:
    """A residual stream k times as wide, with static masks."""
    return {"scope": "residual", "sparsity": 1 - 1 / k, **STATIC, **fields}


def ffn(k: int, **fields: Any) -> dict[str, Any]:
    """An FFN whose inner side is k times as wide, with static masks."""
    return {"scope": "ffn", "sparsity": 1 - 1 / k, **STATIC, **fields}


def tiles(size: int) -> dict[str, Any]:
    """Whole tiles instead of single weights."""
    return {"structure": "block", "block_size": size}


WIDE_START, DENSE_START, FFN_START = Rates(4e-3, 4), Rates(8e-3, 4), Rates(16e-3, 8)
WHOLE_MODEL = {"accounting": "whole_model", "seq_len": SEQ_LEN}
MODEL = {"scope": "model", "sparsity": 0.75, **WHOLE_MODEL, **STATIC}
DENSE_EMBEDDING = {"embedding": "dense", **WHOLE_MODEL}
WIDER = partial(other_shape, hidden=1.5, heads=0.5)
NARROWER = partial(other_shape, hidden=0.75, heads=1)
DEEPER = partial(other_shape, hidden=0.875, heads=0.75, layers=3)
ROWS = (
    Row("dense", "dense", DENSE_START),
    Row("dense-quarter", "dense, a quarter of the tokens", DENSE_START, tokens=0.25),
    Row("dense-half", "dense, half the tokens", DENSE_START, tokens=0.5),
    Row("dense-double", "dense, twice the tokens", DENSE_START, tokens=2),
    Row("dense-wide", "dense, hidden side 1.5 times, half the heads' size", DENSE_START, shape=WIDER),
    Row("dense-narrow", "dense, hidden side 0.75 times", DENSE_START, shape=NARROWER),
    Row("dense-deep", "dense, hidden side 0.875 times, three layers", DENSE_START, shape=DEEPER),
    Row("residual2", "residual, 2 times, single weights", WIDE_START, residual(2)),
    Row("residual2-quarter", "residual, 2 times, a quarter of the tokens", WIDE_START, residual(2), tokens=0.25),
    Row("residual2-half", "residual, 2 times, half the tokens", WIDE_START, residual(2), tokens=0.5),
    Row("residual2-double", "residual, 2 times, twice the tokens", WIDE_START, residual(2), tokens=2),
    Row("residual2-embedding", "residual, 2 times, dense embedding", WIDE_START, residual(2, **DENSE_EMBEDDING)),
    Row("residual4", "residual, 4 times, single weights", WIDE_START, residual(4)),
    Row("residual2-tile8", "residual, 2 times, tiles of 8", WIDE_START, residual(2, **tiles(8))),
    Row("residual2-tile16", "residual, 2 times, tiles of 16", WIDE_START, residual(2, **tiles(16))),
    Row(
        "residual2-embedding-tile16",
        "residual, 2 times, dense embedding, tiles of 16",
        WIDE_START,
        residual(2, **DENSE_EMBEDDING, **tiles(16)),
        widths=WIDTHS[1:],  # at 64 there are fewer tiles left than block-rows
    ),
    Row("residual2-tile32", "residual, 2 times, tiles of 32", WIDE_START, residual(2, **tiles(32)), widths=(128, 256)),
    Row("residual2-tile128", "residual, 2 times, tiles of 128", WIDE_START, residual(2, **tiles(128)), widths=(1024,)),
    Row("residual4-tile16", "residual, 4 times, tiles of 16", WIDE_START, residual(4, **tiles(16))),
    Row("residual4-tile32", "residual, 4 times, tiles of 32", WIDE_START, residual(4, **tiles(32)), widths=(128, 256)),
    Row("model", "scope model at whole-model FLOPs, 75%", WIDE_START, MODEL),
    Row("ffn", "scope ffn, 75%", FFN_START, ffn(4)),
    Row("ffn2", "scope ffn, 50%", FFN_START, ffn(2)),
    Row("ffn-tile16", "scope ffn, 75%, tiles of 16", FFN_START, ffn(4, **tiles(16))),
    Row("ffn2-tile8", "scope ffn, 50%, tiles of 8", FFN_START, ffn(2, **tiles(8))),
    Row("ffn2-tile16", "scope ffn, 50%, tiles of 16", FFN_START, ffn(2, **tiles(16))),
    Row("ffn2-pattern", "scope ffn, 2:4", FFN_START, {"scope": "ffn", "structure": "2:4", **STATIC}),
)
BY_NAME = {row.name: row for row in ROWS}
