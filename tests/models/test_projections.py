"""How projections are told apart, and what is said where they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from sparseift_llm import SparseIFTConfig, plan
from sparseift_llm.conversion.scaling import _scale_final_norm
from sparseift_llm.models.architectures import build_model, sizes_of
from sparseift_llm.models.norms import final_norm, norm_offset
from sparseift_llm.models.projections import attention_widths, find_projections
from sparseift_llm.planning.cost import count_flops
from tests.helpers.decoders import SUPPORTED, decoder, decoder_config
from tests.helpers.models import token_ids


def llama(**changes: Any) -> PreTrainedModel:
    return build_model(decoder_config("llama", **changes), meta=True)


def kinds_of(model: PreTrainedModel) -> list[str]:
    return [f"{p.name.partition('.0.')[2]}={p.kind}" for p in find_projections(model) if p.layer_index == 0]


# ---- what is found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", "attn.c_attn=qkv attn.c_proj=o mlp.c_fc=mlp_in mlp.c_proj=mlp_out"),
        ("mpt", "attn.Wqkv=qkv attn.out_proj=o ffn.up_proj=mlp_in ffn.down_proj=mlp_out"),
        (
            "opt",
            "self_attn.q_proj=q self_attn.k_proj=k self_attn.v_proj=v self_attn.out_proj=o fc1=mlp_in fc2=mlp_out",
        ),
        ("phi3", "self_attn.qkv_proj=qkv self_attn.o_proj=o mlp.gate_up_proj=mlp_in mlp.down_proj=mlp_out"),
        (
            "bert",
            "attention.self.query=q attention.self.key=k attention.self.value=v attention.output.dense=o "
            "intermediate.dense=mlp_in output.dense=mlp_out",
        ),
        (
            "ctrl",
            "multi_head_attention.Wq=q multi_head_attention.Wk=k multi_head_attention.Wv=v "
            "multi_head_attention.dense=o ffn.0=mlp_in ffn.2=mlp_out",
        ),
        (
            "youtu",
            "self_attn.q_a_proj=q self_attn.q_b_proj=q self_attn.kv_a_proj_with_mqa=kv self_attn.kv_b_proj=kv "
            "self_attn.o_proj=o mlp.gate_proj=mlp_in mlp.up_proj=mlp_in mlp.down_proj=mlp_out",
        ),
    ],
)
def test_by_hand(name: str, expected: str) -> None:
    assert kinds_of(build_model(decoder_config(name), meta=True)) == expected.split()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "lfm2", "bert", "modernbert-decoder", "gpt_neox", "phi"])
def test_names_decide_where_the_ffn_is_as_wide_as_the_model(name: str) -> None:
    config = decoder_config(name)
    field = "n_inner" if hasattr(config, "n_inner") else "intermediate_size"
    square = build_model(decoder_config(name, **{field: 32}), meta=True)
    assert kinds_of(square) == kinds_of(build_model(config, meta=True))


def test_attention_flops_count_queries_and_values_apart() -> None:
    """Youtu, 4 heads in 2 layers: 8 + 4 dimensions of queries and keys, 8 of values."""
    model = build_model(decoder_config("youtu"), meta=True)
    assert attention_widths(find_projections(model)) == (2 * 4 * 12, 2 * 4 * 8)
    assert count_flops(model, seq_len=10).attention == 2 * 10 * (2 * 4 * 12 + 2 * 4 * 8)


@pytest.mark.parametrize("name", SUPPORTED)
def test_sizes_are_those_of_the_projections(name: str) -> None:
    config = decoder_config(name)
    sizes, projections = sizes_of(config), find_projections(build_model(config, meta=True))
    shapes = {p.kind: p.shape for p in projections}
    assert shapes["mlp_out"] == (sizes.hidden, sizes.ffn)
    assert shapes["o"] == (sizes.hidden, 32)
    assert {p.layer_index for p in projections} == set(range(sizes.num_layers))


# ---- what is not


def with_layer(change: Any) -> PreTrainedModel:
    model = llama()
    change(model.model.layers[1])
    return model


def set_module(path: str, module: nn.Module) -> Any:
    def change(layer: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(layer.get_submodule(parent), name, module)

    return change


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, device="meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_module("self_attn.g_proj", linear(32, 32)), r"1\.self_attn\.g_proj is in an attention but none"),
        (set_module("cross_attn", nn.ModuleDict({"q_proj": linear(32, 32)})), "q_proj are both q .cross-att"),
        (set_module("self_attn.v_proj", nn.Identity()), r"layers\.1 has attention weights .*not one each of q"),
        (set_module("self_attn.q_proj", linear(16, 32)), "q_proj .32 x 16. does not fit the hidden size 32"),
        (set_module("self_attn.kv_proj", linear(32, 64)), "has attention weights"),
        (set_module("adapter", linear(8, 8)), r"layers\.1\.adapter .8 x 8. is neither in an attention nor"),
        (set_module("adapter", linear(32, 8)), r"layers\.1\.adapter does not fit .*down_proj.* 64 inputs"),
        (set_module("mix", linear(32, 32)), r"layers\.1\.mix .32 x 32. is neither in an attention nor"),
        (set_module("down2", linear(64, 32)), r"has MLP weights .*not mlp_in and one mlp_out"),
        (set_module("mlp.up_proj", linear(32, 60)), r"mlp\.up_proj does not fit .*which has 64 inputs"),
        (set_module("table", nn.Embedding(4, 32, device="meta")), "table.weight .4 x 32. is in a Embedding, not"),
        (set_module("mlp", nn.Identity()), r"layers\.1 has MLP weights \[\]"),
        (set_module("experts", linear(32, 64)), r"experts\.weight .64 x 32. is of a mixture of experts"),
    ],
)  # fmt: skip
def test_a_weight_that_is_not_understood_is_named(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_projections(with_layer(change))


def test_a_list_of_another_length() -> None:
    model = llama()
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="LlamaForCausalLM has no list of 3 decoder layers; supported are"):
        find_projections(model)


def test_a_width_that_the_class_does_not_follow() -> None:
    """LFM2 rounds its FFN on its own, unless told not to."""
    config = decoder_config("lfm2", block_auto_adjust_ff_dim=True, block_multiple_of=40)
    with pytest.raises(ValueError, match=r"would have to be .* x .*but the config of lfm2 makes it"):
        plan(config, SparseIFTConfig(scope="ffn", sparsity=0.5))
    assert plan(config, SparseIFTConfig(family="doped")).ratio_linear == 1.0


# ---- scales of attention


def test_numbers_that_scale_scores_follow_the_head_size() -> None:
    gemma = plan(decoder_config("gemma2", query_pre_attn_scalar=12), SparseIFTConfig()).hf_config
    assert (gemma.head_dim, gemma.query_pre_attn_scalar) == (16, 24)
    granite = plan(decoder_config("granite", attention_multiplier=0.5), SparseIFTConfig()).hf_config
    assert granite.attention_multiplier == pytest.approx(0.5 / 2**0.5)
    ffn = plan(decoder_config("granite", attention_multiplier=0.5), SparseIFTConfig(scope="ffn")).hf_config
    assert ffn.attention_multiplier == 0.5


# ---- norms and layouts, for SµPar

NO_FINAL_NORM = {"bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "openai-gpt",
                 "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"}  # fmt: skip
WITHOUT_WEIGHT = {"olmo", "nanochat"}
MORE_BEHIND_IT = {"megatron-bert", "modernbert-decoder", "xlm-roberta-xl"}
OFFSETS = {"gemma": 1.0, "gemma2": 1.0, "gemma3_text": 1.0, "vaultgemma": 1.0, "nemotron": 1.0}


@pytest.mark.parametrize("name", SUPPORTED)
def test_scaling_the_final_norm_scales_what_the_head_reads(name: str) -> None:
    model = decoder(name, torch.float32)
    head = model.get_output_embeddings()
    inputs: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    if name in NO_FINAL_NORM | WITHOUT_WEIGHT | MORE_BEHIND_IT:
        with pytest.raises(ValueError, match=r"needs a norm before the logits|has no weight|stands there, too"):
            final_norm(model)
        return
    with torch.no_grad():
        model(input_ids=token_ids(), use_cache=False)
        _scale_final_norm(model, 0.5)
        model(input_ids=token_ids(), use_cache=False)
    assert norm_offset(model.get_submodule(final_norm(model))) == OFFSETS.get(name, 0.0)
    torch.testing.assert_close(inputs[1], 0.5 * inputs[0], rtol=1e-4, atol=1e-5)
