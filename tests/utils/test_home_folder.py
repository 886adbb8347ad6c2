"""`~` is the home folder wherever a user gives a path; recipes are tried in tests/e2e/test_pretrain.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparseift_llm import load_pretrained, save_export
from sparseift_llm.analysis.across_runs import analyze
from sparseift_llm.api import export_run
from sparseift_llm.cli import main
from sparseift_llm.models.presets import load_config
from sparseift_llm.reporting.comparison import comparison_table, loss_picture
from sparseift_llm.reporting.page.page import write_report
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
