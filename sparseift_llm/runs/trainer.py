"""The Trainer of a recipe: its learning-rate groups and schedule, whole steps per epoch, and its last step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, Subset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from sparseift_llm.data.loading import LoadedData
from sparseift_llm.data.packing import RepeatedStream
from sparseift_llm.runs.recipe import Recipe
from sparseift_llm.runs.recipe_training import LearningRateFactors
from sparseift_llm.training.learning_rates import cosine_to_plateau, optimizer_param_groups


class Pretrainer(Trainer):
    """Trainer with learning rates by group (embeddings, SµPar) and a cosine that may end before training does.

    It logs the rates of embeddings and head beside `learning_rate` where they have a factor.
    Its held-out loss is that of all held-out text in nats, whatever is done to labels and batches in training.
    """

    model: PreTrainedModel
    recipe: Recipe

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        is_supar = self.recipe.sparse_ift is not None and self.recipe.sparse_ift.init == "supar"
        factors = LearningRateFactors.of(self.recipe.training)
        if not is_supar and factors == LearningRateFactors():
            return super().create_optimizer(model)
        if self.optimizer is None:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = optimizer_param_groups(
                self.model,
                kwargs["lr"],
                self.args.weight_decay,
                embedding_lr_factor=factors.embedding_lr_factor,
                head_lr_factor=factors.head_lr_factor,
                decayed=self.get_decay_parameter_names(self.model),
            )
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "learning_rate" in logs:
            factors = LearningRateFactors.of(self.recipe.training)
            logs = {**logs, **factors.rates_at(logs["learning_rate"])}
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        smoother, drops_last = self.label_smoother, self.args.dataloader_drop_last
        self.label_smoother, self.args.dataloader_drop_last = None, False
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.label_smoother, self.args.dataloader_drop_last = smoother, drops_last

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.recipe.lr_decay_steps is None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        min_lr_rate = self.recipe.training["lr_scheduler_kwargs"]["min_lr_rate"]
        schedule = cosine_to_plateau(warmup, self.recipe.lr_decay_steps, min_lr_rate)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.create_optimizer(), schedule)
        self._created_lr_scheduler = True
        return self.lr_scheduler


def make_trainer(
    recipe: Recipe,
    args: TrainingArguments,
    model: PreTrainedModel,
    data: LoadedData,
    callbacks: Sequence[TrainerCallback],
) -> Pretrainer:
    """The Trainer of a recipe, ready to train.

    Raises:
        ValueError: the training text is too short for one step.
    """
    trainer = Pretrainer(
        model=model,
        args=args,
        train_dataset=whole_steps(data.train, sequences_per_step(args)),
        eval_dataset=data.eval,
        processing_class=data.tokenizer,
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )
    trainer.recipe = recipe
    return trainer


class AlreadyFinished(Exception):  # noqa: N818 - not an error
    """The resumed checkpoint is the last one of the run."""


class StopBeforeExtraStep(TrainerCallback):
    """A Trainer that resumes at its last step would train one more; weights and masks are loaded by then."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise AlreadyFinished


def sequences_per_step(args: TrainingArguments) -> int:
    """Sequences of one optimizer step, over all ranks and all micro-batches."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def whole_steps(dataset: Any, sequences_per_step: int) -> Any:
    """The training sequences, cut so that an epoch is a whole number of optimizer steps of the same size.

    Raises:
        ValueError: there are not enough sequences for one step.
    """
    if isinstance(dataset, IterableDataset):
        return RepeatedStream(dataset)
    length = len(dataset) // sequences_per_step * sequences_per_step
    if length == 0:
        raise ValueError(
            f"the training text has {len(dataset)} sequences, one optimizer step needs {sequences_per_step}; lower "
            "per_device_train_batch_size, gradient_accumulation_steps or seq_len, or give more text"
        )
    return Subset(dataset, range(length))
