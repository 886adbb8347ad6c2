"""The files of a run folder: their names, and which keys they must have. Every reader and writer takes them from here.

Names of files that are also written without a run (masks, the mask history, `layers.jsonl`) are declared where they are
written, and only repeated here.
"""

from __future__ import annotations

from transformers.trainer import TRAINER_STATE_NAME as TRAINER_STATE_NAME

from sparseift_llm.checkpoints.mask_file import MASKS_NAME as MASKS_NAME
from sparseift_llm.trainer.log import HISTORY_NAME as HISTORY_NAME
from sparseift_llm.trainer.log import LAYERS_NAME as LAYERS_NAME

METRICS_NAME = "metrics.jsonl"  # one line per log event, written while the run goes on
RECIPE_NAME = "recipe.json"  # the configuration, written at the start
SUMMARY_NAME = "summary.json"  # the result, written at the end
SPECTRAL_NAME = "spectral.json"  # written by `sparseift analyze`
SPECTRAL_FORMAT = "sparseift_spectral_v1"
EVALUATIONS = "eval_*.json"  # a pattern: result files of evaluations
PROGRESS_SUFFIX = ".progress.json"  # instead of `.json`: an evaluation that has not reached its end
DATA_NAME = "data"  # the folder of stored tokens, unless a recipe names another

RECIPE_SECTIONS = ("model", "data", "sparse_ift", "training", "lr_decay_steps")
SUMMARY_KEYS = (  # without one of these, a file is not the summary of a run
    "eval_loss",
    "perplexity",
    "bits_per_byte",
    "linear_active_params",
    "stored_params",
    "linear_sparsity",
    "linear_flops_per_token",
    "forward_flops_per_token",
    "train_flops",
    "train_tokens",
    "tokens_per_second",
)
WRITTEN_NAMES = (  # files that a run writes itself and that have the suffix of a text file
    METRICS_NAME,
    RECIPE_NAME,
    SUMMARY_NAME,
    LAYERS_NAME,
    SPECTRAL_NAME,
    "config.json",
    f"checkpoint-1/{TRAINER_STATE_NAME}",
    "checkpoint-1/config.json",
    f"{DATA_NAME}/tokens-0/manifest.json",
)
