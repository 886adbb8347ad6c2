"""`AutoModelForCausalLM.from_pretrained` restores models of own layout bit for bit, once the package is imported."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedModel, pipeline

from sparseift_llm import SparseIFTConfig, load_pretrained, save_export, sparsify, to_dense
from sparseift_llm.config import FamilyRule
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.loading import LayoutLoader
from sparseift_llm.mask_file import MASKS_NAME, masks_of
from tests.models import ARCHS, gradients_of, logits_of, shake, tiny_model, token_ids
from tests.tiny_runs import differences, masks, sparse_gpt2, sparse_trainer, violations

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
        layer.set_mask(layer.mask.roll(1, dims=1))
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


def test_of_a_folder_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask file is looked for at the commit of the weights."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--me--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for layout in ("wide, tiles", "doped"):
        model = own_model(layout)
        model.save_pretrained(repository / "snapshots" / commit)
        check_equal(AutoModelForCausalLM.from_pretrained("me/tiny", cache_dir=tmp_path), model)
        check_equal(load_pretrained("me/tiny", cache_dir=tmp_path), model)
    wide = sparsify(tiny_model("gpt2"), SparseIFTConfig())
    wide.save_pretrained(repository / "snapshots" / commit)
    assert not differences(masks(load_pretrained("me/tiny", cache_dir=tmp_path)), masks(wide))
    with monkeypatch.context() as patch:
        (repository / "snapshots" / commit / MASKS_NAME).rename(tmp_path / "elsewhere")
        patch.setattr("sparseift_llm.checkpoint.cached_file", lambda *_, **__: str(tmp_path / MASKS_NAME))
        (tmp_path / "elsewhere").rename(tmp_path / MASKS_NAME)
        assert not differences(masks(load_pretrained("me/tiny", cache_dir=tmp_path)), masks(wide))


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

    from tests.evaluation_helpers import tokenizer

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


# ---- without the import, and other refusals

WITHOUT = """
import json, sys
from transformers import AutoModelForCausalLM, AutoConfig, logging
import torch
logging.set_verbosity_error()
outcome = {}
for folder in sys.argv[1:]:
    for kind in (AutoModelForCausalLM, getattr(__import__("transformers"), AutoConfig.from_pretrained(folder).architectures[0])):
        try:
            model = kind.from_pretrained(folder)
            with torch.no_grad():
                logits = model(input_ids=torch.arange(12)[None]).logits
            outcome.setdefault(folder, []).append(float(logits.double().sum()))
        except Exception as error:
            outcome.setdefault(folder, []).append(f"{type(error).__name__}: {error}")
