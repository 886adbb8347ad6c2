"""Block-sparse models on disk and in copies: all of them come back bit for bit, or with an error, never by halves."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparseift_llm import SparseIFTConfig, load_pretrained, sparsify, to_dense
from sparseift_llm.checkpoints.mask_file import MASKS_NAME, digest, masks_of, read_masks
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.layers.block_ffn import BlockFeedForward
from tests.helpers.models import ARCHS, gradients_of, logits_of, shake, tiny_model
from tests.helpers.tiny_runs import differences

SIZE = 8
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
some_architectures = pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "llama"])


def block_model(arch: str = "llama", seed: int = 0, scope: str = "model", **changes: Any) -> PreTrainedModel:
    """At 75%, shaken, and after mask updates: the slots of a row do not hold their tiles in ascending order."""
    torch.manual_seed(seed)
    dense = tiny_model(arch, seed=seed, **changes)
    model = sparsify(dense, SparseIFTConfig(structure="block", block_size=SIZE, scope=scope, seed=seed))
    for layer in sparse_layers(model).values():
        layer.set_mask(layer.current_mask().roll(1, dims=1))
    shake(model)
    return model


def whole_state(model: PreTrainedModel) -> dict[str, Any]:
    """Parameters and buffers, stored or derived, and what each layer knows of itself."""
    layers = {
        name: (layer.num_active, layer.dense_shape, layer.block_size, layer.out_features)
        for name, layer in sparse_layers(model).items()
        if isinstance(layer, BlockSparseLinear)
    }
    fused = [name for name, module in model.named_modules() if isinstance(module, BlockFeedForward)]
    values = {"parameters": dict(model.named_parameters()), "buffers": dict(model.named_buffers())}
    return {**values, "layers": layers, "fused": fused}


def check_equal(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Bit for bit: state, logits, and gradients, which need the derived indices."""
    assert sparse_layers(expected)
    assert not differences(whole_state(expected), whole_state(found))
    assert torch.equal(logits_of(found), logits_of(expected))
    assert not differences(gradients_of(expected), gradients_of(found))


def test_the_models_used_here_have_slots_out_of_order() -> None:
    layer = next(iter(sparse_layers(block_model()).values()))
    assert isinstance(layer, BlockSparseLinear)
    assert bool((layer.columns[0::2] > layer.columns[1::2]).any())


# ---- save_pretrained and load_pretrained


@some_architectures
@pytest.mark.parametrize("shard_size", [None, "40KB"])
def test_a_saved_model_comes_back_bit_for_bit(arch: str, shard_size: str | None, tmp_path: Path) -> None:
    model = block_model(arch)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "first", **({"max_shard_size": shard_size} if shard_size else {}))
    assert (tmp_path / "first" / INDEX).is_file() == bool(shard_size)
    loaded = load_pretrained(tmp_path / "first")
    check_equal(loaded, model)
    assert not loaded.training
    assert loaded.generation_config.max_new_tokens == 7
    assert type(loaded) is type(model)
    model.save_pretrained(tmp_path / "second")
    loaded.save_pretrained(tmp_path / "third")
    for name in (WEIGHTS, MASKS_NAME):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "third" / name).read_bytes()


@pytest.mark.parametrize("arch", ARCHS)
def test_scope_ffn_of_every_architecture(arch: str, tmp_path: Path) -> None:
    model = block_model(arch, scope="ffn")
    model.save_pretrained(tmp_path)
    check_equal(load_pretrained(str(tmp_path)), model)


