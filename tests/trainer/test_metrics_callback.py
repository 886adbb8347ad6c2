"""Mask metrics of Trainer runs: every tracker gets them, training does not notice, a resumed run reports the same."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from sparseift_llm import SparseTrainingCallback
from sparseift_llm.trainer import log as report
from sparseift_llm.trainer.log import HISTORY_NAME, ReportOptions
from tests.helpers.paths import ROOT
from tests.helpers.tiny_runs import differences, final_state, make_trainer, masks, sparse_gpt2
from tests.metrics.test_metrics import explored

pytestmark = pytest.mark.usefixtures("every_structure")
TIMED = ("mask_update_seconds", "tokens_per_second", "model_flops_utilization")
SPEED: dict[str, Any] = {"tokens_per_step": 32, "seq_len": 8, "peak_flops_per_second": 1e9}
FROM_THE_FIRST_UPDATE = {"mask_churn", "grad_norm_grown", *(f"mask_churn/{kind}" for kind in ("qkv", "o", "mlp_in"))}
ALWAYS = {
    "sparsity", "sparsity/qkv", "sparsity/mlp_out", "exploration", "exploration/o", "drop_fraction", "dead_units",
    "grad_norm_active", "saturated_units", "mask_update_seconds", "mask_update_bytes",
    "train_flops", "tokens_per_second", "model_flops_utilization",
}  # fmt: skip


class Record(TrainerCallback):
    """The masks before training and after each step; all that is logged of training steps."""

    def __init__(self) -> None:
        self.masks: list[dict[str, Tensor]] = []
        self.logs: list[dict[str, Any]] = []

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.masks.append(masks(model))

    def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.masks.append(masks(model))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.logs.append({"step": state.global_step, **logs})


def new_trainer(folder: Path, *others: TrainerCallback, algorithm: str = "rigl", **options: Any) -> Trainer:
    """A run with dropout, so that random numbers matter."""
    callback = SparseTrainingCallback("all", **SPEED)
    return make_trainer(sparse_gpt2(algorithm, dropout=0.1), folder, callback, *others, **options)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard would show: name -> step -> value."""
    (events,) = folder.rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events.parent)).Reload()
    return {
        name.removeprefix("train/"): {event.step: event.value for event in reader.Scalars(name)}
        for name in reader.Tags()["scalars"]
    }


def test_tensorboard_gets_every_metric(tmp_path: Path) -> None:
    record = Record()
    trainer = new_trainer(tmp_path, record, report_to="tensorboard")
    order = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert order.index("TensorBoardCallback") < order.index("SparseTrainingCallback")  # as Trainers have it
    trainer.train()
    shown = scalars(tmp_path)
    for name in ALWAYS:
        first = 2 if name in ("tokens_per_second", "model_flops_utilization") else 1  # step 1 warms up
        assert list(shown[name]) == list(range(first, 13)), name
    for name in FROM_THE_FIRST_UPDATE:
        assert list(shown[name]) == list(range(2, 13)), name
    assert list(shown["mask_survival"]) == list(range(4, 13))
    for logs in record.logs:
        for name in ("exploration", "grad_norm_active", "mask_update_seconds"):
            assert shown[name][logs["step"]] == pytest.approx(logs[name])
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [{"step": logs["step"], **logs} for logs in entries] == record.logs


