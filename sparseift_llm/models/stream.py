"""How the norms of a decoder stand between its residual stream and its matrices, found by running the model once.

No list of model types says it: `post_attention_layernorm` reads the stream in Llama, and writes to it in Gemma 2.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseift_llm.models.norms import is_norm


@dataclass(frozen=True)
class StreamNorms:
    """The norms as wide as the residual stream of a model.

    Args:
        reading: by module path of a norm that normalises the stream, the matrices that read its output.
        writing: norms of what a matrix has computed, which is added to the stream behind them.
        without_norm: matrices that read the stream itself.
    """

    reading: Mapping[str, tuple[str, ...]]
    writing: tuple[str, ...]
    without_norm: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of the norms."""
        return (*self.reading, *self.writing)


@dataclass
class _Trace:
    """Where the inputs and outputs of modules lie in memory, and how wide inputs are, by module path.

    The tensors are kept, so that no two of them have one address.
    """

    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)

    def record(self, name: str, input: Any, output: Any) -> None:
        if isinstance(input, Tensor) and isinstance(output, Tensor):
            self.kept += [input, output]
            self.inputs[name], self.outputs[name] = input.data_ptr(), output.data_ptr()
            self.widths[name] = input.shape[-1]


def stream_norms(model: PreTrainedModel, readers: Iterable[str], writers: Iterable[str]) -> StreamNorms:
    """Find the norms of a model by computing the logits of two tokens.

    Args:
        model: a stock model with weights, on a real device.
        readers: module paths of the matrices whose input is as wide as the stream, the output head among them.
        writers: module paths of the matrices whose output is added to the stream, without the embedding.

    Raises:
        ValueError: a norm reads the stream, but no matrix reads the norm, or a matrix was not called at all.
    """
    readers, writers = tuple(readers), tuple(writers)
    width = model.config.hidden_size
    norms = [name for name, module in model.named_modules() if is_norm(module)]
    trace = _run(model, [*norms, *readers, *writers])
    if unused := [name for name in (*readers, *writers) if name not in trace.inputs]:
        raise ValueError(f"{unused[0]} of {model.config.model_type} is not called when logits are computed")
    written = {trace.outputs[name] for name in writers}
    inside = {trace.outputs[name] for name in readers}  # queries and keys that are normalised before they meet
    reading: dict[str, tuple[str, ...]] = {}
    writing: list[str] = []
    for name in norms:
        address = trace.inputs.get(name)
        if address is None or address in inside or trace.widths[name] != width:
            continue
        if address in written:
            writing.append(name)
            continue
        reading[name] = tuple(reader for reader in readers if trace.inputs[reader] == trace.outputs[name])
        if not reading[name]:
            raise ValueError(f"no projection of {model.config.model_type} reads what {name} computes")
    read = {reader for found in reading.values() for reader in found}
    return StreamNorms(reading, tuple(writing), tuple(reader for reader in readers if reader not in read))


@torch.no_grad()
def subtracts_mean(norm: nn.Module, width: int) -> bool:
    """Whether a norm of vectors of `width` takes their mean off, as LayerNorm does and RMSNorm does not."""
    trial = copy.deepcopy(norm).double()
    x = torch.linspace(-1, 2, width, dtype=torch.float64, device=_device_of(norm)).sin()[None]
    found = trial(x)
    return float((trial(x + 1) - found).abs().max()) < 1e-3 * float(found.abs().max())  # norms may sum in float32


@torch.no_grad()
def _run(model: PreTrainedModel, names: Iterable[str]) -> _Trace:
    trace, handles, training = _Trace(), [], model.training
    for name in dict.fromkeys(names):

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            trace.record(name, next(iter((*args, *kwargs.values())), None), output)

        handles.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
    try:
        model.eval()
        model(input_ids=torch.tensor([[0, 1]], device=model.device), use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return trace


def _device_of(norm: nn.Module) -> torch.device | None:
    parameter = next(norm.parameters(), None)
    return None if parameter is None else parameter.device
