"""The README's code blocks run, and what it names exists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Trainer, TrainingArguments

from sparseift_llm import SparseIFTConfig, sparsify
from sparseift_llm.bench.tables import render, render_crossover
from sparseift_llm.cli import main as sparseift
from sparseift_llm.config.yaml_files import parse_yaml
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.reporting.comparison import comparison_table
from sparseift_llm.runs.sweep import Sweep
from tests.helpers.models import tiny_config, tiny_model
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script
from tests.helpers.tiny_runs import sparse_gpt2, sparse_trainer


class NotRunError(Exception):
    """Raised in the place of running a sweep, with the number of runs."""


TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {path: path.read_text(encoding="utf-8") for path in PATHS}
ALL_TEXT = "\n".join(PAGES.values())


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_python_blocks_run() -> None:
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_python_blocks_of_the_page_on_metrics_run() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(found) == 2
    for block in found:
        exec(compile(block, "docs/metrics.md", "exec"), {})


def test_the_diff_makes_a_plain_trainer_script_sparse(tmp_path: Path) -> None:
    (diff,) = blocks("diff")
    script = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
    tokens = torch.arange(16) % 8
    scope: dict[str, Any] = {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "Trainer": Trainer,
        "config": GPT2Config(
            vocab_size=8, n_positions=16, n_embd=64, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        ),
        "args": TrainingArguments(
            str(tmp_path), max_steps=2, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        "dataset": [{"input_ids": tokens, "labels": tokens}] * 16,
        "resume": None,
    }  # fmt: skip
    exec(compile(script, "README.md", "exec"), scope)
    assert len(sparse_layers(scope["model"])) == 4
    assert (tmp_path / "checkpoint-2" / "sparse_masks.safetensors").is_file()
    added = [line for line in diff.splitlines() if line.startswith("+")]
    assert len(added) <= 6


def test_shell_commands_name_things_that_exist(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(sweep: Sweep, jobs: int) -> None:
        raise NotRunError(len(sweep.runs))

    monkeypatch.setattr("sparseift_llm.runs.sweep.run_sweep", planned)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    sparsify(tiny_config("gpt2"), SparseIFTConfig()).save_pretrained("runs/wide75")
    tiny_model("gpt2").save_pretrained("runs/dense")
    for run in ("runs/dense", "runs/wide75"):
        Path(run, "summary.json").write_text('{"step": 2}')
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    commands = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(commands) >= 5
    for command in commands:
        program, *words = shlex.split(command)
        if program == "make":
            assert words[0] in targets
        elif program in ("accelerate", "python"):
            scripts = [word for word in words if word.startswith(("recipes/", "eval/"))]
            assert scripts
            assert all((ROOT / word).is_file() for word in scripts)
        elif words[0] == "sweep":  # planned, but not run
            with pytest.raises(NotRunError, match="24"):  # two rates, two factors, three seeds, two models
                sparseift(words)
        else:
            assert program == "sparseift"
            assert sparseift(words) == 0
    assert "399.76 MFLOP" in capsys.readouterr().out


def test_which_commands_take_a_trainers_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, model = tmp_path / "run", sparse_gpt2("rigl").float()
    sparse_trainer(model, run, steps=4, save_strategy="steps", save_steps=4, logging_steps=1).train()
    assert len((run / "layers.jsonl").read_text().splitlines()) == 4
    assert not (run / "metrics.jsonl").exists()
    assert sparseift(["report", str(run), "-o", str(tmp_path / "report.html")]) == 0
    assert "run: finished" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('<figure class="panel steps-') == 2  # losses over steps: such a run logs no tokens
    assert sparseift(["compare", str(run), "--output", str(tmp_path / "comparison")]) == 2
    assert sparseift(["export", str(run), "--format", "sparse", "--output", str(tmp_path / "export")]) == 2
    assert f"the last is {run / 'checkpoint-4'}\n" in capsys.readouterr().err
    checkpoint = str(run / "checkpoint-4")
    assert sparseift(["export", checkpoint, "--format", "sparse", "--output", str(tmp_path / "export")]) == 0
    assert sparseift(["analyze", str(run), "--output", str(tmp_path / "analysis")]) == 0
    assert f"no eval_loss of {run}" in capsys.readouterr().out


def test_yaml_blocks_are_valid_configs() -> None:
    for block in blocks("yaml"):
        values = parse_yaml(block, "README.md")
        assert SparseIFTConfig.from_dict(values["sparse_ift"]).rules


def test_named_recipes_and_links_exist() -> None:
    for name in re.findall(r"`(\w+\.yaml)`", TEXT):
        assert (ROOT / "recipes" / name).is_file()
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_table_of_results_is_the_committed_one() -> None:
    results = [ROOT / "benchmarks" / "results" / "demo" / name for name in ("dense", "sparse")]
    assert comparison_table(results).partition("\n\n")[0] in TEXT


def test_the_table_of_timings_is_the_committed_one() -> None:
    names = ("ffn_fp32", "ffn_bf16", "step_cpu")
    results = [
        json.loads((ROOT / "benchmarks" / "results" / "bench" / f"{name}.json").read_text(encoding="utf-8"))
        for name in names
    ]
    rows = [row for result in results for row in result["rows"]]
    assert render({"rows": rows}) in ALL_TEXT
    assert all(row["ratio_floor"] > 0.95 for row in rows)  # nothing is faster than the machine
    assert f"{rows[0]['state_bytes_ratio']:.3f} times" in ALL_TEXT
    assert f"{rows[0]['state_bytes_ratio_masked']:.2f} times" in ALL_TEXT
    assert f"{rows[2]['state_bytes_ratio']:.3f} times" in ALL_TEXT.replace("\n", " ")
    assert f"{rows[2]['state_bytes_ratio_masked']:.2f} times" in ALL_TEXT
    for name, result in zip(names, results, strict=True):
        assert result["command"].startswith(f"sparseift bench --only {name}")
        assert not result["commit"].endswith("-dirty")


def test_the_crossover_table_is_the_committed_one() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "bench" / "crossover.json").read_text(encoding="utf-8"))
    assert render_crossover(result) in ALL_TEXT
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
    assert f"{100 * shares[0]:.1f}% (unstructured) and {100 * shares[1]:.1f}% (block)" in ALL_TEXT.replace("\n", " ")
    assert f"{result['block']['bytes_per_update'] / 1e6:.0f} MB" in ALL_TEXT
    assert result["command"].endswith("benchmarks/update_cost.py benchmarks/results/update_cost.json")
    assert not result["commit"].endswith("-dirty")


def test_the_time_of_a_spectral_report_is_the_committed_one() -> None:
    path = ROOT / "benchmarks" / "results" / "spectral_time.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    seconds = [result[structure]["seconds"] for structure in ("unstructured", "block")]
    sentence = f"takes {seconds[0]:.0f} s unstructured and {seconds[1]:.0f} s in tiles of 128"
    assert sentence in ALL_TEXT.replace("\n", " ")
    assert result["unstructured"]["num_layers"] == 48
    assert not result["commit"].endswith("-dirty")


def test_the_loss_jump_is_the_committed_one() -> None:
    path = ROOT / "benchmarks" / "results" / "loss_jump.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert load_script("benchmarks/loss_jump.py").table(result) in ALL_TEXT
    assert f"after {result['num_steps']:,} steps on the built-in corpus, has {result['dense']:.3f}" in ALL_TEXT
    assert all(result[key] for key in ("command", "machine", "versions", "commit"))
    assert not result["commit"].endswith("-dirty")


def test_the_cost_of_metrics_is_the_committed_one() -> None:
    path = ROOT / "benchmarks" / "results" / "metrics_cost.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    shares = [result[structure]["share_of_training_time"] for structure in ("unstructured", "block")]
    assert max(shares) < 0.01
    assert f"{100 * shares[0]:.2f}% (unstructured) and {100 * shares[1]:.2f}% (block)" in ALL_TEXT.replace("\n", " ")
    assert (result["log_every_steps"], result["update_every_steps"]) == (10, 100)
    assert result["command"].endswith("benchmarks/metrics_cost.py benchmarks/results/metrics_cost.json")
    assert result["machine"]
    assert result["versions"]
    assert not result["commit"].endswith("-dirty")
