"""What test_kinds_apart.py runs on two CPU processes: twenty RigL updates of each tiny model.

Usage: `torchrun --nproc_per_node 2 -m tests.distributed.kinds_script MODEL,... FOLDER`, see torchrun.py.
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

UPDATES = 20


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
        batch = token_ids(batch=4, seed=step)
        tokens = batch if rank is None else batch.chunk(2)[rank]
        wrapped(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(kind_counts(model))
    assert controller.cost.num_updates == UPDATES
    return {"history": torch.stack(history), "digest": controller.masks_digest()}


def _scenario(name: str, rank: int, folder: Path) -> dict[str, Any]:
    return counts_over_updates(name, rank)


globals().update({name: partial(_scenario, name) for name in MODELS})

if __name__ == "__main__":
    main("tests.distributed.kinds_script")
