"""What tile sizes, families and ways to search a mask cost and gain in quality: a small GPT-2 and its twins.

    python benchmarks/quality_study.py STUDY run [--jobs 2]  # hours; stopped, it goes on where it was
    python benchmarks/quality_study.py {tiles,families} time  # step times, on a quiet machine
    python benchmarks/quality_study.py STUDY table

STUDY is one of these, each over learning rates of its own:

- tiles, families: structures and families; a row's result is that of its best learning rate;
- seeds: rows of `tiles` again at one rate, to tell differences from noise;
- rates: static masks with other factors on the embedding's rate, to find what `search` trains with;
- search: the algorithms, and the options of RigL on and off one by one, with three seeds; no dense model, which would
  need rates of its own.

Every row trains on the same tokens with the same linear FLOPs per token, except for GraNet, which starts dense.
Summaries are kept in results/quality_study, one file a run, step times in times.json beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipe_steps import step_times

from sparseift_llm.reporting.sweep import difference_interval
from sparseift_llm.runs.recipe import load_recipe
from sparseift_llm.utils.files import write_json, write_text
from sparseift_llm.utils.tables import markdown_table

HERE = Path(__file__).parent
RECIPE = HERE / "quality_study.yaml"
RESULTS = HERE / "results" / "quality_study"
RUNS = Path("runs") / "quality_study"
TIMES_NAME = "times.json"
SEEDS = (0, 1, 2)
SEARCH_RATE, SEARCH_EMBEDDING_FACTOR = 1.6e-2, 2  # the best of `rates` for static masks
WIDE_HIDDEN = 256  # of the Wide 75% twin with scope model; the dense model's is 128


@dataclass(frozen=True)
class Row:
    """One model and way to search its mask.

    Args:
        name: safe as a file's name, unique in its study.
        title: the table's first cell.
        sparse: fields of `SparseIFTConfig`; None is the dense model.
        algorithm: of the mask updates.
        drop_fraction: share of weights or tiles that the first update drops.
        seed: of weights, masks and the order of data.
        options: more fields of `DSTConfig`.
        embedding_factor: how many times the learning rate the embeddings have.
    """

    name: str
    title: str
    sparse: dict[str, Any] | None = field(default=None, compare=False)
    algorithm: str = "rigl"
    drop_fraction: float = 0.3
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict, compare=False)
    embedding_factor: float = 1

    def overrides(self) -> list[str]:
        """What this row changes in the recipe."""
        words = ["--seed", str(self.seed)] if self.seed else []
        if self.embedding_factor != 1:
            words += ["--embedding_lr_factor", f"{self.embedding_factor:g}"]
        if self.sparse is None:
            return words
        dst = {
            "algorithm": self.algorithm,
            "update_every_steps": 50,
            "drop_fraction": self.drop_fraction,
            **self.options,
        }
        return [*words, "--sparse_ift", json.dumps({"sparsity": 0.75, **self.sparse, "dst": dst})]


@dataclass(frozen=True)
class Study:
    """Rows that can be compared.

    Args:
        rows: to be compared.
        rates: learning rates that every row is trained with.
        max_steps: optimizer steps.
        folder: of the results.
        batch_size: sequences of 64 tokens in a step.
    """

    rows: tuple[Row, ...]
    rates: tuple[float, ...]
    max_steps: int
    folder: str
    batch_size: int = 64


def tiles_of(size: int) -> dict[str, Any]:
    """Fields of `SparseIFTConfig` for tiles of a size, or, for 0, single weights."""
    return {"structure": "block", "block_size": size} if size else {"structure": "unstructured"}


DENSE = Row("dense", "dense")


def tile_rows() -> Iterator[Row]:
    """Wide 75%, single weights and tiles of three sizes, RigL and static."""
    for tile in (0, 8, 16, 32):
        for algorithm in ("rigl", "static"):
            kind = f"tiles of {tile}, {WIDE_HIDDEN // tile} per side" if tile else "unstructured"
            name = f"{f'tile{tile}' if tile else 'mask'}-{algorithm}"
            yield Row(name, f"Wide, {kind}, {algorithm}", {"scope": "model", **tiles_of(tile)}, algorithm)


def repeated_rows() -> Iterator[Row]:
    """Some rows of `tiles`, and RigL with smaller updates, each with every seed."""
    kept = ("mask-rigl", "mask-static", "tile32-rigl", "tile32-static")
    title = f"Wide, tiles of 32, {WIDE_HIDDEN // 32} per side, rigl, 10% dropped instead of 30%"
    smaller = Row("tile32-rigl-drop0.1", title, {"scope": "model", **tiles_of(32)}, drop_fraction=0.1)
    for row in (DENSE, *(row for row in tile_rows() if row.name in kept), smaller):
        yield from with_every_seed(row)


def with_every_seed(row: Row) -> Iterator[Row]:
    """The row, and with other names the same with the other seeds."""
    return (replace(row, name=f"{row.name}-seed{seed}" if seed else row.name, seed=seed) for seed in SEEDS)


def rate_rows() -> Iterator[Row]:
    """The dense model and static masks of single weights, each with several factors on the embeddings' rate."""
    for row in (DENSE, Row("mask-static", "Wide, unstructured, static", {"scope": "model"}, "static")):
        for factor in (1, 2, 4):
            title = f"{row.title}, embeddings' rate {factor} times"
            yield replace(row, name=f"{row.name}-emb{factor}", title=title, embedding_factor=factor)


