"""What test_kinds_apart.py runs on two CPU processes: twenty updates of each tiny model.

Usage: `torchrun --nproc_per_node 2 -m tests.distributed.kinds_script SCENARIO,... FOLDER`, see torchrun.py. A scenario
is a model's name (RigL, single weights), or one of PATTERNS.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from sparseift_llm import SparseTrainingController
from tests.distributed.torchrun import main
from tests.helpers.kind_rows import MODELS, kind_counts, sparse_decoder
from tests.helpers.models import token_ids
from tests.helpers.patterns import wrong_groups

UPDATES = 20
PATTERNED = ("gpt2", "llama", "gpt_neox")
# scenario -> model, algorithm and structure
PATTERNS = {f"{name}_{algorithm}": (name, algorithm, "2:4") for name in PATTERNED for algorithm in ("rigl", "set")} | {
    "gpt2_static": ("gpt2", "static", "2:4"),
    "llama_rigl_1_of_4": ("llama", "rigl", "1:4"),
}


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
    """The layers with a group of m that has not n active weights after any update, by scenario; and the masks.

    Args:
        name: of PATTERNS.
        rank: as above.
    """
    model_name, algorithm, structure = PATTERNS[name]
    n, m = map(int, structure.split(":"))
    model = sparse_decoder(model_name, algorithm, structure=structure)
    wrapped = model if rank is None else DistributedDataParallel(model)
    optimizer = SGD(model.parameters(), lr=0.05)
    controller = SparseTrainingController(wrapped, optimizer, total_steps=2 * UPDATES)
    wrong, digests = wrong_groups(model, n, m), [controller.masks_digest()]
    for step in range(UPDATES):
        take_step(wrapped, optimizer, step, rank)
        wrong += wrong_groups(model, n, m)
        digests.append(controller.masks_digest())
    return {"wrong": wrong, "digests": digests}


def _pattern_scenario(name: str, rank: int, folder: Path) -> dict[str, Any]:
    return groups_over_updates(name, rank)


globals().update({name: partial(_scenario, name) for name in MODELS})
globals().update({name: partial(_pattern_scenario, name) for name in PATTERNS})

if __name__ == "__main__":
    main("tests.distributed.kinds_script")
