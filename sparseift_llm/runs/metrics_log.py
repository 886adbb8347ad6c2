"""What a training run leaves behind: `metrics.jsonl` while it goes, `summary.json` at its end.

A Trainer callback writes it; folder.py reads it back.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from sparseift_llm import isoflop
from sparseift_llm.metrics.throughput import WARM_UP_STEPS, Stopwatch, TrainingFlops
from sparseift_llm.planning.cost import count_flops
from sparseift_llm.runs.formats import METRICS_NAME
from sparseift_llm.trainer.callback import SparseTrainingCallback
from sparseift_llm.training.controller import SparseTrainingController
from sparseift_llm.utils.json_lines import append_line, keep_lines, read_lines


class MetricsLog(TrainerCallback):
    """Writes one JSON line per log event, and keeps the totals that a resumed run goes on with.

    Each line holds the `totals` and what the Trainer logged (`loss`, `grad_norm`, `learning_rate`,
    `embedding_learning_rate`, `eval_loss`, ...). On resume, lines of steps after the checkpoint are dropped, as those
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
        self.timed_steps = 0
        self.timed_seconds = 0.0
        self._watch = Stopwatch(WARM_UP_STEPS)
        self._warm_up_before = 0.0
        self._wall_before = 0.0
        self._started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()
        # A run that starts at step 0 keeps no line, not even that of an evaluation before the first step.
        last_step = state.global_step or -1
        kept = [line for line in read_metrics(self.output_dir) if line["step"] <= last_step]
        if state.is_world_process_zero:
            keep_lines(self.output_dir / METRICS_NAME, last_step)
        if kept:
            last = kept[-1]
            self._wall_before = last["wall_seconds"]
            if "timed_steps" in last:
                self.timed_steps, self.timed_seconds = last["timed_steps"], last["timed_seconds"]
                self._warm_up_before = last["warm_up_seconds"]
            elif "step_seconds" in last:  # by version 0.1.0: of all steps, and without waiting for data
                self.timed_steps, self.timed_seconds = last["step"], last["step_seconds"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch.end_step()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch.interrupt()

    on_save = on_evaluate

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lap()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if "train_runtime" in logs:  # the Trainer's own summary
            return
        speed = self._lap() if "loss" in logs else {}
        if state.is_world_process_zero:
            append_line(self.output_dir / METRICS_NAME, {**self.totals(state.global_step, model), **speed, **logs})

    def _lap(self) -> dict[str, float]:
        """Add the steps since the last reading to the totals, and return their `tokens_per_second` if there are any."""
        num_steps, seconds = self._watch.read()
        if num_steps == 0 or seconds <= 0:
            return {}
        self.timed_steps += num_steps
        self.timed_seconds += seconds
        return {"tokens_per_second": num_steps * self.tokens_per_step / seconds}

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the run over the seconds of their steps, without each process's first step.

        Waiting for data counts, evaluation and saving do not, as in `metrics.jsonl`. A run of a single step is as
        fast as that step was. NaN if no step was seen at all.
        """
        steps, seconds = self.timed_steps, self.timed_seconds
        if not steps:
            steps, seconds = WARM_UP_STEPS, self._warm_up_before + self._watch.warm_up_seconds
        return steps * self.tokens_per_step / seconds if seconds else math.nan

    def totals(self, step: int, model: PreTrainedModel) -> dict[str, Any]:
        """What the run has cost until now.

        Returns:
            `step`, `train_tokens` and `train_flops`; `wall_seconds`, everything included; `timed_steps` and
            `timed_seconds`, which `tokens_per_second` is made of; `warm_up_seconds` of the steps left out of these.
        """
        controller = self.sparse.controller if self.sparse else None
        return {
            "step": step,
            "train_tokens": step * self.tokens_per_step,
            "train_flops": training_flops(model, step, self.tokens_per_step, self.seq_len, controller),
            "wall_seconds": self._wall_before + time.perf_counter() - self._started,
            "timed_steps": self.timed_steps,
            "timed_seconds": self.timed_seconds,
            "warm_up_seconds": self._warm_up_before + self._watch.warm_up_seconds,
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
