"""`balance_heads`: every attention head keeps as many active weights, at the start and through SET and RigL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparseift_llm import DSTConfig, SparseIFTConfig, load_pretrained, plan, sparsify
from sparseift_llm.checkpoints.mask_file import digest, masks_of
from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.layers.base import SparseProjection, sparse_layers
from sparseift_llm.layers.block import BlockSparseLinear
from sparseift_llm.layers.masked import MaskedProjection
from sparseift_llm.topology.groups import WholeMatrix
from tests.helpers.decoders import decoder_config
from tests.helpers.models import trained

# what a layer's outputs are made of, in heads: gpt2 and gpt_neox fuse q, k, v; falcon shares one k and v among 4 heads;
# phi3 has 4 of q, 2 of k, 2 of v in one matrix; llama has them apart
HEADS = {
    "gpt2": {"qkv": 12, "o": 4},
    "gpt_neox": {"qkv": 12, "o": 4},
    "falcon": {"qkv": 6, "o": 4},
    "phi3": {"qkv": 8, "o": 4},
    "opt": {"q": 4, "k": 4, "v": 4, "o": 4},
    "llama": {"q": 4, "k": 2, "v": 2, "o": 4},
}


def counts_per_head(layer: SparseProjection, kind: str, num_heads: int) -> Tensor:
    """Active weights of each head, from the dense matrix (out, in) that the mask stands for."""
    if isinstance(layer, BlockSparseLinear):
        size = layer.block_size
        matrix = layer.current_mask().repeat_interleave(size, 0).repeat_interleave(size, 1)
    else:
        matrix = layer.mask.T if hasattr(layer, "nf") else layer.mask
    sides = matrix.T if kind == "o" else matrix
    return sides.reshape(num_heads, -1).sum(1)


def check_balance(model: PreTrainedModel, name: str, unit: int = 1, kinds: str = "qkvo") -> None:
    layers, found = sparse_layers(model), set()
    for layer in read_record(model.config).layers:
        if layer.kind in HEADS[name] and layer.kind in kinds:
            counts = counts_per_head(layers[layer.name], layer.kind, HEADS[name][layer.kind])
            assert int(counts.sum()) == layer.num_active
            assert int(counts.max() - counts.min()) <= unit, (layer.name, counts)
            found.add(layer.kind)
    assert found == {kind for kind in HEADS[name] if kind in kinds}


def balanced(
    name: str, algorithm: str = "rigl", sizes: dict[str, Any] | None = None, **options: Any
) -> PreTrainedModel:
    torch.manual_seed(0)
    config = SparseIFTConfig(
        **{"balance_heads": True, **options}, dst=DSTConfig(algorithm=algorithm, update_every_steps=1)
    )
    return sparsify(decoder_config(name, **(sizes or {})), config)


def train(model: PreTrainedModel, num_steps: int = 3) -> None:
    controller, _ = trained(model, num_steps)
    assert controller.cost.num_updates == num_steps


@pytest.mark.support("balance_heads")
@pytest.mark.parametrize("algorithm", ["set", "rigl"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_are_balanced_at_the_start_and_after_updates(name: str, algorithm: str) -> None:
    model = balanced(name, algorithm)
    check_balance(model, name)
    before = digest(masks_of(model))
    train(model)
    check_balance(model, name)
    assert digest(masks_of(model)) != before


@pytest.mark.parametrize("name", HEADS)
def test_without_it_they_are_not(name: str) -> None:
    with pytest.raises(AssertionError):
        check_balance(balanced(name, balance_heads=False), name)


def test_planted_fault_an_update_over_the_whole_matrix() -> None:
    model = balanced("llama")
    for layer in sparse_layers(model).values():
        assert isinstance(layer, MaskedProjection)
        layer._groups = WholeMatrix()
    train(model)
    with pytest.raises(AssertionError):
        check_balance(model, "llama")


def test_the_rest_of_the_model_is_as_without_it() -> None:
    with_it, without = balanced("llama"), balanced("llama", balance_heads=False)
    for name, layer in sparse_layers(with_it).items():
        same = torch.equal(layer.current_mask(), sparse_layers(without)[name].current_mask())
        assert same == ("mlp" in name)
    assert plan(decoder_config("llama"), SparseIFTConfig(balance_heads=True)).ratio_linear == 1.0


def test_it_is_the_default_nowhere() -> None:
    assert not SparseIFTConfig().balance_heads
    layers = plan(decoder_config("llama"), SparseIFTConfig()).layers
    assert all(matrix.heads is None for layer in layers for matrix in layer.matrices)


def test_a_loaded_model_goes_on_balanced(tmp_path: Path) -> None:
    model = balanced("gpt2")
    train(model, 1)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert digest(masks_of(loaded)) == digest(masks_of(model))
    train(loaded)
    check_balance(loaded, "gpt2")


def test_only_what_is_targeted() -> None:
    model = balanced("llama", exclude=("k", "v", "o"), accounting="whole_model", seq_len=8, sparsity=0.5)
    assert {name.rpartition(".")[2] for name in sparse_layers(model)} == {"q_proj", "gate_proj", "up_proj", "down_proj"}
    check_balance(model, "llama", kinds="q")


# ---- tiles


@pytest.mark.support("balance_heads", proves=("block",))
@pytest.mark.parametrize("name", ["gpt2", "phi3", "llama"])
def test_heads_of_whole_block_rows_are_balanced_to_a_tile(name: str) -> None:
    """Heads grow from 8 to 16 rows; outputs are balanced, the inputs of o are not."""
    model = balanced(name, structure="block", block_size=8)
    kinds = "".join(kind for kind in HEADS[name] if kind != "o")
    for _ in range(2):
        check_balance(model, name, unit=64, kinds=kinds)
        train(model)


LARGER = {"hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 16}


def test_heads_of_part_of_a_block_row() -> None:
    with pytest.raises(ValueError, match=r"a head of .*q_proj has 16 rows, not whole block-rows of block_size=32"):
        balanced("llama", structure="block", block_size=32, sizes=LARGER)


# ---- refusals


@pytest.mark.support("balance_heads", refused=True, proves=("families", "family_tiles"))
@pytest.mark.parametrize("family", ["parallel", "factorized", "doped"])
@pytest.mark.parametrize("storage", ["unstructured", "block"])
def test_other_families_are_refused(family: str, storage: str) -> None:
    with pytest.raises(ValueError, match=r"balance_heads needs .*family='wide' with scope='model'"):
        SparseIFTConfig(balance_heads=True, family=family, structure=storage)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "ffn"}, "balance_heads needs sparse attention projections"),
        ({"exclude": ("q", "k", "v", "o")}, "balance_heads needs sparse attention projections"),
        ({"dst": DSTConfig(algorithm="gmp")}, r"algorithm='gmp' prunes .*use static, set or rigl"),
    ],
)
def test_combinations_without_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseIFTConfig(balance_heads=True, **options)


def test_low_rank_attention_has_no_rows_per_head() -> None:
    with pytest.raises(ValueError, match=r"q_a_proj is 16 x 32 and does not divide into heads"):
        plan(decoder_config("youtu"), SparseIFTConfig(balance_heads=True, sparsity=0.0))
