"""`sparseift pretrain --dry-run`: what it says, and that it leaves nothing behind but tokens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparseift_llm.cli import main
from tests.helpers.pretrain_runs import RIGL, TOKENS_PER_STEP, tiny_recipe


@pytest.mark.parametrize("sparse_ift", [None, RIGL], ids=["dense", "sparse"])
def test_it_says_what_training_takes_and_saves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sparse_ift: dict[str, object] | None
) -> None:
    recipe = tiny_recipe(tmp_path, sparse_ift)
    assert main(["pretrain", str(recipe), "--dry-run", "--max_steps", "500"]) == 0
    first, text, training, memory, time, last = capsys.readouterr().out.strip().splitlines()
    if sparse_ift:
        assert first.startswith(
            "wide, scope model: hidden 16->32, FFN 64->128; 75% of 24.6k weights in 8 sparse matrices"
        )
        assert "rigl changes masks every 2 steps" in first
    else:
        assert first.startswith("dense: hidden 16, FFN 64; ")
    assert re.match(r"text: 1\.\d\dk tokens to train on, 128 tokens held out; 260 entries in the vocabulary", text)
    tokens = 500 * TOKENS_PER_STEP
    assert f"training: 500 steps of 8 sequences of 16 tokens, {tokens / 1000:.1f}k tokens in all, " in training
    assert re.match(r"memory: at most \d+(\.\d+)? [MG]B of this whole process in 3 steps; of these ", memory)
    found = re.match(r"time: (\d+(?:\.\d+)?)(k?) tokens/s on cpu, so all steps take about (.*) s; evaluation", time)
    assert found is not None
    speed = float(found[1]) * (1000 if found[2] else 1)
    if found[3].replace(".", "").isdigit():
        assert float(found[3]) == pytest.approx(tokens / speed, rel=0.1)
    assert last == f"nothing was saved but tokens, in {tmp_path / 'run' / 'data'}"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"data"}


def test_a_run_in_the_same_folder_finds_the_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = str(tiny_recipe(tmp_path, save_strategy="no", eval_strategy="no"))
    caplog.set_level("INFO")
    assert main(["pretrain", recipe, "--dry-run"]) == 0
    assert "tokenising" in caplog.text
    caplog.clear()
    assert main(["pretrain", recipe, "--max_steps", "2"]) == 0
    assert "tokenising" not in caplog.text
    assert "dense: hidden 16, FFN 64; " in caplog.text  # the summary when training starts
    assert (tmp_path / "run" / "summary.json").is_file()


def test_it_refuses_what_training_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(tiny_recipe(tmp_path, num_words=20))
    assert main(["pretrain", recipe, "--dry-run"]) == 2
    assert "one optimizer step needs 8" in capsys.readouterr().err
    assert main(["pretrain", recipe, "--dry-run", "--learning_rte", "1"]) == 2
    assert "did you mean 'learning_rate'?" in capsys.readouterr().err
