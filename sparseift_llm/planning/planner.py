"""What Sparse-IFT makes of a model, in numbers, before anything is built: `plan` and `count_flops`.

Works on the meta device, so that a plan for any size takes no memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparseift_llm import isoflop
from sparseift_llm.config.transform import FamilyRule, SparseIFTConfig
from sparseift_llm.families.registry import drop_in_of, family_of, rule_for
from sparseift_llm.families.wide import build_widened, check_widths, resolve_block_size
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.composite import Part
from sparseift_llm.models.architectures import build_model, check_config, sizes_of, with_sizes
from sparseift_llm.models.layout import missing_layers, unmark
from sparseift_llm.models.projections import Projection, find_projections
from sparseift_llm.planning.allocation import active_counts, head_groups, model_flops


@dataclass(frozen=True)
class LayerPlan:
    """One projection before and after.

    Args:
        name: module path.
        kind: what it computes; fused kinds are joined, e.g. `qkv`.
        dense_shape, sparse_shape: (out, in).
        num_active: active weights afterwards, of all its matrices.
        is_sparse: whether there is a mask in it.
        rule: the drop-in family that replaces it; None if it is Wide's or dense.
        parts: the matrices of a drop-in family.
        heads: with `balance_heads`, the side along which heads lie (0 outputs, 1 inputs), and their number.
    """

    name: str
    kind: str
    dense_shape: tuple[int, int]
    sparse_shape: tuple[int, int]
    num_active: int
    is_sparse: bool
    rule: FamilyRule | None = None
    parts: tuple[Part, ...] = ()
    heads: tuple[int, int] | None = None

    @property
    def matrices(self) -> tuple[Part, ...]:
        """All matrices by module path; of Wide, or dense, the projection itself."""
        if not self.parts:
            return (Part(self.name, self.sparse_shape, self.num_active, self.is_sparse),)
        return tuple(replace(part, name=f"{self.name}.{part.name}") for part in self.parts)

    @property
    def num_weights(self) -> int:
        if self.parts:
            return sum(part.num_weights for part in self.parts)
        return self.sparse_shape[0] * self.sparse_shape[1]

    @property
    def sparsity(self) -> float:
        return 1 - self.num_active / self.num_weights


@dataclass(frozen=True)
class ModelCost:
    """Size and FLOPs of one model at one sequence length.

    Args:
        linear_active_params: active weights of the decoder's projections.
        linear_params: weights of these projections, zeros included.
        stored_params: parameters in memory, zeros included, tied ones once.
        flops: forward FLOPs per token.
        topology_bytes: bytes of masks, or of tile indices.
    """

    linear_active_params: int
    linear_params: int
    stored_params: int
    flops: isoflop.FlopCount
    topology_bytes: int = 0

    def to_dict(self) -> dict[str, int]:
        """The fields printed by `sparseift plan --json`."""
        return {
            "linear_active_params": self.linear_active_params,
            "stored_params": self.stored_params,
            "linear_flops_per_token": self.flops.linear,
            "attention_flops_per_token": self.flops.attention,
            "logit_flops_per_token": self.flops.logit,
            "forward_flops_per_token": self.flops.forward,
            "train_state_bytes": isoflop.train_state_bytes(self.stored_params, self.topology_bytes),
        }


@dataclass(frozen=True)
class Plan:
    """The result of `plan`: every layer before and after, and the costs of both models."""

    config: SparseIFTConfig
    hf_config: PreTrainedConfig
    seq_len: int
    layers: tuple[LayerPlan, ...]
    dense: ModelCost
    sparse: ModelCost

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
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "dense_shape": list(layer.dense_shape),
                    "sparse_shape": list(layer.sparse_shape),
                    "num_active": layer.num_active,
                    "sparsity": layer.sparsity,
                    "family": layer.rule.family.name if layer.rule else "wide" if layer.is_sparse else "dense",
                    "matrices": [
                        {"name": part.name, "shape": list(part.shape), "num_active": part.num_active}
                        for part in layer.matrices
                    ],
                }
                for layer in self.layers
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
        whole tiles come, and all together to half a tile.

    Raises:
        ValueError: unsupported model, already surgered, no projection matches `targets`/`exclude`,
            a fused projection matched in part, or no sparsity meets `accounting="whole_model"`.

    Source: arXiv 2303.11525, section 3.
    """
    if not isinstance(model, PreTrainedModel | PreTrainedConfig):
        raise ValueError(
            f"expected a transformers model or config, got {type(model).__name__}; sparsify before wrapping "
            "the model for distributed training or compiling it"
        )
    dense_config = model if isinstance(model, PreTrainedConfig) else model.config
    if getattr(dense_config, "sparse_ift", None) or (isinstance(model, nn.Module) and sparse_layers(model)):
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
    return _plan(dense_config, config, seq_len)


def plan_of(model: PreTrainedModel, seq_len: int | None = None) -> Plan:
    """The plan that a Sparse-IFT model was built from, worked out again from its config.

    If its embeddings were resized since, costs are those of the vocabulary that it has now.

    Raises:
        ValueError: the model's config has no `sparse_ift` record, or one of other widths.
    """
    config, dense_sizes = read_record(model.config)
    dense_config = with_sizes(model.config, **dense_sizes)
    del dense_config.sparse_ift
    unmark(dense_config)
    plan = _plan(dense_config, config, seq_len, model.config.sparse_ift.get("dense_vocab_size"))
    expected, found = sizes_of(plan.hf_config), sizes_of(model.config)
    if expected != found:
        raise ValueError(
            f"the sparse_ift record in the config of {model.config.name_or_path or 'the model'} is damaged: it stands "
            f"for {expected}, but the config has {found}"
        )
    return plan


