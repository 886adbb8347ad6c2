"""Whether a plan keeps the promise of equal FLOPs where projections are widened but stay dense, and the way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from sparseift_llm.config.transform import SparseIFTConfig

if TYPE_CHECKING:
    from sparseift_llm.planning.planner import Plan


def check_equal_cost(result: Plan, plan_with: Callable[[SparseIFTConfig], Plan]) -> None:
    """Refuse a plan in which `targets` or `exclude` leave a projection dense whose sides grow.

    Under `accounting="linears"` each sparse projection costs what its dense twin does, so such a projection would come
    on top. `whole_model` takes its cost off the sparse ones.

    Args:
        result: what was planned.
        plan_with: makes the plan of the same dense model for another transformation.

    Raises:
        ValueError: there is such a projection; with the ratio of the costs and what to change.
    """
    config = result.config
    dense = [layer for layer in result.layers if layer.family == "dense" and layer.layer_index is not None]
    grown = sorted({layer.kind for layer in dense if layer.sparse_shape != layer.dense_shape})
    if not grown or config.accounting != "linears":
        return
    raise ValueError(
        f"targets and exclude leave {', '.join(grown)} dense, whose sides {config.family.name} makes wider, so that "
        f"the projections would cost {result.ratio_linear:.2f} times the dense model's FLOPs; "
        f"{_way_out(result, plan_with)}"
    )


def _way_out(result: Plan, plan_with: Callable[[SparseIFTConfig], Plan]) -> str:
    """What to change, by trying it out: the highest sparsity, in hundredths, at which the costs can be made equal."""

    def is_possible(sparsity: float) -> bool:
        try:
            plan_with(replace(result.config, sparsity=sparsity, accounting="whole_model", seq_len=result.seq_len))
        except ValueError:
            return False
        return True

    change = f"set accounting='whole_model' with seq_len={result.seq_len}, which makes the others sparser"
    if is_possible(result.config.sparsity):
        return f"{change}, or make them sparse, too"
    possible, impossible = 0, round(100 * result.config.sparsity)
    while impossible - possible > 1:
        middle = (possible + impossible) // 2
        possible, impossible = (middle, impossible) if is_possible(middle / 100) else (possible, middle)
    if possible == 0:
        return "make them sparse, too, or use family='parallel', 'factorized' or 'doped', which leave sides as they are"
    return f"{change}, and sparsity={possible / 100}, the highest at which that is possible, or make them sparse, too"
