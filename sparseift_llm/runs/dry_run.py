"""`sparseift pretrain --dry-run`: a recipe's first steps, taken for what they tell of memory and time.

Everything is done as for training: text is tokenised into the folder that the run will use, the model is built, and the
Trainer trains it with the recipe's batches, schedule and number of steps. After a few steps it stops, and the model is
thrown away. Nothing is saved but tokens.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from sparseift_llm.data.loading import LoadedData, load_data
from sparseift_llm.metrics.throughput import WARM_UP_STEPS, Stopwatch
from sparseift_llm.planning.cost import cost_of
from sparseift_llm.runs.formats import DATA_NAME
from sparseift_llm.runs.preparation import training_arguments
from sparseift_llm.runs.pretrain import checked_model, describe, read_recipe
from sparseift_llm.runs.recipe import Recipe
from sparseift_llm.runs.trainer import make_trainer, sequences_per_step
from sparseift_llm.trainer.callback import SparseTrainingCallback
from sparseift_llm.utils.units import readable_bytes, readable_count, readable_seconds

NUM_STEPS = WARM_UP_STEPS + 2
_NOTHING_SAVED: dict[str, Any] = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "report_to": "none",
    "disable_tqdm": True,
    "resume_from_checkpoint": None,
}


def dry_run(words: list[str]) -> str:
    """Take a recipe's first steps and say what training would take.

    Args:
        words: the recipe file and its overrides, as on the command line.

    Returns:
        Several lines for the user, of the first rank.

    Raises:
        ValueError: the user has to change the recipe or its text.
    """
    recipe = read_recipe(words)
    tokens_folder = Path(recipe.training["output_dir"]) / DATA_NAME
    with tempfile.TemporaryDirectory(prefix="sparseift-dry-run-") as folder:
        trial = dataclasses.replace(recipe, training={**recipe.training, **_NOTHING_SAVED, "output_dir": folder})
        args = training_arguments(trial)
        with args.main_process_first(local=False, desc="preparing the data"):
            data = load_data(recipe.data, tokens_folder)
        set_seed(args.seed)
        model = checked_model(recipe, data)
        first_steps = _FirstSteps()
        sparse = [SparseTrainingCallback(metrics=False)] if recipe.sparse_ift else []
        trainer = make_trainer(trial, args, model, data, [*sparse, first_steps])
        trainer.remove_callback(PrinterCallback)  # which prints the Trainer's own summary, of the first steps alone
        trainer.train()
    lines = [
        describe(recipe, model),
        *_about_data(recipe, args, data, trainer.state.max_steps),
        *_about_cost(recipe, args, model, first_steps, trainer.state.max_steps),
        f"nothing was saved but tokens, in {recipe.data.cache_dir or tokens_folder}",
    ]
    return "\n".join(lines)


class _FirstSteps(TrainerCallback):
    """Times the first steps of a Trainer, and ends it after them."""

    def __init__(self) -> None:
        self._watch = Stopwatch(WARM_UP_STEPS)
        self.seconds_per_step = 0.0
        self.num_steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch.end_step()
        self.num_steps = state.global_step
        if state.global_step >= min(NUM_STEPS, state.max_steps):
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            num_steps, seconds = self._watch.read()
            self.seconds_per_step = seconds / num_steps if num_steps else self._watch.warm_up_seconds
            control.should_training_stop = True


def _about_data(recipe: Recipe, args: TrainingArguments, data: LoadedData, max_steps: int) -> Iterator[str]:
    tokens_per_step = sequences_per_step(args) * recipe.data.seq_len
    total = max_steps * tokens_per_step
    text = "streamed" if data.num_train_tokens is None else f"{readable_count(data.num_train_tokens)} tokens"
    epochs = "" if data.num_train_tokens is None else f", {total / data.num_train_tokens:.3g} times over the text"
    yield (
        f"text: {text} to train on, {readable_count(data.num_eval_tokens)} tokens held out; {len(data.tokenizer):,} "
        f"entries in the vocabulary"
    )
    yield (
        f"training: {max_steps:,} steps of {sequences_per_step(args)} sequences of {recipe.data.seq_len} tokens, "
        f"{readable_count(total)} tokens in all{epochs}"
    )


def _about_cost(
    recipe: Recipe, args: TrainingArguments, model: PreTrainedModel, first: _FirstSteps, max_steps: int
) -> Iterator[str]:
    planned = cost_of(model, recipe.data.seq_len).to_dict()["train_state_bytes"]
    yield (
        f"memory: at most {readable_bytes(_peak_bytes())} {_memory_of()} in {first.num_steps} steps; of these "
        f"{readable_bytes(planned)} are weights, gradients, AdamW's state and masks, if all are in float32"
    )
    tokens_per_second = sequences_per_step(args) * recipe.data.seq_len / first.seconds_per_step
    yield (
        f"time: {readable_count(tokens_per_second)} tokens/s on {args.device}, so all steps take about "
        f"{readable_seconds(max_steps * first.seconds_per_step)}; evaluation, saving and mask updates come on top"
    )


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _memory_of() -> str:
    if torch.cuda.is_available():
        return f"of GPU memory ({torch.cuda.get_device_name()})"
    return "of this whole process"
