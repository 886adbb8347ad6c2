"""`metrics="summary"`: at most six keys, none of them constant; the speed of dense twins under the same keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from sparseift_llm import SparseTrainingCallback
from sparseift_llm.trainer.speed import SpeedCallback
from tests.helpers.models import tiny_model
from tests.helpers.tiny_runs import make_trainer, sparse_gpt2

SPEED: dict[str, Any] = {"tokens_per_step": 32, "seq_len": 8, "peak_flops_per_second": 1e9}
ALWAYS = {"grad_norm_active", "tokens_per_second", "model_flops_utilization"}
BY_TRAINER = {"loss", "grad_norm", "learning_rate", "epoch", "step"}


class Record(TrainerCallback):
    """What is logged of training steps, as a tracker behind the callback gets it."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.logs.append({"step": state.global_step, **logs})


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("static", ALWAYS),
        ("set", ALWAYS | {"exploration", "mask_churn", "mask_survival"}),
        ("rigl", ALWAYS | {"exploration", "mask_churn", "mask_survival"}),
        ("gmp", ALWAYS | {"sparsity"}),
    ],
)
def test_the_default_logs_what_changes(algorithm: str, expected: set[str], tmp_path: Path) -> None:
    record = Record()
    make_trainer(sparse_gpt2(algorithm), tmp_path, SparseTrainingCallback(**SPEED), record, steps=12).train()
    added = [line.keys() - BY_TRAINER for line in record.logs]
    assert set().union(*added) == expected
    assert max(map(len, added)) <= 6
    for key in expected - {"mask_survival"}:  # which is 1 in a run as short as this one
        assert len({line.get(key) for line in record.logs}) > 1, key
    assert len((tmp_path / "layers.jsonl").read_text().splitlines()) == len(record.logs)


def test_all_and_none(tmp_path: Path) -> None:
    for metrics, has_all in (("all", True), (True, True), (False, False)):
        record = Record()
        make_trainer(
            sparse_gpt2("static"), tmp_path / str(metrics), SparseTrainingCallback(metrics), record, steps=2
        ).train()
        assert ("sparsity/qkv" in record.logs[-1]) == has_all
        assert "mask_update_seconds" in record.logs[-1]
        assert (tmp_path / str(metrics) / "layers.jsonl").is_file() == has_all
    with pytest.raises(ValueError, match=r"metrics='sumary' is not one of 'summary', 'all'; did you mean 'summary'"):
        SparseTrainingCallback("sumary")


def test_the_choice_is_in_the_state_of_a_checkpoint() -> None:
    for given, kept in (("summary", "summary"), ("all", "all"), (True, "all"), (False, False)):
        arguments = SparseTrainingCallback(given).state()["args"]
        assert arguments["metrics"] == kept
        assert SparseTrainingCallback(**arguments).metrics == (kept or None)


def test_a_dense_twin_logs_its_speed_by_the_same_definitions(tmp_path: Path) -> None:
    record, model = Record(), tiny_model("gpt2")
    from sparseift_llm import count_flops

    make_trainer(model, tmp_path, SpeedCallback(**SPEED), record, steps=4).train()
    assert "tokens_per_second" not in record.logs[0]  # the first step is the warm-up
    for line in record.logs:
        assert line["train_flops"] == 3 * 32 * line["step"] * count_flops(model, 8).forward
    for line in record.logs[1:]:
        per_token = 3 * count_flops(model, 8).forward
        assert line["model_flops_utilization"] == pytest.approx(line["tokens_per_second"] * per_token / 1e9)
    with pytest.raises(ValueError, match="seq_len must be a whole number of at least 1"):
        SpeedCallback(32, 0)
