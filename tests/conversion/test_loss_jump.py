"""The loss jump: held-out loss of trained dense models, and of their sparse twins before their first step."""

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
    models, held_out = benchmark.trained_models(NUM_STEPS)
    dense = {model_type: benchmark.loss_of(model, held_out) for model_type, model in models.items()}
    measured = {"dense": dense, "rows": benchmark.measure(models, held_out)}
    print(f"\ndense: {dense}\n{benchmark.table(measured)}")
    return measured


def test_the_dense_model_has_learned(result: dict[str, Any]) -> None:
    assert max(result["dense"].values()) < 2.8  # the frequencies of bytes alone give 3.2
    assert len(result["rows"]) == 28


def test_a_pretrained_start_is_far_below_a_random_one(result: dict[str, Any]) -> None:
    """But where a wider stream is in tiles, of which a block-row that writes to it can hold only a part."""
    for row in result["rows"]:
        dense = result["dense"][row["model"]]
        gain = row["random"] - dense
        assert gain > 0.4, row
        limit = 1.0 if row["model"] == "llama" and row["structure"] != "unstructured" else 0.25
        assert row["start"] < dense + limit * gain, row


def test_parallel_does_not_jump(result: dict[str, Any]) -> None:
    rows = [row for row in result["rows"] if row["family"].startswith("Parallel")]
    assert len(rows) == 4
    for row in rows:
        assert row["start"] == pytest.approx(result["dense"]["gpt2"], abs=1e-4)


@pytest.mark.parametrize(("scope", "jump"), [("ffn", 1e-3), ("residual, no reserve", 1e-4)])
def test_unstructured_wider_models_hardly_jump(result: dict[str, Any], scope: str, jump: float) -> None:
    rows = [row for row in result["rows"] if row["family"] == f"Wide, scope {scope}"]
    found = [row for row in rows if row["structure"] == "unstructured"]
    assert len(found) == 2
    for row in found:
        assert row["start"] == pytest.approx(result["dense"][row["model"]], abs=jump)


def test_a_reserve_for_new_channels_costs_little_of_what_training_gained(result: dict[str, Any]) -> None:
    rows = [row for row in result["rows"] if row["family"] == "Wide, scope residual"]
    found = [row for row in rows if row["structure"] == "unstructured"]
    assert len(found) == 2
    for row in found:
        dense = result["dense"][row["model"]]
        assert 0 < row["start"] - dense < 0.02 * (row["random"] - dense), row
