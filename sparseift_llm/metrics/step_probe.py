"""What is measured on single steps, those that are logged: the norm of active gradients, and saturated hidden units.

Other steps are not touched. Results stay on their device until they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparseift_llm.layers.base import SparseProjection, plain_name
from sparseift_llm.layers.block_ffn import BlockFeedForward
from sparseift_llm.layers.sharding import reshard, whole
from sparseift_llm.metrics.counts import kinds_in

SAMPLE_TOKENS = 256
FLAT = 1e-3  # an activation within this of 0 is on the flat side of ReLU, GELU and SiLU


def num_saturated(activation: Tensor) -> Tensor:
    """Hidden units whose activation (tokens, hidden) stays within `FLAT` of 0 for every token: int64 scalar.

    >>> num_saturated(torch.tensor([[0.0, 2.0, -1e-4], [0.0, 0.0, 9e-4]]))
    tensor(2)
    """
    return (activation.abs() < FLAT).all(0).sum()


class StepSample:
    """Measures one step: `begin()` before its first forward pass, `end()` between the last backward and clipping.

    Args:
        model: a Sparse-IFT model, perhaps wrapped.
        layers: its sparse layers.

    Attributes:
        grad_norm: L2 norm of the gradients of all active sparse weights at `end()`; None if there were none.
        saturated: share of FFN hidden units, of all layers, that are saturated: on none of the first
            `SAMPLE_TOKENS` tokens of the step's first micro-batch on this rank was their activation, as it enters
            the last FFN projection, further than `FLAT` from 0. None where the forward pass is compiled.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SparseProjection]) -> None:
        self.grad_norm: Tensor | None = None
        self.saturated: Tensor | None = None
        self._model = model
        self._layers = layers
        self._handles: list[RemovableHandle] = []
        self._sampled: dict[nn.Module, tuple[Tensor, int]] = {}

    def begin(self) -> None:
        """Let the coming forward pass leave a sample of its activations."""
        self.close()
        self.grad_norm = self.saturated = None
        self._handles = [module.register_forward_pre_hook(self._sample) for module in _ffn_outputs(self._model)]

    def end(self) -> None:
        """Measure the gradients as they are. With `fully_shard` all ranks must call it: it sums over shards."""
        reshard(self._model)
        gradients = [layer.weight.grad for layer in self._layers.values() if layer.weight.grad is not None]
        if gradients:  # inactive weights have gradients of 0
            self.grad_norm = whole(torch.nn.utils.get_total_norm(gradients))
        if self._sampled:
            counts, sizes = zip(*self._sampled.values(), strict=True)
            self.saturated = torch.stack(counts).sum() / sum(sizes)
        self.close()

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._sampled = [], {}

    def _sample(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling() and module not in self._sampled and args:
            self._sampled[module] = self._count(module, args[0])

    @staticmethod
    @torch.no_grad()
    def _count(module: nn.Module, input: Tensor) -> tuple[Tensor, int]:
        tokens = input.reshape(-1, input.shape[-1])[:SAMPLE_TOKENS]
        # an FFN that is computed as one never stores its activation: it is computed again, for these tokens only
        hidden = module.hidden(tokens) if isinstance(module, BlockFeedForward) else tokens
        return num_saturated(hidden), hidden.shape[-1]


def _ffn_outputs(model: nn.Module) -> list[nn.Module]:
    """The last projection of every FFN, sparse or not; the whole FFN where it is computed as one.

    A hook on a projection inside of that would make it compute its projections one by one.
    """
    kinds, found = kinds_in(model), []
    for name, module in model.named_modules():
        if kinds.get(plain_name(name)) == "mlp_out":
            parent = model.get_submodule(name.rpartition(".")[0])
            found.append(parent if isinstance(parent, BlockFeedForward) and parent.is_fused else module)
    return found
