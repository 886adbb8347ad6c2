"""`AutoModelForCausalLM.from_pretrained` restores every model bit for bit, once the package is imported."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    pipeline,
)

from sparseift_llm import SparseIFTConfig, load_pretrained, sparsify, to_dense
from sparseift_llm.checkpoints.mask_file import MASKS_NAME
from sparseift_llm.checkpoints.transformers_hook import LayoutLoader
from sparseift_llm.config.transform import FamilyRule
from sparseift_llm.layers.base import sparse_layers
from tests.helpers.models import ARCHS, gradients_of, logits_of, shake, tiny_model
from tests.helpers.tiny_runs import differences, masks, sparse_gpt2, sparse_trainer, violations

TILES: dict[str, Any] = {"structure": "block", "block_size": 8}
MIXED = (FamilyRule("dense", layers="0"), FamilyRule("factorized", targets=("mlp_in", "mlp_out"), nonlinearity="gelu"))
LAYOUTS: dict[str, dict[str, Any]] = {
    "wide, tiles": TILES,
    "wide ffn, tiles": {**TILES, "scope": "ffn"},
    "parallel": {"family": "parallel"},
    "parallel, tiles": {"family": "parallel", **TILES},
    "factorized": {"family": "factorized", "nonlinearity": "layernorm"},
    "factorized, tiles": {"family": "factorized", **TILES},
    "doped": {"family": "doped"},
    "doped, tiles": {"family": "doped", **TILES},
    "mixed": {"family": "doped", "rules": MIXED},
    "wide ffn and parallel, tiles": {
        **TILES, "scope": "ffn", "rules": (FamilyRule("parallel", targets=("q", "k", "v", "o")),)
    },
}  # fmt: skip
WIDTHS = {"gpt2": {"n_embd": 64}, "llama": {"hidden_size": 64, "intermediate_size": 128}}  # room for tiles of 8
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def own_model(layout: str, arch: str = "gpt2", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A model after mask updates, with no parameter at a special value."""
    torch.manual_seed(0)
    dense = tiny_model(arch, dtype, **WIDTHS.get(arch, {}))
    model = sparsify(dense, SparseIFTConfig(**LAYOUTS[layout]))
    for layer in sparse_layers(model).values():
        layer.set_mask(layer.current_mask().roll(1, dims=1))
    shake(model)
    return model.eval()


def check_equal(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Bit for bit: parameters, all buffers, masks, logits, and gradients."""
    assert type(found) is type(expected)
    assert sparse_layers(found).keys() == sparse_layers(expected).keys() != set()
    for kind in ("named_parameters", "named_buffers"):
        assert not differences(dict(getattr(found, kind)()), dict(getattr(expected, kind)()))
    assert not differences(masks(found), masks(expected))
    assert torch.equal(logits_of(found), logits_of(expected))
    assert not differences(gradients_of(found), gradients_of(expected))


@every_layout
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_every_layout_comes_back_bit_for_bit(layout: str, arch: str, tmp_path: Path) -> None:
    model = own_model(layout, arch)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    check_equal(loaded, model)
    assert loaded.generation_config.max_new_tokens == 7
    assert loaded.config.to_dict() == load_pretrained(tmp_path / "first").config.to_dict()
    loaded.save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json", MASKS_NAME):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture(arch: str, tmp_path: Path) -> None:
    model = own_model("doped", arch)
    model.save_pretrained(tmp_path)
    check_equal(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_the_check_catches_a_lost_mask_and_a_lost_weight(tmp_path: Path) -> None:
    model = own_model("doped")
    model.save_pretrained(tmp_path)
    for change in ("mask", "weight"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        layer = next(iter(sparse_layers(loaded).values()))
        if change == "mask":
            layer.restore_buffers()
        else:
            layer.weight.data[layer.mask] = layer.weight.data[layer.mask].flip(0)
        with pytest.raises(AssertionError):
            check_equal(loaded, model)


@pytest.mark.parametrize("layout", ["wide, tiles", "factorized", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "auto"])
def test_any_dtype(layout: str, dtype: Any, tmp_path: Path) -> None:
    model = own_model(layout)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    check_equal(loaded, copy.deepcopy(model).to(None if dtype == "auto" else dtype))


@pytest.mark.parametrize("layout", ["wide, tiles", "factorized"])
@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": "auto"},
        {"low_cpu_mem_usage": True},
    ],
    ids=str,
)
def test_options_of_from_pretrained(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = own_model(layout)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for load in (AutoModelForCausalLM.from_pretrained, load_pretrained):
        check_equal(load(tmp_path, **options), model)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_cache(model: PreTrainedModel, cache: Path) -> Path:
    """The model as if it had been downloaded: `me/tiny` in a cache folder of the hub."""
    repository = cache / "models--me--tiny"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    model.save_pretrained(repository / "snapshots" / COMMIT)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("layout", ["wide, tiles", "doped", None])
def test_by_its_id_on_the_hub(layout: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers downloads weights only: the mask file is asked for at the commit of the weights."""
    model = own_model(layout) if layout else sparsify(tiny_model("gpt2"), SparseIFTConfig())
    folder = in_cache(model, tmp_path)
    check_equal(load_pretrained("me/tiny", cache_dir=tmp_path), model)
    if not layout:
        return
    check_equal(AutoModelForCausalLM.from_pretrained("me/tiny", cache_dir=tmp_path), model)
    (folder / MASKS_NAME).rename(tmp_path / MASKS_NAME)
    asked = []

    def fetch(*args: Any, **kwargs: Any) -> str:
        asked.append((args, kwargs))
        return str(tmp_path / MASKS_NAME)

    monkeypatch.setattr("sparseift_llm.checkpoints.transformers_hook.cached_file", fetch)
    check_equal(AutoModelForCausalLM.from_pretrained("me/tiny", cache_dir=tmp_path), model)
    assert asked == [(("me/tiny", MASKS_NAME), {"revision": COMMIT, "cache_dir": tmp_path})]


@pytest.mark.parametrize("layout", ["wide, tiles", "doped", None])
def test_a_variant(layout: str | None, tmp_path: Path) -> None:
    model = own_model(layout) if layout else sparsify(tiny_model("gpt2"), SparseIFTConfig())
    model.save_pretrained(tmp_path, variant="bf16")
    check_equal(load_pretrained(tmp_path, variant="bf16"), model)


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("layout", ["wide, tiles", "doped", None])
def test_a_variant_that_was_not_asked_for_is_named(layout: str | None, size: str, tmp_path: Path) -> None:
    model = own_model(layout) if layout else sparsify(tiny_model("gpt2"), SparseIFTConfig())
    model.save_pretrained(tmp_path, variant="bf16", max_shard_size=size)
    with pytest.raises(ValueError, match=r"missing or damaged.*load it with variant='bf16'$"):
        load_pretrained(tmp_path)
    check_equal(load_pretrained(tmp_path, variant="bf16"), model)


def test_folders_without_a_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/none is not there; give the folder of a saved model"):
        load_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match=r"\./none is not there"):
        load_pretrained("./none")
    with pytest.raises(ValueError, match=f"{tmp_path} holds no model .no config.json.; give"):
        load_pretrained(tmp_path)
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(ValueError, match=r"holds no model .*; it has checkpoint-4; give"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}/inner holds no model"):
        load_pretrained(tmp_path, subfolder="inner")
    with pytest.raises(ValueError, match="no-such-model is no folder of a saved model, nor one that the hub gives"):
        load_pretrained("no-such-model")


