"""What exports need: checks of what is exported to where, and a checkpoint of active weights alone.

In it the weight of an unstructured matrix is the vector of its active values, in the order of their places in the mask
file's packed bits; tiles are stored as always. transformers_hook.py reads it. The verbs are in api.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from sparseift_llm.checkpoints.mask_file import digest, masks_of
from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.checkpoints.trainer_folder import INCOMPLETE_PREFIX, is_complete, numbered_checkpoints
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.ends import tied_logits
from sparseift_llm.layers.masked import MaskedProjection
from sparseift_llm.models.wrappers import plain_state
from sparseift_llm.record.quantization_mark import mark
from sparseift_llm.utils.words import check_choice

FORMATS = ("dense", "sparse")


def check_options(output: Path, format: str) -> None:
    """Raise ValueError for an unknown format, or an `output` with something in it."""
    check_choice("format", format, FORMATS)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={str(output)!r} exists already; give a new folder")


def check_run(run: Path) -> None:
    """Raise ValueError unless `run` is a folder with a model that was written to its end."""
    if not run.is_dir():
        raise ValueError(f"{run} is not a folder; give a run's output folder or one of its checkpoints")
    by_trainer = (run / TRAINING_ARGS_NAME).is_file() and run.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
    if run.name.startswith(INCOMPLETE_PREFIX) or (by_trainer and not is_complete(run)):
        raise ValueError(f"{run} was not written to its end; export an earlier checkpoint")
    if not (run / CONFIG_NAME).is_file():
        last = next((path for path in reversed(numbered_checkpoints(run).values()) if is_complete(path)), None)
        advice = f"; give one of its checkpoints, the last is {last}" if last else " and no whole checkpoint"
        raise ValueError(f"{run} holds no model of its own (no {CONFIG_NAME}){advice}")


def save_packed(model: PreTrainedModel, folder: Path) -> None:
    """Write a Sparse-IFT model with the active values of its masked matrices alone."""
    layers = {name: layer for name, layer in sparse_layers(model).items() if isinstance(layer, MaskedProjection)}
    state: dict[str, Any] = plain_state(model.state_dict())
    for name, layer in layers.items():
        weight: Tensor = state[f"{name}.weight"]
        state[f"{name}.weight"] = weight[layer.mask]
    for name in tied_logits(model):
        state.pop(f"{name}.weight", None)  # it is the embedding's, which is packed
    model.save_pretrained(folder, state_dict=state)
    if layers:
        config = copy.deepcopy(model.config)
        mark(config, read_record(config), packed_by=digest(masks_of(model)))
        config.save_pretrained(folder)
