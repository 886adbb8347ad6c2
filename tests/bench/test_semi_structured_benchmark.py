"""benchmarks/semi_structured.py without a GPU: its masks, its checks against float64, and what it says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseift_llm.layers import semi_structured as layers_of_kernels
from sparseift_llm.ops import semi_structured
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script


@pytest.fixture
def script() -> Any:
    return load_script(ROOT / "benchmarks" / "semi_structured.py")


def test_a_dry_run_makes_masks(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--dry"]) == 0
    assert json.loads(capsys.readouterr().out)["density"] == {"up": 0.5, "down": 0.5}


def test_a_mask_that_is_not_2_4_stops_it(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "drop_and_grow", lambda mask, *_: mask.roll(1, dims=1))
    with pytest.raises(SystemExit, match=r"a mask of \(192, 64\) is not 2:4 along both sides"):
        script.main(["--dry"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([]) == 2
    assert "--dry" in capsys.readouterr().err


def test_a_whole_model_is_held_to_float64(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layers_of_kernels, semi_structured):
        monkeypatch.setattr(module, "compress", lambda weight: weight.detach().clone())
    for name in ("sparseift_llm.ops.semi_structured.check_device", "sparseift_llm.api.check_device"):
        monkeypatch.setattr(name, lambda device, dtype: None)
    script.check_model("cpu", False)
    errors = script.check_model("cpu", True)
    assert 0 < errors["dense logits"] < 0.05
    assert 0 < errors["inference logits"] < 0.05
    monkeypatch.setattr(layers_of_kernels, "compress", lambda weight: 1.2 * weight.detach())
    with pytest.raises(SystemExit, match="a model on the kernels is wrong against float64"):
        script.check_model("cpu", True)


def test_every_product_is_held_to_float64(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dense products in place of the kernels all errors are roundings, and a wrong one of each is seen."""

    def compress(weight: Tensor) -> Tensor:
        return weight.detach().clone()

    for module in (script, semi_structured):
        monkeypatch.setattr(module, "compress", compress)
    monkeypatch.setattr(semi_structured, "check_device", lambda device, dtype: None)
    monkeypatch.setattr(script, "TOKENS", 70)
    monkeypatch.setattr(script, "CALLS", 1)
    row = script.measure("up", (192, 64), "cpu")
    assert set(row["relative_errors"]) == {"output", "inference", "input gradient", "weight gradient", "bias gradient"}
    assert max(row["relative_errors"].values()) < script.TOLERANCE
    assert {"2:4 input gradient with compression", "dense input gradient"} < set(row["seconds"])
    assert all(seconds > 0 for seconds in row["seconds"].values())
    with monkeypatch.context() as patch:
        patch.setattr(semi_structured, "compress", lambda weight: (1.1 if weight.shape == (64, 192) else 1) * weight)
        with pytest.raises(SystemExit, match=r"^up is wrong against float64: input gradient (9\.\de-02|1\.0e-01)$"):
            script.measure("up", (192, 64), "cpu")
    monkeypatch.setattr(script, "masked_weight", lambda weight, mask: weight)
    with pytest.raises(SystemExit, match=r"^up is wrong against float64: weight gradient 1\.0e\+00$"):
        script.measure("up", (192, 64), "cpu")
    monkeypatch.setattr(script, "compress", lambda weight: 1.1 * weight)
    with pytest.raises(SystemExit, match=r"inference (9\.\de-02|1\.0e-01)"):
        script.measure("up", (192, 64), "cpu")
