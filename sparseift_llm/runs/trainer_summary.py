"""The summary of a run of a plain `transformers.Trainer`, from its log, its config and the headers of its weights.

It has the keys of `summary.json` as far as they can be known, and None for the others. A Trainer does not write down
its text, so that nobody can tell from its folder whether two runs had the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig

from sparseift_llm.checkpoints.loading import weight_files
from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.checkpoints.trainer_folder import is_complete, numbered_checkpoints
from sparseift_llm.planning.cost import cost_of
from sparseift_llm.record.model_record import has_record
from sparseift_llm.runs.folder import RunFolder
from sparseift_llm.runs.formats import SUMMARY_KEYS
from sparseift_llm.runs.lenient_json import finite


def trainer_summary(run: RunFolder) -> dict[str, Any]:
    """What is known of a finished run of a Trainer.

    Args:
        run: its folder, with a `trainer_state.json` and without a `summary.json`.

    Returns:
        The keys of a summary, None where a value is not known, and `step`. `tokens_per_second` is the median of what
        was logged.

    Raises:
        ValueError: the run has not finished, or is damaged.
    """
    if run.state != "finished":
        raise ValueError(f"{run.path} is not a finished run: {'; '.join((*run.problems, *run.open_ends))}")
    loss = _last(run, "eval_loss")
    known = {
        "eval_loss": loss,
        "perplexity": None if loss is None else math.exp(loss),
        "train_tokens": _last(run, "train_tokens"),
        "train_flops": _last(run, "train_flops"),
        "tokens_per_second": _median(run, "tokens_per_second"),
        "stored_params": _stored_params(run.path),
        **_linear(run.model_config),
    }
    step = run.trainer_state.values.get("global_step")
    return {
        **dict.fromkeys(SUMMARY_KEYS),
        **known,
        "step": step,
        "config": {"sparse_ift": run.config.get("sparse_ift")},
    }


def _last(run: RunFolder, key: str) -> float | int | None:
    values = [line[key] for line in run.metrics.lines if finite(line.get(key)) is not None]
    return values[-1] if values else None


def _median(run: RunFolder, key: str) -> float | None:
    values = [line[key] for line in run.metrics.lines if finite(line.get(key)) is not None]
    return statistics.median(values) if values else None


def _linear(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """Active weights and sparsity of the projections, as the config says; nothing of a model that is not understood."""
    try:
        values = dict(model_config)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        if not has_record(config):
            cost = cost_of(config, seq_len=1)
            active, size = cost.linear_active_params, cost.linear_params
        else:
            record = read_record(config)
            if record.transformation.dst.starts_dense:  # and is pruned, so that the record is not that of the end
                return {}
            layers = [layer for layer in record.layers if layer.layer_index is not None]
            active, size = sum(layer.num_active for layer in layers), sum(layer.num_weights for layer in layers)
    except Exception:  # transformers validates configs with exceptions of its own; the other values are of use
        return {}
    return {"linear_active_params": active, "linear_sparsity": 1 - active / size, "linear_flops_per_token": 2 * active}


def _stored_params(folder: Path) -> int | None:
    """Numbers in the weights of the final model, or of the newest whole checkpoint; None without safetensors files."""
    for place in (folder, *reversed([path for path in numbered_checkpoints(folder).values() if is_complete(path)])):
        files = [path for path in weight_files(place) if path.is_file()]
        if files and all(path.suffix == ".safetensors" for path in files):
            return sum(number for path in files for number in _float_sizes(path))
    return None


def _float_sizes(file: Path) -> Iterator[int]:
    with safe_open(file, framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            entry = tensors.get_slice(name)
            if entry.get_dtype().startswith(("F", "BF")):  # tile indices are integers
                yield math.prod(entry.get_shape())
