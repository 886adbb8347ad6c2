"""`~` is the home folder wherever a user gives a path; recipes are tried in tests/e2e/test_pretrain.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparseift_llm import load_pretrained, save_export
from sparseift_llm.analysis.across_runs import analyze
from sparseift_llm.api import export_run
from sparseift_llm.cli import main
from sparseift_llm.evaluation import command, fetch_command
from sparseift_llm.evaluation.lm_eval_model import SparseIFTLM
from sparseift_llm.evaluation.task_loading import load_suite
from sparseift_llm.models.presets import load_config
from sparseift_llm.reporting.comparison import comparison_table
from sparseift_llm.reporting.loss_picture import loss_picture
from sparseift_llm.reporting.page.page import write_report
from tests.helpers.evaluation import own_tasks_only, save_model, write_quiz
from tests.helpers.html_pages import write_full_run
from tests.helpers.tiny_runs import sparse_gpt2


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home folder with a model and a run, in a process that works elsewhere; nothing may be written there."""
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    sparse_gpt2().save_pretrained(home / "model")
    write_full_run(home / "run")
    yield home
    assert list(work.iterdir()) == []


@pytest.fixture
def quiz(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the home folder a model with a tokenizer, tasks with their data, and the numbers of the items to evaluate."""
    monkeypatch.setattr(command, "named_suite", own_tasks_only)
    monkeypatch.setattr(fetch_command, "named_suite", own_tasks_only)
    save_model(home / "scored")
    write_quiz(home)
    (home / "samples.json").write_text('{"quiz_words": [0, 3]}')


def evaluate(*words: str) -> int:
    data = ["--data-dir", "~/data", "--include-path", "~/tasks", "--samples", "~/samples.json"]
    return main(["evaluate", "--model", "~/scored", "--suite", "quiz_words", *data, *words])


def evaluate_and_compare() -> int:
    evaluate("--output", "~/a.json")
    (Path.home() / "b.json").write_text((Path.home() / "a.json").read_text().replace('"sha256": "', '"sha256": "b'))
    shutil.copytree(Path.home() / "a.items", Path.home() / "b.items")
    return main(["compare", "first=~/a.json", "~/b.json", "--output", "~/c"])


def refused_fetching() -> None:
    words = ["--data-dir", "~/data", "--include-path", "~/tasks", "--suite", "quiz_words"]
    with pytest.raises(SystemExit, match="nothing was fetched: HF_HUB_OFFLINE"):
        fetch_command.main(words)


EVALUATIONS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "sparseift evaluate": (evaluate, "scored/eval_quiz_words.json"),
    "sparseift evaluate with an output": (lambda: evaluate("--output", "~/f.json"), "f.json"),
    "sparseift compare of evaluations": (evaluate_and_compare, "c.md"),
    "sparseift fetch-data": (refused_fetching, None),
    "load_suite": (lambda: load_suite(own_tasks_only("quiz_words"), "~/data", "~/tasks"), None),
    "lm-eval's model type": (lambda: SparseIFTLM(pretrained="~/scored", device="cpu"), None),
}


def refused_analysis() -> None:
    with pytest.raises(ValueError, match="nothing to analyse"):  # the run has no weights
        analyze(["~/run"], "~/out")


CASES: dict[str, tuple[Callable[[], Any], str | None]] = {  # what is done, and what is there afterwards
    "load_pretrained": (lambda: load_pretrained("~/model"), None),
    "load_config": (lambda: load_config("~/model"), None),
    "load_config of a file": (lambda: load_config("~/model/config.json"), None),
    "save_export": (lambda: save_export(load_pretrained("~/model"), "~/new/out"), "new/out/model.safetensors"),
    "export_run": (lambda: export_run("~/model", "~/out", "sparse"), "out/model.safetensors"),
    "sparseift export": (
        lambda: main(["export", "~/model", "--format", "dense", "--output", "~/out"]),
        "out/model.safetensors",
    ),
    "comparison_table": (lambda: comparison_table(["~/run"]), None),
    "loss_picture": (lambda: loss_picture(["~/run"], "~/loss.png"), "loss.png"),
    "sparseift compare": (lambda: main(["compare", "~/run", "--output", "~/out"]), "out/comparison.md"),
    "write_report": (lambda: write_report(["~/run"], "~/page.html"), "page.html"),
    "sparseift report": (lambda: main(["report", "~/run", "-o", "~/page.html"]), "page.html"),
    "analyze": (refused_analysis, "out"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_tilde_is_the_home_folder(case: str, home: Path) -> None:
    act, made = CASES[case]
    result = act()
    assert result != 2, "the command failed"
    assert made is None or (home / made).exists()


@pytest.mark.usefixtures("quiz")
@pytest.mark.parametrize("case", EVALUATIONS)
def test_a_tilde_is_the_home_folder_in_evaluations(case: str, home: Path) -> None:
    act, made = EVALUATIONS[case]
    result = act()
    assert result != 2, "the command failed"
    assert made is None or (home / made).exists()
