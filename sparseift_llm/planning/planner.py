"""What Sparse-IFT makes of a model, in numbers, before anything is built: `plan`.

Works on the meta device, so that a plan for any size takes no memory. A plan is made once, for a dense model: what it
decides is then in the record that the Sparse-IFT model carries, and nothing works it out again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparseift_llm import isoflop
from sparseift_llm.config.rules import FamilyRule
from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.families.registry import drop_in_of, family_of, rule_for
from sparseift_llm.families.wide import build_widened, resolve_block_size
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.composite import Part
from sparseift_llm.layers.stock import is_conv1d
from sparseift_llm.models.architectures import build_model, check_config, sizes_of
from sparseift_llm.models.beyond_config import config_of
from sparseift_llm.models.fused_rows import RowPattern
from sparseift_llm.models.projections import Projection, find_projections
from sparseift_llm.planning.allocation import active_counts, head_groups
from sparseift_llm.planning.cost import ModelCost, cost_of, model_flops
from sparseift_llm.planning.ends import end_layers, head_matrix
from sparseift_llm.planning.equal_cost import check_equal_cost
from sparseift_llm.planning.kinds_apart import parts_of, patterns_of, row_groups, split_evenly
from sparseift_llm.record.model_record import DenseSizes, ModelRecord, has_record, missing_layers
from sparseift_llm.record.specs import LayerSpec, MatrixSpec, RowGroup


@dataclass(frozen=True)
class Plan:
    """The result of `plan`: every layer before and after, and the costs of both models.

    Args:
        config: the transformation, with the tile size and the start that were chosen.
        hf_config: stock config of the model to build.
        seq_len: tokens per sequence, for FLOPs.
        dense_model: sizes of the dense model.
        layers: every projection of the decoder layers, those that stay dense included; with scope `residual` the input
            embedding before them and the output head behind them.
        dense, sparse: costs of both models.
    """

    config: SparseIFTConfig
    hf_config: PreTrainedConfig
    seq_len: int
    dense_model: DenseSizes
    layers: tuple[LayerSpec, ...]
    dense: ModelCost
    sparse: ModelCost

    @property
    def record(self) -> ModelRecord:
        """What config.json of the planned model says of it."""
        return ModelRecord(self.config, self.dense_model, self.layers)

    @property
    def ratio_linear(self) -> float:
        """Sparse over dense FLOPs of the projections."""
        return self.sparse.flops.linear / self.dense.flops.linear

    @property
    def ratio_whole_model(self) -> float:
        """Sparse over dense forward FLOPs with attention and logits."""
        return self.sparse.flops.forward / self.dense.flops.forward

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: `dense`, `sparse`, `ratio_linear`, `ratio_whole_model`, `layers`, and the inputs."""
        return {
            "config": self.config.to_dict(),
            "model_type": self.hf_config.model_type,
            "seq_len": self.seq_len,
            "dense": self.dense.to_dict(),
            "sparse": self.sparse.to_dict(),
            "ratio_linear": self.ratio_linear,
            "ratio_whole_model": self.ratio_whole_model,
            "layers": [_layer_values(layer) for layer in self.layers],
        }


def _layer_values(layer: LayerSpec) -> dict[str, Any]:
    """One entry of `layers` in the JSON; a layer that shares another's matrices says whose."""
    if layer.tied_to is not None:
        return {
            "name": layer.name,
            "kind": layer.kind,
            "dense_shape": list(layer.dense_shape),
            "tied_to": layer.tied_to,
        }
    return {
        "name": layer.name,
        "kind": layer.kind,
        "dense_shape": list(layer.dense_shape),
        "sparse_shape": list(layer.sparse_shape),
        "num_active": layer.num_active,
        "sparsity": layer.sparsity,
        "family": layer.family,
        "matrices": [
            {
                "name": layer.path_of(matrix),
                "shape": list(matrix.shape),
                "num_active": matrix.num_active,
            }
            for matrix in layer.matrices
        ],
    }


