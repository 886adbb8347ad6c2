"""Starts a test script on several CPU processes with torchrun and a time limit. No tests stand here."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.processes import run_within

SECONDS = 270  # a hang is a failure
Scenario = Callable[[int, Path], Any]
Results = dict[str, list[Any]]


def start_ranks(
    module: str, scenarios: str, folder: Path, num_ranks: int = 2, warnings: str = "error"
) -> subprocess.CompletedProcess[str]:
    """`torchrun -m MODULE SCENARIOS FOLDER`; the test fails if it does not end in time."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    command += ["-m", module, scenarios, str(folder)]
    environment = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": warnings}
    return run_within(SECONDS, command, environment)


def run_ranks(
    module: str, scenarios: tuple[str, ...], folder: Path, num_ranks: int = 2, warnings: str = "error"
) -> Results:
    """What each rank reports, by scenario."""
    done = start_ranks(module, ",".join(scenarios), folder, num_ranks, warnings)
    assert done.returncode == 0, done.stdout
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(num_ranks)]
        for name in scenarios
    }


def main(*modules: str) -> None:
    """The script's side: run the functions of `modules` named in argv[1], leave `FOLDER/SCENARIO-RANK.pt`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[2])
    functions = {name: value for module in modules for name, value in vars(importlib.import_module(module)).items()}
    faulthandler.dump_traceback_later(SECONDS - 20)  # where it hangs
    for name in sys.argv[1].split(","):
        result = functions[name](rank, folder)
        torch.save(result, folder / f"{name}-{rank}.pt")
        torch.compiler.set_stance("default")
        dist.barrier()
    gc.collect()  # a DistributedDataParallel in a cycle would keep gloo's threads until the interpreter is torn down
    dist.destroy_process_group()
