"""Progress bars with the time that is left. They are for terminals: a log file gets none."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(description: str, total: int | None, unit: str, scaled: bool = False) -> Any:
    """A bar of tqdm, which is hidden where stderr is not a terminal, or by `TQDM_DISABLE=1`.

    Args:
        description: what stands before the bar.
        total: the number of units, None if it is not known; then the bar shows a rate and no end.
        unit: what is counted.
        scaled: whether to write 1.2M for 1,200,000.
    """
    return tqdm(desc=description, total=total, unit=unit, unit_scale=scaled, disable=None, dynamic_ncols=True)


def is_watched() -> bool:
    """Whether stderr is a terminal, for bars that other libraries draw."""
    return sys.stderr.isatty()
