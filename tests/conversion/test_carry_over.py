"""What a dense model has beyond its config is found again on its twin, or refused by name."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparseift_llm import SparseIFTConfig, load_pretrained, plan, sparsify, to_dense
from sparseift_llm.layers.block_ffn import BlockFeedForward
from sparseift_llm.models.beyond_config import changes_of, config_of
from tests.helpers.models import ARCHS, logits_of, tiny_model, token_ids

STARTS: dict[str, dict[str, Any]] = {
    "wide": {},
    "wide tiles": {"structure": "block", "block_size": 8},
    "ffn tiles": {"structure": "block", "block_size": 8, "scope": "ffn"},
    "parallel": {"family": "parallel", "nonlinearity": "none", "init": "pretrained"},
    "parallel tiles": {
        "family": "parallel", "nonlinearity": "none", "init": "pretrained", "structure": "block", "block_size": 8,
    },
}  # fmt: skip
EXACT = ("parallel", "parallel tiles")  # these compute what the dense model did
every_start = pytest.mark.parametrize("start", STARTS)
both = pytest.mark.parametrize("arch", ["gpt2", "llama"])


def dense_model(arch: str, **changes: Any) -> PreTrainedModel:
    """Of sides that tiles and branches divide."""
    return tiny_model(arch, **({"intermediate_size": 64} if arch == "llama" else {}), **changes)


def twin_of(dense: PreTrainedModel, start: str) -> PreTrainedModel:
    return sparsify(dense, SparseIFTConfig(sparsity=0.75, **STARTS[start]))


def mlp_of(model: PreTrainedModel, layer: int = 0) -> Any:
    return model.transformer.h[layer].mlp if hasattr(model, "transformer") else model.model.layers[layer].mlp


def attention_of(model: PreTrainedModel) -> Any:
    return model.transformer.h[0].attn if hasattr(model, "transformer") else model.model.layers[0].self_attn


def activation_name(model: PreTrainedModel) -> str:
    return "act" if hasattr(mlp_of(model), "act") else "act_fn"


# ---- ties


@both
@every_start
@pytest.mark.parametrize("is_tied", [True, False])
def test_embeddings_tied_otherwise_than_the_config_says(is_tied: bool, start: str, arch: str, tmp_path: Path) -> None:
    dense = dense_model(arch, tie_word_embeddings=is_tied)
    weight = dense.get_input_embeddings().weight
    dense.lm_head.weight = nn.Parameter(weight.detach() * 2) if is_tied else weight
    sparse = twin_of(dense, start)
    assert dense.config.tie_word_embeddings is is_tied, "the argument stays as it is"
    assert sparse.config.tie_word_embeddings is not is_tied
    assert (sparse.lm_head.weight is sparse.get_input_embeddings().weight) is not is_tied
    if start in EXACT:
        torch.testing.assert_close(logits_of(sparse), logits_of(dense))
    planned = plan(dense, SparseIFTConfig(sparsity=0.75, **STARTS[start]))
    assert planned.sparse.stored_params == sum(value.numel() for value in sparse.parameters())
    assert planned.dense.stored_params == sum(value.numel() for value in dense.parameters())
    sparse.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load_pretrained(tmp_path)), logits_of(sparse))


# ---- modules


@both
@every_start
def test_a_replaced_activation(start: str, arch: str) -> None:
    dense = dense_model(arch)
    name = activation_name(dense)
    for layer in (0, 1):
        setattr(mlp_of(dense, layer), name, nn.Sequential(nn.ReLU(), nn.Hardtanh(-0.1, 0.1)))
    before = logits_of(dense)
    sparse = twin_of(dense, start)
    for layer in (0, 1):
        module = getattr(mlp_of(sparse, layer), name)
        assert [type(part) for part in module] == [nn.ReLU, nn.Hardtanh]
        assert module is not getattr(mlp_of(dense, layer), name)
    assert not any(isinstance(module, BlockFeedForward) for module in sparse.modules())
    assert torch.equal(logits_of(dense), before)
    if start in EXACT:
        torch.testing.assert_close(logits_of(sparse), before)
        torch.testing.assert_close(logits_of(to_dense(sparse)), before)


def test_a_shared_activation_stays_shared() -> None:
    dense = dense_model("gpt2")
    mlp_of(dense, 0).act = mlp_of(dense, 1).act = nn.Softplus()
    sparse = sparsify(dense, SparseIFTConfig())
    assert mlp_of(sparse, 0).act is mlp_of(sparse, 1).act is not mlp_of(dense, 0).act


# ---- how it is run


def own_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.tensor(7.0)


@both
@every_start
def test_the_loss_function(start: str, arch: str) -> None:
    dense = dense_model(arch)
    dense.loss_function = own_loss
    sparse = twin_of(dense, start)
    assert sparse(input_ids=token_ids(), labels=token_ids()).loss == 7
    assert to_dense(sparse).loss_function is own_loss


@both
@every_start
@pytest.mark.parametrize("every_n_layers", [1, 2])
def test_activation_checkpointing(every_n_layers: int, start: str, arch: str) -> None:
    dense = dense_model(arch)
    dense.train()
    dense.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every_n_layers)
    sparse = twin_of(dense, start)

    def checkpointed(model: nn.Module) -> dict[str, Any]:
        flags = {name: getattr(module, "gradient_checkpointing", None) for name, module in model.named_modules()}
        return {name: flag for name, flag in flags.items() if flag is not None}

    assert sparse.is_activation_checkpointing
    assert checkpointed(sparse) == checkpointed(dense)
    with torch.no_grad():
        expected = sparse(input_ids=token_ids(), use_cache=False).logits
    calls = []
    for layer in sparse.transformer.h if arch == "gpt2" else sparse.model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    logits = sparse(input_ids=token_ids(), use_cache=False).logits
    logits.sum().backward()
    assert torch.equal(logits, expected)
    assert len(calls) >= 2


@both
@every_start
def test_inputs_that_require_gradients(start: str, arch: str) -> None:
    dense = dense_model(arch).requires_grad_(False)
    assert not twin_of(dense, start).get_input_embeddings()(token_ids()).requires_grad
    dense.enable_input_require_grads()
    assert twin_of(dense, start).get_input_embeddings()(token_ids()).requires_grad


@both
@every_start
def test_training_mode_module_by_module(start: str, arch: str) -> None:
    dense = dense_model(arch)
    dense.train()
    mlp_of(dense).eval()
    sparse = twin_of(dense, start)
    assert sparse.training
    assert attention_of(sparse).training
    assert not any(module.training for module in mlp_of(sparse).modules())


# ---- settings and parameters


@both
@every_start
def test_settings_of_modules(start: str, arch: str) -> None:
    dense = dense_model(arch)
    norm = "ln_1" if arch == "gpt2" else "input_layernorm"
    changed = "eps" if arch == "gpt2" else "variance_epsilon"
    for layer in dense.transformer.h if arch == "gpt2" else dense.model.layers:
        setattr(getattr(layer, norm), changed, 0.3)
    if arch == "gpt2":
        dense.transformer.drop.p = 0.25
    sparse = twin_of(dense, start)
    for layer in sparse.transformer.h if arch == "gpt2" else sparse.model.layers:
        assert getattr(getattr(layer, norm), changed) == 0.3
    assert arch != "gpt2" or sparse.transformer.drop.p == 0.25
    if start in EXACT:
        torch.testing.assert_close(logits_of(sparse.eval()), logits_of(dense.eval()))


@both
@every_start
def test_frozen_parameters_and_single_dtypes(start: str, arch: str) -> None:
    dense = dense_model(arch, dtype=torch.float32)
    attention_of(dense).requires_grad_(False)
    dense.get_input_embeddings().weight.requires_grad_(False)
    final = dense.transformer.ln_f if arch == "gpt2" else dense.model.norm
    final.double()
    sparse = twin_of(dense, start)
    assert not any(value.requires_grad for value in attention_of(sparse).parameters())
    assert not sparse.get_input_embeddings().weight.requires_grad
    assert all(value.requires_grad for value in mlp_of(sparse).parameters())
    end = sparse.transformer.ln_f if arch == "gpt2" else sparse.model.norm
    assert {value.dtype for value in end.parameters()} == {torch.float64}
    assert {value.dtype for value in mlp_of(sparse).parameters()} == {torch.float32}


@every_start
@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_buffers(start: str, arch: str) -> None:
    """Gemma's embeddings are multiplied by a number that follows from the width: it is not that of the dense model."""
    dense = tiny_model(arch, intermediate_size=64, head_dim=8)
    scale = getattr(twin_of(dense, start).model.embed_tokens, "embed_scale", None)
    width = twin_of(dense, start).config.hidden_size
    assert scale is None or float(scale) == pytest.approx(width**0.5)
    dense.model.rotary_emb.inv_freq.mul_(0.5)
    if start in ("wide", "wide tiles"):  # whose heads grow, so that there are more frequencies
        with pytest.raises(ValueError, match=r"model.rotary_emb.inv_freq was changed by hand to a tensor"):
            twin_of(dense, start)
        return
    sparse = twin_of(dense, start)
    assert torch.equal(sparse.model.rotary_emb.inv_freq, dense.model.rotary_emb.inv_freq)
    if start in EXACT:
        torch.testing.assert_close(logits_of(sparse), logits_of(dense))


