"""How weights that a mask update has grown begin under Adam.

Their state is 0 while the step count, which Adam corrects its moments by, is that of the whole weight. So their first
steps are larger than those of old weights, the more the larger beta2 is: m / sqrt(v) of a constant gradient reaches
1.1 for beta2 = 0.95 and 6.6 for 0.999, where a fresh Adam would step by 1, and old weights step by less.

`ZeroState` is the rule of the reference. `RowMean` and `OwnCount` are alternatives for torch's Adam and AdamW. Both
keep what they know in the optimizer's own state, so that it is saved, resumed and sharded with it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Adam

from sparseift_llm.config.dst import DSTConfig
from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.layers.masked import MaskedProjection
from sparseift_llm.layers.sharding import local, part_of, whole
from sparseift_llm.topology.blocks import rows_of_slots
from sparseift_llm.training.backends.base import OptimizerBackend
from sparseift_llm.training.backends.torch import TorchBackend

logger = logging.getLogger(__name__)
AGE_KEY = "steps_since_grown"  # in the optimizer's state; 0 for weights that are old
HIGH_BETA = 0.99
_LEFT_OF_BIAS = 0.01  # a weight is old when its second moment lacks less than this share
_LARGEST_COUNT = {torch.bfloat16: 256, torch.float16: 2048}  # up to which the dtype holds every whole number


class ZeroState:
    """Grown weights begin with a state of 0, as in the reference."""

    def before_step(self, layers: Mapping[str, SparseProjection]) -> None:
        """Ahead of an optimizer step; may be called several times."""

    def after_step(self, layers: Mapping[str, SparseProjection]) -> None:
        """After an optimizer step that was not skipped, and before masks change."""

    def check(self, layers: Mapping[str, SparseProjection]) -> None:
        """Ahead of the first step of a run that goes on: raise ValueError if what was saved is not there."""

    def start(self, layer: SparseProjection, changed: Tensor) -> int:
        """After a mask update of `layer`.

        Args:
            layer: it has its new mask.
            changed: what `set_mask` returned; the optimizer's state is 0 there.

        Returns:
            Bytes that were gathered over ranks.
        """
        return 0


class RowMean(ZeroState):
    """The second moment of a grown weight begins at the mean of the old active weights of its output row.

    Where a row has none, the mean of the whole matrix is taken. The first moment begins at 0.

    Args:
        optimizer: one of torch's Adam or AdamW.
    """

    def __init__(self, optimizer: Adam) -> None:
        self.optimizer = optimizer

    @torch.no_grad()
    def start(self, layer: SparseProjection, changed: Tensor) -> int:
        state: dict[str, Any] = self.optimizer.state.get(layer.weight, {})
        num_bytes = 0
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            moment = state.get(key)
            if moment is None:
                continue
            full = whole(moment)
            num_bytes += full.numel() * full.element_size() if isinstance(moment, DTensor) else 0
            changed = changed.to(full.device)
            values = torch.where(_grown(layer, changed), _row_means(layer, full, changed), full)
            local(moment).copy_(part_of(values, moment))
        return num_bytes


class OwnCount(ZeroState):
    """A grown weight's moments are corrected by the number of steps since it grew, and its steps may be warmed up.

    Whatever Adam has done is scaled after its step, weight decay included, which is small for a weight that began at 0.

    Args:
        optimizer: one of torch's Adam or AdamW.
        warmup_steps: steps over which a grown weight's rate rises linearly to the full one; 0 for none.

    Source: a step count of its own for every regrown weight: SMET, arXiv 2606.00888.
    """

    def __init__(self, optimizer: Adam, warmup_steps: int) -> None:
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self._young: dict[SparseProjection, _Young] = {}

    @torch.no_grad()
    def before_step(self, layers: Mapping[str, SparseProjection]) -> None:
        for layer in layers.values():
            age = self.optimizer.state.get(layer.weight, {}).get(AGE_KEY)
            if age is None:
                continue
            if layer not in self._young or self._young[layer].age is not age:  # an update, or a state that was loaded
                self._young[layer] = _Young(age, local(age).nonzero(as_tuple=True))
            young = self._young[layer]
            young.before = local(layer.weight)[young.places]

    @torch.no_grad()
    def after_step(self, layers: Mapping[str, SparseProjection]) -> None:
        for layer in layers.values():
            state: dict[str, Any] = self.optimizer.state.get(layer.weight, {})
            if state and AGE_KEY not in state:  # not ahead of Adam's first step, which makes the rest of the state
                state[AGE_KEY] = torch.zeros_like(layer.weight)
            young = self._young.get(layer)
            if young is None or young.before is None:
                continue
            weight = local(layer.weight)
            ages = local(young.age)[young.places]
            factors, horizon = self._factors(layer.weight, ages)
            weight[young.places] = torch.lerp(young.before, weight[young.places], factors.to(weight.dtype))
            local(young.age)[young.places] = torch.where((ages > 0) & (ages < horizon), ages + 1, 0)
            young.before = None

    @torch.no_grad()
    def start(self, layer: SparseProjection, changed: Tensor) -> int:
        age = self.optimizer.state.get(layer.weight, {}).get(AGE_KEY)
        if age is not None:  # otherwise Adam has never stepped the weight, so that all of it is young
            local(age).masked_fill_(part_of(_grown(layer, changed), age), 1)
            self._young.pop(layer, None)
        return 0

    def check(self, layers: Mapping[str, SparseProjection]) -> None:
        for name, layer in layers.items():
            state = self.optimizer.state.get(layer.weight, {})
            if state and AGE_KEY not in state:
                raise ValueError(
                    f"the optimizer's state has no {AGE_KEY!r} for {name}, which grown_state='own_count' keeps there. "
                    "It was saved with another grown_state, or loaded without it: create the controller before a "
                    "sharded state is loaded, load a whole one, or use another grown_state"
                )

    def _factors(self, weight: Tensor, ages: Tensor) -> tuple[Tensor, int]:
        """By what to multiply a step at each age (0: not at all), and the age after which a weight is old."""
        group = next(group for group in self.optimizer.param_groups if any(p is weight for p in group["params"]))
        first, second = (float(beta) for beta in group["betas"])
        steps = torch.as_tensor(self.optimizer.state[weight]["step"]).to(device=ages.device, dtype=torch.float64)
        count = ages.double().clamp(min=1)
        factors = _correction(first, second, count) / _correction(first, second, steps)
        if self.warmup_steps:
            factors = factors * (count / self.warmup_steps).clamp(max=1)
        horizon = 1 if second == 0 else math.ceil(math.log(_LEFT_OF_BIAS) / math.log(second))
        horizon = min(max(horizon, self.warmup_steps), _LARGEST_COUNT.get(weight.dtype, 2**24))
        return torch.where(ages > 0, factors, 1.0), horizon


@dataclass
class _Young:
    """The weights of one layer, on this rank, that were young after the last update.

    Attributes:
        age: the tensor in the optimizer's state.
        places: their indices in the local part.
        before: their values ahead of the step that is being taken.
    """

    age: Tensor
    places: tuple[Tensor, ...]
    before: Tensor | None = None


def rule_for(dst: DSTConfig, backend: OptimizerBackend) -> ZeroState:
    """How the weights of a run begin that updates grow.

    Raises:
        ValueError: the transformation asks for what this optimizer cannot do.
    """
    optimizer = backend.optimizer
    if dst.grown_state == "zero":
        betas = [float(group["betas"][1]) for group in optimizer.param_groups if len(group.get("betas", ())) == 2]
        if dst.grows and betas and max(betas) >= HIGH_BETA:
            logger.info(
                "grown weights begin with a state of 0 under beta2=%s, so that their first steps are several times "
                "those of old weights (grown_state='zero', as in the reference); 'row_mean' and 'own_count' avoid that",
                max(betas),
            )
        return ZeroState()
    if not (isinstance(backend, TorchBackend) and backend.is_alone and isinstance(optimizer, Adam)):
        raise ValueError(
            f"grown_state={dst.grown_state!r} is for torch.optim.Adam and AdamW by themselves, and the optimizer is "
            f"{type(optimizer).__name__}, perhaps inside another one or under DeepSpeed; use one of these, or "
            "grown_state='zero'"
        )
    return RowMean(optimizer) if dst.grown_state == "row_mean" else OwnCount(optimizer, dst.grown_warmup_steps)


def _correction(first: float, second: float, count: Tensor) -> Tensor:
    """What Adam multiplies m / sqrt(v) by after `count` steps."""
    return (1 - second**count).sqrt() / (1 - first**count)


def _grown(layer: SparseProjection, changed: Tensor) -> Tensor:
    """Where `changed` entries stand for active weights now: broadcastable to the weight's shape."""
    return changed & layer.mask.to(changed.device) if isinstance(layer, MaskedProjection) else changed


def _row_means(layer: SparseProjection, moment: Tensor, changed: Tensor) -> Tensor:
    """Mean of `moment` over the old active weights of every weight's output row, broadcastable to its shape."""
    old = (~changed).expand_as(moment)
    if isinstance(layer, MaskedProjection):
        old = old & layer.mask.to(changed.device)
    values, numbers = torch.where(old, moment, 0).double(), old.double()
    mean = values.sum() / numbers.sum().clamp(min=1)
    if isinstance(layer, MaskedProjection):
        dim = 1 - layer.output_dim
        sums, counts = values.sum(dim, keepdim=True), numbers.sum(dim, keepdim=True)
    else:  # tiles (N, b, b): the rows of all tiles of a block-row together
        rows = rows_of_slots(len(moment), layer.mask_shape[0]).to(moment.device)
        zeros = values.new_zeros(layer.mask_shape[0], moment.shape[1])
        sums = zeros.index_add(0, rows, values.sum(2))[rows].unsqueeze(2)
        counts = zeros.index_add(0, rows, numbers.sum(2))[rows].unsqueeze(2)
    return torch.where(counts > 0, sums / counts.clamp(min=1), mean).to(moment.dtype)
