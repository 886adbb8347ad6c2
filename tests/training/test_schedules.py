"""When masks change and by how much: literals, end points, and monotony."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sparseift_llm.training.schedules import (
    DROP_SCHEDULES,
    cosine_drop_fraction,
    cubic_sparsity,
    is_pruning_step,
    is_update_step,
    start_step,
    stop_step,
)

stops = st.integers(1, 100_000)
fractions = st.floats(0.01, 0.99)


@pytest.mark.parametrize(
    ("total", "fraction", "stop"),
    [(1000, 0.75, 750), (21511, 0.8, 17208), (7, 0.5, 3), (10, 1.0, 10), (10, 0.7, 7), (1, 0.75, 1), (100, 0.29, 29)],
)
def test_stop_step(total: int, fraction: float, stop: int) -> None:
    assert stop_step(total, fraction) == stop


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cosine", [0.3, 0.15, 0.0]), ("constant", [0.3, 0.3, 0.3]), ("exponential", [0.3, 0.03, 0.003])],
)
def test_drop_schedules_at_the_start_half_way_and_at_the_end(name: str, expected: list[float]) -> None:
    assert [DROP_SCHEDULES[name](step, 200, 0.3) for step in (0, 100, 200)] == pytest.approx(expected)


def test_pruning_that_begins_later() -> None:
    assert start_step(1000, 0.25) == 250
    assert start_step(100, 0.29) == 29
    ramp = [cubic_sparsity(step, 300, 0.8, start=100) for step in (0, 100, 200, 300, 400)]
    assert ramp == pytest.approx([0, 0, 0.8 * 0.875, 0.8, 0.8])


@given(st.integers(1, 10_000), st.integers(1, 100))
@example(100, 57)
def test_stop_step_of_whole_percentages_is_exact(total: int, percent: int) -> None:
    assert stop_step(total, percent / 100) == max(1, total * percent // 100)


def test_update_steps() -> None:
    assert [step for step in range(16) if is_update_step(step, 4, 13)] == [4, 8, 12]
    assert [step for step in range(16) if is_update_step(step, 4, 12)] == [4, 8]
    assert [step for step in range(6) if is_update_step(step, 1, 4)] == [1, 2, 3]
    assert [step for step in range(16) if is_update_step(step, 20, 13)] == []


def test_pruning_steps_end_on_the_stop() -> None:
    assert [step for step in range(16) if is_pruning_step(step, 4, 13)] == [4, 8, 12, 13]
    assert [step for step in range(16) if is_pruning_step(step, 4, 12)] == [4, 8, 12]
    assert [step for step in range(16) if is_pruning_step(step, 20, 13)] == [13]


@given(every=st.integers(1, 50), stop=st.integers(1, 500))
def test_number_of_updates(every: int, stop: int) -> None:
    updates = [step for step in range(stop + 100) if is_update_step(step, every, stop)]
    assert len(updates) == (stop - 1) // every
    pruning = [step for step in range(stop + 100) if is_pruning_step(step, every, stop)]
    assert pruning == [*updates, stop]


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.3), (250, 0.225), (375, 0.15), (500, 0.075), (750, 0.0)],  # cos of 0, 60, 90, 120, 180 degrees
)
def test_cosine_literals(step: int, expected: float) -> None:
    assert cosine_drop_fraction(step, 750, 0.3) == pytest.approx(expected, abs=1e-15)


@given(stops, fractions)
def test_cosine_runs_from_alpha_to_zero(stop: int, alpha: float) -> None:
    assert cosine_drop_fraction(0, stop, alpha) == alpha
    assert cosine_drop_fraction(stop, stop, alpha) == 0


@given(stops, fractions, st.data())
def test_cosine_falls_and_is_symmetric(stop: int, alpha: float, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, stop - 1))
    here, after = cosine_drop_fraction(step, stop, alpha), cosine_drop_fraction(step + 1, stop, alpha)
    assert 0 <= after < here <= alpha
    assert math.isclose(here + cosine_drop_fraction(stop - step, stop, alpha), alpha, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (25, 0.4625), (50, 0.7), (75, 0.7875), (100, 0.8), (1000, 0.8)]
)
def test_cubic_literals(step: int, expected: float) -> None:
    assert cubic_sparsity(step, 100, 0.8) == pytest.approx(expected, abs=1e-15)


@given(stops, fractions, st.integers(0, 1000))
def test_cubic_is_exactly_final_from_the_stop_on(stop: int, final: float, beyond: int) -> None:
    assert cubic_sparsity(stop + beyond, stop, final) == final


@given(stops, fractions, st.data())
def test_cubic_never_falls_nor_passes_final(stop: int, final: float, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, stop - 1))
    assert cubic_sparsity(0, stop, final) == 0
    assert 0 <= cubic_sparsity(step, stop, final) <= cubic_sparsity(step + 1, stop, final) <= final
