"""The study of tile sizes, families and searches: its rows, its table, and the committed results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import pytest

from sparseift_llm.isoflop import default_block_size
from sparseift_llm.runs.recipe import load_recipe
from tests.helpers.pages import ALL_TEXT, PAGES
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script("benchmarks/quality_study.py")


def write_result(results: Path, study: str, name: str, rate: float, loss: float, flops: int = 100) -> None:
    path = results / study / f"{name}-lr{rate:g}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"eval_loss": loss, "forward_flops_per_token": flops}))


@pytest.mark.parametrize("name", ["tiles", "seeds", "families", "rates", "search"])
def test_rows_are_valid_recipes_with_names_of_their_own(study: ModuleType, name: str) -> None:
    rows = study.STUDIES[name].rows
    assert len({row.name for row in rows}) == len(rows)
    assert [row.sparse for row in rows].count(None) == {"seeds": 3, "rates": 3, "search": 0}.get(name, 1)
    for row in rows:
        recipe = load_recipe(study.RECIPE, ["--output_dir", "x", *row.overrides()])
        assert (recipe.sparse_ift is None) == (row.sparse is None)
        assert recipe.training["seed"] == row.seed
        assert recipe.sparse_ift is None or (recipe.sparse_ift.sparsity, recipe.sparse_ift.seed) == (0.75, row.seed)


def test_the_table_marks_the_best_rate_and_leaves_open_what_is_missing(study: ModuleType, tmp_path: Path) -> None:
    write_result(tmp_path, "families", "dense", 8e-3, 3.5)
    write_result(tmp_path, "families", "dense", 4e-3, 3.25)
    write_result(tmp_path, "families", "doped", 4e-3, 3.75, flops=150)
    (tmp_path / "families" / "times.json").write_text(json.dumps({"step_seconds": {"dense": 0.5, "doped": 0.75}}))
    lines = study.table("families", tmp_path).splitlines()
    assert lines[2] == "| dense | **3.2500** | 3.5000 |  | 1.00x | 1.00x |"
    assert lines[-1] == "| Doped | **3.7500** |  |  | 1.50x | 1.50x |"
    assert lines[3] == "| Wide, scope model |  |  |  |  |  |"


def test_the_table_of_seeds(study: ModuleType, tmp_path: Path) -> None:
    for name, loss in (("dense", 2.5), ("dense-seed1", 2.25), ("dense-seed2", 2.0), ("mask-rigl-seed1", 3.0)):
        write_result(tmp_path, "tiles", name, 8e-3, loss)
    lines = study.seed_table("seeds", tmp_path).splitlines()
    assert lines[2] == "| dense | 2.5000 | 2.2500 | 2.0000 | 2.2500 |"
    assert lines[3] == "| Wide, unstructured, rigl |  | 3.0000 |  |  |"


def test_the_table_of_the_search_compares_with_static_masks(study: ModuleType, tmp_path: Path) -> None:
    for name, losses in {"mask-static": (2.5, 2.51, 2.49), "mask-rigl": (2.6, 2.61, 2.59), "tile8-set": (1, 2)}.items():
        for seed, loss in enumerate(losses):
            write_result(tmp_path, "search", f"{name}-seed{seed}" if seed else name, study.SEARCH_RATE, loss)
    lines = {line.split("|")[1].strip(): line for line in study.seed_table("search", tmp_path).splitlines()}
    assert lines["single weights, static"].endswith("| 2.5000 |  |")
    # the difference of means has the standard error sqrt(2 * 0.01**2 / 3) and 4 degrees of freedom: t = 2.776
    assert lines["single weights, rigl"].endswith("| 2.6000 | -0.100 (-0.123 to -0.077) |")
    assert lines["tiles of 8, set"].endswith("| 1.0000 | 2.0000 |  |  |  |")


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("families", "families.md"),
        ("tiles", "block.md"),
        ("seeds", "block.md"),
        ("search", "concepts/mask-updates.md"),
    ],
)
def test_the_table_is_the_committed_one(study: ModuleType, name: str, page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    make_table = study.seed_table if name in study.REPEATED else study.table
    assert make_table(name, study.RESULTS) in text
    results = study.read_results(name, study.RESULTS)
    assert len(results) == len(study.STUDIES[name].rows) * len(study.STUDIES[name].rates)
    folder = study.STUDIES[name].folder
    for (row, rate), summary in results.items():
        assert f"{folder}/{row.name}-lr{rate:g}" in summary["command"]
        assert not summary["commit"].endswith("-dirty")
        assert summary["config"]["training"]["learning_rate"] == rate
    if name != "search":  # of which no step was timed
        assert not json.loads((study.RESULTS / folder / "times.json").read_text())["commit"].endswith("-dirty")


def test_the_search_has_the_rates_that_were_best_for_static_masks(study: ModuleType) -> None:
    """Twice and half of each were tried, and are worse."""
    loss = {
        (rate, row.embedding_factor): summary["eval_loss"]
        for (row, rate), summary in study.read_results("rates", study.RESULTS).items()
        if row.sparse is not None
    }
    rate, factor = study.SEARCH_RATE, study.SEARCH_EMBEDDING_FACTOR
    assert min(loss, key=lambda rates: loss[rates]) == (rate, factor)
    assert {(2 * rate, factor), (rate / 2, factor), (rate, 2 * factor), (rate, factor / 2)} <= set(loss)


def search_means(study: ModuleType) -> dict[str, float]:
    """Mean held-out loss over the seeds, by the name of the row with the first seed."""
    losses: dict[str, list[float]] = {}
    for (row, _), summary in study.read_results("search", study.RESULTS).items():
        losses.setdefault(row.name.removesuffix(f"-seed{row.seed}"), []).append(summary["eval_loss"])
    return {name: sum(values) / len(values) for name, values in losses.items()}


def test_what_the_docs_say_of_the_search(study: ModuleType) -> None:
    text, mean = " ".join(PAGES["docs/concepts/mask-updates.md"].split()), search_means(study)
    losses = {
        row.name: summary["eval_loss"] for (row, _), summary in study.read_results("search", study.RESULTS).items()
    }
    suffixes = [f"-seed{seed}" if seed else "" for seed in study.SEEDS]
    for kind in ("mask", "tile8", "tile32"):
        assert all(losses[f"{kind}-static{suffix}"] < losses[f"{kind}-rigl{suffix}"] for suffix in suffixes)
        assert mean[f"{kind}-static"] < mean[f"{kind}-set"]
    apart = mean["mask-rigl-kinds-together"] - mean["mask-rigl"]
    connected = mean["tile32-rigl-keep_connected-false"] - mean["tile32-rigl"]
    assert f"(`kinds_apart`) gain RigL {apart:.3f} nats" in text
    assert f"(`keep_connected`) {connected:.3f}." in text
    smooth = mean["tile32-rigl-drop_fraction-0.1-drop_by-saliency-soft_growth-true"]
    better, worse = mean["tile32-rigl"] - smooth, smooth - mean["tile32-static"]
    assert f"is {better:.3f} better, and still {worse:.3f} worse than static" in text
    for kind in ("mask", "tile32"):
        for state in ("row_mean", "own_count"):
            assert abs(mean[f"{kind}-rigl-grown_state-{state}"] - mean[f"{kind}-rigl"]) < 0.015
    assert sum(losses[f"mask-granet{suffix}"] > 3.5 for suffix in suffixes) == 2


def best_losses(study: ModuleType, name: str) -> dict[str, float]:
    """Each row's held-out loss at its best learning rate."""
    best: dict[str, float] = {}
    for (row, _), summary in study.read_results(name, study.RESULTS).items():
        best[row.name] = min(best.get(row.name, math.inf), summary["eval_loss"])
    return best


