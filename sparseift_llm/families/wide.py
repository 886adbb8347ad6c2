"""Sparse Wide, the same decoder with wider sides: the widened transformers config and model, checked, and trained FFN
matrices in it.

How many weights of a widened matrix are active is decided for all layers together, in planning/allocation.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from sparseift_llm import isoflop
from sparseift_llm.config.families import Wide
from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.families.base import Family, TrainedProjection
from sparseift_llm.families.trained_start import Start, start_of_inputs, start_of_outputs
from sparseift_llm.layers.composite import Part
from sparseift_llm.models.architectures import (
    build_model,
    head_dim_is_free,
    num_kv_heads,
    sizes_of,
    valid_head_dim,
    with_sizes,
)
from sparseift_llm.models.projections import Projection, find_projections

_OTHERWISE = "use scope='ffn', or a family that changes no width (parallel, factorized, doped)"


class WideFamily(Family[Wide]):
    """Wider sides for the whole model (scope `model`), the FFN's inner side (`ffn`) or the hidden side (`residual`)."""

    name = Wide.name

    def sparse_config(self, dense: PreTrainedConfig, config: SparseIFTConfig) -> PreTrainedConfig:
        """The config of the widened model, widths rounded to what the architecture accepts, never below the dense ones.

        Scope `ffn` changes the FFN's inner size only, and scope `residual` the hidden size only. Scope `model` changes
        the hidden size, the head size with it, and the FFN's inner size, and keeps the number of layers and heads.

        Source: arXiv 2303.11525, section 3.2; the authors' GPT-3 configs (768 -> 1092 at 50%).
        """
        if config.sparsity == 0:
            return super().sparse_config(dense, config)
        sizes = sizes_of(dense)
        multiple = math.lcm(config.width_multiple, config.side_multiple)
        if self.options.scope == "ffn":
            target = sizes.ffn * isoflop.wide_ffn_factor(config.sparsity)
            ffn = isoflop.round_size(target, multiple, lambda size: size >= sizes.ffn)
            return with_sizes(dense, sizes.hidden, ffn, sizes.head_dim)
        if self.options.scope == "residual":
            target = sizes.hidden * isoflop.wide_residual_factor(config.sparsity)
            step = math.lcm(multiple, sizes.num_heads if sizes.hidden % sizes.num_heads == 0 else 1)  # as configs ask
            hidden = isoflop.round_size(target, step, lambda size: size >= sizes.hidden)
            return _with_hidden(dense, hidden)
        hidden, head_dim = _hidden_and_head(dense, config, multiple)
        # from the rounded hidden size, so that a ratio of 4 stays 4, as in the authors' configs
        ffn = isoflop.round_size(sizes.ffn * hidden / sizes.hidden, multiple, lambda size: size >= sizes.ffn)
        return with_sizes(dense, hidden, ffn, head_dim)

    def start(self, trained: TrainedProjection, parts: tuple[Part, ...], tile: int, seed: int) -> dict[str, Start]:
        """A trained FFN matrix inside the widened one (scope `ffn`), by the part's name; none for other projections.

        The largest weights of the dense units stay, and new units change no output. A gate fused with `mlp_in` stands
        above or below it.
        """
        if trained.kind not in ("mlp_in", "mlp_out"):
            return {}
        (part,), weight, num_units, share = parts, trained.weight, trained.num_units, self.options.reserve
        is_input = trained.kind == "mlp_in"  # its outputs are the hidden units, not its inputs
        all_units = torch.ones(weight.shape[0 if is_input else 1], dtype=torch.bool, device=weight.device)
        is_old = widen(all_units, num_units)
        if is_input:
            return {part.name: start_of_inputs(widen(weight, num_units), is_old, part, tile, seed, share)}
        return {part.name: start_of_outputs(widen(weight.T, num_units).T, is_old, part, tile, seed, share)}


def _with_hidden(dense: PreTrainedConfig, hidden: int) -> PreTrainedConfig:
    """The config with another hidden size, and nothing else changed.

    Raises:
        ValueError: something else follows from the hidden size.
    """
    sizes = sizes_of(dense)
    try:
        config = with_sizes(dense, hidden, sizes.ffn, sizes.head_dim, pin_head_dim=True)
    except ValueError as error:
        raise ValueError(f"{str(error).partition('; ')[0]}; {_otherwise('residual')}") from error
    if sizes_of(config) != dataclasses.replace(sizes, hidden=hidden):
        raise ValueError(
            f"the heads of {dense.model_type} grow with its hidden size: {hidden // sizes.num_heads} in place of "
            f"{sizes.head_dim}; {_otherwise('residual')}"
        )
    return config


