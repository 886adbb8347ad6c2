"""Which projections there are, and rules that give some of them another family than the config's."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import ArgsKwargs

from sparseift_llm.config.families import RuleFamily, with_family_mapping
from sparseift_llm.config.parsing import config_class, keyword_arguments

Kind = Literal["q", "k", "v", "o", "mlp_in", "mlp_out"]
Kinds = tuple[Kind, ...]
KINDS: tuple[Kind, ...] = ("q", "k", "v", "o", "mlp_in", "mlp_out")
_LAYER_RANGES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


@config_class
class FamilyRule:
    """Another family for some projections.

    The options of the family may stand in `family` or beside it, see `SparseIFTConfig`.

    Raises:
        ValueError: a value outside its range, naming it.
    """

    family: RuleFamily
    """The family: its name, or a mapping of its options with its name. `dense` leaves projections as they are."""
    targets: Kinds | None = None
    """Projection kinds that the rule is for; null means all."""
    layers: str | None = None
    """Decoder layers that the rule is for, counted from 0, e.g. `0-3,11`; null means all."""
    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Zero fraction; null means that of the config."""

    @model_validator(mode="before")
    @classmethod
    def _options_beside_family(cls, values: Any) -> Any:
        given = keyword_arguments(cls, values)
        return values if given is None else ArgsKwargs((), with_family_mapping(given))

    def __post_init__(self) -> None:
        if self.layers is not None and not _LAYER_RANGES.fullmatch(self.layers):
            raise ValueError(f"layers must be numbers and ranges such as '0-3,11', got {self.layers!r}")
        for low, high in self._layer_ranges():
            if low > high:
                raise ValueError(f"layers={self.layers!r}: the range {low}-{high} is empty; write {high}-{low}")

    @property
    def nonlinearity(self) -> str | None:
        """The family's non-linearity; None if it knows none."""
        return getattr(self.family, "nonlinearity", None)

    @property
    def sparse_u_only(self) -> bool:
        """Whether the outer factor of `factorized` stays dense."""
        return getattr(self.family, "sparse_u_only", False)

    def covers(self, kind: str, layer_index: int) -> bool:
        """Whether this rule is for a projection of `kind` in decoder layer `layer_index`."""
        in_range = self.layers is None or any(low <= layer_index <= high for low, high in self._layer_ranges())
        return in_range and (self.targets is None or kind in self.targets)

    def _layer_ranges(self) -> list[tuple[int, int]]:
        """The first and the last layer of each range."""
        ranges = [part.partition("-") for part in (self.layers or "").split(",") if part]
        return [(int(low), int(high or low)) for low, _, high in ranges]
