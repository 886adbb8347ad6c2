"""A tied embedding in tiles inside a model: mask files, metrics, SET and RigL, and resuming."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from sparseift_llm import DSTConfig, SparseIFTConfig, SparseTrainingController, sparsify
from sparseift_llm.checkpoints.mask_file import apply_masks, masks_of, read_masks, save_masks
from sparseift_llm.layers import block_embedding
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.block_embedding import BlockSparseEmbedding, TiedBlockLogits
from sparseift_llm.metrics.mask_history import MaskMetrics
from sparseift_llm.topology.blocks import random_columns
from tests.helpers.models import tiny_config

NAME, VOCABULARY, SIZE, STEPS = "model.embed_tokens", 101, 4, 40  # 26 block-rows, three rows of no token


def tied_model(algorithm: str = "rigl") -> PreTrainedModel:
    torch.manual_seed(0)
    dst = DSTConfig(algorithm, update_every_steps=1)
    config = tiny_config("llama", vocab_size=VOCABULARY, tie_word_embeddings=True)
    model = sparsify(config, SparseIFTConfig(structure="block", block_size=SIZE, dst=dst)).double()
    stock: Any = model.get_input_embeddings()
    columns = random_columns(26, stock.embedding_dim // SIZE, 26 * stock.embedding_dim // (2 * SIZE), 0)
    embedding = BlockSparseEmbedding(stock, columns, SIZE, (VOCABULARY, 32))
    model.set_output_embeddings(TiedBlockLogits(model.get_output_embeddings(), embedding))
    model.set_input_embeddings(embedding)
    return model


def dense_gradient(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The gradient of the tied matrix of a model whose two ends are stock layers, (vocabulary, hidden)."""
    twin = copy.deepcopy(model)
    embedding = twin.get_input_embeddings().to_dense()
    twin.set_output_embeddings(twin.get_output_embeddings().to_dense(embedding))
    twin.set_input_embeddings(embedding)
    assert twin.get_output_embeddings().weight is embedding.weight
    twin.zero_grad()
    twin(input_ids=ids, labels=ids).loss.backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    return gradient


def tile_sums(matrix: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, -len(matrix) % SIZE))
    return torch.stack([torch.stack([t.abs().sum() for t in row.split(SIZE, 1)]) for row in padded.split(SIZE)])


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(5)
    while True:
        yield torch.randint(VOCABULARY, (2, 9), generator=generator)


def test_the_two_ends_are_one_layer_of_the_model() -> None:
    model = tied_model()
    assert NAME in sparse_layers(model)
    assert "lm_head" not in sparse_layers(model)
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len([name for name, _ in model.named_parameters() if "embed" in name or "head" in name]) == 1


def check_growth_scores() -> None:
    """RigL grows by the gradient of the whole tied matrix, of both of its uses."""
    model = tied_model()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    controller = SparseTrainingController(model, optimizer, STEPS)
    seen: list[Any] = []
    controller.listeners.append(
        lambda name, old, new, growth: seen.append((old, new, growth)) if name == NAME else None
    )
    changes = 0
    for step, ids in zip(range(6), batches(), strict=False):
        expected = tile_sums(dense_gradient(model, ids))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        old, new, growth = seen[step]
        torch.testing.assert_close(growth, expected, rtol=1e-9, atol=1e-12)
        assert torch.equal(new, model.get_input_embeddings().current_mask())
        assert torch.equal(old.sum(1), new.sum(1))
        changes += int((old != new).sum())
    assert changes
    assert not model.get_input_embeddings().dense_matrix()[VOCABULARY:].any()


def test_rigl_scores_are_those_of_the_dense_tied_matrix() -> None:
    check_growth_scores()


def test_scores_without_the_look_ups_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_embedding, "capture_lookup_gradient", lambda y, *_: y)
    with pytest.raises(AssertionError):
        check_growth_scores()


@pytest.mark.parametrize("algorithm", ["static", "set", "rigl"])
def test_a_resumed_run_is_the_same_to_the_bit(algorithm: str) -> None:
    ids = [batch for _, batch in zip(range(8), batches(), strict=False)]

    def steps(model: PreTrainedModel, optimizer: AdamW, chosen: list[Tensor]) -> None:
        for batch in chosen:
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()

    whole = tied_model(algorithm)
    optimizer = AdamW(whole.parameters(), lr=1e-2)
    controller = SparseTrainingController(whole, optimizer, STEPS)
    metrics = MaskMetrics(controller)
    steps(whole, optimizer, ids[:4])
    states = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), controller.state_dict()))
    steps(whole, optimizer, ids[4:])
    assert metrics.layers()[NAME].active == whole.get_input_embeddings().count_active()
    assert (metrics.layers()[NAME].grown is not None) == (algorithm != "static")

    resumed = tied_model(algorithm)
    other = AdamW(resumed.parameters(), lr=1e-2)
    second = SparseTrainingController(resumed, other, STEPS)
    resumed.load_state_dict(states[0])
    other.load_state_dict(states[1])
    second.load_state_dict(states[2])
    steps(resumed, other, ids[4:])
    found, expected = resumed.state_dict(), whole.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert second.masks_digest() == controller.masks_digest()


def test_mask_files_have_the_tied_matrix_once(tmp_path: Path) -> None:
    model, other = tied_model(), tied_model()
    layer = model.get_input_embeddings()
    layer.set_mask(layer.current_mask().flip(1))
    save_masks(model, tmp_path)
    masks = read_masks(tmp_path)
    assert masks[NAME].shape == (26, layer.in_features // SIZE)
    assert "lm_head" not in masks
    apply_masks(other, masks, tmp_path)
    assert all(torch.equal(mask, masks_of(model)[name]) for name, mask in masks_of(other).items())
    with pytest.raises(ValueError, match="numbers of tiles per block-row"):
        apply_masks(other, {**masks, NAME: torch.ones_like(masks[NAME])}, tmp_path)
