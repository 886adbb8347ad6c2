"""Trainer checkpoints: which are complete, which folder a resumed run came from; and loading with masks.

A Trainer's first rank writes `trainer_state.json` last, but does not wait for what the others write: that file
names their files, and a checkpoint is complete when it parses and they are whole.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sparseift_llm.architectures import build_model
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.composite import CompositeProjection
from sparseift_llm.mask_file import apply_masks, digest, masks_of, read_masks
from sparseift_llm.planning import Plan, plan_of, read_record
from sparseift_llm.surgery import install_sparse_layers
from sparseift_llm.topology.blocks import are_valid

logger = logging.getLogger(__name__)
INCOMPLETE_PREFIX = "incomplete-"
_NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")


def read_trainer_state(checkpoint: Path) -> dict[str, Any] | None:
    """The checkpoint's `trainer_state.json`, or None when it is missing or was cut short."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return state if isinstance(state, dict) else None


def is_complete(checkpoint: Path) -> bool:
    """Whether every rank has written all of its files to the checkpoint."""
    state = read_trainer_state(checkpoint)
    if state is None:
        return False
    names = recorded_by_callback(state, "rank_files") or []
    return all(zipfile.is_zipfile(checkpoint / name) for name in names)  # torch.save writes a zip's end last


def recorded_by_callback(state: Any, key: str, callback_name: str = "SparseTrainingCallback") -> Any:
    """What the callback recorded in a trainer state under `key`, or None."""
    for step in ("stateful_callbacks", callback_name, "attributes", "saved", key):
        state = state.get(step) if isinstance(state, dict) else None
    return state


