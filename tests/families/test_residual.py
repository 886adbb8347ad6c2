"""Wide with scope `residual`: a wider hidden side behind sparse projections, embedding and logits, at equal FLOPs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparseift_llm import DSTConfig, SparseIFTConfig, SparseTrainingController, load_pretrained, sparsify, to_dense
from sparseift_llm.api import save_export
from sparseift_llm.config.families import Wide
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.ends import MaskedEmbedding, TiedLogits
from sparseift_llm.layers.masked import MaskedLinear
from sparseift_llm.models.presets import PRESETS, load_config
from sparseift_llm.planning.cost import cost_of
from sparseift_llm.planning.planner import plan
from tests.helpers.decoders import SUPPORTED, decoder, decoder_config
from tests.helpers.models import VOCAB, gradients_of, logits_of, shake, tiny_config, tiny_model, token_ids, trained
from tests.helpers.residual import STORAGES, residual, residual_model
from tests.helpers.tiny_runs import controller_of, differences, final_state, sparse_trainer, violations

EMBEDDING = "model.embed_tokens"
# Model types whose attention is as wide as their config says, whatever the hidden size is: of the supported ones.
ACCEPTED = (
    "apertus", "arcee", "cohere", "cohere2", "cohere_compass_text", "cwm", "diffllama", "ernie4_5", "exaone4", "gemma",
    "gemma2", "gemma3_text", "glm", "glm4", "granite", "granite_swa", "hunyuan_v1_dense", "hyperclovax", "internlm3",
    "iquestcoder", "jais2", "lfm2", "llama", "ministral", "ministral3", "mistral", "nanochat", "nemotron", "olmo",
    "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2", "vaultgemma",
)  # fmt: skip


def reference(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and masked gradients of a stock model of another build with the same weights, zeros written in."""
    config = copy.deepcopy(model.config)
    del config.sparse_ift
    stock: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    values = dict(model.named_parameters())
    layers = sparse_layers(model)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            layer = layers.get(name.removesuffix(".weight"))
            parameter.copy_(values[name] * layer.mask if layer is not None else values[name])
    gradients = gradients_of(stock)
    for name, layer in layers.items():
        gradients[f"{name}.weight"] = gradients[f"{name}.weight"] * layer.mask
    return logits_of(stock), gradients


def check_parity(model: PreTrainedModel) -> None:
    logits, gradients = reference(model)
    torch.testing.assert_close(logits_of(model), logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients_of(model), gradients, rtol=1e-10, atol=1e-12)


# ---- what it computes


@pytest.mark.support("outputs and gradients, tied and untied", proves=("unstructured",))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma"])
def test_it_computes_what_a_stock_model_with_the_zeros_does(arch: str, tied: bool) -> None:
    model = residual_model(arch, tied)
    assert isinstance(model.lm_head, TiedLogits if tied else MaskedLinear)
    check_parity(model)
    assert torch.equal(logits_of(to_dense(model)), logits_of(model))


def _gradient_of_logits_is_not_masked(self: TiedLogits, input: Tensor) -> Tensor:
    return F.linear(input, self.weight, self.bias)


def _gradient_of_logits_is_lost(self: TiedLogits, input: Tensor) -> Tensor:
    return F.linear(input, self.weight.detach(), self.bias)


@pytest.mark.parametrize("fault", [_gradient_of_logits_is_not_masked, _gradient_of_logits_is_lost])
def test_parity_catches_a_wrong_use_of_the_tied_matrix(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TiedLogits, "forward", fault)
    with pytest.raises(AssertionError):
        check_parity(residual_model())


def test_parity_catches_an_embedding_without_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaskedEmbedding, "forward", lambda self, ids: F.embedding(ids, self.weight))
    with pytest.raises(AssertionError):
        check_parity(residual_model())


def test_a_copy_has_its_own_owner_of_the_mask() -> None:
    model = residual_model()
    twin = copy.deepcopy(model)
    assert twin.lm_head.owner is twin.model.embed_tokens
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert [name for name in sparse_layers(twin) if "lm_head" in name] == []


# ---- which models


