"""Runs recipes/pretrain.py several times, each in a process of its own that may kill itself at a chosen moment.

A script that tests start, `python -m tests.e2e.killed_pretrain '[{"words": ..., "kill": ...}, ...]'`. The processes are
forked after the slow imports; each prints `begins after step N` before it trains.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState

from sparseift_llm.runs import metrics_log
from sparseift_llm.runs.metrics_log import MetricsLog
from tests.helpers.scripts import load_script


def main(runs: list[dict[str, Any]]) -> None:
    """Start one process per entry, one after the other.

    Args:
        runs: each with `words` for pretrain.py and `kill`: None, or the name of a function below and its argument.
    """
    for run in runs:
        child = os.fork()
        if child == 0:
            _train(run["words"], run["kill"])
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if killed != (run["kill"] is not None) or (not killed and status != 0):
            sys.exit(f"{run} ended with status {status}")


def _train(words: list[str], kill: list[Any] | None) -> None:
    _say_where_it_begins()
    if kill is not None:
        globals()[kill[0]](kill[1])
    try:
        load_script("recipes/pretrain.py").main(words)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def _say_where_it_begins() -> None:
    def on_train_begin(self: MetricsLog, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"begins after step {state.global_step}", flush=True)
        original(self, args, state, control, **kwargs)

    original = MetricsLog.on_train_begin
    MetricsLog.on_train_begin = on_train_begin  # type: ignore[method-assign]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_micro_batch(number: int) -> None:
    """Die at the `number`-th micro-batch of this process."""
    original, calls = Trainer.training_step, iter(range(1, number + 1))

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            _die()
        return original(self, *args, **kwargs)

    Trainer.training_step = training_step  # type: ignore[method-assign]


def in_file(name: str) -> None:
    """Die when half of the file `name`, written by torch.save, is on disk."""
    original: Callable[..., None] = torch.save

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        original(value, path, *args, **kwargs)
        if os.path.basename(path) == name:
            os.truncate(path, os.path.getsize(path) // 2)
            _die()

    torch.save = save


def in_trainer_state(step: int) -> None:
    """Die when half of the `trainer_state.json` of `step` is on disk."""
    original = TrainerState.save_to_json

    def save_to_json(self: TrainerState, json_path: str) -> None:
        original(self, json_path)
        if self.global_step == step:
            os.truncate(json_path, os.path.getsize(json_path) // 2)
            _die()

    TrainerState.save_to_json = save_to_json  # type: ignore[method-assign]


def in_metrics(step: int) -> None:
    """Die when half of a metrics line of `step` is on disk."""
    original = metrics_log.append_line

    def append(path: Path, values: Mapping[str, Any]) -> None:
        original(path, values)
        if values["step"] == step:
            os.truncate(path, path.stat().st_size - len(json.dumps(values)) // 2)
            _die()

    metrics_log.append_line = append


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
