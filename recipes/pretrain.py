"""Pretrain a dense GPT or its Sparse-IFT twin from a recipe file, in as many processes as accelerate starts.

    accelerate launch recipes/pretrain.py recipes/demo.yaml [--field value ...]

One process needs no launcher: `sparseift pretrain recipes/demo.yaml`. What both do is in
sparseift_llm/runs/pretrain.py: `transformers.Trainer`, `sparsify` and one callback.
"""

from __future__ import annotations

import sys

from sparseift_llm.runs.pretrain import main

if __name__ == "__main__":
    main(sys.argv[1:])
