"""2,000 steps with an update every 10: counts, zeros and digests hold to the end."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.optim import AdamW

from sparseift_llm import SparseTrainingController
from sparseift_llm.checkpoints.mask_file import digest
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from tests.helpers.tiny_runs import batches, masks, sparse_gpt2, train, violations

STEPS, EVERY = 2000, 10


@pytest.mark.support("2,000 steps, an update every 10")
@pytest.mark.structures("unstructured", "block", "families")
@pytest.mark.usefixtures("either_structure")
def test_soak() -> None:
    model = sparse_gpt2("rigl", every=EVERY, stop_fraction=1.0).float()  # type: ignore[arg-type]
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
    controller = SparseTrainingController(model, optimizer, total_steps=STEPS, micro_batches=1)
    planned = {name: layer.count_active() for name, layer in sparse_layers(model).items()}
    per_row = rows_of_tiles(model)
    digests = [controller.masks_digest()]

    def check() -> None:
        if controller.step % EVERY:
            return
        assert violations(model, optimizer) == []
        assert {name: layer.count_active() for name, layer in sparse_layers(model).items()} == planned
        assert rows_of_tiles(model) == per_row
        assert digest(masks(model)) == controller.masks_digest()
        digests.append(controller.masks_digest())

    train(model, optimizer, batches(STEPS, size=2), after_step=check)
    assert controller.cost.num_updates == STEPS // EVERY - 1  # not at the step where updates stop
    changes = sum(a != b for a, b in pairwise(digests))
    assert changes > 0.8 * controller.cost.num_updates
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def rows_of_tiles(model: torch.nn.Module) -> dict[str, list[int]]:
    """Active tiles per block-row."""
    layers = sparse_layers(model).items()
    return {
        name: layer.current_mask().sum(1).tolist() for name, layer in layers if isinstance(layer, BlockSparseLinear)
    }
