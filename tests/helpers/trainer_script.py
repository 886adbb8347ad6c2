"""Plain Trainer runs for test_callback_kill.py, each in a process of its own that may kill itself at a chosen point.

Usage: `python -m tests.helpers.trainer_script '[{"output_dir": ..., "result": ..., "kill": ..., ...}, ...]'`. A
single run is this process; several are forked from it one after the other, to import torch once, and a JSON list
tells each one's exit status and the folders it left.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # slow to import, and needed by every run: before forking
import transformers.trainer_utils
from transformers import TrainerCallback, TrainerState

import sparseift_llm.checkpoints.saving
from sparseift_llm import SparseTrainingController
from tests.helpers.tiny_runs import final_state, sparse_gpt2, sparse_trainer

SECOND = "checkpoint-8"  # the checkpoint during whose writing a run is killed


def kill() -> None:
    """The end of this process, as of a power cut: no handlers, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


class Observer(TrainerCallback):
    """Records where a run starts; kills it after `kill_after` steps."""

    def __init__(self, kill_after: int | None) -> None:
        self.kill_after = kill_after
        self.first_step = -1

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.first_step = state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.kill_after:
            kill()


def kill_after_update() -> None:
    """Right after the mask update of step 6, before anything else sees the new masks."""
    update = SparseTrainingController._update_masks

    def patched(self: SparseTrainingController) -> None:
        update(self)
        if self.step == 6:
            kill()

    SparseTrainingController._update_masks = patched  # type: ignore[method-assign]


def kill_before_masks() -> None:
    """With the weights written and the masks not."""
    save = sparseift_llm.checkpoints.saving.save_masks

    def patched(model: Any, folder: Any) -> Any:
        return kill() if Path(folder).name == SECOND else save(model, folder)

    sparseift_llm.checkpoints.saving.save_masks = patched


def kill_in_optimizer() -> None:
    """Half-way through optimizer.pt."""
    save = torch.save

    def patched(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        save(value, file, *args, **kwargs)
        path = Path(str(file))
        if path.parent.name == SECOND and path.name == "optimizer.pt":
            os.truncate(path, path.stat().st_size // 2)
            kill()

    torch.save = patched


def kill_in_state(share: float | None) -> None:
    """With `share` of trainer_state.json written; None: before the file exists."""
    save = TrainerState.save_to_json

    def patched(self: TrainerState, json_path: str) -> None:
        path = Path(json_path)
        if path.parent.name != SECOND:
            save(self, json_path)
            return
        if share is not None:
            save(self, json_path)
            os.truncate(path, int(path.stat().st_size * share))
        kill()

    TrainerState.save_to_json = patched  # type: ignore[method-assign]


def kill_in_rotation() -> None:
    """While an old checkpoint is being deleted, its first file gone."""

    remove = shutil.rmtree

    def patched(path: str, **kwargs: Any) -> None:
        if not Path(path).name.startswith("checkpoint-"):  # other deletions have nothing to do with rotation
            remove(path, **kwargs)
            return
        (Path(path) / "trainer_state.json").unlink()
        kill()

    assert transformers.trainer_utils.shutil is shutil
    shutil.rmtree = patched  # type: ignore[assignment]


KILLS = {
    "after_update": kill_after_update,
    "before_masks": kill_before_masks,
    "in_optimizer": kill_in_optimizer,
    "before_state": lambda: kill_in_state(None),
    "empty_state": lambda: kill_in_state(0.0),
    "half_state": lambda: kill_in_state(0.5),
    "in_rotation": kill_in_rotation,
}


def run(
    output_dir: str, result: str, algorithm: str = "rigl", kill: str = "", resume: bool = False, limit: int = 0
) -> None:
    """12 steps with a checkpoint after every fourth; `result` gets the final state."""
    if kill in KILLS:
        KILLS[kill]()
    observer = Observer(kill_after=5 if kill == "between" else None)
    trainer = sparse_trainer(
        sparse_gpt2(algorithm, dropout=0.1),
        output_dir,
        save_strategy="steps",
        save_steps=4,
        save_total_limit=limit or None,
    )
    trainer.add_callback(observer)
    trainer.train(resume_from_checkpoint=resume)
    torch.save({**final_state(trainer), "first_step": observer.first_step}, result)


def forked(options: dict[str, Any]) -> tuple[int, list[str]]:
    """`run` in a child process: its exit status, negative for a signal, and the folders in its `output_dir` then."""
    child = os.fork()
    if child == 0:
        try:
            run(**options)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, sorted(path.name for path in Path(options["output_dir"]).iterdir() if path.is_dir())


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = json.loads(sys.argv[1])
    if len(runs) == 1:
        run(**runs[0])
    else:
        with tempfile.TemporaryDirectory() as folder:
            sparse_gpt2().save_pretrained(folder)  # fills transformers' caches, once for all children
        gc.freeze()
        print(json.dumps([forked(options) for options in runs]))
