"""`BlockFeedForward`: the MLP of a decoder layer whose block-sparse projections are computed as one.

It stands in the place of the stock MLP and holds its children under their names, so that module paths and state dicts
stay what they are. The product itself is in ops/block_feed_forward.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, ReLUSquaredActivation, SiLUActivation

from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.ops.block_feed_forward import block_feed_forward, kept_on
from sparseift_llm.ops.operands import autocast_operands, call_operator, refuse_forward_mode

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_ACTIVATIONS: dict[type[nn.Module], str] = {
    GELUTanh: "gelu_tanh",
    NewGELUActivation: "gelu_tanh",
    GELUActivation: "gelu_erf",
    nn.SiLU: "silu",
    SiLUActivation: "silu",
    nn.ReLU: "relu",
    ReLUSquaredActivation: "relu_squared",
}


def can_be_fused(mlp: nn.Module, chain: Sequence[str], is_gated: bool = False) -> bool:
    """Whether an MLP consists of block-sparse projections of one tile, and an activation that the operator knows.

    Args:
        mlp: the stock MLP, perhaps with sparse projections in it.
        chain: names of its children, as of `BlockFeedForward`.
        is_gated: as of `BlockFeedForward`.
    """
    parts = _parts_of(mlp, chain, is_gated)
    projections = [projection for projection in (parts.up, parts.gate, parts.down) if projection is not None]
    if not all(isinstance(projection, BlockSparseLinear) for projection in projections):
        return False
    return len({projection.block_size for projection in projections}) == 1 and _name_of(parts.activation) is not None


class _Parts(NamedTuple):
    """The children of an MLP by what they do."""

    up: Any
    activation: Any
    down: Any
    gate: Any
    after: list[Any]


def _parts_of(mlp: nn.Module, chain: Sequence[str], is_gated: bool) -> _Parts:
    children = [getattr(mlp, name) for name in chain]
    gate = children.pop(0) if is_gated else None
    if is_gated:
        children[:2] = reversed(children[:2])  # the activation is called before the projection it multiplies
    up, activation, down, *after = children
    return _Parts(up, activation, down, gate, after)


class BlockFeedForward(nn.Module):
    """down(f(up(x))), or down(f(gate(x)) * up(x)), as one operator, without the passes between its products.

    A child that somebody looks at or has replaced is called: with a hook on a child, with a child sharded or offloaded
    by itself, or with another activation, the next forward pass calls the children one after the other, as the stock
    MLP does. The results are the same but for rounding; time and memory are those of single layers.

    Args:
        mlp: the stock MLP, whose projections are sparse already. Its children move here.
        chain: the names of all its children in the order of its forward pass: the projection into the FFN, the
            activation, the projection out of it, and what follows (a dropout), if anything. With a gate: the gate, the
            activation, the projection that it multiplies, the projection out of the FFN, and what follows.
        is_gated: whether there is a gate.

    Raises:
        ValueError: the MLP is not such a chain, or the projections do not fit together.
    """

    def __init__(self, mlp: nn.Module, chain: Sequence[str], is_gated: bool = False) -> None:
        super().__init__()
        children = dict(mlp.named_children())
        own = [name for name, _ in (*mlp.named_parameters(recurse=False), *mlp.named_buffers(recurse=False))]
        if own or children.keys() != set(chain) or not can_be_fused(mlp, chain, is_gated):
            raise ValueError(
                f"{type(mlp).__name__} with the children {', '.join(children)} is not block-sparse projections of one "
                f"tile with an activation in between, called in the order {', '.join(chain)}; leave it as it is"
            )
        self._chain, self._is_gated = tuple(chain), is_gated
        for name, child in children.items():
            self.add_module(name, child)
        parts = self.parts
        for projection in (parts.up, parts.gate):
            if projection is not None and projection.out_features != parts.down.in_features:
                raise ValueError(f"{projection} cannot feed {parts.down}")
        # The stock module without its children, for `to_stock`; in a tuple, because it is not a child of this module.
        shell = copy.copy(mlp)
        shell._modules = {}
        self._shell = (shell,)
        self.train(mlp.training)

    @property
    def parts(self) -> _Parts:
        """The children that are here now."""
        return _parts_of(self, self._chain, self._is_gated)

    @property
    def is_fused(self) -> bool:
        """Whether the next forward pass computes the projections as one."""
        up, activation, down, gate, _ = self.parts
        if any(child is not None and _is_called_by_others(child) for child in (up, activation, down, gate)):
            return False
        return can_be_fused(self, self._chain, self._is_gated)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        up, _, down, gate, after = self.parts
        if not self.is_fused:
            y = self._one_by_one(input)
        elif all(layer is None or layer.dense_gradient is None for layer in (up, down, gate)):
            y = self._as_one(input)
        else:
            # Dense gradients need the inputs of all projections. The activation is computed again in the backward
            # pass, so that only one layer at a time holds it and the peak of memory does not rise.
            y = checkpoint(self._one_by_one, input, use_reentrant=False, preserve_rng_state=False)
        for module in after:
            y = module(y)
        return y

    def hidden(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., hidden): the activation that enters the last projection, which `forward` hides."""
        up, activation, _, gate, _ = self.parts
        active: Tensor = activation(up(input)) if gate is None else activation(gate(input)) * up(input)
        return active

    def to_stock(self) -> nn.Module:
        """The stock MLP, with the children that are here now."""
        (shell,) = self._shell
        stock = copy.copy(shell)
        stock._modules = {}
        for name, child in self.named_children():
            stock.add_module(name, child)
        return stock.train(self.training)

    def extra_repr(self) -> str:
        names = ", ".join(self._chain[: 4 if self._is_gated else 3])
        return f"{names} computed " + ("as one" if self.is_fused else "one by one")

    def _one_by_one(self, input: Tensor) -> Tensor:
        y: Tensor = self.parts.down(self.hidden(input))
        return y

    def _as_one(self, input: Tensor) -> Tensor:
        up, activation, down, gate, _ = self.parts
        x, operands = _operands(input.reshape(-1, up.in_features), (up, gate, down))
        name = _name_of(activation)
        keep = kept_on(x.device.type, str(name), self._is_gated) if torch.is_grad_enabled() else "nothing"
        y, *_ = call_operator(block_feed_forward, x, *operands, up.out_features, down.out_features, name, keep)
        result: Tensor = y.view(*input.shape[:-1], down.out_features)
        return result


def _operands(x: Tensor, projections: Sequence[BlockSparseLinear | None]) -> tuple[Tensor, list[Any]]:
    """x in the dtype of autocast, and the four operands of every projection; nothing stands for a missing one."""
    operands: list[Any] = []
    for projection in projections:
        if projection is None:
            operands += [None, None, None, []]
            continue
        refuse_forward_mode(x, projection.weight, projection.bias)
        x, weight, bias = autocast_operands(x, projection.weight, projection.bias)
        operands += [weight, bias, *projection.index]
    return x, operands


def _name_of(activation: nn.Module) -> str | None:
    """The activation as the operator calls it; None if it knows none such. A subclass may compute something else."""
    if type(activation) is nn.GELU:
        return {"tanh": "gelu_tanh", "none": "gelu_erf"}.get(activation.approximate)
    return _ACTIVATIONS.get(type(activation))


def _is_called_by_others(child: nn.Module) -> bool:
    """Whether a child has hooks, or a forward function of its own, as accelerate gives to what it offloads."""
    return "forward" in child.__dict__ or any(getattr(child, hooks) for hooks in _HOOKS)