@pytest.mark.support("model types with a head size of their own (39)", proves=("unstructured",))
@pytest.mark.parametrize("name", ACCEPTED)
def test_a_model_type_with_heads_of_their_own_size(name: str, tmp_path: Path) -> None:
    """Equal FLOPs; saved and loaded it is the same; and nothing but the embedding has a factor of the hidden size."""
    dense = decoder(name, torch.float32)
    result = plan(dense, residual(0.5))
    assert (result.ratio_linear, result.ratio_whole_model) == (1.0, 1.0)
    model = sparsify(dense, residual(0.5)).eval()
    assert cost_of(model, result.seq_len) == result.sparse
    model.save_pretrained(tmp_path)
    expected = logits_of(model)
    assert torch.equal(logits_of(load_pretrained(tmp_path).eval()), expected)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected)
    if name == "nanochat":  # it normalises the stream at once
        return
    factors = [factors_of(model) for model in (dense, to_dense(model))]
    scale = getattr(dense.get_input_embeddings(), "scalar_embed_scale", None)
    assert factors[1][0] == pytest.approx(factors[0][0] * (1 if scale is None else 2**0.5), rel=1e-3)
    assert factors[1][1] == pytest.approx(factors[0][1], rel=1e-3)  # soft caps bend it a little


@torch.no_grad()
def factors_of(model: PreTrainedModel) -> tuple[float, float]:
    """What the model multiplies embedding rows by before the first layer, and the product with the head by after it."""
    seen: dict[str, Any] = {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layer = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)[0]
    layer.register_forward_pre_hook(lambda _, args: seen.update(stream=args[0]))
    head.register_forward_hook(lambda _, args, output: seen.update(product=output))
    logits = logits_of(model)
    rows = embedding.weight[token_ids()]
    is_large = rows.abs() > rows.abs().mean()
    stream = float((seen["stream"][is_large] / rows[is_large]).median())
    return stream, float((logits / seen["product"])[seen["product"].abs() > 0.01].median())


@pytest.mark.support(
    "GPT-2, GPT-NeoX, OPT and others, whose attention follows the hidden size", refused=True, proves=("unstructured",)
)
@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in ACCEPTED])
def test_a_model_type_whose_attention_follows_the_hidden_size_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"scope='residual' needs a model type.*llama-gpt3-small.*or use scope='ffn'"):
        plan(decoder_config(name), residual())


# ---- what it costs


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.75])
@pytest.mark.parametrize("accounting", ["linears", "whole_model"])
@pytest.mark.parametrize("name", [name for name in PRESETS if "-gpt3-" in name])
def test_flops_are_the_dense_models_at_every_size(name: str, accounting: str, sparsity: float) -> None:
    result = plan(load_config(name), residual(sparsity, accounting=accounting, seq_len=1024))
    assert result.ratio_linear == pytest.approx(1, abs=1e-6)
    assert result.ratio_whole_model == pytest.approx(1, abs=1e-6)
    assert result.sparse.flops.logit == result.dense.flops.logit
    assert result.hf_config.hidden_size == pytest.approx(result.dense_model.hidden / (1 - sparsity), rel=0.01)


@pytest.mark.parametrize("name", ["llama-gpt3-small", "starcoder2-gpt3-small"])
def test_a_dense_embedding_is_paid_for_by_the_projections(name: str) -> None:
    config = residual(0.5, embedding="dense", accounting="whole_model", seq_len=1024)
    result = plan(load_config(name), config)
    assert result.ratio_whole_model == pytest.approx(1, abs=1e-6)
    assert result.sparse.flops.logit == 2 * result.dense.flops.logit
    assert result.ratio_linear < 0.6
    unpaid = plan(load_config(name), residual(0.5, embedding="dense"), 1024)
    assert unpaid.ratio_linear == 1.0
    assert unpaid.ratio_whole_model > 1.2


