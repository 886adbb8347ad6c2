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

from sparseift_llm.utils.files import set_aside

logger = logging.getLogger(__name__)
INCOMPLETE_PREFIX = "incomplete-"
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


def set_aside_incomplete(output_dir: str | Path) -> list[Path]:
    """Rename half-written `checkpoint-N` folders to `incomplete-checkpoint-N`, so that no resume takes them.

    Args:
        output_dir: a Trainer's output folder; may not exist yet.

    Returns:
        The new paths. Nothing is deleted.
    """
    moved = []
    for folder in numbered_checkpoints(output_dir).values():
        if not is_complete(folder):
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
