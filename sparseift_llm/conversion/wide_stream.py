"""`init="pretrained"` with a wider residual stream (Wide, scope `residual`): a dense model inside of a wider one.

Legend: the dense stream has d channels and the wide one k * d. The first d of these hold the dense stream times
sqrt(k), and the others 0, so that the mean square of a vector is what it was, and a norm's epsilon need not change.
Whatever reads the stream through a norm then gets sqrt(k) times the normalised channels, which the norm's weight takes
back; whatever writes to it is multiplied by sqrt(k).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseift_llm.config.families import Wide
from sparseift_llm.families.trained_start import share_out, spread_evenly
from sparseift_llm.layers.masked import MaskedProjection
from sparseift_llm.layers.stock import is_conv1d, stock_matrix
from sparseift_llm.models.norms import norm_offset
from sparseift_llm.models.stream import stream_norms, subtracts_mean
from sparseift_llm.record.model_record import ModelRecord
from sparseift_llm.record.specs import ENDS, LayerSpec
from sparseift_llm.topology.blocks import columns_of, tile_sums
from sparseift_llm.topology.groups import EqualGroups, Groups, row_starts
from sparseift_llm.topology.masks import derive_seed

_ROWS_AT_ONCE = 4096  # words whose active weights are chosen together
_NUM_TOKENS = 8  # on which the logits of both models are compared
# Largest difference of logits, of the largest logit: roundings of a deep model (whose norms take float32), and far
# below a wrong factor.
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
_TOLERANCE = 0.1  # of half precision
_OTHERWISE = "use init='preserve', or scope='ffn'"


@torch.no_grad()
def widen_trained(dense: PreTrainedModel, wide: PreTrainedModel, record: ModelRecord) -> None:
    """Give a wide stock model the weights of a trained dense one, so that it computes the same logits.

    New channels get 0 from everything that writes to the stream. What reads them has random weights there, of the size
    of the trained ones, so that gradients reach the new channels at once; a head that is tied to the embedding has 0.

    Args:
        dense: the trained model.
        wide: a stock model with the widths of `record`, on the same device; its parameters change.
        record: of the sparse model that `wide` will be.

    Raises:
        ValueError: the model's norms do not allow it, a parameter has another shape for which there is no start, or
            the logits differ.
    """
    widening = _Widening(dense, wide, record)
    for index, layer in enumerate(record.layers):
        if layer.tied_to is None:
            widening.widen_matrix(layer, derive_seed(record.transformation.seed, "pretrained start", index))
    for name in widening.norms.names:
        widening.widen_norm(name)
    widening.copy_others()
    _check_logits(dense, wide)


@torch.no_grad()
def starting_columns(wide: PreTrainedModel, record: ModelRecord) -> dict[str, Tensor]:
    """The block-columns of the tiles that every matrix with tiles starts with, by module path.

    Args:
        wide: a stock model that `widen_trained` has filled.
        record: of the sparse model that it will be.
    """
    columns = {}
    for layer, choose in _choices(record):
        size = layer.matrices[0].block_size
        if size is not None:
            matrix = stock_matrix(wide.get_submodule(layer.name))
            matrix = nn.functional.pad(matrix, (0, 0, 0, -len(matrix) % size))  # a vocabulary may end inside of a tile
            scores = tile_sums(matrix, size)
            columns[layer.name] = columns_of(choose(scores, EqualGroups(0, len(scores)), False))
    return columns


@torch.no_grad()
def set_starting_masks(model: PreTrainedModel, record: ModelRecord) -> None:
    """Give every masked layer its first mask, after it has taken over the weights that `widen_trained` made.

    The largest of the trained weights are active, but for a share that goes to new channels (`reserve` of the family).
    Under `gmp` and `granet` all weights of the projections are active at first.
    """
    is_dense_at_first = record.transformation.dst.starts_dense
    for layer, choose in _choices(record):
        module = model.get_submodule(layer.name)
        if isinstance(module, MaskedProjection) and (layer.kind in ENDS or not is_dense_at_first):
            module.set_mask(choose(module.weight.abs(), module.groups, is_conv1d(module)))


@dataclass(frozen=True)
class _Ends:
    """Factors at both ends of the model.

    Args:
        embedding: on the stored embedding.
        logits: on what the head computes of the dense model's normalised stream, to be taken back before the head.
    """

    embedding: float
    logits: float


class _Widening:
    """The parts of `widen_trained`, and what they have in common."""

    def __init__(self, dense: PreTrainedModel, wide: PreTrainedModel, record: ModelRecord) -> None:
        self.dense, self.wide = dense, wide
        self.width, self.wide_width = dense.config.hidden_size, wide.config.hidden_size
        self.root = math.sqrt(self.wide_width / self.width)
        matrices = {layer.name: layer for layer in record.layers}
        self.head = next(layer.name for layer in record.layers if layer.kind == "logits")
        self.is_tied = matrices[self.head].tied_to is not None
        readers = [layer.name for layer in record.layers if layer.kind == "logits" or _reads(layer)]
        writers = [layer.name for layer in record.layers if _writes(layer)]
        self.norms = stream_norms(dense, readers, writers)
        self.ends = self._ends()
        self.is_centred = self._check_means()
        self.behind_bare_norm = self._behind_bare_norms()
        self.done: set[str] = set()

    def _ends(self) -> _Ends:
        scales = [getattr(model.get_input_embeddings(), "embed_scale", 1.0) for model in (self.dense, self.wide)]
        embedding = self.root * float(scales[0]) / float(scales[1])  # Gemma's own factor has grown by the root already
        return _Ends(embedding, embedding if self.is_tied else 1.0)

    def _check_means(self) -> bool:
        """Whether norms take the mean off, which is that of other channels now unless writers are centred.

        Raises:
            ValueError: a writer cannot be centred.
        """
        centring = [name for name in self.norms.names if subtracts_mean(self.dense.get_submodule(name), self.width)]
        if not centring:
            return False
        reason = None
        if self.is_tied:
            reason = "its embedding, which has to be centred, is its output head, too"
        elif self.norms.writing:
            reason = f"{self.norms.writing[0]} writes to the stream what is not centred"
        elif self.norms.without_norm:
            reason = f"{self.norms.without_norm[0]} reads the stream without a norm"
        if reason is not None:
            raise ValueError(
                f"init='pretrained' cannot widen the stream of {self.dense.config.model_type}: {centring[0]} subtracts "
                f"the mean, and {reason}; {_OTHERWISE}"
            )
        return True

    def _behind_bare_norms(self) -> set[str]:
        """The matrices behind a norm that has no weight to take the factor back.

        Raises:
            ValueError: the tied head is one of them.
        """
        names = {
            reader
            for norm, readers in self.norms.reading.items()
            if next(self.dense.get_submodule(norm).parameters(), None) is None
            for reader in readers
        }
        if self.is_tied and self.head in {*names, *self.norms.without_norm}:
            raise ValueError(
                f"init='pretrained' cannot widen the stream of {self.dense.config.model_type}: no norm with a weight "
                f"stands before its output head, which is its embedding, too; {_OTHERWISE}"
            )
        return names

    def widen_matrix(self, layer: LayerSpec, seed: int) -> None:
        """Lay a trained matrix, and the bias beside it, into the wide one."""
        old: Any = self.dense.get_submodule(layer.name)
        new: Any = self.wide.get_submodule(layer.name)
        source, target = stock_matrix(old), stock_matrix(new)
        if layer.kind == "embedding":
            rows = source - source.mean(1, keepdim=True) if self.is_centred else source
            target.zero_()
            target[:, : self.width] = rows * self.ends.embedding
        elif _writes(layer):
            self._write(source, target)
            if getattr(old, "bias", None) is not None:
                self._write(old.bias, new.bias)
        elif layer.kind == "logits" or _reads(layer):
            factor = 1 / self.root if layer.name in {*self.behind_bare_norm, *self.norms.without_norm} else 1.0
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(len(target), self.wide_width - self.width, generator=generator, dtype=torch.float64)
            target[:, : self.width] = source * factor
            target[:, self.width :] = noise.to(target) * factor * source.square().mean().sqrt()
            if getattr(old, "bias", None) is not None:
                new.bias.copy_(old.bias)
        else:
            return  # a factor inside of attention
        self._adopt(layer.name)

    def _write(self, source: Tensor, target: Any) -> None:
        """Rows of a matrix that writes to the stream, or a bias, into the first channels; the others get 0."""
        target.zero_()
        target[: self.width] = (source - source.mean(0) if self.is_centred else source) * self.root

    def widen_norm(self, name: str) -> None:
        """Let a norm of the wide stream compute what it did, times the factor that is asked for behind it."""
        old, new = self.dense.get_submodule(name), self.wide.get_submodule(name)
        if next(old.parameters(), None) is None:
            return
        after = self.root if name in self.norms.writing else 1.0
        if self.head in self.norms.reading.get(name, ()):
            after = 1 / self.ends.logits
        offset = norm_offset(old)
        for parameter_name, parameter in old.named_parameters():
            target: Any = dict(new.named_parameters())[parameter_name]
            if parameter_name.endswith("weight"):
                weight = (parameter + offset) * after / self.root
                target[: self.width] = weight - offset
                target[self.width :] = weight.mean() - offset
            else:
                target.zero_()
                target[: self.width] = parameter * after
        self._adopt(name)

    def _adopt(self, name: str) -> None:
        """A module has its weights now; what was frozen stays so."""
        sources = dict(self.dense.get_submodule(name).named_parameters())
        for parameter_name, target in self.wide.get_submodule(name).named_parameters():
            target.requires_grad_(sources[parameter_name].requires_grad)
            self.done.add(f"{name}.{parameter_name}")

    def copy_others(self) -> None:
        """Copy parameters that are no part of the stream.

        Raises:
            ValueError: one has another shape.
        """
        values = dict(self.dense.named_parameters())
        for name, target in self.wide.named_parameters():
            if name in self.done:
                continue
            if target.shape != values[name].shape:
                raise ValueError(
                    f"init='pretrained' knows no start for {name} of shape {tuple(target.shape)}; {_OTHERWISE}"
                )
            target.copy_(values[name])
            target.requires_grad_(values[name].requires_grad)


def _reads(layer: LayerSpec) -> bool:
    """Whether the inputs of a projection are the stream's channels."""
    return layer.kind != "embedding" and layer.sparse_shape[1] != layer.dense_shape[1]


