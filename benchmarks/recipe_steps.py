"""Step times of the models of recipes, measured in turns; both studies of quality use it for their `time`."""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparseift_llm import sparsify
from sparseift_llm.bench.measure import take_turns
from sparseift_llm.models.architectures import build_model
from sparseift_llm.runs.model import model_config
from sparseift_llm.runs.recipe import Recipe
from sparseift_llm.utils.provenance import commit, machine, versions

REPEATS = 15


def step_times(recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    """Median seconds of a training step (AdamW, no mask update) by the recipes' names; they take turns, one thread."""
    torch.set_num_threads(1)
    times = take_turns({name: {"step": training_step(recipe)} for name, recipe in recipes.items()}, "cpu", REPEATS)
    return {
        "step_seconds": {name: statistics.median(parts["step"]) for name, parts in times.items()},
        "num_threads": 1,
        "repeats": REPEATS,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def training_step(recipe: Recipe) -> Callable[[], None]:
    """One step of the recipe's model on random tokens, batch and length as in the recipe."""
    config = model_config(recipe)
    config.vocab_size = recipe.data.vocab_size
    model = sparsify(config, recipe.sparse_ift) if recipe.sparse_ift else build_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    shape = (recipe.training["per_device_train_batch_size"], recipe.data.seq_len)
    tokens = torch.randint(config.vocab_size, shape)
    return partial(take_step, model, optimizer, tokens)


def take_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    """Forward, backward, optimizer."""
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