@pytest.mark.parametrize("options", [{"embedding": "dense"}, {"exclude": ("q", "k", "v", "o", "mlp_in")}])
def test_where_no_density_is_left_the_numbers_say_so(options: dict[str, Any]) -> None:
    config = residual(0.75, accounting="whole_model", seq_len=1024, **options)
    with pytest.raises(ValueError, match=r"alone cost \d+\.\d of the dense model's \d+\.\d MFLOP.*embedding='sparse'"):
        plan(load_config("llama-gpt3-small"), config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": Wide("model", embedding="dense")}, "goes with scope='residual' only"),
        ({"family": Wide("ffn", embedding_updates=True)}, "goes with scope='residual' only"),
        ({"family": "parallel", "embedding": "dense"}, "goes with family='wide' only"),
        ({"family": Wide("residual", embedding="dense", embedding_updates=True)}, "a dense embedding has no mask"),
        ({"family": Wide("residual", embedding_updates=True), "dst": DSTConfig("gmp")}, "needs algorithm='set' or"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseIFTConfig.from_dict({"sparsity": 0.5, **options}) if "embedding" in options else SparseIFTConfig(
            **options
        )


# ---- how it starts


@pytest.mark.parametrize("init", ["preserve", "supar"])
@pytest.mark.parametrize("arch", ["llama", "gemma"])
@pytest.mark.parametrize("storage", STORAGES)
def test_the_stream_begins_with_the_dense_models_variance(arch: str, init: str, storage: str) -> None:
    config = tiny_config(arch, hidden_size=256, vocab_size=2000, tie_word_embeddings=False)
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(config)
    wide = sparsify(config, residual(init=init, **STORAGES[storage]))
    ids = torch.arange(2000)[None]
    streams = [model.get_input_embeddings()(ids).std() for model in (dense, wide)]
    torch.testing.assert_close(streams[1], streams[0], rtol=0.02, atol=0)
    x = torch.randn(64, 256), torch.randn(64, 1024)
    logits = [model.lm_head(x).std() for model, x in zip((dense, wide), x, strict=True)]
    torch.testing.assert_close(logits[1], logits[0], rtol=0.02, atol=0)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        pair = [model.model.layers[0].get_submodule(name) for model in (dense, wide)]
        outputs = [layer(torch.randn(512, layer.in_features)).std() for layer in pair]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=0.05, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_every_word_has_as_many_weights_as_in_the_dense_model(tied: bool) -> None:
    model = residual_model(tied=tied)
    names = [EMBEDDING] if tied else [EMBEDDING, "lm_head"]
    found = [name for name, layer in sparse_layers(model).items() if layer.role != "projection"]
    assert found == names
    for name in names:
        mask = sparse_layers(model)[name].current_mask()
        assert mask.sum(1).tolist() == [32] * 100
        assert mask.any(0).all()
    if not tied:
        assert not torch.equal(*(sparse_layers(model)[name].current_mask() for name in names))


def test_gradual_pruning_starts_with_dense_projections_between_sparse_ends() -> None:
    layers = sparse_layers(residual_model(algorithm="gmp"))
    assert layers.pop(EMBEDDING).count_active() == 100 * 32
    assert all(layer.count_active() == layer.num_weights for layer in layers.values())


# ---- mask updates


@pytest.mark.support("a wider stream: mask updates, also at the ends", proves=("unstructured",))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("algorithm", "updates"), [("static", False), ("set", False), ("rigl", False), ("set", True), ("rigl", True)]
)
def test_ends_keep_their_masks_unless_asked_and_always_their_rows(tied: bool, algorithm: str, updates: bool) -> None:
    model = residual_model(tied=tied, algorithm=algorithm, embedding_updates=updates)
    before = {name: layer.current_mask().clone() for name, layer in sparse_layers(model).items()}
    controller, optimizer = trained(model)
    assert violations(model, optimizer) == []
    for name, layer in sparse_layers(model).items():
        is_end = layer.role != "projection"
        is_to_change = algorithm != "static" and (updates or not is_end)
        assert torch.equal(layer.current_mask(), before[name]) != is_to_change, name
        if is_end:
            assert layer.current_mask().sum(1).tolist() == [32] * 100
            assert layer.dense_gradient is None or updates
    assert controller.active_weight_steps == 3 * plan(tiny_config("llama"), residual()).sparse.linear_active_params


@pytest.mark.parametrize("storage", STORAGES)
def test_a_head_that_lost_its_tie_is_an_error(storage: str) -> None:
    """The two would be trained apart, and mask updates would clear the weights of one."""
    model = residual_model(**STORAGES[storage])
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"no longer share one parameter.*tie_weights"):
        model(token_ids())
    model.lm_head.weight = model.model.embed_tokens.weight
    model(token_ids())


@pytest.mark.parametrize("storage", STORAGES)
def test_words_that_the_batch_lacks_keep_their_weights(storage: str) -> None:
    """Their gradient is 0, which does not say which weights would be better. In tiles this is so for block-rows."""
    model = residual_model(tied=False, algorithm="rigl", embedding_updates=True, **STORAGES[storage])
    embedding = sparse_layers(model)[EMBEDDING]
    before = embedding.current_mask().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = SparseTrainingController(model, optimizer, total_steps=8)
    ids = torch.tensor([[1, 2, 3, 1, 2, 3]])
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    assert controller.step == 1
    seen = 1 if storage == "tiles" else 4  # block-rows of eight words each, or words
    assert torch.equal(embedding.current_mask()[seen:], before[seen:])
    assert not torch.equal(embedding.current_mask()[:seen], before[:seen])


