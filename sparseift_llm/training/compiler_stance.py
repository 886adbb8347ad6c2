"""Compiled code switched off while any controller needs it: `torch.compiler.set_stance` is one setting per process."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from weakref import finalize

import torch

_holders: dict[int, finalize[..., Any]] = {}
_restore = ExitStack()


def hold(owner: object) -> None:
    """Run what is compiled eagerly until `owner`, and every other holder, has released it or is gone."""
    if id(owner) in _holders:
        return
    if _holders:
        torch.compiler.set_stance("force_eager")  # whoever else may have set it meanwhile
    else:
        _restore.enter_context(torch.compiler.set_stance("force_eager"))
    holder = finalize(owner, _released, id(owner))
    holder.atexit = False
    _holders[id(owner)] = holder


def release(owner: object) -> None:
    """The inverse of `hold`; nothing happens if `owner` does not hold it."""
    holder = _holders.get(id(owner))
    if holder is not None:
        holder()


def _released(key: int) -> None:
    del _holders[key]
    if not _holders:
        _restore.close()  # to the stance that was there before the first holder