def test_the_page_on_metrics_names_them_all(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+)(?:/<kind>)?`", page.partition("`<kind>` is")[0]))
    record = Record()
    new_trainer(tmp_path, record).train()
    logged = {key.partition("/")[0] for key in record.logs[-1]}
    assert logged - {"step", "loss", "grad_norm", "learning_rate", "epoch"} == named - {"loss"}


@pytest.mark.parametrize("place", ["before", "after", "added later"])
def test_a_tracker_anywhere_gets_them(place: str, tmp_path: Path) -> None:
    tracker, sparse, record = TensorBoardCallback(), SparseTrainingCallback("all"), Record()
    callbacks = {"before": [record, tracker, sparse], "after": [sparse, tracker, record], "added later": [sparse]}[
        place
    ]
    trainer = make_trainer(sparse_gpt2(), tmp_path, *callbacks)
    if place == "added later":
        trainer.add_callback(tracker)
        trainer.add_callback(record)
    trainer.train()
    assert len(scalars(tmp_path)["mask_update_bytes"]) == 12
    assert all("sparsity" in logs for logs in record.logs)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert len(kinds) == len(set(kinds)) == len(callbacks) + 2 + 2 * (place == "added later")
    trainer.train()  # and again
    assert len(record.masks) == 2 * 13  # no callback was called twice, or missed, when the order changed


def test_without_going_first_tensorboard_would_get_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that the tests above are for."""
    monkeypatch.setattr("sparseift_llm.trainer.callback.go_first", lambda callback: None)
    new_trainer(tmp_path, report_to="tensorboard").train()
    assert not scalars(tmp_path).keys() & {"mask_update_seconds", "mask_update_bytes", "sparsity"}


@pytest.mark.parametrize("is_in_the_list", [False, True])
def test_attached_it_needs_no_look_at_the_call_stack(
    is_in_the_list: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("sparseift_llm.trainer.log._handler_on_stack")
    callback, record = SparseTrainingCallback("all"), Record()
    trainer = make_trainer(sparse_gpt2(), tmp_path, record, TensorBoardCallback(), *[callback] * is_in_the_list)
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    assert len(scalars(tmp_path)["mask_update_bytes"]) == 12
    assert all("sparsity" in logs for logs in record.logs)


def test_attaching_late_sets_half_written_checkpoints_aside(tmp_path: Path) -> None:
    trainer = make_trainer(sparse_gpt2(), tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    SparseTrainingCallback("all").attach(trainer)
    assert [path.name for path in tmp_path.iterdir()] == ["incomplete-checkpoint-3"]


def test_without_a_trainer_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        report.go_first(SparseTrainingCallback("all"))
    assert "may be missing in trackers" in caplog.text


@pytest.mark.parametrize("algorithm", ["static", "set", "rigl", "gmp"])
def test_metrics_change_no_bit_of_training(algorithm: str, tmp_path: Path) -> None:
    def run(callback: SparseTrainingCallback, folder: Path) -> dict[str, Any]:
        options: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer = make_trainer(sparse_gpt2(algorithm, dropout=0.1), folder, callback, **options)
        trainer.train()
        return {**final_state(trainer), "random": torch.get_rng_state()}

    callback = SparseTrainingCallback("all", **{**SPEED, "peak_flops_per_second": "measure"})
    found = run(callback, tmp_path / "with")
    assert (tmp_path / "with" / "layers.jsonl").is_file()
    assert not differences(run(SparseTrainingCallback(metrics=False), tmp_path / "without"), found)
    assert not (tmp_path / "without" / "layers.jsonl").exists()


@pytest.mark.parametrize("algorithm", ["set", "rigl", "gmp"])
def test_metrics_are_what_the_masks_of_all_steps_say(algorithm: str, tmp_path: Path) -> None:
    """An independent recomputation, step by step, and layer by layer in `layers.jsonl`."""
    record = Record()
    new_trainer(tmp_path, record, algorithm=algorithm).train()
    lines = [json.loads(line) for line in (tmp_path / "layers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    updates = [0, *(step for step in range(1, 13) if differences(record.masks[step - 1], record.masks[step]))]
    for logs, line in zip(record.logs, lines, strict=True):
        step = logs["step"]
        history = record.masks[: step + 1]
        num_layers = Counter(entry["kind"] for entry in line["layers"].values())  # of a kind; families have several
        assert logs["exploration"] == pytest.approx(explored(history), abs=1e-15)
        for name, entry in line["layers"].items():
            expected = by_hand([masks[name] for masks in history], [update for update in updates if update <= step])
            assert {key: entry[key] for key in expected} == expected, (name, step)
            empty = [float((~history[-1][name].any(dim)).double().mean()) for dim in (0, 1)]  # rows or columns
            assert sorted((entry["unread"], entry["unfed"])) == pytest.approx(sorted(empty))
            if num_layers[entry["kind"]] == 1:
                assert logs[f"sparsity/{entry['kind']}"] == entry["sparsity"]
                assert logs[f"exploration/{entry['kind']}"] == entry["exploration"]
                assert logs.get(f"mask_churn/{entry['kind']}") == entry["churn"]
    assert updates[1:] == {"gmp": [2, 4, 6, 8, 9]}.get(algorithm, [2, 4, 6, 8])


def by_hand(history: list[Tensor], updates: list[int]) -> dict[str, Any]:
    """A layer's entry from its masks after every step, and the steps that updated them."""
    last = history[-1]
    grown = [history[step] & ~history[step - 1] for step in updates[1:]]
    churn = int(grown[-1].sum()) / int(last.sum()) if grown else None
    survival = None
    if len(grown) > 1 and grown[-2].any():
        survival = int((grown[-2] & last).sum()) / int(grown[-2].sum())
    return {
        "sparsity": 1 - int(last.sum()) / last.numel(),
        "exploration": int(torch.stack(history).any(0).sum()) / last.numel(),
        "churn": churn,
        "survival": survival,
    }


def test_accumulation_does_not_change_metrics(tmp_path: Path) -> None:
    def run(size: int) -> list[dict[str, Any]]:
        record = Record()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        callbacks = (SparseTrainingCallback("all", **SPEED), record)
        make_trainer(sparse_gpt2(), tmp_path / str(size), *callbacks, **options).train()
        return record.logs

    for whole, split in zip(run(4), run(1), strict=True):
        assert whole.keys() == split.keys()
        for name in whole.keys() - {*TIMED, "loss", "saturated_units"}:  # the first micro-batch has other tokens
            assert split[name] == pytest.approx(whole[name], rel=1e-7), name


def test_lines_of_an_earlier_run_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for run in range(3):
        new_trainer(tmp_path, Record(), logging_steps=3 + run).train()
        assert ("an earlier run's lines" in caplog.text) == (run > 0)
        caplog.clear()
    names = ("earlier-layers.jsonl", "earlier-layers.jsonl.2", "layers.jsonl")
    steps = [[json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()] for name in names]
    assert steps == [[3, 6, 9, 12], [4, 8, 12], [5, 10]]


def test_log_events_without_a_training_loss_are_left_alone(tmp_path: Path) -> None:
    record = Record()
    trainer = new_trainer(tmp_path, record, eval_strategy="steps", eval_steps=2, logging_steps=3)
    trainer.train()
    assert [logs["step"] for logs in record.logs] == [3, 6, 9, 12]
    assert all("grad_norm_active" in logs for logs in record.logs)
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert others
    assert not any("sparsity" in entry for entry in others)
    assert len((tmp_path / "layers.jsonl").read_text().splitlines()) == 4


def test_single_steps_are_not_foreseen_without_a_schedule_of_steps(tmp_path: Path) -> None:
    record = Record()
    new_trainer(tmp_path, record, logging_strategy="epoch").train()
    assert record.logs
    for logs in record.logs:
        assert "exploration" in logs
        assert not logs.keys() & {"grad_norm_active", "saturated_units"}


# ---- resuming

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
Complete = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def complete(every_structure: str, tmp_path_factory: pytest.TempPathFactory) -> Complete:
    """An uninterrupted run with a checkpoint after every step, and what it logged."""
    folder, record = tmp_path_factory.mktemp("complete"), Record()
    new_trainer(folder, record, **SAVING).train()
    return folder, record.logs


def resumable(complete: Complete, folder: Path, step: int = 5) -> Path:
    """The output folder of a run that broke off two steps after its last checkpoint."""
    shutil.copytree(complete[0] / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    lines = (complete[0] / "layers.jsonl").read_text().splitlines(keepends=True)
    (folder / "layers.jsonl").write_text("".join(lines[: step + 2]) + lines[step + 2][:20])
    return folder / f"checkpoint-{step}"


def untimed(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMED} for line in logs]


@pytest.mark.parametrize("step", [1, 2, 5, 7])
@pytest.mark.parametrize("restored", [False, True])
def test_a_resumed_run_reports_the_same(step: int, restored: bool, complete: Complete, tmp_path: Path) -> None:
    resumable(complete, tmp_path, step)
    record = Record()
    new_trainer(tmp_path, record, restore_callback_states_from_checkpoint=restored).train(resume_from_checkpoint=True)
    assert not differences(untimed(complete[1][step:]), untimed(record.logs))
    assert {"mask_survival", "grad_norm_grown", "train_flops"} <= record.logs[-1].keys()
    assert (tmp_path / "layers.jsonl").read_text() == (complete[0] / "layers.jsonl").read_text()


def test_a_new_run_begins_layers_anew(complete: Complete, tmp_path: Path) -> None:
    resumable(complete, tmp_path)
    new_trainer(tmp_path, steps=1).train()
    assert len((tmp_path / "layers.jsonl").read_text().splitlines()) == 1


def test_a_checkpoint_without_metrics_is_resumed_without_exploration(
    complete: Complete, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As they were written before there were metrics. Never a number that counts only what came after."""
    checkpoint = resumable(complete, tmp_path)
    (checkpoint / HISTORY_NAME).unlink()
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    callback = state["stateful_callbacks"]["SparseTrainingCallback"]
    del callback["attributes"]["saved"]["metrics"]
    callback["args"] = {}
    path.write_text(json.dumps(state))
    record = Record()
    with caplog.at_level(logging.WARNING):
        new_trainer(tmp_path, record).train(resume_from_checkpoint=True)
    assert "was written without mask metrics: exploration cannot be reported" in caplog.text
    assert not any(key.startswith("exploration") for logs in record.logs for key in logs)
    first, last = record.logs[0], record.logs[-1]
    assert first["sparsity"] == complete[1][5]["sparsity"]
    assert last["mask_churn"] == complete[1][-1]["mask_churn"]  # updates at 6 and 8 were followed
    assert last["mask_survival"] == complete[1][-1]["mask_survival"]


def missing(file: Path, other: Path) -> None:
    file.unlink()


def truncated(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def bit_flipped(file: Path, other: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def of_another_step(file: Path, other: Path) -> None:
    shutil.copy(other, file)


@pytest.mark.parametrize("damage", [missing, truncated, bit_flipped, of_another_step])
def test_a_damaged_history_is_refused(damage: Callable[[Path, Path], None], complete: Complete, tmp_path: Path) -> None:
    checkpoint = resumable(complete, tmp_path)
    damage(checkpoint / HISTORY_NAME, complete[0] / "checkpoint-2" / HISTORY_NAME)
    trainer = new_trainer(tmp_path)
    with pytest.raises(ValueError, match=HISTORY_NAME):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5
    unwatched = make_trainer(sparse_gpt2(dropout=0.1), tmp_path, SparseTrainingCallback(metrics=False))
    unwatched.train(resume_from_checkpoint=True)  # what is not asked for need not be there
    assert unwatched.state.global_step == 12


def test_a_state_that_is_asked_for_without_saving_leaves_older_folders_alone(
    complete: Complete, tmp_path: Path
) -> None:
    """A Trainer asks for it when it begins; a folder of that step may be another run's."""
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(complete[0] / "checkpoint-3", folder)
    before = (folder / HISTORY_NAME).read_bytes()
    trainer = make_trainer(sparse_gpt2(seed=1), tmp_path, SparseTrainingCallback("all"), steps=3)
    trainer.train()
    trainer.train()
    assert (folder / HISTORY_NAME).read_bytes() == before


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_per_step": 0, "seq_len": 8}, "tokens_per_step must be a whole number of at least 1, got 0"),
        ({"tokens_per_step": 8, "seq_len": -1}, "seq_len must be a whole number of at least 1, got -1"),
        ({"tokens_per_step": math.nan, "seq_len": 8}, "tokens_per_step must be a whole number of at least 1, got nan"),
        ({"tokens_per_step": 8}, "tokens_per_step=8 and seq_len=None go together"),
        ({**SPEED, "peak_flops_per_second": 0}, "above 0, 'measure' or None, got 0"),
        ({**SPEED, "peak_flops_per_second": "fast"}, "above 0, 'measure' or None, got 'fast'"),
        ({"peak_flops_per_second": 1e12}, "needs tokens_per_step and seq_len"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReportOptions(**options)
    with pytest.raises(ValueError, match=message):
        SparseTrainingCallback(**options)


def test_speed_is_only_reported_where_it_is_known(tmp_path: Path) -> None:
    speed = {"train_flops", "tokens_per_second", "model_flops_utilization"}
    for options, known in (
        ({}, set()),
        ({"tokens_per_step": 32, "seq_len": 8}, speed - {"model_flops_utilization"}),
        ({"tokens_per_step": 32, "seq_len": 8, "peak_flops_per_second": "measure"}, speed),
    ):
        record = Record()
        callbacks = (SparseTrainingCallback("all", **options), record)  # type: ignore[arg-type]
        make_trainer(sparse_gpt2(), tmp_path, *callbacks, steps=2).train()
        assert record.logs[0].keys() & speed == known & {"train_flops"}  # the first step is not timed
        assert record.logs[1].keys() & speed == known
