"""What `spectral_report` takes for one checkpoint of GPT-3 Small Wide 75%: seconds on the clock, and of all cores.

python benchmarks/spectral_time.py benchmarks/results/spectral_time.json

The checkpoint is freshly initialised, unstructured and in tiles of 128, float32, and lies in a temporary folder.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import scipy
import torch

from sparseift_llm import SparseIFTConfig, sparsify, spectral_report
from sparseift_llm.models.presets import preset_config
from sparseift_llm.utils.files import write_json
from sparseift_llm.utils.provenance import commit, machine, versions


def measure(**storage: Any) -> dict[str, Any]:
    """Seconds for all layers, reading included, and the model's quantities."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        sparsify(preset_config("gpt3-small"), SparseIFTConfig(sparsity=0.75, **storage)).save_pretrained(folder)
        clock, processor = time.perf_counter(), time.process_time()
        report = spectral_report(folder)
        seconds = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
    return {**seconds, **report.model}


def main(output: str) -> None:
    """Measure both structures and write the results."""
    results = {"unstructured": measure(), "block": measure(structure="block", block_size=128)}
    command = f"benchmarks/spectral_time.py {output}"
    facts = {"machine": machine(), "versions": {**versions(), "scipy": scipy.__version__}, "commit": commit()}
    write_json(Path(output), {"command": command, **results, **facts})


if __name__ == "__main__":
    main(sys.argv[1])
