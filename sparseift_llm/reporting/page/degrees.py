"""Degrees of a run's newest masks: how many active units every row and every column of a layer has.

A unit is a weight, or a tile where the run is block-sparse.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sparseift_llm.analysis.matrices import matrix_entries
from sparseift_llm.checkpoints.mask_file import MASKS_NAME, read_masks
from sparseift_llm.record.model_record import transformation_values
from sparseift_llm.runs.lenient_json import finite, mapping, read_object


@dataclass(frozen=True)
class LayerDegrees:
    """The degrees of one layer's mask.

    Args:
        name: module path of the layer.
        kind: what the layer computes, e.g. `qkv` or `mlp_in`; `unknown` where the folder does not say.
        rows: number of active units in every row, the output side; int (R,).
        columns: number of active units in every column, the input side; int (C,).
    """

    name: str
    kind: str
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) in units."""
        return len(self.rows), len(self.columns)

    @property
    def sparsity(self) -> float:
        """The share of units that are not active."""
        return 1 - int(self.rows.sum()) / (len(self.rows) * len(self.columns))


@dataclass(frozen=True)
class Masks:
    """The newest masks of a run.

    Args:
        folder: where they are, below the folder of the run; `.` is the folder of the run itself.
        step: the step of the checkpoint, None where the folder does not say.
        unit: what a row and a column count, e.g. `tiles of 16x16`.
        layers: in the order of the model.
    """

    folder: str
    step: int | None
    unit: str
    layers: tuple[LayerDegrees, ...]


def newest_masks(run: Path, summary: Mapping[str, Any], kinds: Mapping[str, str]) -> tuple[Masks | None, list[str]]:
    """Read the masks of the final folder or the newest checkpoint, whichever is further.

    Args:
        run: the run's folder.
        summary: contents of its `summary.json`.
        kinds: layer -> kind, for models whose config does not say.

    Returns:
        The masks, None if there are none; and what is wrong with newer folders.
    """
    problems = []
    for step, folder in sorted(_folders(run, summary), key=lambda pair: pair[0], reverse=True):
        config = read_object(folder / CONFIG_NAME).values
        sparse_ift = mapping(config.get("sparse_ift"))
        weights = any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
        if not (folder / MASKS_NAME).is_file() and not (sparse_ift and weights):
            continue  # a dense model, or half of a checkpoint: masks are not to be expected
        where = os.path.relpath(folder, run)
        try:
            masks = read_masks(folder)
        except ValueError as error:
            problems.append(str(error).replace(f"{folder}{os.sep}", "" if where == "." else f"{where}/"))
            continue
        layers, doubts = _layers(folder, masks, kinds)
        problems += doubts
        unit = "weights"
        options = transformation_values(sparse_ift)
        if options.get("structure") == "block":
            unit = f"tiles of {options.get('block_size')}x{options.get('block_size')}"
        return Masks(where, None if math.isinf(step) else int(step), unit, layers), problems
    return None, problems


def _folders(run: Path, summary: Mapping[str, Any]) -> Iterator[tuple[float, Path]]:
    """The folder of the final model and those of the checkpoints, each with its step.

    The final model counts as later than a checkpoint of the same step, and than all where its step is not known.
    """
    step = finite(summary.get("step"))
    yield math.inf if step is None else step + 0.5, run
    for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        digits = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if folder.is_dir() and digits.isascii() and digits.isdigit():
            yield float(digits), folder


def _layers(
    folder: Path, masks: Mapping[str, Tensor], kinds: Mapping[str, str]
) -> tuple[tuple[LayerDegrees, ...], list[str]]:
    """The degrees of all masks, and what is wrong with the config.

    Conv1D stores its weight, and so its mask, transposed. Only the config says which layers are Conv1D, so without one
    the masks are shown as they are stored.
    """
    entries, problems = {}, []
    try:
        found = matrix_entries(AutoConfig.from_pretrained(folder, local_files_only=True), 1, set(masks), folder)
        entries = {entry.name: entry for entry in found}
    except Exception as error:  # transformers validates each field with exceptions of its own
        problems.append(f"masks are shown as they are stored: {str(error).splitlines()[0]}")
    layers = []
    for name in sorted(masks, key=_natural):
        mask, entry = masks[name].numpy(), entries.get(name)
        mask = mask.T if entry and entry.is_transposed else mask
        kind = entry.kind if entry else kinds.get(name, "unknown")
        layers.append(LayerDegrees(name, kind, mask.sum(1), mask.sum(0)))
    return tuple(layers), problems


def short_names(names: Sequence[str]) -> list[str]:
    """`names` without the dotted start that all share, e.g. `transformer.h.`."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(parts) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return [".".join(part[shared:]) for part in parts]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts layer 10 after layer 2."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def binned(values: Sequence[float] | NDArray[np.int64], num_bins: int) -> list[float]:
    """Means of consecutive values in at most `num_bins` bins of nearly equal size."""
    array = np.asarray(values, dtype=float)
    return [float(part.mean()) for part in np.array_split(array, min(num_bins, len(array)))]
