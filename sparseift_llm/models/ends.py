"""Where a decoder keeps the matrices at its two ends: the input embedding and the output head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Ends:
    """The input embedding and the output head of a model, each a matrix (vocabulary, hidden).

    Args:
        embedding, logits: module paths.
        is_tied: whether they are one parameter.
        shape: (vocabulary, hidden).
    """

    embedding: str
    logits: str
    is_tied: bool
    shape: tuple[int, int]


def find_ends(model: PreTrainedModel) -> Ends:
    """The ends of a stock model, by its own methods.

    Raises:
        ValueError: it has no head, or embedding and head are not two matrices of one shape in `nn.Embedding` and
            `nn.Linear`.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ValueError(
            f"{model.config.model_type} has a {type(embedding).__name__} as its input embedding and a "
            f"{type(head).__name__} as its output head, not an Embedding and a Linear; use scope='ffn' or 'model'"
        )
    shape = (embedding.num_embeddings, embedding.embedding_dim)
    if (head.out_features, head.in_features) != shape:
        raise ValueError(
            f"{names[head]} of {model.config.model_type} is {head.out_features} x {head.in_features}, but its "
            f"embedding has {shape[0]} rows of {shape[1]}; use scope='ffn' or 'model'"
        )
    return Ends(names[embedding], names[head], head.weight is embedding.weight, shape)