def test_the_default_tile_follows_from_the_study(study: ModuleType) -> None:
    """Halving a tile gains less than the time that it costs would, spent on more tokens."""
    best, short = best_losses(study, "tiles"), best_losses(study, "families")
    longer = study.STUDIES["tiles"].max_steps / study.STUDIES["families"].max_steps
    gain_of_time = (short["dense"] - best["dense"]) / math.log(longer)  # of the dense model, per e-fold of tokens
    seconds = json.loads((study.RESULTS / "tiles" / "times.json").read_text())["step_seconds"]
    assert default_block_size(study.WIDE_HIDDEN) == 32
    for algorithm in ("static", "rigl"):
        for tile in (16, 8):
            small, large = f"tile{tile}-{algorithm}", f"tile{2 * tile}-{algorithm}"
            assert best[large] - best[small] < gain_of_time * math.log(seconds[small] / seconds[large])


def test_the_prose_about_tiles_has_the_figures_of_the_study(study: ModuleType) -> None:
    text = " ".join((ROOT / "docs" / "block.md").read_text(encoding="utf-8").split())
    best, short = best_losses(study, "tiles"), best_losses(study, "families")
    seconds = json.loads((study.RESULTS / "tiles" / "times.json").read_text())["step_seconds"]
    slope = (short["dense"] - best["dense"]) / math.log(1920 / 640)
    times, gains = {}, {}
    for tile in (16, 8):
        pairs = [(f"tile{tile}-{kind}", f"tile{2 * tile}-{kind}") for kind in ("static", "rigl")]
        gains[tile] = sorted(best[large] - best[small] for small, large in pairs)
        times[tile] = sum(seconds[small] / seconds[large] for small, large in pairs) / 2
    assert f"{gains[16][0]:.3f} to {gains[16][1]:.3f} nats for {times[16]:.2f} times the step time" in text
    assert f"halving again {gains[8][0]:.3f} to {gains[8][1]:.3f} for {times[8]:.2f} times" in text
    assert f"gains {slope:.3f} nats per e-fold of tokens (640 steps: {short['dense']:.3f}" in text
    assert f"which is {slope * math.log(times[16]):.2f} and {slope * math.log(times[8]):.2f}." in text
    flops = {
        row.name: value["forward_flops_per_token"]
        for (row, _), value in study.read_results("tiles", study.RESULTS).items()
    }
    more = flops["tile32-static"] / flops["dense"]
    slower = (seconds["tile32-static"] + seconds["tile32-rigl"]) / 2 / seconds["dense"]
    same_flops, same_time = (best["dense"] - slope * math.log(factor) for factor in (more, slower))
    assert f"{more:.2f} times the tokens would take the dense model to {same_flops:.2f}" in text
    assert f"the {slower:.2f} times that a step with tiles of 32 takes to {same_time:.2f}" in text


