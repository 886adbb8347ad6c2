"""Sweeps: the grid and its names, what is run and what is not, interruptions, and two real runs."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from sparseift_llm.cli import main
from sparseift_llm.runs import sweep as sweep_module
from sparseift_llm.runs.formats import SUMMARY_KEYS
from sparseift_llm.runs.recipe import load_recipe
from sparseift_llm.runs.sweep import Outcome, is_finished, run_sweep
from sparseift_llm.runs.sweep_plan import Sweep, SweepRun, plan_sweep, value_name
from tests.helpers.pretrain_runs import read_json, tiny_recipe

RATES = ("--learning_rate", "4e-3,8e-3")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tiny_recipe(tmp_path)


def plan(recipe: Path, *overrides: str, **options: Any) -> Sweep:
    return plan_sweep(recipe, overrides, output=recipe.parent / "sweep", **options)


# ---- the grid


def test_grid_and_names_by_hand(recipe: Path) -> None:
    sweep = plan(recipe, *RATES, "--embedding_lr_factor=1,3", "--max_steps", "4", seeds=[0, 1])
    assert [run.name for run in sweep.runs] == [
        "dense_learning_rate-0.004_embedding_lr_factor-1_seed-0",
        "dense_learning_rate-0.004_embedding_lr_factor-3_seed-0",
        "dense_learning_rate-0.008_embedding_lr_factor-1_seed-0",
        "dense_learning_rate-0.008_embedding_lr_factor-3_seed-0",
        "dense_learning_rate-0.004_embedding_lr_factor-1_seed-1",
        "dense_learning_rate-0.004_embedding_lr_factor-3_seed-1",
        "dense_learning_rate-0.008_embedding_lr_factor-1_seed-1",
        "dense_learning_rate-0.008_embedding_lr_factor-3_seed-1",
    ]
    last = sweep.runs[-1]
    assert last.settings == {"learning_rate": 0.008, "embedding_lr_factor": 3}
    assert last.folder == recipe.parent / "sweep" / last.name
    assert last.log == recipe.parent / "sweep" / f"{last.name}.log"
    training = last.recipe.training
    assert (training["learning_rate"], training["embedding_lr_factor"], training["seed"]) == (0.008, 3.0, 1)
    assert (training["max_steps"], training["output_dir"]) == (4, str(last.folder))
    assert not (recipe.parent / "sweep").exists()


def test_the_runs_share_their_tokens_unless_the_recipe_says_where_they_are(recipe: Path) -> None:
    shared = plan(recipe, *RATES, seeds=[0, 1]).runs
    assert {run.recipe.data.cache_dir for run in shared} == {str(recipe.parent / "sweep" / "data")}
    own = plan(recipe, *RATES, "--cache_dir", str(recipe.parent / "tokens")).runs
    assert {run.recipe.data.cache_dir for run in own} == {str(recipe.parent / "tokens")}


def test_without_axes_there_is_one_run_with_the_recipes_seed(recipe: Path) -> None:
    assert [run.name for run in plan(recipe).runs] == ["dense_seed-0"]


def test_the_folder_is_beside_the_recipes_own(recipe: Path) -> None:
    own = load_recipe(recipe).training["output_dir"]
    sweep = plan_sweep(recipe, RATES)
    assert str(sweep.output) == f"{own}_sweep"
    assert [run.folder for run in sweep.runs] == [sweep.output / run.name for run in sweep.runs]


def test_only_top_level_commas_make_an_axis(recipe: Path) -> None:
    words = ("--model.config", "{n_embd: 16, n_layer: 1, n_head: 2, n_positions: 16}")
    assert [run.name for run in plan(recipe, *words).runs] == ["dense_seed-0"]
    sweep = plan(recipe, "--sparse_ift", "{sparsity: 0.5, init: paper},{sparsity: 0.75}")
    assert [run.recipe.sparse_ift.sparsity for run in sweep.runs] == [0.5, 0.75]  # type: ignore[union-attr]
    assert {run.arm for run in sweep.runs} == {"sparse"}


def test_the_dense_twin_has_every_setting_but_those_of_sparsity(recipe: Path) -> None:
    words = (*RATES, "--sparse_ift.sparsity", "0.5,0.75")
    sweep = plan(recipe, *words, seeds=[3], dense_twin=True)
    dense = [run for run in sweep.runs if run.arm == "dense"]
    assert [run.name for run in dense] == ["dense_learning_rate-0.004_seed-3", "dense_learning_rate-0.008_seed-3"]
    assert all(run.recipe.sparse_ift is None for run in dense)
    sparse = [run for run in sweep.runs if run.arm == "sparse"]
    assert [run.name for run in sparse][:2] == [
        "sparse_learning_rate-0.004_sparsity-0.5_seed-3",
        "sparse_learning_rate-0.004_sparsity-0.75_seed-3",
    ]
    assert len(sparse) == 4
    assert {name: [axis.name for axis in axes] for name, axes in sweep.axes.items()} == {
        "dense": ["learning_rate"],
        "sparse": ["learning_rate", "sparsity"],
    }


def test_a_recipe_on_semi_structured_kernels_has_a_dense_twin(recipe: Path) -> None:
    words = (*RATES, "--model.semi_structured_kernels=true", "--sparse_ift.structure=2:4")
    assert [run.arm for run in plan(recipe, *words, dense_twin=True).runs] == ["dense"] * 2 + ["sparse"] * 2


def test_an_output_head_of_its_own_may_have_rates_of_its_own(recipe: Path) -> None:
    words = ("--model.config.tie_word_embeddings=false", "--head_lr_factor", "1,2")
    assert len(plan(recipe, *words).runs) == 2


def test_axes_that_share_their_last_part_are_named_in_full(recipe: Path) -> None:
    sweep = plan(recipe, "--sparse_ift.seed", "1,2", "--model.config.seed", "3,4", "--model.config.n_layer", "1,2")
    assert [axis.name for axis in sweep.axes["sparse"]] == ["sparse_ift.seed", "model.config.seed", "n_layer"]
    assert sweep.runs[0].name == "sparse_sparse_ift.seed-1_model.config.seed-3_n_layer-1_seed-0"


def test_names_of_values() -> None:
    assert [value_name(value) for value in (1, 1.0, 0.004, 1e-05, None, True, "adamw_torch")] == [
        *("1", "1", "0.004", "1e-05", "null", "true", "adamw_torch"),
    ]
    names = [value_name(value) for value in ("a/b", "a_b", "a b", {"x": 1}, "x" * 50, "x" * 51, "..", "")]
    assert len(set(names)) == len(names)
    assert all("/" not in name and len(name) < 60 for name in names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output_dir", "x"], "--output_dir is set by the sweep: every run has a folder of its own"),
        (["--training.seed", "1,2"], "--training.seed is set by the sweep: give the seeds as --seeds"),
        (["--resume_from_checkpoint", "true"], "goes on where it was"),
        (["--learning_rate", "1e-3,0.001"], "the value 0.001 stands twice"),
        ([*RATES, "--training.learning_rate", "1"], "--training.learning_rate is given twice"),
        (["--learning_rte", "1,2"], "unknown option --learning_rte; did you mean"),
        (["--learning_rate", "1e-3,fast"], "training.learning_rate must be float, got str: 'fast'"),
        (["--embedding_lr_factor", "1,0"], "training.embedding_lr_factor must be above 0, got 0"),
        (["--learning_rate", "1,,2"], "training.learning_rate must be float"),
        (["--head_lr_factor", "1,2"], "dense_head_lr_factor-1_seed-0: .*an output head tied to its embedding"),
        (["--data.vocab_size", "280,300"], "size-280_seed-0 and .*size-300_seed-0 .*compared: data.vocab_size is 280"),
        (["--data.seq_len", "8,16"], "cannot be compared: data.seq_len is 8 and 16; make a sweep for each"),
        (["--data.eval_corpus", "a.txt,b.txt"], "cannot be compared: data.eval_corpus is 'a.txt' and 'b.txt'"),
        (["--model.semi_structured_kernels=true", "--sparse_ift.sparsity", "0.5,0.75"], "needs .*structure='2:4'"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(recipe: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(recipe, *words)


def test_more_mistakes(recipe: Path) -> None:
    with pytest.raises(ValueError, match="dense_seed-0 is dense already"):
        plan(recipe, dense_twin=True)
    with pytest.raises(ValueError, match="seeds must be different numbers, at least one, got 1, 1"):
        plan(recipe, seeds=[1, 1])
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        run_sweep(plan(recipe), jobs=0)


# ---- running, with a stand-in for the process


class StandIn:
    """In place of a process: remembers what was started, and leaves the files of a finished run."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.loss: Callable[[SweepRun], float] = lambda run: 3.0
        self.status: Callable[[SweepRun], int] = lambda run: 0

    def __call__(self, run: SweepRun, log: IO[bytes], environment: Any, stop: threading.Event) -> int:
        self.started.append(run.name)
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "recipe.json").write_text(json.dumps(run.recipe.to_dict()))
        status = self.status(run)
        if status == 0:
            summary = {**dict.fromkeys(SUMMARY_KEYS, 1.0), "eval_loss": self.loss(run), "step": 12}
            (run.folder / "summary.json").write_text(json.dumps(summary))
        else:
            log.write(b"Traceback\nout of memory\n\n")
            log.flush()
        return status


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(sweep_module, "train_in_process", stand_in)
    return stand_in


