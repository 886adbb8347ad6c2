"""Training features that people turn on beside sparse training: exact, or refused by name."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparseift_llm import SparseTrainingCallback, SparseTrainingController, load_pretrained
from sparseift_llm.layers.base import sparse_layers
from tests.helpers.tiny_runs import (
    batches,
    controller_of,
    dense_twin,
    differences,
    first_sparse,
    make_trainer,
    masks,
    snapshot,
    sparse_gpt2,
    sparse_trainer,
    train,
    violations,
)

STEPS = 12
pytestmark = pytest.mark.usefixtures("either_structure")
Masks = dict[str, Tensor]


def plain_run() -> tuple[list[Masks], dict[str, Any]]:
    """Masks after every step of the plainest loop, and what it ends with."""
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=STEPS)
    history: list[Masks] = []
    train(model, optimizer, batches(STEPS), after_step=lambda: history.append(masks(model)))
    return history, snapshot(model, optimizer)


# ---- precision


def check_low_precision(dtype: torch.dtype, autocast: bool) -> None:
    """Updates happen when they should, counts are kept, and what is inactive is exactly 0."""
    model = sparse_gpt2("rigl").to(torch.float32 if autocast else dtype)  # type: ignore[arg-type]
    optimizer = AdamW(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, total_steps=STEPS)
    planned = {name: layer.num_active for name, layer in sparse_layers(model).items()}
    history = [masks(model)]

    def check() -> None:
        assert violations(model, optimizer) == []
        assert {name: layer.count_active() for name, layer in sparse_layers(model).items()} == planned
        history.append(masks(model))

    for batch in batches(STEPS):
        for rows in batch.chunk(2):
            with torch.autocast("cpu", dtype, enabled=autocast):
                loss = model(input_ids=rows, labels=rows).loss / 2
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        check()
    changed = [step for step, (a, b) in enumerate(pairwise(history), start=1) if differences(a, b)]
    assert changed == [2, 4, 6, 8]
    assert controller.num_dense_gradient_steps == 4


@pytest.mark.support("bfloat16 and float16 autocast")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype == torch.float16:
        monkeypatch.setenv("SPARSEIFT_BLOCK_KERNEL", "blas")  # what is chosen for it on a CPU, but for a warning
    check_low_precision(dtype, autocast=True)


@pytest.mark.support("bfloat16 weights")
def test_bfloat16_weights() -> None:
    check_low_precision(torch.bfloat16, autocast=False)


@pytest.mark.support("bfloat16 and float16 autocast")
def test_bf16_trainer(tmp_path: Path) -> None:
    trainer = sparse_trainer(sparse_gpt2("rigl").float(), tmp_path, bf16=True)  # type: ignore[arg-type]
    trainer.train()
    assert controller_of(trainer).num_dense_gradient_steps == 4
    assert violations(trainer.model, trainer.optimizer.optimizer) == []  # type: ignore[arg-type, union-attr]


# ---- the Trainer's options


@pytest.mark.support("torch.compile of the Trainer")
@pytest.mark.structures("unstructured", "block", "families")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_torch_compile_in_the_trainer(tmp_path: Path) -> None:
    torch._dynamo.reset()
    plain = sparse_trainer(sparse_gpt2("rigl"), tmp_path / "plain")
    plain.train()
    torch._dynamo.utils.counters.clear()
    compiled = sparse_trainer(
        sparse_gpt2("rigl"), tmp_path / "compiled", torch_compile=True, torch_compile_backend="aot_eager"
    )
    compiled.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not differences(masks(plain.model), masks(compiled.model))  # type: ignore[arg-type]


@pytest.mark.support("max_grad_norm=0")
def test_without_clipping(tmp_path: Path) -> None:
    """The Trainer's own loop without clipping is a plain loop without clipping."""
    trainer = sparse_trainer(sparse_gpt2("rigl"), tmp_path, max_grad_norm=0.0, lr_scheduler_type="constant")
    seen: list[Tensor] = []
    inner = trainer.compute_loss

    def recording(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["input_ids"].clone())
        return inner(model, inputs, *args, **kwargs)

    trainer.compute_loss = recording  # type: ignore[method-assign]
    trainer.train()
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    SparseTrainingController(model, optimizer, total_steps=STEPS)
    train(model, optimizer, iter(seen))
    assert not differences(masks(model), masks(trainer.model))  # type: ignore[arg-type]


def test_the_cost_of_updates_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(sparse_gpt2("rigl"), tmp_path, SparseTrainingCallback(metrics="all"))
    with caplog.at_level(logging.INFO, "sparseift_llm.training.controller"):
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "mask_update_seconds" in entry]
    seconds = [entry["mask_update_seconds"] for entry in logged]
    changed = [index for index in range(1, 12) if seconds[index] > seconds[index - 1]]
    assert (len(seconds), seconds[0], changed) == (12, 0, [1, 3, 5, 7])  # updates at steps 2, 4, 6, 8
    assert logged[-1]["mask_update_bytes"] == 0  # one process
    assert [record.message.partition(":")[0] for record in caplog.records] == [f"step {step}" for step in (2, 4, 6, 8)]


