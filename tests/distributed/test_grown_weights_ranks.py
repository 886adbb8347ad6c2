"""State of grown weights, and saliency, that FSDP2 has sharded over two processes: as in one process, and resumed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from sparseift_llm import SparseTrainingController
from tests.distributed.ddp_modes_script import STEPS
from tests.distributed.grown_script import RULES, with_options
from tests.distributed.torchrun import Results, run_ranks
from tests.helpers.tiny_runs import batches, differences, masks, train

pytestmark = [pytest.mark.usefixtures("every_structure"), pytest.mark.structures("unstructured", "block")]


@pytest.fixture(scope="module")
def results(every_structure: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks("tests.distributed.grown_script", tuple(RULES), tmp_path_factory.mktemp("grown"))


@pytest.mark.support("FSDP2: grown_state and drop_by")
@pytest.mark.parametrize("name", RULES)
def test_two_ranks_are_one_process(name: str, results: Results) -> None:
    model: Any = with_options(name)
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=STEPS)
    history: list[dict[str, Tensor]] = []
    train(model, optimizer, batches(STEPS), after_step=lambda: history.append(masks(model)))
    torch.compiler.set_stance("default")
    for rank in results[name]:
        assert not differences(history, rank["history"])
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(rank["weights"][key], parameter.detach(), rtol=1e-6, atol=1e-9)
            for kind, value in optimizer.state[parameter].items():
                torch.testing.assert_close(rank["optimizer"][key][kind], value, rtol=1e-5, atol=1e-12)


@pytest.mark.support("FSDP2: grown_state and drop_by")
@pytest.mark.parametrize("name", RULES)
def test_sharded_state_goes_on_to_the_bit(name: str, results: Results) -> None:
    for rank in results[name]:
        expected = {**rank, "history": rank["history"][5:]}
        found = expected.pop("resumed")
        assert not differences(expected, found)
