"""What keeps its number of active weights over updates does so on one rank and on two, with the same masks.

That is each of queries, keys and values in one matrix, and every m neighbours of an n:m mask.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.kinds_script import (
    PATTERNS,
    REPLICATED,
    SHARDED,
    UPDATES,
    counts_over_updates,
    groups_over_updates,
)
from tests.distributed.torchrun import Results, run_ranks
from tests.helpers.kind_rows import MODELS, sparse_decoder
from tests.helpers.patterns import wrong_groups

# rows of 64 inputs at a density of 1/4: 4 heads of queries; of keys and values 4, or 2 where queries share them
EXPECTED = {name: [1024, 512, 512] for name in MODELS} | {key: [1024] * 3 for key in ("gpt2", "gpt_neox")}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks("tests.distributed.kinds_script", (*MODELS, *PATTERNS), tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: counts_over_updates(name, None) for name in MODELS}


def check(counts: torch.Tensor, name: str) -> None:
    assert torch.equal(counts, torch.tensor(EXPECTED[name]).expand(UPDATES + 1, 2, 3))


@pytest.mark.support("fused q, k, v: each keeps its active weights", proves=("unstructured",))
@pytest.mark.parametrize("name", MODELS)
def test_each_kind_keeps_its_number(results: Results, alone: dict[str, Any], name: str) -> None:
    for found in (alone[name], *results[name]):
        check(found["history"], name)
        assert found["digest"] == alone[name]["digest"]


def test_with_one_budget_density_moves_between_kinds() -> None:
    """What the check must catch: RigL over the whole matrix, as it was."""
    history = counts_over_updates("gpt2", None, kinds_apart=False)["history"]
    with pytest.raises(AssertionError):
        check(history, "gpt2")
    drift = (history[-1].double() / 4096 - 0.25).abs().max()
    assert drift > 0.02
    assert torch.equal(history.sum(2), torch.full((UPDATES + 1, 2), 3072))


SHARDED_ROW = "n:m masks: FSDP2 on two ranks, with the masks of one process"


@pytest.mark.support("n:m masks: n of every m over updates, on one rank and on two", proves=("unstructured",))
@pytest.mark.parametrize(
    "name",
    [
        *REPLICATED,
        *(pytest.param(name, marks=pytest.mark.support(SHARDED_ROW, proves=("unstructured",))) for name in SHARDED),
    ],
)
def test_every_group_keeps_its_number(results: Results, name: str) -> None:
    alone = groups_over_updates(name, None)
    assert alone["wrong"] == []
    assert len(set(alone["digests"])) == (1 if name == "gpt2_static" else UPDATES + 1)
    for rank in results[name]:
        assert rank == alone


def test_single_weights_keep_no_group() -> None:
    """What the check must catch."""
    model = sparse_decoder("gpt2", sparsity=0.5)
    assert len(wrong_groups(model, 2, 4)) == 8
