"""What mask updates cost a data-parallel run: step times with and without an update, and bytes over ranks.

OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 benchmarks/update_cost.py benchmarks/results/update_cost.json

The model is that of `sparseift bench`'s step_cpu (GPT-2, 4 layers, hidden 512, FFN made Wide 75%, AdamW), RigL with
an update on every second step, so that both kinds of steps take turns.
"""

from __future__ import annotations

import os
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config

from sparseift_llm import DSTConfig, SparseIFTConfig, SparseTrainingController, sparsify
from sparseift_llm.bench.measure import seconds_of
from sparseift_llm.bench.rows import ROWS
from sparseift_llm.utils.files import write_json
from sparseift_llm.utils.provenance import commit, machine, versions

PAIRS, EVERY = 9, 100
ROW = ROWS["step_cpu"]


def measure(structure: str) -> dict[str, Any]:
    """Medians over PAIRS steps of each kind, after one pair to warm up."""
    assert isinstance(ROW.model, dict)
    torch.manual_seed(0)
    storage: dict[str, Any] = {"structure": "block", "block_size": ROW.tile} if structure == "block" else {}
    dst = DSTConfig("rigl", update_every_steps=2)
    model = sparsify(GPT2Config(**ROW.model), SparseIFTConfig(scope="ffn", sparsity=0.75, dst=dst, **storage))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), fused=True)
    controller = SparseTrainingController(wrapped, optimizer, total_steps=10**6, micro_batches=1)
    sequences = ROW.tokens // ROW.seq_len // dist.get_world_size()
    tokens = torch.randint(model.config.vocab_size, (sequences, ROW.seq_len))

    def step() -> None:
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times = [seconds_of(step, "cpu") for _ in range(2 * PAIRS + 2)][2:]
    plain, update = statistics.median(times[::2]), statistics.median(times[1::2])
    cost = controller.cost
    return {
        "plain_step_s": plain,
        "update_step_s": update,
        "update_s": cost.seconds / cost.num_updates,
        "bytes_per_update": cost.num_bytes // cost.num_updates,
        "update_every_steps": EVERY,
        "share_of_training_time": (update - plain) / (EVERY * plain + update - plain),
    }


def main(output: str) -> None:
    """Measure both structures; the first rank writes the results."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    dist.init_process_group("gloo")
    results = {structure: measure(structure) for structure in ("unstructured", "block")}
    if dist.get_rank() == 0:
        command = shlex.join(["torchrun", "--nproc_per_node", str(dist.get_world_size()), *sys.argv])
        settings = {
            "command": command,
            "num_ranks": dist.get_world_size(),
            "tokens_per_step": ROW.tokens,
            "repeats": PAIRS,
        }
        facts = {"machine": machine(), "versions": versions(), "commit": commit()}
        write_json(Path(output), {**settings, **results, **facts})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
