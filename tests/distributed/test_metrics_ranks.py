"""Mask metrics on two real processes: the same on both, and as in one process with the whole batch.

What the processes run is in metrics_script.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.optim import AdamW

from sparseift_llm import SparseTrainingCallback, SparseTrainingController
from sparseift_llm.metrics.mask_history import MaskMetrics
from sparseift_llm.metrics.step_probe import StepSample
from tests.distributed.metrics_script import STEPS, Logs
from tests.distributed.torchrun import Results, run_ranks
from tests.helpers.tiny_runs import batches, differences, make_trainer, sparse_gpt2

pytestmark = pytest.mark.usefixtures("every_structure")
OWN = ("mask_update_seconds", "mask_update_bytes", "tokens_per_second", "model_flops_utilization")


@pytest.fixture(scope="module")
def results(every_structure: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What both ranks report, by scenario."""
    return run_ranks(
        "tests.distributed.metrics_script", ("trainer", "sharded", "joined"), tmp_path_factory.mktemp("ranks")
    )


def shared(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in OWN} for line in logs]


def test_both_ranks_report_the_same(results: Results) -> None:
    first, second = results["trainer"]
    assert len(first["logs"]) == 12
    assert not differences(shared(first["logs"]), shared(second["logs"]))
    assert {"grad_norm_active", "saturated_units", "mask_survival", "grad_norm_grown"} <= first["logs"][-1].keys()


def test_one_process_with_the_whole_batch_reports_the_same(results: Results, tmp_path: Path) -> None:
    logs = Logs()
    callback = SparseTrainingCallback("all", tokens_per_step=32, seq_len=8, peak_flops_per_second=1e9)
    make_trainer(sparse_gpt2("rigl"), tmp_path, callback, logs).train()
    for alone, both in zip(shared(logs.logs), shared(results["trainer"][0]["logs"]), strict=True):
        assert alone.keys() == both.keys()
        for name in alone:
            assert both[name] == pytest.approx(alone[name], rel=1e-5), name
    assert (tmp_path / "layers.jsonl").read_text() == results["trainer"][0]["layers"]


def test_two_ranks_resume_with_the_same_metrics(results: Results) -> None:
    for rank in results["trainer"]:
        assert not differences(shared(rank["logs"][5:]), shared(rank["resumed"]))
        assert rank["layers"] == rank["layers_resumed"]


def test_utilization_is_of_both_devices(results: Results) -> None:
    before, line = results["trainer"][0]["logs"][:2]  # the first step is not timed
    flops_per_token = (line["train_flops"] - before["train_flops"]) / 32
    assert line["model_flops_utilization"] == pytest.approx(line["tokens_per_second"] * flops_per_token / 2e9)


def test_sharded_gradients_have_the_norm_of_whole_ones(results: Results) -> None:
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, total_steps=STEPS)
    metrics, sample = MaskMetrics(controller), StepSample(model, controller.layers)
    norms = []
    for batch in batches(STEPS):
        sample.begin()
        model(input_ids=batch, labels=batch).loss.backward()
        sample.end()
        norms.append(float(sample.grad_norm))  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()
    expected = metrics.values()
    for rank in results["sharded"]:
        assert rank["norms"] == pytest.approx(norms, rel=1e-6)
        assert rank["saturated"] is not None
        for name, value in rank["values"].items():
            assert value == pytest.approx(expected[name], rel=1e-6), name
    assert not differences(*results["sharded"])


def test_a_rank_that_ran_out_of_data_reports_no_exploration(results: Results) -> None:
    stayed, left = results["joined"]
    assert stayed["values"]["exploration"] > 0.25
    assert stayed["messages"] == []
    assert not any(key.startswith("exploration") for key in left["values"])
    assert left["values"]["sparsity"] == stayed["values"]["sparsity"]
    assert "of 3 mask updates so far only 1 were followed" in left["messages"][0]
