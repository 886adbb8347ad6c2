"""A newcomer's first hour with the installed wheel: what README says, step by step, with a kill in between."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.docs.page_blocks import blocks_of, commands
from tests.helpers.fresh_environment import FreshEnvironment
from tests.helpers.pages import PAGES
from tests.helpers.paths import ROOT

MAX_MINUTES = 6
TRAIN, CALLBACKS = "trainer.train()", "callbacks=[SparseTrainingCallback()]"
KILL = """
import os
import signal

from transformers import TrainerCallback


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 60:
            os.kill(os.getpid(), signal.SIGKILL)


"""
SHORT = ["--max_steps", "4", "--save_steps", "4", "--eval_steps", "4", "--warmup_steps", "1", "--logging_steps", "2"]
SHORT += ["--data.cache_dir", "null"]


def ok(environment: FreshEnvironment, folder: Path, *words: str) -> str:
    """Run a command that has to succeed, and return what it prints."""
    done = environment.run(*words, cwd=folder)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(60 * MAX_MINUTES)
def test_the_first_hour(fresh_environment: FreshEnvironment, tmp_path: Path) -> None:
    begin = time.monotonic()
    blocks = [block for block in blocks_of(PAGES["README.md"]) if not block.how.startswith("not")]
    script, load = (block.code for block in blocks if block.language == "python" and "train.txt" not in block.code)
    shell = {tuple(words[:2]): words for block in blocks if block.language == "bash" for words in commands(block.code)}
    (tmp_path / "recipes").mkdir()
    shutil.copy(ROOT / "recipes" / "demo.yaml", tmp_path / "recipes")
    text = (ROOT / "recipes" / "accelerate_loop.py").read_text(encoding="utf-8")
    (tmp_path / "train.txt").write_text(text * 20, encoding="utf-8")
    (tmp_path / "valid.txt").write_text(text[:1000] * 20, encoding="utf-8")

    # the script of one's own: killed on the way, then resumed
    assert TRAIN in script
    assert CALLBACKS in script
    killed = KILL + script.replace(CALLBACKS, "callbacks=[SparseTrainingCallback(), Kill()]")
    (tmp_path / "killed.py").write_text(killed, encoding="utf-8")
    (tmp_path / "resumed.py").write_text(script.replace(TRAIN, "trainer.train(resume_from_checkpoint=True)"))
    assert fresh_environment.run("python", "killed.py", cwd=tmp_path).returncode == -signal.SIGKILL
    assert (tmp_path / "runs" / "first" / "checkpoint-50").is_dir()
    assert "held-out loss 2.3 nats per byte" in ok(fresh_environment, tmp_path, "python", "resumed.py")
    (tmp_path / "load.py").write_text(f"import torch\n{load}", encoding="utf-8")
    assert "def __init__(self" in ok(fresh_environment, tmp_path, "python", "load.py")
    ok(fresh_environment, tmp_path, *shell["sparseift", "export"])
    assert (tmp_path / "exports" / "dense" / "model.safetensors").is_file()

    # own text: what it costs, and a dense and a sparse run
    assert "FLOP" in ok(fresh_environment, tmp_path, *shell["sparseift", "plan"])
    sparse = [*shell["sparseift", "pretrain"], *SHORT]
    dense = [*(word.replace("runs/mine", "runs/dense") for word in sparse), "--sparse_ift", "null"]
    ok(fresh_environment, tmp_path, *sparse, "--dry-run")
    for words in (sparse, dense):
        ok(fresh_environment, tmp_path, *words)
    ok(
        fresh_environment,
        tmp_path,
        "sparseift",
        "evaluate",
        "--model",
        "runs/mine",
        "--suite",
        "builtin",
        "--limit",
        "2",
    )
    ok(fresh_environment, tmp_path, "sparseift", "report", "runs/dense", "runs/mine", "-o", "report.html")
    assert "mine" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert time.monotonic() - begin < 60 * MAX_MINUTES
