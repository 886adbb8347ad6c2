"""Trainer checkpoints: which are complete, which folder a resumed run came from; and loading with masks.

A Trainer writes `trainer_state.json` last, so a checkpoint is complete exactly when that file parses.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from sparseift_llm.mask_file import apply_masks, read_masks
from sparseift_llm.planning import plan_of
from sparseift_llm.surgery import install_sparse_layers

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


def set_aside_incomplete(output_dir: str | Path) -> list[Path]:
    """Rename half-written `checkpoint-N` folders to `incomplete-checkpoint-N`, so that no resume takes them.

    Args:
        output_dir: a Trainer's output folder; may not exist yet.

    Returns:
        The new paths. Nothing is deleted.
    """
    moved = []
    for folder in sorted(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        if folder.is_dir() and _NUMBERED.fullmatch(folder.name) and read_trainer_state(folder) is None:
            target = folder.with_name(INCOMPLETE_PREFIX + folder.name)
            number = 1
            while target.exists():
                number += 1
                target = folder.with_name(f"{INCOMPLETE_PREFIX}{folder.name}.{number}")
            folder.rename(target)
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
        recorded: Any = read_trainer_state(folder)
        for key in ("stateful_callbacks", callback_name, "attributes", "saved", "masks_digest"):
            recorded = recorded.get(key) if isinstance(recorded, dict) else None
        if recorded == digest:
            return folder
    raise ValueError(
        "the masks of the resumed checkpoint were not found in any of: "
        f"{', '.join(map(str, tried))}; set TrainingArguments.resume_from_checkpoint to its folder"
    )


def load_pretrained(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a saved Sparse-IFT model with its masks, ready to train on or to analyse.

    For inference `AutoModelForCausalLM.from_pretrained(folder)` gives a stock model with the same logits.

    Args:
        folder: where `save_pretrained` or a Trainer wrote the model.
        kwargs: passed on to `from_pretrained`, e.g. `dtype`.

    Raises:
        ValueError: no Sparse-IFT model, or its masks are missing or damaged.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    plan = plan_of(model)
    masks = read_masks(folder)
    install_sparse_layers(model, plan)
    apply_masks(model, masks, folder)
    return model