def plan(model: PreTrainedModel | PreTrainedConfig, config: SparseIFTConfig, seq_len: int | None = None) -> Plan:
    """Work out what `sparsify(model, config)` builds and what it costs.

    Args:
        model: a dense causal language model, or its config.
        config: the transformation.
        seq_len: tokens per sequence for attention FLOPs; default: `config.seq_len`, else the
            model's maximum length.

    Returns:
        A `Plan`. Under `accounting="linears"` and `distribution="uniform"` every sparse projection
        has exactly as many active weights as its dense twin has weights; with tiles, as near as
        whole tiles come, and all together to half a tile; with n:m, as near as rounded widths come
        (`ratio_linear` says how near).

    Raises:
        ValueError: unsupported model, already surgered, no projection matches `targets`/`exclude`,
            a fused projection matched in part, a rule that is for no projection, a projection that grows but stays
            dense under `accounting="linears"`, or no sparsity meets `accounting="whole_model"`.

    Source: arXiv 2303.11525, section 3.
    """
    if not isinstance(config, SparseIFTConfig):
        raise ValueError(
            f"the transformation must be a SparseIFTConfig, got {type(config).__name__}: {config!r}; make one of a "
            "mapping with SparseIFTConfig.from_dict(...), or with SparseIFTConfig(sparsity=0.75)"
        )
    if not isinstance(model, PreTrainedModel | PreTrainedConfig):
        raise ValueError(
            f"expected a transformers model or config, got {type(model).__name__}; sparsify before wrapping "
            "the model for distributed training or compiling it"
        )
    dense_config = model if isinstance(model, PreTrainedConfig) else model.config
    if has_record(dense_config) or (isinstance(model, nn.Module) and sparse_layers(model)):
        if isinstance(model, nn.Module) and not sparse_layers(model):
            raise ValueError(missing_layers(dense_config))
        raise ValueError("the model is already a Sparse-IFT model; start from the dense one (or call to_dense first)")
    if seq_len is not None and seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}")
    if config.accounting == "whole_model" and seq_len not in (None, config.seq_len):
        raise ValueError(
            f"seq_len={seq_len} differs from the config's seq_len={config.seq_len}, at which "
            "accounting='whole_model' solves the sparsity; give one of them"
        )
    check_config(dense_config)
    if isinstance(model, PreTrainedModel):
        dense_config = config_of(model)
    result = plan_of_dense(dense_config, config, seq_len)
    _check_rules(config, dense_config)
    check_equal_cost(result, partial(plan_of_dense, dense_config))
    return result


