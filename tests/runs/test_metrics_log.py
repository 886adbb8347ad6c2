"""The log of metrics: training FLOPs by hand for every algorithm, lines after kills and resumes, atomic JSON."""

from __future__ import annotations

import json
import math
import os
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from sparseift_llm import DSTConfig, SparseIFTConfig, SparseTrainingController, sparsify
from sparseift_llm.runs.metrics_log import MetricsLog, read_metrics, training_flops
from sparseift_llm.utils import provenance
from sparseift_llm.utils.files import write_json

TOKENS, SEQ_LEN = 6 * 8, 8  # per step; 6 sequences of 8
DENSE = GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
# per token: projections 12 x 16^2 weights; attention 4 T d; logits 2 d V
DENSE_FLOPS = 2 * 3072 + 4 * 8 * 16 + 2 * 16 * 20  # 7296
WIDE_AROUND = 4 * 8 * 32 + 2 * 32 * 20  # attention and logits at hidden size 32: 2304
WIDE_WEIGHTS = 12 * 32**2  # 12288 stored, 3072 active


def trained(config: SparseIFTConfig, num_steps: int, total_steps: int) -> tuple[PreTrainedModel, Any]:
    """A sparse model and its controller after `num_steps` optimizer steps."""
    torch.manual_seed(0)
    model = sparsify(DENSE, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = SparseTrainingController(model, optimizer, total_steps)
    ids = torch.arange(48).view(6, 8) % 20
    for _ in range(num_steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, controller


def config(algorithm: str, **dst: Any) -> SparseIFTConfig:
    return SparseIFTConfig(sparsity=0.75, dst=DSTConfig(algorithm, **dst))


def test_flops_of_a_dense_run() -> None:
    assert training_flops(GPT2LMHeadModel(DENSE), 5, TOKENS, SEQ_LEN) == 48 * 5 * 3 * 7296 == 5_253_120


def test_flops_of_a_static_run() -> None:
    model, controller = trained(config("static", update_every_steps=1), num_steps=5, total_steps=5)
    # every step: 3 x (2 x 3072 active + 2304)
    assert training_flops(model, 5, TOKENS, SEQ_LEN, controller) == 48 * 5 * 3 * 8448 == 6_082_560


def test_set_computes_no_dense_gradients() -> None:
    model, controller = trained(config("set", update_every_steps=1, stop_fraction=1.0), num_steps=5, total_steps=5)
    assert training_flops(model, 5, TOKENS, SEQ_LEN, controller) == 48 * 5 * 3 * 8448


def test_flops_of_a_rigl_run() -> None:
    # of 10 steps, masks stop at 7: updates at 2, 4, 6, each with 2 x 12288 FLOPs per token more
    for num_steps, updates in ((1, 0), (2, 1), (5, 2), (10, 3)):
        model, controller = trained(config("rigl", update_every_steps=2, stop_fraction=0.7), num_steps, 10)
        by_hand = 48 * (num_steps * 3 * 8448 + updates * 2 * 12288)
        assert training_flops(model, num_steps, TOKENS, SEQ_LEN, controller) == by_hand, num_steps


def test_flops_of_a_gmp_run() -> None:
    # final sparsity 0.75 at step 4, ramp 0.75 (1 - (1 - t/4)^3): 0.65625 after step 2, 0.75 after step 4
    model, controller = trained(config("gmp", update_every_steps=2, stop_fraction=0.5), num_steps=6, total_steps=8)
    active = 2 * 12288 + 2 * (12288 - 8064) + 2 * 3072  # steps 1-2 dense, 3-4 pruned once, 5-6 at the target
    by_hand = 48 * (6 * 3 * WIDE_AROUND + 3 * 2 * active)
    assert training_flops(model, 6, TOKENS, SEQ_LEN, controller) == by_hand == 13_271_040


def test_projections_left_dense_count_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseift_llm.planning.planner.check_equal_cost", lambda *_: None)  # as in version 0.1
    model, controller = trained(SparseIFTConfig(sparsity=0.75, exclude=("q", "k", "v"), dst=DSTConfig("static")), 4, 4)
    # qkv stays dense at hidden 32: 3 x 32^2 weights; the others keep their twins' 16^2 + 2 x 4 x 16^2
    linear = 2 * (3 * 1024 + 256 + 2048)
    assert training_flops(model, 4, TOKENS, SEQ_LEN, controller) == 48 * 4 * 3 * (linear + WIDE_AROUND)


# ---- metrics


def event(log: MetricsLog, name: str, step: int, logs: dict[str, Any] | None = None, main: bool = True) -> None:
    state = SimpleNamespace(global_step=step, is_world_process_zero=main)
    getattr(log, name)(None, state, None, logs=logs, model=GPT2LMHeadModel(DENSE))


def test_each_log_event_is_one_line_with_totals(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, TOKENS, SEQ_LEN)
    event(log, "on_train_begin", 0)
    event(log, "on_log", 1, {"loss": 2.5})
    event(log, "on_log", 2, {"eval_loss": 2.0})
    event(log, "on_log", 2, {"train_runtime": 9.0, "train_loss": 2.0})  # the Trainer's own summary
    first, second = read_metrics(tmp_path)
    assert {"step": 1, "train_tokens": 48, "train_flops": 48 * 3 * 7296, "loss": 2.5}.items() <= first.items()
    assert {"step": 2, "train_tokens": 96, "train_flops": 96 * 3 * 7296, "eval_loss": 2.0}.items() <= second.items()
    assert 0 < first["wall_seconds"] < second["wall_seconds"]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, TOKENS, SEQ_LEN)
    event(log, "on_train_begin", 0, main=False)
    event(log, "on_log", 1, {"loss": 2.5}, main=False)
    assert list(tmp_path.iterdir()) == []


def set_clock(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    """Let all clocks, which share one function, show these times."""
    clock = iter(times)
    monkeypatch.setattr("sparseift_llm.runs.metrics_log.time.perf_counter", lambda: next(clock))


def test_speed_leaves_out_warm_up_and_evaluation_but_not_waiting_for_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, 0.0, 100.0, 101.0, 131.0, 140.0, 142.0, 144.0, 150.0, 160.0, 163.0, 164.0, 170.0)
    log = MetricsLog(tmp_path, TOKENS, SEQ_LEN)
    event(log, "on_train_begin", 0)  # at 100
    for step in (1, 2):  # 101 to 131, which is the warm-up, and 140 to 142
        event(log, "on_step_begin", step - 1)
        event(log, "on_step_end", step)
    event(log, "on_log", 2, {"loss": 1.0})  # read at 144, written at 150
    event(log, "on_evaluate", 2)  # until 160
    event(log, "on_step_begin", 2)
    event(log, "on_step_end", 3)  # at 163
    event(log, "on_train_end", 3)  # at 164
    (line,) = read_metrics(tmp_path)
    assert line["tokens_per_second"] == TOKENS / 13  # from 131 to 144
    totals = log.totals(3, GPT2LMHeadModel(DENSE))  # at 170
    assert (totals["timed_steps"], totals["timed_seconds"], totals["warm_up_seconds"]) == (2, 17.0, 30.0)
    assert totals["wall_seconds"] == 70.0
    assert log.tokens_per_second == 2 * TOKENS / 17


def test_a_run_of_one_step_has_the_speed_of_its_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 0.0, 1.0, 2.0, 6.0, 7.0, 8.0)
    log = MetricsLog(tmp_path, TOKENS, SEQ_LEN)
    event(log, "on_train_begin", 0)
    assert math.isnan(log.tokens_per_second)
    event(log, "on_step_begin", 0)
    event(log, "on_step_end", 1)
    event(log, "on_log", 1, {"loss": 1.0})
    assert "tokens_per_second" not in read_metrics(tmp_path)[0]
    assert log.tokens_per_second == TOKENS / 4


