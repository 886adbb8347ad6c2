"""What updates drop: by magnitude, or by a saliency that Adam's state has accumulated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW

from sparseift_llm import DSTConfig, SparseTrainingController
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.record.model_record import RECORD_KEY
from sparseift_llm.training.importance import Saliency, magnitude
from tests.helpers.tiny_runs import batches, differences, masks, snapshot, sparse_gpt2, train


def fresh(drop_by: str) -> tuple[Any, Any]:
    model = sparse_gpt2("rigl")
    getattr(model.config, RECORD_KEY)["transformation"]["dst"]["drop_by"] = drop_by
    return model, AdamW(model.parameters(), lr=0.01)


@pytest.mark.usefixtures("either_structure")
def test_scores_of_units_are_sums_of_their_weights_scores() -> None:
    model, optimizer = fresh("saliency")
    train(model, optimizer, batches(3))
    for layer in sparse_layers(model).values():
        mask = layer.current_mask()
        moment = optimizer.state[layer.weight]["exp_avg_sq"]
        for score, values in (
            (magnitude(layer), layer.weight.detach().abs()),
            (Saliency(optimizer)(layer), layer.weight.detach().abs() * moment.sqrt()),
        ):
            assert score.shape == mask.shape
            assert not score[~mask].any()
            if not isinstance(layer, BlockSparseLinear):
                assert torch.equal(score, values)
                continue
            rows = mask.nonzero()[:, 0]
            for row, column, tile in zip(rows.tolist(), layer.columns.tolist(), values, strict=True):
                assert float(score[row, column]) == pytest.approx(float(tile.sum()), rel=1e-12)


@pytest.mark.support("drop_by: saliency")
@pytest.mark.usefixtures("either_structure")
def test_saliency_drops_others_and_resumes_to_the_bit() -> None:
    data, results = list(batches(12)), {}
    for drop_by in ("magnitude", "saliency"):
        model, optimizer = fresh(drop_by)
        controller = SparseTrainingController(model, optimizer, total_steps=20)
        train(model, optimizer, iter(data[:5]))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), controller.state_dict()))
        train(model, optimizer, iter(data[5:]))
        other, second = fresh(drop_by)
        resumed = SparseTrainingController(other, second, total_steps=20)
        other.load_state_dict(saved[0])
        second.load_state_dict(copy.deepcopy(saved[1]))
        resumed.load_state_dict(saved[2])
        train(other, second, iter(data[5:]))
        assert not differences(snapshot(model, optimizer), snapshot(other, second))
        results[drop_by] = masks(model)
    assert differences(results["magnitude"], results["saliency"])


def test_without_second_moments_it_is_refused() -> None:
    model, _ = fresh("saliency")
    with pytest.raises(ValueError, match=r"drop_by='saliency' reads the second moments.*SGD.*drop_by='magnitude'"):
        SparseTrainingController(model, SGD(model.parameters(), lr=0.1), total_steps=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "set", "soft_growth": True}, "algorithm='set' has no growth scores for soft_growth"),
        ({"start_fraction": 0.25}, "algorithm='rigl' does not prune, so start_fraction would be ignored"),
        ({"algorithm": "gmp", "start_fraction": 0.75}, r"start_fraction=0\.75 must be below stop_fraction=0\.75"),
        ({"algorithm": "granet", "keep_connected": True}, "so keep_connected cannot hold"),
    ],
)
def test_options_that_would_be_ignored(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DSTConfig(**options)
