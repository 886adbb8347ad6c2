"""Other numbers of words in a model with a sparse embedding: rows keep their budgets, and old words their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseift_llm import SparseTrainingController, load_pretrained, to_dense
from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.ends import MaskedEmbedding, TiedLogits
from sparseift_llm.planning.cost import cost_of
from tests.helpers.models import logits_of
from tests.helpers.residual import STORAGES, residual_model

EMBEDDING = "model.embed_tokens"


@pytest.mark.support("a wider stream: resize_token_embeddings")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("words", [120, 100, 100 + 28])
def test_old_words_stay_and_new_ones_have_as_many_weights(tied: bool, words: int, tmp_path: Path) -> None:
    model = residual_model(tied=tied)
    before = logits_of(model)
    old = {name: layer.current_mask().clone() for name, layer in sparse_layers(model).items()}
    flops = cost_of(model, 8).flops.logit
    torch.manual_seed(0)
    embedding = model.resize_token_embeddings(words)
    assert isinstance(embedding, MaskedEmbedding)
    assert isinstance(model.lm_head, TiedLogits) == tied
    assert model.config.vocab_size == words
    for name in [EMBEDDING] if tied else [EMBEDDING, "lm_head"]:
        layer = sparse_layers(model)[name]
        assert layer.current_mask().sum(1).tolist() == [32] * words
        assert torch.equal(layer.current_mask()[:100], old[name])
        assert not layer.weight[~layer.current_mask()].any()
    # not to the bit: with other sizes, a machine's library may add up the products in another order
    torch.testing.assert_close(logits_of(model)[..., :100], before, rtol=1e-12, atol=1e-12)
    assert cost_of(model, 8).flops.logit == flops * words // 100
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.resize_token_embeddings() is loaded.get_input_embeddings()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "asked", [{"new_num_tokens": 100}, {"new_num_tokens": 99, "pad_to_multiple_of": 4}, {"pad_to_multiple_of": 50}]
)
def test_the_number_that_there_is_changes_nothing(storage: str, asked: dict[str, int]) -> None:
    """As in scripts that call `resize_token_embeddings(len(tokenizer))` whatever they have loaded."""
    model = residual_model(**STORAGES[storage])
    SparseTrainingController(model, torch.optim.AdamW(model.parameters()), total_steps=2)
    record, before, modules = read_record(model.config), logits_of(model), list(model.modules())
    assert model.resize_token_embeddings(**asked) is model.get_input_embeddings()
    assert list(model.modules()) == modules
    assert read_record(model.config) == record
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("embedding", ["sparse", "dense"])
def test_a_model_in_training_is_refused_until_its_controller_is_closed(embedding: str) -> None:
    model = residual_model(embedding=embedding)
    controller = SparseTrainingController(model, torch.optim.AdamW(model.parameters()), total_steps=2)
    with pytest.raises(ValueError, match=r"resize before both are made, or close\(\) the controller"):
        model.resize_token_embeddings(120)
    assert model.config.vocab_size == 100
    controller.close()
    model.resize_token_embeddings(120)
    optimizer = torch.optim.AdamW(model.parameters())
    again = SparseTrainingController(model, optimizer, total_steps=2)
    ids = torch.arange(110, 118)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert again.step == 1


def test_fewer_words() -> None:
    model = residual_model()
    mask = sparse_layers(model)[EMBEDDING].current_mask().clone()
    stock = to_dense(residual_model())
    model.resize_token_embeddings(pad_to_multiple_of=64, new_num_tokens=70)
    assert torch.equal(sparse_layers(model)[EMBEDDING].current_mask()[:100], mask)
    model.resize_token_embeddings(99)
    ids = torch.arange(98)[None]
    torch.testing.assert_close(model(ids).logits, stock(ids).logits[..., :99], rtol=1e-12, atol=1e-12)
    assert torch.equal(sparse_layers(model)[EMBEDDING].current_mask(), mask[:99])


@pytest.mark.parametrize("tied", [True, False])
def test_a_resize_that_transformers_refuses_leaves_the_model_as_it_was(tied: bool, tmp_path: Path) -> None:
    model = residual_model(tied=tied)
    before, layers = logits_of(model), {name: type(layer) for name, layer in sparse_layers(model).items()}
    masks = {name: layer.current_mask().clone() for name, layer in sparse_layers(model).items()}
    with pytest.raises(ValueError, match="not and integer"):
        model.resize_token_embeddings(120, pad_to_multiple_of=8.0)
    assert {name: type(layer) for name, layer in sparse_layers(model).items()} == layers
    assert isinstance(model.lm_head, TiedLogits) == tied
    assert all(torch.equal(layer.current_mask(), masks[name]) for name, layer in sparse_layers(model).items())
    assert torch.equal(logits_of(model), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load_pretrained(tmp_path).eval()), before)


def test_new_words_begin_with_rows_as_long_as_transformers_makes_them() -> None:
    model = residual_model()
    torch.manual_seed(0)
    new = model.resize_token_embeddings(2100, mean_resizing=False).weight.detach()[100:]
    assert float(new.square().mean().sqrt()) == pytest.approx(model.config.initializer_range, rel=0.02)
    assert float(new[new != 0].square().mean().sqrt()) == pytest.approx(2 * model.config.initializer_range, rel=0.02)


def test_a_dense_embedding_is_resized_in_the_record_too(tmp_path: Path) -> None:
    model = residual_model(embedding="dense")
    model.resize_token_embeddings(130)
    ends = [layer for layer in read_record(model.config).layers if layer.layer_index is None]
    assert [layer.dense_shape[0] for layer in ends] == [130, 130]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load_pretrained(tmp_path).eval()), logits_of(model.eval()))


@pytest.mark.support("a wider stream: resize_token_embeddings with tiles at the ends", refused=True, proves=("block",))
def test_words_in_tiles_are_refused() -> None:
    model = residual_model(**STORAGES["tiles"])
    before = logits_of(model)
    with pytest.raises(ValueError, match=r"an embedding in tiles keeps its number of words; resize the dense model"):
        model.resize_token_embeddings(120)
    assert torch.equal(logits_of(model), before)