def write_lines(folder: Path, *steps: int, end: str = "", is_old: bool = False) -> None:
    lines = [
        {"step": step, "wall_seconds": 10.0 * step, "step_seconds": 5.0 * step}
        if is_old
        else {
            "step": step,
            "wall_seconds": 10.0 * step,
            "timed_steps": step - 1,
            "timed_seconds": 5.0 * step,
            "warm_up_seconds": 3.0,
        }
        for step in steps
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n" + end)


def test_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    write_lines(tmp_path, 1, 2, end='{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    write_lines(tmp_path, 1, end='{"step": 2}')  # whole, but nobody can know that
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == read_metrics(tmp_path / "nowhere") == []
    (tmp_path / "metrics.jsonl").touch()
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("is_old", [False, True])
def test_resume_drops_the_lines_after_the_checkpoint_and_goes_on_with_its_times(is_old: bool, tmp_path: Path) -> None:
    write_lines(tmp_path, 2, 4, 4, 6, end='{"step": 8, "lo', is_old=is_old)
    log = MetricsLog(tmp_path, TOKENS, SEQ_LEN)
    event(log, "on_train_begin", 4)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3
    assert (log.timed_steps, log.timed_seconds) == (4 if is_old else 3, 20.0)
    assert log.tokens_per_second == log.timed_steps * TOKENS / 20.0
    event(log, "on_log", 6, {"loss": 1.0})
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 4, 6]
    assert lines[-1]["loss"] == 1.0
    assert 40.0 < lines[-1]["wall_seconds"] < 50.0


def test_a_run_that_starts_again_at_step_0_drops_all_lines(tmp_path: Path) -> None:
    write_lines(tmp_path, 0, 2, 4)
    log = MetricsLog(tmp_path, TOKENS, SEQ_LEN)
    event(log, "on_train_begin", 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert (log.timed_steps, log.timed_seconds) == (0, 0.0)


# ---- JSON


def test_write_json_keeps_full_precision(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"loss": 0.1 + 0.2, "flops": 10**20})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"loss": 0.30000000000000004, "flops": 10**20}
    assert text.endswith("}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_write_json_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}

    def killed(source: Path, target: Path) -> None:
        assert json.loads(Path(source).read_text()) == {"new": 2}  # complete before it takes the name
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}


def test_versions_do_not_need_the_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` comes with the extra `data` only; built-in and local text need it not."""

    def version(name: str) -> str:
        if name == "datasets":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(provenance, "version", version)
    assert provenance.versions()["torch"] == "1.0"
