"""Another number of words in a model with a sparse embedding: every word, old or new, has as many active weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparseift_llm.conversion.install import install_sparse_layers, remove_ends
from sparseift_llm.layers import unattended
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.masked import MaskedProjection
from sparseift_llm.layers.sharding import is_sharded
from sparseift_llm.layers.tiled import TiledProjection
from sparseift_llm.record.model_record import ModelRecord
from sparseift_llm.record.specs import ENDS, LayerSpec
from sparseift_llm.topology.masks import derive_seed, random_rows


@torch.no_grad()
def resize_words(model: PreTrainedModel, record: ModelRecord, *args: Any, **kwargs: Any) -> ModelRecord:
    """Resize embedding and logits in place. Old words keep their masks, new ones get random masks of as many weights.

    Nothing happens where the number of words is what it was.

    The weights of new words are those that transformers gives them, at the places of their masks, times
    1 / sqrt(density), so that rows are as long as transformers made them. The layers are new ones.

    Args:
        model: a Sparse-IFT model.
        record: of the model, with embedding and logits.
        args, kwargs: as `PreTrainedModel.resize_token_embeddings` takes them.

    Returns:
        The record that the model has now.

    Raises:
        ValueError: embedding or logits are in tiles, weights are sharded, or a controller follows the model. What
            transformers raises is passed on; the model is then what it was.
    """
    if _wanted_words(model.config.vocab_size, *args, **kwargs) == model.config.vocab_size:
        return record
    layers = sparse_layers(model)
    ends = [layer for layer in record.layers if layer.kind in ENDS]
    if any(isinstance(layers.get(layer.name), TiledProjection) for layer in ends):
        raise ValueError(
            "an embedding in tiles keeps its number of words; resize the dense model before sparsify, or what "
            "to_dense(model) gives"
        )
    if is_sharded(model):
        raise ValueError("resize_token_embeddings needs whole weights; resize before the model is sharded")
    if unattended.is_attended(layers.values()):
        raise ValueError(
            "resize_token_embeddings makes new layers, which neither the SparseTrainingController nor the optimizer of "
            "this model would know: resize before both are made, or close() the controller and make both anew"
        )
    masks = {name: layer.current_mask() for name, layer in layers.items() if isinstance(layer, MaskedProjection)}
    remove_ends(model)
    stock, old_vocab = (model.get_input_embeddings(), model.get_output_embeddings()), model.config.vocab_size
    try:
        type(model).resize_token_embeddings(model, *args, **kwargs)
    except Exception:  # whatever it is, the stock layers must not stay
        model.set_input_embeddings(stock[0])
        model.set_output_embeddings(stock[1])
        model.config.vocab_size = old_vocab
        _put_back(model, ends, masks)
        raise
    vocab = model.config.vocab_size
    changed = {layer.name: _resized(layer, vocab) for layer in ends}
    new_layers = tuple(changed.get(layer.name, layer) for layer in record.layers)
    install_sparse_layers(model, changed.values())
    for index, spec in enumerate(changed.values()):
        if spec.name in masks:
            seed = derive_seed(record.transformation.seed, "resized", vocab, index)
            _mask_words(_masked(model, spec), masks[spec.name], spec, seed)
    return dataclasses.replace(record, layers=new_layers)


def _wanted_words(
    vocab: int, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: Any, **__: Any
) -> int | None:
    """The number of words that transformers makes of these arguments; None if it will refuse them."""
    words = vocab if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is None:
        return words
    return math.ceil(words / pad_to_multiple_of) * pad_to_multiple_of if isinstance(pad_to_multiple_of, int) else None


def _put_back(model: PreTrainedModel, ends: list[LayerSpec], masks: dict[str, torch.Tensor]) -> None:
    """Sparse layers in place of the stock ends, with the masks that they had."""
    install_sparse_layers(model, ends)
    for layer in ends:
        if layer.name in masks:
            _masked(model, layer).set_mask(masks[layer.name])


def _masked(model: PreTrainedModel, layer: LayerSpec) -> MaskedProjection:
    module = model.get_submodule(layer.name)
    assert isinstance(module, MaskedProjection)
    return module


def _resized(layer: LayerSpec, vocab: int) -> LayerSpec:
    """The specification of an end with `vocab` words, each with as many active weights as before."""
    matrices = tuple(
        dataclasses.replace(m, shape=(vocab, m.shape[1]), num_active=m.num_active // m.shape[0] * vocab)
        for m in layer.matrices
    )
    return dataclasses.replace(layer, dense_shape=(vocab, layer.dense_shape[1]), matrices=matrices)


def _mask_words(module: MaskedProjection, old: torch.Tensor, spec: LayerSpec, seed: int) -> None:
    mask = random_rows(module.mask_shape, spec.num_active // spec.dense_shape[0], seed).to(old.device)
    kept = min(len(old), len(mask))
    mask[:kept] = old[:kept]
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    weight[kept:] *= 1 / math.sqrt(1 - spec.sparsity)
    module.set_mask(mask.to(weight.device))
