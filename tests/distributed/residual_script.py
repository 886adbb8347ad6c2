"""What test_residual_ranks.py runs under torchrun: models with a wider residual stream, replicated and sharded.

Usage: see torchrun.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from sparseift_llm import SparseTrainingController, load_pretrained
from sparseift_llm.layers.sharding import whole
from tests.distributed.ddp_modes_script import part
from tests.distributed.torchrun import main
from tests.helpers.residual import STORAGES, residual_model
from tests.helpers.tiny_runs import batches, masks, train

STEPS = 4


def new_model(storage: str) -> Any:
    """Tied, with masks that move everywhere."""
    options = {**STORAGES[storage], "embedding_updates": True, "every": 2}
    return residual_model(algorithm="rigl", **options).train()


def trained(model: Any, inner: Any, data: Any) -> dict[str, Any]:
    optimizer = AdamW(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, total_steps=8)
    train(model, optimizer, data)
    weights = {name: whole(value.detach()).clone() for name, value in inner.named_parameters()}
    return {"masks": masks(inner), "weights": weights, "digest": controller.masks_digest()}


def _replicated(storage: str) -> dict[str, Any]:
    model = new_model(storage)
    return trained(DistributedDataParallel(model), model, (part(batch) for batch in batches(STEPS)))


def _sharded(storage: str, folder: Path, rank: int) -> dict[str, Any]:
    """Each layer a unit of its own, and a last one for both ends; saved whole and loaded again."""
    model = new_model(storage)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    result = trained(model, model, (part(batch) for batch in batches(STEPS)))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    target = folder / f"sharded-{storage}"
    model.save_pretrained(target, is_main_process=rank == 0, state_dict=state)
    dist.barrier()
    loaded = load_pretrained(target, dtype=torch.float64)
    return {**result, "loaded": masks(loaded), "is_tied": loaded.lm_head.weight is loaded.model.embed_tokens.weight}


def replicated_masks(rank: int, folder: Path) -> dict[str, Any]:
    return _replicated("masks")


def replicated_tiles(rank: int, folder: Path) -> dict[str, Any]:
    return _replicated("tiles")


def sharded_masks(rank: int, folder: Path) -> dict[str, Any]:
    return _sharded("masks", folder, rank)


def sharded_tiles(rank: int, folder: Path) -> dict[str, Any]:
    return _sharded("tiles", folder, rank)


if __name__ == "__main__":
    main("tests.distributed.residual_script")
