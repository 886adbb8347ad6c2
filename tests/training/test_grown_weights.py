"""How grown weights begin under Adam: by hand, against a fresh Adam, in every form of torch's AdamW, and resumed."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from sparseift_llm import DSTConfig, SparseTrainingController
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.record.model_record import RECORD_KEY
from sparseift_llm.training.grown_weights import AGE_KEY
from tests.helpers.tiny_runs import ToyModel, batches, bits, differences, masks, snapshot, sparse_gpt2, train

RULES = ("zero", "row_mean", "own_count")
STEPS = 12


def with_rule(model: Any, rule: str, warmup: int = 0) -> Any:
    dst = getattr(model.config, RECORD_KEY)["transformation"]["dst"]
    dst |= {"grown_state": rule, "grown_warmup_steps": warmup}
    return model


# ---- by hand


def toy_state(rule: str, warmup: int = 0, betas: tuple[float, float] = (0.9, 0.999)) -> tuple[ToyModel, AdamW, Any]:
    """A layer whose fourth step drops the weight 1 of row 0 and grows its last one."""
    dst = DSTConfig("rigl", 4, 0.3, stop_fraction=1.0, grown_state=rule, grown_warmup_steps=warmup)
    weight = torch.tensor([[4.0, 1.0, 9.0, 0.0], [5.0, 6.0, 0.0, 7.0]], dtype=torch.float64)
    model = ToyModel(weight, weight != 0, dst)
    optimizer = AdamW(model.parameters(), lr=1e-3, betas=betas, weight_decay=0.0, eps=0.0)
    return model, optimizer, SparseTrainingController(model, optimizer, 10**6)


GRADIENT = torch.tensor([[0.5, 0.25, 2.0, 3.0], [1.0, 1.0, 0.5, 1.0]], dtype=torch.float64)


def step(model: ToyModel, optimizer: AdamW, gradient: Tensor) -> None:
    model.loss(gradient).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_second_moment_begins_at_the_mean_of_the_row() -> None:
    model, optimizer, _ = toy_state("row_mean")
    for _ in range(4):
        step(model, optimizer, GRADIENT)
    weight = model.layer.weight
    assert torch.equal(model.layer.mask, bits("1011 1101"))
    moment = optimizer.state[weight]["exp_avg_sq"]
    share = 1 - 0.999**4
    assert float(moment[0, 3]) == pytest.approx(share * (0.25 + 4.0) / 2)  # of 0.5 and 2 squared, which stayed
    assert float(optimizer.state[weight]["exp_avg"][0, 3]) == 0
    torch.testing.assert_close(moment[0, :3], share * torch.tensor([0.25, 0, 4.0], dtype=torch.float64))


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_grown_weight_steps_as_under_a_fresh_adam(warmup: int) -> None:
    """Ten steps after it grew, against an Adam of its own; old weights are as without the option."""
    model, optimizer, _ = toy_state("own_count", warmup)
    plain, plain_optimizer, _ = toy_state("zero")
    for _ in range(4):
        step(model, optimizer, GRADIENT)
        step(plain, plain_optimizer, GRADIENT)
    fresh = nn.Parameter(torch.zeros((), dtype=torch.float64))
    reference = Adam([fresh], lr=1e-3, betas=(0.9, 0.999), eps=0.0)
    for count in range(1, 4):  # no mask update before step 8
        gradient = GRADIENT * (-1.0) ** count
        before = fresh.detach().clone()
        fresh.grad = gradient[0, 3].clone()
        reference.step()
        with torch.no_grad():  # the warmup scales steps, and not the moments
            fresh.copy_(before + (fresh - before) * (min(1.0, count / warmup) if warmup else 1.0))
        step(model, optimizer, gradient)
        step(plain, plain_optimizer, gradient)
        assert model.layer.weight[0, 3].item() == pytest.approx(fresh.item(), rel=1e-12)
        old = model.layer.mask.clone()
        old[0, 3] = False
        assert torch.equal(model.layer.weight[old], plain.layer.weight[old])
        assert plain.layer.weight[0, 3].item() != pytest.approx(fresh.item(), rel=1e-2)


def first_steps(rule: str, warmup: int = 0, beta2: float = 0.999) -> float:
    """The largest of a grown weight's first three steps, over the rate, with a constant gradient."""
    model, optimizer, _ = toy_state(rule, warmup, (0.9, beta2))
    for _ in range(4):
        step(model, optimizer, GRADIENT)
    optimizer.state[model.layer.weight]["step"] += 10_000  # an old count
    largest = 0.0
    for _ in range(3):
        before = model.layer.weight[0, 3].item()
        step(model, optimizer, GRADIENT)
        largest = max(largest, abs(model.layer.weight[0, 3].item() - before) / 1e-3)
    return largest


def test_first_steps_of_each_rule() -> None:
    """After three steps of a constant gradient: (1 - 0.9^3) / sqrt(1 - 0.999^3) = 4.95 with a state of 0."""
    assert first_steps("zero") == pytest.approx(4.95, abs=0.01)
    assert first_steps("own_count") == pytest.approx(1.0)
    assert first_steps("own_count", warmup=6) == pytest.approx(0.5)
    assert first_steps("zero", beta2=0.95) == pytest.approx(0.72, abs=0.01)


# ---- models


def run(
    rule: str, optimizer_class: Any = AdamW, steps: int = STEPS, warmup: int = 0, **options: Any
) -> tuple[Any, Any, SparseTrainingController]:
    model = with_rule(sparse_gpt2("rigl"), rule, warmup)
    optimizer = optimizer_class(model.parameters(), lr=0.01, **options)
    controller = SparseTrainingController(model, optimizer, total_steps=20)
    train(model, optimizer, batches(steps))
    return model, optimizer, controller


