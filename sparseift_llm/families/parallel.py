"""Sparse Parallel: y = sum over j of g_j(W_j x) + bias, W_j sparse, g_j a LayerNorm or nothing."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor, nn

from sparseift_llm import isoflop
from sparseift_llm.config.families import Parallel
from sparseift_llm.families.base import DropInFamily, TrainedProjection
from sparseift_llm.families.trained_start import Start, blocks_of, counts_per_row, largest_units, places, spread
from sparseift_llm.layers.composite import CompositeProjection, MakePart, Part, make_parts, matrix_of, root_mean_square
from sparseift_llm.topology.blocks import tile_sums
from sparseift_llm.topology.distributions import round_to_total
from sparseift_llm.topology.masks import random_scores


class ParallelFamily(DropInFamily[Parallel]):
    """The branches in place of a projection. Their number is 1 / (1 - sparsity), rounded."""

    name = Parallel.name

    def parts(self, shape: tuple[int, int], sparsity: float, tile: int, multiple: int) -> tuple[Part, ...]:
        num_branches = isoflop.parallel_branches(sparsity)
        units = shape[0] * shape[1] // tile**2
        counts = round_to_total([Fraction(units, num_branches)] * num_branches, [units] * num_branches, units)
        return tuple(Part(f"branches.{index}", shape, count * tile**2) for index, count in enumerate(counts))

    def num_norm_params(self, shape: tuple[int, int], parts: tuple[Part, ...]) -> int:
        return 0 if self.options.nonlinearity == "none" else 2 * shape[0] * len(parts)

    def start(self, trained: TrainedProjection, parts: tuple[Part, ...], tile: int, seed: int) -> dict[str, Start]:
        """Deal the entries (or tiles) of a trained weight to the branches at random, so that they sum to it exactly.

        With tiles a block-row holds a fixed number in every branch. Where these do not add up to all tiles of the row
        (the number of branches does not divide it), the smallest ones are left out, or zeros fill the rest. So it is
        with transposable masks, where every branch after the first takes as much as it can of what is left.
        """
        weight = trained.weight
        if parts[0].transposable:
            return _deal_blocks(weight, parts, seed)
        scores = weight.abs() if tile == 1 else tile_sums(weight, tile)
        counts = torch.stack([counts_per_row(part, tile) for part in parts]).to(weight.device)
        rows = scores.reshape(counts.shape[1], -1)
        everything = torch.ones_like(rows, dtype=torch.bool)
        num_kept = counts.sum(0).clamp(max=rows.shape[1])
        kept = largest_units(rows, everything, num_kept)
        noise = random_scores(rows.shape, seed).to(weight.device)
        place = places(noise.masked_fill(~kept, torch.inf))
        starts, end = {}, torch.zeros_like(counts[0])
        for part, count in zip(parts, counts, strict=True):
            begin, end = end, end + count
            dealt = kept & (place >= begin[:, None]) & (place < end[:, None])
            mask = dealt | largest_units(noise, ~dealt, count - dealt.sum(1))
            values = weight.masked_fill(~spread(dealt.view(scores.shape), tile, weight), 0)
            starts[part.name] = Start(values, mask.view(scores.shape) if part.is_sparse else None)
        return starts

    def build(self, dense: nn.Module, parts: tuple[Part, ...], make: MakePart, preserve: bool) -> CompositeProjection:
        return ParallelProjection(dense, self.options, parts, make, preserve)


def _deal_blocks(weight: Tensor, parts: tuple[Part, ...], seed: int) -> dict[str, Start]:
    """The same for transposable masks: what is left of a block after a pattern always holds another one.

    Where less than all of a block is dealt, branches take its largest entries, and otherwise random ones.
    """
    blocks, noise = blocks_of(parts[0]), random_scores(weight.shape, seed).to(weight.device)
    is_dealt_whole = sum(part.num_active for part in parts) >= weight.numel()
    scores = 1 + noise / 16 if is_dealt_whole else weight.abs()  # one entry more of a dozen counts for more than noise
    starts, is_left = {}, torch.ones_like(weight, dtype=torch.bool)
    for part in parts:
        mask = blocks.best(scores.masked_fill(~is_left, 0))
        starts[part.name] = Start(weight.masked_fill(~(mask & is_left), 0), mask)
        is_left &= ~mask
    return starts


class ParallelProjection(CompositeProjection):
    """y = sum over j of g_j(W_j x) + bias. Arguments as `DropInFamily.build`; `options` say which g."""

    def __init__(
        self, dense: nn.Module, options: Parallel, parts: tuple[Part, ...], make: MakePart, preserve: bool
    ) -> None:
        super().__init__(dense)
        std = root_mean_square(dense)
        layers = make_parts(parts, {part.name: std for part in parts}, make)
        self.branches = nn.ModuleList(layers.values())
        self.norms = nn.ModuleList()
        if options.nonlinearity != "none":
            weight: Tensor = dense.weight  # type: ignore[assignment]
            for _ in parts:
                norm = nn.LayerNorm(self.out_features, device=weight.device, dtype=weight.dtype)
                if preserve:
                    nn.init.constant_(norm.weight, std * math.sqrt(self.in_features / len(parts)))
                self.norms.append(norm)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        outputs = [branch(input) for branch in self.branches]
        if self.norms:
            outputs = [norm(output) for norm, output in zip(self.norms, outputs, strict=True)]
        return self._add_bias(torch.stack(outputs).sum(0) if len(outputs) > 1 else outputs[0])

    def matrix(self) -> Tensor:
        if self.norms:
            raise ValueError(
                "Parallel with a LayerNorm in each branch is not a linear map, so there is no stock model of equal "
                "logits; keep the sparse model, or train with nonlinearity='none'"
            )
        return torch.stack([matrix_of(branch) for branch in self.branches]).sum(0)
