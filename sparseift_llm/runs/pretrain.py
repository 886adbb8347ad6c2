"""Pretraining from a recipe file, from its first check to `summary.json`.

`sparseift pretrain` runs it in one process, and `accelerate launch recipes/pretrain.py` in several. The steps are
functions of their own, so that a script of yours can replace one of them.
"""

from __future__ import annotations

import logging
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from sparseift_llm.checkpoints.summary import dense_summary, sparsity_summary
from sparseift_llm.data.loading import LoadedData, check_not_read, load_data
from sparseift_llm.layers.semi_structured import use_semi_structured_kernels
from sparseift_llm.planning.cost import cost_of
from sparseift_llm.runs.formats import DATA_NAME, SUMMARY_NAME, WRITTEN_NAMES
from sparseift_llm.runs.metrics_log import MetricsLog
from sparseift_llm.runs.model import make_model
from sparseift_llm.runs.preparation import as_it_was_begun, check_recipe, prepare_output, training_arguments
from sparseift_llm.runs.recipe import Recipe, load_recipe
from sparseift_llm.runs.recipe_training import LearningRateFactors
from sparseift_llm.runs.resuming import check_resumed
from sparseift_llm.runs.trainer import AlreadyFinished, StopBeforeExtraStep, make_trainer, sequences_per_step
from sparseift_llm.trainer.callback import SparseTrainingCallback
from sparseift_llm.trainer.speed import SpeedCallback
from sparseift_llm.training.learning_rates import group_factors
from sparseift_llm.utils.files import write_json
from sparseift_llm.utils.provenance import commit, machine, versions

logger = logging.getLogger("pretrain")
DRY_RUN = "--dry-run"


@dataclass(frozen=True)
class PreparedRun:
    """A run of which everything has been checked that can be checked before it trains.

    Args:
        recipe: with its overrides applied.
        args: its training section.
        model: dense or sparse, with its initial weights.
        data: tokenised training and held-out text.
        resume_from: a complete checkpoint, or None to start at step 0.
    """

    recipe: Recipe
    args: TrainingArguments
    model: PreTrainedModel
    data: LoadedData
    resume_from: Path | None

    @property
    def output_dir(self) -> Path:
        """The folder that the run is written to."""
        return Path(self.recipe.training["output_dir"])


