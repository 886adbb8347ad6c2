"""Checkpoints that stock classes cannot read are never loaded wrongly in silence.

Loading them without the package, or with damaged or missing parts, is an error.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from sparseift_llm import SparseIFTConfig, load_pretrained, save_export, sparsify, to_dense
from sparseift_llm.checkpoints.mask_file import MASKS_NAME, masks_of
from sparseift_llm.config.transform import FamilyRule
from sparseift_llm.layers.base import sparse_layers
from tests.checkpoints.test_loading import LAYOUTS, check_equal, own_model
from tests.helpers.models import ARCHS, logits_of, tiny_model, token_ids
from tests.helpers.tiny_runs import differences, masks

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


def test_tensor_parallelism_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a projection's weight would be taken for a smaller projection."""
    folder = saved(tmp_path)
    monkeypatch.setattr(GPT2Config, "distributed_config", SimpleNamespace(tp_size=2, tp_plan="auto"), raising=False)
    with pytest.raises(ValueError, match="tensor parallelism does not know sparse layers"):
        AutoModelForCausalLM.from_pretrained(folder)


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
        layer.set_mask(layer.current_mask().roll(1, dims=1))
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
