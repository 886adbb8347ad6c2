"""The controller's own duties: order of the mask update, counters, capture on and off, and its error messages."""

from __future__ import annotations

import gc
import math
from types import SimpleNamespace
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from sparseift_llm import (
    DSTConfig,
    SparseIFTConfig,
    SparseTrainingController,
    optimizer_param_groups,
    sparsify,
    to_dense,
)
from sparseift_llm.checkpoints.mask_file import pack, unpack
from sparseift_llm.layers.base import sparse_layers
from tests.conftest import tiny_models_of
from tests.helpers.models import tiny_model
from tests.helpers.residual import STORAGES, residual_model
from tests.helpers.tiny_runs import ToyModel, batches, bits, differences, first_sparse, masks, sparse_gpt2, train


def toy_model(algorithm: str = "rigl", every: int = 1) -> ToyModel:
    """Active weights 4, 1, -2, -3 in a (2, 4) layer, of which int(0.3 * 4) = 1 is dropped at an early update."""
    weight = torch.tensor([[4.0, 0.0, 1.0, 0.0], [0.0, -2.0, 0.0, -3.0]])
    dst = DSTConfig(algorithm, update_every_steps=every, drop_fraction=0.3, stop_fraction=1.0)
    return ToyModel(weight, bits("1010 0101"), dst)


# ---- order of an update


def test_drop_uses_the_weights_after_the_optimizer_step() -> None:
    model = toy_model()
    optimizer = SGD(model.parameters(), lr=1.0)
    SparseTrainingController(model, optimizer, 1000)
    gradient = torch.tensor([[3.5, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
    model.loss(gradient).backward()
    optimizer.step()
    # before the step 1 was the smallest; after it the first weight is, at 4 - 3.5
    assert torch.equal(model.layer.mask, bits("0010 1101"))
    assert torch.equal(model.layer.weight, torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, -2.0, 0.0, -3.0]]))


def test_dropped_and_regrown_in_one_update_keeps_value_and_state() -> None:
    model = toy_model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    controller = SparseTrainingController(model, optimizer, 1000)
    gradient = torch.tensor([[0.0, 1.0, 8.0, 0.0], [0.0, 0.5, 0.0, 0.0]])
    model.loss(gradient).backward()
    optimizer.step()  # 1 - 0.1 * 8 = 0.2 is dropped for its size, and grown for its gradient
    assert controller.num_dense_gradient_steps == 1
    assert torch.equal(model.layer.mask, bits("1010 0101"))
    assert model.layer.weight[0, 2].item() == pytest.approx(0.2)
    assert optimizer.state[model.layer.weight]["momentum_buffer"].tolist() == [[0, 0, 8, 0], [0, 0.5, 0, 0]]


