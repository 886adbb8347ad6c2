"""Axes, points that are kept, shades and sizes of the report page's figures."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markupsafe import Markup

from sparseift_llm.reporting.page.charts import Series, downsampled, line_chart, make_axis, marker_of, style_class
from sparseift_llm.reporting.page.degrees import binned, short_names
from sparseift_llm.reporting.page.heat import NUM_SHADES, HeatMap, draw, shade
from sparseift_llm.reporting.page.line_ends import End, labelled_ends, shortened, spread
from sparseift_llm.reporting.page.markup import element, short
from sparseift_llm.reporting.page.page import write_report
from sparseift_llm.runs.lenient_json import read_lines
from tests.helpers.html_pages import Node, drawn_points, parse, write_full_run, write_lines, write_masks


def ticks(low: float, high: float) -> tuple[list[str], str]:
    axis = make_axis(low, high, "x")
    return [text for _, text in axis.ticks], axis.label


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, (["0", "2", "4", "6", "8", "10"], "x")),
        (0, 1.2, (["0.00", "0.25", "0.50", "0.75", "1.00"], "x")),
        (5.0, 5.012, (["5.0000", "5.0025", "5.0050", "5.0075", "5.0100"], "x")),
        (0, 12_500, (["0", "2,500", "5,000", "7,500", "10,000", "12,500"], "x")),
        (0, 4e8, (["0", "100", "200", "300", "400"], "x (millions)")),
        (0, 3e18, (["0", "1", "2", "3"], "x (\u00d710\u00b9\u2078)")),
        (0, 4e-4, (["0", "100", "200", "300", "400"], "x (\u00d710\u207b\u2076)")),
        (-1, 1, (["-1.0", "-0.5", "0.0", "0.5", "1.0"], "x")),
        (3, 3, (["2.8", "3.0", "3.2"], "x")),
        (3, 3 + 1e-12, (["2.8", "3.0", "3.2"], "x")),
        (0, 0, (["-1.0", "-0.5", "0.0", "0.5", "1.0"], "x")),
    ],
)
def test_axes(low: float, high: float, expected: tuple[list[str], str]) -> None:
    assert ticks(low, high) == expected


def test_axes_with_a_unit() -> None:
    axes = [make_axis(0, high, "x", unit=unit) for high, unit in ((4e12, "FLOP"), (2.4e9, "tokens"), (900, "FLOP"))]
    assert [axis.label for axis in axes] == ["x (TFLOP)", "x (B tokens)", "x (FLOP)"]
    assert [axis.ticks[-1][1] for axis in axes] == ["4", "2.0", "800"]


@given(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30))
@example(-9.999999999999999e29, -1e30)
def test_every_axis_has_ticks_inside(first: float, second: float) -> None:
    axis = make_axis(min(first, second), max(first, second), "x")
    assert axis.low < axis.high
    assert all(-1e-6 <= axis.share(value) <= 1 + 1e-6 for value, _ in axis.ticks)
    assert len(axis.ticks) <= 7


NUMBERS = st.floats(-1e9, 1e9) | st.sampled_from([math.nan, math.inf])


@given(st.lists(NUMBERS, max_size=300), st.integers(4, 60))
def test_points_that_are_kept(values: list[float], limit: int) -> None:
    kept = downsampled(values, limit)
    finite = [index for index, value in enumerate(values) if math.isfinite(value)]
    assert kept == sorted(set(kept))
    drawn = [index for index in kept if math.isfinite(values[index])]
    assert len(drawn) <= limit
    if len(finite) <= limit:
        assert drawn == finite
    if finite:
        assert {finite[0], finite[-1]} <= set(drawn)
        assert min(values[i] for i in drawn) == min(values[i] for i in finite)
        assert max(values[i] for i in drawn) == max(values[i] for i in finite)
    for index in set(range(len(values))) - set(finite):  # a gap stays a gap
        start = max((i for i in finite if i < index), default=-1) + 1
        assert start in kept


def test_a_spike_survives_downsampling() -> None:
    values = [0.0] * 10_000
    values[4321] = 9.0
    assert 4321 in downsampled(values, 50)


def test_a_chart_draws_its_points() -> None:
    points = [(0.0, 3.0), (1.0, 2.0), (2.0, math.nan), (3.0, 1.5), (4.0, math.nan), (5.0, 1.25)]
    chart = line_chart("c", "<Loss>", [Series("a & b", 0, points)], "steps", "nats")
    assert chart is not None
    root = parse(f"<!DOCTYPE html>{chart}")
    found = drawn_points(root.all("svg", "chart")[0], {"s0"})
    expected = [point for point in points if not math.isnan(point[1])]
    assert len(root.all("polyline")) == 3
    lone = [expected[2]] * 2 + [expected[3]] * 2  # twice, so that a dot is drawn
    for (x, y), (x_found, y_found) in zip([*expected[:2], *lone], found, strict=True):
        assert (x_found, y_found) == (pytest.approx(x, abs=0.01), pytest.approx(y, abs=0.01))
    assert root.by_id("c-t").text == "<Loss>"
    assert "a & b: 3 at the start, 1.25 at the end." in root.by_id("c-d").text
    assert line_chart("c", "t", [Series("a", 0, [(0.0, math.nan)])], "x", "y") is None


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([50.0, 20.0], [50.0, 20.0]),
        ([50.0, 50.0], [45.0, 55.0]),
        ([50.0, 52.0, 80.0], [46.0, 56.0, 80.0]),
        ([0.0, 1.0, 100.0], [3.0, 13.0, 94.0]),
        ([95.0, 94.0], [94.0, 84.0]),
        ([], None),
        ([50.0] * 11, None),
    ],
)
def test_names_are_moved_apart(heights: list[float], expected: list[float] | None) -> None:
    assert spread(heights, 10.0) == (expected if expected is None else pytest.approx(expected))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(1, 12))
def test_no_name_covers_another(heights: list[float], gap: float) -> None:
    placed = spread(heights, gap)
    assert placed is not None
    order = sorted(range(len(heights)), key=heights.__getitem__)
    ascending = [placed[index] for index in order]
    assert all(after - before >= gap - 1e-9 for before, after in pairwise(ascending))
    assert ascending[0] >= 3 - 1e-9
    assert ascending[-1] <= 94 + 1e-9


def test_names_beside_a_chart() -> None:
    ends = [End("dense", 3.48182, "s0", 70.0, 50.0), End("a-name-that-is-long", 14183.2, "s1", 100.0, 50.0)]
    root = parse(f"<!DOCTYPE html><svg>{Markup('').join(labelled_ends(ends, False))}</svg>")
    texts = root.all("text", "end")
    assert [[part.text for part in text.all("tspan")] for text in texts] == [
        ["dense", "3.482"],
        ["a-nam\u2026s-long", "14,183"],
    ]
    leaders = root.all("line", "leader")
    assert (leaders[0].attributes["x1"], leaders[0].attributes["y1"]) == ("70.00%", "50.00%")
    assert labelled_ends([End("x", 1.0, "s0", 100.0, 50.0)] * 9, False) == []
    assert labelled_ends([End("x", 1.0, "s0", 100.0, 50.0)] * 9, True)
    assert [len(shortened("x" * size)) for size in (12, 13, 40)] == [12, 12, 12]


def test_maps_of_one_value_are_a_sentence(tmp_path: Path) -> None:
    run = write_full_run(tmp_path / "run")
    root = report_of(run)
    assert "The same everywhere, so not drawn: sparsity 0.75; exploration" not in root.text
    assert "The same everywhere, so not drawn: sparsity 0.75." in root.by_id("masks").text
    assert "Sparsity" not in [caption.text for caption in root.by_id("masks").all("figcaption")]


def report_of(run: Path) -> Node:
    write_report([run], run.parent / "report.html")
    return parse((run.parent / "report.html").read_text(encoding="utf-8"))


def test_runs_are_told_apart_without_colour() -> None:
    assert len({(style_class(index).split()[1], marker_of(index)) for index in range(6)}) == 6
    assert len({(style_class(index), marker_of(index)) for index in range(36)}) == 36


def test_shades() -> None:
    assert [shade(value, 0, 1) for value in (-1, 0, 0.49, 0.99, 1, 5)] == [0, 0, 4, 8, 8, 8]
    assert shade(3, 3, 3) == NUM_SHADES // 2
    assert shade(None, 0, 1) is shade(math.nan, 0, 1) is None


def test_cells_of_a_heat_map() -> None:
    heat = HeatMap("t", "share", ["a", "<b>"], [[0.0, 0.0, 1.0, None], [1.0, 0.0]], ("first", "last"), 0, 1)
    root = parse(f"<!DOCTYPE html>{draw('m', heat)}")
    paths = {node.classes[0]: node.attributes["d"] for node in root.all("svg", "cells")[0].all("path")}
    assert paths == {"h0": "M0 0H2v1H0zM2 1H4v1H2z", "h8": "M2 0H3v1H2zM0 1H2v1H0z"}  # two cells are as wide as four
    assert [node.text for node in root.all("text")] == ["a", "<b>"]
    assert "from 0 to 1" in root.by_id("m-d").text


def test_small_parts() -> None:
    assert element("p", "<&>", class_='"', data_x=1, hidden=None) == '<p class="&#34;" data-x="1">&lt;&amp;&gt;</p>'
    assert [short(value) for value in (None, True, 7, 10**20, 1 / 3, math.nan, -math.inf)] == [
        "\u2013", "\u2013", "7", "1" + "0" * 20, "0.333333", "nan", "-inf"
    ]  # fmt: skip
    assert binned([1, 2, 3, 4, 5], 2) == [2.0, 4.5]
    assert short_names(["m.h.0.a.c", "m.h.1.a.c"]) == ["0.a.c", "1.a.c"]
    assert short_names(["m.h.0.a.c"]) == ["m.h.0.a.c"]
    assert short_names(["a.b", "a.b.c"]) == ["b", "b.c"]


def test_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert not read_lines(path).is_there
    path.write_text("")
    assert read_lines(path).lines == ()
    path.write_text('{"step": 1}\n{"step": true}\n\n[]\n{"step": 2}\n{"step": 3')
    found = read_lines(path)
    assert [line["step"] for line in found.lines] == [1, 2]
    assert found.problems == ("a.jsonl is damaged: lines 2, 3, 4 are no JSON object with a step; left out",)
    assert found.is_cut


def test_a_page_of_four_large_runs_is_below_two_megabytes(tmp_path: Path) -> None:
    draw_number = random.Random(0).random
    names = {f"transformer.h.{layer}.mlp.{name}": ("mlp_in", (96, 96)) for layer in range(24) for name in ("a", "b")}
    quantities = ("loss", "grad_norm", "tokens_per_second", "sparsity", "exploration", "mask_churn", "mask_survival",
                  "learning_rate", "dead_units", "saturated_units", "grad_norm_active", "grad_norm_grown")  # fmt: skip
    runs = []
    for index in range(4):
        runs.append(write_full_run(tmp_path / f"run{index}"))
        write_masks(runs[-1], index, names)
        at = ("train_flops", "train_tokens", "wall_seconds")
        lines = [{"step": n, **dict.fromkeys(at, n * 123_457), **{key: draw_number() for key in quantities}}
                 for n in range(1, 1001)]  # fmt: skip
        write_lines(runs[-1] / "metrics.jsonl", lines)
        keys = ("sparsity", "exploration", "churn", "survival")
        layers = [
            {"step": step, "layers": {name: {key: draw_number() for key in keys} for name in names}}
            for step in range(1, 1001, 20)
        ]
        write_lines(runs[-1] / "layers.jsonl", layers)
        keys = ("delta_r", "delta_r_imdb", "lambda", "lambda_imsg")
        checkpoints = [
            {"step": step, "layers": {name: {key: draw_number() for key in keys} for name in names}}
            for step in range(1, 1001, 100)
        ]
        spectral = {"format": "sparseift_spectral_v1", "checkpoints": checkpoints}
        (runs[-1] / "spectral.json").write_text(json.dumps(spectral))
    write_report(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert len(page.encode()) < 2_000_000
    root = parse(page)
    (_, _, loss, *others) = root.all("p", "note")
    assert "of 4,000 log lines are drawn: for every curve the smallest and the largest value" in loss.text
    assert len(others) == 2
    (figure,) = root.all("figure", "tokens-whole")
    for line in figure.all("polyline", "thin"):
        assert 400 <= line.attributes["points"].count(",") <= 500
