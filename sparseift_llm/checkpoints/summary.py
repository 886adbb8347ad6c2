"""A Sparse-IFT model in one line: what became wider, how much of it is zero, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedModel

from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.checkpoints.upgrade import dense_config_of
from sparseift_llm.config.dst import DSTConfig
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.models.architectures import build_model, sizes_of
from sparseift_llm.planning.cost import cost_of
from sparseift_llm.planning.planner import default_seq_len
from sparseift_llm.record.model_record import missing_layers
from sparseift_llm.utils.units import readable_count


def print_sparsity(model: PreTrainedModel) -> None:
    """Print what `sparsity_summary` says of a model.

    Raises:
        ValueError: the model has no sparse layers.
    """
    print(sparsity_summary(model))


def sparsity_summary(model: PreTrainedModel, seq_len: int | None = None) -> str:
    """One line on a Sparse-IFT model: sizes and costs beside those of its dense model, and how masks change.

    Args:
        model: a Sparse-IFT model, not on the meta device; its masks are counted as they are now.
        seq_len: tokens per sequence, for FLOPs; default: the transformation's, else the model's longest.

    Raises:
        ValueError: the model has no sparse layers.

    >>> from transformers import GPT2Config
    >>> from sparseift_llm import SparseIFTConfig, sparsify
    >>> model = sparsify(GPT2Config(n_embd=64, n_layer=2, n_head=2), SparseIFTConfig(sparsity=0.75))
    >>> sparsity_summary(model)[:54]
    'wide, scope model: hidden 64->128, FFN 256->512; 75% o'
    """
    return "; ".join(_parts(model, seq_len))


def dense_summary(model: PreTrainedModel, seq_len: int) -> str:
    """One line on a dense model, in the words of `sparsity_summary`."""
    sizes, cost = sizes_of(model.config), cost_of(model, seq_len)
    return (
        f"dense: hidden {sizes.hidden}, FFN {sizes.ffn}; {readable_count(cost.stored_params)} parameters, of which "
        f"{readable_count(_embedding_params(model))} of embeddings; {readable_count(cost.flops.forward)}FLOP per token "
        f"(T={seq_len})"
    )


def _parts(model: PreTrainedModel, seq_len: int | None) -> Iterator[str]:
    layers = sparse_layers(model).values()
    if not layers:
        raise ValueError(missing_layers(model.config))
    record = read_record(model.config)
    config, before, after = record.transformation, record.dense_model, sizes_of(model.config)
    scope = f", scope {config.scope}" if config.family == "wide" else ""
    yield (
        f"{config.family}{scope}: hidden {_change(before.hidden, after.hidden)}, FFN {_change(before.ffn, after.ffn)}"
    )
    size = sum(layer.num_weights for layer in layers)
    inactive = sum(layer.num_weights - layer.count_active() for layer in layers)
    tiles = f", in tiles of {config.block_size}" if config.block_size else ""
    tiles = f", {config.structure}{' along both sides' if config.transposable else ''}" if config.pattern else tiles
    matrices = f"{readable_count(size)} weights in {len(layers)} sparse matrices"
    yield f"{100 * inactive / size:.4g}% of {matrices} are zero{tiles}"
    seq_len = seq_len or default_seq_len(model.config, config)
    dense = build_model(dense_config_of(model.config, before), meta=True)
    cost, dense_cost = cost_of(model, seq_len), cost_of(dense, seq_len)
    yield f"{_ratio(dense_cost.stored_params, cost.stored_params)} parameters stored"
    yield f"{_ratio(_embedding_params(dense), _embedding_params(model))} of them in embeddings"
    yield (
        f"FLOPs per token {cost.flops.forward / dense_cost.flops.forward:.2f}x (projections "
        f"{cost.flops.linear / dense_cost.flops.linear:.2f}x, T={seq_len})"
    )
    yield _masks(config.dst)


def _masks(dst: DSTConfig) -> str:
    if dst.algorithm == "static":
        return "masks never change"
    return f"{dst.algorithm} changes masks every {dst.update_every_steps} steps"


def _change(before: int, after: int) -> str:
    return str(after) if before == after else f"{before}->{after}"


def _ratio(before: int, after: int) -> str:
    if before == after:
        return f"{readable_count(after)} ({after / before:.2f}x)" if before else "0"
    return f"{readable_count(before)}->{readable_count(after)} ({after / before:.2f}x)"


def _embedding_params(model: PreTrainedModel) -> int:
    """Parameters of the input embedding, and of the output head where it has a weight of its own."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(module, "weight", None) for module in modules]
    return sum({id(weight): weight.numel() for weight in weights if weight is not None}.values())
