"""Two real processes against one: the same masks from the same global batches, and ranks that never part ways.

What the processes run is in ddp_script.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from sparseift_llm import SparseTrainingController
from sparseift_llm.layers.base import sparse_layers
from tests.distributed.ddp_script import STEPS
from tests.distributed.torchrun import Results, run_ranks
from tests.helpers.tiny_runs import (
    STORAGES,
    batches,
    differences,
    final_state,
    first_sparse,
    masks,
    sparse_gpt2,
    sparse_trainer,
    train,
)

SCENARIOS = ("plain", "corrupted", "compiled", "trainer")

pytestmark = pytest.mark.usefixtures("every_structure")


@pytest.fixture(scope="module")
def results(every_structure: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What both ranks report, by scenario."""
    return run_ranks("tests.distributed.ddp_script", SCENARIOS, tmp_path_factory.mktemp("ddp"))


@pytest.fixture(autouse=True)
def _compiler_stance() -> Any:
    """Controllers that a test leaves armed must not change the compiler's stance for the next test."""
    yield
    torch.compiler.set_stance("default")


@pytest.mark.support("DistributedDataParallel")
def test_masks_are_those_of_one_process_with_the_whole_batch(results: Results) -> None:
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, total_steps=STEPS)
    history: list[dict[str, Tensor]] = []
    train(model, optimizer, batches(STEPS), 1, lambda: history.append(masks(model)))
    assert differences(history[0], history[-1])
    for rank in results["plain"]:
        assert not differences(history, rank["history"])
        assert rank["counters"] == controller.counters()
        assert rank["digest"] == controller.masks_digest()
        for name, value in model.named_parameters():
            torch.testing.assert_close(rank["weights"][name], value.detach(), rtol=1e-6, atol=1e-9)


def test_ranks_hold_the_same_everything(results: Results, every_structure: str) -> None:
    first, second = results["plain"]
    assert not differences(first, second)
    name = first_sparse(sparse_gpt2(), "mlp.c_fc")
    assert first["weights"][f"{name}.weight"].ndim == (3 if "block_size" in STORAGES[every_structure] else 2)
    assert first["violations"] == []


def test_one_rank_alone_would_choose_other_masks(results: Results) -> None:
    """So that equality above means something: the gradient of half of each batch grows other weights."""
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=STEPS)
    train(model, optimizer, (batch[:4] for batch in batches(STEPS)))
    assert differences(results["plain"][0]["masks"], masks(model))


@pytest.mark.support("masks that differ between ranks", refused=True)
def test_a_corrupted_mask_stops_both_ranks(results: Results) -> None:
    for rank in results["corrupted"]:
        first = first_sparse(sparse_gpt2(), "mlp.c_fc")
        assert f"different masks after step 6, first in {first};" in rank["message"]
        assert rank["step"] == 6


def test_layer_names_do_not_depend_on_wrappers(results: Results) -> None:
    expected = list(sparse_layers(sparse_gpt2()))
    for rank in results["compiled"]:
        assert rank["names"] == [expected] * 4
    assert results["plain"][0]["names"] == expected


@pytest.mark.support("DistributedDataParallel")
def test_trainer_on_two_ranks(results: Results, tmp_path: Path) -> None:
    first, second = results["trainer"]
    assert first["digest"] == second["digest"]
    assert not differences(first["masks"], second["masks"])
    assert not differences(first["weights"], second["weights"])
    alone = sparse_trainer(sparse_gpt2("rigl"), tmp_path)  # the same rows of a step, four in one process
    alone.train()
    expected = final_state(alone)
    assert not differences(expected["masks"], first["masks"])
    assert expected["counters"] == first["counters"]


def test_trainer_on_two_ranks_resumes_bit_for_bit(results: Results) -> None:
    assert [rank["resumed"] for rank in results["trainer"]] == [[], []]