def _writes(layer: LayerSpec) -> bool:
    """Whether the outputs of a projection are the stream's channels."""
    return layer.kind not in ENDS and layer.sparse_shape[0] != layer.dense_shape[0]


def _choices(record: ModelRecord) -> Iterator[tuple[LayerSpec, _Choice]]:
    """Every sparse matrix, and how its first units are chosen."""
    config = record.transformation
    assert isinstance(config.family, Wide)
    for index, layer in enumerate(record.layers):
        if layer.is_sparse:
            yield layer, _Choice(layer, config.family.reserve, derive_seed(config.seed, "first mask", index))


@dataclass(frozen=True)
class _Choice:
    """Chooses the first active units of one matrix.

    Args:
        layer: whose matrix it is. The first channels of the wide stream, as many as it had in the dense model, are old.
        reserve: share of the active units that is new, within every group.
        seed: of the places of new ones.
    """

    layer: LayerSpec
    reserve: float
    seed: int

    def __call__(self, scores: Tensor, groups: Groups, is_transposed: bool) -> Tensor:
        """The mask of the units with these scores; arguments in the layout of the mask.

        Args:
            scores: magnitudes of weights or tiles. Those of new channels are not looked at.
            groups: keep numbers of their own.
            is_transposed: whether the layout is (in, out).
        """
        matrix = self.layer.matrices[0]
        tile, side = matrix.block_size or 1, 0 if _writes(self.layer) else 1
        num_old = -(-self.layer.dense_shape[side] // tile)
        if is_transposed:
            side = 1 - side
        is_new = torch.arange(scores.shape[side], device=scores.device) >= num_old
        is_new = (is_new[:, None] if side == 0 else is_new).expand_as(scores)
        generator = torch.Generator().manual_seed(self.seed)
        if self.layer.kind in ENDS:  # a group is a row of words, of which there are many
            counts = row_starts(matrix.num_active // tile**2, len(scores)).diff()
            return self._by_parts(scores, is_new, counts, generator)
        priority = spread_evenly(scores.shape[side], scores.shape[1 - side], generator).to(scores.device)
        priority = priority if side == 0 else priority.T
        return share_out(scores, priority, is_new, groups, groups.share(matrix.num_active // tile**2), self.reserve)

    def _by_parts(self, scores: Tensor, is_new: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
        """Rows that each have a number of their own, so that the work is done in parts; new ones at random."""
        masks = []
        for part in torch.arange(len(scores)).split(_ROWS_AT_ONCE):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            priority = torch.rand(scores[rows].shape, generator=generator).to(scores.device)
            groups = EqualGroups(0, len(part))
            masks.append(share_out(scores[rows], priority, is_new[rows], groups, counts[rows], self.reserve))
        return torch.cat(masks)


def _check_logits(dense: PreTrainedModel, wide: PreTrainedModel) -> None:
    """Raise ValueError unless both models compute the same of some tokens."""
    ids = torch.arange(_NUM_TOKENS, device=dense.device)[None] * 7 % dense.config.vocab_size
    found, expected = (_logits(model, ids) for model in (wide, dense))
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCES.get(dense.dtype, _TOLERANCE):
        raise ValueError(
            f"init='pretrained' cannot widen the stream of {dense.config.model_type}: its logits would change by "
            f"{difference:.1%} of the largest one, because something in the model depends on the hidden size in a way "
            f"that is not known; {_OTHERWISE}"
        )


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    training = model.training
    try:
        logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    finally:
        model.train(training)
    return logits.double()
