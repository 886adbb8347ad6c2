"""`sparsify` and `to_dense` on every architecture: parity with the dense model, exact zeros, stock checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparseift_llm import DSTConfig, SparseIFTConfig, load_pretrained, plan, sparsify, to_dense
from sparseift_llm.checkpoints.mask_file import MASKS_NAME, digest, masks_of
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.masked import MaskedProjection
from sparseift_llm.ops.kernels.choice import use_block_kernel
from sparseift_llm.ops.kernels.reference import REFERENCE
from tests.helpers.models import ARCHS, gradients_of, logits_of, shake, stored_part, tiny_config, tiny_model

INITS = ("paper", "preserve", "supar")
STORAGES: dict[str, dict[str, Any]] = {"unstructured": {}, "block": {"structure": "block", "block_size": 8}}
every_structure = pytest.mark.parametrize("structure", STORAGES)
BOTH_SCOPES = [*((arch, "model") for arch in ARCHS), ("gpt2", "ffn"), ("llama", "ffn")]


def check_same_function(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Equal logits and equal gradients of every parameter."""
    torch.testing.assert_close(logits_of(model), logits_of(expected), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients_of(model), gradients_of(expected), rtol=1e-10, atol=1e-14)


def check_masked_gradients(sparse: PreTrainedModel) -> None:
    """Against autograd through the stock model: the same gradients, but exactly 0, or not there, where masks are."""
    gradients, reference = gradients_of(sparse), gradients_of(to_dense(sparse))
    for name, layer in sparse_layers(sparse).items():
        if isinstance(layer, MaskedProjection):
            inactive = gradients[f"{name}.weight"][~layer.mask]
            assert torch.equal(inactive, torch.zeros_like(inactive)), name
        assert torch.count_nonzero(gradients[f"{name}.weight"]) > layer.num_active // 2, name
        reference[f"{name}.weight"] = stored_part(layer, reference[f"{name}.weight"])
    torch.testing.assert_close(gradients, reference, rtol=1e-10, atol=1e-14)


def sparse_model(arch: str, **changes: Any) -> PreTrainedModel:
    """At 75%, shaken so that gradients reach everything."""
    torch.manual_seed(1)
    model = sparsify(tiny_model(arch), SparseIFTConfig(**changes))
    shake(model)
    return model


def masks_digest(model: PreTrainedModel) -> str:
    return digest(masks_of(model))


# ---- without sparsity


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("arch", ARCHS)
def test_at_sparsity_zero_it_is_the_dense_model(arch: str, init: str) -> None:
    dense = tiny_model(arch)
    sparse = sparsify(dense, SparseIFTConfig(sparsity=0.0, init=init))
    assert sparse_layers(sparse)
    check_same_function(sparse, dense)


@pytest.mark.parametrize("arch", ARCHS)
def test_with_every_tile_active_it_is_the_dense_model(arch: str) -> None:
    dense = tiny_model(arch)
    sparse = sparsify(dense, SparseIFTConfig(sparsity=0.0, **STORAGES["block"]))
    assert all(bool(layer.current_mask().all()) for layer in sparse_layers(sparse).values())
    torch.testing.assert_close(logits_of(sparse), logits_of(dense), rtol=1e-10, atol=1e-12)
    gradients, expected = gradients_of(sparse), gradients_of(dense)
    for name, layer in sparse_layers(sparse).items():
        expected[f"{name}.weight"] = stored_part(layer, expected[f"{name}.weight"])
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("arch", ARCHS)
def test_planted_faults_break_the_parity(arch: str) -> None:
    dense = tiny_model(arch)
    for fault in ("mask", "weight"):
        sparse = sparsify(dense, SparseIFTConfig(sparsity=0.0))
        layer = list(sparse_layers(sparse).values())[-1]
        with torch.no_grad():
            (layer.mask if fault == "mask" else layer.weight).view(-1)[3] = 0
        with pytest.raises(AssertionError):
            check_same_function(sparse, dense)


# ---- with sparsity


