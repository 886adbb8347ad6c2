"""What `sparsify` refuses, which projections it picks, and that printing, copying and pickling its models works."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from sparseift_llm import SparseIFTConfig, plan, sparsify
from sparseift_llm.checkpoints.mask_file import MASKS_NAME, digest, masks_of, read_masks
from sparseift_llm.conversion.twin import build_twin
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.planning.planner import plan_of_dense
from tests.helpers.models import FUSED_ARCHS, SPLIT_ARCHS, logits_of, tiny_config, tiny_model

# for projections that grow but stay dense, whose cost has to come from the others
AFFORDABLE: dict[str, Any] = {"accounting": "whole_model", "seq_len": 8, "sparsity": 0.5}


def test_already_sparse(tmp_path: Path) -> None:
    sparse = sparsify(tiny_config("llama"), SparseIFTConfig())
    sparse.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    for model in (sparse, sparse.config, stock.config, AutoConfig.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="already a Sparse-IFT model"):
            sparsify(model, SparseIFTConfig())
    with pytest.raises(ValueError, match=r"without its masks.*load_pretrained"):
        sparsify(stock, SparseIFTConfig())
    del sparse.config.sparse_ift
    with pytest.raises(ValueError, match="already a Sparse-IFT model"):
        sparsify(sparse, SparseIFTConfig())


def unsupported(model_type: str, **fields: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(
        model_type, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, **fields
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (unsupported("mixtral", intermediate_size=64, num_local_experts=2), "is of a mixture of experts"),
        (tiny_config("llama", quantization_config={"quant_method": "bitsandbytes"}), "is quantised"),
        (unsupported("mamba"), r"mixer\.conv1d\.weight .*is in a Conv1d, not in a Linear or Conv1D"),
        (tiny_config("opt", word_embed_proj_dim=16), "word_embed_proj_dim=16 other than hidden_size=32"),
    ],
)
def test_refused_models(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify(config, SparseIFTConfig())


def test_nothing_matched() -> None:
    with pytest.raises(ValueError, match=r"no projection of llama .*change targets or exclude"):
        sparsify(tiny_config("llama"), SparseIFTConfig(targets=("q", "k"), exclude=("q", "k")))


@pytest.mark.parametrize("arch", FUSED_ARCHS)
@pytest.mark.parametrize("choice", [{"exclude": ("q",)}, {"targets": ("k", "v")}])
def test_part_of_a_fused_matrix(arch: str, choice: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"holds q, k, v in one matrix.*name all of them"):
        sparsify(tiny_config(arch), SparseIFTConfig(**choice))


def sparse_names(arch: str, **choice: Any) -> set[str]:
    """Names of the sparse projections, the same in each decoder layer; projections that stay dense may grow."""
    result = plan_of_dense(tiny_config(arch), SparseIFTConfig(**choice))
    with torch.device("meta"):
        layers = sparse_layers(build_twin(tiny_config(arch), result))
    names = {name.rsplit(".", 1)[-1] for name in layers}
    assert len(layers) == 2 * len(names)
    return names


@pytest.mark.parametrize("arch", SPLIT_ARCHS)
def test_targets_and_exclude_on_split_projections(arch: str) -> None:
    mlp = {"fc1", "fc2"} if arch == "opt" else {"gate_proj", "up_proj", "down_proj"}
    output = "out_proj" if arch == "opt" else "o_proj"
    assert sparse_names(arch) == {"q_proj", "k_proj", "v_proj", output} | mlp
    assert sparse_names(arch, exclude=("k", "v")) == {"q_proj", output} | mlp
    assert sparse_names(arch, targets=("q", "o")) == {"q_proj", output}
    assert sparse_names(arch, targets=("o", "mlp_in"), exclude=("o",)) == {
        "fc1" if arch == "opt" else n for n in mlp
    } - {
        "fc2",
        "down_proj",
    }
    assert sparse_names(arch, scope="ffn") == mlp


def test_targets_and_exclude_on_fused_projections() -> None:
    assert sparse_names("gpt_neox") == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert sparse_names("gpt_neox", targets=("q", "k", "v")) == {"query_key_value"}
    assert sparse_names("gpt_neox", exclude=("q", "k", "v")) == {"dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert sparse_names("gpt_neox", scope="ffn") == {"dense_h_to_4h", "dense_4h_to_h"}
    gpt2 = sparsify(tiny_config("gpt2"), SparseIFTConfig(exclude=("q", "k", "v", "o"), **AFFORDABLE))
    assert list(sparse_layers(gpt2))[:2] == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]


def test_excluded_projections_are_widened_and_stay_dense() -> None:
    model = sparsify(tiny_model("llama"), SparseIFTConfig(exclude=("o",), **AFFORDABLE))
    weight = model.get_submodule("model.layers.0.self_attn.o_proj").weight
    assert isinstance(weight, torch.Tensor)
    assert weight.shape == (48, 48)
    assert torch.count_nonzero(weight) == 48 * 48


def test_printing_shows_the_sparsity_of_each_layer() -> None:
    text = repr(sparsify(tiny_config("llama"), SparseIFTConfig()))
    assert "(q_proj): MaskedLinear(in_features=64, out_features=64, bias=False, sparsity=0.7500" in text
    assert "active 1,024 of 4,096, replaces 32->32" in text
    assert "(lm_head): Linear(in_features=64, out_features=100, bias=False)" in text
    text = repr(sparsify(tiny_config("gpt2"), SparseIFTConfig()))
    assert "(c_attn): MaskedConv1D(nf=192, nx=64, sparsity=0.7500" in text


def test_deepcopy_is_independent_and_saves_its_own_masks(tmp_path: Path) -> None:
    model = sparsify(tiny_model("llama"), SparseIFTConfig())
    twin = copy.deepcopy(model)
    layer = next(iter(sparse_layers(twin).values()))
    layer.set_mask(torch.zeros_like(layer.current_mask()))
    assert digest(masks_of(twin)) != digest(masks_of(model))
    twin.save_pretrained(tmp_path)
    assert digest(read_masks(tmp_path)) == digest(masks_of(twin))


def test_a_pickled_model_comes_back_whole(tmp_path: Path) -> None:
    model = sparsify(tiny_model("llama"), SparseIFTConfig())
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits_of(twin), logits_of(model))
    assert digest(masks_of(twin)) == digest(masks_of(model))
    twin.save_pretrained(tmp_path)
    assert digest(read_masks(tmp_path)) == digest(masks_of(model))


def test_only_the_main_process_writes_masks(tmp_path: Path) -> None:
    sparsify(tiny_config("llama"), SparseIFTConfig()).save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / MASKS_NAME).exists()


@pytest.mark.parametrize("given", [{"sparsity": 0.75}, None, 0.75, "wide"])
def test_a_transformation_of_another_type_is_refused_in_words(given: Any) -> None:
    for verb in (sparsify, plan):
        with pytest.raises(ValueError, match=r"must be a SparseIFTConfig, got .*SparseIFTConfig\.from_dict"):
            verb(tiny_config("gpt2"), given)
