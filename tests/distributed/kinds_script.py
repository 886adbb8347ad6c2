"""What test_kinds_apart.py runs on two CPU processes: twenty updates of each tiny model.

Usage: `torchrun --nproc_per_node 2 -m tests.distributed.kinds_script SCENARIO,... FOLDER`, see torchrun.py. A scenario
is a model's name (RigL, single weights), or one of PATTERNS, replicated or sharded by FSDP2.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from sparseift_llm import SparseTrainingController
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.masked import has_surplus
from sparseift_llm.layers.sharding import whole
from tests.distributed.torchrun import main
from tests.helpers.kind_rows import MODELS, kind_counts, sparse_decoder
from tests.helpers.models import token_ids
from tests.helpers.patterns import wrong_groups

UPDATES = 20
PATTERNED = ("gpt2", "llama", "gpt_neox")
# scenario -> model, algorithm, structure and whether masks are transposable
REPLICATED = {
    f"{name}_{algorithm}": (name, algorithm, "2:4", False) for name in PATTERNED for algorithm in ("rigl", "set")
} | {
    "gpt2_static": ("gpt2", "static", "2:4", False),
    "llama_rigl_1_of_4": ("llama", "rigl", "1:4", False),
    "gpt2_rigl_transposable": ("gpt2", "rigl", "2:4", True),
    "llama_set_transposable": ("llama", "set", "2:4", True),
}
SHARDED = {f"{name}_sharded": REPLICATED[name] for name in ("gpt2_rigl", "llama_set_transposable")}
PATTERNS = {**REPLICATED, **SHARDED}


def counts_over_updates(name: str, rank: int | None, **options: Any) -> dict[str, Any]:
    """Active weights of q, k and v before the first update and after each; and the masks in the end.

    Args:
        name: the model.
        rank: takes half of each batch; None takes all.
        options: of the transformation.
    """
    model = sparse_decoder(name, **options)
    wrapped = model if rank is None else DistributedDataParallel(model)
    optimizer = SGD(model.parameters(), lr=0.05)
    controller = SparseTrainingController(wrapped, optimizer, total_steps=2 * UPDATES)
    history = [kind_counts(model)]
    for step in range(UPDATES):
        take_step(wrapped, optimizer, step, rank)
        history.append(kind_counts(model))
    assert controller.cost.num_updates == UPDATES
    return {"history": torch.stack(history), "digest": controller.masks_digest()}


def _scenario(name: str, rank: int, folder: Path) -> dict[str, Any]:
    return counts_over_updates(name, rank)


def take_step(wrapped: Any, optimizer: Any, step: int, rank: int | None) -> None:
    """On the rank's half of a batch, or on all of it in one process."""
    batch = token_ids(batch=4, seed=step)
    tokens = batch if rank is None else batch.chunk(2)[rank]
    wrapped(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def groups_over_updates(name: str, rank: int | None) -> dict[str, Any]:
    """The layers with a group of m that has not n active weights after any update, or with other weights; and masks.

    Args:
        name: of PATTERNS.
        rank: as above.
    """
    model_name, algorithm, structure, transposable = PATTERNS[name]
    n, m = map(int, structure.split(":"))
    model = sparse_decoder(model_name, algorithm, structure=structure, transposable=transposable)
    wrapped = model if rank is None else _sharded(model) if name in SHARDED else DistributedDataParallel(model)
    optimizer = SGD(model.parameters(), lr=0.05)
    controller = SparseTrainingController(wrapped, optimizer, total_steps=2 * UPDATES)
    wrong, digests = wrong_groups(model, n, m, transposable), [controller.masks_digest()]
    for step in range(UPDATES):
        take_step(wrapped, optimizer, step, rank)
        wrong += wrong_groups(model, n, m, transposable)
        digests.append(controller.masks_digest())
    layers: Any = sparse_layers(model)
    surplus = [key for key, layer in layers.items() if has_surplus(whole(layer.weight.detach()), layer.mask)]
    return {"wrong": wrong + surplus, "digests": digests}


def _sharded(model: nn.Module) -> nn.Module:
    """Each decoder layer a unit of its own, then the rest."""
    for layer in next(module for module in model.modules() if isinstance(module, nn.ModuleList)):
        fully_shard(layer)
    fully_shard(model)
    return model


def _pattern_scenario(name: str, rank: int, folder: Path) -> dict[str, Any]:
    return groups_over_updates(name, rank)


globals().update({name: partial(_scenario, name) for name in MODELS})
globals().update({name: partial(_pattern_scenario, name) for name in PATTERNS})

if __name__ == "__main__":
    main("tests.distributed.kinds_script")
