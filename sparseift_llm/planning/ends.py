"""What becomes of the embedding and the logits of a model whose hidden side alone grows (Wide, scope `residual`)."""

from __future__ import annotations

from transformers import PreTrainedModel

from sparseift_llm.config.families import Wide
from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.layers.ends import check_embedding
from sparseift_llm.models.ends import find_ends
from sparseift_llm.record.specs import LayerSpec, MatrixSpec


def end_layers(
    dense_model: PreTrainedModel, widened_model: PreTrainedModel, config: SparseIFTConfig
) -> tuple[LayerSpec, ...]:
    """The specifications of the input embedding and of the output head; none with other scopes.

    A sparse row has as many active weights as the row has in the dense model, so that logits cost what they did.

    Raises:
        ValueError: the model has other matrices there than an embedding and a linear head.
    """
    if config.scope != "residual":
        return ()
    assert isinstance(config.family, Wide)
    before, after = find_ends(dense_model), find_ends(widened_model)
    is_sparse = config.family.embedding == "sparse"
    if is_sparse:
        check_embedding(widened_model.get_submodule(after.embedding))
    vocab, hidden = before.shape
    matrix = MatrixSpec(
        "",
        after.shape,
        vocab * (hidden if is_sparse else after.shape[1]),
        structure="unstructured" if is_sparse else "dense",
    )
    family = "wide" if is_sparse else "dense"
    embedding = LayerSpec(after.embedding, "embedding", family, before.shape, (matrix,))
    if after.is_tied:
        logits = LayerSpec(after.logits, "logits", family, before.shape, (), tied_to=after.embedding)
    else:
        logits = LayerSpec(after.logits, "logits", family, before.shape, (matrix,))
    return embedding, logits


def num_logit_weights(ends: tuple[LayerSpec, ...]) -> int | None:
    """Active weights of the output head by what `end_layers` gave; None with other scopes."""
    if not ends:
        return None
    embedding, logits = ends
    return embedding.num_active if logits.tied_to else logits.num_active
