"""Pretrain a dense GPT or its Sparse-IFT twin from a recipe file.

    accelerate launch recipes/pretrain.py recipes/demo.yaml [--field value ...]

Copy this file and change it: it is `transformers.Trainer`, `sparsify` and one callback.
"""

from __future__ import annotations

import logging
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, Subset
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparseift_llm import SparseTrainingCallback, optimizer_param_groups, sparsify
from sparseift_llm.checkpoints.trainer_folder import is_complete, last_complete_checkpoint
from sparseift_llm.conversion.scaling import cosine_to_plateau, truncate_weights
from sparseift_llm.data.options import LoadedData, load_data
from sparseift_llm.data.packing import RepeatedStream
from sparseift_llm.models.architectures import build_model, set_tokenizer_fields
from sparseift_llm.models.presets import load_config, load_trained
from sparseift_llm.planning.planner import cost_of
from sparseift_llm.runs.recipe import Recipe, load_recipe, recorded_recipe
from sparseift_llm.runs.record import METRICS_NAME, RECIPE_NAME, SUMMARY_NAME, RunRecord
from sparseift_llm.utils.outputs import write_json
from sparseift_llm.utils.provenance import commit, machine, versions

logger = logging.getLogger("pretrain")


def main(words: list[str]) -> None:
    """Train, evaluate, save. `words` is the command line: the recipe and its overrides."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        recipe, args, resume_from, data = prepare(words)
        model = make_model(recipe, data)
        check_recipe(recipe, data, args)
    except (ValueError, FileNotFoundError) as error:  # the user's to mend: no traceback
        sys.exit(f"pretrain: {error}")
    summary = train(recipe, args, model, data, resume_from)
    if args.process_index == 0:
        path = Path(recipe.training["output_dir"]) / SUMMARY_NAME
        write_json(path, {**summary, "command": shlex.join(["recipes/pretrain.py", *words]), "commit": commit()})
        logger.info("eval loss %.4f; wrote %s", summary["eval_loss"], path)


def prepare(words: list[str]) -> tuple[Recipe, TrainingArguments, Path | None, LoadedData]:
    """Everything before the model: the recipe, its arguments, the checkpoint to resume, and the data."""
    if not words or words[0].startswith("-"):
        raise ValueError("usage: accelerate launch recipes/pretrain.py RECIPE.yaml [--field value ...]")
    recipe = load_recipe(words[0], words[1:])
    args = training_arguments(recipe)
    output_dir = Path(recipe.training["output_dir"])
    with args.main_process_first(local=False, desc="preparing the run"):
        resume_from = prepare_output(recipe, output_dir, args)
        data = load_data(recipe.data, output_dir / "data")
    set_seed(args.seed)
    return recipe, args, resume_from, data


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's training section as TrainingArguments; resuming is handled by this script."""
    values = {key: value for key, value in recipe.training.items() if key != "resume_from_checkpoint"}
    values.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    try:
        return TrainingArguments(**values)
    except TypeError as error:
        raise ValueError(f"training: {error}") from error


