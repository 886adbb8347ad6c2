"""Metrics of masks by hand: a toy layer through RigL updates, sums over layers, kinds, missed updates, state."""

from __future__ import annotations

import copy
import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from sparseift_llm import DSTConfig, SparseIFTConfig, SparseTrainingController, plan, sparsify
from sparseift_llm.checkpoints.mask_file import pack
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.metrics.counts import LayerCounts, UnitHistory, kinds_in, num_ones, summarize
from sparseift_llm.metrics.mask_history import MaskMetrics
from sparseift_llm.models.projections import kind_of
from tests.families.test_families import STORAGES, VARIANTS, WIDTHS
from tests.helpers.models import ARCHS, tiny_config
from tests.helpers.tiny_runs import ToyModel, batches, bits, differences, masks, sparse_gpt2, train

# ---- one layer, by hand


def test_ones_are_counted_without_the_padding() -> None:
    for text in ("0", "1", "10100000 1", "1111111 1111111 1111111"):
        mask = torch.tensor([character == "1" for character in text.replace(" ", "")])
        assert num_ones(pack(mask)) == int(mask.sum())
        assert num_ones(pack(mask) & ~pack(torch.zeros_like(mask))) == int(mask.sum())  # ~ sets the padding


def history_of(*rows: str) -> UnitHistory:
    masks = [pack(bits(row)) for row in rows]
    history = UnitHistory(masks[0])
    for old, new in itertools.pairwise(masks):
        history.update(old, new)
    return history


def test_a_history_by_hand() -> None:
    first = history_of("1100 1010", "0110 1010")  # (0, 2) grows
    assert (num_ones(first.ever), num_ones(first.grown)) == (5, 1)  # type: ignore[arg-type]
    assert (first.num_grown_before, first.num_survived) == (0, 0)
    second = history_of("1100 1010", "0110 1010", "0010 1011")  # (1, 3) grows, (0, 2) stays
    assert (num_ones(second.ever), second.num_grown_before, second.num_survived) == (6, 1, 1)
    third = history_of("1100 1010", "0110 1010", "0100 1011")  # (1, 3) grows, (0, 2) goes
    assert (num_ones(third.ever), third.num_grown_before, third.num_survived) == (6, 1, 0)


def toy(algorithm: str = "rigl", every: int = 1, **options: Any) -> ToyModel:
    """Active weights 1, 2, 3, 4 in a (2, 4) layer, of which int(0.4999 * 4) = 1 is exchanged at an early update."""
    dst = DSTConfig(algorithm, update_every_steps=every, drop_fraction=0.5, stop_fraction=1.0)
    return ToyModel(torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 0.0, 4.0, 0.0]]), bits("1100 1010"), dst, **options)


def gradient(**entries: float) -> Tensor:
    """A (2, 4) gradient of 0.1 with other values at e.g. `_02`."""
    values = torch.full((2, 4), 0.1)
    for place, value in entries.items():
        values[int(place[1]), int(place[2])] = value
    return values


def step(model: ToyModel, optimizer: Any, dense: Tensor) -> None:
    model.loss(dense).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_toy_updates_by_hand() -> None:
    """Weights stay (learning rate 0), so that the grown one, which is 0, is dropped next unless it grows again."""
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.0)
    metrics = MaskMetrics(SparseTrainingController(model, optimizer, 10**6))
    values = metrics.values()
    assert (values["sparsity"], values["exploration"], values["dead_units"]) == (0.5, 0.5, 1 / 6)  # the last column
    assert not values.keys() & {"mask_churn", "mask_survival", "grad_norm_grown"}

    expected = [  # grows, churn, survival, exploration, dead rows and columns, norm
        (gradient(_02=5.0), bits("0110 1010"), 1 / 4, None, 5 / 8, 1 / 6, 5.0),
        (gradient(_13=-7.0), bits("0100 1011"), 1 / 4, 0.0, 6 / 8, 0.0, 7.0),
        (gradient(_13=9.0), bits("0100 1011"), 0.0, 1.0, 6 / 8, 0.0, 0.0),  # dropped and grown again: no change
        (gradient(_00=2.0), bits("1100 1010"), 1 / 4, None, 6 / 8, 1 / 6, 2.0),  # none grew before
    ]
    for dense, mask, churn, survival, exploration, dead, norm in expected:
        step(model, optimizer, dense)
        assert torch.equal(model.layer.mask, mask)
        values = metrics.values()
        assert values["mask_churn"] == values["mask_churn/other"] == churn
        assert values.get("mask_survival") == survival
        assert values["exploration"] == exploration
        assert values["dead_units"] == pytest.approx(dead)
        assert values["grad_norm_grown"] == pytest.approx(norm)
        assert values["sparsity"] == 0.5
        assert values["unread_units"] == values["unread_units/other"] == pytest.approx(dead * 6 / 4)  # 4 of 6 lines
        assert values["unfed_units"] == 0
        entry = {
            "kind": "other", "sparsity": 0.5, "exploration": exploration, "churn": churn, "survival": survival,
            "unread": values["unread_units"], "unfed": 0.0,
        }  # fmt: skip
        assert metrics.layers()["layer"].to_dict() == entry
    assert metrics.num_updates == 4