OF_WEIGHTS: dict[str, dict[str, Any]] = {"every input and output kept connected": {"keep_connected": True}}
OF_TILES: dict[str, dict[str, Any]] = {
    "inputs and outputs may lose their last tile": {"keep_connected": False},
    "10% dropped by saliency, grown at random by the gradient": {
        "drop_fraction": 0.1,
        "drop_by": "saliency",
        "soft_growth": True,
    },
}
OF_ALL: dict[str, dict[str, Any]] = {
    "Adam's state of grown weights: mean of the row": {"grown_state": "row_mean"},
    "Adam's step count of grown weights: their own": {"grown_state": "own_count"},
}


def search_rows() -> Iterator[Row]:
    """Algorithms over single weights and tiles; options of RigL one by one, but for the smallest tiles."""
    rows: list[Row] = []
    for tile in (0, 8, 32):
        sparse = {"scope": "model", **tiles_of(tile)}
        name, title = (f"tile{tile}", f"tiles of {tile}") if tile else ("mask", "single weights")
        algorithms = ("static", "set", "rigl") if tile else ("static", "set", "rigl", "granet")
        rows += [Row(f"{name}-{algorithm}", f"{title}, {algorithm}", sparse, algorithm) for algorithm in algorithms]
        if tile == 8:
            continue  # a run takes twice as long as with tiles of 32
        for changed, options in {**(OF_TILES if tile else OF_WEIGHTS), **OF_ALL}.items():
            short = "-".join(f"{key}-{value}".lower() for key, value in options.items())
            rows.append(Row(f"{name}-rigl-{short}", f"{title}, rigl, {changed}", sparse, options=options))
    title = "single weights, rigl, one budget for queries, keys and values"
    rows.append(Row("mask-rigl-kinds-together", title, {"scope": "model", **tiles_of(0), "kinds_apart": False}))
    for row in rows:
        yield from with_every_seed(replace(row, embedding_factor=SEARCH_EMBEDDING_FACTOR))


FAMILIES: dict[str, dict[str, Any]] = {
    "Wide, scope model": {"scope": "model"},
    "Wide, scope ffn": {"scope": "ffn"},
    "Parallel, LayerNorm": {"family": "parallel"},
    "Parallel": {"family": "parallel", "nonlinearity": "none"},
    "Factorized": {"family": "factorized"},
    "Factorized, GELU": {"family": "factorized", "nonlinearity": "gelu"},
    "Doped": {"family": "doped"},
}


def family_rows() -> Iterator[Row]:
    """Every family at 75%, in tiles of 16, RigL."""
    for title, fields in FAMILIES.items():
        yield Row(title.lower().replace(", ", "-").replace(" ", "-"), title, {**fields, **tiles_of(16)})


STUDIES = {
    "tiles": Study((DENSE, *tile_rows()), (2e-3, 4e-3, 8e-3, 1.6e-2), 1920, "tiles"),
    "seeds": Study(tuple(repeated_rows()), (8e-3,), 1920, "tiles"),
    "families": Study((DENSE, *family_rows()), (4e-3, 8e-3, 1.6e-2), 640, "families"),
    "rates": Study(tuple(rate_rows()), (4e-3, 8e-3, 1.6e-2, 3.2e-2), 640, "search", batch_size=32),
    "search": Study(tuple(search_rows()), (SEARCH_RATE,), 640, "search", batch_size=32),
}
REPEATED = ("seeds", "search")  # with every seed


