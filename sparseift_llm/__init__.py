"""Sparse Iso-FLOP Transformations (arXiv 2303.11525) for pretraining GPT-style transformers models.

Importing the package teaches transformers its checkpoints: `AutoModelForCausalLM.from_pretrained`, pipelines and
lm-eval load them. `load_pretrained` gives the trainable model in every case; `save_export` writes a stock dense model,
or active weights alone.
"""

__version__ = "0.1.0"

from sparseift_llm.analysis.spectral import spectral_report
from sparseift_llm.checkpoints.export import save_export
from sparseift_llm.checkpoints.loading import load_pretrained
from sparseift_llm.config.transform import DSTConfig, SparseIFTConfig
from sparseift_llm.conversion.install import sparsify, to_dense
from sparseift_llm.conversion.scaling import optimizer_param_groups
from sparseift_llm.planning.planner import count_flops, plan
from sparseift_llm.trainer.callback import SparseTrainingCallback
from sparseift_llm.training.controller import SparseTrainingController

__all__ = [
    "DSTConfig",
    "SparseIFTConfig",
    "SparseTrainingCallback",
    "SparseTrainingController",
    "count_flops",
    "load_pretrained",
    "optimizer_param_groups",
    "plan",
    "save_export",
    "sparsify",
    "spectral_report",
    "to_dense",
]
