"""What mask metrics cost a training run: steps with and without them take turns, and medians of their parts are summed.

OMP_NUM_THREADS=2 python benchmarks/metrics_cost.py benchmarks/results/metrics_cost.json

The model is that of `sparseift bench`'s step_cpu (GPT-2, 4 layers, hidden 512, FFN made Wide 75%, AdamW, RigL). Metrics
work at mask updates (every 100 steps) and at logged steps (every 10); on other steps they only look at the clock.
"""

from __future__ import annotations

import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, TrainerState, TrainingArguments

from sparseift_llm import DSTConfig, SparseIFTConfig, SparseTrainingController, sparsify
from sparseift_llm.bench.rows import ROWS
from sparseift_llm.trainer.log import MaskReport, ReportOptions
from sparseift_llm.utils.files import write_json
from sparseift_llm.utils.provenance import commit, machine, versions

REPEATS, UPDATE_EVERY, LOG_EVERY = 3, 100, 10
ROW = ROWS["step_cpu"]


class Clock:
    """Seconds spent in the calls that metrics add to a step."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return timed

    def read(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def measure(structure: str, folder: Path) -> dict[str, Any]:
    """Medians over REPEATS rounds of a plain step, a logged one and an update, each without and with metrics."""
    assert isinstance(ROW.model, dict)
    torch.manual_seed(0)
    storage: dict[str, Any] = {"structure": "block", "block_size": ROW.tile} if structure == "block" else {}
    dst = DSTConfig("rigl", update_every_steps=3)
    model = sparsify(GPT2Config(**ROW.model), SparseIFTConfig(scope="ffn", sparsity=0.75, dst=dst, **storage))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    controller = SparseTrainingController(model, optimizer, total_steps=10**6, micro_batches=1)
    args = TrainingArguments(str(folder), logging_steps=2, report_to="none", use_cpu=True)
    state = TrainerState(logging_steps=2)
    report = MaskReport(controller, model, args, None, ReportOptions(ROW.tokens, ROW.seq_len, 1e12))
    report.begin(state)
    follow, clock, sample = controller.listeners.pop(), Clock(), report._sample
    sample._sample = clock(sample._sample)  # type: ignore[method-assign]
    tokens = torch.randint(model.config.vocab_size, (ROW.tokens // ROW.seq_len, ROW.seq_len))

    def step(kind: str, with_metrics: bool) -> tuple[float, float]:
        """Seconds of the step and, of these, in metrics."""
        state.global_step = 1 if kind == "log" else 0  # the step after it is logged, or not
        missed: list[
            tuple[Any, ...]
        ] = []  # followed when the clock has stopped, so that later steps have all to report
        later = lambda name, old, new, growth: missed.append((name, old.clone(), new, None))  # noqa: E731
        controller.listeners[:] = [clock(follow) if with_metrics else later]
        start = time.perf_counter()
        if with_metrics:
            clock(report.begin_step)(args, state)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if with_metrics:
            clock(report.before_optimizer_step)()
        optimizer.step()
        optimizer.zero_grad()
        if with_metrics:
            clock(report.end_step)()
        if kind == "log":
            logs: dict[str, Any] = {"loss": loss.item(), "grad_norm": 0.5}
            if with_metrics:
                clock(report.log)(logs, state)
        total = time.perf_counter() - start
        for update in missed:
            follow(*update)
        return total, clock.read()

    times: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for turn in range(2 * REPEATS + 2):
        with_metrics = turn % 2 == 1
        for kind in ("plain", "log", "update"):  # masks change on every third step
            seconds = step(kind, with_metrics)
            if turn >= 2:
                times.setdefault((kind, with_metrics), []).append(seconds)
    kinds = ("plain", "log", "update")
    medians = {
        kind: {
            name: statistics.median(total for total, _ in times[kind, on])
            for name, on in (("off", False), ("on", True))
        }
        for kind in kinds
    }
    added = {kind: statistics.median(part for _, part in times[kind, True]) for kind in kinds}
    plain = medians["plain"]["off"]
    run = UPDATE_EVERY * plain + medians["update"]["off"] - plain
    share = (UPDATE_EVERY * added["plain"] + UPDATE_EVERY / LOG_EVERY * added["log"] + added["update"]) / run
    return {"step_s": medians, "metrics_s": added, "share_of_training_time": share}


def main(output: str) -> None:
    """Measure both structures and write the results."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    with tempfile.TemporaryDirectory() as folder:
        results = {structure: measure(structure, Path(folder) / structure) for structure in ("unstructured", "block")}
    settings = {
        "command": shlex.join(["python", "benchmarks/metrics_cost.py", output]),
        "tokens_per_step": ROW.tokens,
        "repeats": REPEATS,
        "update_every_steps": UPDATE_EVERY,
        "log_every_steps": LOG_EVERY,
    }
    facts = {"machine": machine(), "versions": versions(), "commit": commit()}
    write_json(Path(output), {**settings, **results, **facts})


if __name__ == "__main__":
    main(sys.argv[1])
