"""torch's optimizers and their wrappers: their steps, and zeros in the state of weights that a mask update changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, wraps
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.layers.sharding import local, part_of
from sparseift_llm.training.backends.base import OptimizerBackend
from sparseift_llm.training.gradient_watch import GradientWatch


def unwrap_accelerate(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, which adds nothing to a step; any other optimizer as it is."""
    is_accelerates = any(kind.__module__.partition(".")[0] == "accelerate" for kind in type(optimizer).__mro__)
    return optimizer.optimizer if is_accelerates else optimizer


def optimizers_in(optimizer: Any) -> list[Any]:
    """`optimizer` and the optimizers that it holds (Lookahead, SAM, several in one), each before those inside it."""
    found: list[Any] = []
    waiting = [optimizer]
    while waiting:
        candidate = waiting.pop(0)
        if any(candidate is known for known in found):
            continue
        found.append(candidate)
        waiting += [value for value in _attributes(candidate) if isinstance(value, Optimizer)]
    return found


def _attributes(holder: Any) -> Iterator[Any]:
    for value in getattr(holder, "__dict__", {}).values():  # a class with slots has none
        if isinstance(value, list | tuple):
            yield from value
        elif type(value) is dict:
            yield from value.values()
        else:
            yield value


class TorchBackend(OptimizerBackend):
    """A torch optimizer of whole weights, or of weights that FSDP2 has sharded, perhaps inside other optimizers.

    A wrapper such as Lookahead may write weights after the step of the optimizer inside it, so a step has ended only
    when the outermost one has. A wrapper such as SAM may never be stepped itself: its own methods step the optimizer
    inside, and then that one's step counts.

    Args:
        optimizer: the outermost optimizer. It is referred to weakly, because it holds what follows its steps, and a
            cycle would outlive a training loop.
        layers: the sparse layers.
    """

    def __init__(self, optimizer: Any, layers: Mapping[str, SparseProjection]) -> None:
        self._optimizers = [ref(found) for found in optimizers_in(optimizer)]
        weights = {id(layer.weight) for layer in layers.values()}
        self._inner = [ref(found) for found in optimizers_in(optimizer)[1:] if _owns(found, weights)][-1:]
        self._is_inside = False  # a step of the outermost
        self._has_stepped = False

    @property
    def optimizer(self) -> Any:
        optimizer = self._optimizers[0]()
        assert optimizer is not None  # whoever steps it holds it
        return optimizer

    @property
    def is_alone(self) -> bool:
        """Whether the optimizer holds no other one."""
        return len(self._optimizers) == 1

    def shares_optimizer(self, other: OptimizerBackend) -> bool:
        if not isinstance(other, TorchBackend):
            return False
        mine, others = ([reference() for reference in x._optimizers] for x in (self, other))
        return any(a is b for a in mine for b in others if a is not None)

    def follow_steps(self, before: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
        if not self._inner:
            return _around_steps(self.optimizer, before, after)

        def enter() -> None:
            self._is_inside, self._has_stepped = True, False
            before()

        def leave() -> None:
            self._is_inside = False
            if self._has_stepped:
                after()

        def inner_has_stepped() -> None:
            if self._is_inside:
                self._has_stepped = True  # its wrapper may still write weights
            else:
                after()

        (inner,) = (reference() for reference in self._inner)
        ends = [_around_steps(self.optimizer, enter, leave), _around_steps(inner, before, inner_has_stepped)]
        return partial(_call_all, ends)

    def was_skipped(self) -> bool:
        # a gradient scaler steps a fused optimizer also when the step is to be skipped, and tells it so
        return any(bool(getattr(optimizer, "found_inf", False)) for optimizer in self._alive())

    def num_steps(self, layers: Mapping[str, SparseProjection]) -> int:
        weights = [layer.weight for layer in layers.values()]
        owned = {id(weight) for weight in weights}
        counts = [0]
        for optimizer in self._alive():
            counts += [_count(optimizer.state.get(weight, {})) for weight in weights]
            groups = optimizer.param_groups
            counts += [_count(group) for group in groups if any(id(weight) in owned for weight in group["params"])]
        return max(counts)

    def watch(self, layer: SparseProjection) -> GradientWatch | None:
        return None if layer.is_frozen else GradientWatch(layer.weight)

    def zero_inactive(self, layers: Mapping[str, SparseProjection]) -> None:
        for layer in layers.values():
            layer.zero_inactive()

    def reset(self, name: str, layer: SparseProjection, changed: Tensor) -> int:
        for optimizer in self._alive():
            zero_state(optimizer, layer.weight, changed, name)
        return layer.gathered_bytes

    def _alive(self) -> Iterator[Any]:
        return (optimizer for reference in self._optimizers if (optimizer := reference()) is not None)


def _owns(optimizer: Any, parameters: Iterable[int]) -> bool:
    return any(id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"])


def _count(state: Mapping[str, Any]) -> int:
    if isinstance(state.get("momentum_buffer"), Tensor) and "step" not in state:  # SGD counts nothing, but has stepped
        return 1
    step = state.get("step", 0)
    is_number = isinstance(step, int | float) or (isinstance(step, Tensor) and step.numel() == 1)
    return int(step) if is_number else 0


def _around_steps(optimizer: Any, before: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
    """Call `before` and `after` around every `optimizer.step()`; returns what ends this.

    By torch's hooks where they are called. They are not in a class that never calls `Optimizer.__init__`, which wraps
    the class's `step`; there, and in classes that are no torch optimizers, the object gets a `step` of its own.
    """
    before_eagerly = torch.compiler.disable(lambda *_: before())
    after_eagerly = torch.compiler.disable(lambda *_: after())
    if isinstance(optimizer, Optimizer) and getattr(type(optimizer).step, "hooked", False):
        handles = [
            optimizer.register_step_pre_hook(before_eagerly),
            optimizer.register_step_post_hook(after_eagerly),
        ]
        return partial(_call_all, [handle.remove for handle in handles])
    own = vars(optimizer).get("step")
    inner = partial(_step_of, ref(optimizer)) if own is None else own

    @wraps(type(optimizer).step if own is None else own)  # a learning rate scheduler leaves its mark on it
    def step(*args: Any, **kwargs: Any) -> Any:
        before_eagerly()
        result = inner(*args, **kwargs)
        after_eagerly()
        return result

    def end() -> None:
        if vars(optimizer).get("step") is step:
            if own is None:
                del optimizer.step
            else:
                optimizer.step = own

    optimizer.step = step
    return end


def _call_all(functions: Iterable[Callable[[], None]]) -> None:
    for function in functions:
        function()


def _step_of(optimizer: ref[Any], *args: Any, **kwargs: Any) -> Any:
    alive: Any = optimizer()
    return type(alive).step(alive, *args, **kwargs)


@torch.no_grad()
def zero_state(optimizer: Any, parameter: Tensor, positions: Tensor, name: str) -> None:
    """Set every per-element state of `parameter` to 0 at `positions`.

    Every state tensor of the parameter's shape is per-element state, whatever optimizer it is of. Anything else has no
    entry to reset: step counts, and Adafactor's factored moments, which belong to whole rows and columns of a weight
    or of each tile.

    Args:
        optimizer: the optimizer that owns `parameter`.
        parameter: a weight, whole or sharded; state is zeroed on the rank that owns it.
        positions: bool mask, broadcastable to its shape.
        name: the layer, for error messages.

    Raises:
        ValueError: per-element state that is not floating point (quantised optimizers), in which
            0 need not mean zero.
    """
    for key, state in optimizer.state.get(parameter, {}).items():
        if not isinstance(state, Tensor) or state.shape != parameter.shape:
            continue
        if not state.is_floating_point():
            raise ValueError(
                f"{name}: {type(optimizer).__name__} keeps {key!r} as {state.dtype}, which cannot be reset for "
                "grown weights; use an optimizer with floating-point state"
            )
        local(state).masked_fill_(part_of(positions, state), 0)
