"""`init="pretrained"`: what each family makes of a trained weight, and exactness where it is claimed."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparseift_llm import to_dense
from sparseift_llm.config.families import Doped, Factorized, Parallel
from sparseift_llm.families.base import DropInFamily, TrainedProjection
from sparseift_llm.families.doped import DopedFamily
from sparseift_llm.families.factorized import FactorizedFamily
from sparseift_llm.families.parallel import ParallelFamily
from sparseift_llm.families.sparse_factors import pass_through
from sparseift_llm.families.trained_start import (
    NEW_UNIT_SHARE,
    spread,
    start_of_inputs,
    start_of_largest,
    start_of_outputs,
)
from sparseift_llm.layers.base import SparseProjection, sparse_layers
from sparseift_llm.layers.composite import CompositeProjection, Part
from tests.helpers.models import gradients_of, logits_of
from tests.helpers.patterns import by_hand_in_blocks, is_patterned, wrong_groups
from tests.helpers.pretrained_starts import dense_model, every_arch, every_structure, ffn_matrices, matrix_of, started


@torch.no_grad()
def without_smallest(dense: PreTrainedModel, share: float) -> PreTrainedModel:
    """A copy of which this share of every FFN matrix, the smallest weights, is 0."""
    model = copy.deepcopy(dense)
    for module in ffn_matrices(model).values():
        flat: Any = module.weight
        order = flat.abs().flatten().argsort()
        flat.view(-1)[order[: round(share * len(order))]] = 0
    return model


def trained(weight: Tensor) -> TrainedProjection:
    return TrainedProjection(weight, "o", (1, 1))


# ---- one matrix


@pytest.mark.parametrize("number", [1, 4, 8])
def test_single_weights_by_magnitude_are_the_best_choice(number: int) -> None:
    values = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = start_of_largest(values, Part("w", (3, 3), number), 1)
    error = (values - start.values).square().sum()
    flat = values.flatten()
    best = min(flat[list(dropped)].square().sum() for dropped in combinations(range(9), 9 - number))
    torch.testing.assert_close(error, best)
    assert start.mask is not None
    assert int(start.mask.sum()) == int((start.values != 0).sum()) == number


def test_tiles_by_l1_norm_are_the_best_choice_of_every_block_row() -> None:
    """Three tiles in two block-rows of four: one and two, by the fixed layout."""
    values = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    start = start_of_largest(values, Part("w", (4, 8), 12), 2)
    tiles = values.view(2, 2, 4, 2).abs().sum((1, 3))
    assert start.mask is not None
    for row, number in enumerate((1, 2)):
        best = max(combinations(range(4), number), key=lambda chosen: float(tiles[row][list(chosen)].sum()))
        assert tuple(start.mask[row].nonzero()[:, 0].tolist()) == best
    assert torch.equal(start.values, torch.where(spread(start.mask, 2, values), values, 0))


def test_two_of_four_are_the_largest_of_every_four() -> None:
    values = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    start = start_of_largest(values, Part("w", (3, 8), 12, pattern=(2, 4)), 1)
    assert start.mask is not None
    for row, mask in zip(values.tolist(), start.mask.tolist(), strict=True):
        for first in (0, 4):
            group = [abs(value) for value in row[first : first + 4]]
            assert [size in sorted(group)[2:] for size in group] == mask[first : first + 4]
    assert torch.equal(start.values, values * start.mask)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 3)])
def test_transposable_masks_are_the_best_pattern_of_every_block(pattern: tuple[int, int]) -> None:
    n, m = pattern
    values = torch.randn(2 * m, 3 * m, generator=torch.Generator().manual_seed(1))
    start = start_of_largest(values, Part("w", (2 * m, 3 * m), 6 * n * m, pattern=pattern, transposable=True), 1)
    nothing = torch.zeros_like(values, dtype=torch.bool)
    assert start.mask is not None
    assert torch.equal(start.mask, by_hand_in_blocks(nothing, nothing, values.abs().double(), 0, n, m))
    assert torch.equal(start.values, values * start.mask)


def test_new_units_of_a_transposable_matrix_have_as_many_weights_as_old_ones() -> None:
    """In a block of old and new ones the old keep what is best for them: without the new ones' noise it is the same."""
    generator = torch.Generator().manual_seed(0)
    is_old = torch.arange(16) % 8 < 6  # the second block of four has two of each
    into, out_of = torch.randn(16, 8, generator=generator), torch.randn(8, 16, generator=generator)
    part = Part("u", (16, 8), 64, pattern=(2, 4), transposable=True)
    before = start_of_inputs(into, is_old, part, 1, 3)
    behind = start_of_outputs(out_of, is_old, replace(part, shape=(8, 16)), 1, 4)
    for start, values in ((before, into * is_old[:, None]), (behind, out_of * is_old)):
        assert start.mask is not None
        assert is_patterned(start.mask, 2, 4)
        nothing = torch.zeros_like(start.mask)
        best = by_hand_in_blocks(nothing, nothing, values.abs().double(), 0, 2, 4)
        torch.testing.assert_close(values[start.mask].abs().sum(), values[best].abs().sum())
    assert before.mask is not None
    assert torch.equal(before.values[is_old], (into * before.mask)[is_old])
    assert before.values[~is_old][before.mask[~is_old]].abs().min() > 0
    assert not behind.values[:, ~is_old].any()


