"""Averaged copies of a model (EMA), whose masks change together with the model's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sparseift_llm.layers.base import SparseProjection, sparse_layers

Layers = Mapping[str, SparseProjection]


class AveragedCopies:
    """The sparse layers of every copy that follows a model."""

    def __init__(self) -> None:
        self._copies: list[Layers] = []

    def add(self, copy: nn.Module, layers: Layers) -> None:
        """Let `copy` follow the model with `layers` from now on.

        Raises:
            ValueError: it has other sparse layers, or its tiles are others.
        """
        copied = sparse_layers(copy)
        if copied.keys() != layers.keys():
            raise ValueError(f"{type(copy).__name__} is not a copy of the model: its sparse layers are others")
        self._copies.append(copied)
        self.update(layers)

    def update(self, layers: Layers) -> None:
        """Give the model's masks to all copies; what grows starts at 0 there, too."""
        for copied in self._copies:
            for name, layer in copied.items():
                layer.dense_gradient = None
                device = layer.topology.device
                layer.set_mask(layers[name].current_mask().to(device))
                if not torch.equal(layer.topology, layers[name].topology.to(device)):
                    raise ValueError(f"{name}: the averaged copy's tiles are not the model's; copy the model again")