@every_structure
@pytest.mark.parametrize(("arch", "scope"), BOTH_SCOPES)
def test_exact_zeros_planned_counts_and_masked_gradients(arch: str, scope: str, structure: str) -> None:
    sparse = sparse_model(arch, scope=scope, sparsity=0.75, **STORAGES[structure])
    config = SparseIFTConfig(scope=scope, **STORAGES[structure])
    planned = {layer.name: layer for layer in plan(tiny_config(arch), config).layers}
    layers = sparse_layers(sparse)
    assert layers.keys() == {name for name, layer in planned.items() if layer.is_sparse}
    for name, layer in layers.items():
        assert layer.count_active() == layer.num_active == planned[name].num_active, name
        assert torch.count_nonzero(layer.weight) == layer.num_active, name
        if isinstance(layer, MaskedProjection):
            assert not layer.weight[~layer.mask].signbit().any(), name
        assert layer.dense_shape == planned[name].dense_shape, name
    check_masked_gradients(sparse)


def test_planted_fault_one_mask_bit() -> None:
    sparse = sparse_model("llama")
    layer = next(iter(sparse_layers(sparse).values()))
    row, column = layer.mask.nonzero()[0].tolist()
    reference = gradients_of(sparse)
    layer.mask[row, column] = False
    gradients = gradients_of(sparse)
    changed = [name for name in gradients if not torch.equal(gradients[name], reference[name])]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]


def test_planted_fault_gradients_without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = sparse_model("llama")
    monkeypatch.setattr(MaskedProjection, "_masked_weight", lambda layer: layer.weight)
    with pytest.raises(AssertionError):
        check_masked_gradients(sparse)


def test_planted_fault_gradients_of_other_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = sparse_model("llama", **STORAGES["block"])
    weight_gradient = REFERENCE.weight_gradient
    monkeypatch.setattr(REFERENCE, "weight_gradient", lambda *operands: weight_gradient(*operands).roll(1, 0))
    use_block_kernel("reference")
    try:
        with pytest.raises(AssertionError):
            check_masked_gradients(sparse)
    finally:
        use_block_kernel(None)


def test_gradual_pruning_starts_with_every_weight_active() -> None:
    sparse = sparse_model("llama", dst=DSTConfig(algorithm="gmp"))
    for layer in sparse_layers(sparse).values():
        assert bool(layer.current_mask().all())
        assert layer.num_active < layer.num_weights


def test_the_argument_is_not_changed() -> None:
    config = tiny_config("gemma")
    before = config.to_dict()
    sparsify(config, SparseIFTConfig())
    assert config.to_dict() == before
    dense = tiny_model("gemma")
    before, weights = dense.config.to_dict(), copy.deepcopy(dense.state_dict())
    sparse = sparsify(dense, SparseIFTConfig(sparsity=0.0))
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.fill_(7.0)
    assert dense.config.to_dict() == before
    assert not sparse_layers(dense)
    for name, value in dense.state_dict().items():
        assert torch.equal(value, weights[name]), name


@every_structure
@pytest.mark.parametrize("arch", ARCHS)
def test_unchanged_parameters_keep_their_values(arch: str, structure: str) -> None:
    """Scope `ffn`: all but the FFN matrices and their inner bias."""
    dense = tiny_model(arch)
    sparse = sparsify(dense, SparseIFTConfig(scope="ffn", **STORAGES[structure]))
    widened = {name for name, value in dense.named_parameters() if sparse.get_parameter(name).shape != value.shape}
    inner = {f"{name}.weight" for name in sparse_layers(sparse)}
    assert inner <= widened
    assert all(name.endswith("bias") for name in widened - inner)
    for name, value in dense.named_parameters():
        if name not in widened:
            assert torch.equal(sparse.get_parameter(name), value), name


@every_structure
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_and_mode_are_those_of_the_model(dtype: torch.dtype, structure: str) -> None:
    for training in (True, False):
        config = SparseIFTConfig(**STORAGES[structure])
        sparse = sparsify(tiny_model("llama", dtype=dtype).train(training), config)
        assert {parameter.dtype for parameter in sparse.parameters()} == {dtype}
        assert {module.training for module in sparse.modules()} == {training}


# ---- seeds


