"""Sizes and FLOPs against the published GPT-3 Small figures and against arithmetic done by hand."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sparseift_llm import isoflop
from sparseift_llm.isoflop import FlopCount, forward_flops, num_active_for_whole_model, round_size

SMALL_WEIGHTS = 12 * (3 + 1 + 4 + 4) * 768 * 768  # layers x (qkv, o, two FFN matrices)


@pytest.mark.parametrize(("sparsity", "hidden"), [(0.0, 768), (0.5, 1092), (0.75, 1536)])
def test_gpt3_small_widths(sparsity: float, hidden: int) -> None:
    assert round_size(768 * isoflop.wide_model_factor(sparsity), 12) == hidden
    assert {768: 3072, 1092: 4368, 1536: 6144}[hidden] == 4 * hidden


@pytest.mark.parametrize(("sparsity", "factor"), [(0.0, 1.0), (0.5, 2**0.5), (0.75, 2.0), (0.9375, 4.0)])
def test_width_factors(sparsity: float, factor: float) -> None:
    assert isoflop.wide_model_factor(sparsity) == pytest.approx(factor, rel=1e-15)
    assert isoflop.wide_ffn_factor(sparsity) == pytest.approx(factor**2, rel=1e-15)


@pytest.mark.parametrize(
    ("hidden", "megaflops", "ratio"), [(768, 284.8, 1.0), (1092, 333.3, 1.17), (1536, 399.8, 1.40)]
)
def test_gpt3_small_flops(hidden: int, megaflops: float, ratio: float) -> None:
    dense = forward_flops(SMALL_WEIGHTS, 1024, 768, 12, 768, 50257)
    flops = forward_flops(SMALL_WEIGHTS, 1024, hidden, 12, hidden, 50257)
    assert round(flops.forward / 1e6, 1) == megaflops
    assert round(flops.forward / dense.forward, 2) == ratio


def test_gpt3_small_needs_density_0081_to_be_iso_flop_as_a_whole() -> None:
    dense = forward_flops(SMALL_WEIGHTS, 1024, 768, 12, 768, 50257)
    around = forward_flops(0, 1024, 1536, 12, 1536, 50257)
    num_active = num_active_for_whole_model(dense.forward, around)
    assert round(num_active / (4 * SMALL_WEIGHTS), 3) == 0.081


def test_forward_flops_by_hand() -> None:
    flops = forward_flops(num_active=10, seq_len=3, attention_width=5, num_layers=2, hidden_size=7, vocab_size=11)
    assert flops == FlopCount(linear=20, attention=120, logit=154)
    assert flops.forward == 294
    assert flops.training == 882


def test_a_run_is_three_forwards_per_token_and_what_dynamic_sparse_training_adds() -> None:
    around = FlopCount(linear=1, attention=2, logit=4)
    assert isoflop.run_flops(10, 3, around) == 10 * 3 * 3 * 7
    # 5 active weights summed over the steps, three times a multiply-add; 4 weights of dense gradient, once
    assert isoflop.run_flops(10, 3, around, 5, 4) == 10 * (3 * 3 * 7 + 3 * 2 * 5 + 2 * 4)


@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 1000), st.integers(0, 1000))
def test_a_run_with_fixed_masks_costs_its_steps(tokens: int, num_steps: int, active: int, other: int) -> None:
    whole = FlopCount(linear=2 * (active + other), attention=6, logit=8)
    around = FlopCount(linear=2 * other, attention=6, logit=8)
    total = isoflop.run_flops(tokens, num_steps, around, active_weight_steps=active * num_steps)
    assert total == tokens * num_steps * whole.training


def test_train_state_bytes_by_hand() -> None:
    assert isoflop.train_state_bytes(num_stored=10, topology_bytes=6) == 10 * 4 * 4 + 6


@given(
    counts=st.tuples(*[st.integers(1, 10**6)] * 4),
    num_active=st.integers(0, 10**9),
    seq_len=st.integers(1, 4096),
)
def test_whole_model_solution_meets_the_target(
    counts: tuple[int, int, int, int], num_active: int, seq_len: int
) -> None:
    target = forward_flops(num_active, seq_len, *counts).forward
    around = forward_flops(0, seq_len, *counts)
    assert num_active_for_whole_model(target, around) == num_active
    assert num_active_for_whole_model(target + 1, around) == num_active


def test_whole_model_solution_is_not_positive_when_there_is_nothing_left() -> None:
    assert num_active_for_whole_model(100, FlopCount(0, 60, 40)) == 0
    assert num_active_for_whole_model(100, FlopCount(10, 60, 40)) == -5


@pytest.mark.parametrize(
    ("size", "multiple", "rounded"),
    [
        (1086.1, 12, 1092),
        (1086.1, 1, 1086),
        (1536.0, 12, 1536),
        (18.0, 12, 24),  # a tie goes up
        (17.999, 12, 12),
        (2.5, 1, 3),
        (0.2, 1, 1),  # never below one multiple
        (5.0, 64, 64),
    ],
)
def test_round_size_by_hand(size: float, multiple: int, rounded: int) -> None:
    assert round_size(size, multiple) == rounded


@pytest.mark.parametrize(("size", "rounded"), [(9.0, 12), (7.0, 4), (8.0, 12), (4.4, 4)])
def test_round_size_skips_sizes_that_are_not_valid(size: float, rounded: int) -> None:
    assert round_size(size, 4, lambda candidate: candidate % 8 == 4) == rounded


def test_round_size_without_any_valid_size() -> None:
    with pytest.raises(ValueError, match=r"no valid size that is a multiple of 4 near 100\.0; change width_multiple"):
        round_size(100.0, 4, lambda _: False)


@given(st.floats(0.1, 1e5), st.integers(1, 512))
def test_round_size_is_a_nearest_multiple(size: float, multiple: int) -> None:
    rounded = round_size(size, multiple)
    assert rounded % multiple == 0
    assert rounded >= multiple
    assert rounded == multiple or abs(rounded - size) <= multiple / 2


@given(st.floats(0.1, 300), st.integers(1, 20), st.sets(st.integers(0, 9), min_size=1))
def test_round_size_equals_a_search_over_all_sizes(size: float, multiple: int, digits: set[int]) -> None:
    candidates = [n for n in range(multiple, 2000, multiple) if n % 10 in digits]
    assume(candidates)
    best = min(candidates, key=lambda n: (abs(n - size), -n))
    assert round_size(size, multiple, lambda n: n % 10 in digits) == best
