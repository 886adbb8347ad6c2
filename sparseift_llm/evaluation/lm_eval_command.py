"""lm-eval's own command line with the model type `sparseift`: `sparseift lm-eval`.

Everything is lm-eval's: its options, its output, its files. Only the model type is added, and taken if none is named.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lm_eval.__main__ import cli_evaluate

from sparseift_llm.evaluation.lm_eval_model import MODEL_TYPE

_NAMES_A_MODEL = ("--model", "-M", "--config", "-C")


def main(words: Sequence[str]) -> None:
    """Run lm-eval's command line.

    Args:
        words: its arguments, e.g. `["--model_args", "pretrained=runs/wide75", "--tasks", "arc_easy"]`.
    """
    given, sys.argv = sys.argv, ["sparseift lm-eval", *with_model(words)]  # lm-eval takes words from nowhere else
    try:
        cli_evaluate()
    finally:
        sys.argv = given


def with_model(words: Sequence[str]) -> list[str]:
    """The arguments with `--model sparseift` if they start an evaluation and name no model themselves."""
    is_run = bool(words) and (words[0] == "run" or words[0].startswith("-")) and not {"-h", "--help"} & set(words)
    has_model = any(word.partition("=")[0] in _NAMES_A_MODEL or word[:2] in ("-M", "-C") for word in words)
    return [*words] if not is_run or has_model else [*words, "--model", MODEL_TYPE]