# ---- what cannot be taken over


def bias_on_the_head(model: PreTrainedModel) -> None:
    model.lm_head = nn.Linear(32, 100)


def an_adapter(model: PreTrainedModel) -> None:
    mlp_of(model).down = nn.Linear(32, 4)


def another_projection(model: PreTrainedModel) -> None:
    class Scaled(nn.Linear):
        pass

    attention_of(model).o_proj = Scaled(32, 32, bias=False)


def another_forward(model: PreTrainedModel) -> None:
    mlp_of(model).forward = lambda x: x


def a_method(model: PreTrainedModel) -> None:
    model.prepare_inputs_for_generation = lambda *args, **kwargs: {}


def a_hook(model: PreTrainedModel) -> None:
    mlp_of(model).register_forward_hook(lambda module, args, output: output * 2)


def a_hook_on_a_gradient(model: PreTrainedModel) -> None:
    model.lm_head.weight.register_hook(lambda gradient: gradient * 0)


def a_hook_after_accumulation(model: PreTrainedModel) -> None:
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda parameter: None)


def more_positions(model: PreTrainedModel) -> None:
    model.lm_head.weight = nn.Parameter(torch.zeros(103, 32))


def a_module_taken_out(model: PreTrainedModel) -> None:
    del mlp_of(model).act_fn


