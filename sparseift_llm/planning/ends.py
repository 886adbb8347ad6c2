"""What becomes of the embedding and the logits of a model whose hidden side alone grows (Wide, scope `residual`)."""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from sparseift_llm.config.families import Wide
from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.layers.block_embedding import check_tied_head
from sparseift_llm.layers.ends import check_embedding
from sparseift_llm.models.ends import find_ends
from sparseift_llm.record.specs import LayerSpec, MatrixSpec


def end_layers(
    dense_model: PreTrainedModel, widened_model: PreTrainedModel, config: SparseIFTConfig
) -> tuple[LayerSpec, ...]:
    """The specifications of the input embedding and of the output head; none with other scopes.

    They have as many active weights as in the dense model, and without tiles every row has, so that logits cost what
    they did. In tiles both hold to a tile, and the vocabulary may be filled up. Where the hidden size has not grown,
    nothing is left out, so that they stay dense.

    Raises:
        ValueError: the model has other matrices there than an embedding and a linear head, or a tied head in tiles has
            a bias.
    """
    if config.scope != "residual":
        return ()
    assert isinstance(config.family, Wide)
    before, after = find_ends(dense_model), find_ends(widened_model)
    choice = config.family.embedding if after.shape != before.shape else "dense"
    if choice != "dense":
        check_embedding(widened_model.get_submodule(after.embedding))
    if choice == "dense":
        matrix = MatrixSpec("", after.shape, math.prod(after.shape), structure="dense")
    elif choice == "unstructured" or config.block_size is None:
        matrix = MatrixSpec("", after.shape, math.prod(before.shape), structure="unstructured")
    else:
        if after.is_tied:
            check_tied_head(widened_model.get_submodule(after.logits))
        matrix = _in_tiles(before.shape, after.shape, config.block_size)
    family = "dense" if choice == "dense" else "wide"
    embedding = LayerSpec(after.embedding, "embedding", family, before.shape, (matrix,))
    if after.is_tied:
        logits = LayerSpec(after.logits, "logits", family, before.shape, (), tied_to=after.embedding)
    else:
        logits = LayerSpec(after.logits, "logits", family, before.shape, (matrix,))
    return embedding, logits


def _in_tiles(dense: tuple[int, int], wide: tuple[int, int], size: int) -> MatrixSpec:
    """A matrix (vocabulary, hidden) in tiles, with about the weights of the dense one.

    The vocabulary is filled up to whole tiles, because its size is the tokenizer's.
    """
    num_rows = -(-wide[0] // size)
    num_tiles = max(num_rows, round(math.prod(dense) / size**2))
    return MatrixSpec("", (num_rows * size, wide[1]), num_tiles * size**2, structure="block", block_size=size)


def head_matrix(ends: tuple[LayerSpec, ...]) -> MatrixSpec | None:
    """The matrix of the output head, perhaps the embedding's, by what `end_layers` gave; None with other scopes."""
    if not ends:
        return None
    embedding, logits = ends
    return (embedding if logits.tied_to else logits).matrices[0]
