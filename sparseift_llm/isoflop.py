"""Every size and FLOP formula of the library, in plain Python; nothing else computes a width or a FLOP.

Legend: s = sparsity, k = width factor. FLOPs count a multiply-add as 2; elementwise work, norms,
softmax and biases are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

OPTIMIZER_TENSORS = 4  # weight, gradient and AdamW's two moments
BYTES_PER_VALUE = 4  # float32 master weights
BYTES_PER_MASK_ENTRY = 1  # torch.bool
BYTES_PER_INDEX = 4  # int32
BLOCK_SIZES = (4, 8, 16, 32, 64, 128, 256)
MIN_TILES_PER_SIDE = 8
TRAINING_FACTOR = 3  # one forward and a backward of twice its cost


def wide_model_factor(sparsity: float) -> float:
    """Factor k = sqrt(1 / (1 - s)) on both sides of every projection (Wide, scope `model`).

    >>> wide_model_factor(0.75)
    2.0
    """
    return math.sqrt(1 / (1 - sparsity))


def wide_ffn_factor(sparsity: float) -> float:
    """Factor 1 / (1 - s) on the FFN's inner size alone (Wide, scope `ffn`).

    >>> wide_ffn_factor(0.75)
    4.0
    """
    return 1 / (1 - sparsity)


def wide_residual_factor(sparsity: float) -> float:
    """Factor 1 / (1 - s) on the hidden size alone (Wide, scope `residual`).

    >>> wide_residual_factor(0.75)
    4.0
    """
    return 1 / (1 - sparsity)


def parallel_branches(sparsity: float) -> int:
    """Number of branches k = 1 / (1 - s), rounded (Parallel).

    >>> parallel_branches(0.75)
    4
    """
    return round(1 / (1 - sparsity))


def factorized_inner(inputs: int, outputs: int, sparsity: float, sparse_u_only: bool = False) -> float:
    """Inner size d at which V (outputs, d) and U (d, inputs) of sparsity s cost inputs * outputs (Factorized).

    Args:
        inputs, outputs: sides of the dense projection.
        sparsity: of both matrices, or of U alone.
        sparse_u_only: V is dense.

    >>> factorized_inner(768, 768, 0.75)
    1536.0
    """
    density = 1 - sparsity
    return inputs * outputs / (inputs * density + outputs * (1 if sparse_u_only else density))


def doped_rank(inputs: int, outputs: int, sparsity: float) -> float:
    """Rank r at which dense V (outputs, r) and U (r, inputs) cost the share s of inputs * outputs (Doped).

    >>> doped_rank(768, 768, 0.75)
    288.0
    """
    return sparsity * inputs * outputs / (inputs + outputs)


def round_size(size: float, multiple: int, valid: Callable[[int], bool] = lambda _: True) -> int:
    """The multiple of `multiple` nearest to `size` that is at least `multiple` and `valid`; ties go up.

    >>> round_size(1086.1, 12)
    1092
    """
    base = math.floor(size / multiple)
    for distance in range(base + 1_000):
        around = {(base + 1 + distance) * multiple, (base - distance) * multiple}
        candidates = [candidate for candidate in around if candidate >= multiple and valid(candidate)]
        if candidates:
            return min(candidates, key=lambda candidate: (abs(candidate - size), -candidate))
    raise ValueError(
        f"no valid size that is a multiple of {multiple} near {size:.1f}; change width_multiple or block_size"
    )


def pattern_active(num_weights: int, pattern: tuple[int, int]) -> int:
    """Active weights of a matrix in which n of every m neighbours are; m divides its inner side.

    >>> pattern_active(6144 * 768, (2, 4))
    2359296
    """
    n, m = pattern
    return num_weights * n // m


@dataclass(frozen=True)
class FlopCount:
    """Forward FLOPs per token of one model at one sequence length.

    Args:
        linear: 2 x active weights of the decoder's projections.
        attention: scores and values, full (not causal) attention: 4 x T x attention width x layers.
        logit: 2 x active weights of the output head: hidden size x vocabulary if it is dense.
    """

    linear: int
    attention: int
    logit: int

    @property
    def forward(self) -> int:
        """All three added up."""
        return self.linear + self.attention + self.logit

    @property
    def training(self) -> int:
        """Forward and backward of one token."""
        return TRAINING_FACTOR * self.forward


def linear_flops(num_active: int) -> int:
    """Forward FLOPs per token of projections with `num_active` active weights."""
    return 2 * num_active


def forward_flops(
    num_active: int, seq_len: int, attention_width: int, num_layers: int, hidden_size: int, vocab_size: int
) -> FlopCount:
    """FLOPs of a decoder with `num_active` active projection weights and a dense head. All arguments are counts.

    >>> round(forward_flops(84_934_656, 1024, 768, 12, 768, 50257).forward / 1e6, 1)
    284.8
    """
    return FlopCount(linear_flops(num_active), 4 * seq_len * attention_width * num_layers, 2 * hidden_size * vocab_size)


def num_active_for_whole_model(target_forward: int, around: FlopCount) -> int:
    """Active weights that fill what is left of `target_forward` FLOPs per token after `around`.

    Args:
        target_forward: forward FLOPs per token of the dense model.
        around: the widened model's attention, logits, and its projections that stay dense.

    Returns:
        Number of weights; not above 0 when `around` alone already costs too much.
    """
    return (target_forward - around.forward) // 2


def run_flops(
    tokens_per_step: int,
    num_steps: int,
    around: FlopCount,
    active_weight_steps: int = 0,
    dense_gradient_weights: int = 0,
) -> int:
    """FLOPs of a whole training run, dynamic sparse training included.

    Args:
        tokens_per_step: tokens of one optimizer step, all ranks and micro-batches.
        num_steps: optimizer steps.
        around: forward FLOPs per token of everything outside the sparse projections.
        active_weight_steps: active weights of the sparse projections, summed over the steps.
        dense_gradient_weights: weights (zeros included) whose dense gradient was computed, summed
            over the steps that did so; each costs a multiply-add per token on top.
    """
    sparse = TRAINING_FACTOR * 2 * active_weight_steps + 2 * dense_gradient_weights
    return tokens_per_step * (num_steps * around.training + sparse)


def train_state_bytes(num_stored: int, topology_bytes: int) -> int:
    """Bytes of weights, gradients and AdamW state (all float32), and of masks or tile indices.

    Args:
        num_stored: parameters held in memory, stored zeros included.
        topology_bytes: see `mask_bytes` and `block_index_bytes`.
    """
    return OPTIMIZER_TENSORS * BYTES_PER_VALUE * num_stored + topology_bytes


def mask_bytes(num_weights: int) -> int:
    """Bytes of the boolean mask of a layer with `num_weights` weights, zeros included."""
    return BYTES_PER_MASK_ENTRY * num_weights


def block_index_bytes(num_tiles: int, num_block_columns: int) -> int:
    """Bytes of a block layer's five index buffers: three entries per active tile, two per block-column, and one."""
    return BYTES_PER_INDEX * (3 * num_tiles + 2 * num_block_columns + 1)


def default_block_size(side: int) -> int:
    """The largest tile, at least 16, of which `side` has `MIN_TILES_PER_SIDE` or more.

    Args:
        side: the narrowest width of the sparse model, usually its hidden size.

    Source: benchmarks/quality_study.py; docs/block.md, "Which tile".

    >>> [default_block_size(side) for side in (128, 512, 768, 1536, 4096)]
    [16, 64, 64, 128, 256]
    """
    sizes = [size for size in BLOCK_SIZES if size >= 16 and side >= MIN_TILES_PER_SIDE * size]
    return max(sizes, default=16)
