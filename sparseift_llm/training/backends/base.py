"""What a controller asks of an optimizer, whoever made it.

The backends themselves are in torch.py and zero.py; which one fits is decided in choice.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.training.gradient_watch import GradientWatch


class OptimizerBackend(ABC):
    """An optimizer that holds the sparse weights of a model.

    A backend knows when the optimizer steps, and it reaches the weights and the state that the optimizer keeps, which
    may be sharded or hidden in a wrapper. It does not know masks, schedules or algorithms.
    """

    @property
    @abstractmethod
    def optimizer(self) -> Any:
        """The optimizer that is followed."""

    @abstractmethod
    def shares_optimizer(self, other: OptimizerBackend) -> bool:
        """Whether an optimizer that is followed here is followed by `other`, too."""

    @abstractmethod
    def follow_steps(self, before: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
        """Call `before` ahead of every optimizer step, and `after` once at its end, when no wrapper writes weights.

        `before` may be called several times ahead of one step. `after` is also called for a step that was skipped.

        Returns:
            A function that ends this.
        """

    @abstractmethod
    def was_skipped(self) -> bool:
        """Whether the step that just ended changed nothing, because a gradient scaler had found an overflow."""

    @abstractmethod
    def num_steps(self, layers: Mapping[str, SparseProjection]) -> int:
        """Steps that the optimizer's own state counts for the layers' weights.

        Without a count it is 1 where the state shows that there was a step (SGD's momentum), and 0 otherwise.
        """

    @abstractmethod
    def watch(self, layer: SparseProjection) -> GradientWatch | None:
        """What notices that gradients of the layer's weight are thrown away; None where that cannot be seen."""

    @abstractmethod
    def zero_inactive(self, layers: Mapping[str, SparseProjection]) -> None:
        """Set inactive weights to 0 where this optimizer can have moved them although their gradient was 0."""

    @abstractmethod
    def reset(self, name: str, layer: SparseProjection, changed: Tensor) -> int:
        """Set per-element optimizer state, and copies of the weight that the optimizer keeps, to 0.

        Args:
            name: the layer's, for error messages.
            layer: its weight is 0 at `changed` already.
            changed: bool, broadcastable to the weight's shape; true where the weight stands for something else now.

        Returns:
            Bytes that were communicated between ranks.
        """
