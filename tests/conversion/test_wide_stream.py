"""`init="pretrained"` with scope `residual`: a dense model inside of one with a wider stream."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from sparseift_llm import DSTConfig, SparseIFTConfig, load_pretrained, sparsify
from sparseift_llm.config.families import Wide
from sparseift_llm.conversion import wide_stream
from sparseift_llm.conversion.wide_stream import _Widening
from sparseift_llm.families.trained_start import NEW_UNIT_SHARE
from sparseift_llm.layers.base import SparseProjection, sparse_layers
from sparseift_llm.layers.tiled import TiledProjection
from sparseift_llm.models.stream import stream_norms
from sparseift_llm.planning.planner import plan
from tests.families.test_residual import ACCEPTED
from tests.helpers.decoders import decoder
from tests.helpers.models import gradients_of, logits_of, tiny_model, token_ids

WIDTH = 32  # of the dense stream in all tiny models


def widened(dense: PreTrainedModel, sparsity: float = 0.75, **options: Any) -> PreTrainedModel:
    family = {key: options.pop(key) for key in ("reserve", "embedding") if key in options}
    config = SparseIFTConfig(family=Wide("residual", **family), sparsity=sparsity, init="pretrained", **options)
    torch.manual_seed(1)
    return sparsify(dense, config)


def difference(first: PreTrainedModel, second: PreTrainedModel) -> float:
    """Of logits, as a share of the largest."""
    a, b = logits_of(first), logits_of(second)
    return float((a - b).abs().max() / a.abs().max())


# ---- equal logits


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "granite", "glm4"])
def test_without_a_reserve_the_logits_are_the_dense_ones(arch: str, tied: bool, sparsity: float) -> None:
    """The norms of these models take float32. Factors of 2 change no bit, the root of 2 does."""
    dense = decoder(arch, tie_word_embeddings=tied)
    found = difference(dense, widened(dense, sparsity, reserve=0.0))
    assert found <= (0 if sparsity == 0.75 and "gemma" not in arch else 1e-6)


@pytest.mark.parametrize("arch", ACCEPTED)
def test_every_model_type_with_a_head_of_its_own(arch: str) -> None:
    dense = decoder(arch, tie_word_embeddings=False)
    assert difference(dense, widened(dense, reserve=0.0)) < 1e-6


@pytest.mark.parametrize("arch", ["phi", "nemotron", "starcoder2", "jais2"])
def test_layer_norms_in_float64_get_centred_writers(arch: str) -> None:
    dense = decoder(arch, tie_word_embeddings=False)
    sparse = widened(dense, reserve=0.0)
    assert difference(dense, sparse) < 1e-13
    with torch.no_grad():
        stream = sparse.get_input_embeddings()(token_ids())
    assert stream[..., :WIDTH].mean(-1).abs().max() < 1e-12
    assert dense.get_input_embeddings()(token_ids()).mean(-1).abs().max() > 1e-3


def test_float32_and_bfloat16() -> None:
    dense = tiny_model("llama", torch.float32)
    assert difference(dense, widened(dense, 0.5, reserve=0.0)) < 1e-5
    half = tiny_model("llama", torch.bfloat16)
    assert difference(half, widened(half, reserve=0.0)) == 0


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("cohere", "input_layernorm subtracts the mean, and its embedding, .* is its output head, too"),
        ("starcoder2", "subtracts the mean"),
        ("nanochat", "no norm with a weight stands before its output head, which is its embedding"),
    ],
)
def test_tied_heads_that_cannot_be_scaled_are_refused(arch: str, reason: str) -> None:
    dense = decoder(arch, tie_word_embeddings=True)
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(ValueError, match=f"{reason}.*use init='preserve'"):
        widened(dense)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def unscaled(self: _Widening, source: Tensor, target: Any) -> None:
    """A fault: writers keep their size."""
    target.zero_()
    target[:WIDTH] = source


@pytest.mark.parametrize(
    ("arch", "name", "fault"),
    [("gemma", "norm_offset", lambda norm: 0.0), ("phi", "subtracts_mean", lambda norm, width: False)],
)
def test_what_is_wrong_shows_in_the_logits(arch: str, name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_stream, name, fault)
    with pytest.raises(ValueError, match=r"its logits would change by .*depends on the hidden size"):
        widened(decoder(arch, tie_word_embeddings=False))


def test_writers_of_the_wrong_size_show_in_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Widening, "_write", unscaled)
    with pytest.raises(ValueError, match="its logits would change by"):
        widened(tiny_model("llama"))


# ---- which norm does what


@pytest.mark.parametrize(
    ("arch", "reading", "writing", "without"),
    [
        ("llama", {"input_layernorm", "post_attention_layernorm"}, set(), set()),
        ("gemma2", {"input_layernorm", "pre_feedforward_layernorm"},
         {"post_attention_layernorm", "post_feedforward_layernorm"}, set()),
        ("olmo2", set(), {"post_attention_layernorm", "post_feedforward_layernorm"},
         {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}),
        ("phi", {"input_layernorm"}, set(), set()),
    ],
)  # fmt: skip
def test_norms_are_told_apart(arch: str, reading: set[str], writing: set[str], without: set[str]) -> None:
    """Norms of queries and keys are none of the stream's."""
    dense = decoder(arch)
    layers = plan(dense.config, SparseIFTConfig(family=Wide("residual"))).layers[1:]  # the first is the embedding
    readers = [x.name for x in layers if x.sparse_shape[1] != x.dense_shape[1]]
    writers = [x.name for x in layers if x.sparse_shape[0] != x.dense_shape[0]]
    norms = stream_norms(dense, [*readers, *(["lm_head"] if "lm_head" not in readers else [])], writers)
    of_layer = [name.rpartition(".")[2] for name in norms.reading if ".layers.0." in name]
    assert set(of_layer) == reading
    assert {name.rpartition(".")[2] for name in norms.writing} == writing
    assert {name.rpartition(".")[2] for name in norms.without_norm} == without
    assert [feeds for feeds in norms.reading.values() if "lm_head" in feeds] == [("lm_head",)]


