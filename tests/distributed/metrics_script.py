"""What test_metrics_ranks.py runs under torchrun: mask metrics of Trainers and of a sharded loop.

Usage: see torchrun.py.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from transformers import TrainerCallback

from sparseift_llm import SparseTrainingCallback, SparseTrainingController
from sparseift_llm.metrics.mask_history import MaskMetrics
from sparseift_llm.metrics.step_probe import StepSample
from tests.distributed.torchrun import main
from tests.helpers.tiny_runs import batches, make_trainer, sparse_gpt2, train

STEPS = 10


class Logs(TrainerCallback):
    """What each rank logs of training steps."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.logs.append({"step": state.global_step, **logs})


def trainer(rank: int, folder: Path) -> dict[str, Any]:
    """Two rows per rank; then the same resumed from its own checkpoint."""
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 5}
    results, files = [], []
    for resume in (None, str(folder / "out" / "checkpoint-5")):
        logs = Logs()
        callback = SparseTrainingCallback("all", tokens_per_step=32, seq_len=8, peak_flops_per_second=1e9)
        run = make_trainer(sparse_gpt2("rigl"), folder / "out", callback, logs, **options)
        assert run.args.world_size == 2
        run.train(resume_from_checkpoint=resume)
        dist.barrier()
        files.append((folder / "out" / "layers.jsonl").read_text())
        results.append(logs.logs)
    return {"logs": results[0], "resumed": results[1], "layers": files[0], "layers_resumed": files[1]}


def sharded(rank: int, folder: Path) -> dict[str, Any]:
    """Gradients spread over ranks by FSDP2: their norm, and the masks' metrics."""
    model = sparse_gpt2("rigl")
    for block in model.transformer.h:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    optimizer = AdamW(model.parameters(), lr=0.01)
    controller = SparseTrainingController(model, optimizer, total_steps=STEPS)
    metrics, sample = MaskMetrics(controller), StepSample(model, controller.layers)
    norms = []
    for batch in batches(STEPS):
        rows = batch.chunk(dist.get_world_size())[rank]
        sample.begin()
        model(input_ids=rows, labels=rows).loss.backward()
        sample.end()
        norms.append(float(sample.grad_norm))  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()
    values = metrics.values()
    del values["mask_update_seconds"], values["mask_update_bytes"]
    return {"norms": norms, "values": values, "saturated": sample.saturated}


def joined(rank: int, folder: Path) -> dict[str, Any]:
    """The second rank runs out of data, and of updates to follow."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sparseift_llm.metrics.mask_history").addHandler(handler)
    wrapped = DistributedDataParallel(sparse_gpt2("rigl"))
    optimizer = AdamW(wrapped.parameters(), lr=0.01)
    controller = SparseTrainingController(wrapped, optimizer, total_steps=20, micro_batches=1)
    metrics = MaskMetrics(controller)
    with contextlib.ExitStack() as stack:
        stack.enter_context(Join([wrapped, controller]))
        train(wrapped, optimizer, batches((7, 3)[rank], seed=rank))
    torch.compiler.set_stance("default")
    return {"values": metrics.values(), "messages": records}


if __name__ == "__main__":
    main("tests.distributed.metrics_script")