@pytest.mark.parametrize(("pattern", "num_branches"), [((2, 4), 2), ((1, 4), 4), ((1, 3), 3), ((2, 3), 2), ((3, 4), 1)])
def test_transposable_branches_hold_all_that_they_can(pattern: tuple[int, int], num_branches: int) -> None:
    n, m = pattern
    weight = torch.randn(4 * m, 5 * m, generator=torch.Generator().manual_seed(0))
    parts = tuple(
        Part(f"branches.{index}", (4 * m, 5 * m), 20 * m * n, pattern=pattern, transposable=True)
        for index in range(num_branches)
    )
    starts = ParallelFamily(Parallel()).start(trained(weight), parts, 1, 0)
    for start in starts.values():
        assert start.mask is not None
        assert is_patterned(start.mask, n, m)
        assert not start.values[~start.mask].any()
    total = sum(start.values for start in starts.values())
    if num_branches * n >= m:
        assert torch.equal(total, weight)
    else:
        nothing = torch.zeros_like(weight, dtype=torch.bool)
        assert torch.equal(total, weight * by_hand_in_blocks(nothing, nothing, weight.abs().double(), 0, n, m))


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_wider_ffn_of_2_4_keeps_the_largest_of_every_four(arch: str) -> None:
    dense = dense_model(arch)
    model = started(dense, "wide", "2:4")
    assert wrong_groups(model, 2, 4) == []
    for name, module in ffn_matrices(dense).items():
        before, after = matrix_of(module), matrix_of(model.get_submodule(name))
        kept = after[: before.shape[0], : before.shape[1]]  # new units stand behind the old ones
        smallest = before.abs().unflatten(1, (-1, 4)).sort(2).values[:, :, :2].amax(2, keepdim=True)
        expected = before * (before.abs() > smallest.expand(-1, -1, 4).flatten(1))
        assert torch.equal(kept, expected), name


@pytest.mark.parametrize("tile", [1, 2])
def test_new_units_share_in_the_active_weights(tile: int) -> None:
    """64 old and 192 new units of 64 inputs and outputs: a tenth of the weights, in every new unit equally many."""
    generator = torch.Generator().manual_seed(0)
    into, out_of = torch.randn(256, 64, generator=generator), torch.randn(64, 256, generator=generator)
    is_old = torch.arange(256) < 64
    number = 64 * 64
    before = start_of_inputs(into, is_old, Part("u", (256, 64), number), tile, 3)
    behind = start_of_outputs(out_of, is_old, Part("v", (64, 256), number), tile, 4)
    assert before.mask is not None
    assert behind.mask is not None
    for start in (before, behind):
        assert start.mask is not None
        assert int(start.mask.sum()) * tile**2 == number
        assert not start.values[~spread(start.mask, tile, start.values)].any()
    active = spread(before.mask, tile, into)
    fan_in, fan_out = active.sum(1)[~is_old], spread(behind.mask, tile, out_of).sum(0)[~is_old]
    assert fan_in.min() > 0
    assert not behind.values[:, ~is_old].any()
    assert torch.equal(before.values[is_old], torch.where(active, into, 0)[is_old])
    if tile == 1:
        assert fan_in.sum() == fan_out.sum() == round(NEW_UNIT_SHARE * number)
        assert fan_in.max() - fan_in.min() <= 1
        assert fan_out.max() - fan_out.min() <= 1
        # of the variance of the old units, if their inputs were independent
        assert before.values[~is_old].square().sum(1).mean() == pytest.approx(64, rel=0.3)
    else:
        assert fan_out.sum() == 32 * 3 * tile**2  # three tiles of 32 in each of 32 block-rows
        assert fan_out.min() == fan_out.max() == tile  # at places of their own


# ---- Parallel