# ---- the reserve


def old_and_new(model: PreTrainedModel, layer: SparseProjection, name: str) -> tuple[Tensor, Tensor, bool]:
    """Masks of the layer's old and new part, and whether its outputs are the stream's channels."""
    mask = layer.current_mask()
    if name.endswith(("o_proj", "down_proj")):
        return mask[:WIDTH], mask[WIDTH:], True
    return mask[:, :WIDTH], mask[:, WIDTH:], False


@pytest.mark.parametrize("reserve", [0.0, NEW_UNIT_SHARE, 0.3])
@pytest.mark.parametrize("tied", [True, False])
def test_new_channels_get_their_share(reserve: float, tied: bool) -> None:
    dense = tiny_model("llama", tie_word_embeddings=tied)
    model = widened(dense, reserve=reserve)
    for name, layer in sparse_layers(model).items():
        old, new, is_writer = old_and_new(model, layer, name)
        assert int(old.sum()) + int(new.sum()) == layer.num_active == dense.get_submodule(name).weight.numel()
        if name in ("model.embed_tokens", "lm_head"):
            assert set(new.sum(1).tolist()) == {round(reserve * WIDTH)}
            assert set(layer.current_mask().sum(1).tolist()) == {WIDTH}
        else:
            assert int(new.sum()) == round(reserve * layer.num_active)
            per_channel = new.sum(1 if is_writer else 0)
            assert per_channel.max() - per_channel.min() <= 1
        weight = layer.weight.detach()
        assert not weight[~layer.current_mask()].any()
        values = weight[WIDTH:] if is_writer else weight[:, WIDTH:]
        is_zero = is_writer or name == "model.embed_tokens"
        assert bool(values[new].any()) == (bool(reserve) and not is_zero)


def test_the_smallest_weights_make_room() -> None:
    dense = tiny_model("llama")
    layer: Any = sparse_layers(widened(dense))["model.layers.1.mlp.down_proj"]
    weight: Any = dense.get_submodule("model.layers.1.mlp.down_proj").weight.detach()
    kept = layer.mask[:WIDTH]
    assert weight[kept].abs().min() > weight[~kept].abs().max()
    torch.testing.assert_close(layer.weight.detach()[:WIDTH][kept], 2 * weight[kept])


def test_the_default_jump_is_small_and_new_channels_learn() -> None:
    dense = tiny_model("llama")
    model = widened(dense)
    ids = token_ids()
    with torch.no_grad():
        losses = [float(m(input_ids=ids, labels=ids).loss) for m in (dense, model)]
    assert 0 < abs(losses[1] - losses[0]) < 0.1
    gradients = gradients_of(model)
    assert gradients["model.layers.0.self_attn.o_proj.weight"][WIDTH:].any()
    assert gradients["model.embed_tokens.weight"][:, WIDTH:].any()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    found: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
    model(input_ids=ids)
    handle.remove()
    assert (found[0][..., WIDTH:].abs().amax((0, 1)) > 0).all()


# ---- with what else there is


def test_balanced_heads_keep_equal_numbers() -> None:
    model = widened(tiny_model("llama"), balance_heads=True)
    for name, layer in sparse_layers(model).items():
        counts = layer.groups.count(layer.current_mask())
        assert counts.max() - counts.min() <= 1, name
        kind = name.rpartition(".")[2]
        assert len(counts) == {"q_proj": 4, "k_proj": 2, "o_proj": 4, "up_proj": 1}.get(kind, len(counts))


