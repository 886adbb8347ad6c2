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

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

import sparseift_llm.loading  # noqa: F401  # registers the hook
from sparseift_llm.layout import has_own_layout, is_marked, mark
from sparseift_llm.mask_file import MASKS_NAME, apply_masks, read_masks
from sparseift_llm.outputs import set_aside
from sparseift_llm.planning import plan_of, read_record
from sparseift_llm.surgery import install_sparse_layers

logger = logging.getLogger(__name__)
INCOMPLETE_PREFIX = "incomplete-"
_SOURCE_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
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


def numbered_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """The `checkpoint-N` folders of a Trainer's output folder by N, ascending, complete or not."""
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    numbered = {int(path.name.rpartition("-")[2]): path for path in folders if _NUMBERED.fullmatch(path.name)}
    return dict(sorted(numbered.items()))


def set_aside_incomplete(output_dir: str | Path) -> list[Path]:
    """Rename half-written `checkpoint-N` folders to `incomplete-checkpoint-N`, so that no resume takes them.

    Args:
        output_dir: a Trainer's output folder; may not exist yet.

    Returns:
        The new paths. Nothing is deleted.
    """
    moved = []
    for folder in numbered_checkpoints(output_dir).values():
        if not is_complete(folder):
            target = set_aside(folder, INCOMPLETE_PREFIX)
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

    For inference, `AutoModelForCausalLM.from_pretrained(folder)` does as well: it gives the same model, or a stock
    one with the same logits if it is an unstructured Wide model.

    Args:
        folder: where `save_pretrained`, a Trainer or `save_export` wrote the model, or its id on the hub.
        kwargs: passed on to `from_pretrained`, e.g. `dtype`, or `distributed_config` to shard the model (FSDP2) while
            it is loaded.

    Raises:
        ValueError: no Sparse-IFT model, its weights or masks are missing or damaged, or tensor parallelism is asked
            for.
    """
    if kwargs.get("tp_plan") is not None:
        raise ValueError("tensor parallelism does not know sparse layers; load the model without tp_plan")
    source = {key: kwargs[key] for key in _SOURCE_OPTIONS if key in kwargs}
    hf_config = AutoConfig.from_pretrained(folder, **source)
    config, _ = read_record(hf_config)
    local = Path(folder, kwargs.get("subfolder", "")) if Path(folder).is_dir() else None
    if local is not None and not kwargs.get("variant"):  # whose files have names of their own
        _check_weight_files(local)
    if is_marked(hf_config):
        return _load(folder, **kwargs)
    is_sharded = kwargs.get("distributed_config") is not None  # then layers must be sparse before weights are read
    if has_own_layout(config) or is_sharded:
        mark(hf_config, config, always=True)
        return _load(folder, config=hf_config, **kwargs)
    model = _load(folder, **kwargs)
    plan = plan_of(model)
    masks = read_masks(local or _fetched_masks(folder, source))
    install_sparse_layers(model, plan)
    apply_masks(model, masks, folder, check_weights=True)
    return model


def _fetched_masks(repo_id: str | Path, source: dict[str, Any]) -> Path:
    """The folder of a hub model's masks in the cache."""
    found = cached_file(repo_id, MASKS_NAME, **source)
    assert found is not None  # a missing file has raised an error
    return Path(found).parent


def _load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """`from_pretrained`, but parameters that `folder` lacks are an error, not random values."""
    asked = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **{**kwargs, **asked})
    model: PreTrainedModel = loaded[0]
    info = loaded[1]
    lost = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if lost:
        raise ValueError(f"the weights in {folder} are missing or damaged: no {min(lost)} of the model's shape")
    return model


def weight_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the shards that its index names; they may be missing.

    Raises:
        ValueError: the index is damaged.
    """
    index, whole_model = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if whole_model.is_file() or not index.is_file():
        return [whole_model]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names] or [whole_model]
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the weights in {folder} are missing or damaged: {error}") from error


def _check_weight_files(folder: Path) -> None:
    """Raise ValueError unless all weight files are there and whole."""
    try:
        for path in weight_files(folder):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} are missing or damaged: {error}") from error
