"""The study at equal whole-model FLOPs: the fit of gains over width and tokens."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.equal_flops import write_result


def write_gains(folder: Path, study: ModuleType, gain: Any, places: Mapping[str, tuple[str, ...]]) -> None:
    """Dense losses of 4 with seeds 0.01 apart and, with one seed, the wide model's by the gain at its place."""
    for name, lengths in places.items():
        for length in lengths:
            baseline = study.Baseline.from_name(name)
            tokens = study.equal_flops_fit.tokens_per_weight(baseline, study.BY_NAME[f"residual2{length}"])
            for seed, loss in enumerate((4.0, 4.01, 3.99)):
                write_result(folder / name / f"dense{length}", study.Rates(8e-3, 4), seed, loss)
            ours = 4 - gain(baseline.width, tokens)
            write_result(folder / name / f"residual2{length}", study.Rates(8e-3, 4), 0, ours)


def test_the_fit_finds_the_plane_that_gains_lie_on(study: ModuleType, tmp_path: Path) -> None:
    """Twice the width adds 0.02 and twice the tokens -0.01, so it is 0.03 + 0.02 * log2(6) - 0.01 * log2(3) at 768."""

    def gain(width: int, tokens: float) -> float:
        return 0.03 + 0.02 * math.log2(width / 128) - 0.01 * math.log2(tokens / 10)

    fits = study.equal_flops_fit
    places = {"width64": ("", "-half"), "width128": ("",), "width256": ("", "-double"), "width64-layers8": ("",)}
    write_gains(tmp_path / "novels", study, gain, places)
    points = fits.points_of(tmp_path / "novels", "residual2")
    assert [point.place for point in points] == [
        ("novels", width, pytest.approx(tokens, rel=0.02))
        for width, tokens in ((64, 20.4), (64, 40.8), (128, 10.2), (256, 10.2), (256, 20.4))
    ]
    plane = fits.fit_plane(points)
    assert plane.coefficients == pytest.approx([0.03, 0.02, -0.01])
    value, low, high = plane.at("novels", *fits.TARGET)
    assert value == pytest.approx(0.03 + 0.02 * math.log2(6) - 0.01 * math.log2(3))
    assert value - low == pytest.approx(high - value)
    assert "twice the width adds +0.020" in fits.report(tmp_path)
    assert "predicts +0.066 (" in fits.report(tmp_path)
    places = {"width64": ("",), "width128": ("-half",)}
    write_gains(tmp_path / "builtin", study, lambda width, tokens: gain(width, tokens) - 0.05, places)
    write_gains(tmp_path / "tenth", study, lambda width, tokens: -0.3, {"width64": ("",)})  # too few to count
    said = fits.report(tmp_path)
    assert "twice the width adds +0.020" in said
    assert re.search(r"predicts \+0\.016 \([^)]*\) for builtin and \+0\.066 \([^)]*\) for novels\.$", said)


def test_the_fits_interval_covers_the_truth_as_often_as_it_says(study: ModuleType, tables: ModuleType) -> None:
    """Losses are drawn around a plane, with one seed at one of the points, 400 times."""
    fits, draw = study.equal_flops_fit, random.Random(0)
    places, truth = ((64, 42.0), (64, 10.0), (128, 10.0), (128, 5.0), (256, 10.0)), [0.02, 0.03, -0.01]
    covered, there = 0, fits.direction(["novels"], "novels", *fits.TARGET)
    for _ in range(400):
        points = []
        for place in places:
            seeds = range(1 if place == places[-1] else 3)
            gain = float(fits.direction(["novels"], "novels", *place) @ truth)
            rows = [
                tables.Best(study.Rates(8e-3, 4), {seed: mean + draw.gauss(0, 0.02) for seed in seeds}, True, 1.0)
                for mean in (4.0, 4.0 - gain)
            ]
            points.append(fits.Point("novels", *place, *rows))
        _, low, high = fits.fit_plane(points).at("novels", *fits.TARGET)
        covered += low <= float(there @ truth) <= high
    assert 0.92 < covered / 400 < 0.98


def test_places_that_determine_no_plane_have_no_fit(study: ModuleType, tmp_path: Path) -> None:
    write_gains(tmp_path / "novels", study, lambda width, tokens: 0.1, {"width64": ("", "-half"), "width128": ()})
    fits = study.equal_flops_fit
    assert fits.fit_plane(fits.points_of(tmp_path / "novels", "residual2")) is None
    said = fits.report(tmp_path)
    assert said.count("+0.100") == 2
    assert "adds" not in said
    assert said.endswith("|")
