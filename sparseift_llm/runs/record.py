"""What a training run leaves behind: `metrics.jsonl` while it goes, `summary.json` at its end.

A Trainer callback writes it; folder.py reads it back.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from sparseift_llm import isoflop
from sparseift_llm.metrics.throughput import TrainingFlops
from sparseift_llm.planning.cost import count_flops
from sparseift_llm.runs.formats import METRICS_NAME
from sparseift_llm.trainer.callback import SparseTrainingCallback
from sparseift_llm.training.controller import SparseTrainingController
from sparseift_llm.utils.json_lines import append_line, keep_lines, read_lines


class RunRecord(TrainerCallback):
    """Writes one JSON line per log event, and keeps the totals that a resumed run goes on with.

    Each line holds the `totals` and what the Trainer logged (`loss`, `grad_norm`, `learning_rate`,
    `eval_loss`, ...). On resume, lines of steps after the checkpoint are dropped, as those
    steps are run again; times go on from the line of the checkpoint's step.

    Args:
        output_dir: folder of `metrics.jsonl`.
        tokens_per_step: tokens of one optimizer step on all ranks.
        seq_len: tokens per sequence, for attention FLOPs.
        sparse: the run's `SparseTrainingCallback`, None for a dense run.
    """

    def __init__(
        self, output_dir: str | Path, tokens_per_step: int, seq_len: int, sparse: SparseTrainingCallback | None = None
    ) -> None:
        self.output_dir = Path(output_dir)
        self.tokens_per_step = tokens_per_step
        self.seq_len = seq_len
        self.sparse = sparse
        self.step_seconds = 0.0
        self._wall_before = 0.0
        self._started = self._step_started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()
        # A run that starts at step 0 keeps no line, not even that of an evaluation before the first step.
        last_step = state.global_step or -1
        kept = [line for line in read_metrics(self.output_dir) if line["step"] <= last_step]
        if state.is_world_process_zero:
            keep_lines(self.output_dir / METRICS_NAME, last_step)
        if kept:
            self._wall_before, self.step_seconds = kept[-1]["wall_seconds"], kept[-1]["step_seconds"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds += time.perf_counter() - self._step_started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and "train_runtime" not in logs:
            append_line(self.output_dir / METRICS_NAME, {**self.totals(state.global_step, model), **logs})

    def totals(self, step: int, model: PreTrainedModel) -> dict[str, Any]:
        """`step`, `train_tokens`, `train_flops`, `wall_seconds` (evaluation included), `step_seconds` (without)."""
        controller = self.sparse.controller if self.sparse else None
        return {
            "step": step,
            "train_tokens": step * self.tokens_per_step,
            "train_flops": training_flops(model, step, self.tokens_per_step, self.seq_len, controller),
            "wall_seconds": self._wall_before + time.perf_counter() - self._started,
            "step_seconds": self.step_seconds,
        }


def training_flops(
    model: PreTrainedModel,
    num_steps: int,
    tokens_per_step: int,
    seq_len: int,
    controller: SparseTrainingController | None = None,
) -> int:
    """Training FLOPs of `num_steps` steps: active weights as they were, dense-gradient steps added.

    Args:
        model: dense, or Sparse-IFT with its `controller`.
        num_steps, tokens_per_step, seq_len: see `isoflop.run_flops` and `count_flops`.
        controller: the run's controller, whose counters are read.
    """
    if controller is None:
        return isoflop.run_flops(tokens_per_step, num_steps, count_flops(model, seq_len))
    return TrainingFlops(model, tokens_per_step, seq_len, controller).total(num_steps)


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; none if there is no file.

    A last line without its newline was cut off when the run was killed, and is left out.
    """
    return read_lines(Path(output_dir) / METRICS_NAME)
