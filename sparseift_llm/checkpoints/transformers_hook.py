"""How `from_pretrained` restores models that no stock class can hold: the loader for the entry in registry_entry.py.

The hook is the one of transformers' quantisers, which may swap modules while the model is on the meta device, before
its weights are read. Nothing is quantised, and nothing of the quantiser stays on the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file

from sparseift_llm.checkpoints.mask_file import MASKS_NAME, apply_masks, digest, masks_of, read_masks
from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.checkpoints.registry_entry import LayoutConfig
from sparseift_llm.checkpoints.saving import install_saving
from sparseift_llm.conversion.install import install_sparse_layers
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.composite import CompositeProjection, stock_weights
from sparseift_llm.layers.ends import share_tied_weights, tied_logits
from sparseift_llm.layers.masked import MaskedProjection
from sparseift_llm.layers.tiled import TiledProjection


class LayoutLoader(HfQuantizer):
    """Gives a model its sparse layers before its weights are read, and its masks afterwards.

    Raises:
        ValueError: from `from_pretrained`: the class is not a causal language model, `sparse_ift` in config.json,
            weights or masks are missing or damaged, or weights are to be moved to disk or sharded by tensor
            parallelism.
    """

    quantization_config: LayoutConfig
    is_trainable = True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        expected: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
        if type(model) is not expected:
            raise ValueError(
                f"a Sparse-IFT model with a layout of its own is a causal language model, not a "
                f"{type(model).__name__}; load it with AutoModelForCausalLM, or export it with --format dense first"
            )
        distributed = getattr(model.config, "distributed_config", None)
        if getattr(distributed, "tp_size", None) not in (None, 1) or getattr(distributed, "tp_plan", None):
            raise ValueError("tensor parallelism does not know sparse layers; load the model without it")
        self.file = Path(checkpoint_files[0]) if checkpoint_files else None
        self.record = read_record(model.config)
        self.masks = None
        if self.file is not None:
            self.masks = read_masks(_folder_of_masks(self.file, str(model.config.name_or_path)))
        elif self.quantization_config.packed_by or self.record.has_masked_weights:
            raise ValueError("a state_dict has no masks in it; give from_pretrained the folder that has both")
        install_sparse_layers(model, self.record.layers)
        for module in model.modules():  # GPT-2 would draw `c_proj.weight`, which a composite does not have
            has_buffers = next(module.buffers(recurse=False), None) is not None  # GPT-J fills them there
            if not has_buffers and any(isinstance(child, CompositeProjection) for child in module.children()):
                module._is_hf_initialized = True  # type: ignore[assignment]
        if self.quantization_config.packed_by:
            self._expect_packed(model)
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.ignored = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *(f"^{re.escape(name)}$" for name in stock_weights(model)),
        }

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        where = "the state_dict" if self.file is None else self.file.parent
        if self.quantization_config.packed_by:
            _cut_biases(model)
        _check_loaded(model, self.shapes, where)
        if self.quantization_config.packed_by:
            self._unpack(model)
        for layer in sparse_layers(model).values():
            layer.restore_buffers()
        if self.record.has_masked_weights:
            assert self.masks is not None
            apply_masks(model, self.masks, where, check_weights=True)
        elif self.masks is not None and digest(masks_of(model)) != digest(self.masks):
            raise ValueError(f"the masks in {where} are not those of its weights; restore the folder")
        self._detach(model)
        return model

    def _packed_layers(self, model: nn.Module) -> dict[str, MaskedProjection]:
        return {name: layer for name, layer in sparse_layers(model).items() if isinstance(layer, MaskedProjection)}

    def _expect_packed(self, model: PreTrainedModel) -> None:
        """Masked layers wait for their active values alone."""
        assert self.masks is not None
        assert self.file is not None
        if digest(self.masks) != self.quantization_config.packed_by:
            raise ValueError(f"the masks in {self.file.parent} are not those of its weights; restore the folder")
        for name, layer in self._packed_layers(model).items():
            mask = self.masks.get(name)
            if mask is None or mask.shape != layer.mask.shape:
                raise ValueError(f"the masks in {self.file.parent} are of another model: {name} differs")
            values = torch.empty(int(mask.sum()), dtype=layer.weight.dtype, device="meta")
            layer.weight = nn.Parameter(values, layer.weight.requires_grad)
        share_tied_weights(model)

    @torch.no_grad()
    def _unpack(self, model: PreTrainedModel) -> None:
        assert self.masks is not None
        for name, layer in self._packed_layers(model).items():
            values = layer.weight
            mask = self.masks[name].to(values.device)
            whole = values.new_zeros(mask.shape).masked_scatter_(mask, values)
            layer.weight = nn.Parameter(whole, values.requires_grad)
        share_tied_weights(model)

    def _detach(self, model: PreTrainedModel) -> None:
        """Leave no quantiser behind: `float()`, Trainer and FSDP2 take the model as any other."""
        del model.hf_quantizer, model.quantization_method
        model._keys_to_ignore_on_load_unexpected = self.ignored
        model.is_quantized = False  # type: ignore[assignment]
        if hasattr(model.config, "_is_quantized"):
            del model.config._is_quantized
        install_saving(model, self.record)


def _folder_of_masks(weights: Path, name: str) -> Path:
    """The folder of the mask file; on the hub's cache, the file is fetched at the revision of the weights.

    Args:
        weights: a file of weights.
        name: what `from_pretrained` was given.
    """
    folder = weights.parent
    if (folder / MASKS_NAME).is_file() or Path(name).is_dir() or folder.parent.name != "snapshots":
        return folder
    found = cached_file(name, MASKS_NAME, revision=folder.name, cache_dir=folder.parents[2])
    return Path(found).parent if found else folder


def _cut_biases(model: PreTrainedModel) -> None:
    """Undo what transformers does to the bias of a head when it ties its weight: fill it up to the weight's length.

    The packed weight of a tied head is a vector of all active values, longer than the vocabulary.
    """
    for head in tied_logits(model).values():
        bias = getattr(head, "bias", None)
        if bias is not None:
            bias.data = bias.data[: head.out_features].clone()


def _check_loaded(model: PreTrainedModel, shapes: Mapping[str, torch.Size], where: str | Path) -> None:
    """Raise ValueError unless every tensor came from the checkpoint, whole, and tiles have distinct places.

    transformers gives what it does not find random values, or none, and marks what it did find; of models with a
    quantiser, version 5.17 takes tensors of any shape.

    Args:
        model: as `from_pretrained` has filled it.
        shapes: of its tensors, before it was filled.
        where: their origin, for error messages.
    """
    state = model.state_dict(keep_vars=True)
    if "disk" in getattr(model, "hf_device_map", {}).values() or any(tensor.is_meta for tensor in state.values()):
        raise ValueError(
            "device_map leaves tensors off every device, but masks and tiles must be where they are used; give one "
            "without disk and offloading"
        )
    lost = {
        name
        for name, tensor in state.items()
        if tensor.shape != shapes[name] or not getattr(tensor, "_is_hf_initialized", False)
    }
    for name, layer in sparse_layers(model).items():
        if not isinstance(layer, TiledProjection):
            continue
        if {f"{name}.weight", f"{name}.columns"} & lost or not layer.has_valid_columns():
            number, size = shapes[f"{name}.columns"][0], layer.block_size
            raise ValueError(
                f"the weights in {where} are missing or damaged: {name} should hold {number} tiles of {size}x{size} "
                "and their columns, distinct within a block-row"
            )
    if lost:
        raise ValueError(f"the weights in {where} are missing or damaged: no {min(lost)} of the model's shape")
