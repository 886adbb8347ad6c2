"""Which commands take the output folder of a Trainer that is not ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseift_llm.cli import main as sparseift
from tests.helpers.tiny_runs import sparse_gpt2, sparse_trainer


def test_which_commands_take_a_trainers_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, model = tmp_path / "run", sparse_gpt2("rigl").float()
    sparse_trainer(model, run, steps=4, save_strategy="steps", save_steps=4, logging_steps=1).train()
    assert len((run / "layers.jsonl").read_text().splitlines()) == 4
    assert not (run / "metrics.jsonl").exists()
    assert sparseift(["report", str(run), "-o", str(tmp_path / "report.html")]) == 0
    assert "run: finished" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('<figure class="panel steps-') == 2  # losses over steps: such a run logs no tokens
    assert sparseift(["compare", str(run), "--output", str(tmp_path / "comparison")]) == 0
    assert sparseift(["export", str(run), "--format", "sparse", "--output", str(tmp_path / "export")]) == 2
    assert f"the last is {run / 'checkpoint-4'}\n" in capsys.readouterr().err
    checkpoint = str(run / "checkpoint-4")
    assert sparseift(["export", checkpoint, "--format", "sparse", "--output", str(tmp_path / "export")]) == 0
    assert sparseift(["analyze", str(run), "--output", str(tmp_path / "analysis")]) == 0
    assert f"no eval_loss of {run}" in capsys.readouterr().out