def test_a_finished_run_is_not_started_again_and_a_new_setting_is(recipe: Path, stand_in: StandIn) -> None:
    first = run_sweep(plan(recipe, *RATES))
    assert len(stand_in.started) == 2
    assert run_sweep(plan(recipe, *RATES)) == first
    assert len(stand_in.started) == 2
    run_sweep(plan(recipe, "--learning_rate", "0.004,8e-3,16e-3"))
    assert stand_in.started[2:] == ["dense_learning_rate-0.016_seed-0"]


def test_another_recipe_under_the_same_name_is_kept_aside_and_run(
    recipe: Path, stand_in: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    run_sweep(plan(recipe))
    with caplog.at_level(logging.INFO):
        run_sweep(plan(recipe, "--max_steps", "8"))
    assert stand_in.started == ["dense_seed-0", "dense_seed-0"]
    assert "training.max_steps was 12, now 8" in caplog.text
    sweep = recipe.parent / "sweep"
    assert read_json(sweep / "replaced-dense_seed-0" / "recipe.json")["training"]["max_steps"] == 12
    assert read_json(sweep / "dense_seed-0" / "recipe.json")["training"]["max_steps"] == 8


def test_where_the_sweep_lies_does_not_matter(recipe: Path, stand_in: StandIn) -> None:
    run_sweep(plan(recipe))
    (recipe.parent / "sweep").rename(recipe.parent / "moved")
    run_sweep(plan_sweep(recipe, output=recipe.parent / "moved"))
    assert stand_in.started == ["dense_seed-0"]


def test_a_killed_run_goes_on_in_its_folder_and_others_are_not_ended(recipe: Path, stand_in: StandIn) -> None:
    stand_in.status = lambda run: -9 if "0.004" in run.name else 0
    outcomes = run_sweep(plan(recipe, *RATES))
    assert [outcome.failure for outcome in outcomes] == ["exit status -9: out of memory", None]
    assert [outcome.eval_loss for outcome in outcomes] == [None, 3.0]
    killed = outcomes[0].run.folder
    (killed / "checkpoint-4").mkdir()
    stand_in.status = lambda run: 0
    outcomes = run_sweep(plan(recipe, *RATES))
    assert stand_in.started[2:] == ["dense_learning_rate-0.004_seed-0"]
    assert (killed / "checkpoint-4").is_dir()  # it was not put aside
    assert "--training.resume_from_checkpoint=true" in outcomes[0].run.words
    assert [outcome.eval_loss for outcome in outcomes] == [3.0, 3.0]


def test_a_long_last_line_is_cut_in_the_table(recipe: Path, stand_in: StandIn) -> None:
    run = plan(recipe).runs[0]
    run.log.parent.mkdir()
    run.log.write_text("first\n" + "word " * 100 + "\n\n")
    assert sweep_module._last_line(run.log) == "word " * 39 + "..."


def test_a_run_without_a_result_is_a_failure(recipe: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "train_in_process", lambda *arguments: 0)
    (outcome,) = run_sweep(plan(recipe))
    assert outcome.failure == "it ended without a loss in summary.json"


def test_a_diverged_run_is_finished(recipe: Path, stand_in: StandIn) -> None:
    stand_in.loss = lambda run: math.nan
    for _ in range(2):
        (outcome,) = run_sweep(plan(recipe))
        assert outcome.failure is None
        assert not outcome.is_finite
    assert stand_in.started == ["dense_seed-0"]


def test_a_run_that_another_process_is_at_is_waited_for(recipe: Path, stand_in: StandIn) -> None:
    sweep = plan(recipe)
    (run,) = sweep.runs
    run.log.parent.mkdir()
    outcomes: list[Outcome] = []
    with run.log.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: outcomes.extend(run_sweep(sweep)))
        thread.start()
        thread.join(timeout=1)
        assert thread.is_alive()
        assert not stand_in.started
        stand_in(run, other, {}, threading.Event())  # the other process finishes it
    thread.join(timeout=60)
    assert [outcome.eval_loss for outcome in outcomes] == [3.0]
    assert stand_in.started == ["dense_seed-0"]


