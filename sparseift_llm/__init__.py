"""Sparse Iso-FLOP Transformations (arXiv 2303.11525) for pretraining GPT-style transformers models."""

__version__ = "0.1.0"

from sparseift_llm.checkpoint import load_pretrained
from sparseift_llm.config import DSTConfig, SparseIFTConfig
from sparseift_llm.dst.callback import SparseTrainingCallback
from sparseift_llm.dst.controller import SparseTrainingController
from sparseift_llm.planning import count_flops, plan
from sparseift_llm.scaling import optimizer_param_groups
from sparseift_llm.spectral import spectral_report
from sparseift_llm.surgery import sparsify, to_dense

__all__ = [
    "DSTConfig",
    "SparseIFTConfig",
    "SparseTrainingCallback",
    "SparseTrainingController",
    "count_flops",
    "load_pretrained",
    "optimizer_param_groups",
    "plan",
    "sparsify",
    "spectral_report",
    "to_dense",
]
