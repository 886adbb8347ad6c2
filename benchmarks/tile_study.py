"""What the size of a tile costs in quality: a small GPT-2 dense, unstructured and in tiles, learning rates swept.

    python benchmarks/tile_study.py run [--jobs 2]    # hours; finished runs are kept, killed ones go on
    python benchmarks/tile_study.py table

Every row trains on the same tokens with the same linear FLOPs per token; a row's result is that of its best
learning rate. Summaries are kept in results/tile_study, one file a run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECIPE = HERE / "tile_study.yaml"
RESULTS = HERE / "results" / "tile_study"
RUNS = Path("runs") / "tile_study"
LEARNING_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
HIDDEN = 256  # of the Wide 75% twin


@dataclass(frozen=True)
class Row:
    """One model and way to search its mask: `tile` None is dense, 0 unstructured."""

    tile: int | None
    algorithm: str = "static"

    @property
    def name(self) -> str:
        """File-name safe and unique."""
        return "dense" if self.tile is None else f"{f'tile{self.tile}' if self.tile else 'mask'}-{self.algorithm}"

    @property
    def title(self) -> str:
        """As the table's first cell says it."""
        if self.tile is None:
            return "dense"
        kind = f"tiles of {self.tile}, {HIDDEN // self.tile} per side" if self.tile else "unstructured"
        return f"Wide 75%, {kind}, {self.algorithm}"

    def overrides(self) -> list[str]:
        """What this row changes in the recipe."""
        if self.tile is None:
            return []
        structure = {"structure": "block", "block_size": self.tile} if self.tile else {"structure": "unstructured"}
        dst = {"algorithm": self.algorithm, "update_every_steps": 50, "drop_fraction": 0.3}
        sparse = {"family": "wide", "scope": "model", "sparsity": 0.75, **structure, "dst": dst}
        return ["--sparse_ift", json.dumps(sparse)]


ROWS = (Row(None), *(Row(tile, algorithm) for tile in (0, 8, 16, 32) for algorithm in ("rigl", "static")))


def main(words: list[str] | None = None) -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what has no summary yet")
    run.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    commands.add_parser("table", help="print the table of all finished runs")
    choice = parser.parse_args(words)
    if choice.command == "table":
        print(table(read_results()))
        return
    with ThreadPoolExecutor(choice.jobs) as pool:
        missing = [pool.submit(train, row, rate) for row, rate in pairs() if not result_path(row, rate).is_file()]
        for done in missing:
            done.result()


def pairs() -> Iterator[tuple[Row, float]]:
    """All runs, so ordered that the rows can be compared long before the last one."""
    return ((row, rate) for rate in sorted(LEARNING_RATES, key=lambda rate: abs(rate - 8e-3)) for row in ROWS)


def result_path(row: Row, rate: float) -> Path:
    """Where the summary of a run is kept."""
    return RESULTS / f"{row.name}-lr{rate:g}.json"


def train(row: Row, rate: float) -> None:
    """One run, gone on with if it was killed; raises CalledProcessError if it fails."""
    output = RUNS / f"{row.name}-lr{rate:g}"
    output.mkdir(parents=True, exist_ok=True)
    options = {"output_dir": output, "learning_rate": rate, "resume_from_checkpoint": "true"}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "recipes/pretrain.py", str(RECIPE.relative_to(HERE.parent)), *row.overrides(), *words]
    with (output / "log.txt").open("a", encoding="utf-8") as log:
        subprocess.run(
            command, cwd=HERE.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=log, stderr=log
        )
    RESULTS.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE.parent / output / "summary.json", result_path(row, rate))


def read_results() -> dict[tuple[Row, float], dict[str, Any]]:
    """The summaries of all finished runs."""
    finished = ((row, rate, result_path(row, rate)) for row, rate in pairs())
    return {(row, rate): json.loads(path.read_text("utf-8")) for row, rate, path in finished if path.is_file()}


def table(results: dict[tuple[Row, float], dict[str, Any]]) -> str:
    """Held-out loss of each row by learning rate, as a Markdown table; the best of each row in bold."""
    rates = sorted(LEARNING_RATES)
    lines = ["| held-out loss (nats/token) | " + " | ".join(f"lr {rate:g}" for rate in rates) + " |"]
    lines.append("| --- |" + " ---: |" * len(rates))
    for row in ROWS:
        losses = {rate: results[row, rate]["eval_loss"] for rate in rates if (row, rate) in results}
        best = min(losses.values(), default=None)
        cells = [f"**{loss:.4f}**" if loss == best else f"{loss:.4f}" for loss in losses.values()]
        by_rate = dict(zip(losses, cells, strict=True))
        lines.append(f"| {row.title} | " + " | ".join(by_rate.get(rate, "") for rate in rates) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