def plan_of_dense(
    dense_config: PreTrainedConfig, config: SparseIFTConfig, seq_len: int | None = None, vocab_size: int | None = None
) -> Plan:
    """The plan for a config that is known to be a dense model's; arguments and errors as `plan`.

    Args:
        vocab_size: the vocabulary with which active weights are counted; default: that of `dense_config`. Only a record
            of format 1 needs another one, where embeddings were resized since (see checkpoints/upgrade.py).
    """
    seq_len = seq_len or default_seq_len(dense_config, config)
    check_config(dense_config)
    config = resolve_block_size(dense_config, dataclasses.replace(config, init=config.init or "preserve"))
    dense_model = build_model(dense_config, meta=True)
    dense_projections = find_projections(dense_model)
    widened_config = family_of(config.family).sparse_config(dense_config, config)
    widened_model, projections = build_widened(dense_config, dense_projections, widened_config, config.scope)
    ends = end_layers(dense_model, widened_model, config)
    head = head_matrix(ends)
    num_logits = None if head is None else head.num_active
    rules, chosen = _choices(projections, config, dense_config)
    dense_cost = cost_of(dense_model, seq_len)
    is_sparse = [is_wide or rule is not None for is_wide, rule in zip(chosen, rules, strict=True)]
    patterns = patterns_of(projections, is_sparse, widened_config, config)
    counts = active_counts(
        dense_projections, projections, chosen, config, dense_model, widened_model, patterns, vocab_size, num_logits
    )
    active = [sum(by_kind) for by_kind in counts]
    heads = head_groups(projections, widened_config, config) if config.balance_heads else {}
    parts = [
        drop_in_of(rule).checked_parts(p.name, p.shape, rule.sparsity or config.sparsity, config) if rule else ()
        for rule, p in zip(rules, projections, strict=True)
    ]
    layers = tuple(
        _replaced_layer(dense, rule, replacing, config, pattern)
        if rule is not None
        else _wide_layer(dense, p, by_kind, is_chosen, widened_model, config, heads.get(p.name), pattern)
        for dense, p, by_kind, is_chosen, rule, replacing, pattern in zip(
            dense_projections, projections, counts, chosen, rules, parts, patterns, strict=True
        )
    )
    num_linear, num_stored = sum(layer.num_weights for layer in layers), widened_model.num_parameters()
    num_stored += num_linear - sum(p.num_weights for p in projections)
    num_stored += sum(
        drop_in_of(rule).num_norm_params(layer.dense_shape, replacing)
        for layer, rule, replacing in zip(layers, rules, parts, strict=True)
        if rule is not None
    )
    multiplied = [*(matrix for layer in layers for matrix in layer.matrices), *([] if head is None else [head])]
    masked_zeros = sum(matrix.num_weights - matrix.num_active for matrix in multiplied if matrix.block_size is None)
    layers = (*ends[:1], *layers, *ends[1:])
    sparse = [matrix for layer in layers for matrix in layer.matrices if matrix.is_sparse]
    if config.block_size is not None:
        num_stored -= sum(matrix.num_weights - matrix.num_active for matrix in sparse if matrix.block_size)
        num_stored += sum(
            math.prod(matrix.shape) - layer.dense_shape[0] * matrix.shape[1]  # rows of no word
            for layer in ends
            for matrix in layer.matrices
        )
    flops = model_flops(widened_model, projections, sum(active), seq_len, num_logit_weights=num_logits)
    sparse_cost = ModelCost(sum(active), num_linear, num_stored, flops, sum(map(_topology_bytes, sparse)), masked_zeros)
    sizes = sizes_of(dense_config)
    dense_sizes = DenseSizes(sizes.hidden, sizes.ffn, sizes.head_dim, vocab_size or sizes.vocab)
    return Plan(config, widened_config, seq_len, dense_sizes, layers, dense_cost, sparse_cost)


def default_seq_len(hf_config: PreTrainedConfig, config: SparseIFTConfig) -> int:
    """Tokens per sequence at which FLOPs are counted if nobody says: the transformation's, else the model's longest."""
    return config.seq_len or int(getattr(hf_config, "max_position_embeddings", 2048))


def _choices(
    projections: Sequence[Projection], config: SparseIFTConfig, dense_config: PreTrainedConfig
) -> tuple[list[FamilyRule | None], list[bool]]:
    """For every projection the drop-in family that replaces it, or None; and whether it becomes a sparse Wide one.

    Raises:
        ValueError: all projections would stay dense, or a rule or target covers a part of a fused projection.
    """
    rules = [rule_for(config, p.name, p.kinds, p.layer_index) for p in projections]
    chosen = [
        config.family == "wide" and rule is None and _is_chosen(projection, config)
        for projection, rule in zip(projections, rules, strict=True)
    ]
    replaced = [rule if rule and rule.family != "dense" else None for rule in rules]
    if not any(chosen) and not any(replaced):
        raise ValueError(
            f"no projection of {dense_config.model_type} is of the kinds {config.target_kinds}; "
            f"it has {sorted({p.kind for p in projections})}: change targets or exclude"
        )
    return replaced, chosen


