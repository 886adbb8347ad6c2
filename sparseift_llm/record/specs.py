"""What is known of one projection of a Sparse-IFT model, as plain data: its matrices, their sizes and how they are
stored.

`planning` makes these specifications, `conversion` builds layers from them, and config.json holds them (see
model_record.py). Nothing here computes a size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparseift_llm.record.fields import Fields, damaged

STRUCTURES = ("dense", "unstructured", "block", "n:m")
_KIND = re.compile(r"(q|k|v|o)+|mlp_in|mlp_out|embedding|logits")
ENDS = ("embedding", "logits")  # kinds of the matrices outside of the decoder layers
ROW_KINDS = ("q", "k", "v", "kv", "gate", "up")


@dataclass(frozen=True)
class RowGroup:
    """Rows of a matrix that keep a number of active weights of their own, e.g. the keys of a fused matrix.

    The rows may be interleaved with others: in GPT-NeoX each head has its query, its key and its value in turn.

    Args:
        kind: what these rows compute: `q`, `k`, `v`, `kv` (a latent of both), or an FFN's `gate` or `up`.
        start, stop: the first run of consecutive rows, counted from 0; `stop` is not among them.
        num_active: active weights within all rows of the group.
        repeats: how many such runs there are.
        period: rows from the start of one run to the start of the next; None if there is one run.
    """

    kind: str
    start: int
    stop: int
    num_active: int
    repeats: int = 1
    period: int | None = None

    @property
    def num_rows(self) -> int:
        """How many rows it has."""
        return self.repeats * (self.stop - self.start)

    @property
    def rows(self) -> list[int]:
        """The numbers of all its rows, ascending."""
        return [
            row + index * (self.period or 0) for index in range(self.repeats) for row in range(self.start, self.stop)
        ]

    def to_dict(self) -> dict[str, Any]:
        """A JSON object from which `from_dict` gives back an equal group; what has its default is left out."""
        values: dict[str, Any] = {
            "kind": self.kind, "start": self.start, "stop": self.stop, "num_active": self.num_active,
        }  # fmt: skip
        return values if self.period is None else values | {"repeats": self.repeats, "period": self.period}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> RowGroup:
        """The group from its JSON object at the dotted path `where`. Raises ValueError naming a damaged field."""
        fields = Fields(values, where)
        kind = fields.text("kind")
        if kind not in ROW_KINDS:
            raise damaged(fields.path("kind"), f"must be one of {', '.join(ROW_KINDS)}, got {kind!r}")
        group = cls(
            kind,
            fields.integer("start", least=0),
            fields.integer("stop"),
            fields.integer("num_active"),
            fields.integer("repeats", 1),
            fields.integer("period", None),
        )
        fields.end()
        if group.stop <= group.start:
            raise damaged(fields.path("stop"), f"must be above start={group.start}, got {group.stop}")
        if (group.repeats > 1) != (group.period is not None):
            raise damaged(fields.path("period"), f"is {group.period} with repeats={group.repeats}")
        return group


@dataclass(frozen=True)
class MatrixSpec:
    """One matrix of a projection.

    Args:
        path: module path inside the projection's module, e.g. `branches.0`; empty for the projection itself.
        shape: (out, in).
        num_active: weights that are multiplied at the sparsity that was asked for. Under `gmp` there are more of them
            until the masks have become that sparse.
        structure: which sets of weights may be active: `dense` (all), `unstructured` (any), `block` (whole tiles) or
            `n:m` (n of every m neighbours along the inputs).
        block_size: side of a tile, with `block` only.
        pattern: (n, m), with `n:m` only.
        transposable: whether n of every m neighbours along the outputs are active, too; with `n:m` only.
        transposed: whether weight and mask are stored as (in, out), like those of GPT-2's `Conv1D`.
        heads: the side along which attention heads lie that keep as many active weights each (0 outputs, 1 inputs), and
            their number; None if heads are not balanced.
        row_groups: disjoint groups of rows, which keep an active count each; together they have all `num_active`
            weights. Empty if the matrix has one count only.
    """

    path: str
    shape: tuple[int, int]
    num_active: int
    structure: str
    block_size: int | None = None
    pattern: tuple[int, int] | None = None
    transposable: bool = False
    transposed: bool = False
    heads: tuple[int, int] | None = None
    row_groups: tuple[RowGroup, ...] = ()

    @property
    def num_weights(self) -> int:
        """Zeros included."""
        return self.shape[0] * self.shape[1]

    @property
    def is_sparse(self) -> bool:
        """Whether it has a mask."""
        return self.structure != "dense"

    @property
    def head_size(self) -> int:
        """Rows or columns of one of the `heads`."""
        assert self.heads is not None
        side, number = self.heads
        return self.shape[side] // number

    def to_dict(self) -> dict[str, Any]:
        """A JSON object from which `from_dict` gives back an equal matrix; what has its default is left out."""
        values: dict[str, Any] = {
            "path": self.path,
            "shape": list(self.shape),
            "num_active": self.num_active,
            "structure": self.structure,
            "block_size": self.block_size,
            "pattern": self.pattern and list(self.pattern),
            "transposable": self.transposable,
            "transposed": self.transposed,
            "heads": self.heads and list(self.heads),
            "row_groups": [group.to_dict() for group in self.row_groups],
        }
        return {key: value for key, value in values.items() if value not in ("", None, False, [])}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> MatrixSpec:
        """The matrix from its JSON object at the dotted path `where`. Raises ValueError naming a damaged field."""
        fields = Fields(values, where)
        matrix = cls(
            path=fields.text("path", ""),
            shape=fields.pair("shape"),
            num_active=fields.integer("num_active"),
            structure=fields.text("structure"),
            block_size=fields.integer("block_size", None),
            pattern=fields.pair("pattern", None),
            transposable=fields.flag("transposable", False),
            transposed=fields.flag("transposed", False),
            heads=fields.pair("heads", None, least=0),
            row_groups=tuple(RowGroup.from_dict(*entry) for entry in fields.objects("row_groups", ())),
        )
        fields.end()
        matrix._check(where)
        return matrix

    def _check(self, where: str) -> None:
        if self.structure not in STRUCTURES:
            raise damaged(f"{where}.structure", f"must be one of {', '.join(STRUCTURES)}, got {self.structure!r}")
        if (self.block_size is not None) != (self.structure == "block"):
            raise damaged(f"{where}.block_size", f"is {self.block_size} with structure {self.structure!r}")
        if (self.pattern is not None) != (self.structure == "n:m"):
            raise damaged(f"{where}.pattern", f"is {self.pattern} with structure {self.structure!r}")
        if self.transposable and self.structure != "n:m":
            raise damaged(f"{where}.transposable", f"is true with structure {self.structure!r}")
        self._check_sizes(where)
        if self.heads is not None and not self._has_heads():
            raise damaged(f"{where}.heads", f"is {self.heads}, which does not divide a matrix of {self.shape}")
        rows = [row for group in self.row_groups for row in group.rows]
        if len(set(rows)) < len(rows) or max(rows, default=0) >= self.shape[0]:
            raise damaged(f"{where}.row_groups", "must be disjoint and inside the matrix")
        if not self.row_groups:
            return
        if len(rows) < self.shape[0] or self.structure != "unstructured":
            raise damaged(f"{where}.row_groups", "must hold all rows of an unstructured matrix")
        if sum(group.num_active for group in self.row_groups) != self.num_active:
            raise damaged(f"{where}.row_groups", f"must have num_active={self.num_active} weights together")
        for group in self.row_groups:
            if group.num_active > group.num_rows * self.shape[1]:
                raise damaged(f"{where}.row_groups", f"has {group.num_active} weights in {group.num_rows} rows")
            if self.heads is not None and (self.heads[0] != 0 or group.num_rows % self.head_size):
                raise damaged(f"{where}.row_groups", f"must be whole heads, got heads={self.heads}")

    def _check_sizes(self, where: str) -> None:
        if self.pattern is not None:
            n, m = self.pattern
            if n >= m or self.shape[1] % m or self.num_active * m != self.num_weights * n:
                raise damaged(
                    f"{where}.pattern",
                    f"is {self.pattern}, which does not give a matrix of {self.shape} {self.num_active} active weights",
                )
            if self.transposable and self.shape[0] % m:
                raise damaged(f"{where}.transposable", f"is true with {self.pattern} in a matrix of {self.shape}")
        if self.block_size is not None:
            unit = self.block_size**2
            if self.num_active % unit or any(side % self.block_size for side in self.shape):
                raise damaged(
                    f"{where}.block_size",
                    f"is {self.block_size}, which does not divide a matrix of {self.shape} with {self.num_active} "
                    "active weights into tiles",
                )
            if self.num_active // unit < self.shape[0] // self.block_size:
                raise damaged(f"{where}.num_active", f"is {self.num_active}, which leaves block-rows without a tile")
        if self.num_active > self.num_weights or (self.num_active < self.num_weights and not self.is_sparse):
            raise damaged(
                f"{where}.num_active",
                f"is {self.num_active} in a matrix of {self.shape} of structure {self.structure!r}",
            )

    def _has_heads(self) -> bool:
        assert self.heads is not None
        side, number = self.heads
        return side in (0, 1) and number > 0 and self.shape[side] % number == 0


@dataclass(frozen=True)
class LayerSpec:
    """One projection of the model, sparse or not: what it was in the dense model, and what stands in its place.

    Args:
        name: module path.
        kind: what it computes; fused kinds are joined, e.g. `qkv`. `embedding` and `logits` are the matrices at both
            ends of the model.
        family: `wide` (a sparse matrix in a module of the stock kind), `dense` (left as it is) or the drop-in family
            whose module stands there.
        dense_shape: (out, in) in the dense model.
        matrices: what is multiplied instead, in the family's order. There is one with an empty path for `wide` and
            `dense`, and none if the projection is tied. An embedding and logits without tiles have as many active
            weights in every row; in tiles, their rows are filled up to whole tiles.
        options: the family's own options by name, e.g. `nonlinearity`. One that is absent has the family's default.
        layer_index: of its decoder layer, counted from 0; None outside of them.
        tied_to: name of the projection whose matrices this one shares; None if it has matrices of its own.
    """

    name: str
    kind: str
    family: str
    dense_shape: tuple[int, int]
    matrices: tuple[MatrixSpec, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    layer_index: int | None = None
    tied_to: str | None = None

    @property
    def is_replaced(self) -> bool:
        """Whether a drop-in family's module stands in the place of the projection."""
        return self.family not in ("wide", "dense")

    @property
    def is_sparse(self) -> bool:
        """Whether it has a mask."""
        return any(matrix.is_sparse for matrix in self.matrices)

    @property
    def sparse_shape(self) -> tuple[int, int]:
        """(out, in) of the projection as a whole; a drop-in family keeps the sides of the dense one."""
        return self.dense_shape if self.is_replaced or not self.matrices else self.matrices[0].shape

    @property
    def num_active(self) -> int:
        """Active weights of all its matrices."""
        return sum(matrix.num_active for matrix in self.matrices)

    @property
    def num_weights(self) -> int:
        """Weights of all its matrices, zeros included."""
        return sum(matrix.num_weights for matrix in self.matrices)

    @property
    def sparsity(self) -> float:
        """Zero fraction of all its matrices; not a number for a tied layer, which has none of its own."""
        return 1 - self.num_active / self.num_weights if self.matrices else math.nan

    def path_of(self, matrix: MatrixSpec) -> str:
        """The module path, in the model, of one of its matrices."""
        return f"{self.name}.{matrix.path}" if matrix.path else self.name

    def to_dict(self) -> dict[str, Any]:
        """A JSON object from which `from_dict` gives back an equal specification; defaults are left out."""
        values = {
            "name": self.name,
            "kind": self.kind,
            "family": self.family,
            "dense_shape": list(self.dense_shape),
            "matrices": [matrix.to_dict() for matrix in self.matrices],
            "options": dict(self.options),
            "layer_index": self.layer_index,
            "tied_to": self.tied_to,
        }
        return {key: value for key, value in values.items() if value is not None and value not in ({}, [])}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> LayerSpec:
        """The specification from its JSON object at the path `where`. Raises ValueError naming a damaged field."""
        fields = Fields(values, where)
        name = fields.text("name")
        fields.where = f"{where} ({name})"
        options = fields.take("options", {})
        if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
            raise damaged(fields.path("options"), f"must be an object, got {options!r}")
        layer = cls(
            name=name,
            kind=_kind(fields),
            family=fields.text("family"),
            dense_shape=fields.pair("dense_shape"),
            matrices=tuple(MatrixSpec.from_dict(*entry) for entry in fields.objects("matrices", ())),
            options=dict(options),
            layer_index=fields.integer("layer_index", None, least=0),
            tied_to=fields.text("tied_to", None),
        )
        fields.end()
        layer._check(fields.path("matrices"))
        return layer

    def _check(self, where: str) -> None:
        paths = [matrix.path for matrix in self.matrices]
        if self.tied_to is not None:
            if paths:
                raise damaged(where, f"must be empty, because the layer shares those of {self.tied_to}")
        elif self.is_replaced:
            if not paths or "" in paths or len(set(paths)) < len(paths):
                raise damaged(where, f"must be matrices inside the module of family {self.family!r}, got paths {paths}")
        elif paths != [""]:
            raise damaged(where, f"must be one matrix without a path with family {self.family!r}, got paths {paths}")
        elif self.family == "dense" and self.is_sparse:
            raise damaged(where, "must be of structure 'dense' with family 'dense'")
        elif self.kind in ENDS and not self.matrices[0].block_size and self.num_active % self.matrices[0].shape[0]:
            raise damaged(where, f"must have as many active weights in each of {self.matrices[0].shape[0]} rows")


def _kind(fields: Fields) -> str:
    kind: str = fields.text("kind")
    if not _KIND.fullmatch(kind):
        raise damaged(
            fields.path("kind"), f"must be made of q, k, v and o, or mlp_in, mlp_out, embedding or logits, got {kind!r}"
        )
    return kind
