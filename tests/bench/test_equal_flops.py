"""The study at equal whole-model FLOPs: its rows, its search, its table, and the committed results."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sparseift_llm.models.presets import load_config
from sparseift_llm.planning.cost import count_flops
from sparseift_llm.planning.planner import plan
from sparseift_llm.runs.recipe import load_recipe
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script

WATCHING = ("logging_steps", "eval_strategy", "eval_steps", "save_steps", "save_total_limit", "disable_tqdm")


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script("benchmarks/equal_flops.py")


@pytest.fixture(scope="module")
def rows(study: ModuleType) -> ModuleType:
    """As `study` has imported it, so that classes are the same."""
    return sys.modules["equal_flops_rows"]


@pytest.fixture(scope="module")
def tables(study: ModuleType) -> ModuleType:
    return sys.modules["equal_flops_table"]


@pytest.fixture
def corpus(study: ModuleType, tmp_path: Path) -> Any:
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    return study.Corpus.from_word(f"novels={tmp_path / 'train.txt'},{tmp_path / 'valid.txt'}")


@pytest.mark.parametrize(("width", "layers"), [(64, 2), (128, 2), (256, 2), (1024, 2), (64, 8)])
def test_every_row_costs_what_the_dense_model_costs(
    study: ModuleType, rows: ModuleType, corpus: Any, width: int, layers: int
) -> None:
    size = rows.Size(width, layers)
    assert rows.Size.from_name(str(size)) == size
    dense = rows.forward_flops(rows.dense_shape(size))
    for row in (row for row in rows.ROWS if row.exists_at(size)):
        words = study.Search(row, size, corpus, None).overrides(study.Rates(4e-3, 2))
        recipe = load_recipe(study.RECIPE, [*words, "--output_dir=x"])
        config = load_config(recipe.model.name)
        for key, value in {**recipe.model.config, "vocab_size": recipe.data.vocab_size}.items():
            setattr(config, key, value)
        if recipe.sparse_ift is None:
            flops = count_flops(config, recipe.data.seq_len).forward
        else:
            flops = plan(config, recipe.sparse_ift, recipe.data.seq_len).sparse.flops.forward
        assert flops == pytest.approx(dense, rel=1e-3), row.name
        assert (recipe.sparse_ift is None) == (row.sparse is None)
        assert (recipe.training["learning_rate"], recipe.training["embedding_lr_factor"]) == (4e-3, 2)


def corpus_word(corpus: Any) -> str:
    """For the command line."""
    return f"{corpus.name}={corpus.files['train']},{corpus.files['held_out']}"


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
    words = study.Search(study.BY_NAME["residual2"], study.Size(64), corpus, None).overrides(best)
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


def test_a_result_names_the_command_that_trains_it_alone(
    study: ModuleType, rows: ModuleType, corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every committed result; the program understands the command, and would write the same file."""
    folder, asked = corpus.files["train"].parent, []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        study.Search, "losses", lambda search, wanted: asked.extend(search.result_path(*run) for run in wanted)
    )
    for path in sorted(study.RESULTS.glob("*/*/*/*.json")):
        result = json.loads(path.read_text("utf-8"))
        for part in ("train", "held_out") if result["corpus"]["name"] != study.BUILTIN else ():
            (folder / result["corpus"][part]["file"]).touch()
        program, *words = shlex.split(result["command"])
        assert program == "benchmarks/equal_flops.py"
        study.main(words)
        assert asked.pop() == path


def write_result(folder: Path, rates: Any, seed: int, loss: float | None, flops: float = 100) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    result = {"rate": rates.rate, "embedding_factor": rates.embedding_factor, "seed": seed, "eval_loss": loss}
    result |= {"train_flops": flops, "weight_decay": rates.weight_decay, "attention_dropout": rates.attention_dropout}
    (folder / f"{rates}-seed{seed}.json").write_text(json.dumps(result))


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


