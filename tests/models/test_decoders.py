"""Every causal language model of the installed transformers: accepted and right, or refused for a known reason."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, T5Config, ViTConfig, Wav2Vec2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparseift_llm import (
    DSTConfig,
    SparseIFTConfig,
    load_pretrained,
    plan,
    sparsify,
    to_dense,
)
from sparseift_llm.checkpoints.mask_file import digest, masks_of
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.layers.composite import CompositeProjection
from sparseift_llm.models.projections import find_projections
from sparseift_llm.ops.kernels.choice import use_block_kernel
from tests.helpers.decoders import DISTINCT, FFN_FIXED, LATENT, REFUSED, SUPPORTED, decoder, decoder_config
from tests.helpers.models import token_ids, trained
from tests.helpers.pages import ALL_TEXT

ALL_REFUSED = [(name, reason) for reason, names in REFUSED.items() for name in names]
DROP_IN = ("parallel", "factorized", "doped")
LISTED_FOR = "5.23"  # the version of transformers whose model types the lists in decoders.py are
FOUND = "decoders of self-attention and MLP in Linear or Conv1D, found by paths and shapes"
KINDS = {"q", "k", "v", "o", "mlp_in", "mlp_out"}


def installed(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def logits_and_gradients(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    output = model(input_ids=token_ids(), labels=token_ids(), use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), gradients


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


# ---- coverage


def test_every_model_type_is_either_tested_or_refused() -> None:
    listed = [*SUPPORTED, *(name for name, _ in ALL_REFUSED)]
    assert len(listed) == len(set(listed))
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(listed)
    if transformers.__version__.startswith(LISTED_FOR):
        assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == set(listed)
        assert (len(installed(SUPPORTED)), len(installed(DISTINCT))) == (77, 38)
    assert len(installed(SUPPORTED)) >= 60


@pytest.mark.support(
    "experts, encoder-decoders, recurrent, convolutional and multimodal models",
    refused=True,
    proves=("unstructured", "block", "families", "family_tiles"),
)
@pytest.mark.parametrize(("name", "reason"), [pair for pair in ALL_REFUSED if installed(pair[:1])])
def test_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plan(decoder_config(name), SparseIFTConfig(family="parallel"))


@pytest.mark.parametrize("config", [T5Config(), ViTConfig(), Wav2Vec2Config()], ids=lambda config: config.model_type)
def test_what_is_no_causal_language_model_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match=r"is_encoder_decoder=True|has no causal language model in transformers"):
        plan(config, SparseIFTConfig())


def test_a_bidirectional_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="is_decoder=False sees later tokens, too; set is_decoder=True"):
        plan(decoder_config("bert", is_decoder=False), SparseIFTConfig())


# ---- parity


@pytest.mark.parametrize("name", installed(SUPPORTED))
def test_without_sparsity_it_is_the_dense_model(name: str) -> None:
    """Equal logits and gradients; no logit sees a later token; and every projection that was found matters."""
    dtype = torch.float32 if name == "xglm" else torch.float64  # XGLM's attention mask has no float64
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if name == "xglm" else {"rtol": 1e-10, "atol": 1e-13}
    dense = decoder(name, dtype)
    sparse = sparsify(dense, SparseIFTConfig(sparsity=0.0, **({"scope": "ffn"} if name in LATENT else {})))
    assert {kind for p in find_projections(dense) for kind in p.kinds} == KINDS
    expected, gradients = logits_and_gradients(dense)
    found, found_gradients = logits_and_gradients(sparse)
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(found_gradients, gradients, **tolerance)
    assert gradients.keys() >= {f"{p.name}.weight" for p in find_projections(dense)}
    later = token_ids()
    later[:, 6:] = later[:, 6:].flip(1)
    torch.testing.assert_close(logits(sparse, later)[:, :6], expected[:, :6], **tolerance)
    for projection in find_projections(dense)[: len(find_projections(dense)) // 2]:
        faulty = copy.deepcopy(sparse)
        faulty.get_submodule(projection.name).weight.data.mul_(1.5)  # type: ignore[union-attr, operator]
        with pytest.raises(AssertionError):
            torch.testing.assert_close(logits(faulty, token_ids()), expected, **tolerance)


# ---- training


def choices_for(name: str) -> list[dict[str, Any]]:
    choices: list[dict[str, Any]] = [{"family": DROP_IN[DISTINCT.index(name) % 3]}]
    choices += [] if name in FFN_FIXED else [{"scope": "ffn"}]
    return choices + ([] if name in LATENT else [{"scope": "model"}])


CASES = [(name, choice) for name in installed(DISTINCT) for choice in choices_for(name)]


@pytest.mark.support(FOUND, proves=("unstructured", "families"))
@pytest.mark.parametrize(("name", "choice"), CASES, ids=[f"{name}-{next(iter(c.values()))}" for name, c in CASES])
def test_rigl_moves_masks_and_a_saved_model_is_the_same(name: str, choice: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = SparseIFTConfig(**choice, sparsity=0.75, dst=DSTConfig(update_every_steps=1))
    model = sparsify(decoder_config(name), config)
    result = plan(decoder_config(name), config)
    assert result.ratio_linear == 1.0
    before = {layer: mask.clone() for layer, mask in masks_of(model).items()}
    controller, _ = trained(model, 2, lr=1e-3)
    after = masks_of(model)
    assert controller.cost.num_updates == 2
    for layer in before:
        assert int(after[layer].sum()) == int(before[layer].sum())
        assert not torch.equal(after[layer], before[layer]), layer
    model.eval().save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert digest(masks_of(loaded)) == digest(masks_of(model))
    torch.testing.assert_close(logits(loaded.eval(), token_ids()), logits(model, token_ids()), rtol=0, atol=0)
    if choice.get("family"):
        assert any(isinstance(module, CompositeProjection) for module in loaded.modules())
    else:
        assert sparse_layers(loaded).keys() == {layer.name for layer in result.layers if layer.is_sparse}


@pytest.fixture
def reference_kernel() -> Iterator[None]:
    use_block_kernel("reference")
    yield
    use_block_kernel(None)


@pytest.mark.support(FOUND, proves=("block",))
@pytest.mark.parametrize("name", installed(DISTINCT))
def test_tiles(name: str, reference_kernel: None) -> None:
    torch.manual_seed(0)
    scope = "ffn" if name in LATENT else "model"
    config = SparseIFTConfig(scope=scope, structure="block", block_size=8, dst=DSTConfig(update_every_steps=1))
    model = sparsify(decoder_config(name), config)
    assert all(isinstance(layer, BlockSparseLinear) for layer in sparse_layers(model).values())
    before = digest(masks_of(model))
    trained(model, 1, lr=1e-3)
    assert digest(masks_of(model)) != before
    model.eval()
    torch.testing.assert_close(logits(to_dense(model), token_ids()), logits(model, token_ids()), rtol=1e-3, atol=1e-4)


def test_the_pages_say_how_many() -> None:
    assert f"{len(SUPPORTED)} of {len(SUPPORTED) + len(ALL_REFUSED)} model types" in ALL_TEXT
    assert (
        f"{len(SUPPORTED)} of the {len(SUPPORTED) + len(ALL_REFUSED)} model types of transformers {LISTED_FOR}"
        in ALL_TEXT
    )


@pytest.mark.parametrize("name", installed(SUPPORTED))
def test_widened_projections_have_the_widths_asked_for(name: str) -> None:
    """75% doubles every side but those of vocabulary and positions."""
    if name in LATENT:
        with pytest.raises(ValueError, match=r"would have to be .*use scope='ffn', or a family that changes no width"):
            plan(decoder_config(name), SparseIFTConfig())
        return
    for layer in plan(decoder_config(name), SparseIFTConfig()).layers:
        assert layer.sparse_shape == tuple(2 * side for side in layer.dense_shape)


@pytest.mark.parametrize("name", installed(FFN_FIXED))
def test_an_ffn_without_a_config_field_stays(name: str) -> None:
    with pytest.raises(ValueError, match=r"has no config field for the FFN's inner size.*parallel, factorized, doped"):
        plan(decoder_config(name), SparseIFTConfig(scope="ffn"))
