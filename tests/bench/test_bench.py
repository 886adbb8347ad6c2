"""`sparseift bench` on tiny models: what it reports is consistent, and measured from what really runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseift_llm.bench.measure import peak_bytes, queued_seconds, take_turns
from sparseift_llm.bench.rows import CROSSOVER, ROWS, Row
from sparseift_llm.bench.run import bench
from sparseift_llm.bench.step import models_of
from sparseift_llm.bench.tables import render
from sparseift_llm.cli import main
from sparseift_llm.cli.bench import RESULT_BEGINNING
from sparseift_llm.ops.kernels.native import NATIVE
from sparseift_llm.planning.cost import count_flops
from sparseift_llm.utils.outputs import refuse_foreign
from tests.helpers.paths import ROOT

GPT = {
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 16,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 16,
    "vocab_size": 64,
}
TINY = {
    "layer": Row("tiny_layer", "layer", "cpu", torch.float32, 8, 24, 16),
    "half": Row("tiny_half", "layer", "cpu", torch.bfloat16, 16, 24, 16),
    "step": Row("tiny_step", "step", "cpu", torch.float32, 8, 32, 32, GPT, 16, "ffn"),
    "residual layer": Row("tiny_residual_layer", "layer", "cpu", torch.float32, 8, 24, 16, scope="residual"),
    "residual step": Row("tiny_residual_step", "step", "cpu", torch.float32, 8, 32, 32, LLAMA, 16, "residual"),
}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return {name: bench([row], repeats=3)["rows"][0] for name, row in TINY.items()}


@pytest.mark.parametrize("name", TINY)
def test_a_row_is_complete_and_consistent(name: str, results: dict[str, dict[str, Any]]) -> None:
    row, found = TINY[name], results[name]
    expected = (row.name, row.level, "cpu", str(row.dtype).split(".")[1], row.tile, row.tokens)
    assert tuple(found[key] for key in ("name", "level", "device", "dtype", "tile", "tokens")) == expected
    for variant in ("masked", "block"):
        assert found[f"ratio_{variant}"] == found[f"{variant}_s"] / found["dense_s"] > 0
    assert found["ratio_floor"] == found["block_s"] / found["floor_s"] > 0
    assert f"{found['gemm_flops_per_s'] / 1e9:,.0f} GFLOP/s |" in render({"rows": [found]})
    assert all(found[f"{variant}_peak_bytes"] > 0 for variant in ("dense", "masked", "block"))
    json.dumps(found)


def test_a_layers_bytes_by_hand(results: dict[str, dict[str, Any]]) -> None:
    """FFN 16 -> 64 -> 16, made 32 -> 128 -> 32 with 32 of 64 tiles of 8 (16 of 64 each): weights, biases, indices."""
    dense = 2 * 4 * (2 * 16 * 64 + 64 + 16)
    block = 2 * 4 * (2 * 16 * 64 + 128 + 32) + 4 * (3 * 16 + 2 * 4 + 1) + 4 * (3 * 16 + 2 * 16 + 1)
    masked = 2 * 4 * (2 * 32 * 128 + 128 + 32) + 2 * 32 * 128
    assert results["layer"]["state_bytes_ratio"] == block / dense
    assert results["layer"]["state_bytes_ratio_masked"] == masked / dense


def test_bytes_of_a_layer_with_a_wider_stream_by_hand(results: dict[str, dict[str, Any]]) -> None:
    """FFN 16 -> 64 -> 16, made 32 -> 64 -> 32 with 16 of 32 tiles of 8."""
    dense = 2 * 4 * (2 * 16 * 64 + 64 + 16)
    block = 2 * 4 * (2 * 16 * 64 + 64 + 32) + 4 * (3 * 16 + 2 * 4 + 1) + 4 * (3 * 16 + 2 * 8 + 1)
    assert results["residual layer"]["state_bytes_ratio"] == block / dense


def test_contestants_of_a_step_cost_the_same(results: dict[str, dict[str, Any]]) -> None:
    for row in (TINY["step"], TINY["residual step"]):
        flops = {name: count_flops(model, row.seq_len).linear for name, model in models_of(row).items()}
        assert flops["dense"] == flops["masked"] == flops["block"]


def test_a_steps_bytes_and_updates(results: dict[str, dict[str, Any]]) -> None:
    found = results["step"]
    assert 1 < found["state_bytes_ratio"] < 1.1 < 1.5 < found["state_bytes_ratio_masked"]
    assert found["block_update_step_s"] > 0
    assert found["update_every_steps"] == 100


def test_contestants_take_turns() -> None:
    order: list[str] = []
    parts = {name: {part: lambda n=name, p=part: order.append(n + p) for part in "fb"} for name in "xy"}
    times = take_turns(parts, "cpu", repeats=1)  # and two rounds of warm-up
    assert order == ["xf", "xb", "yf", "yb"] * 3
    assert [len(times[name][part]) for name in "xy" for part in "fb"] == [1, 1, 1, 1]


def test_on_a_gpu_calls_are_queued_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 3.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    seconds = queued_seconds([lambda: order.append("one"), lambda: order.append("two")], "cuda")
    assert seconds == [0.003, 0.003]
    assert order == ["wait", "event", "one", "event", "event", "two", "event", "wait"]


def test_peak_bytes_by_hand() -> None:
    def run() -> None:
        first = torch.zeros(1 << 20)
        second = first + 1
        del first
        second + 1

    assert 0 <= peak_bytes(run, "cpu") - (2 * 4 << 20) < 1024  # and the scalars


@pytest.mark.skipif(not NATIVE.is_available(), reason="no C++ compiler")
def test_peak_bytes_count_what_native_kernels_keep() -> None:
    x, weight, columns = torch.ones(100, 32), torch.ones(2, 32, 32), torch.zeros(2, dtype=torch.int32)
    kept: list[torch.Tensor] = []

    def run() -> None:
        kept.append(NATIVE.forward(x, weight, None, columns, 64))

    run()  # some indices are made in the first call
    NATIVE.forward(torch.ones(100, 640), torch.ones(40, 32, 32), None, torch.arange(40, dtype=torch.int32) // 2, 64)
    peak = peak_bytes(run, "cpu")  # what the larger call before has left does not count
    assert peak == kept[0].nbytes + NATIVE.scratch_bytes()
    assert NATIVE.scratch_bytes() >= weight.nbytes + x.nbytes


def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROWS, "ffn_fp32", TINY["layer"])
    path = tmp_path / "folder" / "result.json"
    assert main(["bench", "--only", "ffn_fp32", "--repeats", "1", "--json", "--output", str(path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(path.read_text())
    assert printed.keys() == {"rows", "machine", "versions", "commit", "command"}
    assert printed["command"] == "sparseift bench --only ffn_fp32 --repeats 1"
    assert main(["bench", "--only", "ffn_fp32", "--repeats", "1", "--output", str(path)]) == 0  # its own file
    table = render(printed).splitlines()
    assert len(table) == 3
    assert table[2].startswith("| tiny_layer | cpu, float32 | 8 | 24 | ")


@pytest.mark.parametrize("text", ["# Notes", '{"rows": [{"name": "Ann", "age": 3}]}'])
def test_a_file_of_others_is_kept(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparseift_llm.bench.run.bench", lambda *_: pytest.fail("measured first"))
    (tmp_path / "notes").write_text(text)
    assert main(["bench", "--output", str(tmp_path / "notes")]) == 2
    assert "notes is there already, and not from sparseift bench; " in capsys.readouterr().err
    assert (tmp_path / "notes").read_text() == text


def test_committed_results_can_be_regenerated() -> None:
    paths = list((ROOT / "benchmarks" / "results" / "bench").glob("*.json"))
    assert paths
    for path in paths:
        refuse_foreign([path], RESULT_BEGINNING, "sparseift bench")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "ffn"], "--only='ffn' is not one of 'ffn_fp32'"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--only", "step_gpu"], "step_gpu needs a CUDA device"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "step_gpu" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_rows_have_the_promised_names() -> None:
    residual = [f"residual_{level}_{tile}" for level in ("ffn", "step") for tile in (64, 128)]
    assert list(ROWS) == ["ffn_fp32", "ffn_bf16", "step_cpu", *residual, "ffn_gpu", "step_gpu"]
    assert len({row.name for row in CROSSOVER}) == len(CROSSOVER) == 16