def test_the_table_says_what_the_dense_model_would_need(study: ModuleType, tables: ModuleType, tmp_path: Path) -> None:
    """0.2 nats for each doubling: a gain of 0.1 is worth half a doubling."""
    folder, rates = tmp_path / "novels" / "width64", study.Rates(8e-3, 4)
    for row, loss, flops in (("dense-half", 4.2, 50), ("dense", 4.0, 100), ("dense-double", 3.8, 200)):
        write_result(folder / row, rates, 0, loss, flops)
    write_result(folder / "residual2", rates, 0, 3.9)
    tables.times_path(tmp_path, study.Size(64)).write_text(
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


def write_gains(folder: Path, study: ModuleType, gain: Any, sizes: Mapping[str, tuple[str, ...]]) -> None:
    """Dense losses of 4 with seeds 0.01 apart and, with one seed, the wide model's by the gain at its place."""
    for name, lengths in sizes.items():
        for length in lengths:
            size = sys.modules["equal_flops_rows"].Size.from_name(name)
            tokens = sys.modules["equal_flops_rows"].tokens_per_weight(size, study.BY_NAME[f"residual2{length}"])
            for seed, loss in enumerate((4.0, 4.01, 3.99)):
                write_result(folder / name / f"dense{length}", study.Rates(8e-3, 4), seed, loss)
            ours = 4 - gain(size.width, tokens)
            write_result(folder / name / f"residual2{length}", study.Rates(8e-3, 4), 0, ours)


def test_the_fit_finds_the_plane_that_gains_lie_on(study: ModuleType, tmp_path: Path) -> None:
    """Twice the width adds 0.02 and twice the tokens -0.01, so it is 0.03 + 0.02 * log2(6) - 0.01 * log2(3) at 768."""

    def gain(width: int, tokens: float) -> float:
        return 0.03 + 0.02 * math.log2(width / 128) - 0.01 * math.log2(tokens / 10)

    fits = study.equal_flops_fit
    sizes = {"width64": ("", "-half"), "width128": ("",), "width256": ("", "-double"), "width64-layers8": ("",)}
    write_gains(tmp_path / "novels", study, gain, sizes)
    points = fits.points_of(tmp_path / "novels")
    assert [point.place for point in points] == [
        ("novels", width, pytest.approx(tokens, rel=0.02))
        for width, tokens in ((64, 20.4), (64, 40.8), (128, 10.2), (256, 10.2), (256, 20.4))
    ]
    plane = fits.fit_plane(points)
    assert plane.coefficients == pytest.approx([0.03, 0.02, -0.01])
    value, low, high = plane.at("novels", *fits.TARGET)
    assert value == pytest.approx(0.03 + 0.02 * math.log2(6) - 0.01 * math.log2(3))
    assert value - low == pytest.approx(high - value)
    assert "twice the width adds +0.020" in fits.report(tmp_path)
    assert "predicts +0.066 (" in fits.report(tmp_path)
    sizes = {"width64": ("",), "width128": ("-half",)}
    write_gains(tmp_path / "builtin", study, lambda width, tokens: gain(width, tokens) - 0.05, sizes)
    write_gains(tmp_path / "tenth", study, lambda width, tokens: -0.3, {"width64": ("",)})  # too few to count
    said = fits.report(tmp_path)
    assert "twice the width adds +0.020" in said
    assert re.search(r"predicts \+0\.016 \([^)]*\) for builtin and \+0\.066 \([^)]*\) for novels\.$", said)


def test_the_fits_interval_covers_the_truth_as_often_as_it_says(study: ModuleType, tables: ModuleType) -> None:
    """Losses are drawn around a plane, with one seed at one of the points, 400 times."""
    fits, draw = study.equal_flops_fit, random.Random(0)
    places, truth = ((64, 42.0), (64, 10.0), (128, 10.0), (128, 5.0), (256, 10.0)), [0.02, 0.03, -0.01]
    covered, there = 0, fits.direction(["novels"], "novels", *fits.TARGET)
    for _ in range(400):
        points = []
        for place in places:
            seeds = range(1 if place == places[-1] else 3)
            gain = float(fits.direction(["novels"], "novels", *place) @ truth)
            rows = [
                tables.Best(study.Rates(8e-3, 4), {seed: mean + draw.gauss(0, 0.02) for seed in seeds}, True, 1.0)
                for mean in (4.0, 4.0 - gain)
            ]
            points.append(fits.Point("novels", *place, *rows))
        _, low, high = fits.fit_plane(points).at("novels", *fits.TARGET)
        covered += low <= float(there @ truth) <= high
    assert 0.92 < covered / 400 < 0.98


def test_places_that_determine_no_plane_have_no_fit(study: ModuleType, tmp_path: Path) -> None:
    write_gains(tmp_path / "novels", study, lambda width, tokens: 0.1, {"width64": ("", "-half"), "width128": ()})
    assert study.equal_flops_fit.fit_plane(study.equal_flops_fit.points_of(tmp_path / "novels")) is None
    assert study.equal_flops_fit.report(tmp_path) == ""


def test_committed_results_are_of_rows_that_exist_and_name_no_place(study: ModuleType, tables: ModuleType) -> None:
    paths = sorted(study.RESULTS.glob("*/*/*/*.json"))
    assert paths, "no results"
    for path in paths:
        assert path.parent.name in study.BY_NAME
        result = json.loads(path.read_text("utf-8"))
        assert path.stem == f"{tables.rates_of(result)}-seed{result['seed']}"
        assert result["corpus"]["name"] == path.parents[2].name
        for part in ("train", "held_out") if result["corpus"]["name"] != study.BUILTIN else ():
            assert "/" not in result["corpus"][part]["file"]
            assert len(result["corpus"][part]["sha256"]) == 64


@pytest.fixture(scope="module")
def page() -> str:
    """docs/results.md in one line."""
    return " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())


def best_rows(study: ModuleType, tables: ModuleType, place: str) -> dict[str, Any]:
    """Row -> what the committed results at `place`, a corpus and a size, say of it."""
    return {path.name: tables.best_of(path) for path in (study.RESULTS / place).iterdir()}


def test_the_page_has_the_committed_tables(study: ModuleType, tables: ModuleType, page: str) -> None:
    assert " ".join(tables.table(study.RESULTS).split()) in page
    assert " ".join(study.equal_flops_fit.report(study.RESULTS).split()) in page


def test_the_page_has_the_gain_at_every_place_with_three_seeds(
    study: ModuleType, tables: ModuleType, page: str
) -> None:
    places = 0
    for size_folder in study.RESULTS.glob("*/width*"):
        ours, dense = (tables.best_of(size_folder / name) for name in ("residual2", "dense"))
        if size_folder.parent.name in ("novels", "builtin") and min(len(ours.losses), len(dense.losses)) >= 3:
            title = study.Size.from_name(size_folder.name).title
            assert f"- {size_folder.parent.name}, {title}: {tables.gain(ours, dense)} " in page
            places += 1
    assert page.count("- novels, width") + page.count("- builtin, width") == places


def test_what_the_page_says_of_width_128_is_in_its_results(study: ModuleType, tables: ModuleType, page: str) -> None:
    found = best_rows(study, tables, "novels/width128")
    dense, half, double, wide = (found[name] for name in ("dense", "dense-half", "dense-double", "residual2"))
    seeds = "{:.3f}, {:.3f} and {:.3f}".format(*(dense.losses[seed] for seed in study.SEEDS))
    assert f"seeds are {seeds}. Half the tokens cost it {half.mean - dense.mean:.3f} nats and twice" in page
    slope = tables.nats_per_e_fold(found)
    worth = tables.equal_loss_flops(wide, dense, slope).removesuffix("x")
    gained, doubled = dense.mean - wide.mean, dense.mean - double.mean
    assert f"gain it {doubled:.3f}, so {gained:.3f} nats are worth {worth} times its compute" in page
    assert len(found["ffn"].losses) == 3
    assert f"at the dense model's rates, gains {tables.gain(found['ffn'], dense)} with three seeds." in page
    usual = {name: row for name, row in found.items() if study.BY_NAME[name].tokens == 1}
    assert min(usual, key=lambda name: usual[name].mean) == "ffn"
    worse = sorted(found[name].mean - dense.mean for name in ("residual4", "residual2-tile16", "model"))
    assert f"are {worse[0]:.3f} to {worse[-1]:.3f} nats worse than the dense model" in page
    loss = {
        path.stem: json.loads(path.read_text("utf-8"))["eval_loss"]
        for path in study.RESULTS.glob("novels/width128/dense/*")
    }
    best = {factor: min(value for name, value in loss.items() if f"-emb{factor}-seed0" in name) for factor in (4, 8)}
    assert f"with 4x the dense model's best is {best[4]:.3f} (at 0.004), with 8x it is {best[8]:.3f} (at 0.016)" in page
    assert (best[4], best[8]) == (loss["lr0.004-emb4-seed0"], loss["lr0.016-emb8-seed0"])
    assert f"but 4x at 0.016 gives {loss['lr0.016-emb4-seed0']:.3f}." in page
    times = tables.read_times(tables.times_path(study.RESULTS, study.Size(128)))
    names = ("residual2", "residual2-tile16")
    assert "takes {:.2f} times the dense model's time, and {:.2f} times with".format(*(times[n] for n in names)) in page
    later = [slope * math.log(times[name]) + found[name].mean - dense.mean for name in names]
    assert "would be {:.3f} and {:.3f} nats better".format(*later) in page


def test_what_the_page_says_of_other_places_is_in_their_results(
    study: ModuleType, tables: ModuleType, page: str
) -> None:
    wider = best_rows(study, tables, "novels/width256")
    gained = wider["dense"].mean - wider["residual2"].mean
    pair = f"({wider['residual2'].mean:.3f} and {wider['dense'].mean:.3f})"
    assert f"with one seed and one pair of rates for each, the wide stream is {gained:.3f} nats better {pair}" in page
    assert all(len(row.losses) == 1 for row in wider.values())
    deep = best_rows(study, tables, "novels/width64-layers8")
    first, _, third = (deep["dense"].losses[seed] - deep["residual2"].losses[seed] for seed in study.SEEDS)
    assert f"was {first:.3f} nats better there, with the third {-third:.3f} worse" in page
    repeated, folder = best_rows(study, tables, "tenth/width64"), study.RESULTS / "tenth" / "width64"
    usual = [json.loads((folder / name).read_text("utf-8"))["eval_loss"] for name in (
        "residual2/lr0.016-emb4-seed0.json", "dense/lr0.016-emb8-seed0.json",
    )]  # fmt: skip
    assert "the wide one more ({:.3f} against {:.3f})".format(*usual) in page
    assert {row.rates.weight_decay for row in repeated.values()} == {0.3}
    assert "A decay of 0.3 is best for both" in page
    assert f"the wide stream gains {tables.gain(repeated['residual2'], repeated['dense'])}" in page


def test_the_demo_is_the_study_at_its_best_rates(study: ModuleType, tables: ModuleType) -> None:
    """Both of its models: everything that decides a loss is as in the run of the study."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    words = re.findall(r"recipes/demo\.yaml --output_dir \$\(DEMO\)/(\w+)(.*)", makefile)
    for row, (name, options) in zip(("dense", "residual2"), words, strict=True):
        best = tables.best_of(study.RESULTS / "builtin" / "width64" / row)
        corpus = study.Corpus.from_word("builtin")
        ours = study.Search(study.BY_NAME[row], study.Size(64), corpus, None).overrides(best.rates)
        trained = load_recipe(study.RECIPE, [*ours, "--output_dir=x", "--seed=0"]).to_dict()
        shown = load_recipe(ROOT / "recipes" / "demo.yaml", [*shlex.split(options), "--output_dir=x"]).to_dict()
        assert name == ("sparse" if shown["sparse_ift"] else "dense")
        for recipe in (trained, shown):
            del recipe["data"]["cache_dir"]
            for key in WATCHING:
                recipe["training"].pop(key, None)
        assert shown == trained


def test_wherever_the_demos_dense_model_is_named_it_has_its_own_rate() -> None:
    """In the demo's recipe, the pages and the command line's help; the Makefile is held to the study above."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    options = re.search(r"recipes/demo\.yaml --output_dir \$\(DEMO\)/dense (.*)", makefile)
    assert options is not None
    places = [ROOT / "recipes" / "demo.yaml", ROOT / "README.md", ROOT / "docs" / "get-started.md"]
    for place in (*places, ROOT / "sparseift_llm" / "cli" / "program.py"):
        text = place.read_text(encoding="utf-8")
        assert text.count("--sparse_ift null") == text.count(options[1]) == 1, place


def test_the_recipe_stands_beside_the_script(study: ModuleType) -> None:
    assert study.RECIPE == ROOT / "benchmarks" / "equal_flops.yaml"
    assert load_recipe(study.RECIPE, []).model.config["hidden_size"] == 128


def test_rows_of_other_lengths_train_on_as_many_tokens_as_they_say(
    study: ModuleType, rows: ModuleType, corpus: Any
) -> None:
    steps = {}
    for row in rows.ROWS:
        words = study.Search(row, study.Size(128), corpus, None).overrides(study.Rates(4e-3, 2))
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
    for words in (["dense-wide", "--layers", "8"], ["residual2-tile32", "--width", "64"]):
        with pytest.raises(SystemExit):
            study.main(["run", *words, "--corpus", "builtin"])
        assert "choose another width, or two layers" in capsys.readouterr().err