def test_growth_at_the_tied_matrix_follows_the_sum_of_both_gradients() -> None:
    model = residual_model(algorithm="rigl", embedding_updates=True)
    stock = to_dense(model)
    expected = gradients_of(stock)[f"{EMBEDDING}.weight"].abs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen: dict[str, Any] = {}
    controller = SparseTrainingController(model, optimizer, total_steps=8)
    controller.listeners.append(lambda name, old, new, growth: seen.update({name: growth}))
    model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss.backward()
    optimizer.step()
    torch.testing.assert_close(seen[EMBEDDING], expected, rtol=1e-9, atol=1e-12)


# ---- files and resuming


@pytest.mark.support("a wider stream: saving, loading, exporting", proves=("unstructured",))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_saved_exported_and_loaded_it_is_the_same_model(arch: str, tied: bool, tmp_path: Path) -> None:
    model = residual_model(arch, tied)
    model.save_pretrained(tmp_path / "saved")
    save_export(model, tmp_path / "packed", "sparse")
    save_export(model, tmp_path / "stock", "dense")
    expected = logits_of(model)
    for folder in ("saved", "packed"):
        loaded = load_pretrained(tmp_path / folder).eval()
        assert isinstance(loaded.get_input_embeddings(), MaskedEmbedding)
        assert isinstance(loaded.lm_head, TiedLogits) == tied
        assert torch.equal(logits_of(loaded), expected)
        pairs = zip(sparse_layers(loaded).values(), sparse_layers(model).values(), strict=True)
        assert all(torch.equal(a.current_mask(), b.current_mask()) for a, b in pairs)
        assert all(a.role == b.role for a, b in zip(*(sparse_layers(m).values() for m in (loaded, model)), strict=True))
    for folder in ("saved", "stock"):
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert not sparse_layers(stock)
        assert torch.equal(logits_of(stock), expected)
    size = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("packed", "stock")]
    assert size[0] < size[1] / 3  # a quarter, and what is not sparse


@pytest.mark.parametrize("storage", ["masks", "mixed"])
def test_a_tied_head_with_a_bias_is_exported_and_loaded(storage: str, tmp_path: Path) -> None:
    """Phi's; transformers fills a bias up to the length of the weight, which is a long vector in the file."""
    model = sparsify(decoder("phi", tie_word_embeddings=True), residual(**STORAGES[storage]))
    shake(model)
    assert model.eval().lm_head.bias.any()
    save_export(model, tmp_path / "packed", "sparse")
    loaded = load_pretrained(tmp_path / "packed").eval()
    assert loaded.lm_head.bias.shape == (VOCAB,)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_a_tied_head_with_a_bias_is_refused_in_tiles_before_anything_is_built() -> None:
    config = decoder_config("phi", tie_word_embeddings=True)
    for verb in (lambda sparse: plan(config, sparse, 16), lambda sparse: sparsify(config, sparse)):
        with pytest.raises(ValueError, match=r"head with a bias cannot be tied .*embedding='unstructured'"):
            verb(residual(**STORAGES["tiles"]))


@pytest.mark.support("a wider stream: resuming bit for bit in a Trainer", proves=("unstructured",))
@pytest.mark.parametrize(("algorithm", "updates"), [("static", False), ("rigl", True)])
def test_a_resumed_run_equals_an_uninterrupted_one(algorithm: str, updates: bool, tmp_path: Path) -> None:
    def trainer(folder: str, seed: int = 0) -> Any:
        model = sparsify(
            tiny_model("llama", seed=seed, vocab_size=32, tie_word_embeddings=True),
            residual(algorithm=algorithm, embedding_updates=updates, every=2, seed=seed),
        )
        return sparse_trainer(model, tmp_path / folder, steps=6, save_strategy="steps", save_steps=2)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed", seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert differences(final_state(whole), final_state(resumed)) == []
    assert controller_of(whole).step == 6
    other = trainer("other", seed=2)
    other.train()
    assert differences(final_state(whole), final_state(other)) != []