def prepare_output(recipe: Recipe, output_dir: Path, args: TrainingArguments) -> Path | None:
    """Find the checkpoint to resume from, if asked to; refuse to overwrite another run.

    Returns:
        A complete checkpoint, or None to start at step 0.
    """
    resume = recipe.training.get("resume_from_checkpoint")
    if args.process_index == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        used = any(output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")) or (output_dir / METRICS_NAME).is_file()
        if used and not resume:
            raise ValueError(
                f"{output_dir} already holds a run; continue it with --resume_from_checkpoint true, "
                "or choose another --output_dir"
            )
        if not resume:
            (output_dir / RECIPE_NAME).unlink(missing_ok=True)
    if isinstance(resume, str):
        if not is_complete(Path(resume)):
            raise ValueError(f"resume_from_checkpoint={resume!r} is not a folder with a complete checkpoint")
        return Path(resume)
    if not resume:
        return None
    checkpoint = last_complete_checkpoint(output_dir)
    if checkpoint is None:
        logger.info("%s has no complete checkpoint yet: starting at step 0", output_dir)
    return checkpoint


def check_recipe(recipe: Recipe, data: LoadedData, args: TrainingArguments) -> None:
    """Write `recipe.json`; refuse to go on with another model, data or sparsity than the run began with."""
    path = Path(recipe.training["output_dir"]) / RECIPE_NAME
    now = {**recipe.to_dict(), "data_fingerprint": data.fingerprint, "versions": versions()}
    before = recorded_recipe(path) if path.is_file() else now
    before["data"]["cache_dir"] = now["data"]["cache_dir"]  # where tokens are kept does not matter
    for key in ("model", "data", "sparse_ift", "data_fingerprint"):
        if before.get(key) != now[key]:
            raise ValueError(
                f"{path.parent} was begun with another {key}: {before.get(key)}, now {now[key]}; resume with the same "
                "recipe and text, or choose another --output_dir"
            )
    if args.process_index == 0:
        write_json(path, now)


def make_model(recipe: Recipe, data: LoadedData) -> PreTrainedModel:
    """The dense model, freshly initialised or trained, or its Sparse-IFT twin."""
    config = model_config(recipe)
    if recipe.model.from_pretrained is not None:
        if len(data.tokenizer) > config.vocab_size:
            raise ValueError(
                f"data.tokenizer has {len(data.tokenizer)} entries, but {recipe.model.from_pretrained} knows "
                f"{config.vocab_size}; set data.tokenizer to the model's own"
            )
        dense = load_trained(recipe.model.from_pretrained, config)
        return sparsify(dense, recipe.sparse_ift) if recipe.sparse_ift else dense
    set_tokenizer_fields(config, data.tokenizer)
    model = sparsify(config, recipe.sparse_ift) if recipe.sparse_ift else build_model(config)
    if recipe.model.init_truncation is not None:
        truncate_weights(model, recipe.model.init_truncation)
    return model


def model_config(recipe: Recipe) -> PreTrainedConfig:
    """The dense config that the recipe names, with its changes."""
    name = recipe.model.from_pretrained or recipe.model.name
    assert name is not None  # ModelConfig sees to it
    config = load_config(name)
    for key, value in recipe.model.config.items():
        if not hasattr(config, key):
            raise ValueError(f"model.config: {config.model_type} has no field {key!r}")
        setattr(config, key, value)
    max_positions = getattr(config, "max_position_embeddings", None)
    if max_positions is not None and recipe.data.seq_len > max_positions:
        raise ValueError(f"data.seq_len={recipe.data.seq_len} is above the model's {max_positions} positions")
    config.use_cache = False
    return config


class Pretrainer(Trainer):
    """Trainer with SµPar's learning-rate groups and a cosine that may end before training does."""

    model: PreTrainedModel
    recipe: Recipe

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.recipe.sparse_ift is None or self.recipe.sparse_ift.init != "supar":
            return super().create_optimizer(model)
        if self.optimizer is None:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(optimizer_param_groups(self.model, kwargs["lr"], self.args.weight_decay), **kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.recipe.lr_decay_steps is None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        min_lr_rate = self.recipe.training["lr_scheduler_kwargs"]["min_lr_rate"]
        schedule = cosine_to_plateau(warmup, self.recipe.lr_decay_steps, min_lr_rate)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.create_optimizer(), schedule)
        self._created_lr_scheduler = True
        return self.lr_scheduler


class AlreadyFinished(Exception):  # noqa: N818 - not an error
    """The resumed checkpoint is the run's last."""


class StopBeforeExtraStep(TrainerCallback):
    """A Trainer that resumes at its last step would train one more; weights and masks are loaded by then."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise AlreadyFinished


def sequences_per_step(args: TrainingArguments) -> int:
    """Sequences of one optimizer step: all ranks, all micro-batches."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def whole_steps(dataset: Any, sequences_per_step: int) -> Any:
    """The training sequences cut so that an epoch is a whole number of optimizer steps, all of the same size."""
    if isinstance(dataset, IterableDataset):
        return RepeatedStream(dataset)
    length = len(dataset) // sequences_per_step * sequences_per_step
    if length == 0:
        raise ValueError(
            f"the training text has {len(dataset)} sequences, one optimizer step needs {sequences_per_step}; lower "
            "per_device_train_batch_size, gradient_accumulation_steps or seq_len, or give more text"
        )
    return Subset(dataset, range(length))


def train(
    recipe: Recipe, args: TrainingArguments, model: PreTrainedModel, data: LoadedData, resume_from: Path | None
) -> dict[str, Any]:
    """Run the Trainer to its end, save the model, and return the run's summary."""
    tokens_per_step, seq_len = sequences_per_step(args) * recipe.data.seq_len, recipe.data.seq_len
    sparse = None
    if recipe.sparse_ift:
        sparse = SparseTrainingCallback(
            tokens_per_step=tokens_per_step, seq_len=seq_len, peak_flops_per_second="measure"
        )
    record = RunRecord(recipe.training["output_dir"], tokens_per_step, seq_len, sparse)
    trainer = Pretrainer(
        model=model,
        args=args,
        train_dataset=whole_steps(data.train, sequences_per_step(args)),
        eval_dataset=data.eval,
        processing_class=data.tokenizer,
        data_collator=default_data_collator,
        callbacks=[*([sparse] if sparse else []), record, StopBeforeExtraStep()],
    )
    trainer.recipe = recipe
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    except AlreadyFinished:
        logger.info("%s is the run's last checkpoint: only evaluating", resume_from)
    eval_loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    totals = record.totals(trainer.state.global_step, model)
    cost = cost_of(model, recipe.data.seq_len)
    return {
        "eval_loss": eval_loss,
        "perplexity": math.exp(eval_loss),
        "bits_per_byte": eval_loss / math.log(2) / data.bytes_per_eval_token,
        **totals,
        "tokens_per_second": totals["train_tokens"] / totals["step_seconds"],
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


if __name__ == "__main__":
    main(sys.argv[1:])
