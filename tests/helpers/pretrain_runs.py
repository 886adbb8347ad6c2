"""Helpers of the tests around recipes/: the scripts as modules, and recipes and text small enough to train in a second.

Not a test module; killed_pretrain.py uses it in another process.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.paths import ROOT

RECIPES = ROOT / "recipes"
VOCAB, SEQ_LEN = 260, 16
TOKENS_PER_STEP = 4 * 2 * SEQ_LEN  # batch x accumulation x length
RIGL = {"sparsity": 0.75, "dst": {"algorithm": "rigl", "update_every_steps": 2, "drop_fraction": 0.3}}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}


def write_corpus(folder: Path, num_words: int = 300) -> tuple[Path, Path]:
    """A training text of `num_words` seeded random words and a held-out one of 100."""
    words = random.Random(0)
    train_file, held_out = folder / "train.txt", folder / "held_out.txt"
    for path, number in ((train_file, num_words), (held_out, 100)):
        path.write_text(" ".join(words.choice(["the", "a", "sparse", "weight", "grows"]) for _ in range(number)))
    return train_file, held_out


def tiny_recipe(folder: Path, sparse_ift: dict[str, Any] | None = None, num_words: int = 300, **training: Any) -> Path:
    """A recipe file in `folder`, of a GPT-2 of width 16 with dropout; 12 steps, a checkpoint after each 4.

    Its learning rate never reaches 0, so that a step too many or too few shows in the weights.
    """
    train_file, held_out = write_corpus(folder, num_words)
    values: dict[str, Any] = {
        "model": {"name": "gpt3-small", "config": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": SEQ_LEN}},
        "data": {
            "corpus": str(train_file),
            "eval_corpus": str(held_out),
            "vocab_size": VOCAB,
            "seq_len": SEQ_LEN,
            "max_eval_sequences": 8,
        },
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "warmup_steps": 2,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_steps": 4,
            "disable_tqdm": True,
            "report_to": "none",
            "use_cpu": True,
            "seed": 0,
            **training,
        },
    }
    if sparse_ift is not None:
        values["sparse_ift"] = sparse_ift
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file."""
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def curve(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl without clock times, which no two runs share."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "runtime", "per_second", "utilization", "timed_steps")
    return [{key: value for key, value in line.items() if not key.endswith(timed)} for line in lines]