def test_what_the_docs_say_of_rigl_holds_for_every_seed(study: ModuleType) -> None:
    losses = {
        row.name: summary["eval_loss"] for (row, _), summary in study.read_results("seeds", study.RESULTS).items()
    }
    suffixes = [f"-seed{seed}" if seed else "" for seed in study.SEEDS]
    mean = {
        name: sum(losses[name + suffix] for suffix in suffixes) / len(suffixes)
        for name in ("dense", "mask-static", "mask-rigl", "tile32-static", "tile32-rigl")
    }
    for suffix in suffixes:
        for moved in ("tile32-rigl", "tile32-rigl-drop0.1"):
            assert losses[f"tile32-static{suffix}"] < losses[moved + suffix]
    gain = {name: mean["dense"] - value for name, value in mean.items()}
    assert gain["tile32-static"] / gain["mask-static"] == pytest.approx(3 / 4, abs=0.05)
    assert gain["tile32-rigl"] / gain["mask-rigl"] == pytest.approx(1 / 6, abs=0.05)
    assert f"({mean['mask-rigl']:.3f} and {mean['mask-static']:.3f}, three seeds)" in ALL_TEXT
    for tile in (8, 16, 32):
        best = best_losses(study, "tiles")
        assert best[f"tile{tile}-static"] < best[f"tile{tile}-rigl"]
