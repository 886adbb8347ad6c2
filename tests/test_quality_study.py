"""The study of tile sizes and families: its rows, its table, and the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from sparseift_llm.recipe import load_recipe
from tests.scripts import load_script

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script("benchmarks/quality_study.py")


def write_result(results: Path, study: str, name: str, rate: float, loss: float, flops: int = 100) -> None:
    path = results / study / f"{name}-lr{rate:g}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"eval_loss": loss, "forward_flops_per_token": flops}))


@pytest.mark.parametrize("name", ["tiles", "families"])
def test_rows_are_valid_recipes_with_names_of_their_own(study: ModuleType, name: str) -> None:
    rows = study.STUDIES[name].rows
    assert len({row.name for row in rows}) == len(rows)
    assert rows[0].sparse is None
    for row in rows:
        recipe = load_recipe(study.RECIPE, ["--output_dir", "x", *row.overrides()])
        assert (recipe.sparse_ift is None) == (row.sparse is None)
        assert recipe.sparse_ift is None or recipe.sparse_ift.sparsity == 0.75


def test_the_table_marks_the_best_rate_and_leaves_open_what_is_missing(study: ModuleType, tmp_path: Path) -> None:
    write_result(tmp_path, "families", "dense", 8e-3, 3.5)
    write_result(tmp_path, "families", "dense", 4e-3, 3.25)
    write_result(tmp_path, "families", "doped", 4e-3, 3.75, flops=150)
    (tmp_path / "families" / "times.json").write_text(json.dumps({"step_seconds": {"dense": 0.5, "doped": 0.75}}))
    lines = study.table("families", tmp_path).splitlines()
    assert lines[2] == "| dense | **3.2500** | 3.5000 |  | 1.00x | 1.00x |"
    assert lines[-1] == "| Doped | **3.7500** |  |  | 1.50x | 1.50x |"
    assert lines[3] == "| Wide, scope model |  |  |  |  |  |"


def test_the_table_of_families_is_the_committed_one(study: ModuleType) -> None:
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert study.table("families", study.RESULTS) in text
    results = study.read_results("families", study.RESULTS)
    assert len(results) == len(study.STUDIES["families"].rows) * len(study.STUDIES["families"].rates)
    for (row, rate), summary in results.items():
        assert f"families/{row.name}-lr{rate:g}" in summary["command"]
        assert not summary["commit"].endswith("-dirty")
        assert summary["config"]["training"]["learning_rate"] == rate
    assert not json.loads((study.RESULTS / "families" / "times.json").read_text())["commit"].endswith("-dirty")
