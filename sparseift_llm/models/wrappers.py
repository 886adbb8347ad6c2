"""Models inside of wrappers: `torch.compile`, DistributedDataParallel and the like."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from transformers import PreTrainedModel

from sparseift_llm.layers.base import plain_name


def pretrained_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside one that may be wrapped (DistributedDataParallel, torch.compile).

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"{type(model).__name__} holds no transformers model, so its sparse_ift record cannot be read")


def remove_compiled_parts(model: nn.Module) -> None:
    """Put the original modules in place of those that were compiled one by one (`layer = torch.compile(layer)`)."""
    for name, module in list(model.named_modules()):
        if isinstance(module, OptimizedModule):
            model.set_submodule(plain_name(name).rstrip("."), module._orig_mod)


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names of the model without wrappers, as a checkpoint has them."""
    return {plain_name(name): tensor for name, tensor in state.items()}