assert not [name for name in sys.modules if name.startswith("sparseift")]
print(json.dumps(outcome))
"""  # noqa: E501


def test_without_the_import_own_layouts_are_errors_and_stock_ones_load(tmp_path: Path) -> None:
    """transformers itself only warns of a quantisation that it does not know, and draws what it misses."""
    expected: dict[str, Any] = {}
    for arch in ARCHS:
        layouts = LAYOUTS if arch in ("gpt2", "llama") else ("doped",)
        for layout in layouts:
            folder = tmp_path / f"{arch}, {layout}"
            own_model(layout, arch, torch.float32).save_pretrained(folder)
            expected[str(folder)] = None
    wide = sparsify(tiny_model("gpt2", torch.float32), SparseIFTConfig()).eval()
    leaves_attention = SparseIFTConfig(scope="ffn", rules=(FamilyRule("dense", targets=("q", "k", "v", "o")),))
    stock = {"wide": wide, "dense rules": sparsify(tiny_model("gpt2", torch.float32), leaves_attention).eval()}
    for name, model in stock.items():
        model.save_pretrained(tmp_path / name)
    save_export(wide, tmp_path / "packed", "sparse")
    save_export(own_model("wide, tiles", "gpt2", torch.float32), tmp_path / "dense", "dense")
    stock["dense"] = to_dense(own_model("wide, tiles", "gpt2", torch.float32))
    expected[str(tmp_path / "packed")] = None
    for name, model in stock.items():
        with torch.no_grad():
            expected[str(tmp_path / name)] = float(model(input_ids=torch.arange(12)[None]).logits.double().sum())
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT, *expected],
        check=True,
        timeout=200,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    for folder, outcomes in json.loads(run.stdout).items():
        for outcome in outcomes:
            if expected[folder] is None:
                assert "RuntimeError" in str(outcome), folder
                assert "ignore_mismatched_sizes" in outcome, folder
            else:
                assert outcome == expected[folder], folder


def test_stock_models_stay_stock_with_the_import(tmp_path: Path) -> None:
    model = sparsify(tiny_model("llama"), SparseIFTConfig())
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not sparse_layers(stock)
    assert torch.equal(logits_of(stock), logits_of(model))
    assert not differences(masks(load_pretrained(tmp_path)), masks(model))


def saved(folder: Path, layout: str = "factorized") -> Path:
    own_model(layout).save_pretrained(folder)
    return folder


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_other_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="causal language model, not a GPT2Model; load it with AutoModelForCausalLM"):
        AutoModel.from_pretrained(saved(tmp_path))


def test_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"device_map leaves tensors off every device"):
        AutoModelForCausalLM.from_pretrained(
            saved(tmp_path), device_map={"transformer": "cpu", "lm_head": "disk"}, offload_folder=tmp_path / "offload"
        )


def test_a_later_layout_is_refused(tmp_path: Path) -> None:
    rewrite(saved(tmp_path), quantization_config={"quant_method": "sparse_ift", "codebook": 3})
    with pytest.raises(ValueError, match=r"\['codebook'\], which this version of sparseift_llm does not know"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_state_dict_alone_is_refused_where_masks_are_needed(tmp_path: Path) -> None:
    for layout in ("factorized", "factorized, tiles"):
        model = own_model(layout)
        state = {**model.state_dict()}
        config = AutoConfig.from_pretrained(saved(tmp_path / layout, layout))
        if layout == "factorized":
            with pytest.raises(ValueError, match="a state_dict has no masks in it"):
                GPT2LMHeadModel.from_pretrained(None, config=config, state_dict=state)
        else:
            check_equal(GPT2LMHeadModel.from_pretrained(None, config=config, state_dict=state), model)


def without_masks(folder: Path) -> None:
    (folder / MASKS_NAME).unlink()


def other_masks(folder: Path) -> None:
    model = load_pretrained(folder)
    for layer in sparse_layers(model).values():
        layer.set_mask(layer.mask.roll(1, dims=1))
    model.save_pretrained(folder / "other")
    (folder / "other" / MASKS_NAME).replace(folder / MASKS_NAME)


def missing_tensor(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.v.weight"))


def missing_norm(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop("transformer.h.1.ln_1.weight"))


def change(folder: Path, alter: Any) -> None:
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    alter(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["factorized", "factorized, tiles"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_masks, f"{MASKS_NAME} is missing"),
        (other_masks, "masks in .* are not those of its weights"),
        (missing_tensor, r"weights in .* are missing or damaged: .*transformer\.h\.1\.mlp\.c_fc\.v"),
        (missing_norm, r"weights in .* are missing or damaged: no transformer\.h\.1\.ln_1\.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damage(layout: str, damage: Any, message: str, tmp_path: Path) -> None:
    damage(saved(tmp_path, layout))
    for load in (AutoModelForCausalLM.from_pretrained, load_pretrained):
        with pytest.raises(ValueError, match=message) as caught:
            load(tmp_path)
        assert str(tmp_path) in str(caught.value)


def test_a_folder_without_the_mark(tmp_path: Path) -> None:
    """`load_pretrained` goes by the transformation; a stock class meets weights that it cannot take."""
    path = saved(tmp_path) / "config.json"
    values = json.loads(path.read_text())
    del values["quantization_config"]
    path.write_text(json.dumps(values))
    check_equal(load_pretrained(tmp_path), own_model("factorized"))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_fits_a_model_in_memory(tmp_path: Path) -> None:
    """What the Trainer does on resume: nothing is missing, and nothing is unexpected."""
    saved(tmp_path)
    model = own_model("factorized")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (1,)
    result = model.load_state_dict(tensors, strict=False)
    assert result.missing_keys == ["lm_head.weight"]
    assert not result.unexpected_keys
    check_equal(model, own_model("factorized"))
    assert isinstance(model, nn.Module)
    assert masks_of(model)
    assert torch.isfinite(model(input_ids=token_ids()).logits).all()
