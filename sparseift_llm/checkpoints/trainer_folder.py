"""Trainer checkpoints: which are complete, and which folder a resumed run came from.

A Trainer's first rank writes `trainer_state.json` last, but does not wait for what the others write: that file
names their files, and a checkpoint is complete when it parses and they are whole.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sparseift_llm.utils.files import set_aside

logger = logging.getLogger(__name__)
INCOMPLETE_PREFIX = "incomplete-"
SAVING_NAME = "saving.tmp"  # in a folder that a Trainer has begun to write, until all but its state is there
_OF_TRAINERS = ("training_args.bin", "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state*")
_OPTIMIZER_STATES = ("optimizer*", "global_step*")  # the second is DeepSpeed's
_NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")


def read_trainer_state(checkpoint: Path) -> dict[str, Any] | None:
    """The checkpoint's `trainer_state.json`, or None when it is missing or was cut short."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return state if isinstance(state, dict) else None


def is_complete(checkpoint: Path) -> bool:
    """Whether every rank has written all of its files to the checkpoint."""
    state = read_trainer_state(checkpoint)
    if state is None:
        return False
    names = recorded_by_callback(state, "rank_files") or []
    return all(zipfile.is_zipfile(checkpoint / name) for name in names)  # torch.save writes a zip's end last


def check_has_optimizer_state(checkpoint: Path) -> None:
    """Refuse to resume from a checkpoint that a Trainer wrote with `save_only_model`.

    The Trainer would start optimizer, learning rate and random numbers again, and say nothing.

    Raises:
        ValueError: no optimizer's state is in the folder.
    """
    if not any(any(checkpoint.glob(pattern)) for pattern in _OPTIMIZER_STATES):
        raise ValueError(
            f"{checkpoint} holds no optimizer state (was it written with save_only_model=True?), so that optimizer and "
            "learning rate would start again; start a new run from its weights, or resume from another checkpoint"
        )


def recorded_by_callback(state: Any, key: str, callback_name: str = "SparseTrainingCallback") -> Any:
    """What the callback recorded in a trainer state under `key`, or None."""
    for step in ("stateful_callbacks", callback_name, "attributes", "saved", key):
        state = state.get(step) if isinstance(state, dict) else None
    return state


def numbered_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """The `checkpoint-N` folders of a Trainer's output folder by N, ascending, complete or not."""
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    numbered = {int(path.name.rpartition("-")[2]): path for path in folders if _NUMBERED.fullmatch(path.name)}
    return dict(sorted(numbered.items()))


def is_saved_by_hand(folder: Path) -> bool:
    """Whether a folder is a model that `save_pretrained` wrote outside of a Trainer, whatever its name is."""
    if (folder / SAVING_NAME).exists() or not (folder / CONFIG_NAME).is_file():
        return False
    if any(any(folder.glob(pattern)) for pattern in _OF_TRAINERS):
        return False
    return any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def set_aside_incomplete(output_dir: str | Path) -> list[Path]:
    """Rename half-written `checkpoint-N` folders to `incomplete-checkpoint-N`, so that no resume takes them.

    A model that was saved under such a name by hand, without anything of a Trainer's, stays where it is.

    Args:
        output_dir: a Trainer's output folder; may not exist yet.

    Returns:
        The new paths. Nothing is deleted.
    """
    moved = []
    for folder in numbered_checkpoints(output_dir).values():
        if not is_complete(folder) and not is_saved_by_hand(folder):
            target = set_aside(folder, INCOMPLETE_PREFIX)
            logger.warning("%s was not written to its end; it is now %s and will not be resumed", folder, target.name)
            moved.append(target)
    return moved


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint in `output_dir` after setting half-written ones aside, or None."""
    if not Path(output_dir).is_dir():
        return None
    set_aside_incomplete(output_dir)
    last = get_last_checkpoint(str(output_dir))
    return Path(last) if last else None


def find_resumed_checkpoint(candidates: Iterable[str | Path | None], callback_name: str, digest: str) -> Path:
    """The candidate whose trainer state records the masks' `digest` for `callback_name`.

    Raises:
        ValueError: no candidate does.
    """
    tried = [Path(candidate) for candidate in candidates if isinstance(candidate, str | Path)]
    for folder in tried:
        if recorded_by_callback(read_trainer_state(folder), "masks_digest", callback_name) == digest:
            return folder
    raise ValueError(
        "the masks of the resumed checkpoint were not found in any of: "
        f"{', '.join(map(str, tried))}; set TrainingArguments.resume_from_checkpoint to its folder"
    )
