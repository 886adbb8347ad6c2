"""Speed: a stopwatch on a clock set by hand, the peak of a device, and utilisation as a quotient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseift_llm import SparseTrainingCallback
from sparseift_llm.metrics.throughput import Stopwatch, measured_peak
from tests.helpers.tiny_runs import make_trainer, sparse_gpt2

CLOCK = "sparseift_llm.metrics.throughput.time.perf_counter"


def set_clock(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    clock = iter(times)
    monkeypatch.setattr(CLOCK, lambda: next(clock))


def test_waiting_for_data_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 10.0, 13.0, 15.0, 17.0, 18.0)
    watch = Stopwatch()
    for _ in range(2):
        watch.begin_step()
        watch.end_step()
    assert watch.read() == (2, 8.0)


def test_evaluation_and_saving_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 10.0, 13.0, 113.0, 117.0, 118.0)
    watch = Stopwatch()
    watch.begin_step()
    watch.end_step()
    watch.interrupt()  # from 13 to 113
    watch.begin_step()
    watch.end_step()
    assert watch.read() == (2, 8.0)


def test_each_reading_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 9.0, 10.0, 13.0, 14.0, 50.0, 52.0, 55.0)
    watch = Stopwatch()
    assert watch.read() == (0, 0.0)
    for expected in ((1, 4.0), (1, 41.0)):  # waiting for the second batch counts
        watch.begin_step()
        watch.end_step()
        assert watch.read() == expected


def test_evaluation_after_a_reading_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 10.0, 13.0, 14.0, 50.0, 52.0, 55.0)
    watch = Stopwatch()
    for expected in ((1, 4.0), (1, 5.0)):
        watch.begin_step()
        watch.end_step()
        assert watch.read() == expected
        watch.interrupt()


def test_the_first_steps_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 10.0, 50.0, 52.0, 55.0, 60.0, 61.0, 64.0, 65.0)
    watch = Stopwatch(warm_up_steps=1)
    for _ in range(2):
        watch.begin_step()
        watch.end_step()
    assert watch.read() == (1, 10.0)  # from 50, when the first step ended, to 60
    assert watch.warm_up_seconds == 40.0
    watch.begin_step()
    watch.end_step()
    assert watch.read() == (1, 5.0)
    assert watch.warm_up_seconds == 40.0


def test_a_reading_within_the_warm_up_has_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 10.0, 50.0, 51.0)
    watch = Stopwatch(warm_up_steps=1)
    watch.begin_step()
    watch.end_step()
    assert watch.read()[0] == 0


def test_the_measured_peak_is_a_rate() -> None:
    state = torch.get_rng_state()
    peak = measured_peak(torch.device("cpu"), torch.float32, repeats=2)
    assert 1e8 < peak < 1e15
    assert torch.equal(torch.get_rng_state(), state)


def test_utilization_is_flops_over_seconds_over_peak(tmp_path: Path) -> None:
    callback = SparseTrainingCallback("all", tokens_per_step=32, seq_len=8, peak_flops_per_second=2.5e9)
    trainer = make_trainer(sparse_gpt2("static"), tmp_path, callback, steps=4, logging_steps=2)
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    for entry, flops in ((first, first["train_flops"]), (second, second["train_flops"] - first["train_flops"])):
        seconds = 2 * 32 / entry["tokens_per_second"]  # of two steps at the speed of those that are timed
        assert entry["model_flops_utilization"] == pytest.approx(flops / seconds / 2.5e9)
    # no dense gradients; see test_metrics_log.py for the count itself
    assert first["train_flops"] * 2 == second["train_flops"]
