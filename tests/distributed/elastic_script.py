"""What test_elastic.py runs under torchrun: Trainer runs that are killed, or resumed on another number of ranks.

Usage: see torchrun.py. The options come as JSON in SPARSEIFT_TEST_RUN.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from sparseift_llm import SparseTrainingController
from tests.distributed.torchrun import main
from tests.helpers.tiny_runs import controller_of, final_state, first_sparse, sparse_gpt2, sparse_trainer
from tests.helpers.trainer_script import kill

GLOBAL_BATCH, STEPS = 4, 12


def patch_update(rank: int) -> None:
    """The last rank dies in the mask update of step 6, when others already wait for it."""
    growth = SparseTrainingController._growth

    def patched(self: SparseTrainingController, name: str) -> Any:
        if self.step == 6 and name == first_sparse(self.model, "mlp.c_fc"):
            kill()
        return growth(self, name)

    if rank:
        SparseTrainingController._growth = patched  # type: ignore[method-assign]


def patch_random_state(rank: int) -> None:
    """The last rank dies with half of its random state written; the first one goes on to the checkpoint's end."""
    save = torch.save

    def patched(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        save(value, file, *args, **kwargs)
        path = Path(str(file))
        if path.parent.name == "checkpoint-8" and path.name.startswith("rng_state"):
            os.truncate(path, path.stat().st_size // 2)
            wait_for(path.with_name("trainer_state.json"))
            kill()

    if rank:
        torch.save = patched


def wait_for(path: Path) -> None:
    import time

    while not path.is_file():
        time.sleep(0.01)
    time.sleep(0.2)  # until it is whole


KILLS = {"": lambda rank: None, "update": patch_update, "random_state": patch_random_state}


def whole(rank: int, folder: Path) -> dict[str, Any]:
    return run_trainer(rank, folder / "whole", {"dropout": 0.1})


def without_dropout(rank: int, folder: Path) -> dict[str, Any]:
    return run_trainer(rank, folder / "without_dropout", {})


def trainer(rank: int, folder: Path) -> dict[str, Any]:
    return run_trainer(rank, folder, json.loads(os.environ["SPARSEIFT_TEST_RUN"]))


def run_trainer(rank: int, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """12 steps of 4 rows in all; a checkpoint after every fourth."""
    KILLS[options.get("kill", "")](rank)
    world_size = int(os.environ["WORLD_SIZE"])
    run = sparse_trainer(
        sparse_gpt2("rigl", dropout=options.get("dropout", 0.0)),
        folder / "out",
        per_device_train_batch_size=GLOBAL_BATCH // world_size,
        save_strategy="steps",
        save_steps=4,
        ddp_timeout=120,
    )
    assert run.args.world_size == world_size
    run.train(resume_from_checkpoint=options.get("resume"))
    return {**final_state(run), "digest": controller_of(run).masks_digest()}


if __name__ == "__main__":
    main("tests.distributed.elastic_script")
