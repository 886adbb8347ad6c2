"""Evaluate a run, a checkpoint or a hub model on the Open LLM Leaderboard's tasks or the built-in suite.

python eval/leaderboard.py --model runs/demo/sparse --suite builtin

The work is done in sparseift_llm/evaluation/command.py.
"""

from __future__ import annotations

import sys

from sparseift_llm.evaluation.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
