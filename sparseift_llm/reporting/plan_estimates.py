"""Memory and time on kinds of GPU, estimated from a plan, and plans side by side; as values and as tables.

The formulas are in planning/devices.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseift_llm.models.architectures import sizes_of
from sparseift_llm.planning.cost import ModelCost
from sparseift_llm.planning.devices import DEVICES, UTILIZATION, devices_for_state, executed_flops, training_seconds
from sparseift_llm.planning.planner import Plan
from sparseift_llm.utils.tables import terminal_table
from sparseift_llm.utils.units import readable_bytes, readable_count, readable_seconds

COMPARED_DEVICE = "A100 80GB"


def estimates_of(plan: Plan, num_tokens: float, utilization: float | None = None) -> dict[str, Any]:
    """Memory and time of the dense and the sparse model on each kind of GPU, as JSON takes them.

    Args:
        plan: of the sparse model.
        num_tokens: tokens of the whole training.
        utilization: share of a GPU's peak that training reaches; None for `UTILIZATION`.

    Raises:
        ValueError: a number is out of range.
    """
    if not num_tokens > 0:
        raise ValueError(f"tokens must be above 0, got {num_tokens:g}")
    utilization = UTILIZATION if utilization is None else utilization
    state = {"dense": _state_bytes(plan.dense), "sparse": _state_bytes(plan.sparse)}
    flops = {"dense": executed_flops(plan.dense), "sparse": executed_flops(plan.sparse)}
    devices = [
        {
            "device": device.name,
            "memory_bytes": device.memory_bytes,
            "devices_for_state": {side: devices_for_state(size, device) for side, size in state.items()},
            "seconds": {side: training_seconds(n, num_tokens, device, utilization) for side, n in flops.items()},
        }
        for device in DEVICES
    ]
    return {"tokens": num_tokens, "utilization": utilization, "executed_flops_per_token": flops, "devices": devices}


def estimates_table(estimates: Mapping[str, Any]) -> str:
    """What `estimates_of` gives, as a table for a terminal with its formulas below."""
    tokens = readable_count(estimates["tokens"])
    header = ("GPU", "memory", "hold the state: dense", "sparse", f"{tokens} tokens on one: dense", "sparse")
    rows = [
        (
            row["device"],
            readable_bytes(row["memory_bytes"]),
            *row["devices_for_state"].values(),
            *(readable_seconds(seconds) for seconds in row["seconds"].values()),
        )
        for row in estimates["devices"]
    ]
    flops = estimates["executed_flops_per_token"]
    executed = f"{readable_count(flops['dense'])} dense, {readable_count(flops['sparse'])} sparse"
    note = (
        f"Estimates, not measurements. Time: tokens x 3 x executed forward FLOPs ({executed}; masks skip no zeros, "
        f"tiles do) over {estimates['utilization']:.0%} of the data sheet's peak in bfloat16, a "
        "share that large dense models reach and small ones do not (--utilization changes it). State: weights, "
        "gradients and AdamW's moments in float32, masks or indices, in 90% of the memory; activations come on top."
    )
    return f"{terminal_table(header, rows)}\n\n{note}"


def plans_table(plans: Mapping[str, Plan], num_tokens: float, utilization: float | None = None) -> str:
    """Plans of one dense model side by side: one line for that model and one for each setting.

    Args:
        plans: the plan of each setting, by the words that stand for it.
        num_tokens, utilization: see `estimates_of`.
    """
    estimates = {words: estimates_of(plan, num_tokens, utilization) for words, plan in plans.items()}
    first = next(iter(plans))
    header = (
        "settings", "hidden", "FFN", "sparsity", "parameters", "state", "projection FLOPs", "all FLOPs",
        f"{readable_count(num_tokens)} tokens on one {COMPARED_DEVICE}",
    )  # fmt: skip
    dense = plans[first]
    rows = [_row("dense", dense.dense_model, dense.dense, (1.0, 1.0), _seconds(estimates[first], "dense"))]
    for words, plan in plans.items():
        ratios = plan.ratio_linear, plan.ratio_whole_model
        rows.append(_row(words, sizes_of(plan.hf_config), plan.sparse, ratios, _seconds(estimates[words], "sparse")))
    note = (
        f"T={dense.seq_len}. FLOPs count active weights. The time counts what is executed, zeros of masks included. "
        "`sparseift plan` without --compare states the formulas."
    )
    return f"{terminal_table(header, rows)}\n\n{note}"


def _row(words: str, sizes: Any, cost: ModelCost, ratios: tuple[float, float], seconds: float) -> tuple[object, ...]:
    return (
        words,
        sizes.hidden,
        sizes.ffn,
        f"{1 - cost.linear_active_params / cost.linear_params:.3f}",
        readable_count(cost.stored_params),
        readable_bytes(_state_bytes(cost)),
        *(f"{ratio:.2f}x" for ratio in ratios),
        readable_seconds(seconds),
    )


def _seconds(estimates: Mapping[str, Any], side: str) -> float:
    """The time on the GPU that comparisons are made for."""
    seconds: float = next(row["seconds"][side] for row in estimates["devices"] if row["device"] == COMPARED_DEVICE)
    return seconds


def _state_bytes(cost: ModelCost) -> int:
    return cost.to_dict()["train_state_bytes"]
