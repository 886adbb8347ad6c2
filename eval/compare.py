"""Compare evaluations of several models, dense against sparse, with intervals over items and seeds.

python eval/compare.py dense=d0.json,d1.json,d2.json sparse=s0.json,s1.json,s2.json --output runs/comparison

The work is done in sparseift_llm/evaluation/comparison_command.py.
"""

from __future__ import annotations

import sys

from sparseift_llm.evaluation.comparison_command import main

if __name__ == "__main__":
    main(sys.argv[1:])