def _check_rules(config: SparseIFTConfig, dense_config: PreTrainedConfig) -> None:
    """Refuse a rule for no projection: those that it was meant for would get another family."""
    if not config.rules:
        return
    projections = find_projections(build_model(dense_config, meta=True))
    last = max(projection.layer_index for projection in projections)
    for rule in config.rules:
        if not any(rule.covers(kind, p.layer_index) for p in projections for kind in p.kinds):
            raise ValueError(
                f"the rule with family={rule.family.name!r}, targets={rule.targets} and layers={rule.layers!r} is for "
                f"no projection of this {dense_config.model_type}, which has {sorted({p.kind for p in projections})} "
                f"in the layers 0 to {last}: change the rule, or leave it out"
            )


def _replaced_layer(
    dense: Projection,
    rule: FamilyRule,
    parts: Sequence[Part],
    config: SparseIFTConfig,
    pattern: RowPattern | None,
) -> LayerSpec:
    """A projection in whose place a drop-in family puts the matrices `parts`; `pattern` is that of its rows."""
    matrices = tuple(
        MatrixSpec(
            part.name,
            part.shape,
            part.num_active,
            **_structure(config, part.is_sparse),
            row_groups=_row_groups_of_part(part, config, pattern),
        )
        for part in parts
    )
    options = dataclasses.asdict(rule.family)
    family = options.pop("name")
    return LayerSpec(dense.name, dense.kind, family, dense.shape, matrices, options, dense.layer_index)


def _wide_layer(
    dense: Projection,
    wide: Projection,
    by_kind: Sequence[int],
    is_sparse: bool,
    widened_model: PreTrainedModel,
    config: SparseIFTConfig,
    heads: tuple[int, int] | None,
    pattern: RowPattern | None,
) -> LayerSpec:
    """A projection that stays one matrix, perhaps a wider one, and perhaps a sparse one.

    `by_kind` are its active weights, a number for each kind of `pattern` if it has one.
    """
    block_size = config.block_size if is_sparse else None
    matrix = MatrixSpec(
        "",
        wide.shape,
        sum(by_kind),
        **_structure(config, is_sparse),
        transposed=block_size is None and is_conv1d(widened_model.get_submodule(wide.name)),
        heads=heads if is_sparse else None,
        row_groups=() if block_size else row_groups(pattern, by_kind),
    )
    family = "wide" if is_sparse else "dense"
    return LayerSpec(dense.name, dense.kind, family, dense.shape, (matrix,), layer_index=dense.layer_index)


def _structure(config: SparseIFTConfig, is_sparse: bool) -> dict[str, Any]:
    """The fields of a matrix that say which sets of its weights may be active."""
    if not is_sparse:
        return {"structure": "dense"}
    structure = config.structure if config.pattern is None else "n:m"
    return {
        "structure": structure,
        "block_size": config.block_size,
        "pattern": config.pattern,
        "transposable": config.transposable,
    }


def _row_groups_of_part(part: Part, config: SparseIFTConfig, pattern: RowPattern | None) -> tuple[RowGroup, ...]:
    """Groups for the parts whose outputs are the projection's; a trained start chooses in the whole part."""
    if not part.is_sparse or not part.makes_outputs or config.block_size or config.init == "pretrained":
        return ()
    return row_groups(pattern, split_evenly(part.num_active, parts_of(part.shape, pattern)))


def _topology_bytes(matrix: MatrixSpec) -> int:
    if matrix.block_size is None:
        return isoflop.mask_bytes(matrix.num_weights)
    return isoflop.block_index_bytes(matrix.num_active // matrix.block_size**2, matrix.shape[1] // matrix.block_size)


def _is_chosen(projection: Projection, config: SparseIFTConfig) -> bool:
    matched = [kind in config.target_kinds for kind in projection.kinds]
    if any(matched) and not all(matched):
        raise ValueError(
            f"{projection.name} holds {', '.join(projection.kinds)} in one matrix, so they are sparse together "
            "or not at all; name all of them in targets/exclude"
        )
    return all(matched)
