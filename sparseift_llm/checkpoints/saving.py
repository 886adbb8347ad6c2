"""What `save_pretrained` and `push_to_hub` of a Sparse-IFT model do beyond a stock model's: masks, and a model card.

Reading it all back is in loading.py and transformers_hook.py.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
import torch.distributed as dist
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sparseift_llm.checkpoints.card import CARD_NAME, write_card
from sparseift_llm.checkpoints.mask_file import MASKS_NAME, save_masks
from sparseift_llm.checkpoints.records import read_record, write_record
from sparseift_llm.conversion.resizing import resize_words
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.composite import stock_weights
from sparseift_llm.layers.masked import MaskedProjection, has_surplus
from sparseift_llm.layers.sharding import is_sharded
from sparseift_llm.models.wrappers import plain_state
from sparseift_llm.record.model_record import RECORD_KEY, ModelRecord
from sparseift_llm.record.quantization_mark import mark, unmark
from sparseift_llm.record.specs import ENDS

GATHER = (
    "gather them with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
    "StateDictOptions(full_state_dict=True, cpu_offload=True)) on all ranks, or with accelerate's get_state_dict, for "
    "save_pretrained(..., state_dict=...)"
)
_HUB_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision")
_UPLOADED = (CONFIG_NAME, GENERATION_CONFIG_NAME, "model*.safetensors", "model*.safetensors.index*.json", MASKS_NAME)


SaveListener = Callable[[Path], None]
_listeners: WeakKeyDictionary[nn.Module, WeakMethod[SaveListener]] = WeakKeyDictionary()


def tell_before_saving(model: nn.Module, listener: SaveListener | None) -> None:
    """From now on call `listener`, a method, with the folder before `save_pretrained` writes to it; None: nobody."""
    _listeners.pop(model, None)
    if listener is not None:
        _listeners[model] = WeakMethod(listener)


def install_saving(model: PreTrainedModel, record: ModelRecord) -> None:
    """From now on `model.save_pretrained`, `model.push_to_hub` and `resize_token_embeddings` are the functions below.

    The model's config carries `record` from now on, so that it is saved in the format of this version.
    """
    write_record(model.config, record)
    mark(model.config, record)
    # a partial, unlike a bound method, follows the model through deepcopy and pickle
    model.save_pretrained = partial(save_pretrained, model)  # type: ignore[method-assign]
    model.push_to_hub = partial(push_to_hub, model)  # type: ignore[assignment]
    if any(layer.kind in ENDS for layer in record.layers):
        model.resize_token_embeddings = partial(resize_token_embeddings, model)  # type: ignore[assignment]
    if record.has_own_layout:
        model.base_model.save_pretrained = _refuse_base_model  # type: ignore[assignment]


def restore_saving(model: PreTrainedModel) -> None:
    """The inverse of `install_saving`: the methods are those of transformers, and the config has no record."""
    del model.save_pretrained, model.push_to_hub
    vars(model).pop("resize_token_embeddings", None)
    vars(model.base_model).pop("save_pretrained", None)
    delattr(model.config, RECORD_KEY)
    unmark(model.config)


def _refuse_base_model(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "a Sparse-IFT model with a layout of its own is saved and loaded whole, with its head: call save_pretrained of "
        "the causal language model; its base model can be saved after to_dense"
    )


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    *args: Any,
    **kwargs: Any,
) -> None:
    """As the method of transformers, with the masks, and for the hub with a model card.

    A model that no stock class can hold is saved so that loading it as one is an error, whatever its family: beside
    the matrices of a composite projection stands a `weight` that does not have the shape of a stock weight.

    Args:
        model: a Sparse-IFT model.
        save_directory, is_main_process, state_dict: see `PreTrainedModel.save_pretrained`.
        push_to_hub: upload the files written; a README.md is added where there is none of the user's own.
        args, kwargs: passed on; with `push_to_hub` also what the method `push_to_hub` takes.

    Raises:
        ValueError: the weights are sharded, not by transformers, and no `state_dict` is given; or weights are not 0
            where their mask is, so that the folder could not be loaded.
    """
    _check_weights(model, plain_state(state_dict or {}))
    if (listener := _listeners.get(model)) is not None and (tell := listener()) is not None:
        tell(Path(save_directory))
    if is_sharded(model) and state_dict is None:
        if getattr(model.config, "distributed_config", None) is None:
            raise ValueError(f"the model's weights are sharded; {GATHER}")
        _save_gathered(model, save_directory, is_main_process, push_to_hub, *args, **kwargs)
        return
    state_dict = _with_plain_names(model, state_dict)
    folder = Path(save_directory)
    hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs} if push_to_hub else {}
    if refused := stock_weights(model):
        state_dict = {**(model.state_dict() if state_dict is None else state_dict), **refused}
    type(model).save_pretrained(model, save_directory, is_main_process, state_dict, False, *args, **kwargs)
    if not is_main_process:
        return
    save_masks(model, folder)
    _remove_stale_weights(folder)
    if push_to_hub:
        _upload(model, folder, token=kwargs.get("token"), **hub)


def _with_plain_names(model: PreTrainedModel, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The state dict without what `torch.compile` and other wrappers add to names; None if the model's own will do."""
    if state_dict is None and not any(isinstance(module, OptimizedModule) for module in model.modules()):
        return None
    return plain_state(model.state_dict() if state_dict is None else state_dict)


