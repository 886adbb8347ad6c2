"""Run lm-eval's own command line, which can then load Sparse-IFT checkpoints: `--model sparseift` is the default.

All words after `sparseift lm-eval` are lm-eval's own, `--help` among them.
"""

from __future__ import annotations

import argparse


def run(arguments: argparse.Namespace) -> str:
    """Hand over to lm-eval, which prints by itself.

    Raises:
        ValueError: lm-eval is not installed, or it refuses the arguments.
    """
    try:
        from sparseift_llm.evaluation.lm_eval_command import main
    except ImportError as error:
        raise ValueError(f"lm-eval is needed: pip install 'sparseift_llm[eval]' ({error})") from error
    main(arguments.words)
    return ""
