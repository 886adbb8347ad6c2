"""Helpers of the training tests: tiny sparse models, data, Trainers, and bit-for-bit comparison of what they hold.

Not a test module; the scripts that tests start in other processes use it as well.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sparseift_llm import DSTConfig, SparseIFTConfig, SparseTrainingCallback, sparsify, to_dense
from sparseift_llm.config.transform import FamilyRule
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.layers.composite import CompositeProjection
from sparseift_llm.layers.masked import MaskedProjection, masked_projection
from sparseift_llm.record.model_record import DenseSizes, ModelRecord

VOCAB, LENGTH = 32, 8
STRUCTURES = ("unstructured", "block", "families", "family_tiles")  # Wide, then the other families in one model
STRUCTURE = os.environ.get("SPARSEIFT_TEST_STRUCTURE", "unstructured")  # set by the fixture `every_structure`
_TILES: dict[str, Any] = {"structure": "block", "block_size": 4}
_FAMILIES: dict[str, Any] = {
    "family": "parallel",
    "rules": (
        FamilyRule("doped", targets=("q", "k", "v")),
        FamilyRule("factorized", targets=("mlp_in",), nonlinearity="layernorm"),
    ),
}
STORAGES: dict[str, dict[str, Any]] = {
    "unstructured": {},
    "block": _TILES,
    "families": _FAMILIES,
    "family_tiles": {**_FAMILIES, **_TILES},
}


def sparse_gpt2(
    algorithm: str = "rigl",
    every: int = 2,
    seed: int = 0,
    dropout: float = 0.0,
    sparsity: float = 0.75,
    hidden: int = 16,
    stop_fraction: float = 0.75,
    linear: bool = False,
) -> PreTrainedModel:
    """A one-block GPT-2 with float64 weights, 75% sparse by default; equal for equal arguments.

    Wide models grow from `hidden` to about twice that; those of other families are as wide from the start. `linear`
    leaves out the families' non-linearities.
    """
    storage = dict(STORAGES[STRUCTURE])
    if "family" in storage:
        hidden *= 2
        if linear:
            rules = tuple(
                dataclasses.replace(rule, nonlinearity="none") if rule.family == "factorized" else rule
                for rule in storage["rules"]
            )
            storage.update(nonlinearity="none", rules=rules)
    torch.manual_seed(seed)
    dense = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=LENGTH,
            n_embd=hidden,
            n_layer=1,
            n_head=2,
            attn_pdrop=dropout,
            embd_pdrop=dropout,
            resid_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    dst = DSTConfig(algorithm, update_every_steps=every, drop_fraction=0.3, stop_fraction=stop_fraction)
    if "block_size" in storage and algorithm in ("gmp", "granet"):
        pytest.skip("gradual pruning starts dense")
    return sparsify(dense.double(), SparseIFTConfig(sparsity=sparsity, seed=seed, dst=dst, **storage))


def first_sparse(model: nn.Module, projection: str) -> str:
    """The name of the first sparse layer in a projection of the model's block, or of the projection itself."""
    path = f"transformer.h.0.{projection}"
    return next(name for name in sparse_layers(model) if name == path or name.startswith(f"{path}."))


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy that computes the same with stock layers in place of sparse ones, parameters under their names."""
    if not any(isinstance(module, CompositeProjection) for module in model.modules()):
        return to_dense(model)  # type: ignore[arg-type]
    dense = copy.deepcopy(model)
    for name, layer in sparse_layers(dense).items():
        dense.set_submodule(name, layer.to_dense())
    return dense


class ToyModel(PreTrainedModel):
    """One sparse layer whose dense gradient is whatever `loss` is asked for."""

    def __init__(self, weight: Tensor, mask: Tensor, dst: DSTConfig, seed: int = 0) -> None:
        super().__init__(PreTrainedConfig())
        self.layer = toy_layer(weight, mask)
        record = ModelRecord(SparseIFTConfig(seed=seed, dst=dst), DenseSizes(1, 1, 1, 1), layers=())
        self.config.sparse_ift = record.to_dict()

    def loss(self, gradient: Tensor) -> Tensor:
        """A loss whose gradient for the unmasked weight is exactly `gradient`."""
        identity = torch.eye(gradient.shape[1], dtype=gradient.dtype)
        return (self.layer(identity) * gradient.T).sum()


def toy_layer(weight: Tensor, mask: Tensor, num_active: int | None = None) -> MaskedProjection:
    """A sparse linear layer with the given (out, in) weight and mask."""
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        dense.weight.copy_(weight)
    active = int(mask.sum()) if num_active is None else num_active
    layer = masked_projection(dense, active, (weight.shape[0], weight.shape[1]))
    layer.set_mask(mask)
    return layer


def bits(text: str) -> Tensor:
    """`"10 01"` -> a (2, 2) bool mask."""
    return torch.tensor([[character == "1" for character in row] for row in text.split()])


def batches(num: int, size: int = 8, seed: int = 0) -> Iterator[Tensor]:
    """`num` batches of token ids, (size, LENGTH)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        yield torch.randint(VOCAB, (size, LENGTH), generator=generator)


