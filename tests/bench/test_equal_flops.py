"""The study at equal whole-model FLOPs: its rows, its search and its table."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sparseift_llm.planning.cost import count_flops
from sparseift_llm.planning.planner import plan
from sparseift_llm.runs.model import model_config
from sparseift_llm.runs.recipe import load_recipe
from tests.helpers.equal_flops import corpus_word, write_result
from tests.helpers.paths import ROOT


@pytest.mark.parametrize(
    "name",
    [
        "width64",
        "width128",
        "width256",
        "width1024",
        "width64-layers8",
        "width128-starcoder2",
        "width64-layers8-starcoder2",
    ],
)
def test_every_row_costs_what_the_dense_model_costs(
    study: ModuleType, rows: ModuleType, corpus: Any, name: str
) -> None:
    baseline = rows.Baseline.from_name(name)
    assert str(baseline) == name
    dense = rows.forward_flops(rows.dense_shape(baseline), rows.FFN_MATRICES[baseline.architecture])
    for row in (row for row in rows.ROWS if row.exists_at(baseline)):
        words = study.Search(row, baseline, corpus, None).overrides(study.Rates(4e-3, 2))
        recipe = load_recipe(study.RECIPE, [*words, "--output_dir=x"])
        config = model_config(recipe)
        config.vocab_size = recipe.data.vocab_size
        assert config.model_type == baseline.architecture
        if recipe.sparse_ift is None:
            flops = count_flops(config, recipe.data.seq_len).forward
        else:
            flops = plan(config, recipe.sparse_ift, recipe.data.seq_len).sparse.flops.forward
        assert flops == pytest.approx(dense, rel=1e-3), row.name
        assert (recipe.sparse_ift is None) == (row.sparse is None)
        assert (recipe.training["learning_rate"], recipe.training["embedding_lr_factor"]) == (4e-3, 2)


def bowl(study: ModuleType, rate: float, factor: float) -> Any:
    """Losses with the minimum at these rates, and every rate that was asked for."""
    tried: list[Any] = []

    def losses(wanted: list[Any]) -> Mapping[Any, float]:
        tried.extend(wanted)
        return {
            one: max(one.rate / rate, rate / one.rate)
            + max(one.embedding_factor / factor, factor / one.embedding_factor)
            for one in wanted
        }

    return losses, tried


@pytest.mark.parametrize(("rate", "factor"), [(8e-3, 4), (1e-3, 32), (0.128, 0.5)])
def test_the_search_ends_where_no_neighbour_is_better(study: ModuleType, rate: float, factor: float) -> None:
    losses, tried = bowl(study, rate, factor)
    best = study.climb(study.Rates(8e-3, 4), losses)
    assert (best.rate, best.embedding_factor) == pytest.approx((rate, factor))
    assert set(best.neighbours()) <= set(tried)


def test_regularisation_is_looked_for_where_that_is_asked(
    study: ModuleType, tables: ModuleType, corpus: Any, tmp_path: Path
) -> None:
    """The loss is lowest at a decay of 0.9 and a dropout of 0.2, each two steps away from the start."""
    start = study.Rates(8e-3, 4)

    def losses(wanted: list[Any]) -> Mapping[Any, float]:
        distance = {one: abs(math.log(one.rate / 8e-3)) + abs(math.log(one.embedding_factor / 4)) for one in wanted}
        found = {
            one: distance[one] + abs(math.log(one.weight_decay / 0.9)) + abs(one.attention_dropout - 0.2)
            for one in wanted
        }
        for one, loss in found.items():
            write_result(tmp_path / "novels" / "width64" / "dense", one, 0, loss)
        return found

    assert study.climb(start, losses) == start
    best = study.climb(start, losses, regularises=True)
    assert (best, str(best)) == (study.Rates(8e-3, 4, 0.9, 0.2), "lr0.008-emb4-wd0.9-drop0.2")
    line = tables.table(tmp_path).splitlines()[4]
    assert line.startswith("| dense | 0.008, 4x, decay 0.9, dropout 0.2 | 1.0000 | 0.0000 |")
    words = study.Search(study.BY_NAME["residual2"], study.Baseline(64), corpus, None).overrides(best)
    recipe = load_recipe(study.RECIPE, [*words, "--output_dir=x"])
    assert recipe.training["weight_decay"] == 0.9
    assert recipe.model.config["attention_dropout"] == 0.2


def test_rates_can_be_given_instead_of_a_search(
    study: ModuleType, corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(
        study.Search, "_train", lambda search, *run: write_result(search.result_path(*run).parent, *run, 4)
    )
    words = ["run", "dense", "residual2-tile128", "--corpus", corpus_word(corpus), "--width", "1024"]
    study.main([*words, "--at", "0.002,4", "--seeds", "5"])
    study.main([*words[:2], *words[3:], "--at", "0.002,4,0.3,0.1"])
    found = {str(path.relative_to(tmp_path / "novels" / "width1024")) for path in tmp_path.rglob("*.json")}
    assert found == {f"{row}/lr0.002-emb4-seed5.json" for row in ("dense", "residual2-tile128")} | {
        f"dense/lr0.002-emb4-wd0.3-drop0.1-seed{seed}.json" for seed in study.SEEDS
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--at", "0.002"], "must be RATE,FACTOR[,WEIGHT_DECAY,DROPOUT], such as 0.008,4"),
        (["--at", "0.002,4,0.1,0,7"], "must be RATE,FACTOR[,WEIGHT_DECAY,DROPOUT], such as 0.008,4"),
        (["--seeds", "5"], "--seeds goes with --at"),
        (["--at", "0.002,4", "--tune_regularisation"], "--tune_regularisation is for a search"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(
    study: ModuleType, corpus: Any, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        study.main(["run", "dense", "--corpus", corpus_word(corpus), *words])
    assert message in capsys.readouterr().err


def test_the_table_says_where_the_search_did_not_end_and_what_the_gain_is(
    study: ModuleType, tables: ModuleType, tmp_path: Path
) -> None:
    folder, best = tmp_path / "novels" / "width64", study.Rates(8e-3, 4)
    for rates in (best, *best.neighbours()):
        write_result(folder / "dense", rates, 0, 4.0 if rates == best else None)
    for seed, loss in ((1, 4.01), (2, 3.99)):
        write_result(folder / "dense", best, seed, loss)
    for seed, loss in ((0, 3.9), (1, 3.91), (2, 3.89)):
        write_result(folder / "residual2", best, seed, loss)
    lines = tables.table(tmp_path).splitlines()
    assert lines[0] == "novels, width 64"
    assert lines[4] == "| dense | 0.008, 4x | 1.0000 | 4.0000 | 3.975 to 4.025 | 3 |  |  |  |  |"
    # the difference of means has the standard error sqrt(2 * 0.01**2 / 3) and 4 degrees of freedom: t = 2.776
    assert lines[5].startswith("| residual, 2 times, single weights | 0.008, 4x (search not ended) | 1.0000 | 3.9000 |")
    assert lines[5].endswith("| 3 | +0.100 (+0.077 to +0.123) |  |  |  |")


def test_rates_with_all_seeds_are_compared_by_their_means(
    study: ModuleType, tables: ModuleType, tmp_path: Path
) -> None:
    """The rate that one seed liked best is given up once another is better over the seeds."""
    lucky, better, once = (study.Rates(rate, 4) for rate in (8e-3, 16e-3, 32e-3))
    for seed, loss in enumerate((3.90, 4.01, 4.02)):
        write_result(tmp_path, lucky, seed, loss)
    write_result(tmp_path, once, 0, 3.91)
    write_result(tmp_path, better, 0, 3.92)
    assert tables.best_of(tmp_path).rates == lucky
    write_result(tmp_path, better, 1, 3.93)
    assert tables.best_of(tmp_path).rates == lucky
    write_result(tmp_path, better, 2, 3.94)
    assert tables.best_of(tmp_path).rates == better


def test_the_table_says_what_the_dense_model_would_need(study: ModuleType, tables: ModuleType, tmp_path: Path) -> None:
    """0.2 nats for each doubling: a gain of 0.1 is worth half a doubling."""
    folder, rates = tmp_path / "novels" / "width64", study.Rates(8e-3, 4)
    for row, loss, flops in (("dense-half", 4.2, 50), ("dense", 4.0, 100), ("dense-double", 3.8, 200)):
        write_result(folder / row, rates, 0, loss, flops)
    write_result(folder / "residual2", rates, 0, 3.9)
    tables.times_path(tmp_path, study.Baseline(64)).write_text(
        json.dumps({"step_seconds": {"dense": 0.2, "residual2": 0.4}})
    )
    lines = tables.table(tmp_path).splitlines()
    assert [line.split("|")[9].strip() for line in lines[4:]] == ["1.00x", "", "", "2.00x"]
    assert [line.split("|")[10].strip() for line in lines[4:]] == ["", "", "", "-0.100"]
    assert [line.split("|")[3].strip() for line in lines[4:]] == ["1.0000", "0.5000", "2.0000", "1.0000"]
    assert [line.split("|")[8].strip() for line in lines[4:]] == ["", "0.50x", "2.00x", "1.41x"]


def test_a_row_of_another_length_gains_over_the_dense_model_of_its_length(
    study: ModuleType, tables: ModuleType, tmp_path: Path
) -> None:
    folder, rates = tmp_path / "novels" / "width64", study.Rates(8e-3, 4)
    for row, loss, flops in (("dense-half", 4.2, 50), ("dense", 4.0, 100), ("residual2-half", 4.1, 50)):
        write_result(folder / row, rates, 0, loss, flops)
    assert [line.split("|")[7].strip() for line in tables.table(tmp_path).splitlines()[4:]] == ["", "-0.200", "+0.100"]


def test_the_recipe_stands_beside_the_script(study: ModuleType) -> None:
    assert study.RECIPE == ROOT / "benchmarks" / "equal_flops.yaml"
    assert load_recipe(study.RECIPE, []).model.config["hidden_size"] == 128


def test_rows_of_other_lengths_train_on_as_many_tokens_as_they_say(
    study: ModuleType, rows: ModuleType, corpus: Any
) -> None:
    steps = {}
    for row in rows.ROWS:
        words = study.Search(row, study.Baseline(128), corpus, None).overrides(study.Rates(4e-3, 2))
        steps[row.name] = load_recipe(study.RECIPE, [*words, "--output_dir=x"]).training["max_steps"]
    for row in ("dense", "residual2"):
        assert [steps.pop(f"{row}-{length}") for length in ("quarter", "half", "double")] == [250, 500, 2000]
    assert set(steps.values()) == {load_recipe(study.RECIPE, []).training["max_steps"]}


def test_step_times_are_measured_for_every_row_of_a_size(
    study: ModuleType, tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "ROWS", [study.BY_NAME[name] for name in ("dense", "dense-half", "residual2-tile16")])
    monkeypatch.setattr(sys.modules["recipe_steps"], "REPEATS", 1)
    num_threads = torch.get_num_threads()
    try:
        study.main(["time", "--width", "64"])
    finally:
        torch.set_num_threads(num_threads)
    assert [path.name for path in tmp_path.iterdir()] == ["times-width64.json"]
    times = tables.read_times(tmp_path / "times-width64.json")
    assert times.keys() == {"dense", "residual2-tile16"}
    assert times["dense"] == 1
    assert 0.2 < times["residual2-tile16"] < 20


def test_rows_that_do_not_exist_at_a_size_are_refused(study: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["dense-wide", "--layers", "8"],
        ["dense-deep", "--architecture", "starcoder2"],
        ["residual2-tile32", "--width", "64"],
    ):
        with pytest.raises(SystemExit):
            study.main(["run", *words, "--corpus", "builtin"])
        assert "choose another width, or two layers of llama" in capsys.readouterr().err
