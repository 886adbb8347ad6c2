"""`load_pretrained`: a saved sparse model with its masks, however its weights are stored.

Its record says which layers it has; nothing is planned again.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from sparseift_llm.checkpoints.mask_file import MASKS_NAME, apply_masks, read_masks
from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.checkpoints.saving import install_saving
from sparseift_llm.checkpoints.trainer_folder import numbered_checkpoints
from sparseift_llm.conversion.install import install_sparse_layers
from sparseift_llm.record.quantization_mark import is_marked, mark
from sparseift_llm.utils.outputs import user_path

# the names of what `save_pretrained(variant=...)` writes
_VARIANT = re.compile(r"model\.([^.]+?)(?:-\d{5}-of-\d{5})?\.safetensors")
_SOURCE_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


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
    if str(folder).startswith("~"):  # transformers does not know home folders
        folder = user_path(folder)
    source = {key: kwargs[key] for key in _SOURCE_OPTIONS if key in kwargs}
    hf_config = _config(folder, source)
    record = read_record(hf_config)
    local = Path(folder, kwargs.get("subfolder", "")) if Path(folder).is_dir() else None
    if local is not None and not kwargs.get("variant"):  # whose files have names of their own
        _check_weight_files(local)
    if is_marked(hf_config):
        return _load(folder, **kwargs)
    is_sharded = kwargs.get("distributed_config") is not None  # then layers must be sparse before weights are read
    if record.has_own_layout or is_sharded:
        mark(hf_config, record, always=True)
        return _load(folder, config=hf_config, **kwargs)
    model = _load(folder, **kwargs)
    masks = read_masks(local or _fetched_masks(folder, source))
    install_sparse_layers(model, record.layers)
    install_saving(model, record)
    apply_masks(model, masks, folder, check_weights=True)
    return model


def _config(folder: str | Path, source: dict[str, Any]) -> PreTrainedConfig:
    """The config of a folder or a hub model.

    Raises:
        ValueError: there is none.
    """
    where = Path(folder, source.get("subfolder", ""))
    if Path(folder).is_dir() and not (where / CONFIG_NAME).is_file():
        checkpoints = ", ".join(path.name for path in numbered_checkpoints(where).values())
        inside = f"; it has {checkpoints}" if checkpoints else ""
        raise ValueError(f"{where} holds no model (no {CONFIG_NAME}){inside}; give the folder of a model")
    if not Path(folder).is_dir() and (Path(folder).is_absolute() or str(folder).startswith(".")):
        raise ValueError(f"{folder} is not there; give the folder of a saved model, or its id on the hub")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, **source)
    except OSError as error:
        raise ValueError(f"{folder} is no folder of a saved model, nor one that the hub gives: {error}") from error
    return config


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
        found = (_VARIANT.fullmatch(path.name) for path in sorted(folder.glob("*.safetensors")))
        variants = dict.fromkeys(match[1] for match in found if match)
        advice = "".join(f"; there are weights of a variant: load it with variant={name!r}" for name in variants)
        raise ValueError(f"the weights in {folder} are missing or damaged: {error}{advice}") from error
