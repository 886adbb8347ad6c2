"""Run folders as one object. What a page says of damaged folders is in tests/reporting/test_page_damage.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparseift_llm.cli import main
from sparseift_llm.reporting.comparison import HEADLINES
from sparseift_llm.runs.folder import read_folder, read_summary
from sparseift_llm.runs.formats import SUMMARY_KEYS, WRITTEN_NAMES
from tests.helpers.html_pages import log_lines, parse, write_full_run
from tests.helpers.paths import ROOT


def trainer_state(step: int, max_steps: int = 6, tokens: bool = False) -> dict[str, Any]:
    """A Trainer's state after `step` steps, each with a line of its log."""
    lines = [{key: value for key, value in line.items() if not key.startswith("train_")} for line in log_lines(step)]
    for line in lines:
        del line["wall_seconds"]
        if tokens:
            line["num_input_tokens_seen"] = 128 * line["step"]
    end = {"step": step, "train_runtime": 9.0, "train_loss": 2.0}
    return {"global_step": step, "max_steps": max_steps, "log_history": [*lines, end], "stateful_callbacks": {}}


def write_trainer_folder(folder: Path, final: bool = True, tokens: bool = False) -> Path:
    """What a plain Trainer with a SparseTrainingCallback leaves: checkpoints, `layers.jsonl`, perhaps a final model."""
    write_full_run(folder)
    for name in ("summary.json", "recipe.json", "metrics.jsonl", "spectral.json", "eval_tiny.json"):
        (folder / name).unlink()
    for step in (2, 4):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text(json.dumps(trainer_state(step, tokens=tokens)))
        for name in ("config.json", "sparse_masks.safetensors"):
            shutil.copy(folder / name, checkpoint / name)
    if final:
        (folder / "trainer_state.json").write_text(json.dumps(trainer_state(6, tokens=tokens)))
    else:
        for name in ("config.json", "sparse_masks.safetensors"):
            (folder / name).unlink()
    return folder


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_folder(write_full_run(tmp_path / "run"))
    assert (run.state, run.problems, run.open_ends, run.remarks) == ("finished", (), (), ())
    assert run.step == 6
    assert run.metrics.lines == tuple(log_lines())
    assert run.config["training"] == {"max_steps": 6, "learning_rate": 0.01}
    assert [entry["step"] for entry in run.spectral] == [2, 4, 6]
    assert list(run.evaluations) == ["eval_tiny.json"]
    assert set(run.kinds.values()) == {"qkv", "mlp_in"}


def test_the_committed_runs_are_read() -> None:
    for name in ("dense", "sparse"):
        path = ROOT / "benchmarks" / "results" / "demo" / name
        run = read_folder(path)
        assert (run.state, run.problems) == ("finished", ())
        assert read_summary(path) == run.summary.values


def test_a_finished_folder_of_a_trainer(tmp_path: Path) -> None:
    run = read_folder(write_trainer_folder(tmp_path / "run", tokens=True))
    assert (run.state, run.step, run.is_readable) == ("finished", 6, True)
    assert [line["step"] for line in run.metrics.lines] == [line["step"] for line in log_lines()]
    assert all(line["train_tokens"] == 128 * line["step"] for line in run.metrics.lines)
    assert run.config == {"sparse_ift": json.loads((tmp_path / "run" / "config.json").read_text())["sparse_ift"]}


def test_an_unfinished_folder_of_a_trainer(tmp_path: Path) -> None:
    folder = write_trainer_folder(tmp_path / "run", final=False)
    run = read_folder(folder)
    assert (run.state, run.step) == ("unfinished", None)  # there is no final model
    assert run.open_ends == ("the newest trainer_state.json is of step 4 of 6",)
    assert run.metrics.lines[-1]["step"] == 4
    assert "sparse_ift" in run.config
    (folder / "checkpoint-4" / "trainer_state.json").write_text("{")  # killed while it was written
    assert read_folder(folder).metrics.lines[-1]["step"] == 2
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "checkpoint-2")
    left = read_folder(folder)
    assert (left.state, left.is_readable) == ("unfinished", True)
    assert left.open_ends == ("whether it reached its end is not known: there is no trainer_state.json",)


def test_a_damaged_state_of_a_trainer(tmp_path: Path) -> None:
    folder = write_trainer_folder(tmp_path / "run")
    (folder / "trainer_state.json").write_text("{")
    run = read_folder(folder)
    assert run.state == "broken"
    assert run.problems[0].startswith("trainer_state.json is truncated or damaged")
    assert run.metrics.lines[-1]["step"] == 4
    assert run.step is None


@pytest.mark.parametrize("tokens", [True, False])
def test_a_page_about_a_folder_of_a_trainer(tokens: bool, tmp_path: Path) -> None:
    """Losses are drawn over tokens where the Trainer counted them, else over steps; masks and layers in any case."""
    folder, page = write_trainer_folder(tmp_path / "run", tokens=tokens), tmp_path / "report.html"
    assert main(["report", str(folder), "-o", str(page)]) == 0
    root = parse(page.read_text(encoding="utf-8"))
    assert switches(root) == (["x-tokens"] if tokens else ["x-steps"])
    assert len(root.by_id("loss").all("svg", "chart")) == 2
    assert root.by_id("degrees").all("svg")
    assert root.by_id("masks").all("svg")


def test_both_kinds_of_folders_side_by_side(tmp_path: Path) -> None:
    folders, page = [write_full_run(tmp_path / "a"), write_trainer_folder(tmp_path / "b")], tmp_path / "report.html"
    assert main(["report", *map(str, folders), "-o", str(page)]) == 0
    root = parse(page.read_text(encoding="utf-8"))
    assert switches(root) == ["x-flops", "x-tokens", "x-time", "x-steps"]


def switches(root: Any) -> list[str]:
    """The ids of the buttons that choose the horizontal axis of the losses."""
    return [
        item.attributes["id"] for item in root.by_id("loss").all("input") if item.attributes.get("name") == "x-axis"
    ]


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    for name, word in (("a", "a file"), ("b", "missing")):
        with pytest.raises(ValueError, match=rf"{name} is {word}: a run is an output folder"):
            read_folder(tmp_path / name)


def test_the_headlines_are_those_of_a_summary() -> None:
    assert {key for _, key, _ in HEADLINES} == set(SUMMARY_KEYS)


def test_names_of_files_are_declared_once() -> None:
    """No string of the package spells the name of a run's file, except where it is declared."""
    declared = {"metrics.jsonl", "recipe.json", "summary.json", "layers.jsonl", "spectral.json", "trainer_state.json"}
    assert declared <= {name.rpartition("/")[2] for name in WRITTEN_NAMES}
    spelled = [
        (name, path.relative_to(ROOT).as_posix())
        for path in sorted((ROOT / "sparseift_llm").rglob("*.py"))
        for name in (*declared, "sparse_masks.safetensors", "sparse_history.safetensors")
        if f'"{name}"' in path.read_text(encoding="utf-8")
    ]
    assert sorted(spelled) == [
        ("layers.jsonl", "sparseift_llm/trainer/log.py"),
        ("metrics.jsonl", "sparseift_llm/runs/formats.py"),
        ("recipe.json", "sparseift_llm/runs/formats.py"),
        ("sparse_history.safetensors", "sparseift_llm/trainer/log.py"),
        ("sparse_masks.safetensors", "sparseift_llm/checkpoints/mask_file.py"),
        ("spectral.json", "sparseift_llm/runs/formats.py"),
        ("summary.json", "sparseift_llm/runs/formats.py"),
    ]
