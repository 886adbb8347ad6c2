"""Exports for other places than training: a stock dense model, or active weights alone.

`sparse` is a checkpoint in which the weight of an unstructured matrix is the vector of its active values, in the order
of their places in the mask file's packed bits; tiles are stored as always. loading.py reads it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from sparseift_llm.checkpoints.loading import load_pretrained
from sparseift_llm.checkpoints.mask_file import digest, masks_of
from sparseift_llm.checkpoints.saving import GATHER
from sparseift_llm.checkpoints.trainer_folder import INCOMPLETE_PREFIX, is_complete, numbered_checkpoints
from sparseift_llm.conversion.install import to_dense
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.masked import MaskedProjection
from sparseift_llm.layers.sharding import is_sharded
from sparseift_llm.models.layout import mark
from sparseift_llm.planning.planner import read_record
from sparseift_llm.utils.files import written_whole
from sparseift_llm.utils.words import check_choice

FORMATS = ("dense", "sparse")
_TOKENIZER_NAME = "tokenizer_config.json"


def save_export(model: PreTrainedModel, output: str | Path, format: str = "dense") -> Path:
    """Write a Sparse-IFT model to a new folder, which appears whole or not at all.

    Args:
        model: a Sparse-IFT model; it is not changed.
        output: the folder; must not exist, or be empty.
        format: `dense` for a stock model with zeros filled in, which loads anywhere, without this package;
            `sparse` for active weights and masks alone, which `load_pretrained`, and after `import sparseift_llm`
            `AutoModelForCausalLM.from_pretrained`, restore bit for bit.

    Returns:
        `output`.

    Raises:
        ValueError: an unknown format, a folder with something in it, no Sparse-IFT model, sharded weights, or `dense`
            and a family whose non-linearity has no stock twin.
    """
    output = Path(output)
    _check_options(output, format)
    if not sparse_layers(model):
        raise ValueError("the model has no sparse layers, so there is nothing to export")
    if is_sharded(model):
        raise ValueError(f"an export needs whole weights; {GATHER}, then export the folder")
    with written_whole(output) as temporary:
        if format == "dense":
            to_dense(model).save_pretrained(temporary)
        else:
            _save_packed(model, temporary)
    return output


def export_run(run: str | Path, output: str | Path, format: str = "dense") -> Path:
    """Export what a run left, with its tokenizer: the work of `sparseift export`.

    Args:
        run: output folder of recipes/pretrain.py, one of its checkpoints, or any folder of `save_pretrained`.
        output, format: see `save_export`. The dtype is that of the weights saved.

    Raises:
        ValueError: as `save_export`; no model in `run`, half-written, or damaged.
    """
    run = Path(run)
    _check_options(Path(output), format)
    _check_run(run)
    result = save_export(load_pretrained(run, dtype="auto"), output, format)
    if (run / _TOKENIZER_NAME).is_file():
        AutoTokenizer.from_pretrained(run).save_pretrained(result)
    return result


def _check_options(output: Path, format: str) -> None:
    check_choice("format", format, FORMATS)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={str(output)!r} exists already; give a new folder")


def _check_run(run: Path) -> None:
    if not run.is_dir():
        raise ValueError(f"{run} is not a folder; give a run's output folder or one of its checkpoints")
    by_trainer = (run / TRAINING_ARGS_NAME).is_file() and run.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
    if run.name.startswith(INCOMPLETE_PREFIX) or (by_trainer and not is_complete(run)):
        raise ValueError(f"{run} was not written to its end; export an earlier checkpoint")
    if not (run / CONFIG_NAME).is_file():
        last = next((path for path in reversed(numbered_checkpoints(run).values()) if is_complete(path)), None)
        advice = f"; give one of its checkpoints, the last is {last}" if last else " and no whole checkpoint"
        raise ValueError(f"{run} holds no model of its own (no {CONFIG_NAME}){advice}")


def _save_packed(model: PreTrainedModel, folder: Path) -> None:
    layers = {name: layer for name, layer in sparse_layers(model).items() if isinstance(layer, MaskedProjection)}
    state: dict[str, Any] = model.state_dict()
    for name, layer in layers.items():
        weight: Tensor = state[f"{name}.weight"]
        state[f"{name}.weight"] = weight[layer.mask]
    model.save_pretrained(folder, state_dict=state)
    if layers:
        config = copy.deepcopy(model.config)
        mark(config, read_record(config)[0], packed_by=digest(masks_of(model)))
        config.save_pretrained(folder)