# ---- parameters


@pytest.mark.support("saving and loading a trained model")
def test_a_trained_model_comes_back(tmp_path: Path) -> None:
    model = sparse_gpt2("rigl")
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=STEPS)
    before = masks(model)
    train(model, optimizer, batches(STEPS))
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, dtype=torch.float64)
    assert differences(before, masks(loaded))
    assert not differences(masks(model), masks(loaded))
    assert not differences(dict(model.state_dict()), dict(loaded.state_dict()))


@pytest.mark.support("tied embeddings")
def test_tied_embeddings(tmp_path: Path) -> None:
    model = sparse_gpt2("rigl")
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    assert head.weight is embeddings.weight
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=STEPS)
    before = embeddings.weight.detach().clone()
    train(model, optimizer, batches(STEPS))
    assert head.weight is embeddings.weight
    assert (embeddings.weight != before).any()
    model.save_pretrained(tmp_path)
    loaded: Any = load_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert not differences(masks(model), masks(loaded))


@pytest.mark.support("frozen layers")
@pytest.mark.parametrize("algorithm", ["rigl", "set"])
@pytest.mark.parametrize("in_optimizer", [True, False])
def test_a_frozen_layer_keeps_mask_and_weights(algorithm: str, in_optimizer: bool) -> None:
    model = sparse_gpt2(algorithm)
    name = first_sparse(model, "mlp.c_fc")
    frozen = sparse_layers(model)[name]
    frozen.weight.requires_grad_(False)
    chosen = [parameter for parameter in model.parameters() if in_optimizer or parameter.requires_grad]
    optimizer = AdamW(chosen, lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=STEPS)
    before, weight = masks(model), frozen.weight.detach().clone()
    train(model, optimizer, batches(STEPS))
    after = masks(model)
    assert {key for key in after if not torch.equal(before[key], after[key])} == set(after) - {name}
    assert torch.equal(frozen.weight, weight)


@pytest.mark.support("frozen layers")
def test_a_layer_that_is_unfrozen_takes_part_from_then_on() -> None:
    model = sparse_gpt2("rigl")
    layer = sparse_layers(model)[first_sparse(model, "mlp.c_fc")]
    layer.weight.requires_grad_(False)
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=STEPS)
    before = layer.current_mask().clone()
    train(model, optimizer, batches(5))  # step 6 is an update, and its capture is armed already
    assert torch.equal(layer.current_mask(), before)
    layer.weight.requires_grad_(True)
    train(model, optimizer, batches(1))
    assert not torch.equal(layer.current_mask(), before)


def test_nothing_to_train() -> None:
    model = sparse_gpt2()
    for layer in sparse_layers(model).values():
        layer.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="all sparse weights are frozen"):
        SparseTrainingController(model, AdamW(model.parameters()), 10)


@pytest.mark.support("several parameter groups")
def test_parameter_groups_do_not_matter() -> None:
    history, end = plain_run()
    model = sparse_gpt2("rigl")
    sparse = {id(layer.weight) for layer in sparse_layers(model).values()}
    groups = [
        {"params": [p for p in model.parameters() if (id(p) in sparse) == is_sparse], "lr": 0.01}
        for is_sparse in (True, False)
    ]
    optimizer = AdamW(groups, lr=1.0)
    SparseTrainingController(model, optimizer, total_steps=STEPS)
    found: list[Masks] = []
    train(model, optimizer, batches(STEPS), after_step=lambda: found.append(masks(model)))
    assert not differences(history, found)
    assert not differences(end["weights"], snapshot(model, optimizer)["weights"])


# ---- averages


def averaged_run(follow: Callable[[SparseTrainingController, nn.Module], None]) -> tuple[nn.Module, Any]:
    model = sparse_gpt2("rigl", every=1)
    optimizer = AdamW(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, total_steps=STEPS)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    follow(controller, average)
    train(model, optimizer, batches(STEPS), after_step=lambda: average.update_parameters(model))
    return model, average


def dense_average(every: int = 1) -> dict[str, Tensor]:
    """The same average, of dense weights: where a connection is not active, the average starts again at 0."""
    model = sparse_gpt2("rigl", every=every)
    optimizer = AdamW(model.parameters(), lr=0.01)
    SparseTrainingController(model, optimizer, total_steps=STEPS)
    average: dict[str, Tensor] = {}

    def update() -> None:
        dense = {name: value.detach() for name, value in dense_twin(model).named_parameters()}
        ones = copy.deepcopy(model)
        for layer in sparse_layers(ones).values():
            layer.weight.data.fill_(1.0)
            layer.zero_inactive()
        active = {name: value.detach() != 0 for name, value in dense_twin(ones).named_parameters()}
        sparse = {f"{name}.weight" for name in sparse_layers(model)}
        for name, value in dense.items():
            held = average[name] * active[name] if name in average and name in sparse else average.get(name)
            average[name] = value.clone() if held is None else held.lerp(value, 0.5)

    train(model, optimizer, batches(STEPS), after_step=update)
    return average


