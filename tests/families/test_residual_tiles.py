"""Wide with scope `residual` in tiles, with embedding and logits in tiles or as single weights beside them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparseift_llm import SparseTrainingController, load_pretrained, plan, sparsify, to_dense
from sparseift_llm.api import save_export
from sparseift_llm.layers.base import SparseProjection, sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.layers.block_embedding import BlockSparseEmbedding, BlockSparseLogits, TiedBlockLogits
from sparseift_llm.layers.ends import MaskedEmbedding, TiedLogits
from sparseift_llm.layers.masked import MaskedLinear
from sparseift_llm.layers.tiled import TiledProjection
from sparseift_llm.metrics.throughput import TrainingFlops
from sparseift_llm.models.presets import load_config
from sparseift_llm.ops.tiles import tiles_of
from sparseift_llm.planning.cost import cost_of
from tests.helpers.models import gradients_of, logits_of, tiny_config, tiny_model, token_ids
from tests.helpers.residual import STORAGES, residual, residual_model
from tests.helpers.tiny_runs import differences, final_state, masks, sparse_trainer

HEADS = {("tiles", True): TiedBlockLogits, ("tiles", False): BlockSparseLogits, ("mixed", True): TiedLogits}
in_tiles = pytest.mark.parametrize("storage", ["tiles", "mixed"])
tied_or_not = pytest.mark.parametrize("tied", [True, False])


def part_of_layer(layer: SparseProjection, dense: Tensor) -> Tensor:
    """What a layer keeps of a dense weight's gradient."""
    if not isinstance(layer, TiledProjection):
        return dense * layer.current_mask()
    rows = layer.num_rows * layer.block_size
    padded = torch.cat([dense, dense.new_zeros(rows - len(dense), dense.shape[1])])
    return tiles_of(padded, layer.columns, layer.block_size)


