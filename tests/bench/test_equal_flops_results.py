"""The study at equal whole-model FLOPs: its committed results, and what docs, README and demo say of them."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import defaultdict
from itertools import product
from statistics import mean
from types import ModuleType
from typing import Any

import pytest

from sparseift_llm.runs.model import model_config
from sparseift_llm.runs.recipe import Recipe, load_recipe
from tests.helpers.paths import ROOT

EMBEDDED = "residual2-embedding"
WATCHING = ("logging_steps", "eval_strategy", "eval_steps", "save_steps", "save_total_limit", "disable_tqdm")


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
    for size_folder, row in product(study.RESULTS.glob("*/width*"), ("ffn2", "residual2", EMBEDDED)):
        ours, dense = (tables.best_of(size_folder / name) for name in (row, "dense"))
        if size_folder.parent.name in ("novels", "builtin") and ours and min(len(ours.losses), len(dense.losses)) >= 3:
            title = study.Baseline.from_name(size_folder.name).title
            assert f"- {size_folder.parent.name}, {title}: {tables.gain(ours, dense)} " in page
            places += 1
    assert page.count("- novels, width") + page.count("- builtin, width") == places


def test_what_the_page_says_of_the_wider_ffn_is_in_its_results(
    study: ModuleType, tables: ModuleType, page: str
) -> None:
    places = ("novels/width128", "builtin/width128", "builtin/width64", "novels/width256")
    found, second, small, big = (best_rows(study, tables, place) for place in places)
    sure = [
        tables.gain(rows_there["ffn2"], rows_there["dense"]).split("(")[1][0] == "+" for rows_there in (found, second)
    ]
    assert ("**A wider FFN gains, a little.**" in page) == all(sure)
    seeds = [", ".join(f"{loss:.3f}" for loss in sorted(found[name].losses.values())) for name in ("dense", "ffn2")]
    assert f"the dense model's seeds are {seeds[0]}, those of the wider FFN {seeds[1]}." in page
    others = sorted(means_over_seeds(study, "dense", but=found["dense"].rates))
    assert "with three seeds or more, the dense model's means are {:.3f} and {:.3f}.".format(*others) in page
    assert min(others) > found["dense"].mean
    dense, half, double, wider = (found[name] for name in ("dense", "dense-half", "dense-double", "ffn2"))
    cost, won = half.mean - dense.mean, dense.mean - double.mean
    assert f"Half the tokens cost the dense model {cost:.3f} nats and twice the tokens gain it {won:.3f}, so" in page
    slope, gained = tables.nats_per_e_fold(found), dense.mean - wider.mean
    worth = tables.equal_loss_flops(wider, dense, slope).removesuffix("x")
    assert f"so {gained:.3f} nats are worth {worth} times its compute. That is less than the 0.05 that" in page
    assert gained < 0.05
    times = tables.read_times(tables.times_path(study.RESULTS, study.Baseline(128)))
    later = slope * math.log(times["ffn2"]) - gained
    dearer = f"takes {times['ffn2']:.2f} times the dense model's. The dense model would be {later:.3f} nats"
    assert dearer in page
    assert f"the gain is {tables.gain(found['ffn'], dense)}, and a step takes {times['ffn']:.2f} times the" in page
    half_tiled, tiled = (found[name] for name in ("ffn2-tile16", "ffn-tile16"))
    assert (len(half_tiled.losses), len(tiled.losses)) == (2, 1)
    gains = [f"{dense.mean - row.mean:+.3f}" for row in (half_tiled, tiled)]
    assert f"it is {gains[0]} with two seeds at 50%, in {times['ffn2-tile16']:.2f} times the dense model's step" in page
    assert f"and {gains[1]} with one seed at 75%" in page
    pattern, words = found["ffn2-pattern"], {1: "one seed", 2: "two seeds", 3: "three seeds"}
    said = f"(`structure: 2:4`) it is {tables.gain(pattern, dense)}, with {words[len(pattern.losses)]}."
    assert said in page
    at_small, at_big = (rows_there["dense"].losses[0] - rows_there["ffn2"].losses[0] for rows_there in (small, big))
    assert f"the wider FFN is {in_words(at_small)} at width 64 on builtin, and {in_words(at_big)} at width 256" in page


def means_over_seeds(study: ModuleType, row: str, but: Any) -> list[float]:
    """Mean losses at width 128 on the novels, of all rates that have three seeds or more, `but` for one."""
    losses = defaultdict(list)
    for path in (study.RESULTS / "novels" / "width128" / row).iterdir():
        losses[path.stem.rpartition("-")[0]].append(json.loads(path.read_text("utf-8"))["eval_loss"])
    return [mean(found) for rates, found in losses.items() if len(found) >= 3 and rates != str(but)]


def in_words(gained: float) -> str:
    """A gain in nats."""
    return f"{abs(gained):.3f} nats {'better' if gained > 0 else 'worse'}"


def test_what_the_page_says_of_other_rows_at_width_128_is_in_their_results(
    study: ModuleType, tables: ModuleType, page: str
) -> None:
    found = best_rows(study, tables, "novels/width128")
    dense, slope = found["dense"], tables.nats_per_e_fold(found)
    worse = sorted(found[name].mean - dense.mean for name in ("residual4", "residual2-tile16", "model"))
    assert f"are {worse[0]:.3f} to {worse[-1]:.3f} nats worse than the dense model" in page
    loss = {
        path.stem: json.loads(path.read_text("utf-8"))["eval_loss"]
        for path in study.RESULTS.glob("novels/width128/dense/*")
    }
    best = {factor: min(value for name, value in loss.items() if f"-emb{factor}-seed0" in name) for factor in (4, 8)}
    first = (
        f"with the first seed and 4x the dense model's best is {best[4]:.3f} (at 0.004), with 8x it is {best[8]:.3f}"
    )
    assert f"{first} (at 0.016)" in page
    assert (best[4], best[8]) == (loss["lr0.004-emb4-seed0"], loss["lr0.016-emb8-seed0"])
    assert f"but 4x at 0.016 gives {loss['lr0.016-emb4-seed0']:.3f}." in page
    times = tables.read_times(tables.times_path(study.RESULTS, study.Baseline(128)))
    names = ("residual2", "residual2-tile16")
    assert "takes {:.2f} times the dense model's time, and {:.2f} times with".format(*(times[n] for n in names)) in page
    later = [slope * math.log(times[name]) + found[name].mean - dense.mean for name in names]
    assert "would be {:.3f} and {:.3f} nats better".format(*later) in page


def test_what_the_page_says_of_layers_of_another_architecture_is_in_their_results(
    study: ModuleType, tables: ModuleType, page: str
) -> None:
    older, llama = (best_rows(study, tables, f"novels/width128{name}") for name in ("-starcoder2", ""))
    dense, embedded, wider, ffn = (older[name] for name in ("dense", EMBEDDED, "residual4", "ffn2"))
    slope = tables.nats_per_e_fold(llama)
    times = tables.read_times(tables.times_path(study.RESULTS, study.Baseline(128, architecture="starcoder2")))

    def in_its_time(name: str) -> str:
        """What the dense model would do in the time that a row takes."""
        return in_words(slope * math.log(times[name]) - dense.mean + older[name].mean)

    assert (dense.rates.embedding_factor, embedded.rates.embedding_factor) == (4, 1)
    assert f"On the novels the dense model is at {dense.mean:.3f}, at 4 times the rate for its embedding, and" in page
    assert f"and this one at {embedded.mean:.3f}, with one rate for all parameters." in page
    worth = tables.equal_loss_flops(embedded, dense, slope).removesuffix("x")
    assert f"By the slope of the Llama that is worth {worth} times the compute." in page
    dearer = f"A step takes {times[EMBEDDED]:.2f} times the dense model's, and in that time the dense"
    assert f"{dearer} model would be {in_its_time(EMBEDDED)}." in page
    assert (len(wider.losses), len(ffn.losses), wider.is_inside) == (3, 1, False)
    four = (
        f"the stream gains {tables.gain(wider, dense)}, three seeds, at rates whose search has not ended; a step takes"
    )
    assert f"{four} {times['residual4']:.2f} times the dense model's." in page
    worse = ffn.losses[0] - dense.losses[0]
    assert f"`scope: ffn` is {worse:.3f} nats worse than the dense model, first seed against first seed" in page
    tiled = older["residual2-tile16"]
    assert len(tiled.losses) == 3
    kept = f"**In tiles of 16 it gains {tables.gain(tiled, dense)}**, with a sparse embedding, three seeds, at the"
    dearer = f"rates of single weights, and a step takes {times['residual2-tile16']:.2f} times the dense model's."
    assert f"{kept} {dearer}" in page
    assert f"In that time the dense model would be {in_its_time('residual2-tile16')}, by the slope" in page
    flops = llama["dense"].train_flops / dense.train_flops
    others = (
        f"{llama['dense'].mean:.3f} on the novels without sparsity, and at {llama[EMBEDDED].mean:.3f} with the wide"
    )
    assert f"A Llama, at {flops:.2f} times the FLOPs, is at {others}" in page
    assert f"for what StarCoder2's layers lack: with it they are at {embedded.mean:.3f}." in page
    assert embedded.mean < llama["dense"].mean


def test_what_pages_say_of_the_wide_stream_with_a_dense_embedding_is_in_its_results(
    study: ModuleType, tables: ModuleType, page: str
) -> None:
    corpora, shapes = ("novels", "builtin"), ("-starcoder2", "")
    found = {
        (corpus, shape): best_rows(study, tables, f"{corpus}/width128{shape}") for corpus in corpora for shape in shapes
    }
    gained = {key: rows_there["dense"].mean - rows_there[EMBEDDED].mean for key, rows_there in found.items()}
    lowest = {key: tables.gain(there[EMBEDDED], there["dense"]).split("(")[1][:6] for key, there in found.items()}
    assert [key for key, low in lowest.items() if low[0] == "-"] == [("builtin", "-starcoder2")]
    assert float(lowest["builtin", "-starcoder2"]) > -0.005  # just within noise
    (other,) = means_over_seeds(study, EMBEDDED, but=found["novels", ""][EMBEDDED].rates)
    assert f"have three seeds, with means of {found['novels', ''][EMBEDDED].mean:.3f} and {other:.3f}." in page
    on_code = found["builtin", "-starcoder2"]
    seeds = [", ".join(f"{loss:.3f}" for loss in sorted(on_code[name].losses.values())) for name in ("dense", EMBEDDED)]
    assert f"On builtin the dense model's seeds are {seeds[0]}, those of the wide stream {seeds[1]}." in page
    assert "the dense model was searched there until no neighbour was better" in page
    assert on_code["dense"].is_inside
    dense = found["builtin", ""]["dense"].mean
    assert (
        f"On builtin the dense Llama is at {dense:.3f}, and the wide StarCoder2 at {on_code[EMBEDDED].mean:.3f}."
        in page
    )
    assert on_code[EMBEDDED].mean < dense
    times = tables.read_times(tables.times_path(study.RESULTS, study.Baseline(128, architecture="starcoder2")))
    readme, families = (
        " ".join((ROOT / name).read_text(encoding="utf-8").split()) for name in ("README.md", "docs/families.md")
    )
    older, llama = (" and ".join(f"{gained[corpus, shape]:.3f}" for corpus in corpora) for shape in shapes)
    assert f"with a dense embedding gains {older} nats in a StarCoder2" in readme
    assert f"in {times[EMBEDDED]:.1f} times the step time, and {llama} in a Llama." in readme
    tiled = found["novels", "-starcoder2"]["dense"].mean - found["novels", "-starcoder2"]["residual2-tile16"].mean
    assert f"keep {tiled:.3f} in {times['residual2-tile16']:.1f} times the step time" in readme
    both = f"{older} nats in a StarCoder2 and {llama} nats in a Llama at width 128, on novels and builtin"
    noise = "(in the StarCoder2 on builtin just within noise)"
    assert f"with a dense embedding {both} {noise}" in families
    assert f"with a dense embedding {both} {noise}" in page


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
    baseline, corpus = study.Baseline(128, architecture="starcoder2"), study.Corpus.from_word("builtin")
    for row, (name, options) in zip(("dense", "residual2-embedding"), words, strict=True):
        best = tables.best_of(study.RESULTS / "builtin" / str(baseline) / row)
        ours = study.Search(study.BY_NAME[row], baseline, corpus, None).overrides(best.rates)
        trained = load_recipe(study.RECIPE, [*ours, "--output_dir=x", "--seed=0"])
        shown = load_recipe(ROOT / "recipes" / "demo.yaml", [*shlex.split(options), "--output_dir=x"])
        assert name == ("sparse" if shown.sparse_ift else "dense")
        assert what_decides(shown) == what_decides(trained)


def what_decides(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe that decide a loss, and the model's config but for what the tokenizer decides."""
    settings, config = recipe.to_dict(), model_config(recipe).to_dict()
    del settings["model"]["name"], settings["model"]["config"], settings["data"]["cache_dir"], config["vocab_size"]
    for key in WATCHING:
        settings["training"].pop(key, None)
    return {**settings, "config": config}


def test_wherever_the_demos_dense_model_is_named_it_has_its_own_rate() -> None:
    """In the demo's recipe, the pages and the command line's help; the Makefile is held to the study above."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    options = re.search(r"recipes/demo\.yaml --output_dir \$\(DEMO\)/dense (.*)", makefile)
    assert options is not None
    places = [ROOT / "recipes" / "demo.yaml", ROOT / "README.md", ROOT / "docs" / "get-started.md"]
    for place in (*places, ROOT / "sparseift_llm" / "cli" / "program.py"):
        text = place.read_text(encoding="utf-8")
        assert text.count("--sparse_ift null") == text.count(options[1]) == 1, place
