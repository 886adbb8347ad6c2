"""Results and words of the study at equal whole-model FLOPs, for its tests. No tests stand here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def corpus_word(corpus: Any) -> str:
    """For the command line."""
    return f"{corpus.name}={corpus.files['train']},{corpus.files['held_out']}"


def write_result(folder: Path, rates: Any, seed: int, loss: float | None, flops: float = 100) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    result = {"rate": rates.rate, "embedding_factor": rates.embedding_factor, "seed": seed, "eval_loss": loss}
    result |= {"train_flops": flops, "weight_decay": rates.weight_decay, "attention_dropout": rates.attention_dropout}
    (folder / f"{rates}-seed{seed}.json").write_text(json.dumps(result))