def test_a_dense_embedding() -> None:
    dense = tiny_model("llama")
    wide = widened(dense, 0.5, reserve=0.0, embedding="dense")
    assert difference(dense, wide) < 1e-6
    assert "model.embed_tokens" not in sparse_layers(wide)


@pytest.mark.parametrize("algorithm", ["gmp", "granet"])
def test_gradual_pruning_starts_with_all_weights(algorithm: Any) -> None:
    dense = tiny_model("llama")
    model = widened(dense, dst=DSTConfig(algorithm), reserve=0.0)
    assert difference(dense, model) == 0
    for name, layer in sparse_layers(model).items():
        assert bool(layer.current_mask().all()) == (name not in ("model.embed_tokens", "lm_head"))


def test_biases_and_what_is_frozen() -> None:
    dense = decoder("phi", tie_word_embeddings=False)
    frozen: Any = dense.get_submodule("model.layers.0.mlp.fc2")
    frozen.requires_grad_(False)
    model = widened(dense, reserve=0.0)
    layer: Any = model.get_submodule("model.layers.0.mlp.fc2")
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    torch.testing.assert_close(layer.bias[:WIDTH], 2 * (frozen.bias - frozen.bias.mean()))
    assert not layer.bias[WIDTH:].any()
    assert torch.equal(model.lm_head.bias, dense.lm_head.bias)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = widened(tiny_model("qwen3"))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load_pretrained(tmp_path, dtype=torch.float64)), logits_of(model))


def test_tiles_keep_the_largest_of_every_block_row() -> None:
    """A block-row of what writes to the stream holds a quarter of the trained tiles, so that logits change."""
    dense = tiny_model("llama", intermediate_size=64)
    model = widened(dense, structure="block", block_size=8)
    tiled = {name: layer for name, layer in sparse_layers(model).items() if ".layers." in name}
    assert all(isinstance(layer, TiledProjection) for layer in tiled.values())
    for name, layer in tiled.items():
        assert isinstance(layer, TiledProjection)
        matrix = layer.dense_matrix()
        trained: Any = dense.get_submodule(name).weight.detach()
        if name.endswith(("o_proj", "down_proj")):
            kept = matrix[:WIDTH] != 0
            torch.testing.assert_close(matrix[:WIDTH][kept], 2 * trained[kept])
            assert not matrix[WIDTH:].any()
            norms = trained.view(WIDTH // 8, 8, -1, 8).abs().sum((1, 3))
            mask = layer.current_mask()[: WIDTH // 8]
            assert all(norms[row][mask[row]].min() > norms[row][~mask[row]].max() for row in range(WIDTH // 8))
        else:
            kept = matrix[:, :WIDTH] != 0
            torch.testing.assert_close(matrix[:, :WIDTH][kept], trained[kept])
            assert matrix[:, WIDTH:].any()
    assert math.isfinite(difference(dense, model))


@pytest.mark.parametrize("tied", [True, False])
def test_tiled_ends_hold_the_trained_words(tied: bool) -> None:
    """The vocabulary ends inside of a tile. Every block-row of words keeps some trained tiles, and gets a new one."""
    vocabulary = 67
    dense = tiny_model("llama", intermediate_size=64, vocab_size=vocabulary, tie_word_embeddings=tied)
    model = widened(dense, structure="block", block_size=8)
    for name, factor in (("model.embed_tokens", 2), ("lm_head", 2 if tied else 1)):
        layer: Any = sparse_layers(model)["model.embed_tokens" if tied else name]
        matrix, mask = layer.dense_matrix()[:vocabulary], layer.current_mask()
        trained: Any = dense.get_submodule(name).weight.detach()
        kept = matrix[:, :WIDTH] != 0
        torch.testing.assert_close(matrix[:, :WIDTH][kept], factor * trained[kept])
        assert torch.equal(kept, mask.repeat_interleave(8, 0).repeat_interleave(8, 1)[:vocabulary, :WIDTH])
        assert mask[:, WIDTH // 8 :].any(1).all()
        assert mask[:, : WIDTH // 8].any(1).all()
        assert matrix[:, WIDTH:].any() == (name == "lm_head" and not tied)


def test_options_that_would_have_no_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reserve=0.2 is for init='pretrained', not for init='preserve'"):
        SparseIFTConfig(family=Wide("residual", reserve=0.2), init="preserve")
    with pytest.raises(ValueError, match=r"reserve"):
        SparseIFTConfig(family=Wide("residual", reserve=1.0), init="pretrained")
    with pytest.raises(ValueError, match=r"cannot widen heads.*scope='ffn' or 'residual'"):
        SparseIFTConfig(family=Wide("model"), init="pretrained")


def test_a_parameter_without_a_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Widening, "widen_norm", lambda self, name: None)
    with pytest.raises(ValueError, match=r"knows no start for model\.layers\.0\.input_layernorm\.weight of shape"):
        widened(tiny_model("llama"))