def layers_taken_out(model: PreTrainedModel) -> None:
    model.model.layers = model.model.layers[:1]


def compiled_in_place(model: PreTrainedModel) -> None:
    model.compile(backend="eager")


def other_ties(model: PreTrainedModel) -> None:
    mlp_of(model, 1).up_proj.weight = mlp_of(model, 0).up_proj.weight


REFUSED: dict[Callable[[PreTrainedModel], None], str] = {
    bias_on_the_head: "the parameter lm_head.bias is not of its config",
    an_adapter: "the parameter model.layers.0.mlp.down.weight is not of its config",
    another_projection: "model.layers.0.self_attn.o_proj is a Scaled where its config has a Linear",
    another_forward: "model.layers.0.mlp.forward was replaced",
    a_method: "prepare_inputs_for_generation was replaced",
    a_hook: r"model.layers.0.mlp has a hook \(a_hook.<locals>.<lambda>\)",
    a_hook_on_a_gradient: "lm_head.weight has a hook",
    a_hook_after_accumulation: "lm_head.weight has a hook",
    more_positions: "lm_head.weight is 103 x 32, by its config 100 x 32",
    a_module_taken_out: "model.layers.0.mlp.act_fn was taken out",
    layers_taken_out: "it has no parameter model.layers.1.self_attn.q_proj.weight; .*, and .* more",
    compiled_in_place: "it was compiled in place",
    other_ties: "layers.0.mlp.up_proj.weight and model.layers.1.mlp.up_proj.weight share weights",
}


@pytest.mark.parametrize("start", ["wide", "parallel tiles"])
@pytest.mark.parametrize("change", REFUSED, ids=[change.__name__ for change in REFUSED])
def test_what_would_be_lost_is_refused_by_name(change: Callable[[PreTrainedModel], None], start: str) -> None:
    dense = dense_model("llama")
    change(dense)
    with pytest.raises(ValueError, match=f"would be lost: .*{REFUSED[change]}"):
        twin_of(dense, start)


class Scaled(nn.Module):
    """An activation with a tensor as wide as the FFN."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("by", torch.full((width,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(x) * self.by


@pytest.mark.parametrize("start", STARTS)
def test_a_module_that_depends_on_widths_is_taken_over_where_they_stay(start: str) -> None:
    dense = dense_model("llama")
    for layer in (0, 1):
        setattr(mlp_of(dense, layer), activation_name(dense), Scaled(dense.config.intermediate_size))
    before = logits_of(dense)
    if any(word in start for word in ("wide", "ffn")):
        with pytest.raises(ValueError, match=r"mlp.act_fn was changed by hand to a Scaled with tensors of its own"):
            twin_of(dense, start)
        return
    sparse = twin_of(dense, start)
    assert isinstance(getattr(mlp_of(sparse, 0), activation_name(sparse)), Scaled)
    assert logits_of(sparse).shape == before.shape


@pytest.mark.parametrize("start", STARTS)
def test_a_setting_that_depends_on_widths_is_taken_over_where_they_stay(start: str) -> None:
    dense = dense_model("llama")
    for layer in dense.model.layers:
        layer.self_attn.scaling = 0.01
    if start not in ("wide", "wide tiles"):  # the others leave attention as wide as it was
        assert attention_of(twin_of(dense, start)).scaling == 0.01
        return
    with pytest.raises(ValueError, match=re.escape("model.layers.0.self_attn.scaling was changed by hand to 0.01")):
        twin_of(dense, start)


# ---- nothing was changed


@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_that_was_used_and_loaded_has_no_changes(arch: str, tmp_path: Path) -> None:
    dense = dense_model(arch)
    dense(input_ids=token_ids(), labels=token_ids(), output_hidden_states=True).loss.backward()
    dense.generate(token_ids(), max_new_tokens=2, pad_token_id=0)
    dense.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    again = to_dense(sparsify(dense, SparseIFTConfig()))
    for model in (dense, loaded, copy.deepcopy(loaded).to(torch.bfloat16), again):
        assert config_of(model) is model.config
        changes = changes_of(model)
        assert not changes.modules
        assert not changes.settings
        assert not changes.buffers


def test_functions_in_place_of_modules_are_told_apart() -> None:
    dense = dense_model("gpt2")
    mlp = mlp_of(dense)
    del mlp.act
    mlp.act = functional.relu
    with pytest.raises(ValueError, match=r"transformer.h.0.mlp.act was taken out"):
        sparsify(dense, SparseIFTConfig())
