"""What test_ddp.py runs under torchrun on two CPU processes: a plain loop, a corrupted mask, or a Trainer.

Usage: `torchrun --nproc_per_node 2 -m tests.distributed.ddp_script SCENARIO FOLDER`.
Each rank leaves `FOLDER/SCENARIO-RANK.pt`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from sparseift_llm import SparseTrainingController
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from tests.helpers.tiny_runs import (
    batches,
    controller_of,
    differences,
    final_state,
    first_sparse,
    masks,
    snapshot,
    sparse_gpt2,
    sparse_trainer,
    train,
    violations,
)

STEPS = 10


def plain(rank: int, folder: Path) -> dict[str, Any]:
    """Each rank takes its half of every global batch of 8, in two micro-batches of which the first is not synced."""
    model = sparse_gpt2("rigl")
    wrapped = DistributedDataParallel(model)
    optimizer = AdamW(wrapped.parameters(), lr=0.01)
    controller = SparseTrainingController(wrapped, optimizer, total_steps=STEPS)
    history = []
    for batch in batches(STEPS):
        first, second = batch.chunk(2)[rank].chunk(2)
        with wrapped.no_sync():
            (wrapped(input_ids=first, labels=first).loss / 2).backward()
        (wrapped(input_ids=second, labels=second).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(masks(wrapped))
    return {
        "history": history,
        "digest": controller.masks_digest(),
        "counters": controller.counters(),
        "names": list(controller.layers),
        "violations": violations(model, optimizer),
        **snapshot(model, optimizer),
    }


def corrupted(rank: int, folder: Path) -> dict[str, Any]:
    """One mask is another on rank 1, by a bit or, of tiles, in every row; the message each rank gets at an update."""
    model = sparse_gpt2("set", every=3)
    wrapped = DistributedDataParallel(model)
    optimizer = AdamW(wrapped.parameters(), lr=0.01)
    controller = SparseTrainingController(wrapped, optimizer, total_steps=STEPS)
    train(wrapped, optimizer, batches(4))
    if rank == 1:
        layer = sparse_layers(model)[first_sparse(model, "mlp.c_fc")]
        mask = layer.current_mask().clone()
        if isinstance(layer, BlockSparseLinear):  # a single tile could be dropped by the update itself
            mask = mask.roll(1, dims=1)
        else:
            mask.view(-1)[int((~mask.view(-1)).nonzero()[0])] = True
        layer.set_mask(mask)
    message = ""
    try:
        train(wrapped, optimizer, batches(4))
    except RuntimeError as error:
        message = str(error)
    return {"message": message, "step": controller.step}


def compiled(rank: int, folder: Path) -> dict[str, Any]:
    """Layer names in every order of wrapping."""
    inside: Any = torch.compile(sparse_gpt2("rigl"), backend="eager")
    outside: Any = torch.compile(DistributedDataParallel(sparse_gpt2("rigl")), backend="eager")
    models: list[nn.Module] = [sparse_gpt2("rigl"), inside, outside, DistributedDataParallel(inside)]
    return {"names": [list(sparse_layers(model)) for model in models]}


def trainer(rank: int, folder: Path) -> dict[str, Any]:
    """The HF Trainer with two rows per rank; then the same resumed from its own checkpoint."""
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 5}
    states = []
    for resume in (None, str(folder / "out" / "checkpoint-5")):
        run = sparse_trainer(sparse_gpt2("rigl"), folder / "out", **options)
        assert run.args.world_size == 2
        run.train(resume_from_checkpoint=resume)
        assert isinstance(run.model_wrapped, DistributedDataParallel)
        states.append(final_state(run))
    return {**states[0], "digest": controller_of(run).masks_digest(), "resumed": differences(states[0], states[1])}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    this_rank = int(os.environ["RANK"])
    for scenario in sys.argv[1].split(","):
        target = Path(sys.argv[2])
        result = {"plain": plain, "corrupted": corrupted, "compiled": compiled, "trainer": trainer}[scenario](
            this_rank, target
        )
        torch.save(result, target / f"{scenario}-{this_rank}.pt")
        torch.compiler.set_stance("default")
    dist.destroy_process_group()