def test_grown_weights_start_at_zero_with_zero_state() -> None:
    model = toy_model(every=2)
    optimizer = AdamW(model.parameters(), lr=0.01, amsgrad=True)
    SparseTrainingController(model, optimizer, 1000)
    gradient = torch.tensor([[1.0, 7.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    for _ in range(2):
        model.loss(gradient).backward()
        optimizer.step()
        optimizer.zero_grad()
    weight, state = model.layer.weight, optimizer.state[model.layer.weight]
    assert torch.equal(model.layer.mask, bits("1100 0101"))
    for tensor in (weight, state["exp_avg"], state["exp_avg_sq"], state["max_exp_avg_sq"]):
        nonzero = tensor != 0
        assert torch.equal(nonzero, bits("1000 0101"))  # neither the grown [0, 1] nor the dropped [0, 2]
    model.loss(gradient).backward()
    optimizer.step()
    assert weight[0, 1] != 0  # and from then on the grown weight trains
    assert weight[0, 2] == 0


@pytest.mark.usefixtures("either_structure")
def test_updates_happen_when_the_schedule_says() -> None:
    model = sparse_gpt2("rigl", every=3)
    optimizer = SGD(model.parameters(), lr=0.1)
    controller = SparseTrainingController(model, optimizer, total_steps=16)  # stops at 12
    changed, before = [], masks(model)

    def look() -> None:
        nonlocal before
        if differences(before, masks(model)):
            changed.append(controller.step)
        before = masks(model)

    train(model, optimizer, batches(16), after_step=look)
    assert changed == [3, 6, 9]


# ---- counters


def test_counters_by_hand() -> None:
    model = toy_model(every=2)
    optimizer = SGD(model.parameters(), lr=0.0)
    controller = SparseTrainingController(model, optimizer, total_steps=7)  # dense gradients at 2, 4, 6
    for _ in range(7):
        model.loss(torch.ones(2, 4)).backward()
        optimizer.step()
    assert controller.counters() == {"step": 7, "active_weight_steps": 7 * 4, "num_dense_gradient_steps": 3}


def test_gradual_pruning_counts_the_weights_that_were_active() -> None:
    weight = torch.arange(1.0, 9.0).view(2, 4)
    dst = DSTConfig("gmp", update_every_steps=2, stop_fraction=0.5)
    model = ToyModel(weight, bits("1111 1111"), dst)
    model.layer.num_active = 2
    optimizer = SGD(model.parameters(), lr=0.0)
    controller = SparseTrainingController(model, optimizer, total_steps=8)
    active = []
    for _ in range(8):
        model.loss(torch.ones(2, 4)).backward()
        optimizer.step()
        active.append(int(model.layer.mask.sum()))
    # after step 2: 0.75 * (1 - 0.5^3) of 8 -> 5 pruned; after step 4: all 6
    assert active == [8, 3, 3, 2, 2, 2, 2, 2]
    assert controller.active_weight_steps == 8 + 8 + 3 + 3 + 2 + 2 + 2 + 2
    assert controller.num_dense_gradient_steps == 0


# ---- capture


def test_capture_is_armed_only_for_update_steps() -> None:
    model = toy_model(every=3)
    optimizer = SGD(model.parameters(), lr=0.0)
    controller = SparseTrainingController(model, optimizer, total_steps=8)
    armed = []
    for _ in range(8):
        armed.append(model.layer.dense_gradient is not None)
        model.loss(torch.ones(2, 4)).backward()
        optimizer.step()
    assert armed == [False, False, True, False, False, True, False, False]
    assert controller.num_dense_gradient_steps == 2


@pytest.mark.parametrize("algorithm", ["static", "set", "gmp"])
def test_only_rigl_pays_for_dense_gradients(algorithm: str) -> None:
    model = toy_model(algorithm)
    optimizer = SGD(model.parameters(), lr=0.0)
    controller = SparseTrainingController(model, optimizer, total_steps=8)
    for _ in range(8):
        assert model.layer.dense_gradient is None
        model.loss(torch.ones(2, 4)).backward()
        optimizer.step()
    assert controller.num_dense_gradient_steps == 0


@pytest.mark.usefixtures("either_structure")
def test_evaluation_between_steps_changes_nothing() -> None:
    def run(evaluate: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = sparse_gpt2("rigl")
        optimizer = AdamW(model.parameters(), lr=0.01)
        SparseTrainingController(model, optimizer, total_steps=8)

        def look() -> None:
            if evaluate:
                model.eval()
                with torch.no_grad():
                    model(input_ids=next(batches(1, seed=99)), labels=next(batches(1, seed=98)))
                model.train()

        train(model, optimizer, batches(8), after_step=look)
        return masks(model), {name: value.detach() for name, value in model.named_parameters()}

    assert not differences(run(evaluate=True), run(evaluate=False))


def test_close_detaches_hook_capture_and_compiler_stance() -> None:
    model = toy_model(every=1)
    optimizer = SGD(model.parameters(), lr=0.1)
    controller = SparseTrainingController(model, optimizer, total_steps=100)
    assert model.layer.dense_gradient is not None
    assert stance() == "force_eager"
    controller.close()
    assert model.layer.dense_gradient is None
    assert stance() == "default"
    before = model.layer.mask.clone()
    model.loss(torch.tensor([[0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])).backward()
    optimizer.step()
    assert controller.step == 0
    assert torch.equal(model.layer.mask, before)


def stance() -> str:
    return str(torch._dynamo.eval_frame._stance.stance)


def test_compiler_stance_follows_update_steps() -> None:
    model = toy_model(every=3)
    optimizer = SGD(model.parameters(), lr=0.0)
    SparseTrainingController(model, optimizer, total_steps=6)
    seen = []
    for _ in range(6):
        seen.append(stance())
        model.loss(torch.ones(2, 4)).backward()
        optimizer.step()
    assert seen == ["default", "default", "force_eager", "default", "default", "default"]


# ---- names


class Wrapper(nn.Module):
    """Names its content as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.usefixtures("either_structure")
def test_names_do_not_depend_on_wrappers() -> None:
    model = sparse_gpt2()
    expected = list(sparse_layers(model))
    assert expected[0].startswith("transformer.h.0.attn.c_attn")
    assert list(sparse_layers(Wrapper(model))) == expected
    compiled = torch.compile(sparse_gpt2(), backend="eager")
    assert list(sparse_layers(compiled)) == expected
    assert list(sparse_layers(Wrapper(compiled))) == expected
    assert list(sparse_layers(torch.compile(Wrapper(model), backend="eager"))) == expected


# ---- errors


def test_model_without_sparse_layers() -> None:
    dense = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no sparse layers.*sparsify"):
        SparseTrainingController(dense, SGD(dense.parameters(), lr=1.0), 10)


@pytest.mark.usefixtures("either_structure")
def test_a_model_loaded_without_its_masks_is_told_how_to_load_it() -> None:
    stock = to_dense(sparse_gpt2(linear=True))
    stock.config.sparse_ift = sparse_gpt2().config.sparse_ift  # as the stock class loads an unstructured model
    for use in (
        lambda: SparseTrainingController(stock, SGD(stock.parameters(), lr=1.0), 10),
        lambda: to_dense(stock),
        lambda: sparsify(stock, SparseIFTConfig()),
    ):
        with pytest.raises(ValueError, match=r"without its masks.*load_pretrained"):
            use()


def test_model_and_optimizer_have_one_controller_at_a_time() -> None:
    model, other_model = toy_model(), toy_model()
    optimizer = SGD([*model.parameters(), *other_model.parameters()], lr=1.0)
    first = SparseTrainingController(model, optimizer, 10)
    SparseTrainingController(other_model, optimizer, 10)
    with pytest.raises(ValueError, match=r"have a SparseTrainingController already: close\(\)"):
        SparseTrainingController(model, optimizer, 10)
    first.close()
    SparseTrainingController(model, optimizer, 10)
    SparseTrainingController(model, SGD(model.parameters(), lr=1.0), 10)  # the other optimizer may be given up


@pytest.mark.usefixtures("either_structure")
def test_a_controller_keeps_nothing_alive_when_the_loop_has_ended() -> None:
    """As part of a cycle it would keep DistributedDataParallel, and with it the threads of its process group."""

    def loop() -> ReferenceType[nn.Module]:
        model = sparse_gpt2("rigl")
        wrapper = Wrapper(model)  # the model itself holds functions that hold it
        optimizer = AdamW(model.parameters(), lr=0.01)
        SparseTrainingController(wrapper, optimizer, 10)
        before = masks(model)
        train(model, optimizer, batches(4))
        assert differences(before, masks(model))  # the optimizer's hook alone has kept it going
        return ref(wrapper)

    gc.collect()
    gc.disable()
    try:
        assert loop()() is None
    finally:
        gc.enable()


def supar_rates(groups: bool, scheduled: bool) -> None:
    model = sparsify(tiny_model("gpt2"), SparseIFTConfig(init="supar"))
    model.transformer.h[0] = torch.compile(model.transformer.h[0])  # type: ignore[union-attr, operator, index]
    optimizer = torch.optim.AdamW(optimizer_param_groups(model, 0.1) if groups else model.parameters(), lr=0.1)
    if scheduled:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    SparseTrainingController(model, optimizer, 10).close()


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch.compile's own
@pytest.mark.parametrize("scheduled", [False, True])
def test_learning_rates_that_are_not_those_of_supar_are_noticed(
    scheduled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    supar_rates(groups=True, scheduled=scheduled)
    assert "optimizer_param_groups" not in caplog.text
    supar_rates(groups=False, scheduled=scheduled)
    assert "build it with optimizer_param_groups(model, lr)" in caplog.text


@pytest.mark.parametrize("number", [0, -1, 1.5, 8.0, math.nan, True, "10"])
def test_numbers_of_steps_and_batches_are_whole_and_at_least_1(number: Any) -> None:
    model = toy_model()
    for given in ({"total_steps": number}, {"total_steps": 8, "micro_batches": number}):
        name = [*given][-1]
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {number!r}"):
            SparseTrainingController(model, SGD(model.parameters(), lr=1.0), **given)


@pytest.mark.usefixtures("either_structure")
def test_sparse_weight_missing_from_the_optimizer() -> None:
    model = sparse_gpt2()
    name = first_sparse(model, "mlp.c_fc")
    rest = [value for key, value in model.named_parameters() if key != f"{name}.weight"]
    with pytest.raises(ValueError, match=rf"{name}\.weight is not in the optimizer"):
        SparseTrainingController(model, SGD(rest, lr=1.0), 10)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("missing", ["embed_tokens", "lm_head", "q_proj"])
def test_an_end_missing_from_the_optimizer_is_left_dense_in_another_way(storage: str, missing: str) -> None:
    """`exclude` takes kinds of projections alone."""
    model = residual_model(tied=False, **STORAGES[storage])
    rest = [value for key, value in model.named_parameters() if missing not in key]
    with pytest.raises(ValueError, match=rf"{missing}\.weight is not in the optimizer") as error:
        SparseTrainingController(model, SGD(rest, lr=1.0), 10)
    is_end = missing != "q_proj"
    assert ("embedding='dense', or freeze them" in str(error.value)) == is_end
    assert ("exclude" in str(error.value)) != is_end
    for key, value in model.named_parameters():
        value.requires_grad_(missing not in key)
    SparseTrainingController(model, SGD(rest, lr=1.0), 10).close()


def test_not_a_torch_optimizer() -> None:
    with pytest.raises(ValueError, match=r"SimpleNamespace is not a torch\.optim\.Optimizer"):
        SparseTrainingController(toy_model(), SimpleNamespace(step=lambda: None), 10)


def test_update_step_without_a_backward_pass() -> None:
    model = toy_model(every=2)
    optimizer = SGD(model.parameters(), lr=1.0)
    SparseTrainingController(model, optimizer, total_steps=100)
    model.loss(torch.ones(2, 4)).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"layer: no dense gradient reached step 2"):
        optimizer.step()


@pytest.mark.usefixtures("either_structure")
def test_gradients_that_are_put_there_by_hand_say_nothing_of_inactive_weights() -> None:
    model = sparse_gpt2(every=2)
    optimizer = SGD(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=100)
    before, parameters = masks(model), list(model.parameters())

    def step(tokens: Tensor) -> None:
        loss = model(input_ids=tokens, labels=tokens).loss
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()

    first, second = batches(2)
    step(first)
    with pytest.raises(RuntimeError, match=r"no dense gradient reached step 2.*by hand, from torch\.autograd\.grad"):
        step(second)
    assert not differences(before, masks(model))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_gradient_that_is_not_finite(value: float) -> None:
    model = toy_model()
    optimizer = SGD(model.parameters(), lr=1.0)
    SparseTrainingController(model, optimizer, total_steps=100)
    before = model.layer.mask.clone()
    model.loss(torch.ones(2, 4)).backward()
    assert model.layer.dense_gradient is not None
    assert model.layer.dense_gradient.total is not None
    model.layer.dense_gradient.total[0, 1] = value  # of an inactive weight: all that the optimizer sees is fine
    with pytest.raises(RuntimeError, match=r"layer: the dense gradient at step 1 is not finite.*begin_step"):
        optimizer.step()
    assert torch.equal(model.layer.mask, before)


@pytest.mark.usefixtures("either_structure")
def test_errors_of_an_update_in_a_model() -> None:
    """As in the two tests above, in layers of every kind; masks stay."""
    model = sparse_gpt2(every=1)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    SparseTrainingController(model, optimizer, total_steps=100)
    before = masks(model)
    tokens = next(batches(1))
    model(input_ids=tokens, labels=tokens).loss.backward()
    name, layer = next(iter(sparse_layers(model).items()))
    assert layer.dense_gradient is not None
    assert layer.dense_gradient.total is not None
    layer.dense_gradient.total.view(-1)[-1] = math.nan
    with pytest.raises(RuntimeError, match=rf"{name}: the dense gradient at step 1 is not finite"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=rf"{name}: no dense gradient reached step 2"):
        optimizer.step()
    assert not differences(before, masks(model))


@pytest.mark.usefixtures("either_structure")
def test_state_of_a_model_with_other_layers() -> None:
    model = toy_model()
    controller = SparseTrainingController(model, SGD(model.parameters(), lr=1.0), 10)
    other = sparse_gpt2()
    state = SparseTrainingController(other, SGD(other.parameters(), lr=1.0), 10).state_dict()
    with pytest.raises(ValueError, match="another model"):
        controller.load_state_dict(state)


@pytest.mark.usefixtures("either_structure")
@pytest.mark.parametrize("hidden", [12, 24])
def test_state_of_a_model_of_another_width(hidden: int) -> None:
    """Same layer names, other shapes: must be refused, and change nothing."""
    model, other = sparse_gpt2(hidden=16), sparse_gpt2(hidden=hidden)
    controller = SparseTrainingController(model, SGD(model.parameters(), lr=1.0), 10)
    state = SparseTrainingController(other, SGD(other.parameters(), lr=1.0), 10).state_dict()
    before = masks(model)
    with pytest.raises(ValueError, match="another model"):
        controller.load_state_dict(state)
    assert not differences(before, masks(model))


def test_state_of_a_model_with_other_numbers_of_tiles() -> None:
    """Same layers, same widths, one tile more in some rows of the second layer: the first must stay as it is, too."""
    with tiny_models_of("block"):
        model = sparse_gpt2()
    controller = SparseTrainingController(model, SGD(model.parameters(), lr=1.0), 10)
    state = controller.state_dict()
    names = list(state["masks"])
    first, second = (unpack(state["masks"][name], tuple(state["shapes"][name])) for name in names[:2])
    second[0, int(second[0].int().argmin())] = True
    state["masks"].update({names[0]: pack(first.roll(1, dims=1)), names[1]: pack(second)})
    before = {"masks": masks(model), "weights": {name: value.clone() for name, value in model.state_dict().items()}}
    with pytest.raises(ValueError, match=rf"controller's state are of another model: {names[1]} has other numbers of"):
        controller.load_state_dict(state)
    assert not differences(before, {"masks": masks(model), "weights": model.state_dict()})