def test_an_interruption_ends_the_processes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "_PROGRAM", "import time; time.sleep(600)")
    processes: list[subprocess.Popen[bytes]] = []

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            processes.append(self)

    def interrupted(futures: Any) -> Any:
        while not processes:
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(sweep_module, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(plan(recipe, *RATES))
    assert [process.returncode for process in processes] == [-15]  # the second run was never started


# ---- real processes


def test_two_real_runs_and_one_that_crashes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Width 16 has no 3 heads: that run ends at its start, the others are trained beside it and count as finished."""
    output = recipe.parent / "sweep"
    overrides = ["--max_steps", "4", "--eval_strategy", "no", "--model.config.n_head", "2,4,3"]
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(recipe), *overrides, "--output", str(output), "--jobs", "2"])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "| dense_n_head-3_seed-0 | exit status 2: " in printed
    assert f"| {output / 'dense_n_head-3_seed-0.log'} |" in printed
    assert (output / "sweep.md").read_text() in printed
    assert (output / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    result = read_json(output / "sweep.json")
    assert [run["state"] for run in result["runs"]] == ["finished", "finished", "failed"]
    assert len(list((output / "data").glob("tokenizer-*"))) == 1
    assert len(list((output / "data").glob("tokens-*"))) == 2, "of the training and of the held-out text"
    losses = []
    for run in result["runs"][:2]:
        assert not (output / run["folder"] / "data").exists()
        summary = read_json(output / run["folder"] / "summary.json")
        assert summary["command"].startswith("sparseift pretrain ")
        assert run["eval_loss"] == summary["eval_loss"]
        losses.append(summary["eval_loss"])
    assert losses[0] != losses[1]
    best = result["best"]["dense"]
    assert best["eval_loss"] == min(losses)
    assert f"| dense | n_head {best['settings']['n_head']} | {min(losses):.4f} |" in printed
    assert [is_finished(run) for run in plan(recipe, *overrides).runs] == [True, True, False]