def main(words: list[str] | None = None) -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("command", choices=("run", "time", "table"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    choice = parser.parse_args(words)
    if choice.command == "time" and choice.study not in ("tiles", "families"):
        parser.error("neither seeds nor rates change a step's time: time tiles or families")
    if choice.command == "table":
        print((seed_table if choice.study in REPEATED else table)(choice.study, RESULTS))
    elif choice.command == "time":
        words_of = {row.name: ["--output_dir", "unused", *row.overrides()] for row in STUDIES[choice.study].rows}
        times = step_times({name: load_recipe(RECIPE, words) for name, words in words_of.items()})
        path = RESULTS / STUDIES[choice.study].folder / TIMES_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, times)
    else:
        run(choice.study, choice.jobs)


def run(study: str, jobs: int) -> None:
    """Train what has no summary yet; raises CalledProcessError if a run fails."""
    with ThreadPoolExecutor(jobs) as pool:
        missing = [
            pool.submit(train, study, row, rate)
            for row, rate in pairs(STUDIES[study])
            if not result_path(RESULTS, study, row, rate).is_file()
        ]
        for done in missing:
            done.result()


def pairs(study: Study) -> Iterator[tuple[Row, float]]:
    """All runs, so ordered that the rows can be compared long before the last one."""
    return ((row, rate) for rate in sorted(study.rates, key=lambda rate: abs(rate - 8e-3)) for row in study.rows)


def result_path(results: Path, study: str, row: Row, rate: float) -> Path:
    """Where the summary of a run is kept."""
    return results / STUDIES[study].folder / f"{row.name}-lr{rate:g}.json"


def train(study: str, row: Row, rate: float) -> None:
    """One run, gone on with if it was killed."""
    output = RUNS / STUDIES[study].folder / f"{row.name}-lr{rate:g}"
    output.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "output_dir": output,
        "learning_rate": rate,
        "max_steps": STUDIES[study].max_steps,
        "per_device_train_batch_size": STUDIES[study].batch_size,
        "resume_from_checkpoint": "true",
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "recipes/pretrain.py", str(RECIPE.relative_to(HERE.parent)), *row.overrides(), *words]
    with (output / "log.txt").open("a", encoding="utf-8") as log:
        subprocess.run(
            command, cwd=HERE.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=log, stderr=log
        )
    target = result_path(RESULTS, study, row, rate)
    write_text(target, (HERE.parent / output / "summary.json").read_text("utf-8"))


def read_results(study: str, results: Path) -> dict[tuple[Row, float], dict[str, Any]]:
    """The summaries of all finished runs."""
    paths = {(row, rate): result_path(results, study, row, rate) for row, rate in pairs(STUDIES[study])}
    return {pair: json.loads(path.read_text("utf-8")) for pair, path in paths.items() if path.is_file()}


def table(study: str, results: Path) -> str:
    """Each row's held-out loss by learning rate, the best in bold, and what it costs: a Markdown table."""
    summaries, times_path = read_results(study, results), results / STUDIES[study].folder / TIMES_NAME
    times = json.loads(times_path.read_text("utf-8"))["step_seconds"] if times_path.is_file() else {}
    rates = sorted(STUDIES[study].rates)
    header = ["held-out loss (nats/token)", *(f"lr {rate:g}" for rate in rates), "whole-model FLOPs", "step time"]
    lines = []
    for row in STUDIES[study].rows:
        found = {rate: summaries[row, rate] for rate in rates if (row, rate) in summaries}
        best = min((summary["eval_loss"] for summary in found.values()), default=None)
        cells = [cell(found[rate]["eval_loss"], best) if rate in found else "" for rate in rates]
        dense = next((summary for (other, _), summary in summaries.items() if other == DENSE), None)
        cells.append(ratio(next(iter(found.values()), None), dense, "forward_flops_per_token"))
        cells.append(f"{times[row.name] / times[DENSE.name]:.2f}x" if row.name in times else "")
        lines.append([row.title, *cells])
    return markdown_table(header, lines, "l" + "r" * (len(header) - 1))


def seed_table(study: str, results: Path) -> str:
    """Each row's held-out loss by seed, and their mean: a Markdown table. `search` compares it with static masks."""
    titles = {row.title: row.name for row in STUDIES[study].rows if not row.seed}
    losses: dict[str, dict[int, float]] = {title: {} for title in titles}
    for (row, _), summary in read_results(study, results).items():
        losses[row.title][row.seed] = summary["eval_loss"]
    fixed = {titles[title]: found for title, found in losses.items() if titles[title].endswith("-static")}
    is_compared = study == "search"
    header = ["held-out loss (nats/token)", *(f"seed {seed}" for seed in SEEDS), "mean"]
    lines = []
    for title, found in losses.items():
        cells = [f"{found[seed]:.4f}" if seed in found else "" for seed in SEEDS]
        cells.append(f"{statistics.mean(found.values()):.4f}" if len(found) == len(SEEDS) else "")
        if is_compared:
            cells.append(lower_than(found, fixed.get(titles[title].partition("-")[0] + "-static", {})))
        lines.append([title, *cells])
    header += ["lower than static (95%)"] if is_compared else []
    return markdown_table(header, lines, "l" + "r" * (len(header) - 1))


def lower_than(losses: dict[int, float], others: dict[int, float]) -> str:
    """By how much the mean of losses is lower than that of others, with an interval; empty if there are too few."""
    interval = difference_interval(list(others.values()), list(losses.values()))
    if interval is None or losses is others:
        return ""
    difference = statistics.mean(others.values()) - statistics.mean(losses.values())
    return f"{difference:+.3f} ({interval[0]:+.3f} to {interval[1]:+.3f})"


def cell(loss: float, best: float | None) -> str:
    """A loss, bold if it is the row's best."""
    return f"**{loss:.4f}**" if loss == best else f"{loss:.4f}"


def ratio(summary: dict[str, Any] | None, dense: dict[str, Any] | None, key: str) -> str:
    """A row's value over the dense model's; empty if one of them is not there yet."""
    return f"{summary[key] / dense[key]:.2f}x" if summary and dense else ""


if __name__ == "__main__":
    main()