@every_structure
def test_masks_depend_on_the_seed_alone(structure: str) -> None:
    five, six = (SparseIFTConfig(seed=seed, **STORAGES[structure]) for seed in (5, 6))
    torch.manual_seed(0)
    reference = sparsify(tiny_model("llama"), five)
    torch.manual_seed(1)
    assert masks_digest(sparsify(tiny_config("llama"), five)) == masks_digest(reference)
    assert masks_digest(sparsify(tiny_config("llama"), six)) != masks_digest(reference)
    layers = [layer for layer in sparse_layers(reference).values() if layer.dense_shape == (32, 32)]
    first, *others = [layer.current_mask() for layer in layers]
    assert others
    assert not any(torch.equal(first, other) for other in others)  # each layer has a mask of its own


@every_structure
def test_weights_depend_on_the_global_seed(structure: str) -> None:
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(sparsify(tiny_config("gpt2"), SparseIFTConfig(**STORAGES[structure])))
    assert torch.equal(logits_of(models[0]), logits_of(models[1]))
    assert not torch.equal(logits_of(models[0]), logits_of(models[2]))


def test_meta_device_allocates_nothing() -> None:
    with torch.device("meta"):
        sparse = sparsify(tiny_config("llama"), SparseIFTConfig())
        of_model = sparsify(AutoModelForCausalLM.from_config(tiny_config("llama")), SparseIFTConfig())
    for model in (sparse, of_model):
        assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert len(sparse_layers(model)) == 14
        assert "sparsity=0.75" in repr(model)


# ---- back to dense, and checkpoints


@pytest.mark.parametrize("arch", ARCHS)
def test_to_dense_is_a_stock_model_with_the_same_logits(arch: str) -> None:
    sparse = sparse_model(arch)
    before = copy.deepcopy(sparse.state_dict())
    dense = to_dense(sparse)
    assert torch.equal(logits_of(dense), logits_of(sparse))
    assert type(dense) is type(AutoModelForCausalLM.from_config(tiny_config(arch)))
    assert not sparse_layers(dense)
    for name in sparse_layers(sparse):
        assert type(dense.get_submodule(name)) in (nn.Linear, Conv1D)
    assert getattr(dense.config, "sparse_ift", None) is None
    assert sparse.config.sparse_ift
    assert dense.state_dict().keys() == before.keys()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.fill_(7.0)
    for name, value in sparse.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_to_dense_of_a_dense_model() -> None:
    dense = to_dense(sparse_model("llama"))
    with pytest.raises(ValueError, match="no sparse layers"):
        to_dense(dense)


def test_a_dense_copy_saves_no_masks_and_can_be_made_sparse_again(tmp_path: Path) -> None:
    dense = to_dense(sparse_model("llama"))
    dense.save_pretrained(tmp_path)
    assert not (tmp_path / MASKS_NAME).exists()
    assert "sparse_ift" not in (tmp_path / "config.json").read_text()
    assert len(sparse_layers(sparsify(dense, SparseIFTConfig(scope="ffn")))) == 6


@pytest.mark.parametrize(("arch", "scope"), BOTH_SCOPES)
def test_a_saved_model_loads_as_a_stock_model_and_with_its_masks(arch: str, scope: str, tmp_path: Path) -> None:
    sparse = sparse_model(arch, scope=scope)
    layer = next(iter(sparse_layers(sparse).values()))
    with torch.no_grad():
        layer.weight.masked_fill_(layer.weight > 0.1, 0)  # active weights at 0, as just after growth
    sparse.save_pretrained(tmp_path)
    assert (tmp_path / MASKS_NAME).is_file()

    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert not sparse_layers(stock)
    assert torch.equal(logits_of(stock), logits_of(sparse))

    restored = load_pretrained(tmp_path, dtype=torch.float64)
    assert masks_digest(restored) == masks_digest(sparse)
    assert torch.equal(logits_of(restored), logits_of(sparse))
    expected: dict[str, Tensor] = gradients_of(sparse)
    for name, gradient in gradients_of(restored).items():
        assert torch.equal(gradient, expected[name]), name
    for name, layer in sparse_layers(restored).items():
        original = sparse_layers(sparse)[name]
        assert (layer.num_active, layer.dense_shape) == (original.num_active, original.dense_shape)