@pytest.mark.parametrize("layout", ["wide, tiles", "doped", None])
def test_in_a_subfolder(layout: str | None, tmp_path: Path) -> None:
    model = own_model(layout) if layout else sparsify(tiny_model("gpt2"), SparseIFTConfig())
    model.save_pretrained(tmp_path / "inner")
    check_equal(load_pretrained(tmp_path, subfolder="inner"), model)


# ---- no quantiser is left


@pytest.mark.parametrize("layout", ["wide, tiles", "parallel"])
def test_a_loaded_model_is_like_any_other(layout: str, tmp_path: Path) -> None:
    model = own_model(layout)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(loaded, "hf_quantizer")
    assert not hasattr(loaded, "quantization_method")
    assert not loaded.is_quantized
    assert not hasattr(loaded.config, "_is_quantized")
    assert loaded.config.quantization_config == {"quant_method": "sparse_ift"} == model.config.quantization_config
    check_equal(copy.deepcopy(loaded).float(), copy.deepcopy(model).float())
    check_equal(copy.deepcopy(loaded).half(), copy.deepcopy(model).half())
    check_equal(pickle.loads(pickle.dumps(loaded)), model)
    if layout == "wide, tiles":
        dense = to_dense(loaded)
        assert not hasattr(dense.config, "quantization_config")
        assert torch.equal(logits_of(dense), logits_of(to_dense(model)))
        assert type(dense.push_to_hub) is type(tiny_model("gpt2").push_to_hub)


def test_what_is_left_undone_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_model("parallel").save_pretrained(tmp_path)
    monkeypatch.setattr(LayoutLoader, "_detach", lambda self, model: None)
    with pytest.raises(ValueError, match="not supported for quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path).float()


def test_a_loaded_model_trains_as_the_one_that_was_saved(either_structure: str, tmp_path: Path) -> None:
    """In the Trainer, and its checkpoints load."""
    model = sparse_gpt2("rigl")
    model.save_pretrained(tmp_path / "saved")
    load = AutoModelForCausalLM if either_structure == "block" else None
    loaded = load.from_pretrained(tmp_path / "saved") if load else load_pretrained(tmp_path / "saved")
    trained = []
    for number, one in enumerate((model, loaded)):
        trainer = sparse_trainer(one, tmp_path / str(number), save_strategy="steps", save_steps=12)
        trainer.train()
        assert not violations(one, trainer.optimizer)
        trained.append({"weights": dict(one.named_parameters()), "masks": masks(one)})
    assert not differences(*trained)
    again = load_pretrained(tmp_path / "1" / "checkpoint-12")
    assert not differences(trained[0], {"weights": dict(again.named_parameters()), "masks": masks(again)})


# ---- what uses models


@pytest.mark.parametrize("layout", ["wide, tiles", "mixed"])
def test_generate_pipeline_and_lm_eval(layout: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tests.helpers.evaluation import tokenizer

    words = tokenizer()
    torch.manual_seed(0)
    dense = tiny_model("gpt2", torch.float32, n_embd=64, vocab_size=len(words))
    model = sparsify(dense, SparseIFTConfig(**LAYOUTS[layout])).eval()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    inputs = words("def main", return_tensors="pt")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0), expected)
    written = pipeline("text-generation", model=str(tmp_path), device="cpu")
    (text,) = written("def main", max_new_tokens=8, max_length=None, do_sample=False, pad_token_id=0)
    assert text["generated_text"] == words.decode(expected[0])
    request = Instance("loglikelihood", {}, ("def", " main(argument)"), 0)
    with pytest.warns(UserWarning, match="already has a `quantization_config` attribute"):  # lm-eval passes it again
        from_path = HFLM(pretrained=str(tmp_path), device="cpu", batch_size=1)
    in_memory = HFLM(pretrained=model, tokenizer=words, device="cpu", batch_size=1)
    assert from_path.loglikelihood([request]) == in_memory.loglikelihood([request])
