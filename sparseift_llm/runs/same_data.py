"""Whether runs had the same data, so that their losses can be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseift_llm.data.options import DataConfig


def check_same_data(runs: Sequence[str | Path], summaries: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError, naming two runs and the option, unless all runs had the same data and sequence length."""
    for summary, run in zip(summaries, runs, strict=True):
        for key, first, other in differing_data(summaries[0]["config"]["data"], summary["config"]["data"]):
            raise ValueError(f"{runs[0]} and {run} cannot be compared: data.{key} is {first!r} and {other!r}")


def differing_data(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Options of the data (key, first's, other's) on which two runs differ, so that losses cannot be compared."""
    defaults = {option.name: option.default for option in dataclasses.fields(DataConfig)}  # of options added since
    ignored = {"cache_dir"}  # where tokens are kept does not matter
    if "bpe" not in (first.get("tokenizer", "bpe"), other.get("tokenizer", "bpe")):
        ignored.add("vocab_size")  # version 0.1.0 wrote one beside a tokenizer that was given
    keys = sorted((first.keys() | other.keys()) - ignored)
    values = [(key, *(data.get(key, defaults.get(key)) for data in (first, other))) for key in keys]
    return [(key, mine, theirs) for key, mine, theirs in values if mine != theirs]
