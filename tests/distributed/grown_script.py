"""What test_grown_weights_ranks.py runs on two processes: what optimizers know of grown weights, sharded by FSDP2.

Usage: see torchrun.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from sparseift_llm.record.model_record import RECORD_KEY
from tests.distributed.ddp_modes_script import STEPS
from tests.distributed.fsdp_script import gathered, setting, sharded, steps
from tests.distributed.torchrun import main
from tests.helpers.tiny_runs import sparse_gpt2

RULES: dict[str, dict[str, Any]] = {
    "row_mean": {"grown_state": "row_mean"},
    "own_count": {"grown_state": "own_count", "grown_warmup_steps": 3},
    "saliency": {"drop_by": "saliency"},
}


def with_options(name: str, seed: int = 0) -> Any:
    """A tiny model whose mask updates have the options of RULES."""
    model = sparse_gpt2("rigl", seed=seed)
    values = getattr(model.config, RECORD_KEY)["transformation"]
    values["dst"] |= RULES[name]
    values["seed"] = 0
    return model


def _scenario(name: str, rank: int, folder: Path) -> dict[str, Any]:
    """Train; and go on in the middle from sharded state, in a model that began otherwise."""
    model = sharded(with_options(name))
    optimizer, controller = setting(model)
    history = steps(model, optimizer, stop=5)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / name)
    torch.save(controller.state_dict(), folder / f"{name}-controller-{rank}.pt")
    dist.barrier()
    history += steps(model, optimizer, start=5)
    other = sharded(with_options(name, seed=1))
    again, second = setting(other)
    weights, state = get_state_dict(other, again)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / name)
    set_state_dict(other, again, model_state_dict=weights, optim_state_dict=state)
    second.load_state_dict(torch.load(folder / f"{name}-controller-{rank}.pt", weights_only=True))
    rest = steps(other, again, start=5)
    assert len(history) == STEPS
    return {
        "history": history,
        **gathered(model, optimizer),
        "resumed": {"history": rest, **gathered(other, again)},
    }


globals().update({name: partial(_scenario, name) for name in RULES})

if __name__ == "__main__":
    main("tests.distributed.grown_script")