def set_aside_incomplete(output_dir: str | Path) -> list[Path]:
    """Rename half-written `checkpoint-N` folders to `incomplete-checkpoint-N`, so that no resume takes them.

    Args:
        output_dir: a Trainer's output folder; may not exist yet.

    Returns:
        The new paths. Nothing is deleted.
    """
    moved = []
    for folder in sorted(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        if folder.is_dir() and _NUMBERED.fullmatch(folder.name) and not is_complete(folder):
            target = folder.with_name(INCOMPLETE_PREFIX + folder.name)
            number = 1
            while target.exists():
                number += 1
                target = folder.with_name(f"{INCOMPLETE_PREFIX}{folder.name}.{number}")
            folder.rename(target)
            logger.warning("%s was not written to its end; it is now %s and will not be resumed", folder, target.name)
            moved.append(target)
    return moved


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint in `output_dir` after setting half-written ones aside, or None."""
    if not Path(output_dir).is_dir():
        return None
    set_aside_incomplete(output_dir)
    last = get_last_checkpoint(str(output_dir))
    return Path(last) if last else None


def find_resumed_checkpoint(candidates: Iterable[str | Path | None], callback_name: str, digest: str) -> Path:
    """The candidate whose trainer state records the masks' `digest` for `callback_name`.

    Raises:
        ValueError: no candidate does.
    """
    tried = [Path(candidate) for candidate in candidates if isinstance(candidate, str | Path)]
    for folder in tried:
        if recorded_by_callback(read_trainer_state(folder), "masks_digest", callback_name) == digest:
            return folder
    raise ValueError(
        "the masks of the resumed checkpoint were not found in any of: "
        f"{', '.join(map(str, tried))}; set TrainingArguments.resume_from_checkpoint to its folder"
    )


def load_pretrained(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a saved Sparse-IFT model with its masks, ready to train on or to analyse.

    For inference on an unstructured Wide model, `AutoModelForCausalLM.from_pretrained(folder)` gives a stock
    model with the same logits; others become stock with `to_dense(load_pretrained(folder))`, if the family allows.

    Args:
        folder: where `save_pretrained` or a Trainer wrote the model.
        kwargs: passed on to `from_pretrained`, e.g. `dtype`.

    Raises:
        ValueError: no Sparse-IFT model, its weights or masks are missing or damaged, or sharding is asked for.
    """
    for key in ("distributed_config", "tp_plan"):
        if kwargs.get(key) is not None:
            raise ValueError(
                f"{key} would shard weights before they are sparse; load the model without it, then fully_shard"
            )
    hf_config = AutoConfig.from_pretrained(folder)
    config, _ = read_record(hf_config)
    if config.structure == "block" or config.family != "wide" or config.rules:
        return _load_own_layout(Path(folder), hf_config, plan_of(build_model(hf_config, meta=True)), **kwargs)
    model = _load(AutoModelForCausalLM, folder, folder, **kwargs)
    plan = plan_of(model)
    masks = read_masks(folder)
    install_sparse_layers(model, plan)
    apply_masks(model, masks, folder, check_weights=True)
    return model


def _load(model_class: Any, folder: str | Path, source: str | Path | None, **kwargs: Any) -> PreTrainedModel:
    """`from_pretrained`, but parameters that `folder` lacks are an error, not random values."""
    asked = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model: PreTrainedModel
    model, info = model_class.from_pretrained(source, **{**kwargs, **asked})
    lost = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if lost:
        raise ValueError(f"the weights in {folder} are missing or damaged: no {min(lost)} of the model's shape")
    return model


def _load_own_layout(folder: Path, hf_config: PreTrainedConfig, plan: Plan, **kwargs: Any) -> PreTrainedModel:
    """A model whose parameters are not those of a stock one: transformers fills one that has its sparse layers."""
    stock_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]

    def build(self: Any, config: PreTrainedConfig, *args: Any, **options: Any) -> None:
        stock_class.__init__(self, config, *args, **options)
        install_sparse_layers(self, plan)
        for module in self.modules():  # GPT-2 would draw `c_proj.weight`, which a composite does not have
            has_buffers = next(module.buffers(recurse=False), None) is not None  # GPT-J fills them there
            if not has_buffers and any(isinstance(child, CompositeProjection) for child in module.children()):
                module._is_hf_initialized = True

    # transformers renames a checkpoint's parameters for the classes of its own modules only
    names = {"__init__": build, "__module__": stock_class.__module__}
    with_sparse_layers = type(stock_class.__name__, (stock_class,), names)
    state, masks = _read_weights(folder), read_masks(folder)
    _check_columns(folder, state, plan)
    model = _load(with_sparse_layers, folder, None, config=hf_config, state_dict=state, **kwargs)
    model.__class__ = stock_class
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    for layer in sparse_layers(model).values():
        layer.restore_buffers()
    if plan.config.block_size is None:
        apply_masks(model, masks, folder, check_weights=True)
    elif digest(masks_of(model)) != digest(masks):
        raise ValueError(f"the masks in {folder} are not those of its weights; restore the folder")
    return model


def _check_columns(folder: Path, state: dict[str, Tensor], plan: Plan) -> None:
    """Raise ValueError unless each block-sparse layer has its number of tiles, at distinct places of every row."""
    size = plan.config.block_size
    sparse = [part for layer in plan.layers for part in layer.matrices if part.is_sparse]
    for part in sparse if size else ():
        assert size is not None
        rows, width, num_tiles = part.shape[0] // size, part.shape[1] // size, part.num_active // size**2
        columns = state.get(f"{part.name}.columns", torch.empty(0))
        fits = columns.shape == (num_tiles,) and state.get(f"{part.name}.weight", columns).shape == (
            num_tiles,
            size,
            size,
        )
        if not fits or not are_valid(columns, rows, width):
            raise ValueError(
                f"the weights in {folder} are missing or damaged: {part.name} should hold {num_tiles} tiles of "
                f"{size}x{size} and their columns, distinct within a block-row"
            )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the shards that its index names."""
    index, names = folder / SAFE_WEIGHTS_INDEX_NAME, {SAFE_WEIGHTS_NAME}
    try:
        if index.is_file():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            # saving without shards over an earlier save deletes that one's shards, but not its index
            is_stale = (folder / SAFE_WEIGHTS_NAME).is_file() and not any((folder / name).exists() for name in shards)
            names = names if is_stale else shards
        return {key: value for name in sorted(names) for key, value in load_file(folder / name).items()}
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the weights in {folder} are missing or damaged: {error}") from error
