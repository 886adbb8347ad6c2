"""How fast a run trains: its FLOPs so far, the seconds spent training, and what the device could do at best."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from sparseift_llm import isoflop
from sparseift_llm.checkpoints.records import read_record
from sparseift_llm.config.families import Wide
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.planning.cost import count_flops, sparse_head
from sparseift_llm.training.controller import SparseTrainingController


class TrainingFlops:
    """Training FLOPs of a sparse run: active weights as they were, dense-gradient steps added.

    Args:
        model: a Sparse-IFT model; what masks do not change is counted here, once.
        tokens_per_step: tokens of one optimizer step on all ranks.
        seq_len: tokens per sequence, for attention FLOPs.
        controller: the run's controller, whose counters are read.
    """

    def __init__(
        self, model: PreTrainedModel, tokens_per_step: int, seq_len: int, controller: SparseTrainingController
    ) -> None:
        flops = count_flops(model, seq_len)
        layers = [layer for layer in sparse_layers(model).values() if layer.role == "projection"]
        active = sum(layer.count_active() for layer in layers)
        self._size = sum(layer.num_weights for layer in layers) + self._weights_of_head(model)
        self._around = isoflop.FlopCount(flops.linear - isoflop.linear_flops(active), flops.attention, flops.logit)
        self._tokens_per_step = tokens_per_step
        self._controller = controller

    @staticmethod
    def _weights_of_head(model: PreTrainedModel) -> int:
        """Weights of a sparse output head, inactive ones included, if mask updates take its dense gradient; else 0."""
        family = read_record(model.config).transformation.family
        if not (isinstance(family, Wide) and family.embedding_updates):
            return 0
        head = sparse_head(model)
        return 0 if head is None else head.num_weights

    def total(self, num_steps: int) -> int:
        """FLOPs of the run's first `num_steps` steps, which the controller has just seen."""
        dense_gradient_weights = self._size * self._controller.num_dense_gradient_steps
        active = self._controller.active_weight_steps
        return isoflop.run_flops(self._tokens_per_step, num_steps, self._around, active, dense_gradient_weights)


WARM_UP_STEPS = 1  # of each process: kernels are compiled in it, and memory is first allocated


class Stopwatch:
    """Steps and seconds of training, from which `tokens_per_second` is made everywhere in this package.

    Waiting for data counts; evaluation and saving do not. The first steps of the process can be counted apart.

    Args:
        warm_up_steps: number of steps, at the start, whose time goes to `warm_up_seconds` and to no reading.
    """

    def __init__(self, warm_up_steps: int = 0) -> None:
        self.warm_up_seconds = 0.0
        self._warm_up_left = warm_up_steps
        self._started: float | None = None  # of the first step, or the last reading
        self._step_ended = 0.0
        self._num_steps = 0
        self._is_interrupted = False

    def begin_step(self) -> None:
        """Before a step's first micro-batch."""
        now = time.perf_counter()
        if self._started is None:
            self._started = now
        elif self._is_interrupted:
            self._started += now - self._step_ended
        self._is_interrupted = False

    def end_step(self) -> None:
        """After the optimizer."""
        if self._warm_up_left > 0 and torch.accelerator.is_available():
            torch.accelerator.synchronize()  # what is queued belongs to the warm-up
        self._num_steps += 1
        self._step_ended = time.perf_counter()
        if self._warm_up_left > 0 and self._started is not None:
            self._warm_up_left -= 1
            self.warm_up_seconds += self._step_ended - self._started
            self._started, self._num_steps = self._step_ended, 0

    def interrupt(self) -> None:
        """Something else than training was done since the last step ended."""
        self._is_interrupted = True

    def read(self) -> tuple[int, float]:
        """Steps and seconds since the last reading or the warm-up; the device must have nothing left to do."""
        now = time.perf_counter()
        result = self._num_steps, 0.0 if self._started is None else now - self._started
        if self._started is not None:  # anew from now, not from the next step: its batch may have to be waited for
            self._started = self._step_ended = now
        self._num_steps, self._is_interrupted = 0, False
        return result


def measured_peak(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOPs per second of the fastest of a few square matrix products: what training on `device` can hope for.

    Takes a fraction of a second and no random numbers.
    """
    side = 768 if device.type == "cpu" else 8192
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        matrix @ matrix
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
