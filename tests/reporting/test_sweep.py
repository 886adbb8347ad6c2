"""What a sweep says: best settings, intervals, edges, failures, and the files of its result."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparseift_llm.reporting.sweep import (
    Setting,
    best_of,
    check_output,
    difference_interval,
    edges,
    settings_of,
    sweep_table,
    t_interval,
    write_sweep,
)
from sparseift_llm.runs.sweep import Outcome
from sparseift_llm.runs.sweep_plan import Axis, Sweep, SweepRun, plan_sweep
from tests.helpers.pretrain_runs import tiny_recipe

RATES = Axis("training.learning_rate", "learning_rate", (0.004, 0.016, 0.008))
FACTORS = Axis("training.embedding_lr_factor", "embedding_lr_factor", (1, 3, 6))
Loss = Callable[[SweepRun], float | None]


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Three rates, three factors and two seeds, sparse and dense."""
    words = ["--learning_rate", "4e-3,8e-3,16e-3", "--embedding_lr_factor", "1,3,6"]
    recipe = tiny_recipe(tmp_path, {"sparsity": 0.5})
    return plan_sweep(recipe, words, output=tmp_path / "sweep", seeds=[0, 1], dense_twin=True)


def bowl(run: SweepRun) -> float:
    """Best at 0.008 and 3 for sparse, at 0.016 and 1 for dense; seed 1 is 0.02 above seed 0."""
    rate, factor = (0.008, 3) if run.arm == "sparse" else (0.016, 1)
    distance = abs(run.settings["learning_rate"] - rate) * 10 + abs(run.settings["embedding_lr_factor"] - factor) * 0.1
    return (3.0 if run.arm == "sparse" else 3.5) + distance + 0.02 * run.seed


def outcomes(sweep: Sweep, loss: Loss = bowl) -> list[Outcome]:
    found = [(run, loss(run)) for run in sweep.runs]
    return [Outcome(run, value, "exit status 1: out of memory" if value is None else None) for run, value in found]


def test_interval_by_hand() -> None:
    """Of 1, 2, 3: mean 2, standard error 1 / sqrt(3), t of two degrees of freedom 4.302653."""
    low, high = t_interval([1.0, 2.0, 3.0])  # type: ignore[misc]
    assert (low, high) == (pytest.approx(2 - 4.302653 / 3**0.5), pytest.approx(2 + 4.302653 / 3**0.5))
    assert t_interval([3.0, 3.02], 0.5) == (pytest.approx(3.0), pytest.approx(3.02))  # t is 1 and the error 0.01
    assert t_interval([1.0]) is None


def test_interval_of_a_difference_by_hand() -> None:
    """Equal variances and numbers: 4 degrees of freedom, t = 2.776, and the standard error sqrt(2 / 3)."""
    low, high = difference_interval([11.0, 12.0, 13.0], [1.0, 2.0, 3.0])  # type: ignore[misc]
    assert (low, high) == (pytest.approx(10 - 2.2671, abs=1e-3), pytest.approx(10 + 2.2671, abs=1e-3))
    assert difference_interval([1.0, 2.0], [1.0]) is None


@pytest.mark.parametrize(
    ("rate", "factor", "words"),
    [
        (0.008, 3, []),
        (0.016, 3, ["best at the largest learning_rate tried"]),  # the largest is not the last one given
        (0.004, 3, ["best at the smallest learning_rate tried"]),
        (0.008, 6, ["best at the largest embedding_lr_factor tried"]),
        (0.004, 1, ["best at the smallest learning_rate tried", "best at the smallest embedding_lr_factor tried"]),
    ],
)
def test_edges(rate: float, factor: int, words: list[str]) -> None:
    best = Setting({"learning_rate": rate, "embedding_lr_factor": factor}, (3.0,), 1)
    assert edges(best, [RATES, FACTORS]) == words


def test_words_and_truth_values_have_no_edge() -> None:
    axes = [Axis("training.optim", "optim", ("sgd", "adamw_torch")), Axis("training.bf16", "bf16", (False, True))]
    assert edges(Setting({"optim": "sgd", "bf16": True}, (3.0,), 1), axes) == []


def test_the_best_is_by_the_mean_over_seeds_and_has_all_of_them() -> None:
    settings = [Setting({"a": 1}, (2.0, 4.0), 2), Setting({"a": 2}, (2.9, 2.9), 2), Setting({"a": 3}, (1.0,), 2)]
    assert best_of(settings) is settings[1]
    assert best_of(settings[2:]) is None


def test_table_by_hand(sweep: Sweep) -> None:
    """Two seeds 0.02 apart: a mean 0.01 above the first, and a standard error of 0.01 times t = 12.7062."""
    lines = sweep_table(sweep, outcomes(sweep)).splitlines()
    assert lines[:4] == [
        "| arm | best setting | held-out loss | 95% interval | seeds | edges |",
        "| --- | --- | ---: | --- | ---: | --- |",
        "| dense | learning_rate 0.016, embedding_lr_factor 1 | 3.5100 | 3.3829 to 3.6371 | 2 | "
        "best at the largest learning_rate tried; best at the smallest embedding_lr_factor tried |",
        "| sparse | learning_rate 0.008, embedding_lr_factor 3 | 3.0100 | 2.8829 to 3.1371 | 2 |  |",
    ]
    assert "without a result" not in "".join(lines)