@pytest.mark.support("outputs and gradients, tied and untied", proves=("block",))
@in_tiles
@tied_or_not
@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_it_computes_what_the_stock_model_does(arch: str, tied: bool, storage: str) -> None:
    """100 words in tiles of 8: the last tile has four rows of no word."""
    model = residual_model(arch, tied, **STORAGES[storage])
    assert isinstance(model.lm_head, HEADS.get((storage, tied), MaskedLinear))
    stock = to_dense(model)
    torch.testing.assert_close(logits_of(model), logits_of(stock), rtol=1e-10, atol=1e-12)
    assert logits_of(model).shape[-1] == model.config.vocab_size == 100
    found, expected = gradients_of(model), gradients_of(stock)
    for name, layer in sparse_layers(model).items():
        kept = part_of_layer(layer, expected.pop(f"{name}.weight"))
        torch.testing.assert_close(found.pop(f"{name}.weight"), kept, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert type(stock.lm_head) is torch.nn.Linear
    assert (stock.lm_head.weight is stock.get_input_embeddings().weight) == tied


@in_tiles
@tied_or_not
def test_the_plan_is_what_is_built(storage: str, tied: bool) -> None:
    config = tiny_config("llama", tie_word_embeddings=tied)
    result = plan(config, residual(0.5, **STORAGES[storage]), 32)
    model = sparsify(config, residual(0.5, **STORAGES[storage]))
    assert cost_of(model, 32) == result.sparse
    kinds = {type(layer) for layer in sparse_layers(model).values()}
    ends = {BlockSparseEmbedding} if storage == "tiles" else {MaskedEmbedding}
    ends |= set() if tied else {BlockSparseLogits if storage == "tiles" else MaskedLinear}
    assert kinds == {BlockSparseLinear} | ends
    assert result.ratio_linear == 1.0
    assert result.sparse.flops.logit == pytest.approx(result.dense.flops.logit, abs=64)  # half a tile


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
@pytest.mark.parametrize("size", [None, 16])
@pytest.mark.parametrize("name", ["llama-gpt3-small", "llama-gpt3-medium", "llama-gpt3-large", "llama-gpt3-xl"])
def test_flops_are_the_dense_models_at_every_size(name: str, size: int | None, sparsity: float) -> None:
    """A vocabulary of 50,257 is a multiple of no tile."""
    result = plan(load_config(name), residual(sparsity, structure="block", block_size=size), 1024)
    assert result.config.block_size in ((size,) if size else (64, 128))  # the default is a fast one
    assert result.ratio_linear == pytest.approx(1, abs=1e-4)
    assert result.ratio_whole_model == pytest.approx(1, abs=1e-4)
    assert result.sparse.to_dict()["train_state_bytes"] < 1.02 * result.dense.to_dict()["train_state_bytes"]


@tied_or_not
def test_block_rows_of_words_have_as_many_tiles_to_one(tied: bool) -> None:
    """50 tiles in 13 block-rows: 100 words are a multiple of no tile."""
    model = residual_model(tied=tied, **STORAGES["tiles"])
    for layer in sparse_layers(model).values():
        if layer.role != "projection":
            assert layer.current_mask().sum(1).unique().tolist() == [3, 4]


@pytest.mark.parametrize("storage", STORAGES)
@tied_or_not
@pytest.mark.parametrize("accounting", ["linears", "whole_model"])
def test_nothing_is_left_out_where_the_hidden_size_does_not_grow(storage: str, tied: bool, accounting: str) -> None:
    """The sparse twin as a dense baseline."""
    config = tiny_config("llama", tie_word_embeddings=tied)
    options = {**STORAGES[storage], "embedding_updates": True, "accounting": accounting, "seq_len": 32}
    transformation = residual(0.0, "rigl", **options)
    result = plan(config, transformation)
    assert [layer.sparsity for layer in result.layers if layer.tied_to is None] == [0.0] * (16 - tied)
    assert [math.isnan(layer.sparsity) for layer in result.layers] == [False] * 15 + [tied]
    assert (result.ratio_linear, result.ratio_whole_model) == (1.0, 1.0)
    assert result.sparse.masked_zeros == 0
    model = sparsify(config, transformation)
    assert cost_of(model, 32) == result.sparse
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    controller = SparseTrainingController(model, optimizer, total_steps=12)
    ids = token_ids()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    assert controller.cost.num_updates == 1
    assert cost_of(model, 32) == result.sparse
    assert TrainingFlops(model, 24, 32, controller).total(1) > 24 * result.dense.flops.training


def test_tiles_that_cannot_take_all_flops_of_the_dense_model_say_so() -> None:
    """A hidden size of 126 grows to 128, by less than the 33.47 tiles of its embedding are rounded down."""
    config = tiny_config(
        "llama", hidden_size=126, num_attention_heads=2, num_key_value_heads=2, head_dim=32, intermediate_size=64,
        num_hidden_layers=1, vocab_size=1088, tie_word_embeddings=True,
    )  # fmt: skip
    options: dict[str, Any] = {"structure": "block", "block_size": 64, "accounting": "whole_model", "seq_len": 32}
    message = (
        r"would cost 2,048 FLOP per token less than the dense one.*raise sparsity=0\.01, use a smaller block_size, or "
        "embedding='unstructured'"
    )
    with pytest.raises(ValueError, match=message):
        plan(config, residual(0.01, **options))
    for changed in ({"block_size": 32}, {"embedding": "unstructured"}):
        assert plan(config, residual(0.01, **{**options, **changed})).ratio_whole_model == pytest.approx(1, abs=0.01)


def test_tiles_that_do_not_fit_heads_that_share_keys_are_refused() -> None:
    config = residual(0.5, structure="block", block_size=32)
    with pytest.raises(ValueError, match=r"k_proj is 16 x 64, and 16 is not a multiple of block_size=32"):
        plan(tiny_config("llama", intermediate_size=96), config)
    chosen = plan(tiny_config("llama", intermediate_size=96), residual(0.5, structure="block"))
    assert chosen.config.block_size == 16
    sizes = [
        plan(load_config("llama-gpt3-small"), residual(s, structure="block")).config.block_size for s in (0.5, 0.75)
    ]
    assert sizes == [64, 64]


@pytest.mark.support("a wider stream: mask updates, also at the ends", proves=("block",))
@in_tiles
@pytest.mark.parametrize("algorithm", ["set", "rigl"])
@pytest.mark.parametrize("updates", [True, False])
def test_masks_move_at_the_ends_where_asked(storage: str, algorithm: str, updates: bool) -> None:
    options = {**STORAGES[storage], "embedding_updates": updates}
    model = residual_model(algorithm=algorithm, **options)
    before = masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    SparseTrainingController(model, optimizer, total_steps=12)
    for _ in range(6):
        model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = masks(model)
    for name, layer in sparse_layers(model).items():
        assert torch.equal(before[name].sum(1), after[name].sum(1)) or layer.role == "projection"
        if layer.role != "projection":
            assert torch.equal(before[name], after[name]) != updates
    assert differences(before, after) != []


def check_same(loaded: PreTrainedModel, model: PreTrainedModel) -> None:
    assert torch.equal(logits_of(loaded.eval()), logits_of(model))
    assert differences(masks(loaded), masks(model)) == []
    assert type(loaded.lm_head) is type(model.lm_head)


@pytest.mark.support("a wider stream: saving, loading, exporting", proves=("block",))
@in_tiles
@tied_or_not
@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_saved_exported_and_loaded_it_is_the_same_model(arch: str, storage: str, tied: bool, tmp_path: Path) -> None:
    model = residual_model(arch, tied, **STORAGES[storage])
    model.save_pretrained(tmp_path / "saved")
    save_export(model, tmp_path / "packed", "sparse")
    save_export(model, tmp_path / "stock", "dense")
    for folder in ("saved", "packed"):
        check_same(load_pretrained(tmp_path / folder), model)
    check_same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), model)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    torch.testing.assert_close(logits_of(stock), logits_of(model), rtol=1e-10, atol=1e-12)
    other = residual_model(arch, tied, seed=1, **STORAGES[storage])
    with pytest.raises(AssertionError):
        check_same(other, model)


@pytest.mark.support("a wider stream: resuming bit for bit in a Trainer", proves=("block",))
@in_tiles
def test_a_resumed_run_equals_an_uninterrupted_one(storage: str, tmp_path: Path) -> None:
    def trainer(folder: str, seed: int = 0) -> Any:
        dense = tiny_model("llama", seed=seed, vocab_size=32, tie_word_embeddings=True)
        options = {**STORAGES[storage], "embedding_updates": True, "every": 2, "seed": seed}
        model = sparsify(dense, residual(algorithm="rigl", **options))
        return sparse_trainer(model, tmp_path / folder, steps=6, save_strategy="steps", save_steps=2)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed", seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert differences(final_state(whole), final_state(resumed)) == []
