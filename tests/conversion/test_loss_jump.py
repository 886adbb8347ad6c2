"""The loss jump: held-out loss of a trained dense GPT-2, and of its sparse twins before their first step."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.scripts import load_script

SCRIPT = "benchmarks/loss_jump.py"
NUM_STEPS = 200


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """As the committed results, after fewer steps; the table is printed with `pytest -s`."""
    benchmark = load_script(SCRIPT)
    model, held_out = benchmark.trained_model(NUM_STEPS)
    measured = {"dense": benchmark.loss_of(model, held_out), "rows": benchmark.measure(model, held_out)}
    print(f"\ndense: {measured['dense']:.3f}\n{benchmark.table(measured)}")
    return measured


def test_the_dense_model_has_learned(result: dict[str, Any]) -> None:
    assert result["dense"] < 2.8  # the frequencies of bytes alone give 3.2
    assert len(result["rows"]) == 20


def test_a_pretrained_start_is_far_below_a_random_one(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        gain = row["random"] - result["dense"]
        assert gain > 0.4, row
        assert row["start"] < result["dense"] + 0.25 * gain, row


def test_parallel_does_not_jump(result: dict[str, Any]) -> None:
    rows = [row for row in result["rows"] if row["family"].startswith("Parallel")]
    assert len(rows) == 4
    for row in rows:
        assert row["start"] == pytest.approx(result["dense"], abs=1e-4)


def test_an_unstructured_wider_ffn_hardly_jumps(result: dict[str, Any]) -> None:
    rows = [row for row in result["rows"] if row["family"].startswith("Wide") and row["structure"] == "unstructured"]
    assert len(rows) == 2
    for row in rows:
        assert row["start"] == pytest.approx(result["dense"], abs=1e-3)