@torch.no_grad()
def _check_weights(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> None:
    """What will be saved must be 0 where masks are; sharded weights that were not gathered are not looked at."""
    masked = {name: layer for name, layer in sparse_layers(model).items() if isinstance(layer, MaskedProjection)}
    for name, layer in masked.items():
        weight = state_dict.get(f"{name}.weight", layer.weight)
        is_whole = weight.shape == layer.mask.shape and not isinstance(weight, DTensor) and not weight.is_meta
        if is_whole and has_surplus(weight, layer.mask.to(weight.device)):
            raise ValueError(
                f"{name}.weight is not 0 where its mask is, so that the folder could not be loaded. Something else "
                "than sparse training wrote to it: a run resumed without SparseTrainingCallback or a state dict loaded "
                "without masks (load the model with load_pretrained instead), an average that does not follow "
                "(controller.follow), or a merged adapter (adapt to_dense(model) instead)"
            )


def _save_gathered(
    model: PreTrainedModel, save_directory: str | os.PathLike[str], is_main_process: bool, *args: Any, **kwargs: Any
) -> None:
    """Save a model that `from_pretrained(distributed_config=...)` has sharded; every rank must call this."""
    whole: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    distributed = model.config.distributed_config
    del model.config.distributed_config  # transformers would gather once more, without what is added to the weights
    try:
        if dist.get_rank() == 0:
            save_pretrained(model, save_directory, is_main_process, whole, *args, **kwargs)
    finally:
        model.config.distributed_config = distributed
    dist.barrier()


def resize_token_embeddings(
    model: PreTrainedModel, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
) -> nn.Module:
    """As the method of transformers, for a model whose record has embedding and logits; see `resize_words`.

    Make the optimizer and a controller afterwards, as with a stock model.

    Returns:
        The input embedding.

    Raises:
        ValueError: as `resize_words`.
    """
    if new_num_tokens is not None or args or kwargs.get("pad_to_multiple_of") is not None:
        write_record(model.config, resize_words(model, read_record(model.config), new_num_tokens, *args, **kwargs))
    return model.get_input_embeddings()


def push_to_hub(model: PreTrainedModel, repo_id: str, **kwargs: Any) -> Any:
    """As the method of transformers, with the masks and a model card, see `save_pretrained`.

    Args:
        model: a Sparse-IFT model.
        repo_id: on the hub; made if there is none.
        kwargs: as the method takes them.

    Returns:
        What huggingface_hub says of the commit.
    """
    hub = {name: kwargs.pop(name) for name in (*_HUB_OPTIONS, "tags") if name in kwargs}
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, **kwargs)
        return _upload(model, Path(folder), token=kwargs.get("token"), **{**hub, "repo_id": repo_id})


def _upload(
    model: PreTrainedModel,
    folder: Path,
    token: str | bool | None = None,
    repo_id: str | None = None,
    private: bool | None = None,
    tags: str | list[str] | None = None,
    commit_message: str | None = None,
    **kwargs: Any,
) -> Any:
    """Upload what `save_pretrained` wrote, and the card where the hub has none of the user's own."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id or folder.resolve().name, private=private, exist_ok=True).repo_id
    if kwargs.get("revision"):
        api.create_branch(repo_id, branch=kwargs["revision"], exist_ok=True)
    own_tags = [tags] if isinstance(tags, str) else tags or []
    with_card = write_card(model, folder, repo_id, [*(model.model_tags or []), *own_tags], token)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=[*_UPLOADED, *([CARD_NAME] if with_card else [])],
        commit_message=commit_message or "Upload model",
        **kwargs,
    )


def _remove_stale_weights(folder: Path) -> None:
    """Of one file and an index of shards, which an earlier save can leave, keep those of this save alone.

    transformers removes the shards of an earlier save, but neither its index nor its single file, and reads the
    latter first.
    """
    index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if index.is_file() and single.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        (single if all((folder / name).is_file() for name in shards) else index).unlink()