def test_a_vocabulary_resized_since(tmp_path: Path) -> None:
    """The tiles of accounting="whole_model" were counted with the vocabulary of the dense model."""
    options: dict[str, Any] = {"sparsity": 0.5, "accounting": "whole_model", "seq_len": 8}
    model = sparsify(tiny_model("llama"), SparseIFTConfig(structure="block", block_size=4, **options))
    model.resize_token_embeddings(model.config.vocab_size + 60)
    model.save_pretrained(tmp_path)
    check_equal(load_pretrained(tmp_path), model)
    check_equal(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_only_tiles_are_stored(tmp_path: Path) -> None:
    model = block_model()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert stored.keys() == model.state_dict().keys()
    for name, layer in sparse_layers(model).items():
        assert stored[f"{name}.weight"].shape == (layer.num_active // SIZE**2, SIZE, SIZE)
        assert stored[f"{name}.columns"].dtype == torch.int32
    assert not [name for name in stored if "by_column" in name or "column_starts" in name or "heavy_columns" in name]
    assert not differences(read_masks(tmp_path), masks_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, "auto"])
def test_load_pretrained_in_another_dtype(dtype: Any, tmp_path: Path) -> None:
    model = block_model("gpt2")
    model.save_pretrained(tmp_path)
    check_equal(load_pretrained(tmp_path, dtype=dtype), copy.deepcopy(model).to(None if dtype == "auto" else dtype))


def test_saving_without_shards_over_shards(tmp_path: Path) -> None:
    """transformers would leave the index of the earlier save behind, whose shards are gone."""
    block_model(seed=1).save_pretrained(tmp_path, max_shard_size="40KB")
    model = block_model()
    model.save_pretrained(tmp_path)
    assert {WEIGHTS, INDEX} & {path.name for path in tmp_path.iterdir()} == {WEIGHTS}
    check_equal(load_pretrained(tmp_path), model)
    check_equal(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_saving_in_shards_over_one_file(tmp_path: Path) -> None:
    """transformers would leave the file of the earlier save, and take it for this one's."""
    block_model(seed=1).save_pretrained(tmp_path)
    model = block_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert {WEIGHTS, INDEX} & {path.name for path in tmp_path.iterdir()} == {INDEX}
    check_equal(load_pretrained(tmp_path), model)
    check_equal(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def transposed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A fault: every tile the wrong way round."""
    return {name: value.transpose(1, 2) if value.ndim == 3 else value for name, value in state.items()}


def in_ascending_order(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A fault: slots are taken to be in the order of their columns."""
    return {name: sorted_in_rows(value) if name.endswith("q_proj.columns") else value for name, value in state.items()}


def sorted_in_rows(columns: Tensor) -> Tensor:
    assert len(columns) == 16  # two tiles in each of eight block-rows
    return torch.cat([pair.sort().values for pair in columns.split(2)])


@pytest.mark.parametrize("fault", [transposed, in_ascending_order])
def test_the_check_of_loading_catches_faults(
    fault: Callable[[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path
) -> None:
    model = block_model()
    model.save_pretrained(tmp_path)
    check_equal(load_pretrained(tmp_path), model)
    faulty = {name: value.contiguous() for name, value in fault(load_file(tmp_path / WEIGHTS)).items()}
    save_file(faulty, tmp_path / WEIGHTS, metadata={"format": "pt"})
    loaded = load_pretrained(tmp_path)
    with pytest.raises(AssertionError):
        check_equal(loaded, model)


# ---- stock models


def check_dense(dense: PreTrainedModel, model: PreTrainedModel) -> None:
    torch.testing.assert_close(logits_of(dense), logits_of(model), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("arch", "scope"), [*((arch, "model") for arch in ARCHS), ("gpt2", "ffn"), ("llama", "ffn")])
def test_to_dense_is_a_stock_model_with_the_same_logits(arch: str, scope: str, tmp_path: Path) -> None:
    model = block_model(arch, scope=scope)
    before = copy.deepcopy(whole_state(model))
    dense = to_dense(model)
    check_dense(dense, model)
    stock = AutoModelForCausalLM.from_config(dense.config, dtype=torch.float64)
    assert [(name, type(module)) for name, module in dense.named_modules()] == [
        (name, type(module)) for name, module in stock.named_modules()
    ]
    assert {name: value.shape for name, value in dense.state_dict().items()} == {
        name: value.shape for name, value in stock.state_dict().items()
    }
    for name, layer in sparse_layers(model).items():
        assert int(dense.get_parameter(f"{name}.weight").count_nonzero()) == layer.num_active
    dense.save_pretrained(tmp_path)
    assert not (tmp_path / MASKS_NAME).exists()
    assert "sparse_ift" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits_of(loaded), logits_of(dense))
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.fill_(7.0)
    assert not differences(before, whole_state(model))


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_the_check_of_to_dense_catches_a_moved_tile(arch: str) -> None:
    model = block_model(arch)
    dense = to_dense(model)
    layer = list(sparse_layers(model).values())[-1]
    layer.set_mask(layer.current_mask().roll(1, dims=1))
    with pytest.raises(AssertionError):
        check_dense(dense, model)


# ---- copies in memory, and plain torch files


@some_architectures
def test_deepcopy_is_whole_and_independent(arch: str, tmp_path: Path) -> None:
    model = block_model(arch)
    twin = copy.deepcopy(model)
    check_equal(twin, model)
    before = copy.deepcopy(whole_state(model))
    for layer in sparse_layers(twin).values():
        layer.set_mask(layer.current_mask().roll(1, dims=1))
    shake(twin)
    assert not differences(before, whole_state(model))
    twin.save_pretrained(tmp_path)
    assert digest(read_masks(tmp_path)) == digest(masks_of(twin)) != digest(masks_of(model))
    check_equal(load_pretrained(tmp_path), twin)


@some_architectures
def test_a_pickled_model_comes_back_whole(arch: str, tmp_path: Path) -> None:
    model = block_model(arch)
    twin = pickle.loads(pickle.dumps(model))
    check_equal(twin, model)
    twin.save_pretrained(tmp_path)
    check_equal(load_pretrained(tmp_path), model)
    twin.load_state_dict(block_model(arch, seed=1).state_dict())  # its hooks are still there
    check_equal(twin, block_model(arch, seed=1))


# llama, because assigning unties GPT-2's embeddings
@pytest.mark.parametrize(("arch", "assign"), [("gpt2", False), ("gpt_neox", False), ("llama", False), ("llama", True)])
def test_a_state_dict_restores_everything(arch: str, assign: bool) -> None:
    """Into a model of other tiles: everything is replaced, the derived indices, too."""
    model, other = block_model(arch), block_model(arch, seed=1)
    assert differences(masks_of(model), masks_of(other))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    check_equal(other, model)


def test_the_check_of_the_state_dict_catches_stale_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = block_model(), block_model(seed=1)
    monkeypatch.setattr(BlockSparseLinear, "_index_columns", lambda self: None)
    other.load_state_dict(model.state_dict())
    with pytest.raises(AssertionError):
        check_equal(other, model)
    assert torch.equal(logits_of(other), logits_of(model))  # the forward pass alone would not show it
    assert differences(gradients_of(other), gradients_of(model))


def test_a_state_dict_of_another_number_of_tiles_is_refused() -> None:
    torch.manual_seed(0)
    other = sparsify(tiny_model("llama"), SparseIFTConfig(structure="block", block_size=SIZE, distribution="erk"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(block_model().state_dict())


def test_a_stock_state_dict_is_refused() -> None:
    model = block_model()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(to_dense(model).state_dict(), strict=False)
