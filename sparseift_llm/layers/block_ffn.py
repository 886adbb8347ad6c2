"""`BlockFeedForward`: the MLP of a decoder layer whose two block-sparse projections are computed as one.

It stands in the place of the stock MLP and holds its children under their names, so that module paths and state dicts
stay what they are. The product itself is in ops/block_feed_forward.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import GELUTanh, NewGELUActivation

from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.ops.block_feed_forward import block_feed_forward_op, gelu
from sparseift_llm.ops.operands import autocast_operands, call_operator, refuse_forward_mode

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def can_be_fused(mlp: nn.Module, chain: Sequence[str]) -> bool:
    """Whether an MLP consists of a block-sparse projection, GELU (tanh formula) and another block-sparse projection.

    Args:
        mlp: the stock MLP, perhaps with sparse projections in it.
        chain: names of its children in the order of its forward pass, as of `BlockFeedForward`.
    """
    up, activation, down, *_ = (getattr(mlp, name) for name in chain)
    is_pair = isinstance(up, BlockSparseLinear) and isinstance(down, BlockSparseLinear)
    return is_pair and _is_tanh_gelu(activation)


class BlockFeedForward(nn.Module):
    """down(gelu(up(x))) in one pass over the tokens, without storing the activation in between where a kernel can.

    A child that somebody looks at or has replaced is called: with a hook on a child, with a child sharded or offloaded
    by itself, or with another activation, the next forward pass calls the children one after the other, as the stock
    MLP does. The results are the same but for rounding; time and memory are those of single layers.

    Args:
        mlp: the stock MLP, whose two projections are sparse already. Its children move here.
        chain: the names of all its children in the order of its forward pass: the projection into the FFN, the
            activation, the projection out of it, and what follows (a dropout), if anything.

    Raises:
        ValueError: the MLP is not such a chain, or the two projections do not fit together.
    """

    def __init__(self, mlp: nn.Module, chain: Sequence[str]) -> None:
        super().__init__()
        children = dict(mlp.named_children())
        own = [name for name, _ in (*mlp.named_parameters(recurse=False), *mlp.named_buffers(recurse=False))]
        if own or children.keys() != set(chain) or not can_be_fused(mlp, chain):
            raise ValueError(
                f"{type(mlp).__name__} with the children {', '.join(children)} is not two block-sparse projections "
                f"with GELU (tanh formula) in between, called in the order {', '.join(chain)}; leave it as it is"
            )
        self._chain = tuple(chain)
        for name, child in children.items():
            self.add_module(name, child)
        up, _, down, *_ = self.in_order()
        if (up.out_features, up.block_size) != (down.in_features, down.block_size):
            raise ValueError(f"{up} cannot feed {down}")
        # The stock module without its children, for `to_stock`; in a tuple, because it is not a child of this module.
        shell = copy.copy(mlp)
        shell._modules = {}
        self._shell = (shell,)
        self.train(mlp.training)

    def in_order(self) -> list[Any]:
        """The children in the order of the stock forward pass: a projection, the activation, a projection, the rest."""
        return [getattr(self, name) for name in self._chain]

    @property
    def is_fused(self) -> bool:
        """Whether the next forward pass computes the two projections as one."""
        return can_be_fused(self, self._chain) and not any(map(_is_called_by_others, self.in_order()[:3]))

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        up, activation, down, *after = self.in_order()
        if not self.is_fused:
            y = down(activation(up(input)))
        elif up.dense_gradient is None and down.dense_gradient is None:
            y = _multiply(input, up, down)
        else:
            # Dense gradients need the inputs of both projections. The activation is computed again in the backward
            # pass, so that only one layer at a time holds it and the peak of memory does not rise.
            y = checkpoint(self._one_by_one, input, use_reentrant=False, preserve_rng_state=False)
        for module in after:
            y = module(y)
        return y

    def hidden(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., hidden): the activation that enters the second projection, which `forward` hides."""
        return gelu(self.in_order()[0](input))

    def to_stock(self) -> nn.Module:
        """The stock MLP, with the children that are here now."""
        (shell,) = self._shell
        stock = copy.copy(shell)
        stock._modules = {}
        for name, child in self.named_children():
            stock.add_module(name, child)
        return stock.train(self.training)

    def extra_repr(self) -> str:
        return f"{', '.join(self._chain[:3])} computed " + ("as one" if self.is_fused else "one by one")

    def _one_by_one(self, input: Tensor) -> Tensor:
        down: BlockSparseLinear = self.in_order()[2]
        return down(self.hidden(input))


def _multiply(input: Tensor, up: BlockSparseLinear, down: BlockSparseLinear) -> Tensor:
    """(..., in) -> (..., out), both projections as one."""
    refuse_forward_mode(input, up.weight, up.bias, down.weight, down.bias)
    x, up_weight, up_bias = autocast_operands(input.reshape(-1, up.in_features), up.weight, up.bias)
    _, down_weight, down_bias = autocast_operands(x, down.weight, down.bias)
    y, _ = call_operator(
        block_feed_forward_op, x, up_weight, up_bias, *up.index, up.out_features, down_weight, down_bias,
        *down.index, down.out_features, keep_hidden=x.device.type != "cpu",
    )  # fmt: skip
    result: Tensor = y.view(*input.shape[:-1], down.out_features)
    return result


def _is_tanh_gelu(activation: nn.Module) -> bool:
    """Whether a module computes GELU by the tanh formula: transformers has two classes for it, torch one."""
    kind = type(activation)
    return kind in (GELUTanh, NewGELUActivation) or (kind is nn.GELU and activation.approximate == "tanh")


def _is_called_by_others(child: nn.Module) -> bool:
    """Whether a child has hooks, or a forward function of its own, as accelerate gives to what it offloads."""
    return "forward" in child.__dict__ or any(getattr(child, hooks) for hooks in _HOOKS)
