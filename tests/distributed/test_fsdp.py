"""Weights sharded by FSDP2 on two and four real processes: masks, weights and state as in one process.

What the processes run is in fsdp_script.py and fsdp_frameworks_script.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from sparseift_llm import SparseTrainingController
from sparseift_llm.checkpoints.mask_file import read_masks
from sparseift_llm.checkpoints.trainer_folder import is_complete
from sparseift_llm.layers.base import sparse_layers
from tests.distributed.ddp_modes_script import STEPS
from tests.distributed.torchrun import Results, run_ranks
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
)

WAYS = {
    "default": "FSDP2: fully_shard",
    "keep_gathered": "FSDP2: fully_shard",
    "root_only": "FSDP2: fully_shard",
    "second_dimension": "FSDP2: shards of another dimension",
    "no_sync": "FSDP2: gradient accumulation without sync, activation checkpointing",
}
STATES = ("full_state", "sharded_state", "with_accelerate", "with_trainer", "native")
TWO = (*WAYS, "state_kept", "mixed_precision", "corrupted", "refused", *STATES)
FOUR = ("hybrid", "default", "resumed_elsewhere")

pytestmark = pytest.mark.usefixtures("every_structure")
on_four_ranks = pytest.mark.structures("unstructured", "block", "families")
Masks = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(every_structure: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def two(every_structure: str, folder: Path) -> Results:
    (folder / "from_two").mkdir()
    return run_ranks("tests.distributed.fsdp_script", TWO, folder / "from_two")


@pytest.fixture(scope="module")
def four(every_structure: str, folder: Path, two: Results) -> Results:
    return run_ranks("tests.distributed.fsdp_script", FOUR, folder, num_ranks=4)


@pytest.fixture(scope="module")
def alone(every_structure: str) -> tuple[list[Masks], dict[str, Tensor]]:
    """Masks of one process after every step, and its last weights."""
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=STEPS)
    history: list[Masks] = []
    train(model, optimizer, batches(STEPS), after_step=lambda: history.append(masks(model)))
    torch.compiler.set_stance("default")
    return history, snapshot(model, optimizer)["weights"]


Alone = tuple[list[Masks], dict[str, Tensor]]


def check_run(results: Results, name: str, alone: Alone) -> None:
    history, weights = alone
    for rank in results[name]:
        assert not differences(history, rank["history"])
        assert rank["leftovers"] == []
        for key, value in rank.get("weights", {}).items():
            torch.testing.assert_close(value, weights[key], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.support(row)) for way, row in WAYS.items()])
def test_masks_are_those_of_one_process(way: str, two: Results, alone: Alone) -> None:
    check_run(two, way, alone)


def test_the_check_catches_state_that_is_kept(two: Results, alone: Alone) -> None:
    with pytest.raises(AssertionError):
        check_run(two, "state_kept", alone)


@pytest.mark.support("FSDP2: four ranks, hybrid shards")
@on_four_ranks
@pytest.mark.parametrize("way", ["default", "hybrid"])
def test_four_ranks(way: str, four: Results, alone: Alone) -> None:
    check_run(four, way, alone)


def test_state_of_changed_weights_is_zero_on_the_rank_that_owns_them(two: Results, every_structure: str) -> None:
    """The whole optimizer state is that of one process, entries of regrown weights included."""
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=STEPS)
    train(model, optimizer, batches(STEPS))
    for name, parameter in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            expected = optimizer.state[parameter][key]
            found = two["default"][0]["optimizer"][name][key]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)
            if name.removesuffix(".weight") in sparse_layers(model):
                assert torch.equal(found == 0, expected == 0)


def test_gathering_magnitudes_is_counted(two: Results) -> None:
    """Whole layers' weights, or with tiles one number per tile, on top of what replicas communicate."""
    model = sparse_gpt2("rigl")
    layers = list(sparse_layers(model).values())
    reduced = sum(8 * layer.gradient_shape[0] * layer.gradient_shape[1] + 2 * 4 for layer in layers)
    gathered = sum(8 * (layer.weight.numel() // layer.unit_size) for layer in layers)
    assert two["default"][0]["bytes"] == 3 * (reduced + gathered + 16 * 2)


@pytest.mark.support("FSDP2: mixed-precision policy")
def test_mixed_precision(two: Results) -> None:
    first, second = two["mixed_precision"]
    assert first["digests"] == second["digests"]
    assert len(set(first["digests"])) == 4
    assert first["leftovers"] == second["leftovers"] == []


@pytest.mark.support("FSDP2: full state dicts")
def test_full_state_dicts(two: Results) -> None:
    for rank in two["full_state"]:
        assert rank["masks"] == []
        assert not differences(rank["expected"], rank["found"])
        assert "weights are sharded; gather them with" in rank["refused"]


@pytest.mark.support("FSDP2: sharded state dicts")
def test_sharded_state_dicts(two: Results) -> None:
    for rank in two["sharded_state"]:
        assert not differences(rank["expected"], rank["found"])
        assert rank["counters"][0] == rank["counters"][1]


@pytest.mark.support("FSDP2: two ranks' shards on one and four ranks")
@on_four_ranks
def test_two_ranks_shards_on_four_ranks(two: Results, four: Results) -> None:
    for rank in four["resumed_elsewhere"]:
        expected = two["sharded_state"][0]["expected"]
        assert not differences(expected["history"], rank["history"])
        for name, value in expected["weights"].items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.support("FSDP2: two ranks' shards on one and four ranks")
@pytest.mark.structures("unstructured", "block")
def test_two_ranks_shards_on_one_rank(two: Results, folder: Path) -> None:
    (rank,) = run_ranks("tests.distributed.fsdp_script", ("resumed_elsewhere",), folder, num_ranks=1)[
        "resumed_elsewhere"
    ]
    expected = two["sharded_state"][0]["expected"]
    assert not differences(expected["history"], rank["history"])
    for name, value in expected["weights"].items():
        torch.testing.assert_close(rank["weights"][name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.support("masks that differ between ranks", refused=True)
def test_a_corrupted_mask_stops_all_ranks(two: Results) -> None:
    for rank in two["corrupted"]:
        first = first_sparse(sparse_gpt2(), "mlp.c_fc")
        assert f"different masks after step 6, first in {first};" in rank["message"]
        assert rank["step"] == 6


@pytest.mark.support("FSDP1, tensor parallelism", refused=True)
def test_refusals(two: Results) -> None:
    for rank in two["refused"]:
        assert (
            "FSDP1 (FullyShardedDataParallel) flattens weights; use DistributedDataParallel or FSDP2" in rank["fsdp1"]
        )
        assert "(tensor parallelism) are not supported" in rank["tensor_parallel"]
        assert "to_dense needs whole weights" in rank["to_dense"]
        assert "is not in the optimizer; create the optimizer after sparsify (and after" in rank["early_optimizer"]
        assert "tensor parallelism does not know sparse layers" in rank["loading"]
        assert "tensor parallelism does not know sparse layers" in rank["tensor_parallel_config"]


@pytest.mark.support("FSDP2: Trainer, full and sharded checkpoints")
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_trainer(kind: str, two: Results, folder: Path, tmp_path: Path) -> None:
    alone = sparse_trainer(sparse_gpt2("rigl"), tmp_path)
    alone.train()
    expected = final_state(alone)
    for rank in two["with_trainer"]:
        found = rank[kind]
        assert not differences(expected["masks"], found["end"]["masks"])
        assert expected["counters"] == found["end"]["counters"]
        assert found["resumed"] == []
        assert found["digest"] == two["with_trainer"][0][kind]["digest"]
        for key, value in found["end"]["weights"].items():
            torch.testing.assert_close(value, expected["weights"][key], rtol=1e-6, atol=1e-9)
    checkpoint = folder / "from_two" / kind / "checkpoint-4"
    assert is_complete(checkpoint)
    read_masks(checkpoint)
    (checkpoint / "rng_state_1.pth").unlink()
    assert not is_complete(checkpoint)


@pytest.mark.parametrize(
    "way",
    [
        pytest.param("plain", marks=pytest.mark.support("FSDP2: accelerate")),
        pytest.param("ram_efficient", marks=pytest.mark.support("FSDP2: accelerate, cpu_ram_efficient_loading")),
    ],
)
def test_accelerate(way: str, two: Results, alone: Alone) -> None:
    for rank in two["with_accelerate"]:
        assert not differences(alone[0], rank[way]["history"])
        assert rank[way]["leftovers"] == []


@pytest.mark.support("FSDP2: from_pretrained(distributed_config=...)")
def test_sharded_by_from_pretrained(two: Results, alone: Alone, tmp_path: Path) -> None:
    check_run(two, "native", alone)
    trainer = sparse_trainer(sparse_gpt2("rigl"), tmp_path)
    trainer.train()
    for rank in two["native"]:
        assert rank["saved"] == []
        assert not differences(final_state(trainer)["masks"], rank["trainer"])
        assert rank["counters"] == controller_of(trainer).counters()
