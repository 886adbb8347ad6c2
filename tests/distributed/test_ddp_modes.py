"""DistributedDataParallel with its options, uneven data and skipped steps, on two and four real processes.

The reference is always one process with the whole global batch. What the processes run is in ddp_modes_script.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from sparseift_llm import SparseTrainingController
from tests.distributed.ddp_modes_script import (
    OVERFLOW,
    SKIPPED_ON_LAST_RANK,
    STEPS,
    UNEVEN,
    skippable,
    uneven_reference,
)
from tests.distributed.torchrun import Results, run_ranks
from tests.helpers.tiny_runs import batches, differences, first_sparse, masks, snapshot, sparse_gpt2, train

MODES = {
    "default": "DistributedDataParallel",
    "no_sync": "DDP: no_sync",
    "sync_each_micro_batch": "DistributedDataParallel",
    "find_unused": "DDP: find_unused_parameters, layers that some ranks do not use",
    "static_graph": "DDP: static_graph",
    "bucket_view": "DDP: gradient_as_bucket_view",
}
FAULTS = ("magnitudes_first", "own_gradient_only")
USES = ("unused_on_one_rank", "unused_everywhere", "join", "join_refused", "fp16_overflow", "other_masks")
TWO = (*MODES, *FAULTS, *USES)
FOUR = ("no_sync", "find_unused", "float32_digests")

pytestmark = pytest.mark.usefixtures("every_structure")
on_four_ranks = pytest.mark.structures("unstructured", "block", "families")
Masks = dict[str, Tensor]


@pytest.fixture(scope="module")
def two(every_structure: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks("tests.distributed.ddp_modes_script", TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(every_structure: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks("tests.distributed.ddp_modes_script", FOUR, tmp_path_factory.mktemp("four"), num_ranks=4)


@pytest.fixture(scope="module")
def alone(every_structure: str) -> list[Masks]:
    """Masks of one process after every step."""
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=STEPS)
    history: list[Masks] = []
    train(model, optimizer, batches(STEPS), after_step=lambda: history.append(masks(model)))
    torch.compiler.set_stance("default")
    assert differences(history[0], history[-1])
    return history


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=pytest.mark.support(row)) for mode, row in MODES.items()])
def test_masks_are_those_of_one_process(mode: str, two: Results, alone: list[Masks]) -> None:
    for rank in two[mode]:
        assert not differences(alone, rank["history"])
        assert rank["violations"] == []
    first, second = two[mode]
    for key in ("digest", "weights", "optimizer"):
        assert not differences(first[key], second[key])


@on_four_ranks
@pytest.mark.parametrize("mode", ["no_sync", "find_unused"])
def test_masks_on_four_ranks_are_those_of_one_process(mode: str, four: Results, alone: list[Masks]) -> None:
    for rank in four[mode]:
        assert not differences(alone, rank["history"])


def test_the_comparison_catches_magnitudes_before_the_mean(two: Results, alone: list[Masks]) -> None:
    for rank in two["magnitudes_first"]:
        assert differences(alone, rank["history"])


def test_ranks_that_grow_by_their_own_gradient_are_stopped(two: Results) -> None:
    for rank in two["own_gradient_only"]:
        assert "ranks hold different masks after step 2, first in transformer.h.0." in rank["message"]


def test_the_cost_of_updates_is_counted(two: Results, every_structure: str) -> None:
    """Per update: each layer's dense gradient in float64, two flags of 4 bytes, a digest and a step per rank.

    The flags: whether its weights are finite, and whether a gradient has arrived.
    """
    model = sparse_gpt2("rigl")
    layers = [module for module in model.modules() if hasattr(module, "gradient_shape")]
    weights = sum(layer.gradient_shape[0] * layer.gradient_shape[1] for layer in layers)
    expected = 8 * weights + 2 * 4 * len(layers) + 16 * 2
    for rank in two["default"]:
        assert rank["updates"] == 3
        assert rank["bytes"] == 3 * expected
        assert 0 < rank["seconds"] < 60


@pytest.mark.support("DDP: find_unused_parameters, layers that some ranks do not use")
def test_a_layer_that_one_rank_did_not_use(two: Results) -> None:
    """It adds nothing to the mean there, in the dense gradient as in the gradient that the optimizer sees."""
    model = sparse_gpt2("rigl")
    use = skippable(model)
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=STEPS)
    history = []
    for step, batch in enumerate(batches(STEPS), start=1):
        for rank, rows in enumerate(batch.chunk(2)):
            use(rank == 0 or step not in SKIPPED_ON_LAST_RANK)
            (model(input_ids=rows, labels=rows).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(masks(model))
    for result in two["unused_on_one_rank"]:
        assert not differences(history, result["history"])


def test_a_layer_that_no_rank_used_stops_all(two: Results) -> None:
    for result in two["unused_everywhere"]:
        first = first_sparse(sparse_gpt2(), "attn.c_attn")
        assert result["message"].startswith(f"RuntimeError: {first}: no dense gradient reached step 2")


def uneven_alone() -> tuple[list[Masks], dict[str, Tensor]]:
    """Masks of one process per step, and weights, where the second half of the later batches is missing."""
    model = sparse_gpt2("rigl", stop_fraction=1.0)
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=STEPS + 2)
    history = []
    for parts in uneven_reference():
        for rows in parts:
            (model(input_ids=rows, labels=rows).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(masks(model))
    return history, snapshot(model, optimizer)["weights"]


@pytest.mark.support("DDP: join at uneven data")
def test_uneven_data(two: Results) -> None:
    history, weights = uneven_alone()
    first, second = two["join"]
    assert [len(rank["history"]) for rank in two["join"]] == list(UNEVEN)
    assert not differences(history, first["history"])
    assert not differences(history[: UNEVEN[1]], second["history"])
    assert differences(history[UNEVEN[1] - 1], history[-1])  # masks did change after the second rank's data ended
    for name, value in first["after"]["weights"].items():
        torch.testing.assert_close(value, weights[name], rtol=1e-6, atol=1e-9)


@pytest.mark.support("DDP: join at uneven data")
def test_ranks_agree_after_uneven_data(two: Results) -> None:
    first, second = two["join"]
    for key in ("after", "end", "counters"):
        assert not differences(first[key], second[key])
    assert first["after"]["counters"]["step"] == UNEVEN[0]
    assert first["counters"]["step"] == UNEVEN[0] + 4


def test_join_contexts_that_would_hang_are_refused(two: Results) -> None:
    for rank in two["join_refused"]:
        without, first, accumulating = rank["messages"]
        assert without.startswith("ValueError: the model is in a join context without its SparseTrainingController")
        assert first.startswith("ValueError: the SparseTrainingController stands first in the join context")
        assert "create the controller with micro_batches=1" in accumulating


@pytest.mark.support("DDP: float32, autocast, compressed gradients: same masks on all ranks")
@on_four_ranks
def test_digests_agree_in_lower_precision(four: Results) -> None:
    first = four["float32_digests"][0]
    for name, digests in first.items():
        assert len(set(digests)) == 4, f"{name}: masks did not change at three updates"
        for rank in four["float32_digests"]:
            assert rank[name] == digests


@pytest.mark.support("GradScaler, skipped steps")
def test_an_overflow_on_one_rank_skips_the_step_on_all(two: Results) -> None:
    """The run is the one without that batch."""
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=STEPS)
    history = [masks(model)]
    kept = [batch for step, batch in enumerate(batches(STEPS + 1), start=1) if step != OVERFLOW]
    train(model, optimizer, iter(kept), after_step=lambda: history.append(masks(model)))
    expected = history[1:OVERFLOW] + history[OVERFLOW - 1 :]
    for rank in two["fp16_overflow"]:
        assert rank["steps"] == STEPS
        assert rank["violations"] == []
        assert not differences(expected, rank["history"])


@pytest.mark.support("masks that differ between ranks", refused=True)
def test_ranks_that_start_with_other_masks_are_stopped(two: Results) -> None:
    first, fewer = (first_sparse(sparse_gpt2(), name) for name in ("attn.c_attn", "mlp.c_proj"))
    for rank in two["other_masks"]:
        for key in ("masks", "resumed"):
            assert f"ranks hold different masks after step 0, first in {first};" in rank[key]
        assert f"ranks hold different masks after step 0, first in {fewer};" in rank["layers"]
        assert rank["schedule"].startswith("ValueError: ranks have different schedules: total_steps=10, DSTConfig(")
        assert "RuntimeError: ranks are at different steps: [0, 3]" in rank["step"]
