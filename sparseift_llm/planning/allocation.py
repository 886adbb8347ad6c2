"""How many active weights each projection gets: the iso-FLOP total, shared among layers, in whole tiles where asked,
among the kinds in a fused matrix, and evenly among heads.

Formulas are in isoflop.py; what else a plan holds is in planner.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from transformers import PreTrainedConfig, PreTrainedModel

from sparseift_llm import isoflop
from sparseift_llm.config.structures import misfit
from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.models.architectures import sizes_of
from sparseift_llm.models.fused_rows import RowPattern
from sparseift_llm.models.projections import Projection, is_low_rank
from sparseift_llm.planning.cost import model_flops
from sparseift_llm.planning.kinds_apart import parts_of, split_evenly
from sparseift_llm.topology import distributions

_SPARSE_ENDS = ", or embedding='sparse' and nothing in exclude, which costs what the dense model does"


def active_counts(
    dense: Sequence[Projection],
    sparse: Sequence[Projection],
    chosen: Sequence[bool],
    config: SparseIFTConfig,
    dense_model: PreTrainedModel,
    widened_model: PreTrainedModel,
    patterns: Sequence[RowPattern | None],
    vocab_size: int | None = None,
    num_logit_weights: int | None = None,
) -> list[list[int]]:
    """Active weights of every projection, those that stay dense included; the models are those of the projections.

    Args:
        patterns: the rows of fused projections whose kinds are counted apart; see kinds_apart.py.
        vocab_size: `accounting="whole_model"` counts logits of so many words; default: the models' own.
        num_logit_weights: active weights of the widened model's output head; None if it is dense.

    Returns:
        For each projection one number, or one for each kind of its pattern.

    Raises:
        ValueError: sides do not fit the structure, outputs would be left without inputs, or no sparsity meets
            `accounting="whole_model"`.
    """
    counts = [projection.num_weights for projection in sparse]
    result = [[count] for count in counts]
    picked = [index for index, is_chosen in enumerate(chosen) if is_chosen]
    if config.pattern is not None:
        for index in picked:
            _check_groups(sparse[index], config)
            result[index] = [isoflop.pattern_active(counts[index], config.pattern)]
        return result
    twins = [dense[index].num_weights for index in picked]
    total = sum(twins)
    if config.accounting == "whole_model":
        seq_len = config.seq_len or 0
        num_dense = sum(projection.num_weights for projection in dense)
        dense_flops = model_flops(dense_model, dense, num_dense, seq_len, vocab_size)
        available = sum(counts[index] for index in picked)
        num_dense_left = sum(counts) - available
        around = model_flops(widened_model, sparse, num_dense_left, seq_len, vocab_size, num_logit_weights)
        total = _whole_model_total(len(picked), available, dense_flops, around, config)
    size = config.block_size or 1
    for index in picked:
        _check_sides(sparse[index], size)
    shapes = [(sparse[index].out_features // size, sparse[index].in_features // size) for index in picked]
    parts = [parts_of(shape, patterns[index], size) for index, shape in zip(picked, shapes, strict=True)]
    shared = _share_units(parts, twins, total, config)
    for index, (num_rows, _), units in zip(picked, shapes, shared, strict=True):
        if size > 1 and sum(units) < num_rows:
            raise ValueError(
                f"{sparse[index].name}: {sum(units)} active tiles for {num_rows} block-rows would leave outputs "
                f"without any input; use a block_size below {size} or a lower sparsity"
            )
        result[index] = [number * size**2 for number in units]
    return result


def _share_units(
    parts: list[list[tuple[int, int]]],
    twins: list[int],
    total: int,
    config: SparseIFTConfig,
) -> list[list[int]]:
    """`total` active weights in units (tiles or weights), shared among layers with matrices `parts`, in units."""
    unit_size = (config.block_size or 1) ** 2
    sizes = [sum(rows * columns for rows, columns in found) for found in parts]
    num_units = round(Fraction(total, unit_size))
    if config.distribution == "erk":
        flat = iter(distributions.erdos_renyi_kernel([part for found in parts for part in found], num_units))
        return [[next(flat) for _ in found] for found in parts]
    if config.accounting == "whole_model":
        counts = distributions.uniform(sizes, num_units)
    else:
        ideal = [Fraction(twin * num_units, total) for twin in twins]
        counts = distributions.round_to_total(ideal, sizes, num_units)
    return [split_evenly(count, found) for count, found in zip(counts, parts, strict=True)]


def _check_sides(projection: Projection, block_size: int) -> None:
    for side in projection.shape:
        if side % block_size:
            raise ValueError(
                f"{projection.name} is {projection.out_features} x {projection.in_features}, and {side} is not a "
                f"multiple of block_size={block_size}; choose a block_size that divides it, another scope, or leave "
                f"{', '.join(projection.kinds)} dense with exclude and accounting='whole_model'"
            )


def _check_groups(projection: Projection, config: SparseIFTConfig) -> None:
    """Refuse a projection whose sides are not whole groups of n:m."""
    assert config.pattern is not None
    side = misfit(projection.shape, config.pattern, config.transposable)
    if side is not None:
        raise ValueError(
            f"{projection.name} has {side}, and structure={config.structure!r} needs a multiple of "
            f"{config.side_multiple}; use another n:m, or leave {', '.join(projection.kinds)} dense with exclude if "
            "its sides do not grow"
        )


def _whole_model_total(
    num_layers: int, available: int, dense_flops: isoflop.FlopCount, around: isoflop.FlopCount, config: SparseIFTConfig
) -> int:
    total = isoflop.num_active_for_whole_model(dense_flops.forward, around)
    if total < num_layers:
        raise ValueError(
            f"accounting='whole_model' cannot be met: attention, logits and dense projections of the widened model "
            f"alone cost {around.forward / 1e6:.1f} of the dense model's {dense_flops.forward / 1e6:.1f} MFLOP per "
            f"token; lower sparsity={config.sparsity}, use scope='ffn' or a smaller vocabulary"
            f"{_SPARSE_ENDS if config.scope == 'residual' else ''}"
        )
    if total > available:  # an embedding in tiles is rounded, perhaps by more than a hidden size has grown
        missing = 2 * (total - available)
        raise ValueError(
            f"accounting='whole_model' cannot be met: with all weights of its projections the widened model would cost "
            f"{missing:,} FLOP per token less than the dense one, because embedding and logits are whole tiles; raise "
            f"sparsity={config.sparsity}, use a smaller block_size, or embedding='unstructured'"
        )
    return total


def head_groups(
    projections: Sequence[Projection], hf_config: PreTrainedConfig, config: SparseIFTConfig
) -> dict[str, tuple[int, int]]:
    """For `balance_heads`: name of an attention projection -> the side along which heads lie (0, 1), and their number.

    Outputs of q, k and v are divided by the head size: where they are fused, each head's queries, keys and values are
    a group each, however the matrix orders them. Of o the inputs are.

    Raises:
        ValueError: sides are not multiples of the head size, or, with tiles, a head is not whole block-rows.
    """
    groups, num_heads = {}, sizes_of(hf_config).num_heads
    widths = {p.layer_index: p.in_features for p in projections if p.kinds == ("o",)}
    for projection in projections:
        if projection.kinds[0] not in ("q", "k", "v", "o"):
            continue
        width, side = widths[projection.layer_index], 1 if projection.kinds == ("o",) else 0
        size = max(1, width // num_heads)
        if width % num_heads or projection.shape[side] % size or is_low_rank(projection.name):
            raise ValueError(
                f"balance_heads: {projection.name} is {projection.out_features} x {projection.in_features} and does "
                f"not divide into heads of {size} ({num_heads} heads); leave balance_heads out, or exclude "
                f"{', '.join(projection.kinds)}"
            )
        if config.block_size is not None and side == 0 and size % config.block_size:
            raise ValueError(
                f"balance_heads: a head of {projection.name} has {size} rows, not whole block-rows of "
                f"block_size={config.block_size}; choose a block_size that divides {size}, or structure='unstructured'"
            )
        groups[projection.name] = (side, projection.shape[side] // size)
    return groups
