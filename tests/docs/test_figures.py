"""Figures on the pages are those of the committed result files, which say how they were made."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sparseift_llm import SparseIFTConfig, plan
from sparseift_llm.bench.tables import render, render_crossover
from sparseift_llm.models.architectures import build_model, sizes_of
from sparseift_llm.models.presets import load_config
from sparseift_llm.planning.devices import DEVICES, UTILIZATION
from sparseift_llm.reporting.comparison import comparison_table
from tests.docs.does_it_pay import table
from tests.docs.family_pictures import ACTIVE, FOLDER, PICTURES
from tests.helpers.pages import ALL_TEXT, PAGES
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script


def test_the_table_of_results_is_the_committed_one() -> None:
    results = [ROOT / "benchmarks" / "results" / "demo" / name for name in ("dense", "sparse")]
    assert comparison_table(results).partition("\n\n")[0] in PAGES["docs/results.md"]


def test_the_table_of_timings_is_the_committed_one() -> None:
    names = ("ffn_fp32", "ffn_bf16", "step_cpu")
    results = [
        json.loads((ROOT / "benchmarks" / "results" / "bench" / f"{name}.json").read_text(encoding="utf-8"))
        for name in names
    ]
    rows = [row for result in results for row in result["rows"]]
    assert render({"rows": rows}) in PAGES["docs/block.md"]
    assert all(row["ratio_floor"] > 0.95 for row in rows)  # nothing is faster than the machine
    assert f"{rows[0]['state_bytes_ratio']:.3f} times" in ALL_TEXT
    assert f"{rows[0]['state_bytes_ratio_masked']:.2f} times" in ALL_TEXT
    assert f"{rows[2]['state_bytes_ratio']:.3f} times" in ALL_TEXT
    assert f"{rows[2]['state_bytes_ratio_masked']:.2f} times" in ALL_TEXT
    for name, result in zip(names, results, strict=True):
        assert result["command"].startswith(f"sparseift bench --only {name}")
        assert not result["commit"].endswith("-dirty")


def test_the_table_of_timings_of_a_wider_stream_is_the_committed_one() -> None:
    names = [f"residual_{level}_{tile}" for level in ("ffn", "step") for tile in (64, 128)]
    folder = ROOT / "benchmarks" / "results" / "bench"
    results = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    rows = [row for result in results for row in result["rows"]]
    assert render({"rows": rows}) in PAGES["docs/block.md"]
    assert max(row["ratio_block"] for row in rows) <= 1.25
    assert max(row["state_bytes_ratio"] for row in rows) <= 1.02
    peaks = [f"{rows[2][f'{name}_peak_bytes'] / 1e6:.0f} MB" for name in ("block", "dense")]
    assert f"it takes {peaks[0]} at its peak, the dense model {peaks[1]}" in PAGES["docs/block.md"]
    assert not any(result["commit"].endswith("-dirty") for result in results)


def test_the_crossover_table_is_the_committed_one() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "bench" / "crossover.json").read_text(encoding="utf-8"))
    assert render_crossover(result) in PAGES["docs/block.md"]
    worst = max(row["ratio_block"] for row in result["rows"] if row["tile"] == 16)
    assert f"Tiles of 16 cost up to {worst:.1f} times the dense layer" in ALL_TEXT
    assert result["command"].startswith("sparseift bench --crossover")
    assert not result["commit"].endswith("-dirty")


def test_the_memory_of_a_step_is_the_committed_one() -> None:
    path = ROOT / "benchmarks" / "results" / "bench" / "step_cpu.json"
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    for key in ("block", "block_update_step", "dense", "masked", "masked_update_step"):
        assert f"{row[f'{key}_peak_bytes'] / 1e6:.0f}" in ALL_TEXT


def test_committed_results_say_how_they_were_made() -> None:
    for path in (ROOT / "benchmarks" / "results").rglob("summary.json"):
        summary = json.loads(path.read_text(encoding="utf-8"))
        assert all(summary[key] for key in ("command", "commit", "machine", "versions", "config"))
        assert not summary["commit"].endswith("-dirty")


def test_the_cost_of_updates_is_the_committed_one() -> None:
    path = ROOT / "benchmarks" / "results" / "update_cost.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    shares = [result[structure]["share_of_training_time"] for structure in ("unstructured", "block")]
    assert max(shares) < 0.03
    assert f"{100 * shares[0]:.1f}% (unstructured) and {100 * shares[1]:.1f}% (block)" in ALL_TEXT
    assert f"{result['block']['bytes_per_update'] / 1e6:.0f} MB" in ALL_TEXT
    assert result["command"].endswith("benchmarks/update_cost.py benchmarks/results/update_cost.json")
    assert not result["commit"].endswith("-dirty")


def test_the_time_of_a_spectral_report_is_the_committed_one() -> None:
    path = ROOT / "benchmarks" / "results" / "spectral_time.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    seconds = [result[structure]["seconds"] for structure in ("unstructured", "block")]
    sentence = f"takes {seconds[0]:.0f} s unstructured and {seconds[1]:.0f} s in tiles of 128"
    assert sentence in ALL_TEXT
    assert result["unstructured"]["num_layers"] == 48
    assert not result["commit"].endswith("-dirty")


def test_the_loss_jump_is_the_committed_one() -> None:
    path = ROOT / "benchmarks" / "results" / "loss_jump.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert load_script("benchmarks/loss_jump.py").table(result) in PAGES["docs/pretrained.md"]
    text = PAGES["docs/pretrained.md"].replace("\n", " ")
    assert f"{result['num_steps']:,} steps on the built-in corpus behind them" in text
    assert f"The GPT-2 has {result['dense']['gpt2']:.3f}, and a Llama, from which the rows of" in text
    assert f"start, {result['dense']['llama']:.3f} (`benchmarks/loss_jump.py`" in text
    assert all(result[key] for key in ("command", "machine", "versions", "commit"))
    assert not result["commit"].endswith("-dirty")


def test_the_cost_of_metrics_is_the_committed_one() -> None:
    path = ROOT / "benchmarks" / "results" / "metrics_cost.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    shares = [result[structure]["share_of_training_time"] for structure in ("unstructured", "block")]
    assert max(shares) < 0.01
    assert f"{100 * shares[0]:.2f}% (unstructured) and {100 * shares[1]:.2f}% (block)" in ALL_TEXT
    assert (result["log_every_steps"], result["update_every_steps"]) == (10, 100)
    assert result["command"].endswith("benchmarks/metrics_cost.py benchmarks/results/metrics_cost.json")
    assert result["machine"]
    assert result["versions"]
    assert not result["commit"].endswith("-dirty")


def test_the_sizes_of_dense_exports_are_those_of_the_models() -> None:
    page, dense = PAGES["docs/guides/serving.md"], load_config("gpt3-small")
    configs = {
        "nothing (the dense model)": dense,
        "`wide`, `scope: ffn`": plan(dense, SparseIFTConfig(scope="ffn")).hf_config,
        "`wide`, `scope: model`": plan(dense, SparseIFTConfig()).hf_config,
    }
    for made_with, config in configs.items():
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in build_model(config).parameters())
        assert f"| {made_with} | {size / 1e6:.1f} M | {2 * size / 1e6:.0f} MB |" in page
    linear = plan(dense, SparseIFTConfig(family="doped")).hf_config
    assert sizes_of(linear) == sizes_of(dense)


def test_the_sizes_of_exports_of_active_weights_alone_are_those_of_the_plans() -> None:
    """Two bytes for an active weight and for every weight beside sparse matrices, a bit for each place of a mask."""
    page, configs = PAGES["docs/guides/serving.md"], {"ffn": "gpt3-small", "model": "gpt3-small"}
    for scope, name in {**configs, "residual": "llama-gpt3-small"}.items():
        found = plan(load_config(name), SparseIFTConfig(scope=scope))
        matrices = [matrix for layer in found.layers if layer.is_sparse for matrix in layer.matrices]
        places = sum(math.prod(matrix.shape) for matrix in matrices)
        active = sum(matrix.num_active for matrix in matrices)
        size = 2 * (found.sparse.stored_params - places + active) + places / 8
        line = next(line for line in page.splitlines() if line.startswith(f"| `wide`, `scope: {scope}`"))
        assert line.endswith(f"| {size / 1e6:.0f} MB |"), size / 1e6
    line = next(line for line in page.splitlines() if "`scope: residual`" in line and line.startswith("|"))
    assert f"| {found.sparse.stored_params / 1e6:.1f} M | {2 * found.sparse.stored_params / 1e6:.0f} MB |" in line
    assert f"{found.dense.stored_params / 1e6:.1f} M" in page


def test_the_devices_of_plans_are_named_with_their_sources() -> None:
    for device in DEVICES:
        memory, rate = f"{device.memory_bytes / 1e9:g} GB", f"{device.peak_flops_per_second / 1e12:g} TFLOP/s"
        assert f"| {device.name} | {memory} | {rate} | {device.source} |" in PAGES["docs/guides/plan.md"]
        assert "NVIDIA" in device.source
    assert f"reaches {UTILIZATION:.0%} of the GPU's peak" in PAGES["docs/guides/plan.md"]


def test_what_choosing_promises_is_in_result_files() -> None:
    path = ROOT / "benchmarks" / "results" / "bench" / "step_cpu.json"
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    promise = f"{row['ratio_block']:.2f}x the step time and {row['state_bytes_ratio']:.3f}x the training state"
    assert promise in PAGES["docs/guides/choose.md"]
    short = f"{row['ratio_block']:.1f}x the step time, {row['state_bytes_ratio']:.2f}x the training state"
    assert short in PAGES["README.md"]
    rows = {line.split("|")[1].strip(): line.split("|") for line in table().splitlines()}
    for title, gain, time in (
        ("`scope: model`, tiles, 8 per side", "0.05 nats", "1.4x"),
        ("`scope: model`, single weights", "0.07 nats", "2.5x"),
    ):
        dense, sparse = (float(loss) for loss in rows[title][2].split("→"))
        assert gain == f"{dense - sparse:.2f} nats"
        assert time == f"{float(rows[title][4].strip(' x')):.1f}x"
        for page in ("README.md", "docs/guides/choose.md"):
            assert gain in PAGES[page]
            assert f"{time} " in PAGES[page]


@pytest.mark.parametrize("name", PICTURES)
def test_a_family_s_picture_has_the_dense_weights_twice(name: str) -> None:
    picture = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert picture == PICTURES[name]().svg()  # python -m tests.docs.family_pictures
    assert picture.count('class="cell"') == 2 * ACTIVE  # the dense matrix, and what stands in its place
