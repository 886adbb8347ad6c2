"""Whether gradients that a backward pass left were thrown away before the optimizer could use them."""

from __future__ import annotations

from weakref import ref

from torch import Tensor
from torch.distributed.tensor import DTensor


class GradientWatch:
    """Follows the `.grad` of one parameter.

    Gradients are thrown away by `zero_grad()` or `.grad = None`: of the first pass of a sharpness-aware optimizer, of a
    batch with a spike, of a step that a gradient scaler skips.

    Args:
        parameter: one that takes gradients and that the optimizer holds; with FSDP2 the shard.
    """

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter
        self._has_arrived = False
        self._was_zero: Tensor | None = None
        # a weak reference, because the parameter holds the hook: a cycle would outlive the training loop
        watch = ref(self)
        self._handle = parameter.register_post_accumulate_grad_hook(lambda _: _arrived(watch))

    def is_thrown_away(self) -> bool:
        """Whether a gradient had arrived, and is gone or was set to 0 since.

        Of a shard only whether it is gone: one rank's part may be all zeros by itself, and ranks must agree.
        """
        if not self._has_arrived:  # with FSDP2 and accumulation without sync, it has not arrived at the shard yet
            return False
        gradient = self._parameter.grad
        if gradient is None:
            return True
        if isinstance(gradient, DTensor) or self._was_zero is None or gradient.any():
            return False
        return not self._was_zero  # a gradient that was 0 when it arrived says nothing

    def close(self) -> None:
        """Follow the parameter no longer."""
        self._handle.remove()

    def arrived(self) -> None:
        """A backward pass has added to the gradient."""
        gradient = self._parameter.grad
        self._has_arrived = True
        self._was_zero = None if gradient is None or isinstance(gradient, DTensor) else ~gradient.any()


def _arrived(watch: ref[GradientWatch]) -> None:
    alive = watch()
    if alive is not None:
        alive.arrived()
