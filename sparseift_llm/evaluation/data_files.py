"""One file of an evaluation's data: whether it can be read to its end, and how its rows are named in messages.

JSON lines and parquet are known. Which files make up a data set is described in data_folder.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class DataError(ValueError):
    """Data for an evaluation is missing or damaged; the message names every such piece and what to do."""


def is_parquet(path: Path) -> bool:
    """Whether the file is read as parquet; all others are read as JSON lines."""
    return path.suffix == ".parquet"


def count_rows(path: Path) -> int:
    """Read the whole file once.

    A byte order mark at the beginning, and blank lines, are allowed in JSON lines: `datasets` skips both.

    Args:
        path: a file of JSON lines or a parquet file.

    Returns:
        The number of rows, at least 1.

    Raises:
        DataError: the file is empty, or a row cannot be read: it is cut off, is not a JSON object, or holds text that
            is not valid UTF-8 or half of a surrogate pair. The message names the file and the line or row.
    """
    rows = _count_parquet_rows(path) if is_parquet(path) else sum(1 for _ in _read_json_lines(path))
    if rows == 0:
        raise DataError(f"{path} has no rows; the file is truncated or damaged")
    return rows


def place_of(files: Sequence[Path], index: int) -> str:
    """How a row of a split is named for a person, e.g. `data/test.jsonl, line 12`.

    Args:
        files: the files of the split, in order, all of them readable.
        index: of the row in the split, counted from 0.
    """
    for path in files:
        if is_parquet(path):
            rows = _count_parquet_rows(path)
            if index < rows:
                return f"{path}, row {index + 1}"
            index -= rows
            continue
        for line, _ in _read_json_lines(path):
            if index == 0:
                return f"{path}, line {line}"
            index -= 1
    raise IndexError(f"{', '.join(map(str, files))} have fewer rows than asked for")


def _read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, counted from 1, and row."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if not content.strip():
                continue
            try:
                row = json.loads(content.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"it is a {type(row).__name__}, not an object")
                if b"\\ud" in content.lower():  # only then can half of a surrogate pair be in it
                    json.dumps(row, ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError as error:
                half = ascii(error.object[error.start])
                raise DataError(
                    f"{path}, line {number} cannot be read (it holds {half}, half of a surrogate pair, which is no "
                    "character); the file is damaged"
                ) from error
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number} cannot be read ({error}); the file is truncated or damaged"
                ) from error
            yield number, row


def _count_parquet_rows(path: Path) -> int:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped, unused-ignore]

    try:
        with parquet.ParquetFile(path) as file:
            rows: int = file.metadata.num_rows
            table = file.read()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}); the file is truncated or damaged") from error
    bad = _first_invalid_row(table, 0, rows)
    if bad is not None:
        index, problem = bad
        raise DataError(f"{path}, row {index + 1} cannot be read ({problem}); the file is damaged")
    return rows


def _first_invalid_row(table: Any, start: int, end: int) -> tuple[int, str] | None:
    """Index and problem of the first row that pyarrow's own checks refuse, e.g. for text that is not UTF-8."""
    problem = _arrow_problem(table, start, end)
    if problem is None:
        return None
    while end - start > 1:
        middle = (start + end) // 2
        first_half = _arrow_problem(table, start, middle)
        if first_half is None:
            start = middle
        else:
            end = middle
    return start, _arrow_problem(table, start, end) or problem


def _arrow_problem(table: Any, start: int, end: int) -> str | None:
    from pyarrow import ArrowException

    # The rows are copied out: the checks of a mere slice look at the whole buffers behind it.
    part = table if (start, end) == (0, len(table)) else table.take(list(range(start, end)))
    try:
        part.validate(full=True)
    except ArrowException as error:
        return str(error)
    return None
