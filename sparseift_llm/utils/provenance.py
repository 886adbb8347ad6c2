"""Which code, libraries and machine a figure comes from."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def commit() -> str | None:
    """The git commit this package runs from, `-dirty` if files were changed; None outside a clone."""
    folder = Path(__file__).parents[1]
    if not (folder.parent / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """Kind of machine a run's speed belongs to: processor architecture, cores, threads, GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.machine(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in ("sparseift_llm", "torch", "triton", "transformers", "accelerate", "datasets", "tokenizers"):
        with contextlib.suppress(PackageNotFoundError):  # triton and datasets are optional
            found[name] = version(name)
    return found
