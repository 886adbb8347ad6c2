"""benchmarks/gpu.py and gpu_tma.py in Triton's interpreter: all but CUDA graphs and training steps runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseift_llm.ops.kernels import triton_descriptors, triton_tuning
from sparseift_llm.ops.kernels.choice import use_block_kernel
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter")


@pytest.fixture(autouse=True)
def scripts_find_each_other(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    sys.modules.pop("gpu_products", None)


@pytest.fixture
def script() -> Iterator[Any]:
    yield load_script(ROOT / "benchmarks" / "gpu.py")
    use_block_kernel(None)


@pytest.fixture
def tma(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """gpu_tma.py with one configuration of each kernel."""
    script = load_script(ROOT / "benchmarks" / "gpu_tma.py")
    for kernel in (triton_tuning.product, triton_tuning.weight_gradient):
        monkeypatch.setattr(kernel, "configs", kernel.configs)  # the end of the test puts them back
    yield script
    triton_descriptors.use_tma(None)


def test_a_dry_run_measures_everything_against_what_is_predicted(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(tmp_path / "results.json"), "--dry"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    for shape in ("up", "down", "up, scope ffn", "down, scope ffn"):
        products = [name.removeprefix(f"{shape}, ") for name in rows if name.startswith(f"{shape}, ")]
        assert set(products) >= {"forward", "forward and GELU", "two input gradients", "weight gradient"}
        assert len(products) == 6 or shape in ("up", "down")  # whose names others begin with
        for name in products:
            row = rows[f"{shape}, {name}"]
            assert row["seconds"] > row["predicted_s"] > 0
            assert row["note"].startswith("error ")
            assert row["note"].endswith("stages"), "the chosen configuration"
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
    module = sys.modules["gpu_products"]
    launched = module.product
    monkeypatch.setattr(module, "product", lambda *args, **options: 1.1 * launched(*args, **options))
    with pytest.raises(SystemExit, match=r"up, forward is wrong: relative error 1\.0"):
        script.measure_products(script.Results(script.DRY), script.shapes(script.DRY)[0])


def test_without_a_gpu_it_says_so(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(tmp_path / "results.json")]) == 2
    assert "--dry" in capsys.readouterr().err


def test_predictions_by_hand(script: Any) -> None:
    """A product whose programs fill all places evenly takes the time of its FLOPs and of its programs' starts."""
    setting, script = script.REAL, sys.modules["gpu_products"]
    flops = 2 * setting.tokens * 33 * 8 * 128**2  # 33 output blocks of 8 tiles: 128 * 33 programs in 264 places
    steps = 8 * 128 / 64
    expected = flops / 650e12 * (1 + 2.3 / steps)
    assert script.predicted_product(setting, [8] * 33, 0) == pytest.approx(expected)
    assert script.predicted_product(setting, [8] * 33, 10**10) == 10**10 / 4.8e12
    # 144 tiles in 5 pieces: 720 on 132 multiprocessors, 6 on the busiest
    product, sums = 6 / 5 * 2 * 16384 * 128**2 / (650e12 / 132), 8 * 5 * 144 * 128**2 / 4.8e12
    assert script.predicted_weight_gradient(setting, 144) == pytest.approx(product + sums)


def test_tma_is_checked_against_float64_and_the_bits_without_it(tma: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setting, shape = tma.setting_of(is_dry=True), sys.modules["gpu_products"].Shape("up", 3, 2, 4)
    monkeypatch.setattr(tma, "shapes", lambda setting: [shape])
    made: list[int] = []
    make = triton_descriptors.rectangles
    monkeypatch.setattr(triton_descriptors, "rectangles", lambda *size: made.append(1) or make(*size))
    assert tma.problems_of(setting, 0) == []
    assert len(made) == 14, "two operands of each of six products, and of one two more"

    for factor, expected in ((1.1, "relative error"), (1.003, "other bits")):
        scaled = partial(lambda matrix, *size, factor: make(matrix * factor, *size), factor=factor)
        monkeypatch.setattr(triton_descriptors, "rectangles", scaled)
        assert len([problem for problem in tma.problems_of(setting, 0) if expected in problem]) == 6


def test_a_check_that_fails_or_never_ends_is_said(tma: Any) -> None:
    programs = ("pass", "raise SystemExit('up, forward: relative error 1.0')", "import os; os._exit(3)")
    commands = [[sys.executable, "-S", "-c", program] for program in programs]
    found = tma.outcomes([*commands, [sys.executable, "-S", "-c", "import time; time.sleep(60)"]], 3)
    assert found == [None, "up, forward: relative error 1.0", "ended with 3", "did not end within 3 s"]


def test_without_tma_the_check_says_so(tma: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert tma.main([]) == 2
    assert "no CUDA GPU with TMA" in capsys.readouterr().err
