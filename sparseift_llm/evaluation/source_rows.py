"""The rows that a task's documents were made of: where they come from, and which one a document or a failure is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseift_llm.evaluation.data_files import place_of


@dataclass(frozen=True)
class Source:
    """Where the rows of a task come from, for messages.

    Args:
        name: of the data set, or of what makes the rows.
        files: the files of every split, in order; empty if there are no local files.
    """

    name: str
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict)

    def place(self, split: str, index: int | None) -> str:
        """A row in words; `index` counts from 0, and is None for a row that cannot be told."""
        if index is None:
            return f"{self.name}: a row of split {split!r}"
        if self.files.get(split):
            return f"{self.name}: {place_of(self.files[split], index)}"
        return f"{self.name}: split {split!r}, row {index + 1}"


def raw_index(raw: Any, process_docs: Callable[[Any], Any], document: Any) -> int | None:
    """The row that a prepared document was made of, which may have been moved or others left out; None if unknown."""

    def holds(start: int, end: int) -> bool:
        return any(one == document for one in process_docs(raw.select(range(start, end))))

    start, end = 0, len(raw)
    if not holds(start, end):
        return None
    while end - start > 1:
        middle = (start + end) // 2
        start, end = (start, middle) if holds(start, middle) else (middle, end)
    return start


def first_failing(raw: Any, process_docs: Callable[[Any], Any]) -> tuple[int, Exception] | None:
    """The first row that the preparing function fails on, and how; None if it does not fail."""

    def failure(end: int) -> Exception | None:
        try:
            process_docs(raw.select(range(end)))
        except Exception as error:  # a task's functions raise whatever they like
            return error
        return None

    whole = failure(len(raw))
    if whole is None:
        return None
    good, bad, cause = 0, len(raw), whole  # the first `good` rows are fine, the first `bad` are not
    while bad - good > 1:
        middle = (good + bad) // 2
        found = failure(middle)
        if found is None:
            good = middle
        else:
            bad, cause = middle, found
    return bad - 1, cause
