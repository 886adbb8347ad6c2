"""Where a transformers decoder keeps its projections, found by module paths and shapes instead of by model type.

What is not understood is an error that names it: nothing is left out in silence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparseift_llm.config.transform import KINDS
from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.layers.composite import CompositeProjection
from sparseift_llm.models.architectures import build_model, check_config

_LINEAR = (nn.Linear, Conv1D, BlockSparseLinear, CompositeProjection)
_SUPPORTED = (
    "supported are decoders whose every layer has one self-attention (q, k, v, o) and one MLP (mlp_in, mlp_out), fused "
    "or not, each in nn.Linear or Conv1D"
)
_QKV = ("q", "k", "v")
_LOW_RANK = re.compile(r"_(a|b)(_[^.]*)?$")  # e.g. `q_a_proj` and `q_b_proj`, the two factors of one map
# A module's own name without the words that say nothing, e.g. `q` of `q_proj`.
_EMPTY_WORDS = {"proj", "project", "lin", "linear", "attention", "a", "b", "with", "mqa"}
_ATTENTION_NAMES = {
    **dict.fromkeys(("q", "query", "wq"), ("q",)),
    **dict.fromkeys(("k", "key", "wk"), ("k",)),
    **dict.fromkeys(("v", "value", "wv"), ("v",)),
    "kv": ("k", "v"),
    **dict.fromkeys(("qkv", "wqkv", "query_key_value", "c_attn"), _QKV),
    **dict.fromkeys(("o", "out", "output", "dense", "wo", "c_proj"), ("o",)),
}
# Only looked at where the FFN is as wide as the hidden size, so that shapes do not tell.
_MLP_NAMES = {
    **dict.fromkeys(("up", "gate", "gate_up", "fc1", "fc_in", "c_fc", "w1", "w3", "wi", "dense_h_to_4h"), "mlp_in"),
    **dict.fromkeys(("intermediate.dense",), "mlp_in"),
    **dict.fromkeys(("down", "fc2", "fc_out", "c_proj", "w2", "wo", "dense_4h_to_h", "output.dense"), "mlp_out"),
}


@dataclass(frozen=True)
class Projection:
    """One dense projection of a decoder layer.

    Args:
        name: module path in the model.
        kinds: what it computes: q, k, v, o, mlp_in or mlp_out, and several of them where one matrix holds them all.
        in_features, out_features: the numbers of its inputs and outputs.
        layer_index: the number of its decoder layer, from 0.
        num_weights: the weights of all its matrices together, zeros included.
    """

    name: str
    kinds: tuple[str, ...]
    in_features: int
    out_features: int
    layer_index: int
    num_weights: int

    @property
    def kind(self) -> str:
        """The kinds as one word, e.g. `qkv` or `mlp_in`."""
        return "".join(self.kinds)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features


def find_projections(model: PreTrainedModel) -> list[Projection]:
    """All attention and MLP projections of the decoder layers, layer by layer.

    Args:
        model: a causal language model, dense or Sparse-IFT.

    Returns:
        Those of the first layer, then those of the second, and so on. Within a layer the order is q, k, v, o, mlp_in,
        mlp_out, and the model's own order among several of one kind.

    Raises:
        ValueError: as `check_config` does; or the decoder has a weight that is none of these (a mixture of experts, a
            recurrent or convolutional layer, an adapter), lacks one of them, or has one twice (cross-attention).
    """
    check_config(model.config)
    prefix, layers = decoder_layers(model)
    _refuse_experts(prefix, layers)
    found = []
    for index, layer in enumerate(layers):
        found += _of_layer(f"{prefix}.{index}", layer, index, model.config.hidden_size)
    return found


def projection_kinds(config: PreTrainedConfig) -> dict[str, str]:
    """What every projection of a decoder computes, by module path, from its config; errors as `find_projections`."""
    return {projection.name: projection.kind for projection in find_projections(build_model(config, meta=True))}


def kind_of(name: str, kinds: Mapping[str, str], default: str) -> str:
    """The kind of the projection at module path `name`, or of the one that it is a part of.

    >>> kind_of("h.0.mlp.c_fc.branches.1", {"h.0.attn.c_attn": "qkv", "h.0.mlp.c_fc": "mlp_in"}, "other")
    'mlp_in'
    """
    return next((kind for path, kind in kinds.items() if f"{name}.".startswith(f"{path}.")), default)


def is_low_rank(name: str) -> bool:
    """Whether a projection is one of two factors (multi-head latent attention), by its name."""
    return _LOW_RANK.search(name) is not None


def attention_widths(projections: Sequence[Projection]) -> tuple[int, int]:
    """The widths of the queries and of the values, of all heads together and summed over the layers."""
    queries: dict[int, int] = {}
    values = {p.layer_index: p.in_features for p in projections if p.kinds == ("o",)}
    for projection in projections:
        if "q" in projection.kinds:  # the last one counts, where there are low-rank factors
            fused = len(projection.kinds) > 1
            queries[projection.layer_index] = values[projection.layer_index] if fused else projection.out_features
    return sum(queries.values()), sum(values.values())


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers.

    Raises:
        ValueError: no list in the decoder has as many entries as the config has layers.
    """
    num_layers = model.config.num_hidden_layers
    names = {module: name for name, module in model.named_modules()}
    for root in (model.get_decoder(), model.base_model):  # a head may be called `decoder`, too
        lists = [m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
        if lists:
            layers = max(lists, key=lambda entry: sum(parameter.numel() for parameter in entry.parameters()))
            return names[layers], layers
    raise ValueError(f"{type(model).__name__} has no list of {num_layers} decoder layers; {_SUPPORTED}")


def _of_layer(prefix: str, layer: nn.Module, index: int, hidden: int) -> list[Projection]:
    kinds: dict[str, tuple[str, ...]] = {}
    matrices = dict(_matrices(layer, prefix))
    mlp = [path for path in matrices if not any("att" in part for part in path.removeprefix(prefix).split("."))]
    for path in matrices:
        kinds[path] = _mlp_kind(path, matrices[path], hidden) if path in mlp else _attention_kinds(path)
    _check_attention(prefix, {path: kinds[path] for path in matrices if path not in mlp}, matrices, hidden)
    _check_mlp(prefix, {path: kinds[path] for path in mlp}, matrices)
    return [
        Projection(path, kinds[path], *_in_out(matrices[path]), index, _num_weights(matrices[path]))
        for path in sorted(matrices, key=lambda path: KINDS.index(kinds[path][0]))
    ]


def _matrices(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Every linear map in a decoder layer; a weight of two or more dimensions anywhere else is an error."""
    if isinstance(module, _LINEAR):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _matrices(child, f"{path}.{name}")
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim >= 2:
            raise ValueError(
                f"{path}.{name} ({_times(parameter.shape)}) is in a {type(module).__name__}, not in a Linear or "
                f"Conv1D; {_SUPPORTED}"
            )


def _refuse_experts(prefix: str, layers: nn.ModuleList) -> None:
    for path, module in layers.named_modules(prefix=prefix):
        if "expert" in f"{path} {type(module).__name__}".lower():
            for name, parameter in module.named_parameters(prefix=path):
                raise ValueError(
                    f"{name} ({_times(parameter.shape)}) is of a mixture of experts, which is not supported; use a "
                    "dense architecture"
                )


def _attention_kinds(path: str) -> tuple[str, ...]:
    for part in reversed(path.lower().split(".")):
        words = [word for word in part.split("_") if word not in _EMPTY_WORDS]
        if words:
            break
    for name in (part, "_".join(words)):
        if name in _ATTENTION_NAMES:
            return _ATTENTION_NAMES[name]
    raise ValueError(f"{path} is in an attention but none of q, k, v, o by its name; {_SUPPORTED}")


def _mlp_kind(path: str, module: nn.Module, hidden: int) -> tuple[str, ...]:
    inputs, outputs = _in_out(module)
    if inputs == hidden != outputs:
        return ("mlp_in",)
    if outputs == hidden != inputs:
        return ("mlp_out",)
    last, two = path.lower().split(".")[-1], ".".join(path.lower().split(".")[-2:])
    for name in (last, last.removesuffix("_proj"), two):
        if inputs == hidden and name in _MLP_NAMES:
            return (_MLP_NAMES[name],)
    raise ValueError(
        f"{path} ({outputs} x {inputs}) is neither in an attention nor, by its shape and name, the in or out of an MLP "
        f"at hidden size {hidden}; {_SUPPORTED}"
    )


def _check_attention(
    prefix: str, kinds: dict[str, tuple[str, ...]], matrices: dict[str, nn.Module], hidden: int
) -> None:
    seen: dict[tuple[tuple[str, ...], str], str] = {}
    for path, found in kinds.items():
        factor = _LOW_RANK.search(path)
        key = (found, factor[1] if factor else "")
        if key in seen:
            raise ValueError(f"{seen[key]} and {path} are both {', '.join(found)} (cross-attention?); {_SUPPORTED}")
        seen[key] = path
        inputs, outputs = _in_out(matrices[path])
        if (outputs if found == ("o",) else inputs) != hidden and key[1] != "b":
            raise ValueError(f"{path} ({outputs} x {inputs}) does not fit the hidden size {hidden}; {_SUPPORTED}")
    covered = [kind for found, factor in seen if factor != "b" for kind in found]
    missing = [kind for kind in (*_QKV, "o") if kind not in covered]
    if missing or len(covered) > len(set(covered)):
        raise ValueError(f"{prefix} has attention weights {[*kinds]}, not one each of q, k, v, o; {_SUPPORTED}")


def _check_mlp(prefix: str, kinds: dict[str, tuple[str, ...]], matrices: dict[str, nn.Module]) -> None:
    outs = [path for path, found in kinds.items() if found == ("mlp_out",)]
    ins = [path for path, found in kinds.items() if found == ("mlp_in",)]
    if len(outs) != 1 or not ins:
        raise ValueError(f"{prefix} has MLP weights {[*kinds]}, not mlp_in and one mlp_out; {_SUPPORTED}")
    ffn = _in_out(matrices[outs[0]])[0]
    widths = [_in_out(matrices[path])[1] for path in ins]
    if widths not in ([ffn], [2 * ffn], [ffn, ffn]):
        odd = next((path for path, width in zip(ins, widths, strict=True) if width != ffn), ins[-1])
        raise ValueError(f"{odd} does not fit {outs[0]}, which has {ffn} inputs; {_SUPPORTED}")


def _num_weights(module: nn.Module) -> int:
    if not isinstance(module, CompositeProjection):
        return math.prod(_in_out(module))
    inner = [child for child in module.modules() if isinstance(child, nn.Linear | BlockSparseLinear)]
    return sum(child.in_features * child.out_features for child in inner)


def stock_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a stock projection; None for any other module."""
    if not isinstance(module, nn.Linear | Conv1D) or isinstance(module, SparseProjection):
        return None
    inputs, outputs = _in_out(module)
    return outputs, inputs


def _in_out(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    assert isinstance(module, nn.Linear | BlockSparseLinear | CompositeProjection)
    return module.in_features, module.out_features


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
