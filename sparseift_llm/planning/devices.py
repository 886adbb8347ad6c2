"""What training takes on a GPU, estimated from a plan by two formulas that are stated here. Nothing is measured.

Memory: weights, gradients and AdamW's two moments in float32, and masks or tile indices (`isoflop.train_state_bytes`),
over 90% of the device's memory. Activations come on top.

Time: tokens x 3 x forward FLOPs that are executed, over the device's peak for dense bfloat16 products times a
utilization. A block-sparse matrix executes its active tiles. A masked one is multiplied whole, zeros included, and so
are dense ones; the output head is one of these matrices. That the products with tiles reach the same utilization as
dense ones is an assumption, which is why the utilization can be given.

Memory and rates are those of the makers' data sheets, which `Device.source` names. Where a sheet gives a rate with 2:4
sparsity alone, it is halved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparseift_llm import isoflop

if TYPE_CHECKING:  # so that the command line has the default utilization without torch
    from sparseift_llm.planning.cost import ModelCost

USABLE_MEMORY = 0.9  # share of a device's memory that tensors can have
UTILIZATION = 0.4  # of the peak, by well-tuned dense trainings of large models: 38 to 43% in arXiv 2407.21783, table 4


@dataclass(frozen=True)
class Device:
    """A kind of GPU.

    Args:
        name: as its maker calls it.
        memory_bytes: its memory.
        peak_flops_per_second: of dense bfloat16 products with float32 sums, without structured sparsity.
        source: where both figures stand.
    """

    name: str
    memory_bytes: float
    peak_flops_per_second: float
    source: str = ""


DEVICES = (
    Device("RTX 4090", 24e9, 165.2e12, "NVIDIA Ada GPU Architecture, white paper"),
    Device("L40S", 48e9, 362.05e12, "NVIDIA L40S data sheet"),
    Device("A100 80GB", 80e9, 312e12, "NVIDIA A100 data sheet"),
    Device("H100 SXM", 80e9, 989e12, "NVIDIA H100 data sheet: 1,979 TFLOPS with sparsity"),
    Device("H200 SXM", 141e9, 989e12, "NVIDIA H200 data sheet: 1,979 TFLOPS with sparsity"),
    Device("B200", 180e9, 2250e12, "NVIDIA DGX B200 and HGX B200 data sheets: 4.5 PFLOPS with sparsity"),
)


def executed_flops(cost: ModelCost) -> int:
    """Forward FLOPs per token that a device really computes, for a dense or a sparse model."""
    return cost.flops.forward + isoflop.linear_flops(cost.masked_zeros)


def training_seconds(
    flops_per_token: float, num_tokens: float, device: Device, utilization: float = UTILIZATION
) -> float:
    """Seconds of training on one device, by the formula at the top of this file.

    Args:
        flops_per_token: forward FLOPs, see `executed_flops`.
        num_tokens: tokens of the whole training.
        device: the kind of GPU.
        utilization: share of its peak, in (0, 1].

    Raises:
        ValueError: the utilization is out of range.

    >>> round(training_seconds(1e9, 1e9, Device("a PFLOP/s GPU", 80e9, 1e15), 0.5))
    6000
    """
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization must be in (0, 1], got {utilization}")
    return num_tokens * isoflop.TRAINING_FACTOR * flops_per_token / (device.peak_flops_per_second * utilization)


def devices_for_state(state_bytes: float, device: Device) -> int:
    """How many devices hold the state of training, if it is sharded evenly."""
    return math.ceil(state_bytes / (USABLE_MEMORY * device.memory_bytes))
