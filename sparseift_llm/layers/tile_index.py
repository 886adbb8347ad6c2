"""The buffers of a block-sparse layer that say where its tiles are, kept right whatever loads, moves or shards them.

What a layer's masks are is in tiled.py, and what it computes in block.py and block_embedding.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparseift_llm.topology import blocks


class TileIndex(nn.Module):
    """A base class with buffers that say where the tiles are, for a layer with N tiles in a matrix of (R, C) tiles.

    The buffers that follow from `columns` are written again, in place, whenever `columns` changes: a captured CUDA
    graph goes on reading them. They are not in the state dict.

    Attributes:
        weight: the tiles (N, b, b). The subclass sets it.
        out_features, in_features: sides of the matrix. The last block-row may stand out over the output side: R * b is
            at least `out_features`, and C * b is `in_features`.
        block_size: b.
        columns: the block-column of every tile, int32 (N,). It is in the state dict, because the weight means nothing
            without it.
        slots_by_column, rows_by_column, column_starts, heavy_columns: the tables of `topology.blocks.ByColumn`.
    """

    weight: Tensor
    out_features: int
    in_features: int
    block_size: int
    columns: Tensor
    slots_by_column: Tensor
    rows_by_column: Tensor
    column_starts: Tensor
    heavy_columns: Tensor
    _BY_COLUMN = ("slots_by_column", "rows_by_column", "column_starts", "heavy_columns")  # as in blocks.ByColumn

    @property
    def num_rows(self) -> int:
        """R, the number of tiles along the output side."""
        return -(-self.out_features // self.block_size)

    @property
    def num_columns(self) -> int:
        """C, the number of tiles along the input side."""
        return self.in_features // self.block_size

    def has_valid_columns(self) -> bool:
        """Whether columns are inside the matrix, and distinct within a block-row; always true on the meta device."""
        return self.columns.is_meta or blocks.are_valid(self.columns, self.num_rows, self.num_columns)

    def set_columns(self, columns: Tensor) -> None:
        """Copy other valid columns (N,) into the buffer, and index them."""
        self.columns.copy_(columns)
        self._index_columns()

    def restore_buffers(self) -> None:
        """Check columns that were just loaded, and index them.

        Raises:
            ValueError: they are not valid.
        """
        self.columns = self.columns.to(torch.int32)  # a loader may have put a tensor of another dtype in their place
        self._check_columns()
        self._index_columns()

    def _register_columns(self, columns: Tensor) -> None:
        """Make the buffers; once, after the sides are set.

        Raises:
            ValueError: the columns are not valid.
        """
        self.register_buffer("columns", columns.to(torch.int32))
        self._check_columns()
        tables = blocks.by_column(self.columns, self.num_rows, self.num_columns)
        for name, table in zip(self._BY_COLUMN, tables, strict=True):
            self.register_buffer(name, table, persistent=False)
        self.register_load_state_dict_post_hook(_after_loading)

    @property
    def index(self) -> tuple[Tensor, list[Tensor]]:
        """The columns, and the tables of `blocks.ByColumn`: as operators take them."""
        return self.columns, [getattr(self, name) for name in self._BY_COLUMN]

    def _index_columns(self) -> None:
        tables = blocks.by_column(self.columns, self.num_rows, self.num_columns)
        for name, table in zip(self._BY_COLUMN, tables, strict=True):
            getattr(self, name).copy_(table)

    def _check_columns(self) -> None:
        if not self.has_valid_columns():
            raise ValueError(
                "columns must be distinct within a block-row and inside the matrix: they are damaged, or of a model "
                "with another sparsity, family or scope"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> TileIndex:
        """Move or cast as every module does, except that the buffers do not go to the meta device.

        FSDP's and accelerate's loaders send a model there to fill in its weights later. Columns say what the weights
        will mean, and nobody fills them in.
        """
        kept = {name: getattr(self, name) for name in ("columns", *self._BY_COLUMN)}
        super()._apply(fn, recurse)
        if self.columns.is_meta and not kept["columns"].is_meta:
            for name, buffer in kept.items():
                setattr(self, name, buffer)
        return self

    @property
    def _awaits_shard(self) -> bool:
        """Whether the weight is a shard without values, as in accelerate's RAM-efficient loading.

        That loader takes every entry of the first rank's state dict for a parameter and spreads it over ranks. The
        columns are whole on every rank, so they must not be among the entries.
        """
        return isinstance(self.weight, DTensor) and self.weight.is_meta and not self.columns.is_meta

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._awaits_shard:
            del destination[f"{prefix}columns"]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *others: Any
    ) -> None:
        may_lack_columns = self._awaits_shard
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)
        if may_lack_columns and f"{prefix}columns" in missing:
            missing.remove(f"{prefix}columns")


def _after_loading(layer: TileIndex, _: Any) -> None:
    layer.restore_buffers()
