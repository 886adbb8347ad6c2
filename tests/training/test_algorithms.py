"""Mask-update rules on single layers: masks worked out by hand, and what every rule must preserve."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseift_llm.config.transform import DSTConfig
from sparseift_llm.layers.masked import MaskedProjection
from sparseift_llm.ops.dense_gradient import DenseGradient
from sparseift_llm.topology.masks import random_mask
from sparseift_llm.training.algorithms import ALGORITHMS, Static
from tests.helpers.tiny_runs import bits, toy_layer


def algorithm(
    name: str, total_steps: int = 100, seed: int = 0, every: int = 1, drop: float = 0.6, stop_fraction: float = 1.0
) -> Static:
    config = DSTConfig(name, update_every_steps=every, drop_fraction=drop, stop_fraction=stop_fraction)
    return ALGORITHMS[name](config, total_steps, seed)


def text(mask: Tensor) -> str:
    return " ".join("".join("1" if active else "0" for active in row) for row in mask.tolist())


# active weights 4, 1, -2, -3 in a (2, 4) layer
WEIGHT = torch.tensor([[4.0, 0.0, 1.0, 0.0], [0.0, -2.0, 0.0, -3.0]])
MASK = "1010 0101"
GRADIENT = torch.tensor([[0.1, -5.0, 0.2, 0.3], [4.0, 0.4, -6.0, 0.5]])


def updated(name: str, step: int, gradient: Tensor | None = None, seed: int = 0, index: int = 0) -> str:
    growth = None if gradient is None else gradient.abs()
    return text(algorithm(name, seed=seed).next_mask(toy_layer(WEIGHT, bits(MASK)), step, index, growth))


# ---- static


def test_static_keeps_its_mask_and_never_updates() -> None:
    rule = algorithm("static")
    assert not any(rule.is_update_step(step) for step in range(200))
    assert not rule.needs_dense_gradient
    assert updated("static", 1) == MASK


# ---- RigL


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, "1100 0011"),  # fraction just below 0.6: int(2.4) = 2 of 4 drop (1 and -2); -6 and -5 grow
        (50, "1000 0111"),  # half way, 0.3: 1 drops (1); -6 grows
        (60, "1010 0101"),  # 0.207: int(0.83) = 0, nothing changes
    ],
)
def test_rigl_by_hand(step: int, expected: str) -> None:
    assert updated("rigl", step, GRADIENT) == expected


def test_rigl_regrows_a_dropped_weight_with_the_largest_gradient() -> None:
    gradient = GRADIENT.clone()
    gradient[0, 2] = -9.0  # the weight of magnitude 1, dropped at step 50
    assert updated("rigl", 50, gradient) == MASK


@pytest.mark.parametrize(
    ("growth", "expected"),
    [
        # 7 of 8 active, weights 1 to 7; int(0.6 * 7) = 4 drop, the weights 1 to 4, and 4 of the 5 inactive ones grow
        ([0, 0, 0, 0, 0, 0, 0, 1], "1110 1111"),  # the one that was inactive, then the first of equals
        ([0, 3, 4, 2, 0, 0, 0, 1], "0111 1111"),  # not the weight of magnitude 1, whose gradient is the smallest
        ([5, 6, 7, 8, 9, 9, 9, 4], "1111 1110"),  # all that were dropped come back
        ([2, 0, 2, 2, 9, 9, 9, 2], "1011 1111"),  # what is kept does not compete
    ],
)
def test_dropped_weights_compete_where_few_are_inactive(growth: list[int], expected: str) -> None:
    """Above a density of 1 / (1 + fraction) more are dropped than were inactive; the rule does not cut that number."""
    layer = toy_layer(torch.arange(1.0, 9.0).view(2, 4), bits("1111 1110"))
    scores = torch.tensor(growth, dtype=torch.float32).view(2, 4)
    assert text(algorithm("rigl").next_mask(layer, 1, 0, scores)) == expected


def test_the_number_dropped_does_not_depend_on_how_many_are_inactive() -> None:
    """Golden masks of the rule on a (4, 5) layer of density 0.9 at a fraction of 0.3, by hand: 5 of 18 drop."""
    weight = torch.tensor(
        [
            [-9.0, 1.0, 8.0, 7.0, -2.0],
            [6.0, 5.0, 0.0, -3.0, 9.0],
            [4.0, 9.0, -8.0, 0.0, 7.0],
            [2.5, 6.0, 5.0, 1.5, -4.0],
        ]
    )
    mask = weight != 0
    gradient = torch.tensor(
        [[9.0, 0.5, 9.0, 9.0, 0.6], [9.0, 9.0, 0.4, 0.1, 9.0], [9.0, 9.0, 9.0, 0.3, 9.0], [0.2, 9.0, 9.0, 0.7, 9.0]]
    )
    # dropped: 1, 1.5, -2, 2.5, -3 with gradients .5 .7 .6 .2 .1; inactive before: .4 and .3; grown: .7 .6 .5 .4 .3
    rule = algorithm("rigl", total_steps=10, drop=0.6)
    assert int(rule.config.drop_fraction / 2 * 18) == 5
    found = rule.next_mask(toy_layer(weight, mask), 5, 0, gradient)
    assert text(found) == "11111 11101 11111 01111"


def test_rigl_grows_by_the_mean_gradient_not_the_mean_of_magnitudes() -> None:
    """Micro-batches that disagree cancel: position 1 has the larger |gradients|, position 4 the larger |sum|."""
    capture = DenseGradient()
    first, second = torch.zeros(2, 4), torch.zeros(2, 4)
    first[0, 1], second[0, 1] = 10.0, -10.0
    first[1, 0], second[1, 0] = 1.0, 1.0
    capture.add(first)
    capture.add(second)
    assert capture.total is not None
    assert updated("rigl", 50, capture.total) == "1000 1101"
    assert updated("rigl", 50, first.abs() + second.abs()) == "1100 0101"  # what a sum of magnitudes would do


def test_only_rigl_and_granet_ask_for_dense_gradients() -> None:
    assert [name for name, rule in ALGORITHMS.items() if rule.needs_dense_gradient] == ["rigl", "granet"]


def test_soft_growth_takes_turns_in_proportion_to_the_score() -> None:
    """One of three inactive weights grows; over many seeds as often as its share of the scores. A score of 0 never."""
    layer = toy_layer(torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0, 0.0]]), bits("110000"))
    scores = torch.tensor([[0.0, 0.0, 1.0, 3.0, 6.0, 0.0]])
    config = DSTConfig("rigl", 1, 0.6, stop_fraction=1.0, soft_growth=True)
    masks = [ALGORITHMS["rigl"](config, 10**6, seed).next_mask(layer, 1, 0, scores) for seed in range(2000)]
    times = torch.stack(masks).double().mean(0)[0]
    torch.testing.assert_close(times[2:], torch.tensor([0.1, 0.3, 0.6, 0.0], dtype=torch.float64), rtol=0, atol=0.04)
    assert times[0] == 0
    again = ALGORITHMS["rigl"](config, 10**6, 5).next_mask(layer, 1, 0, scores)
    assert torch.equal(masks[5], again)  # of the seed, step and layer alone


def test_what_is_dropped_is_what_the_importance_says() -> None:
    layer, growth = toy_layer(WEIGHT, bits(MASK)), GRADIENT.abs()
    importance = torch.tensor([[1.0, 0.0, 9.0, 0.0], [0.0, 9.0, 0.0, 9.0]])  # the weight of size 4 is of no use
    assert text(algorithm("rigl").next_mask(layer, 50, 0, growth, importance)) == "0010 0111"
    assert text(algorithm("rigl").next_mask(layer, 50, 0, growth)) == "1000 0111"


# ---- SET


def test_set_drops_the_smallest_and_grows_elsewhere() -> None:
    for seed in range(20):
        mask = bits(updated("set", 1, seed=seed))
        assert mask[0, 0]  # 4 and -3 are never among the two smallest
        assert mask[1, 3]
        assert mask.sum() == 4


def large_layer() -> MaskedProjection:
    weight = torch.randn(20, 20, generator=torch.Generator().manual_seed(1))
    return toy_layer(weight, random_mask(weight.shape, 100, seed=2))


def test_set_depends_on_seed_step_and_index_only() -> None:
    def grown(seed: int, step: int, index: int) -> tuple[bool, ...]:
        layer = large_layer()
        mask = algorithm("set", total_steps=10**6, seed=seed).next_mask(layer, step, index, None)
        return tuple(mask.flatten().tolist())

    reference = grown(0, 1, 0)
    torch.rand(17)  # the global generator plays no part
    assert grown(0, 1, 0) == reference
    assert len({reference, grown(1, 1, 0), grown(0, 2, 0), grown(0, 1, 1)}) == 4


def test_set_grows_every_inactive_weight_sooner_or_later() -> None:
    """Growth is random over all inactive positions, not stuck on some."""
    layer = large_layer()
    rule = algorithm("set", total_steps=10**6)
    ever = torch.zeros(20, 20, dtype=torch.bool)
    for step in range(1, 60):
        ever |= rule.next_mask(layer, step, 0, None)
    assert ever.all()


# ---- GMP


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, "1111 1111"),
        (50, "0100 0011"),  # 0.75 * (1 - 0.5^3) = 0.65625 of 8 -> 5 pruned
        (99, "0100 0011"),  # 5.999994 -> 5: never ahead of the ramp
        (100, "0100 0010"),  # exactly the 2 planned ones
        (300, "0100 0010"),
    ],
)
def test_gmp_by_hand(step: int, expected: str) -> None:
    weight = torch.tensor([[1.0, 8.0, 2.0, 3.0], [4.0, 5.0, -7.0, 6.0]])
    layer = toy_layer(weight, torch.ones(2, 4, dtype=torch.bool), num_active=2)
    assert text(algorithm("gmp").next_mask(layer, step, 0, None)) == expected


def test_gmp_updates_on_its_last_step_even_off_the_grid() -> None:
    rule = algorithm("gmp", total_steps=40, every=7, stop_fraction=0.5)
    assert [step for step in range(1, 41) if rule.is_update_step(step)] == [7, 14, 20]


def test_gmp_can_wait() -> None:
    """Between a quarter and three quarters of 40 steps, along the cubic ramp from 10 to 30."""
    config = DSTConfig("gmp", update_every_steps=5, start_fraction=0.25, stop_fraction=0.75)
    rule = ALGORITHMS["gmp"](config, 40, 0)
    assert [step for step in range(1, 41) if rule.is_update_step(step)] == [15, 20, 25, 30]
    layer = toy_layer(torch.arange(1.0, 9.0).view(2, 4), torch.ones(2, 4, dtype=torch.bool), num_active=2)
    counts = {step: int(rule.next_mask(layer, step, 0, None).sum()) for step in (15, 20, 25, 30)}
    assert counts == {15: 8 - int(6 * (1 - 0.75**3)), 20: 8 - int(6 * (1 - 0.5**3)), 25: 3, 30: 2}


def test_granet_prunes_and_regrows_by_hand() -> None:
    """Half way of 100 steps 3 of 8 stay (8, 6 and -7); of these a share is exchanged, rounded down."""
    weight = torch.tensor([[1.0, 8.0, 2.0, 3.0], [4.0, 5.0, -7.0, 6.0]])
    growth = torch.tensor([[9.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    layer = toy_layer(weight, torch.ones(2, 4, dtype=torch.bool), num_active=2)
    rule = algorithm("granet", drop=0.9)
    assert text(rule.next_mask(layer, 50, 0, growth)) == "1100 0010"  # the 6 goes: int(0.45 * 3) = 1
    assert text(algorithm("granet", drop=0.6).next_mask(layer, 50, 0, growth)) == "0100 0011"  # int(0.3 * 3) = 0
    assert text(rule.next_mask(layer, 100, 0, growth)) == "0100 0010"  # in the end nothing is exchanged
    assert [rule.is_update_step(step) for step in (99, 100, 101)] == [True, True, False]


def test_gmp_reaches_its_target_in_the_shortest_run() -> None:
    """One step in all, of which 75% rounds down to none: the model must still not end up dense."""
    rule = algorithm("gmp", total_steps=1, stop_fraction=0.75)
    assert rule.is_update_step(1)


# ---- invariants

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["static", "set", "rigl"]),
    shape=shapes,
    density=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    drop=st.floats(0.01, 0.99),
    every=st.integers(1, 3),
)
def test_active_weights_are_conserved(
    name: str, shape: tuple[int, int], density: float, seed: int, drop: float, every: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_active = round(density * shape[0] * shape[1])
    mask = random_mask(torch.Size(shape), num_active, seed)
    layer = toy_layer(torch.randn(shape, generator=generator), mask)
    rule = algorithm(name, total_steps=30, seed=seed, every=every, drop=drop, stop_fraction=0.8)
    for step in range(1, 31):
        before = layer.mask.clone()
        if rule.is_update_step(step):
            assert step < 24
            gradient = torch.randn(shape, generator=generator).round()  # rounded: ties are frequent
            layer.set_mask(rule.next_mask(layer, step, 0, gradient))
            with torch.no_grad():
                layer.weight += torch.randn(shape, generator=generator).round() * layer.mask
        assert int(layer.mask.sum()) == num_active
        assert int((before & ~layer.mask).sum()) <= drop * num_active


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    density=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    total=st.integers(2, 40),
    every=st.integers(1, 9),
    stop_fraction=st.floats(0.5, 1),
)
def test_gmp_only_prunes_and_ends_on_its_target(
    shape: tuple[int, int], density: float, seed: int, total: int, every: int, stop_fraction: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    target = round(density * shape[0] * shape[1])
    layer = toy_layer(torch.randn(shape, generator=generator), torch.ones(shape, dtype=torch.bool), target)
    rule = algorithm("gmp", total_steps=total, every=every, stop_fraction=stop_fraction)
    for step in range(1, total + 1):
        before = layer.mask.clone()
        if rule.is_update_step(step):
            layer.set_mask(rule.next_mask(layer, step, 0, None))
        assert not (layer.mask & ~before).any()
        assert int(layer.mask.sum()) >= target
    assert int(layer.mask.sum()) == target
