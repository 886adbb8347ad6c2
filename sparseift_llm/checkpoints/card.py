"""The model card (README.md) that goes to the hub with a model: what it is, what it costs, how to load it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from transformers import PreTrainedModel

from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.checkpoints.upgrade import dense_config_of
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.models.architectures import sizes_of
from sparseift_llm.planning.cost import cost_of
from sparseift_llm.planning.planner import default_seq_len
from sparseift_llm.record.model_record import ModelRecord
from sparseift_llm.utils.tables import markdown_table

CARD_NAME = "README.md"
_MARK = "<!-- Written by sparseift_llm: delete this line, and the card is yours and stays as it is. -->"
_PAPER = "[arXiv 2303.11525](https://arxiv.org/abs/2303.11525)"
_STOCK = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")  # a stock model with zeros in its weights

import sparseift_llm

model = sparseift_llm.load_pretrained("{name}")  # with its masks, to train on
```
"""
_OWN = """```python
import sparseift_llm  # teaches transformers this layout; without it, loading is an error
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```
"""


def model_card(model: PreTrainedModel, name: str, tags: Iterable[str] = ()) -> ModelCard:
    """The card of a Sparse-IFT model.

    Args:
        model: on any device; its masks as they are now are what is described.
        name: the model's name on the hub.
        tags: further tags.
    """
    record = read_record(model.config)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["sparse-ift", model.config.model_type, *tags])),
    )
    facts = markdown_table(("", ""), _facts(model, record), "ll")
    loading = (_OWN if record.has_own_layout else _STOCK).format(name=name)
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n{_MARK}\n\n# {name.rpartition('/')[2]}\n\nA {model.config.model_type} language "
        f"model made by a Sparse Iso-FLOP Transformation ({_PAPER}).\n\n{facts}\n\n"
        "FLOPs are those of the forward pass at the sequence length named, with attention in full; norms and "
        f"elementwise work are left out. Zeros are not counted.\n\n## Loading\n\n{loading}"
    )


def write_card(
    model: PreTrainedModel, folder: Path, name: str, tags: Iterable[str] = (), token: str | bool | None = None
) -> bool:
    """Write `folder`'s README.md, unless the user wrote one: there, or on the hub.

    Returns:
        Whether the hub should get the README.md that is now in `folder`.
    """
    try:
        published = ModelCard.load(name, token=token if isinstance(token, str) else None)
    except (EntryNotFoundError, RepositoryNotFoundError):
        published = None
    if published is not None and _MARK not in published.content:
        return False
    path = folder / CARD_NAME
    if not path.is_file() or _MARK in path.read_text(encoding="utf-8"):
        model_card(model, name, tags).save(path)
    return True


def _facts(model: PreTrainedModel, record: ModelRecord) -> Iterable[tuple[str, object]]:
    config, sizes, dense_model = record.transformation, sizes_of(model.config), record.dense_model
    layers = sparse_layers(model).values()
    inactive = sum(layer.num_weights - layer.count_active() for layer in layers)
    size = sum(layer.num_weights for layer in layers)
    seq_len = default_seq_len(model.config, config)
    cost, dense_cost = cost_of(model, seq_len), cost_of(dense_config_of(model.config, dense_model), seq_len)
    yield "family", config.family.name + (f", scope `{config.scope}`" if config.family == "wide" else "")
    if config.rules:
        yield "rules, the first that covers a projection", "; ".join(rule.family.name for rule in config.rules)
    details = f", tiles {config.block_size}" if config.block_size else ""
    yield "structure", config.structure + (", along both sides" if config.transposable else details)
    yield "masks", config.dst.algorithm
    yield "sparsity asked for", f"{config.sparsity:g}"
    yield "sparsity of the sparse matrices", f"{inactive / size:.6f}"
    yield "linear parameters, active", f"{cost.linear_active_params:,} (dense: {dense_cost.linear_active_params:,})"
    yield "parameters, stored", f"{cost.stored_params:,} (dense: {dense_cost.stored_params:,})"
    for key, ours, theirs in (
        ("linear", cost.flops.linear, dense_cost.flops.linear),
        (f"whole-model (T={seq_len})", cost.flops.forward, dense_cost.flops.forward),
    ):
        yield f"{key} FLOPs per token", f"{ours:,} (dense: {theirs:,}; {ours / theirs:.3f}x)"
    dense = {"hidden": dense_model.hidden, "ffn": dense_model.ffn, "head_dim": dense_model.head_dim}
    dense |= {"heads": sizes.num_heads, "layers": sizes.num_layers, "vocabulary": sizes.vocab}
    yield "the dense model's sizes", ", ".join(f"{key} {value}" for key, value in dense.items())