@every_structure
@every_arch
def test_parallel_is_the_dense_model(arch: str, structure: str) -> None:
    dense = dense_model(arch)
    sparse = started(dense, "parallel", structure)
    torch.testing.assert_close(logits_of(sparse), logits_of(dense), rtol=1e-10, atol=1e-12)
    stock = to_dense(sparse)
    for name, module in sparse.named_modules():
        if isinstance(module, CompositeProjection):
            assert torch.equal(matrix_of(stock.get_submodule(name)), matrix_of(dense.get_submodule(name))), name
    layer = next(iter(sparse_layers(sparse).values()))  # a planted fault: one of its weights
    with torch.no_grad():
        layer.weight.view(-1)[layer.weight.flatten().nonzero()[0]] = 0
    with pytest.raises(AssertionError):
        torch.testing.assert_close(logits_of(sparse), logits_of(dense), rtol=1e-10, atol=1e-12)


def test_parallel_with_tiles_that_branches_do_not_divide() -> None:
    """Six tiles in a row for four branches: rows hold four and eight by turns, so the two smallest of four are lost."""
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    parallel = ParallelFamily(Parallel())
    parts = parallel.parts((8, 12), 0.75, 2, 2)
    starts = parallel.start(trained(weight), parts, 2, 0)
    for part in parts:
        mask = starts[part.name].mask
        assert mask is not None
        assert int(mask.sum()) * 4 == part.num_active
    total = sum(start.values for start in starts.values())
    assert isinstance(total, Tensor)
    held = (total.view(4, 2, 6, 2) != 0).any(3).any(1)
    assert held.sum(1).tolist() == [4, 6, 4, 6]
    norms = weight.view(4, 2, 6, 2).abs().sum((1, 3))
    for row in (0, 2):
        assert norms[row][held[row]].min() > norms[row][~held[row]].max()
    assert torch.equal(
        total[held.repeat_interleave(2, 0).repeat_interleave(2, 1)],
        weight[held.repeat_interleave(2, 0).repeat_interleave(2, 1)],
    )


# ---- Factorized and Doped


