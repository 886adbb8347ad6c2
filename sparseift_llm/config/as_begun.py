"""What a transformation did before an option existed: runs and checkpoints that lack the option go on so.

The defaults of these options are for new models. Every other option that a record lacks has its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BEFORE: Mapping[str, Any] = {"kinds_apart": False}
BEFORE_IN_DST: Mapping[str, Any] = {"keep_connected": False}


def as_begun(transformation: Any) -> Any:
    """A recorded mapping of `SparseIFTConfig`, with what was done where it lacks an option; anything else as it is.

    >>> as_begun({"sparsity": 0.5})
    {'sparsity': 0.5, 'kinds_apart': False}
    """
    if not isinstance(transformation, Mapping):
        return transformation
    values = {**transformation, **{key: BEFORE[key] for key in BEFORE if key not in transformation}}
    if isinstance(values.get("dst"), Mapping):
        values["dst"] = dst_as_begun(values["dst"])
    return values


def dst_as_begun(dst: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a recorded mapping of `DSTConfig`."""
    return {**dst, **{key: BEFORE_IN_DST[key] for key in BEFORE_IN_DST if key not in dst}}