def test_several_grown_weights_add_up_in_squares() -> None:
    dst = DSTConfig("rigl", update_every_steps=1, drop_fraction=0.7, stop_fraction=1.0)
    model = ToyModel(torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0, 0.0]]), bits("111000"), dst)
    optimizer = SGD(model.parameters(), lr=0.0)
    metrics = MaskMetrics(SparseTrainingController(model, optimizer, 10**6))
    step(model, optimizer, torch.tensor([[0.0, 0.0, 9.0, 0.0, 3.0, -4.0]]))
    assert torch.equal(model.layer.mask, bits("001011"))
    assert metrics.grad_norm_grown == 5.0


def test_the_gradient_scaler_does_not_scale_the_norm() -> None:
    norms = []
    for scale in (1.0, 1024.0):
        model = toy()
        optimizer = SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        metrics = MaskMetrics(SparseTrainingController(model, optimizer, 10**6), scaler)
        scaler.scale(model.loss(gradient(_02=5.0))).backward()
        scaler.step(optimizer)
        scaler.update()
        norms.append(metrics.grad_norm_grown)
    assert norms == [5.0, 5.0]


def test_drop_fraction_is_that_of_the_schedule() -> None:
    model = toy(every=2)
    optimizer = SGD(model.parameters(), lr=0.0)
    metrics = MaskMetrics(SparseTrainingController(model, optimizer, 4))
    fractions = []
    for _ in range(6):
        fractions.append(metrics.values()["drop_fraction"])
        step(model, optimizer, gradient())
    assert fractions == pytest.approx([0.5, 0.42677669529663687, 0.25, 0.07322330470336313, 0.0, 0.0])
    for algorithm in ("static", "gmp"):
        model = toy(algorithm)
        controller = SparseTrainingController(model, SGD(model.parameters(), lr=0.0), 4)
        assert "drop_fraction" not in MaskMetrics(controller).values()


# ---- sums over layers


def counts(kind: str = "o", **changes: Any) -> LayerCounts:
    values = {"size": 8, "active": 4, "ever": 5, "grown": 1, "grown_before": 2, "survived": 1}
    values |= {"num_inputs": 4, "num_outputs": 2, "unread": 1, "unfed": 0}
    return LayerCounts(**{"kind": kind, **values, **changes})


def test_layers_are_weighed_by_their_weights() -> None:
    large = counts(
        "mlp_in", size=24, active=4, ever=6, grown=2, grown_before=4, survived=4,
        num_inputs=6, num_outputs=4, unread=2, unfed=1,
    )  # fmt: skip
    assert summarize([counts(), large]) == {
        "sparsity": 1 - 8 / 32,
        "sparsity/o": 0.5,
        "sparsity/mlp_in": 1 - 4 / 24,
        "exploration": 11 / 32,
        "exploration/o": 5 / 8,
        "exploration/mlp_in": 6 / 24,
        "mask_churn": 3 / 8,
        "mask_churn/o": 1 / 4,
        "mask_churn/mlp_in": 2 / 4,
        "mask_survival": 5 / 6,
        "dead_units": 4 / 16,
        "unread_units": 3 / 10,
        "unread_units/o": 1 / 4,
        "unread_units/mlp_in": 2 / 6,
        "unfed_units": 1 / 6,
        "unfed_units/o": 0.0,
        "unfed_units/mlp_in": 1 / 4,
    }


def test_what_is_not_known_is_left_out() -> None:
    values = summarize([counts(ever=None), counts("q", grown=None, grown_before=0, survived=0)])
    assert values["exploration/q"] == 5 / 8
    assert not values.keys() & {"exploration", "exploration/o", "mask_churn/q"}
    assert values["mask_churn"] == 1 / 4  # of the layers that were updated


# ---- kinds


@pytest.mark.parametrize("arch", ARCHS)
def test_kinds_are_those_of_the_plan(arch: str) -> None:
    config = SparseIFTConfig(sparsity=0.75)
    expected = {layer.name: layer.kind for layer in plan(tiny_config(arch), config).layers}
    model = sparsify(tiny_config(arch), config)
    kinds = kinds_in(model)
    assert {name: kind_of(name, kinds, "other") for name in sparse_layers(model)} == expected
    assert set(expected.values()) <= {"q", "k", "v", "o", "qkv", "mlp_in", "mlp_out"}


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("structure", STORAGES)
def test_every_family_is_followed(variant: str, structure: str, arch: str) -> None:
    """Kinds of all matrices are known, and exploration is what the masks of all steps say."""
    dense = tiny_config(arch, **WIDTHS[arch] if structure == "block" else {})
    dst = DSTConfig("rigl", update_every_steps=1, drop_fraction=0.5, stop_fraction=1.0)
    model = sparsify(dense, SparseIFTConfig(**VARIANTS[variant], **STORAGES[structure], dst=dst))
    optimizer = AdamW(model.parameters(), lr=0.01)
    metrics = MaskMetrics(SparseTrainingController(model, optimizer, 100))
    assert "other" not in metrics.kinds.values()
    seen = [masks(model)]
    train(model, optimizer, batches(3), 1, lambda: seen.append(masks(model)))
    values = metrics.values()
    assert values["exploration"] == explored(seen) > explored(seen[:-1]) > 1 - values["sparsity"]
    assert set(metrics.kinds.values()) == {layer.kind for layer in plan(dense, SparseIFTConfig()).layers}


