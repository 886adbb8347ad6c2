"""benchmarks/gpu.py in Triton's interpreter: everything but its CUDA graphs and training steps runs, and is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseift_llm.ops.kernels import triton_tuning
from sparseift_llm.ops.kernels.choice import use_block_kernel
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter")


@pytest.fixture
def script() -> Any:
    yield load_script(ROOT / "benchmarks" / "gpu.py")
    use_block_kernel(None)


def test_a_dry_run_measures_everything_against_what_is_predicted(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(tmp_path / "results.json"), "--dry"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    for shape in ("up", "down", "up, scope ffn", "down, scope ffn"):
        for name in ("forward", "forward and GELU", "input gradient", "input gradient and GELU's", "weight gradient"):
            row = rows[f"{shape}, {name}"]
            assert row["seconds"] > row["predicted_s"] > 0
            assert row["note"].startswith("error ")
    assert {f"FFN {name}, eager" for name in ("dense", "masked", "block")} <= rows.keys()
    table = capsys.readouterr().out
    assert table.startswith("Triton's interpreter\n")
    assert len(table.splitlines()) == 4 + len(rows)


def test_compiling_beforehand_launches_every_kernel_once(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own they use one configuration each; here in this one."""
    for kernel in (triton_tuning.product, triton_tuning.weight_gradient):
        monkeypatch.setattr(kernel, "configs", [object(), object(), *kernel.configs])
    script.compile_configuration(script.DRY, 2)  # with the others it would fail
    assert len(triton_tuning.product.configs) == len(triton_tuning.weight_gradient.configs) == 1


def test_a_wrong_product_stops_it(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = script.product
    monkeypatch.setattr(script, "product", lambda *args, **options: 1.1 * launched(*args, **options))
    with pytest.raises(SystemExit, match=r"up, forward is wrong: relative error 1\.0"):
        script.measure_products(script.Results(script.DRY), script.shapes(script.DRY)[0])


def test_without_a_gpu_it_says_so(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(tmp_path / "results.json")]) == 2
    assert "--dry" in capsys.readouterr().err


def test_predictions_by_hand(script: Any) -> None:
    """A product whose programs fill all places evenly takes the time of its FLOPs and of its programs' starts."""
    setting = script.REAL
    flops = 2 * setting.tokens * 33 * 8 * 128**2  # 33 output blocks of 8 tiles: 128 * 33 programs in 264 places
    steps = 8 * 128 / 64
    expected = flops / 650e12 * (1 + 2.3 / steps)
    assert script.predicted_product(setting, [8] * 33, 0) == pytest.approx(expected)
    assert script.predicted_product(setting, [8] * 33, 10**10) == 10**10 / 4.8e12
    # 144 tiles in 5 pieces: 720 on 132 multiprocessors, 6 on the busiest
    product, sums = 6 / 5 * 2 * 16384 * 128**2 / (650e12 / 132), 8 * 5 * 144 * 128**2 / 4.8e12
    assert script.predicted_weight_gradient(setting, 144) == pytest.approx(product + sums)
