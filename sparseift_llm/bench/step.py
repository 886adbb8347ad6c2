"""Level `step`: a training step of a model that is made Wide, with AdamW and mask updates."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from sparseift_llm.api import sparsify
from sparseift_llm.bench.measure import peak_bytes, take_turns
from sparseift_llm.bench.results import buffer_bytes, floor_seconds, row_result
from sparseift_llm.bench.rows import VARIANTS, Row
from sparseift_llm.config.families import Wide
from sparseift_llm.config.transform import DSTConfig, SparseIFTConfig
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.models.architectures import build_model
from sparseift_llm.models.presets import load_config
from sparseift_llm.planning.cost import count_flops
from sparseift_llm.training.controller import SparseTrainingController

UPDATE_EVERY_STEPS = 100


def measure_step(row: Row, repeats: int) -> dict[str, Any]:
    """Time training steps of the three models in turns, then steps with a mask update, and count their bytes.

    The time of a sparse contestant is that of a plain step plus one `UPDATE_EVERY_STEPS`-th of what an update adds.

    Returns:
        See `row_result`, and the seconds and peak bytes of steps with a mask update.
    """
    torch.manual_seed(0)
    models = models_of(row)
    optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}
    vocab, batch = models["dense"].config.vocab_size, row.tokens // row.seq_len
    tokens = torch.randint(vocab, (batch, row.seq_len), device=row.device)

    def step(name: str) -> None:
        with torch.autocast(row.device, row.dtype, enabled=row.dtype != torch.float32):
            loss = models[name](input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    times = take_turns({name: {"step": partial(step, name)} for name in VARIANTS}, row.device, repeats)
    total = {name: statistics.median(times[name]["step"]) for name in VARIANTS}
    step_peaks = {name: peak_bytes(partial(step, name), row.device) for name in VARIANTS}
    sparse = ("masked", "block")
    controllers = [SparseTrainingController(models[name], optimizers[name], 10**6, micro_batches=1) for name in sparse]
    for controller in controllers:
        controller.accept_optimizer_steps()  # those that were timed above without updates
    updates = take_turns({name: {"step": partial(step, name)} for name in sparse}, row.device, max(3, repeats // 3))
    update_peaks = {name: peak_bytes(partial(step, name), row.device) for name in sparse}
    for controller in controllers:
        controller.close()
    update_s = {name: statistics.median(updates[name]["step"]) for name in sparse}
    for name in sparse:
        total[name] += max(0.0, update_s[name] - total[name]) / UPDATE_EVERY_STEPS
    states = {name: _state_bytes(models[name], optimizers[name]) for name in VARIANTS}
    flops = count_flops(models["block"], row.seq_len).training * row.tokens
    traffic = 2 * states["block"]  # the optimizer reads and writes all of it once
    return {
        **row_result(row, total, floor_seconds(row, flops, traffic), states, step_peaks),
        **{f"{name}_update_step_s": update_s[name] for name in sparse},
        **{f"{name}_update_step_peak_bytes": update_peaks[name] for name in sparse},
        "update_every_steps": UPDATE_EVERY_STEPS,
    }


def models_of(row: Row) -> dict[str, PreTrainedModel]:
    """The dense model, and its twins made Wide. With a controller, their masks change on every step."""
    config = _dense_config(row)
    dst = DSTConfig("rigl", update_every_steps=1)
    masked = SparseIFTConfig(family=Wide(row.scope), sparsity=row.sparsity, dst=dst)
    block = dataclasses.replace(masked, structure="block", block_size=row.tile)
    models = {
        "dense": build_model(copy.deepcopy(config)),
        "masked": sparsify(config, masked),
        "block": sparsify(config, block),
    }
    return {name: model.to(row.device) for name, model in models.items()}  # type: ignore[arg-type]


def _dense_config(row: Row) -> PretrainedConfig:
    if row.scope == "residual":
        return LlamaConfig(**row.model) if isinstance(row.model, dict) else load_config(row.model)
    config = GPT2Config(**row.model) if isinstance(row.model, dict) else load_config(row.model)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    # One kernel instead of eight elementwise ones, so that the dense model is as fast as it can be.
    config.activation_function = "gelu_pytorch_tanh"
    return config


def _state_bytes(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, gradients, optimizer state, and masks or tile indices, as they are in memory."""
    parameters = sum(2 * parameter.nbytes for parameter in model.parameters())
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return parameters + sum(value.nbytes for value in moments) + sum(map(buffer_bytes, sparse_layers(model).values()))