def record(plan: Plan, dense_config: PreTrainedConfig) -> dict[str, Any]:
    """What config.json says of a Sparse-IFT model under `sparse_ift`: the transformation, the dense sizes."""
    sizes = sizes_of(dense_config)
    dense_sizes = {"hidden": sizes.hidden, "ffn": sizes.ffn, "head_dim": sizes.head_dim}
    return {**plan.config.to_dict(), "dense_sizes": dense_sizes, "dense_vocab_size": sizes.vocab}


def read_record(hf_config: PreTrainedConfig) -> tuple[SparseIFTConfig, dict[str, int]]:
    """The transformation and the dense widths from a config's `sparse_ift` record.

    Raises:
        ValueError: no such record, or a damaged one.
    """
    values = dict(getattr(hf_config, "sparse_ift", None) or {})
    if "dense_sizes" not in values:
        raise ValueError(
            "the model is not a Sparse-IFT model (no sparse_ift record in its config): call sparsify first"
        )
    dense_sizes, vocab_size = values.pop("dense_sizes"), values.pop("dense_vocab_size", 1)  # older records have none
    valid = isinstance(dense_sizes, dict) and dense_sizes.keys() == {"hidden", "ffn", "head_dim"}
    if not valid or not all(type(size) is int and size > 0 for size in dense_sizes.values()):
        raise ValueError(f"the sparse_ift record is damaged: dense_sizes is {dense_sizes!r}")
    if type(vocab_size) is not int or vocab_size < 1:
        raise ValueError(f"the sparse_ift record is damaged: dense_vocab_size is {vocab_size!r}")
    return SparseIFTConfig.from_dict(values), dense_sizes


def _plan(
    dense_config: PreTrainedConfig, config: SparseIFTConfig, seq_len: int | None, vocab_size: int | None = None
) -> Plan:
    """`plan`; `vocab_size` is the one that active weights are counted with, if the config has another by now."""
    seq_len = seq_len or config.seq_len or int(getattr(dense_config, "max_position_embeddings", 2048))
    check_config(dense_config)
    config = resolve_block_size(dense_config, config)
    dense_model = build_model(dense_config, meta=True)
    dense_projections = find_projections(dense_model)
    widened_config = family_of(config.family).sparse_config(dense_config, config)
    widened_model = build_widened(widened_config)
    projections = find_projections(widened_model)
    check_widths(dense_projections, projections, dense_config, widened_config)
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
    dense_cost = cost_of(dense_model, seq_len)
    active = active_counts(dense_projections, projections, chosen, config, dense_model, widened_model, vocab_size)
    heads = head_groups(projections, widened_config, config) if config.balance_heads else {}
    layers = tuple(
        LayerPlan(
            p.name, p.kind, dense.shape, p.shape, count, is_chosen or rule is not None, rule,
            drop_in_of(rule).checked_parts(p.name, p.shape, rule.sparsity or config.sparsity, config) if rule else (),
            heads.get(p.name) if is_chosen else None,
        )
        for dense, p, count, is_chosen, rule in zip(
            dense_projections, projections, active, chosen, replaced, strict=True
        )
    )  # fmt: skip
    sparse = [part for layer in layers for part in layer.matrices if part.is_sparse]
    num_linear, num_stored = sum(layer.num_weights for layer in layers), widened_model.num_parameters()
    num_stored += num_linear - sum(p.num_weights for p in projections)
    num_stored += sum(
        drop_in_of(layer.rule).num_norm_params(layer.dense_shape, layer.parts) for layer in layers if layer.rule
    )
    if config.block_size is not None:
        num_stored -= sum(part.num_weights - part.num_active for part in sparse)
    topology_bytes = sum(_topology_bytes(part, config.block_size) for part in sparse)
    flops = model_flops(widened_model, projections, sum(active), seq_len)
    sparse_cost = ModelCost(sum(active), num_linear, num_stored, flops, topology_bytes)
    return Plan(config, widened_config, seq_len, layers, dense_cost, sparse_cost)


def cost_of(model: PreTrainedModel | PreTrainedConfig, seq_len: int) -> ModelCost:
    """Size and FLOPs of a dense or Sparse-IFT model, from the masks as they are now.

    Args:
        model: a causal language model, or the config of a dense one.
        seq_len: tokens per sequence; attention is counted in full, not causal.

    Raises:
        ValueError: the architecture is not supported.
    """
    if isinstance(model, PreTrainedConfig):
        model = build_model(model, meta=True)
    layers = sparse_layers(model).values()
    inactive = sum(layer.num_weights - layer.count_active() for layer in layers)
    projections = find_projections(model)
    total = sum(projection.num_weights for projection in projections)
    flops = model_flops(model, projections, total - inactive, seq_len)
    return ModelCost(
        total - inactive, total, model.num_parameters(), flops, sum(layer.topology_bytes for layer in layers)
    )


def count_flops(model: PreTrainedModel | PreTrainedConfig, seq_len: int) -> isoflop.FlopCount:
    """Forward FLOPs per token of a dense or Sparse-IFT model; arguments and errors as `cost_of`."""
    return cost_of(model, seq_len).flops


def _topology_bytes(part: Part, block_size: int | None) -> int:
    if block_size is None:
        return isoflop.mask_bytes(part.num_weights)
    return isoflop.block_index_bytes(part.num_active // block_size**2, part.shape[1] // block_size)


def _is_chosen(projection: Projection, config: SparseIFTConfig) -> bool:
    matched = [kind in config.target_kinds for kind in projection.kinds]
    if any(matched) and not all(matched):
        raise ValueError(
            f"{projection.name} holds {', '.join(projection.kinds)} in one matrix, so they are sparse together "
            "or not at all; name all of them in targets/exclude"
        )
    return all(matched)
