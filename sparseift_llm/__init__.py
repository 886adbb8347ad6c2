"""Sparse Iso-FLOP Transformations (arXiv 2303.11525) for pretraining GPT-style transformers models.

Importing the package teaches transformers its checkpoints: `AutoModelForCausalLM.from_pretrained`, pipelines and
lm-eval load them. `load_pretrained` gives the trainable model in every case; `save_export` writes a stock dense model,
or active weights alone.

The import is cheap. torch, transformers and the modules of this package are imported when a public name is first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from sparseift_llm._moved import find_old_modules
from sparseift_llm.checkpoints.registration import register_with_transformers

if TYPE_CHECKING:  # for type checkers and editors; at run time `__getattr__` imports them, from `_PUBLIC` below
    from sparseift_llm.analysis.spectral import spectral_report
    from sparseift_llm.api import load_pretrained, save_export, sparsify, to_dense, to_semi_structured
    from sparseift_llm.checkpoints.summary import print_sparsity
    from sparseift_llm.config.transform import DSTConfig, SparseIFTConfig
    from sparseift_llm.layers.semi_structured import use_semi_structured_kernels
    from sparseift_llm.planning.cost import count_flops
    from sparseift_llm.planning.planner import plan
    from sparseift_llm.trainer.callback import SparseTrainingCallback
    from sparseift_llm.training.controller import SparseTrainingController
    from sparseift_llm.training.learning_rates import optimizer_param_groups

    __version__: str

__all__ = [
    "DSTConfig",
    "SparseIFTConfig",
    "SparseTrainingCallback",
    "SparseTrainingController",
    "count_flops",
    "load_pretrained",
    "optimizer_param_groups",
    "plan",
    "print_sparsity",
    "save_export",
    "sparsify",
    "spectral_report",
    "to_dense",
    "to_semi_structured",
    "use_semi_structured_kernels",
]

# The module that each public name lives in. A test compares this table with `__all__` and with the imports above.
_PUBLIC = {
    "DSTConfig": "config.transform",
    "SparseIFTConfig": "config.transform",
    "SparseTrainingCallback": "trainer.callback",
    "SparseTrainingController": "training.controller",
    "count_flops": "planning.cost",
    "load_pretrained": "api",
    "optimizer_param_groups": "training.learning_rates",
    "plan": "planning.planner",
    "print_sparsity": "checkpoints.summary",
    "save_export": "api",
    "sparsify": "api",
    "spectral_report": "analysis.spectral",
    "to_dense": "api",
    "to_semi_structured": "api",
    "use_semi_structured_kernels": "layers.semi_structured",
}


def __getattr__(name: str) -> Any:
    """Import a public name, the version, or a module of this package when it is first asked for."""
    value: Any
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version(__name__)
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # so that this function is called only once per name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


find_old_modules()
register_with_transformers()