def explored(history: list[dict[str, Tensor]]) -> float:
    """Share of units that were active in any of the masks."""
    ever = {name: torch.stack([step[name] for step in history]).any(0) for name in history[0]}
    return sum(int(mask.sum()) for mask in ever.values()) / sum(mask.numel() for mask in ever.values())


# ---- updates that were not seen


def test_exploration_is_not_reported_when_updates_were_missed(caplog: pytest.LogCaptureFixture) -> None:
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, 100)
    train(model, optimizer, batches(3))
    metrics = MaskMetrics(controller)
    with caplog.at_level(logging.WARNING):
        train(model, optimizer, batches(3))
        values = metrics.values()
        metrics.values()
    assert "exploration" not in values
    assert values["mask_churn"] > 0
    messages = [record.getMessage() for record in caplog.records if record.name.endswith("mask_history")]
    assert len(messages) == 1
    assert "exploration is not reported: of 3 mask updates so far only 2" in messages[0]


def test_a_resumed_static_run_has_missed_nothing() -> None:
    model = sparse_gpt2("static")
    optimizer = AdamW(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, 100)
    metrics = MaskMetrics(controller)
    state = controller.state_dict()
    controller.load_state_dict({**state, "step": 50})
    assert metrics.values()["exploration"] == 0.25


def test_closing_stops_following() -> None:
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, 100)
    metrics = MaskMetrics(controller)
    metrics.close()
    metrics.close()
    train(model, optimizer, batches(4))
    assert metrics.num_updates == 0
    assert controller.listeners == []


# ---- state


def test_state_goes_on_where_it_was() -> None:
    def run(*lengths: int) -> dict[str, Any]:
        state: dict[str, Any] | None = None
        data = batches(sum(lengths))
        for length in lengths:
            model = sparse_gpt2("rigl")
            optimizer = AdamW(model.parameters(), lr=0.01)
            controller = SparseTrainingController(model, optimizer, 20)
            metrics = MaskMetrics(controller)
            if state is not None:
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                controller.load_state_dict(state["controller"])
                metrics.load_state_dict(state["metrics"])
                assert not differences(state["metrics"], metrics.state_dict())
            train(model, optimizer, itertools.islice(data, length))
            values = metrics.values()
            del values["mask_update_seconds"]
            state = {
                "model": {name: value.clone() for name, value in model.state_dict().items()},
                "optimizer": optimizer.state_dict(),
                "controller": controller.state_dict(),
                "metrics": metrics.state_dict(),
                "values": values,
            }
            controller.close()
        assert state is not None
        return {key: state[key] for key in ("metrics", "values")}

    whole = run(11)
    assert whole["values"].keys() > {"exploration", "mask_survival", "grad_norm_grown"}
    for lengths in ((1, 10), (4, 7), (5, 1, 5)):
        assert not differences(whole, run(*lengths))
    assert differences(whole, run(10))


def test_a_run_that_is_made_longer_has_missed_nothing() -> None:
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, 12)  # updates at 2, 4, 6, 8
    metrics = MaskMetrics(controller)
    train(model, optimizer, batches(12))
    state = copy.deepcopy((controller.state_dict(), metrics.state_dict()))
    controller.close()
    longer = SparseTrainingController(model, optimizer, 24)
    resumed = MaskMetrics(longer)
    longer.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    assert resumed.values()["exploration"] == metrics.values()["exploration"]
    train(model, optimizer, batches(2, seed=1))
    assert resumed.num_updates == 5
    assert resumed.values()["exploration"] > metrics.values()["exploration"]


def test_going_back_to_an_earlier_state_counts_updates_again() -> None:
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, 20)
    metrics = MaskMetrics(controller)
    train(model, optimizer, batches(5))
    parts = (model, optimizer, controller, metrics)
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    train(model, optimizer, batches(1, seed=1))
    values = metrics.values()
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    train(model, optimizer, batches(1, seed=1))
    assert metrics.num_updates == 3
    assert metrics.values()["exploration"] == values["exploration"]


def test_state_of_another_model_is_refused() -> None:
    def metrics_of(**options: Any) -> MaskMetrics:
        model = sparse_gpt2("rigl", **options)
        return MaskMetrics(SparseTrainingController(model, AdamW(model.parameters()), 10))

    with pytest.raises(ValueError, match=r"another model.*transformer\.h\.0"):
        metrics_of().load_state_dict(metrics_of(hidden=24).state_dict())
