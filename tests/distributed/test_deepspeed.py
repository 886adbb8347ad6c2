"""DeepSpeed ZeRO on two real processes: masks, weights and state as in one process.

The runs are in deepspeed_script.py. The tests skip where DeepSpeed is not installed: it is not a dependency.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from sparseift_llm import SparseTrainingController
from tests.distributed.ddp_modes_script import STEPS
from tests.distributed.torchrun import Results, run_ranks
from tests.helpers.tiny_runs import batches, differences, first_sparse, masks, sparse_gpt2, train

pytestmark = [
    pytest.mark.usefixtures("every_structure"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

STAGES = ("stage1", "stage2", "stage3")
Alone = tuple[list[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def two(every_structure: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    scenarios = (*STAGES, "bf16", "n_of_m", "state_kept", "resumed", "refused")
    return run_ranks(
        "tests.distributed.deepspeed_script", scenarios, tmp_path_factory.mktemp("zero"), warnings="default"
    )


@pytest.fixture(scope="module")
def alone(every_structure: str) -> Alone:
    """Masks of one process after every step, and its last weights."""
    model: Any = sparse_gpt2("rigl").float()  # type: ignore[arg-type]
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=STEPS)
    history: list[dict[str, Tensor]] = []
    train(model, optimizer, batches(STEPS), after_step=lambda: history.append(masks(model)))
    torch.compiler.set_stance("default")
    return history, {name: value.detach() for name, value in model.named_parameters()}


def check_run(ranks: list[Any], alone: Alone) -> None:
    for rank in ranks:
        assert not differences(alone[0], rank["history"])
        assert rank["leftovers"] == []
        for name, value in rank["weights"].items():
            if name.endswith("c_attn.bias"):  # the gradient of keys' biases is 0 but for rounding, which Adam amplifies
                continue
            torch.testing.assert_close(value, alone[1][name], rtol=1e-3, atol=2e-4)


@pytest.mark.support("DeepSpeed ZeRO stages 1 to 3 (tests skip where it is not installed)")
@pytest.mark.parametrize("stage", STAGES)
def test_masks_are_those_of_one_process(stage: str, two: Results, alone: Alone) -> None:
    check_run(two[stage], alone)


def test_the_check_catches_state_that_is_kept(two: Results, alone: Alone) -> None:
    with pytest.raises(AssertionError):
        check_run(two["state_kept"], alone)


@pytest.mark.support("DeepSpeed ZeRO stages 1 to 3 (tests skip where it is not installed)")
def test_bfloat16_weights_with_masters(two: Results) -> None:
    first, second = two["bf16"]
    assert first["digest"] == second["digest"]
    assert first["leftovers"] == second["leftovers"] == []
    assert first["counters"]["num_dense_gradient_steps"] == 3
    assert differences(first["history"][0], first["history"][-1])


@pytest.mark.support("n:m masks: DeepSpeed ZeRO-2 (the test skips where it is not installed)", proves=("unstructured",))
@pytest.mark.structures("unstructured")
@pytest.mark.parametrize("transposable", [False, True])
def test_masks_of_n_of_m_keep_their_numbers(transposable: bool, two: Results) -> None:
    """On both ranks the same masks, which change at every step."""
    first, second = (rank[f"{transposable=}"] for rank in two["n_of_m"])
    assert first == second
    assert first["wrong"] == []
    assert len(set(first["digests"])) == len(first["digests"])


@pytest.mark.support("DeepSpeed ZeRO stages 1 to 3 (tests skip where it is not installed)")
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_checkpoint_goes_on(stage: str, two: Results) -> None:
    for rank in two["resumed"]:
        assert rank[stage]["differences"] == []
        assert rank[stage]["counters"][0] == rank[stage]["counters"][1]


def test_what_zero_communicates_is_counted(two: Results) -> None:
    """Master weights and two states of every layer in float32, on top of what replicas communicate."""
    from sparseift_llm.layers.base import sparse_layers

    layers = list(sparse_layers(sparse_gpt2("rigl")).values())
    reduced = sum(4 * layer.gradient_shape[0] * layer.gradient_shape[1] + 2 * 4 for layer in layers)
    gathered = sum(3 * 4 * layer.weight.numel() for layer in layers)
    assert two["stage2"][0]["bytes"] == 3 * (reduced + gathered + 16 * 2)


@pytest.mark.support("DeepSpeed in the Trainer, DeepSpeed without ZeRO", refused=True)
def test_refusals(two: Results) -> None:
    first = first_sparse(sparse_gpt2(), "attn.c_attn")
    for rank in two["refused"]:
        assert "weights are sharded; gather them" in two["resumed"][0]["zero3"]["saving"]
        assert "of DeepSpeed only ZeRO stages 1 to 3 are supported" in rank["no_zero"]
        assert f"{first}.weight is not in DeepSpeed's optimizer; call deepspeed.initialize after" in rank["stray"]
        assert "Muon under DeepSpeed is not supported: it can move weights whose gradient is 0" in rank["muon"]
