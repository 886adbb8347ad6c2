"""What was evaluated: digests of all in a model that decides its scores, what it costs, and where it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparseift_llm.evaluation import builtin
from sparseift_llm.evaluation.suites import Suite
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.models.projections import find_projections
from sparseift_llm.planning.cost import cost_of
from sparseift_llm.runs.formats import RECIPE_NAME, SUMMARY_NAME
from sparseift_llm.runs.lenient_json import mapping, read_object

# Entries of a configuration that do not change what a model computes.
_IDLE_ENTRIES = ("_name_or_path", "_commit_hash", "architectures", "dtype", "torch_dtype", "transformers_version")


def describe_model(model: PreTrainedModel, name: str, seq_len: int) -> dict[str, Any]:
    """What was evaluated: a digest of all weights, sparsity as it is, FLOPs, and what its training run left behind.

    Args:
        model: as loaded.
        name: folder or hub id.
        seq_len: tokens that FLOPs per token are counted at.
    """
    found: dict[str, Any] = {
        "name": name,
        "revision": getattr(model.config, "_commit_hash", None),
        "sha256": weights_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_parameters": model.num_parameters(),
        "seq_len": seq_len,
        **_cost(model, seq_len),
    }
    for folder in (Path(name), Path(name).parent):
        if (folder / SUMMARY_NAME).is_file():
            summary = _contents(folder / SUMMARY_NAME)
            keys = ("train_flops", "train_tokens", "eval_loss", "commit")
            found["run"] = {key: summary.get(key) for key in keys}
            found["run"]["seed"] = summary.get("config", {}).get("training", {}).get("seed")
            break
    return found


def _contents(path: Path) -> Mapping[str, Any]:
    """What a file of a run holds; a file that is damaged is an error that names it."""
    found = read_object(path)
    if found.problem:
        raise ValueError(f"{path.parent}: {found.problem}; restore the file")
    return found.values


def _cost(model: PreTrainedModel, seq_len: int) -> dict[str, Any]:
    try:
        cost = cost_of(model, seq_len)
    except ValueError as error:
        return {"linear_sparsity": None, "forward_flops_per_token": None, "cost_unknown": str(error)}
    active = cost.linear_active_params
    if not sparse_layers(model):  # a stock model may hold zeros, too
        names = [projection.name for projection in find_projections(model)]
        parameters = dict(model.named_parameters())
        active = sum(int(torch.count_nonzero(parameters[f"{name}.weight"])) for name in names)
    return {**cost.to_dict(), "linear_active_params": active, "linear_sparsity": 1 - active / cost.linear_params}


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 over the names, types and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def config_digest(model: PreTrainedModel) -> str:
    """SHA-256 over the configuration of the model and of its text generation, e.g. sizes, epsilons, activations."""
    configs = [model.config.to_dict()]
    if getattr(model, "generation_config", None) is not None:
        configs.append(model.generation_config.to_dict())
    kept = [{key: value for key, value in config.items() if key not in _IDLE_ENTRIES} for config in configs]
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over everything that decides how text becomes tokens and prompts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        type(tokenizer).__name__,
        sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str(),
        {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())},
        tokenizer.chat_template,
        str(getattr(tokenizer, "add_bos_token", None)),
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def check_held_out(name: str, suite: Suite) -> None:
    """Refuse the built-in suite for a run that trained on text the suite's items are drawn from.

    Raises:
        ValueError: the run's recipe says it held out less of the built-in corpus.
    """
    if not any(task.startswith("builtin_") for task in suite.tasks()):
        return
    for folder in (Path(name), Path(name).parent):
        if (folder / RECIPE_NAME).is_file():
            data = mapping(_contents(folder / RECIPE_NAME).get("data"))
            if data.get("corpus") == "builtin" and data["eval_fraction"] < builtin.EVAL_FRACTION:
                raise ValueError(
                    f"{folder} trained with data.eval_fraction={data['eval_fraction']}, so on some of the suite's "
                    f"items; the built-in suite needs {builtin.EVAL_FRACTION} or more"
                )
