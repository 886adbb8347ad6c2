"""The verbs of the library, each composed of steps that the folders below offer: `sparsify`, `to_dense`,
`to_semi_structured`, `load_pretrained`, `save_export`.

`sparsify` plans, builds and marks a twin; `to_dense` undoes that. Nothing is decided here.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from sparseift_llm.checkpoints.export import check_options, check_run, save_packed
from sparseift_llm.checkpoints.loading import load_pretrained
from sparseift_llm.checkpoints.saving import GATHER, install_saving, restore_saving
from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.conversion.from_trained import check_has_weights, check_start_is_chosen
from sparseift_llm.conversion.install import remove_sparse_layers
from sparseift_llm.conversion.twin import build_twin
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.semi_structured import SemiStructuredLinear, patterned_layers
from sparseift_llm.layers.sharding import is_sharded
from sparseift_llm.models.wrappers import pretrained_model, remove_compiled_parts
from sparseift_llm.ops.semi_structured import check_device
from sparseift_llm.planning.planner import plan
from sparseift_llm.record.model_record import has_record, missing_layers
from sparseift_llm.utils.files import written_whole
from sparseift_llm.utils.outputs import user_path

logger = logging.getLogger(__name__)
__all__ = ["export_run", "load_pretrained", "save_export", "sparsify", "to_dense", "to_semi_structured"]
_TOKENIZER_NAME = "tokenizer_config.json"


def sparsify(model: PreTrainedModel | PreTrainedConfig, config: SparseIFTConfig) -> PreTrainedModel:
    """Build the Sparse-IFT twin of a dense causal language model.

    The result is a transformers model with other widths and sparse projections. Unstructured, its weights hold exact
    zeros, and `save_pretrained` writes a stock checkpoint plus the packed masks. Block-sparse, it holds
    active tiles only, and so does its checkpoint: `load_pretrained` reads it, `to_dense` makes it stock. It is randomly
    initialised (set torch's seed before), except that parameters whose shape did not change keep the values of `model`,
    when a model is given: of a trained model the new projections know nothing, unless `init="pretrained"` starts them
    from its weights. For a model that was loaded, `init` has to say which of both is meant. What was changed on a model
    beyond its config is taken over: untied embeddings, activations and other modules without weights, settings such as
    dropout, frozen parameters, activation checkpointing, its loss function. The argument itself is not changed.

    Args:
        model: a dense model, or its config. Under `torch.device("meta")` nothing is allocated.
        config: the transformation.

    Returns:
        A new model of the same class, dtype and device; `print` shows each layer's sparsity.

    Raises:
        ValueError: as `plan` does; `model` has been changed in a way that no other model can take over, by name;
            `init="pretrained"` without a model that has weights; or no `init` and a model that
            was loaded, whose projections would lose what they have learned.

    Source: arXiv 2303.11525.
    """
    if isinstance(config, SparseIFTConfig) and config.init == "pretrained":  # `plan` refuses anything else
        check_has_weights(model)
    result = plan(model, config)
    if isinstance(model, PreTrainedModel):
        check_start_is_chosen(model, config, result.layers)
    sparse = build_twin(model, result)
    install_saving(sparse, result.record)
    return sparse


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """A stock transformers model with the same logits: to the bit if unstructured, to rounding if block-sparse.

    Args:
        model: a Sparse-IFT model, compiled or not; it is not changed.

    Returns:
        A copy, not compiled, with plain layers (zeros stay in the weights) and without the `sparse_ift` record.

    Raises:
        ValueError: `model` has no sparse layers, its weights are sharded, or it is not a stock model because of a
            family's non-linearity.
    """
    model = pretrained_model(model)
    if not sparse_layers(model):
        if has_record(model.config):
            raise ValueError(missing_layers(model.config))
        raise ValueError("the model has no sparse layers: it is dense already")
    if is_sharded(model):
        raise ValueError(f"to_dense needs whole weights; {GATHER}, then to_dense(load_pretrained(folder))")
    dense = copy.deepcopy(model)
    remove_compiled_parts(dense)
    remove_sparse_layers(dense)
    restore_saving(dense)
    return dense


def to_semi_structured(model: PreTrainedModel) -> PreTrainedModel:
    """A copy for inference whose 2:4 projections are stored compressed and run on torch's semi-structured kernels.

    Everything else is as it was. The copy is in evaluation mode, takes no gradients and cannot be saved: save `model`,
    and convert it after loading.

    Args:
        model: a Sparse-IFT model with `structure="2:4"`, in float16 or bfloat16 on an NVIDIA GPU of compute capability
            8.0 or more; it is not changed.

    Raises:
        ValueError: another structure or pattern, sides that are not multiples of 16, another device or dtype, or
            sharded weights; it says what to change.
    """
    model = pretrained_model(model)
    if is_sharded(model):
        raise ValueError(
            f"to_semi_structured needs whole weights; {GATHER}, then to_semi_structured(load_pretrained(...))"
        )
    for name, layer in patterned_layers(model).items():
        try:
            check_device(layer.weight.device, layer.weight.dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    result = copy.deepcopy(model)
    remove_compiled_parts(result)
    for name, layer in patterned_layers(result).items():
        result.set_submodule(name, SemiStructuredLinear(layer))
    restore_saving(result)
    result.save_pretrained = result.push_to_hub = _refuse_saving  # type: ignore[method-assign,assignment]
    return result.requires_grad_(False).eval()


def _refuse_saving(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "a model of to_semi_structured has no file format of its own: save the model that it was made of, and convert "
        "it again after load_pretrained"
    )


def save_export(model: PreTrainedModel, output: str | Path, format: str = "dense") -> Path:
    """Write a Sparse-IFT model to a new folder, which appears whole or not at all.

    Args:
        model: a Sparse-IFT model, compiled or not; it is not changed.
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
    output = user_path(output)
    check_options(output, format)
    model = pretrained_model(model)
    if not sparse_layers(model):
        raise ValueError("the model has no sparse layers, so there is nothing to export")
    if is_sharded(model):
        raise ValueError(f"an export needs whole weights; {GATHER}, then export the folder")
    with written_whole(output) as temporary:
        if format == "dense":
            to_dense(model).save_pretrained(temporary)
        else:
            save_packed(model, temporary)
    return output


def export_run(run: str | Path, output: str | Path, format: str = "dense") -> Path:
    """Export what a run left, with its tokenizer: the work of `sparseift export`.

    Args:
        run: output folder of recipes/pretrain.py, one of its checkpoints, or any folder of `save_pretrained`.
        output, format: see `save_export`. The dtype is that of the weights saved.

    Raises:
        ValueError: as `save_export`; no model in `run`, half-written, or damaged.
    """
    run, output = user_path(run), user_path(output)
    check_options(output, format)
    check_run(run)
    logger.info("loading %s", run)
    model = load_pretrained(run, dtype="auto")
    logger.info("writing %s, %s", output, "a stock dense model" if format == "dense" else "active weights and masks")
    result = save_export(model, output, format)
    if (run / _TOKENIZER_NAME).is_file():
        AutoTokenizer.from_pretrained(run).save_pretrained(result)
    return result