def micro_batches(batch: Tensor, num_micro: int) -> Iterator[Callable[[nn.Module], Tensor]]:
    """Losses of the parts of `batch`, which add up to the mean loss over the whole of it."""
    for part in batch.chunk(num_micro):
        yield lambda model, part=part: model(input_ids=part, labels=part).loss / num_micro


def train(
    model: nn.Module,
    optimizer: Optimizer,
    data: Iterator[Tensor],
    num_micro: int = 1,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """The plainest training loop."""
    for batch in data:
        for loss in micro_batches(batch, num_micro):
            loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all masks."""
    return {name: layer.current_mask().clone() for name, layer in sparse_layers(model).items()}


def snapshot(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Copies of weights, masks and optimizer state."""
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    state = {
        index: {key: value.clone() if isinstance(value, Tensor) else value for key, value in entry.items()}
        for index, entry in optimizer.state_dict()["state"].items()
    }
    return {"weights": weights, "masks": masks(model), "optimizer": state}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters, by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Paths at which two nested structures of tensors and values differ in any bit."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        if first.keys() != second.keys():
            return [f"{path}: keys {sorted(map(str, first.keys() ^ second.keys()))}"]
        return [line for key in first for line in differences(first[key], second[key], f"{path}/{key}")]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        if len(first) != len(second):
            return [f"{path}: {len(first)} and {len(second)} entries"]
        pairs = enumerate(zip(first, second, strict=True))
        return [line for index, (a, b) in pairs for line in differences(a, b, f"{path}/{index}")]
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        same = first.dtype == second.dtype and torch.equal(first, second)
    else:
        same = type(first) is type(second) and first == second
    return [] if same else [path]


def violations(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Where an inactive weight, or any per-element optimizer state of one, is not exactly 0."""
    found = []
    for name, layer in sparse_layers(model).items():
        if isinstance(layer, BlockSparseLinear):  # stores no inactive weights
            continue
        if layer.weight[~layer.mask].any():
            found.append(f"{name}.weight")
        for key, value in optimizer.state.get(layer.weight, {}).items():
            if isinstance(value, Tensor) and value.shape == layer.weight.shape and value[~layer.mask].any():
                found.append(f"{name}.{key}")
    return found


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A fixed data set of `num` token sequences."""

    def __init__(self, num: int = 20, seed: int = 7) -> None:
        self.rows = torch.cat(list(batches(1, num, seed)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def make_trainer(
    model: PreTrainedModel,
    output_dir: Path | str,
    *callbacks: TrainerCallback,
    steps: int = 12,
    trainer_class: type[Trainer] = Trainer,
    **arguments: Any,
) -> Trainer:
    """A plain CPU Trainer on `Rows`, batches of 4, learning rate high enough to move masks in a few steps."""
    options: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(output_dir=str(output_dir), **{**options, **arguments})
    return trainer_class(
        model=model, args=args, train_dataset=Rows(), eval_dataset=Rows(8, seed=8), callbacks=list(callbacks)
    )


def sparse_trainer(model: PreTrainedModel, output_dir: Path | str, **options: Any) -> Trainer:
    """`make_trainer` with the callback under test."""
    return make_trainer(model, output_dir, SparseTrainingCallback(), **options)


def controller_of(trainer: Trainer) -> Any:
    """The controller that the Trainer's callback made."""
    (callback,) = (item for item in trainer.callback_handler.callbacks if isinstance(item, SparseTrainingCallback))
    return callback.controller


def final_state(trainer: Trainer) -> dict[str, Any]:
    """All that two equal runs must share: weights, masks, optimizer state, logged losses, counters."""
    assert trainer.model is not None
    log = [
        {key: entry[key] for key in ("step", "loss", "grad_norm")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    counters = controller_of(trainer).counters()
    return {**snapshot(trainer.model, trainer.optimizer), "log": log, "counters": counters}
