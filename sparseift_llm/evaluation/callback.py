"""Evaluating while training: a Trainer callback that runs a suite every n steps and logs its scores."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from sparseift_llm.evaluation.harness import evaluate_task
from sparseift_llm.evaluation.language_model import SplitLM, TooLongError
from sparseift_llm.evaluation.limits import tasks_too_long
from sparseift_llm.evaluation.options import EvaluationOptions
from sparseift_llm.evaluation.results import summarize
from sparseift_llm.evaluation.task_loading import LoadedSuite, load_suite, named_suite

logger = logging.getLogger(__name__)


class EvaluationCallback(TrainerCallback):
    """Runs a suite every `every_steps` optimizer steps and at the end; `suite/task` and averages go to all trackers.

        trainer.add_callback(EvaluationCallback(trainer, "builtin", every_steps=500, limit=300))

    Training is not disturbed: random states and the model's mode are put back, and neither lm-eval's warnings nor its
    bars get into the log. With several processes the requests are split among them. Prompts that are too long for the
    model lose their beginning, which is logged once.

    Args:
        trainer: whose `log` is used; its `processing_class` is the tokenizer.
        suite: `v1`, `v2`, `builtin` or lm-eval tasks.
        every_steps: optimizer steps between evaluations.
        data_dir: folder of data sets, see eval/leaderboard.py.
        limit: only the first so many items of each task, or a share of them below 1.
        batch_size: sequences per call, or `auto`.

    Raises:
        ValueError: a value out of range, no tokenizer, data that is missing, or a task that does not fit the model's
            context; before training begins.
    """

    def __init__(
        self,
        trainer: Trainer,
        suite: str,
        every_steps: int,
        data_dir: str | Path | None = None,
        limit: int | float | None = None,
        batch_size: int | str = "auto",
    ) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {every_steps}")
        tokenizer, model = trainer.processing_class, trainer.model
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError("the Trainer has no tokenizer: give it processing_class=tokenizer")
        self.trainer = trainer
        self.every_steps = every_steps
        self.options = EvaluationOptions(limit=limit)
        self.batch_size = batch_size
        self.loaded: LoadedSuite = load_suite(named_suite(suite), data_dir)
        assert isinstance(model, PreTrainedModel)
        reasons = tasks_too_long(SplitLM(model, tokenizer, 1, bars=False), self.loaded.tasks, self.options)
        if reasons:
            listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise TooLongError(
                f"suite {suite} does not fit the model: {listed}; give another suite or a longer context"
            )
        self._last_step = -1
        self._has_warned = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every_steps == 0:
            self._evaluate(state.global_step, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self._last_step:
            self._evaluate(state.global_step, control)

    def scores(self) -> dict[str, float]:
        """Headlines and averages of the model as it is now, named as they are logged."""
        model: Any = self.trainer.accelerator.unwrap_model(self.trainer.model)
        assert isinstance(self.trainer.processing_class, PreTrainedTokenizerBase)
        was_training = model.training
        model.eval()
        try:
            lm = SplitLM(model, self.trainer.processing_class, self.batch_size, PartialState(), bars=False)
            tasks = self.loaded.tasks.items()
            leaves = {name: evaluate_task(lm, name, task, self.options).result for name, task in tasks}
        finally:
            model.train(was_training)
        self._warn_of_truncation(leaves)
        summary = summarize(self.loaded.suite, leaves)
        key = summary["average_of"]
        values = {name: result[key] for name, result in summary["results"].items()}
        values |= {name: summary[name] for name in summary["averages"]}
        return {f"{self.loaded.suite.name}/{name}": float(value) for name, value in values.items()}

    def _warn_of_truncation(self, leaves: Mapping[str, Mapping[str, Any]]) -> None:
        cut = {name: leaf["truncated_items"] for name, leaf in leaves.items() if leaf["truncated_items"]}
        if cut and not self._has_warned and self.trainer.is_world_process_zero():
            self._has_warned = True
            listed = ", ".join(f"{number} items of {name}" for name, number in cut.items())
            logger.warning("the prompts of %s are longer than the model's context and lose their beginning", listed)

    def _evaluate(self, step: int, control: Any) -> None:
        self._last_step = step
        should_log = control.should_log
        self.trainer.log(self.scores())
        control.should_log = should_log  # log() clears it, and the step's own loss would be missed
