"""What is measured on logged steps: gradients before clipping, saturated hidden units by hand, hooks that are gone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback

from sparseift_llm import SparseIFTConfig, SparseTrainingCallback, sparsify
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.block_ffn import BlockFeedForward
from sparseift_llm.metrics.step_probe import FLAT, StepSample, num_saturated
from tests.families.test_families import STORAGES, VARIANTS, WIDTHS
from tests.helpers.models import ARCHS, tiny_config, token_ids
from tests.helpers.tiny_runs import LENGTH, controller_of, make_trainer, sparse_gpt2


def sample_of(model: PreTrainedModel) -> StepSample:
    return StepSample(model, sparse_layers(model))


def num_hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


# ---- saturated units


def test_saturated_by_hand() -> None:
    activation = torch.tensor([[0.0, 2.0, -9e-4, 0.0], [0.0, 0.0, 9e-4, -2e-3]])
    assert int(num_saturated(activation)) == 2
    assert int(num_saturated(activation[:1])) == 3  # on the first token alone
    assert int(num_saturated(torch.full((3, 5), FLAT))) == 0


@torch.no_grad()
def saturate(model: PreTrainedModel, units: int) -> None:
    """Push the first hidden units far to the left, where GELU and SiLU are flat."""
    for name, module in model.named_modules():
        if name.endswith(("mlp.c_fc", "mlp.dense_h_to_4h", "fc1")):
            module.bias[:units] = -50.0  # type: ignore[index]


@pytest.mark.parametrize("structure", STORAGES)
@pytest.mark.parametrize("units", [0, 5])
def test_saturated_share_of_a_model(structure: str, units: int) -> None:
    """Of two layers, fused in one operator where the structure is `block`: that one hides the activation."""
    dense = tiny_config("gpt2", **WIDTHS["gpt2"])
    model = sparsify(dense, SparseIFTConfig(sparsity=0.75, **STORAGES[structure]))
    saturate(model, units)
    sample = sample_of(model)
    sample.begin()
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    sample.end()
    hidden = model.config.n_inner or 4 * model.config.n_embd
    assert float(sample.saturated) == pytest.approx(units / hidden)  # type: ignore[arg-type]
    fused = [module for module in model.modules() if isinstance(module, BlockFeedForward) and module.is_fused]
    assert len(fused) == (2 if structure == "block" else 0)


@pytest.mark.parametrize("structure", STORAGES)
def test_the_sample_is_the_first_tokens_of_the_first_micro_batch(
    structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hidden unit that only a later token, or a later micro-batch, wakes up counts as saturated."""
    monkeypatch.setattr("sparseift_llm.metrics.step_probe.SAMPLE_TOKENS", 4)
    torch.manual_seed(0)
    config = tiny_config("gpt2", **{**WIDTHS["gpt2"], "n_layer": 1})
    model = sparsify(config, SparseIFTConfig(**STORAGES[structure]))
    up = model.get_submodule("transformer.h.0.mlp.c_fc")
    assert isinstance(up.bias, Tensor)
    hidden = len(up.bias)
    expected: list[Tensor] = []
    sample = sample_of(model)
    mlp = model.get_submodule("transformer.h.0.mlp")
    watched = mlp if isinstance(mlp, BlockFeedForward) else mlp.get_submodule("c_proj")

    def note(module: Any, args: tuple[Tensor]) -> None:
        activation = watched.hidden(args[0]) if isinstance(watched, BlockFeedForward) else args[0]
        expected.append(activation.detach().abs().reshape(-1, hidden))

    watched.register_forward_pre_hook(note)
    with torch.no_grad():
        up.bias.copy_(torch.linspace(-6.0, -2.5, hidden))
    sample.begin()
    for seed in (0, 1):
        model(input_ids=token_ids(1, 32, seed)).logits.sum().backward()
    sample.end()
    share = float((expected[0][:4].amax(0) < FLAT).float().mean())
    assert float(sample.saturated) == pytest.approx(share)  # type: ignore[arg-type]
    assert share != float((expected[0].amax(0) < FLAT).float().mean())
    assert share != float((torch.cat(expected).amax(0) < FLAT).float().mean())


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_is_sampled(arch: str) -> None:
    model = sparsify(tiny_config(arch), SparseIFTConfig(sparsity=0.75))
    saturate(model, 3)
    sample = sample_of(model)
    sample.begin()
    assert num_hooks(model) == 2  # one per layer
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    sample.end()
    assert num_hooks(model) == 0
    assert sample.saturated is not None
    if arch in ("gpt2", "gpt_neox", "opt"):
        hidden = {"gpt2": 256, "gpt_neox": 256, "opt": 256}[arch]
        assert float(sample.saturated) >= 3 / hidden


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("structure", STORAGES)
def test_every_family_is_sampled(variant: str, structure: str) -> None:
    dense = tiny_config("gpt2", **WIDTHS["gpt2"])
    model = sparsify(dense, SparseIFTConfig(**VARIANTS[variant], **STORAGES[structure]))
    sample = sample_of(model)
    sample.begin()
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    sample.end()
    assert 0 <= float(sample.saturated) < 1  # type: ignore[arg-type]
    assert float(sample.grad_norm) > 0  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_forward_pass_is_not_sampled() -> None:
    torch._dynamo.reset()
    model = sparse_gpt2("static")
    compiled: Any = torch.compile(model, backend="eager")
    sample = StepSample(compiled, sparse_layers(compiled))
    tokens = torch.arange(LENGTH)[None]
    for _ in range(2):
        sample.begin()
        compiled(input_ids=tokens, labels=tokens).loss.backward()
        sample.end()
        assert sample.saturated is None
        assert float(sample.grad_norm) > 0  # type: ignore[arg-type]