@pytest.mark.support("averaged models (EMA), with controller.follow")
def test_an_averaged_model_follows_the_masks() -> None:
    model, average = averaged_run(lambda controller, copy: controller.follow(copy))
    assert not differences(masks(model), masks(average))
    expected = dense_average()
    for name, value in dense_twin(average.module).named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-15)


def test_the_check_of_the_average_catches_one_that_does_not_follow() -> None:
    _, average = averaged_run(lambda *_: None)
    expected = dense_average()
    found = dict(dense_twin(average.module).named_parameters())
    assert any(not torch.allclose(found[name], expected[name], rtol=1e-6) for name in expected)


@pytest.mark.support("averaged models (EMA), with controller.follow")
def test_an_average_is_resumed() -> None:
    model, average = averaged_run(lambda controller, copy: controller.follow(copy))
    other = sparse_gpt2("rigl", every=1, seed=1)
    optimizer = AdamW(other.parameters(), lr=0.01)
    controller = SparseTrainingController(other, optimizer, total_steps=STEPS)
    again = AveragedModel(other, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    other.load_state_dict(model.state_dict())
    again.load_state_dict(average.state_dict())
    from sparseift_llm.checkpoints.mask_file import apply_masks

    apply_masks(other, masks(model), "the first model")
    controller.follow(again)
    assert not differences(masks(average), masks(again))
    assert not differences(dict(average.named_parameters()), dict(again.named_parameters()))


def test_following_another_model_is_refused() -> None:
    model = sparse_gpt2("rigl")
    controller = SparseTrainingController(model, AdamW(model.parameters()), 10)
    with pytest.raises(ValueError, match="Linear is not a copy of the model"):
        controller.follow(nn.Linear(2, 2))


# ---- refusals


def pretend(cls: type, package: str) -> type:
    """A class that says it is from `package`, which is not installed here."""
    return type(cls.__name__, (cls,), {"__module__": f"{package}.some.module"})


@pytest.mark.support("8-bit and paged optimizers (bitsandbytes, torchao)", refused=True)
@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_quantised_optimizers_are_refused(package: str) -> None:
    model = sparse_gpt2("rigl")
    optimizer = pretend(AdamW, package)(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=rf"AdamW of {package} \(8-bit or paged state\).*use torch\.optim\.AdamW"):
        SparseTrainingController(model, optimizer, 10)


@pytest.mark.support("DeepSpeed in the Trainer, DeepSpeed without ZeRO", refused=True)
def test_deepspeed_is_refused() -> None:
    model = sparse_gpt2("rigl")
    advice = r"of DeepSpeed only ZeRO.*use DistributedDataParallel or FSDP2 \(torch\.distributed\.fsdp\.fully_shard\)"
    with pytest.raises(ValueError, match=advice):
        SparseTrainingController(model, pretend(SGD, "deepspeed")(model.parameters(), lr=0.1), 10)
    engine = pretend(nn.Sequential, "deepspeed")(model)
    with pytest.raises(ValueError, match=advice):
        SparseTrainingController(engine, SGD(model.parameters(), lr=0.1), 10)


@pytest.mark.support("torch.nn.DataParallel", refused=True)
def test_data_parallel_is_refused() -> None:
    model = sparse_gpt2("rigl")
    with pytest.raises(ValueError, match=r"torch\.nn\.DataParallel is not supported: start one process per GPU"):
        SparseTrainingController(nn.DataParallel(model), SGD(model.parameters(), lr=0.1), 10)


@pytest.mark.support("PEFT adapters (LoRA) on top", refused=True)
@pytest.mark.filterwarnings("ignore")  # of PEFT's own
def test_adapters_are_refused(either_structure: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = sparse_gpt2("rigl")
    lora = peft.LoraConfig(target_modules=["c_attn", "wte"] if either_structure == "unstructured" else ["wte"])
    adapted = peft.get_peft_model(model, lora)
    message = r"PEFT adapters on a Sparse-IFT model are not supported.*to_dense\(model\)"
    with pytest.raises(ValueError, match=message):
        SparseTrainingController(adapted, AdamW(adapted.parameters()), 10)
    with pytest.raises(ValueError, match=message):
        make_trainer(adapted, tmp_path, SparseTrainingCallback()).train()


@pytest.mark.support("PEFT adapters (LoRA) on to_dense(model), where non-linearities allow it")
@pytest.mark.filterwarnings("ignore")  # of PEFT's own
def test_adapters_on_a_dense_copy() -> None:
    from sparseift_llm import to_dense

    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = peft.get_peft_model(to_dense(sparse_gpt2("rigl", linear=True)), lora)
    optimizer = AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    rows = next(batches(1))
    before = adapted(input_ids=rows, labels=rows).loss.item()
    train(adapted, optimizer, (rows for _ in range(3)))
    assert adapted(input_ids=rows, labels=rows).loss.item() < before