@pytest.mark.support("grown_state: how grown weights begin under Adam")
@pytest.mark.usefixtures("either_structure")
@pytest.mark.parametrize("rule", RULES[1:])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"capturable": True, "fused": True}])
def test_every_form_of_adamw_gives_the_same(rule: str, options: dict[str, Any]) -> None:
    plain, _, controller = run(rule)
    zero, _, _ = run("zero")
    model, _, other = run(rule, **options)
    assert other.masks_digest() == controller.masks_digest()
    for (name, first), second in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-9, msg=name)
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), zero.parameters(), strict=True))


@pytest.mark.support("grown_state: how grown weights begin under Adam")
@pytest.mark.usefixtures("either_structure")
@pytest.mark.parametrize("rule", RULES[1:])
def test_resumed_to_the_bit(rule: str) -> None:
    """From a step between two updates, when some weights are young."""
    data = list(batches(STEPS))
    model, optimizer, controller = run(rule, steps=0, warmup=3 if rule == "own_count" else 0)
    train(model, optimizer, iter(data[:5]))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), controller.state_dict()))
    train(model, optimizer, iter(data[5:]))
    again, other, resumed = run(rule, steps=0, warmup=3 if rule == "own_count" else 0)
    again.load_state_dict(saved[0])
    other.load_state_dict(copy.deepcopy(saved[1]))  # torch does not copy step counts
    resumed.load_state_dict(saved[2])
    train(again, other, iter(data[5:]))
    assert not differences(snapshot(model, optimizer), snapshot(again, other))
    # the planted fault: ages, or second moments of grown weights, that are lost
    again.load_state_dict(saved[0])
    other.load_state_dict(copy.deepcopy(saved[1]))  # torch does not copy step counts
    resumed.load_state_dict(saved[2])
    for state in other.state.values():
        if rule == "own_count":
            if AGE_KEY in state:
                state[AGE_KEY] = torch.zeros_like(state[AGE_KEY])
        else:
            state["exp_avg_sq"] = state["exp_avg_sq"] * 1.01
    train(again, other, iter(data[5:]))
    assert differences(snapshot(model, optimizer), snapshot(again, other))


@pytest.mark.usefixtures("either_structure")
def test_row_means_against_a_dense_matrix() -> None:
    """Every grown weight's second moment, from the matrix with its zeros filled in."""
    model = with_rule(sparse_gpt2("rigl", every=3), "row_mean")
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=20)
    train(model, optimizer, batches(2))
    before = masks(model)
    train(model, optimizer, batches(1, seed=1))
    num_grown = 0
    for name, layer in sparse_layers(model).items():
        moment, grown, old = optimizer.state[layer.weight]["exp_avg_sq"], ~before[name], before[name]
        mask = layer.current_mask()
        if isinstance(layer, BlockSparseLinear):
            size, dense = layer.block_size, layer.weight.new_zeros(layer.gradient_shape)
            for slot, column in enumerate(layer.columns.tolist()):
                row = (slot + 1) * layer.num_rows  # block-row of the slot: see topology.blocks.rows_of_slots
                row = (row - 1) // len(layer.columns)
                dense[row * size :, column * size :][:size, :size] = moment[slot]
            moment = dense
            old, mask, grown = (x.repeat_interleave(size, 0).repeat_interleave(size, 1) for x in (old, mask, grown))
        dim = 0 if hasattr(layer, "nf") else 1
        stayed = old & mask
        means = (moment * stayed).sum(dim, keepdim=True) / stayed.sum(dim, keepdim=True)
        chosen = grown & mask & (stayed.sum(dim, keepdim=True) > 0)
        num_grown += int(chosen.sum())
        torch.testing.assert_close(moment[chosen], means.expand_as(moment)[chosen], rtol=1e-12, atol=0)
    assert num_grown > 0


# ---- what is refused and said


@pytest.mark.parametrize("rule", RULES[1:])
def test_other_optimizers_are_refused(rule: str) -> None:
    model = with_rule(sparse_gpt2("rigl"), rule)
    with pytest.raises(ValueError, match=f"grown_state='{rule}' is for torch.optim.Adam .*SGD.*grown_state='zero'"):
        SparseTrainingController(model, SGD(model.parameters(), lr=0.1), total_steps=20)


def test_ages_that_were_lost_are_missed() -> None:
    model, optimizer, controller = run("own_count", steps=5)
    saved = copy.deepcopy(controller.state_dict())
    again, other, resumed = run("own_count", steps=0)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for state in other.state.values():
        state.pop(AGE_KEY, None)
    resumed.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"the optimizer's state has no 'steps_since_grown' for .*own_count"):
        train(again, other, batches(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grown_warmup_steps": 3}, "needs grown_state='own_count'"),
        ({"algorithm": "static", "grown_state": "row_mean"}, "algorithm='static' grows nothing"),
        ({"algorithm": "gmp", "grown_state": "own_count"}, "algorithm='gmp' grows nothing"),
    ],
)
def test_options_that_would_be_ignored(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DSTConfig(**options)


@pytest.mark.parametrize(("beta2", "num_lines"), [(0.999, 1), (0.95, 0)])
def test_one_line_names_the_cold_start(beta2: float, num_lines: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sparseift_llm"):
        run("zero", steps=4, betas=(0.9, beta2))
    assert sum("grown weights begin with a state of 0" in record.message for record in caplog.records) == num_lines