def main(words: list[str], program: Sequence[str] = ("recipes/pretrain.py",)) -> None:
    """Train, evaluate and save. A mistake of the user ends the process with one line, without a traceback.

    Args:
        words: the recipe file and its overrides, as on the command line; with `--dry-run` among them, a few steps are
            tried and nothing is saved.
        program: the words before them, for `command` in `summary.json`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if DRY_RUN in words:
            from sparseift_llm.runs.dry_run import dry_run

            logger.info(dry_run([word for word in words if word != DRY_RUN]))
            return
        run = prepare_run(words)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"pretrain: {error}")
    said = finish(run, [*program, *words])
    if run.args.process_index == 0:
        logger.info(said)


def prepare_run(words: Sequence[str]) -> PreparedRun:
    """Read the recipe, load its text, and build its model.

    Raises:
        ValueError: the user has to change the recipe, its text, or the output folder.
        FileNotFoundError: a file that the recipe names is missing, or the recipe itself.
    """
    recipe, args, resume_from, data = prepare(words)
    model = checked_model(recipe, data)
    if resume_from is not None:
        check_resumed(recipe, args, model, resume_from)
    check_recipe(recipe, data, args)
    if args.process_index == 0:
        logger.info(describe(recipe, model))
    return PreparedRun(recipe, args, model, data, resume_from)


def checked_model(recipe: Recipe, data: LoadedData) -> PreTrainedModel:
    """The recipe's model, of which it is known that it has all that the recipe's learning rates are for.

    Raises:
        ValueError: see `make_model`, `use_semi_structured_kernels` and `group_factors`.
    """
    model = make_model(recipe, data)
    if recipe.model.semi_structured_kernels and recipe.sparse_ift is None:
        logger.info("model.semi_structured_kernels is for sparse models; the dense one is trained without")
    elif recipe.model.semi_structured_kernels:
        use_semi_structured_kernels(model)
    factors = LearningRateFactors.of(recipe.training)
    group_factors(model, factors.embedding_lr_factor, factors.head_lr_factor)
    return model


def describe(recipe: Recipe, model: PreTrainedModel) -> str:
    """One line on what is going to be trained: sizes, sparsity, parameters, FLOPs."""
    return (sparsity_summary if recipe.sparse_ift else dense_summary)(model, recipe.data.seq_len)


def prepare(words: Sequence[str]) -> tuple[Recipe, TrainingArguments, Path | None, LoadedData]:
    """Everything before the model: the recipe, its arguments, the checkpoint to resume, and the data."""
    recipe = read_recipe(words)
    args = training_arguments(recipe)
    output_dir = Path(recipe.training["output_dir"])
    with args.main_process_first(local=False, desc="preparing the run"):
        resume_from = prepare_output(recipe, output_dir, args)
        recipe = recipe if resume_from is None else as_it_was_begun(recipe, output_dir)
        data = load_data(recipe.data, output_dir / DATA_NAME)
    set_seed(args.seed)
    return recipe, args, resume_from, data


def read_recipe(words: Sequence[str]) -> Recipe:
    """The recipe of a command line, whose output folder is none of the folders that it reads.

    Raises:
        ValueError: there is no recipe among the words, it is refused, or its text covers the output folder.
    """
    if not words or words[0].startswith("-"):
        raise ValueError("usage: sparseift pretrain RECIPE.yaml [--dry-run] [--field value ...]")
    recipe = load_recipe(words[0], words[1:])
    check_not_read(recipe.data, Path(recipe.training["output_dir"]), WRITTEN_NAMES, "training.output_dir")
    return recipe


def finish(run: PreparedRun, command: Sequence[str]) -> str:
    """Train a prepared run to its end, and write `summary.json` on the first rank.

    Args:
        run: see `prepare_run`.
        command: the command line, for the summary.

    Returns:
        One line with the held-out loss and where the summary is.
    """
    summary = train(run.recipe, run.args, run.model, run.data, run.resume_from)
    path = run.output_dir / SUMMARY_NAME
    if run.args.process_index == 0:
        write_json(path, {**summary, "command": shlex.join(command), "commit": commit()})
    return f"eval loss {summary['eval_loss']:.4f}; wrote {path}"


def train(
    recipe: Recipe, args: TrainingArguments, model: PreTrainedModel, data: LoadedData, resume_from: Path | None
) -> dict[str, Any]:
    """Run the Trainer to its end, save the model, and return the summary of the run.

    Args:
        recipe, args, model, data, resume_from: see `PreparedRun`.
    """
    tokens_per_step, seq_len = sequences_per_step(args) * recipe.data.seq_len, recipe.data.seq_len
    sparse = None
    speed: list[TrainerCallback] = []
    if recipe.sparse_ift:  # everything is logged, because the pages and comparisons of `sparseift report` need it
        sparse = SparseTrainingCallback("all", tokens_per_step, seq_len, peak_flops_per_second="measure")
    else:
        speed = [SpeedCallback(tokens_per_step, seq_len, peak_flops_per_second="measure")]
    log = MetricsLog(recipe.training["output_dir"], tokens_per_step, seq_len, sparse)
    callbacks = [*([sparse] if sparse else speed), log, StopBeforeExtraStep()]
    trainer = make_trainer(recipe, args, model, data, callbacks)
    for callback in speed:  # before trackers, so that they get what it adds
        trainer.callback_handler.callbacks.remove(callback)
        trainer.callback_handler.callbacks.insert(0, callback)
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    except AlreadyFinished:
        logger.info("%s is the run's last checkpoint: only evaluating", resume_from)
    trainer.save_model()  # before anything else can go wrong
    eval_loss = trainer.evaluate()["eval_loss"]
    totals = {**log.totals(trainer.state.global_step, model), "tokens_per_second": log.tokens_per_second}
    return _summary(recipe, args, model, data, eval_loss, totals)


def _summary(
    recipe: Recipe,
    args: TrainingArguments,
    model: PreTrainedModel,
    data: LoadedData,
    eval_loss: float,
    totals: dict[str, Any],
) -> dict[str, Any]:
    """The contents of `summary.json` but for the command and the commit.

    Args:
        recipe, args, model, data: see `PreparedRun`.
        eval_loss: held-out loss in nats per token.
        totals: see `MetricsLog.totals` and `MetricsLog.tokens_per_second`.
    """
    cost = cost_of(model, recipe.data.seq_len)
    return {
        "eval_loss": eval_loss,
        "perplexity": math.exp(eval_loss),
        "bits_per_byte": eval_loss / math.log(2) / data.bytes_per_eval_token,
        **totals,
        **cost.to_dict(),
        "linear_sparsity": 1 - cost.linear_active_params / cost.linear_params,
        "num_train_tokens": data.num_train_tokens,
        "num_eval_tokens": data.num_eval_tokens,
        "num_ranks": args.world_size,
        "device": str(args.device),
        "config": recipe.to_dict(),
        "machine": machine(),
        "versions": versions(),
    }