def test_a_sample_that_was_broken_off_leaves_no_hooks() -> None:
    model = sparse_gpt2()
    sample = sample_of(model)
    sample.begin()
    sample.begin()
    assert num_hooks(model) == 1
    sample.close()
    assert num_hooks(model) == 0


# ---- gradients, in a Trainer


class BeforeClipping(Trainer):
    """Notes the norm of the sparse weights' gradients before and after the Trainer clips them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norms: list[float] = []
        self.clipped: list[float] = []

    def _norm(self) -> float:
        assert self.model is not None
        gradients = [layer.weight.grad for layer in sparse_layers(self.model).values()]
        assert all(gradient is not None for gradient in gradients)
        return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))  # type: ignore[union-attr]

    def _clip_grad_norm(self, model: Any) -> Any:
        self.norms.append(self._norm())
        norm = super()._clip_grad_norm(model)
        self.clipped.append(self._norm())
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            self.norms.append(self._norm())
            self.clipped.append(self._norm())
        return super()._get_grad_norm(model, grad_norm)


@pytest.mark.usefixtures("either_structure")
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05, 100.0])
@pytest.mark.parametrize("micro", [1, 2])
def test_the_norm_is_that_before_clipping(max_grad_norm: float, micro: int, tmp_path: Path) -> None:
    trainer = make_trainer(
        sparse_gpt2(), tmp_path, SparseTrainingCallback("all"), steps=6, trainer_class=BeforeClipping, logging_steps=2,
        max_grad_norm=max_grad_norm, gradient_accumulation_steps=micro, per_device_train_batch_size=4 // micro,
    )  # fmt: skip
    assert isinstance(trainer, BeforeClipping)
    trainer.train()
    logged = [entry["grad_norm_active"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(trainer.norms[1::2], rel=1e-5)  # of the logged step, no other
    assert (max(trainer.clipped) < 0.9 * min(trainer.norms)) == (max_grad_norm == 0.05)


class HooksPerStep(TrainerCallback):
    """Forward hooks that are on the model in each forward pass."""

    def __init__(self) -> None:
        self.seen: list[bool] = []
        self.left: list[int] = []

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        lookout = model.transformer.h[0]
        lookout.register_forward_pre_hook(lambda *_: self.seen.append(num_hooks(model) > 1))

    def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.left.append(num_hooks(model))


def test_only_logged_steps_are_sampled(tmp_path: Path) -> None:
    hooks = HooksPerStep()
    callbacks = (SparseTrainingCallback("all"), hooks)
    make_trainer(sparse_gpt2(), tmp_path, *callbacks, steps=8, logging_steps=3, logging_first_step=True).train()
    assert hooks.seen == [True, False, True, False, False, True, False, False]
    assert hooks.left == [1] * 8


def test_a_norm_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    """As on a step that a gradient scaler is going to skip."""

    class Overflow(Trainer):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(model, *args, **kwargs)
            if self.state.global_step == 2:
                layer = next(iter(sparse_layers(model).values()))
                assert layer.weight.grad is not None
                layer.weight.grad.fill_(math.inf)
            return loss

    trainer = make_trainer(
        sparse_gpt2("static"), tmp_path, SparseTrainingCallback("all"), steps=3, trainer_class=Overflow, max_grad_norm=0
    )
    trainer.train()
    reported = ["grad_norm_active" in entry for entry in trainer.state.log_history if "loss" in entry]
    assert reported == [True, True, False]
    assert controller_of(trainer).step == 3
