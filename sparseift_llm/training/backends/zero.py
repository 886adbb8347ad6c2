"""DeepSpeed ZeRO's optimizers: their steps, and zeros in the weights and the state that they partition.

Master weights and optimizer state are read and written through DeepSpeed's safe_get and safe_set functions. DeepSpeed
is imported when one of its optimizers arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.layers.sharding import is_zero3
from sparseift_llm.training.backends.base import OptimizerBackend
from sparseift_llm.training.collectives import world_size
from sparseift_llm.training.gradient_watch import GradientWatch

# a weight whose gradient and state are 0 stays 0, so that nothing need be gathered between mask updates
_KEEPS_ZEROS = ("SGD", "Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam", "Adagrad", "DeepSpeedCPUAdagrad")


def zero_optimizer(optimizer: Any) -> Any:
    """The ZeRO optimizer that `optimizer` is, or that accelerate has wrapped, or None."""
    for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
        kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(candidate).__mro__}
        if "deepspeed.ZeROOptimizer" in kinds:
            return candidate
    return None


class ZeroBackend(OptimizerBackend):
    """DeepSpeed's ZeRO, stage 1, 2 or 3.

    Args:
        optimizer: the ZeRO optimizer, `engine.optimizer`.
        layers: the sparse layers by name.

    Raises:
        ValueError: a sparse weight is not in the optimizer or ZeRO-3 splits it unevenly, or the inner optimizer moves
            weights whose gradient is 0.
    """

    def __init__(self, optimizer: Any, layers: Mapping[str, SparseProjection]) -> None:
        self._zero = optimizer
        self.inner = optimizer.optimizer
        if type(self.inner).__name__ not in _KEEPS_ZEROS:
            raise ValueError(
                f"{type(self.inner).__name__} under DeepSpeed is not supported: it can move weights whose gradient is "
                f"0; use one of {', '.join(_KEEPS_ZEROS)}"
            )
        for name, layer in layers.items():
            if layer.is_frozen:
                continue
            if is_zero3(layer.weight) and layer.weight.ds_numel % world_size():  # type: ignore[attr-defined]
                raise ValueError(
                    f"{name}.weight does not divide evenly among {world_size()} ranks, and then DeepSpeed ZeRO-3 "
                    "cannot set it; use ZeRO-2, FSDP2 (torch.distributed.fsdp.fully_shard), or another number of ranks"
                )
            if not _is_partitioned(layer.weight):
                raise ValueError(
                    f"{name}.weight is not in DeepSpeed's optimizer; call deepspeed.initialize after sparsify, "
                    "with model.parameters()"
                )

    @property
    def optimizer(self) -> Any:
        return self.inner

    def shares_optimizer(self, other: OptimizerBackend) -> bool:
        return isinstance(other, ZeroBackend) and other.inner is self.inner

    def follow_steps(self, before: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
        zero, step = self._zero, self._zero.step

        def stepped(*args: Any, **kwargs: Any) -> Any:
            before()
            result = step(*args, **kwargs)
            after()
            return result

        def end() -> None:
            if zero.__dict__.get("step") is stepped:
                del zero.step

        zero.step = stepped
        return end

    def was_skipped(self) -> bool:
        return bool(self._zero.overflow)

    def num_steps(self, layers: Mapping[str, SparseProjection]) -> int:
        counts = [state.get("step", 0) for state in self.inner.state.values()]
        return max((int(count) for count in counts), default=0)

    def watch(self, layer: SparseProjection) -> GradientWatch | None:
        """None: DeepSpeed takes gradients away from the parameter as soon as they arrive."""
        return None

    def zero_inactive(self, layers: Mapping[str, SparseProjection]) -> None:
        """Nothing to do: only optimizers that keep zeros are accepted, so that nothing has to be gathered here."""

    def reset(self, name: str, layer: SparseProjection, changed: Tensor) -> int:
        from deepspeed.utils import (
            safe_get_full_fp32_param,
            safe_get_full_optimizer_state,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        weight = layer.weight
        value = safe_get_full_fp32_param(weight)
        safe_set_full_fp32_param(weight, value.masked_fill(changed, 0))
        num_bytes = value.numel() * value.element_size()
        for key in self._state_keys():
            value = safe_get_full_optimizer_state(weight, key)
            safe_set_full_optimizer_state(weight, value.masked_fill(changed, 0), key)
            num_bytes += value.numel() * value.element_size()
        return num_bytes

    def _state_keys(self) -> list[str]:
        """Names of the inner optimizer's per-element state. It steps partitions, which are flat tensors."""
        keys: dict[str, None] = {}
        for partition, state in self.inner.state.items():
            same = [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == partition.shape]
            keys.update(dict.fromkeys(same))
        return sorted(keys)


def _is_partitioned(weight: Tensor) -> bool:
    return is_zero3(weight) or hasattr(weight, "_hp_mapping")
