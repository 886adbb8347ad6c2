"""What a training run leaves behind: `metrics.jsonl` while it goes, `summary.json` at its end.

Written by a Trainer callback; read back by report.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

import sparseift_llm
from sparseift_llm import isoflop
from sparseift_llm.dst.callback import SparseTrainingCallback
from sparseift_llm.dst.controller import SparseTrainingController
from sparseift_llm.dst.throughput import TrainingFlops
from sparseift_llm.json_lines import read_lines
from sparseift_llm.outputs import written_whole
from sparseift_llm.planning import count_flops

METRICS_NAME = "metrics.jsonl"
RECIPE_NAME = "recipe.json"
SUMMARY_NAME = "summary.json"


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
        kept = [line for line in read_metrics(self.output_dir) if line["step"] <= state.global_step]
        if state.global_step and kept:
            self._wall_before, self.step_seconds = kept[-1]["wall_seconds"], kept[-1]["step_seconds"]
        if state.is_world_process_zero:
            self._write(kept if state.global_step else [], "w")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds += time.perf_counter() - self._step_started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and "train_runtime" not in logs:
            self._write([{**self.totals(state.global_step, model), **logs}], "a")

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

    def _write(self, lines: Iterable[Mapping[str, Any]], mode: str) -> None:
        with (self.output_dir / METRICS_NAME).open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


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


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` whole or not at all, indented, numbers in full precision."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def commit() -> str | None:
    """The git commit this package runs from, `-dirty` if files were changed; None outside a clone."""
    folder = Path(__file__).parent
    if not (folder.parent / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """Kind of machine a run's speed belongs to: processor architecture, cores, threads, GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.machine(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version(), "sparseift_llm": sparseift_llm.__version__}
    for name in ("torch", "triton", "transformers", "accelerate", "datasets", "tokenizers"):
        with contextlib.suppress(PackageNotFoundError):  # triton and datasets are optional
            found[name] = version(name)
    return found