def _hidden_and_head(dense: PreTrainedConfig, config: SparseIFTConfig, multiple: int) -> tuple[int, int]:
    """The hidden size, a multiple of `multiple`, and the head size of the model widened by scope `model`."""
    sizes, factor = sizes_of(dense), isoflop.wide_model_factor(config.sparsity)
    if head_dim_is_free(dense):
        hidden = isoflop.round_size(sizes.hidden * factor, multiple, lambda size: size >= sizes.hidden)
        head_dim = isoflop.round_size(
            sizes.head_dim * factor,
            1,
            lambda size: size >= sizes.head_dim and valid_head_dim(dense, size) and _fills_tiles(dense, config, size),
        )
        return hidden, head_dim
    hidden = isoflop.round_size(
        sizes.hidden * factor,
        sizes.num_heads,
        lambda size: (
            size >= sizes.hidden
            and size % multiple == 0
            and valid_head_dim(dense, size // sizes.num_heads)
            and _fills_tiles(dense, config, size // sizes.num_heads)
        ),
    )
    return hidden, hidden // sizes.num_heads


def _fills_tiles(dense: PreTrainedConfig, config: SparseIFTConfig, head_dim: int) -> bool:
    """Whether queries, keys and values of heads of this size have widths that are multiples of the tile.

    With n:m, of m and of `width_multiple`, so that one number fits all sides to kernels.
    """
    multiple = math.lcm(config.side_multiple, config.width_multiple if config.pattern else 1)
    if not {"q", "k", "v", "o"} & set(config.target_kinds):
        return True
    return all(number * head_dim % multiple == 0 for number in (sizes_of(dense).num_heads, num_kv_heads(dense)))


def widen(rows: Tensor, num_units: tuple[int, int]) -> Tensor:
    """Zeros (or False) after every `num_units[0]` rows, so that there are `num_units[1]` in their place.

    >>> widen(torch.tensor([1, 2, 3, 4]), (2, 3)).tolist()
    [1, 2, 0, 3, 4, 0]
    """
    groups = rows.unflatten(0, (-1, num_units[0]))
    wide = groups.new_zeros(len(groups), num_units[1], *rows.shape[1:])
    wide[:, : num_units[0]] = groups
    return wide.flatten(0, 1)


def build_widened(
    dense_config: PreTrainedConfig, dense: Sequence[Projection], config: PreTrainedConfig, scope: str
) -> tuple[PreTrainedModel, list[Projection]]:
    """The widened model on the meta device, checked, and its projections.

    Under scope `residual` it is built from its config as that is saved and loaded, and run once: norms and rotary
    embeddings inside of attention may be as wide as the hidden size, which no projection shows.

    Args:
        dense_config: of the dense model.
        dense: its projections.
        config: of the widened model.
        scope: what is widened.

    Raises:
        ValueError: the class of the model does not take these widths.
    """
    try:
        if scope == "residual":
            config = type(config).from_dict(config.to_dict())
        model = build_model(config, meta=True)
    except Exception as error:
        raise ValueError(
            f"{config.model_type} cannot be built with the widths {sizes_of(config)} ({error}); {_otherwise(scope)}"
        ) from error
    if scope != "residual":
        projections = find_projections(model)
        check_widths(dense, projections, dense_config, config)
        return model, projections
    try:
        projections = find_projections(model)
        check_widths(dense, projections, dense_config, config)
        _run(model)
    except Exception as error:
        reason = str(error).strip().splitlines()[0].partition("; ")[0]
        raise ValueError(
            f"{config.model_type} cannot have a hidden size of {config.hidden_size} with its attention as it was "
            f"({reason}); {_otherwise(scope)}"
        ) from error
    return model, projections


def _run(model: PreTrainedModel) -> None:
    """Compute logits of two tokens on the meta device."""
    with torch.device("meta"), torch.no_grad():
        tokens, mask = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 1, 2, 2)
        model(input_ids=tokens, attention_mask=mask, use_cache=False)  # a mask that is not looked into


def _otherwise(scope: str) -> str:
    """What to do where a model cannot be widened."""
    if scope != "residual":
        return _OTHERWISE
    return (
        "scope='residual' needs a model type whose heads have a size of their own (Llama, Mistral, Qwen, Gemma, ...), "
        "e.g. a preset such as 'llama-gpt3-small' or 'starcoder2-gpt3-small'; or use scope='ffn' or 'model'"
    )


def resolve_block_size(dense: PreTrainedConfig, config: SparseIFTConfig) -> SparseIFTConfig:
    """`config` with a `block_size` chosen by the widened model's hidden size, where tiles are asked for without one."""
    if config.structure != "block" or config.block_size is not None:
        return config
    sizes = sizes_of(dense)
    if config.scope == "residual":  # these widths stay, so the tile has to fit them
        kept = (sizes.ffn, sizes.attention_width, num_kv_heads(dense) * sizes.head_dim)
        size = isoflop.default_block_size(min(sizes.hidden, *kept[:2]))
        fitting = [b for b in isoflop.BLOCK_SIZES if b <= size and not any(width % b for width in kept)]
        return dataclasses.replace(config, block_size=max(fitting, default=size))
    factor = isoflop.wide_model_factor(config.sparsity) if config.widens_hidden else 1
    return dataclasses.replace(config, block_size=isoflop.default_block_size(round(sizes.hidden * factor)))


def check_widths(
    dense: Sequence[Projection],
    wide: Sequence[Projection],
    dense_config: PreTrainedConfig,
    config: PreTrainedConfig,
) -> None:
    """Raise ValueError unless every side grew by the factor of the width that it belongs to.

    Args:
        dense, wide: the projections of the dense and of the widened model, as they were built.
        dense_config, config: their configs.
    """
    sizes, wider = sizes_of(dense_config), sizes_of(config)
    hidden, ffn = Fraction(wider.hidden, sizes.hidden), Fraction(wider.ffn, sizes.ffn)
    head = Fraction(wider.head_dim, sizes.head_dim)
    factors = {"o": (hidden, head), "mlp_in": (ffn, hidden), "mlp_out": (hidden, ffn)}  # (out, in)
    for before, after in zip(dense, wide, strict=True):
        asked = [side * by for side, by in zip(before.shape, factors.get(before.kind, (head, hidden)), strict=True)]
        if list(after.shape) != asked:
            rows, columns = (float(side) for side in asked)
            raise ValueError(
                f"{after.name} would have to be {rows:g} x {columns:g}, but the config of {config.model_type} makes it "
                f"{after.out_features} x {after.in_features}; {_OTHERWISE}"
            )
