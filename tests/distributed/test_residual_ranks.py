"""A wider residual stream on two real processes, replicated and sharded: weights and masks as in one process.

What the processes run is in residual_script.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.residual_script import STEPS, new_model, trained
from tests.distributed.torchrun import Results, run_ranks
from tests.helpers.tiny_runs import batches, differences, masks

SCENARIOS = ("replicated_masks", "replicated_tiles", "sharded_masks", "sharded_tiles")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("residual")
    return run_ranks("tests.distributed.residual_script", SCENARIOS, folder, warnings="error,ignore:block-sparse")


def in_one_process(storage: str) -> dict[str, Any]:
    model = new_model(storage)
    return trained(model, model, batches(STEPS))


@pytest.mark.support("a wider stream: DistributedDataParallel and FSDP2 on two ranks", proves=("unstructured", "block"))
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_ranks_train_as_one_process_does(scenario: str, ranks: Results) -> None:
    storage = scenario.partition("_")[2]
    expected = in_one_process(storage)
    assert differences(masks(new_model(storage)), expected["masks"]) != []
    for found in ranks[scenario]:
        assert found["digest"] == expected["digest"]
        assert differences(found["masks"], expected["masks"]) == []
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-7, atol=1e-10)
        if scenario.startswith("sharded"):
            assert differences(found["loaded"], expected["masks"]) == []
            assert found["is_tied"]
