"""How many active weights each projection gets: the iso-FLOP total, shared among layers, in whole tiles where asked.

Formulas are in isoflop.py; what else a plan holds is in planning.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from transformers import PreTrainedConfig

from sparseift_llm import isoflop
from sparseift_llm.architectures import Projection, sizes_of
from sparseift_llm.config import SparseIFTConfig
from sparseift_llm.topology import distributions


def model_flops(config: PreTrainedConfig, num_active: int, seq_len: int) -> isoflop.FlopCount:
    """Forward FLOPs per token of a model of these widths with `num_active` active projection weights."""
    sizes = sizes_of(config)
    return isoflop.forward_flops(
        num_active, seq_len, sizes.attention_width, sizes.num_layers, sizes.hidden, sizes.vocab
    )


def active_counts(
    dense: Sequence[Projection],
    sparse: Sequence[Projection],
    chosen: Sequence[bool],
    config: SparseIFTConfig,
    dense_config: PreTrainedConfig,
    widened_config: PreTrainedConfig,
) -> list[int]:
    """Active weights of every projection, those that stay dense included."""
    counts = [projection.num_weights for projection in sparse]
    picked = [index for index, is_chosen in enumerate(chosen) if is_chosen]
    twins = [dense[index].num_weights for index in picked]
    total = sum(twins)
    if config.accounting == "whole_model":
        dense_flops = model_flops(
            dense_config, sum(projection.num_weights for projection in dense), config.seq_len or 0
        )
        total = _whole_model_total(counts, picked, dense_flops, widened_config, config)
    size = config.block_size or 1
    for index in picked:
        _check_sides(sparse[index], size)
    shapes = [(sparse[index].out_features // size, sparse[index].in_features // size) for index in picked]
    shared = _share_units(shapes, twins, total, config)
    for index, (num_rows, _), units in zip(picked, shapes, shared, strict=True):
        if size > 1 and units < num_rows:
            raise ValueError(
                f"{sparse[index].name}: {units} active tiles for {num_rows} block-rows would leave outputs without any "
                f"input; use a block_size below {size} or a lower sparsity"
            )
        counts[index] = units * size**2
    return counts


def _share_units(shapes: list[tuple[int, int]], twins: list[int], total: int, config: SparseIFTConfig) -> list[int]:
    """`total` active weights in units (tiles or weights), shared among layers of `shapes` units."""
    unit_size = (config.block_size or 1) ** 2
    sizes = [rows * columns for rows, columns in shapes]
    num_units = round(Fraction(total, unit_size))
    if config.distribution == "erk":
        return distributions.erdos_renyi_kernel(shapes, num_units)
    if config.accounting == "whole_model":
        return distributions.uniform(sizes, num_units)
    ideal = [Fraction(twin * num_units, total) for twin in twins]
    return distributions.round_to_total(ideal, sizes, num_units)


def _check_sides(projection: Projection, block_size: int) -> None:
    for side in projection.shape:
        if side % block_size:
            raise ValueError(
                f"{projection.name} is {projection.out_features} x {projection.in_features}, and {side} is not a "
                f"multiple of block_size={block_size}; choose a block_size that divides it, another scope, or leave "
                f"{', '.join(projection.kinds)} dense with exclude"
            )


def _whole_model_total(
    counts: list[int],
    picked: list[int],
    dense_flops: isoflop.FlopCount,
    widened_config: PreTrainedConfig,
    config: SparseIFTConfig,
) -> int:
    available = sum(counts[index] for index in picked)
    around = model_flops(widened_config, sum(counts) - available, config.seq_len or 0)
    total = isoflop.num_active_for_whole_model(dense_flops.forward, around)
    if total < len(picked):
        raise ValueError(
            f"accounting='whole_model' cannot be met: attention, logits and dense projections of the widened model "
            f"alone cost {around.forward / 1e6:.1f} of the dense model's {dense_flops.forward / 1e6:.1f} MFLOP per "
            f"token; lower sparsity={config.sparsity}, use scope='ffn' or a smaller vocabulary"
        )
    assert total <= available, "a widened model never costs less than the dense one"
    return total
