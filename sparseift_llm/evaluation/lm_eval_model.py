"""The model type `sparseift` for lm-eval's own command line: importing this module registers it.

    import sparseift_llm.evaluation.lm_eval_model
    lm_eval.simple_evaluate(model="sparseift", model_args={"pretrained": "runs/wide75"}, tasks=["arc_easy"])

It loads every checkpoint of this package, tiles included, and any other model as lm-eval's type `hf` does. lm-eval
looks for model types in a table of its own and not in installed packages, so the import is what makes it known.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype

from sparseift_llm.checkpoints.loading import load_pretrained
from sparseift_llm.utils.outputs import user_path

MODEL_TYPE = "sparseift"
_UNSUPPORTED = ("parallelize", "tp_plan", "peft", "delta", "autogptq", "gptqmodel", "gguf_file")
# Arguments of lm-eval's own about where a model goes; everything else is for from_pretrained.
_PLACEMENT = (*_UNSUPPORTED, "gpus", "max_memory_per_gpu", "max_cpu_memory", "offload_folder", "quantization_config")


@register_model(MODEL_TYPE)
class SparseIFTLM(HFLM):  # type: ignore[misc, unused-ignore]
    """lm-eval's `hf` with Sparse-IFT checkpoints: the same options, prompts, batches and scores.

    Raises:
        ValueError: an option that changes the weights of the layers is given for a Sparse-IFT checkpoint.
    """

    def __init__(self, pretrained: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(pretrained, str) and pretrained.startswith("~"):  # transformers does not know home folders
            pretrained = str(user_path(pretrained))
        super().__init__(pretrained, *args, **kwargs)

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        if not getattr(self.config, "sparse_ift", None):
            super()._create_model(pretrained, **kwargs)
            return
        unsupported = [name for name in _UNSUPPORTED if kwargs.get(name)]
        if unsupported:
            raise ValueError(
                f"model_args {', '.join(unsupported)} cannot be used with the Sparse-IFT checkpoint {pretrained}; "
                "leave them out, or export the model as a dense one with `sparseift export` and use --model hf"
            )
        for_loading = {key: value for key, value in kwargs.items() if key not in _PLACEMENT and value}
        for_loading["dtype"] = get_dtype(kwargs.get("dtype", "auto"))
        model: Any = load_pretrained(pretrained, **for_loading)
        self._model = model.to(self.device)