@pytest.mark.parametrize(("shape", "inner"), [((24, 16), 5), ((16, 40), 12)])
def test_factorized_is_the_best_approximation_where_weights_are_not_short(shape: tuple[int, int], inner: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, v = Part("u", (inner, shape[1]), inner * shape[1]), Part("v", (shape[0], inner), inner * shape[0])
    starts = FactorizedFamily(Factorized()).start(trained(weight), (u, v), 1, 0)
    best = torch.linalg.svdvals(weight)[inner:].square().sum()

    def error() -> Tensor:
        return (weight - starts["v"].values @ starts["u"].values).square().sum()

    torch.testing.assert_close(error(), best, rtol=1e-10, atol=0)
    norms = starts["u"].values.norm(dim=1), starts["v"].values.norm(dim=0)
    torch.testing.assert_close(*norms)  # balanced
    starts["u"].values[0, 0] += 0.1  # a planted fault
    assert error() > best * (1 + 1e-6)


@pytest.mark.parametrize("tile", [1, 8])
@pytest.mark.parametrize("sparse_u_only", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 256)])
def test_passing_through_keeps_entries_as_they_are(shape: tuple[int, int], sparse_u_only: bool, tile: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, v = FactorizedFamily(Factorized(sparse_u_only=sparse_u_only)).parts(shape, 0.75, tile, tile)
    starts = pass_through(weight, u, v, tile, 0)
    assert starts is not None
    for part, start in zip((u, v), starts, strict=True):
        assert (start.mask is not None) == part.is_sparse
        active = spread(start.mask, tile, start.values)
        assert int(active.sum()) == part.num_active
        assert not start.values[~active].any()
    product = starts[1].values @ starts[0].values
    is_kept = product.abs() > 1e-12
    torch.testing.assert_close(product[is_kept], weight[is_kept], rtol=1e-10, atol=0)
    assert product[is_kept].square().sum() > (0.55 if sparse_u_only else 0.75) * weight.square().sum()
    if not sparse_u_only and tile == 1:
        assert is_kept.double().mean() > 0.75
        assert product.square().sum() > 0.97 * weight.square().sum()  # what is lost is small


@pytest.mark.parametrize("tile", [1, 8])
def test_factorized_takes_the_nearer_way(tile: int) -> None:
    """Full singular vectors lose most with few tiles, and nothing where the rank is low and tiles suffice."""
    generator = torch.Generator().manual_seed(0)
    factorized = FactorizedFamily(Factorized())
    parts = factorized.parts((64, 64), 0.75, tile, tile)
    weight = torch.randn(64, 64, dtype=torch.float64, generator=generator)
    passed = pass_through(weight, *parts, tile, 5)
    starts = factorized.start(trained(weight), parts, tile, 5)
    assert passed is not None
    assert torch.equal(starts["u"].values, passed[0].values)
    low = torch.randn(64, 2, dtype=torch.float64, generator=generator)
    low = low @ torch.randn(2, 64, dtype=torch.float64, generator=generator)
    if tile == 1:  # 2 x 64 numbers in each factor, where there is room for 2048
        starts = factorized.start(trained(low), parts, tile, 5)
        torch.testing.assert_close(starts["v"].values @ starts["u"].values, low, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tile", [1, 8])
def test_doped_dopes_with_the_largest_of_what_is_left(tile: int) -> None:
    weight = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    doped = DopedFamily(Doped())
    parts = doped.parts((64, 64), 0.5, tile, tile)
    starts = doped.start(trained(weight), parts, tile, 0)
    rank = parts[1].shape[0]
    low_rank = starts["v"].values @ starts["u"].values
    left = weight - low_rank
    torch.testing.assert_close(left.square().sum(), torch.linalg.svdvals(weight)[rank:].square().sum())
    expected = start_of_largest(left, parts[0], tile)
    torch.testing.assert_close(starts["w"].values, expected.values, rtol=1e-9, atol=1e-9)
    assert int((starts["w"].values != 0).sum()) == parts[0].num_active


@pytest.mark.parametrize("family", [FactorizedFamily(Factorized()), DopedFamily(Doped())])
def test_a_weight_of_lower_rank_leaves_no_dead_units(family: DropInFamily[Any]) -> None:
    """Of zeros, even: then all inner units are new."""
    parts = family.parts((32, 32), 0.5, 1, 1)
    for weight in (torch.zeros(32, 32), torch.outer(torch.arange(32.0), torch.ones(32))):
        starts = family.start(trained(weight), parts, 1, 0)
        alive = (starts["u"].values != 0).any(1) | (starts["v"].values != 0).any(0)
        assert all(bool(start.values.isfinite().all()) for start in starts.values())
        assert alive.all()


# ---- Wide


@every_arch
def test_wide_keeps_all_but_the_smallest_weights(arch: str) -> None:
    """The dense model without a tenth of its FFN weights is the twin, so only that tenth can change anything."""
    dense = without_smallest(dense_model(arch), NEW_UNIT_SHARE)
    sparse = started(dense, "wide")
    torch.testing.assert_close(logits_of(sparse), logits_of(dense), rtol=1e-10, atol=1e-12)
    for name, layer in sparse_layers(sparse).items():
        old, wide = matrix_of(dense.get_submodule(name)), matrix_of(layer)
        assert torch.equal(wide[: len(old), : old.shape[1]], old), name
    *_, (name, down) = sparse_layers(sparse).items()
    with torch.no_grad():  # a planted fault: a new unit that is heard
        column = down.weight[-1] if isinstance(down, Conv1D) else down.weight[:, -1]
        column += torch.linspace(-1, 1, len(column))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(logits_of(sparse), logits_of(dense), rtol=1e-10, atol=1e-12)


def test_wide_of_any_model_is_that_of_its_largest_weights() -> None:
    dense = dense_model("llama")
    sparse, pruned = started(dense, "wide"), started(without_smallest(dense, NEW_UNIT_SHARE), "wide")
    torch.testing.assert_close(logits_of(sparse), logits_of(pruned), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(logits_of(sparse), logits_of(dense), rtol=1e-10)


@every_structure
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_new_units_learn(arch: str, structure: str) -> None:
    """Their outgoing weights get a gradient at once, their incoming ones after a step."""
    sparse = started(dense_model(arch), "wide", structure)
    layers = list(sparse_layers(sparse).items())
    up, down = layers[0][0], layers[-1][0]
    new = slice(128, None)

    def of_new_units(name: str, gradients: dict[str, Tensor]) -> Tensor:
        layer = copy.deepcopy(sparse.get_submodule(name))
        assert isinstance(layer, SparseProjection)
        with torch.no_grad():
            layer.weight.copy_(gradients[f"{name}.weight"])
        matrix = matrix_of(layer.to_dense())
        return matrix[new] if name == up else matrix[:, new]

    gradients = gradients_of(sparse)
    assert of_new_units(down, gradients).any()
    assert not of_new_units(up, gradients).any()
    with torch.no_grad():
        for name, parameter in sparse.named_parameters():
            parameter -= 0.1 * gradients[name]
    assert of_new_units(up, gradients_of(sparse)).any()