def test_failed_and_diverged_runs_are_named_and_not_compared(sweep: Sweep) -> None:
    lost = {
        "sparse_learning_rate-0.008_embedding_lr_factor-3_seed-1": None,
        "dense_learning_rate-0.016_embedding_lr_factor-1_seed-0": math.nan,
    }
    found = outcomes(sweep, lambda run: lost.get(run.name, bowl(run)))
    text = sweep_table(sweep, found)
    assert "| sparse | learning_rate 0.004, embedding_lr_factor 3 | 3.0500 |" in text
    assert "| dense | learning_rate 0.008, embedding_lr_factor 1 | 3.5900 |" in text
    failed, diverged = lost
    assert f"| {failed} | exit status 1: out of memory | {sweep.output / failed}.log |" in text
    assert f"| {diverged} | diverged: held-out loss nan | {sweep.output / diverged}.log |" in text
    assert len(settings_of("sparse", sweep, found)) == 9
    nothing = sweep_table(sweep, outcomes(sweep, lambda run: None))
    assert "| dense | none has a finite loss for every seed |  |  | 2 |  |" in nothing


def test_files_of_the_result(sweep: Sweep) -> None:
    found = outcomes(sweep, lambda run: math.inf if run.name == sweep.runs[0].name else bowl(run))
    text = write_sweep(sweep, found, has_picture=True)
    assert text.startswith((sweep.output / "sweep.md").read_text())
    assert (sweep.output / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    values: dict[str, Any] = json.loads((sweep.output / "sweep.json").read_text(), parse_constant=pytest.fail)
    assert values["best"]["sparse"]["settings"] == {"learning_rate": 0.008, "embedding_lr_factor": 3}
    assert values["best"]["sparse"]["eval_loss"] == pytest.approx(3.01)
    assert values["best"]["sparse"]["edges"] == []
    assert [len(values["runs"]), values["seeds"]] == [36, [0, 1]]
    first, second = values["runs"][:2]
    assert (first["state"], first["eval_loss"]) == ("diverged", None)
    assert second == {
        "name": "dense_learning_rate-0.004_embedding_lr_factor-3_seed-0",
        "arm": "dense",
        "settings": {"learning_rate": 0.004, "embedding_lr_factor": 3},
        "seed": 0,
        "state": "finished",
        "eval_loss": pytest.approx(3.82),
        "failure": None,
        "folder": "dense_learning_rate-0.004_embedding_lr_factor-3_seed-0",
        "log": "dense_learning_rate-0.004_embedding_lr_factor-3_seed-0.log",
    }
    check_output(sweep, has_picture=True)  # its own files may be written again
    write_sweep(sweep, found, has_picture=False)
    assert not (sweep.output / "sweep.png").exists()


def test_the_picture_has_a_panel_for_every_arm_and_a_line_for_every_factor(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: (drawn.append(self), path.touch()))
    write_sweep(sweep, outcomes(sweep), has_picture=True)
    (figure,) = drawn
    assert [panel.get_title() for panel in figure.axes] == ["dense", "sparse"]
    for panel, best in zip(figure.axes, ((0.016, 3.51), (0.008, 3.01)), strict=True):
        lines = {line.get_label(): line.get_xydata() for line in panel.get_lines()}
        assert {name for name in lines if not str(name).startswith("_")} == {
            *(f"embedding_lr_factor {value}" for value in (1, 3, 6)),
            "best",
        }
        assert tuple(lines["best"][0]) == pytest.approx(best)
        assert [x for x, _ in lines["embedding_lr_factor 3"]] == [0.004, 0.008, 0.016]
    assert lines["embedding_lr_factor 3"][0][1] == pytest.approx(3.05)


@pytest.mark.parametrize("words", [[], ["--optim", "adamw_torch,sgd"]])
def test_pictures_without_axes_or_with_words(tmp_path: Path, words: list[str]) -> None:
    sweep = plan_sweep(tiny_recipe(tmp_path), words, output=tmp_path / "sweep")
    write_sweep(sweep, outcomes(sweep, lambda run: 3.0), has_picture=True)
    assert (sweep.output / "sweep.png").stat().st_size > 1000


def test_without_matplotlib_the_picture_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    sweep = plan_sweep(tiny_recipe(tmp_path), output=tmp_path)
    with pytest.raises(ValueError, match=r"pip install 'sparseift_llm\[plot\]', or give --no-picture"):
        check_output(sweep, has_picture=True)
    check_output(sweep, has_picture=False)


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "sweep.md").write_text("mine")
    with pytest.raises(ValueError, match=r"sweep.md is there already, and not from sparseift sweep"):
        check_output(plan_sweep(tiny_recipe(tmp_path), output=tmp_path), has_picture=False)


def test_the_results_of_another_recipe_are_not_replaced(sweep: Sweep, tmp_path: Path) -> None:
    write_sweep(sweep, outcomes(sweep), has_picture=False)
    recipe = Path(sweep.words[0])
    check_output(plan_sweep(recipe, ["--learning_rate", "1e-3"], output=sweep.output), has_picture=False)
    moved, other = tmp_path / "moved" / recipe.name, tmp_path / "other.yaml"
    moved.parent.mkdir()
    for path in (moved, other):
        path.write_text(recipe.read_text())
    check_output(plan_sweep(moved, output=sweep.output), has_picture=False)
    with pytest.raises(ValueError, match=rf"holds the results of a sweep of {recipe.name}, .* another --output"):
        check_output(plan_sweep(other, output=sweep.output), has_picture=False)
    (sweep.output / "sweep.json").write_text('{"format": "sparseift_sweep_v1", "words": [')  # cut off
    check_output(plan_sweep(other, output=sweep.output), has_picture=False)
