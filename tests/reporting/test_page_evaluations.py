"""Evaluations on the page: seeds of a kind belong together, differences have intervals, and what lacks them is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseift_llm.evaluation.comparison import compare, read_arm
from sparseift_llm.evaluation.harness import TaskResult
from sparseift_llm.evaluation.result_file import ResultFile
from sparseift_llm.evaluation.suites import Headline, Score, Suite
from sparseift_llm.reporting.page.evaluations import difference_tables
from sparseift_llm.reporting.page.page import write_report
from sparseift_llm.reporting.page.runs import read_runs
from tests.helpers.html_pages import parse, table_rows, write_full_run

SUITE = Suite("tiny", (Headline("pick", (Score("pick"),)),), {"average": ("pick",)})


def write_run(folder: Path, rate: float, seed: int, sparsity: float) -> Path:
    """A run with an evaluation of 300 items."""
    write_full_run(folder)
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    summary["config"]["sparse_ift"]["sparsity"] = sparsity
    summary["config"]["training"]["seed"] = seed
    path.write_text(json.dumps(summary))
    (folder / "eval_tiny.json").unlink()
    answers = [float(x) for x in np.random.default_rng([seed, int(100 * sparsity)]).random(300) < rate]
    file = ResultFile(folder / "eval_tiny.json", {}, {"pick": {}}, resume=False)
    leaf = {"version": 1, "num_fewshot": 0, "num_items": 300, "task_hash": "x", "truncated_items": 4}
    items: list[dict[str, Any]] = [{"id": i, "values": {"acc,none": value}} for i, value in enumerate(answers)]
    file.add("pick", TaskResult({**leaf, "metrics": {"acc,none": float(np.mean(answers))}}, items, [], {}))
    file.finish(SUITE, {"name": str(folder), "sha256": str(folder), "run": {"seed": seed}})
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / f"{kind}{seed}", rate + 0.02 * seed, seed, sparsity)
        for kind, rate, sparsity in (("dense", 0.4, 0.0), ("sparse", 0.6, 0.75))
        for seed in range(3)
    ]


def test_seeds_of_a_kind_are_put_together(runs: list[Path]) -> None:
    output = runs[0].parent / "report.html"
    write_report(runs, output)
    root = parse(output.read_text(encoding="utf-8"))
    caption = "eval_tiny.json: differences to dense0, dense1, dense2"
    rows = table_rows(root, caption)
    arms = [read_arm(",".join(str(run / "eval_tiny.json") for run in runs[start : start + 3])) for start in (0, 3)]
    expected = compare(arms, 1000)["rows"][0]
    entry = expected["differences"][0]
    values = [f"{value:.2%}" for value in expected["values"]]
    clear = " *" if entry["is_clear"] else ""
    interval = f"{entry['difference']:+.2%} ({entry['low']:+.2%} to {entry['high']:+.2%}){clear}"
    assert rows["tasks"][0] == ["pick", "acc", *values, interval]
    assert rows["models"] == [["training seeds", "", "3", "3", ""]]
    text = root.by_id("evaluation").text
    assert "The spread between training seeds is in the intervals by the t distribution." in text
    assert "Differences of sparse0, sparse1, sparse2 are taken seed by seed" in text
    assert "300 items, 4 truncated" in text


def test_runs_that_are_not_seeds_of_each_other_stand_alone(runs: list[Path]) -> None:
    """The same seed twice, or another setting, makes another kind."""
    values = json.loads((runs[1] / "eval_tiny.json").read_text())
    values["model"]["run"]["seed"] = 0
    (runs[1] / "eval_tiny.json").write_text(json.dumps(values))
    (found,) = difference_tables(read_runs(runs))
    assert found.table is not None
    assert [cell for cell in found.table.header if cell.endswith("mean score")] == [
        "dense0: mean score",
        "dense1: mean score",
        "dense2: mean score",
        "sparse0, sparse1, sparse2: mean score",
    ]


def test_a_single_kind_has_no_differences(runs: list[Path]) -> None:
    assert difference_tables(read_runs(runs[:3])) == []


@pytest.mark.parametrize("damage", ["items", "shots"])
def test_why_there_are_no_intervals_is_said(runs: list[Path], damage: str) -> None:
    if damage == "items":
        (runs[4] / "eval_tiny.items" / "pick.jsonl").unlink()
        message = "differences have no intervals (the item records"
    else:
        values = json.loads((runs[4] / "eval_tiny.json").read_text())
        values["subtasks"]["pick"]["num_fewshot"] = 5
        (runs[4] / "eval_tiny.json").write_text(json.dumps(values))
        message = "cannot be compared: pick: the number of shots is 0 and 5"
    (found,) = difference_tables(read_runs(runs))
    assert found.table is None
    assert message in found.notes[0]
