"""Evaluating while training: a Trainer callback that runs a suite every n steps and logs its scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from sparseift_llm.evaluation.harness import LoadedSuite, evaluate_task, load_suite, named_suite
from sparseift_llm.evaluation.language_model import SplitLM
from sparseift_llm.evaluation.results import summarize


class EvaluationCallback(TrainerCallback):
    """Runs a suite every `every_steps` optimizer steps and at the end; `suite/task` and averages go to all trackers.

        trainer.add_callback(EvaluationCallback(trainer, "builtin", every_steps=500, limit=300))

    Training is not disturbed: random states and the model's mode are put back. With several processes
    the requests are split among them.

    Args:
        trainer: whose `log` is used; its `processing_class` is the tokenizer.
        suite: `v1`, `v2`, `builtin` or lm-eval tasks.
        every_steps: optimizer steps between evaluations.
        data_dir: folder of data sets, see eval/leaderboard.py.
        limit: only the first so many items of each task.
        batch_size: sequences per call, or `auto`.

    Raises:
        ValueError: a value out of range, no tokenizer, or data that is missing; before training begins.
    """

    def __init__(
        self,
        trainer: Trainer,
        suite: str,
        every_steps: int,
        data_dir: str | Path | None = None,
        limit: int | None = None,
        batch_size: int | str = "auto",
    ) -> None:
        if every_steps < 1 or (limit is not None and limit < 1):
            raise ValueError(f"every_steps and limit must be at least 1, got {every_steps} and {limit}")
        if not isinstance(trainer.processing_class, PreTrainedTokenizerBase):
            raise ValueError("the Trainer has no tokenizer: give it processing_class=tokenizer")
        self.trainer = trainer
        self.every_steps = every_steps
        self.limit = limit
        self.batch_size = batch_size
        self.loaded: LoadedSuite = load_suite(named_suite(suite), data_dir)
        self._last_step = -1

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
            lm = SplitLM(model, self.trainer.processing_class, self.batch_size, PartialState())
            tasks = self.loaded.tasks.items()
            leaves = {name: evaluate_task(lm, name, task, self.limit)[0] for name, task in tasks}
        finally:
            model.train(was_training)
        summary = summarize(self.loaded.suite, leaves)
        key = summary["average_of"]
        values = {name: result[key] for name, result in summary["results"].items()}
        values |= {name: summary[name] for name in summary["averages"]}
        return {f"{self.loaded.suite.name}/{name}": float(value) for name, value in values.items()}

    def _evaluate(self, step: int, control: Any) -> None:
        self._last_step = step
        should_log = control.should_log
        self.trainer.log(self.scores())
        control.should_log = should_log  # log() clears it, and the step's own loss would be missed
