"""What the masks of a model do while it trains, in numbers: sparsity, exploration, churn, survival, dead units.

Pure functions and records of counts. Who feeds them at mask updates is dst/tracking.py; what is measured on single
steps (gradients, activations) is in samples.py, speed in dst/throughput.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.models.projections import projection_kinds
from sparseift_llm.record.model_record import has_record

_NUM_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


def num_ones(packed: Tensor) -> int:
    """Ones among packed bits, uint8 on the CPU.

    >>> num_ones(torch.tensor([0, 1, 255], dtype=torch.uint8))
    9
    """
    return int(_NUM_ONES[packed.numpy()].sum())


def kinds_in(model: nn.Module) -> dict[str, str]:
    """What every projection of the transformers model inside, which may be wrapped, computes, by module path.

    A Sparse-IFT model's record says so. Kinds are labels only: of a model that has no record and is not a decoder that
    is understood there are none, and all its layers are `other` then.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    try:
        if inner is not None and has_record(inner.config):
            return {layer.name: layer.kind for layer in read_record(inner.config).layers}
        return {} if inner is None else projection_kinds(inner.config)
    except ValueError:
        return {}


@dataclass
class UnitHistory:
    """What mask updates did to the units (weights or tiles) of one layer; masks packed as in mask_file.py, on the CPU.

    Attributes:
        ever: units that were active at any time.
        grown: units that the last update made active; None before the first.
        num_grown_before: units grown by the update before the last.
        num_survived: how many of these were active after the last.
    """

    ever: Tensor
    grown: Tensor | None = None
    num_grown_before: int = 0
    num_survived: int = 0

    def update(self, old: Tensor, new: Tensor) -> None:
        """Take note of an update from the packed mask `old` to `new`."""
        if self.grown is not None:
            self.num_grown_before, self.num_survived = num_ones(self.grown), num_ones(self.grown & new)
        self.grown = new & ~old
        self.ever |= old | new


@dataclass(frozen=True)
class LayerCounts:
    """One layer's counts of weights; None where they are not known.

    Attributes:
        kind: see `kind_of`.
        size: zeros included.
        active: by the mask as it is now.
        ever: were active at any time (in-time over-parameterisation, arXiv 2102.02887).
        grown: became active at the last update.
        grown_before, survived: became active at the update before, and of these, still were after the last.
        num_inputs, num_outputs: columns and rows of the mask, in units.
        unread: inputs without an active entry, which nothing reads.
        unfed: outputs without one, which nothing feeds.
    """

    kind: str
    size: int
    active: int
    ever: int | None
    grown: int | None
    grown_before: int
    survived: int
    num_inputs: int
    num_outputs: int
    unread: int
    unfed: int

    def to_dict(self) -> dict[str, Any]:
        """A layer's entry in `layers.jsonl`: shares, None where they are not known."""
        return {
            "kind": self.kind,
            "sparsity": 1 - self.active / self.size,
            "exploration": None if self.ever is None else self.ever / self.size,
            "churn": None if self.grown is None or not self.active else self.grown / self.active,
            "survival": self.survived / self.grown_before if self.grown_before else None,
            "unread": self.unread / self.num_inputs,
            "unfed": self.unfed / self.num_outputs,
        }


def summarize(layers: Iterable[LayerCounts]) -> dict[str, float]:
    """Shares over all layers together and, behind a slash, over those of each kind; those not known are left out."""
    layers = list(layers)
    groups = {"": layers}
    groups |= {f"/{kind}": [layer for layer in layers if layer.kind == kind] for kind in {x.kind for x in layers}}
    values: dict[str, float] = {}
    for suffix, group in sorted(groups.items()):
        size = sum(layer.size for layer in group)
        values[f"sparsity{suffix}"] = 1 - sum(layer.active for layer in group) / size
        ever = [layer.ever for layer in group if layer.ever is not None]
        if len(ever) == len(group):
            values[f"exploration{suffix}"] = sum(ever) / size
        updated = [(layer.grown, layer.active) for layer in group if layer.grown is not None and layer.active]
        if updated:
            values[f"mask_churn{suffix}"] = sum(grown for grown, _ in updated) / sum(active for _, active in updated)
        values[f"unread_units{suffix}"] = sum(x.unread for x in group) / sum(x.num_inputs for x in group)
        values[f"unfed_units{suffix}"] = sum(x.unfed for x in group) / sum(x.num_outputs for x in group)
    grown_before = sum(layer.grown_before for layer in layers)
    if grown_before:
        values["mask_survival"] = sum(layer.survived for layer in layers) / grown_before
    num_units = sum(layer.num_inputs + layer.num_outputs for layer in layers)
    values["dead_units"] = sum(layer.unread + layer.unfed for layer in layers) / num_units
    return values
