"""How fast a Trainer trains, in its log: of sparse models within `SparseTrainingCallback`, of dense twins by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from sparseift_llm import isoflop
from sparseift_llm.metrics.throughput import WARM_UP_STEPS, Stopwatch, measured_peak
from sparseift_llm.planning.cost import count_flops
from sparseift_llm.utils.numbers import check_count


@dataclass(frozen=True)
class ReportOptions:
    """What a report cannot find out by itself. JSON can hold it.

    Args:
        tokens_per_step: tokens of one optimizer step on all ranks; without it no FLOPs and no speed are reported.
        seq_len: tokens per sequence, for attention FLOPs.
        peak_flops_per_second: of one device; `"measure"` times a matrix product at the start of training; without
            it `model_flops_utilization` is not reported.

    Raises:
        ValueError: a value out of range, or one of `tokens_per_step` and `seq_len` without the other.
    """

    tokens_per_step: int | None = None
    seq_len: int | None = None
    peak_flops_per_second: float | str | None = None

    def __post_init__(self) -> None:
        for name in ("tokens_per_step", "seq_len"):
            value = getattr(self, name)
            if value is not None:
                check_count(name, value)
        if (self.tokens_per_step is None) != (self.seq_len is None):
            raise ValueError(
                f"tokens_per_step={self.tokens_per_step} and seq_len={self.seq_len} go together; give both, or none"
            )
        peak = self.peak_flops_per_second
        if peak is not None and (peak != "measure" if isinstance(peak, str) else not 0 < peak < math.inf):
            raise ValueError(f"peak_flops_per_second must be above 0, 'measure' or None, got {peak!r}")
        if peak is not None and self.tokens_per_step is None:
            raise ValueError("peak_flops_per_second needs tokens_per_step and seq_len: FLOPs cannot be counted without")


class SpeedReport:
    """Speed and utilisation since the last log event, evaluation and saving left out.

    Args:
        options: see there.
        flops_until: training FLOPs of the first steps of the run, by their number; None reports nothing.
        model: not wrapped.
        args: the Trainer's.
    """

    def __init__(
        self,
        options: ReportOptions,
        flops_until: Callable[[int], int] | None,
        model: PreTrainedModel,
        args: TrainingArguments,
    ) -> None:
        self.watch = Stopwatch(WARM_UP_STEPS)
        self._flops_until = flops_until
        self._tokens_per_step = options.tokens_per_step or 0
        self._peak: float | None = None
        if options.peak_flops_per_second is not None:
            peak = options.peak_flops_per_second
            self._peak = args.world_size * (_measured(model, args) if isinstance(peak, str) else peak)
        self._flops_before: int | None = None
        self._step_before = 0

    def begin(self, step: int) -> None:
        """Training begins after `step` steps, above 0 if it is resumed."""
        self._flops_before = self._flops_until(step) if self._flops_until else None
        self._step_before = step

    def values(self, step: int) -> dict[str, float]:
        """What to log after `step`: FLOPs so far, tokens per second and utilization, as far as they are known."""
        num_steps, seconds = self.watch.read()
        if self._flops_until is None:
            return {}
        flops = self._flops_until(step)
        values: dict[str, float] = {"train_flops": flops}
        if num_steps > 0 and seconds > 0:
            values["tokens_per_second"] = num_steps * self._tokens_per_step / seconds
            if self._peak is not None and self._flops_before is not None:
                flops_per_step = (flops - self._flops_before) / (step - self._step_before)  # with those not timed
                values["model_flops_utilization"] = flops_per_step * num_steps / seconds / self._peak
        self._flops_before, self._step_before = flops, step
        return values


class SpeedCallback(TrainerCallback):
    """Logs the speed of a dense model's training under the keys of `SparseTrainingCallback`, to compare twins by.

    Put it before trackers: `trainer.callback_handler.callbacks.insert(0, callback)`, or `Trainer(callbacks=[...])`,
    where it then serves the callbacks behind it and the Trainer's own log history.

    Args:
        tokens_per_step, seq_len, peak_flops_per_second: see `ReportOptions`; the first two are needed.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, tokens_per_step: int, seq_len: int, peak_flops_per_second: float | str | None = None) -> None:
        self.options = ReportOptions(tokens_per_step, seq_len, peak_flops_per_second)
        self._speed: SpeedReport | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        tokens_per_step, seq_len = self.options.tokens_per_step, self.options.seq_len
        assert tokens_per_step is not None  # ReportOptions sees to both
        assert seq_len is not None
        flops = count_flops(model, seq_len)
        self._speed = SpeedReport(
            self.options, lambda step: isoflop.run_flops(tokens_per_step, step, flops), model, args
        )
        self._speed.begin(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._speed is not None:
            self._speed.watch.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._speed is not None:
            self._speed.watch.end_step()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._speed is not None:
            self._speed.watch.interrupt()

    on_save = on_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._speed is not None and logs is not None and "loss" in logs:
            logs.update(self._speed.values(state.global_step))
            state.log_history[-1].update(logs)


def _measured(model: PreTrainedModel, args: TrainingArguments) -> float:
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
    return measured_peak(args.device, dtype)
