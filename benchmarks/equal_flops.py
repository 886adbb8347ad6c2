"""Whether sparsity gains anything at equal whole-model FLOPs, over a dense model whose rates are tuned as well.

    python benchmarks/equal_flops.py run dense residual2 --corpus english=train.txt,valid.txt --width 64 128 --jobs 2
    python benchmarks/equal_flops.py table

`run` looks for the learning rate and the factor on the embedding's rate at which a row's held-out loss is lowest. It
starts at a guess, tries twice and half of each, moves to the best, and ends when no neighbour is better, so that the
best is never at an edge of what was tried. Then it repeats the best with two more seeds. The searches of all rows and
widths go on at once, and share the runs that train at a time. Runs that have a result are not repeated, so the command
can be stopped, and goes on where it was. Every row of a width trains on the same tokens and has the same forward FLOPs
as the dense model, to 0.1%. Only the rows dense-half and dense-double train on other tokens: they say what compute is
worth to the dense model, and so how much more of it would do what another row does. Results are in
results/equal_flops, a file a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from scipy import stats

from sparseift_llm.reporting.sweep import difference_interval, t_interval
from sparseift_llm.runs.sweep import SweepRun, plan_sweep, run_sweep
from sparseift_llm.utils.files import write_json
from sparseift_llm.utils.tables import markdown_table

HERE = Path(__file__).parent
RECIPE = HERE / "equal_flops.yaml"
RESULTS = HERE / "results" / "equal_flops"
RUNS = Path("runs") / "equal_flops"
BUILTIN = "builtin"
WIDTHS = (64, 128, 256)
SEEDS = (0, 1, 2)
HEAD_DIM, VOCAB, SEQ_LEN, NUM_LAYERS = 32, 1024, 128, 2
# The recipe's tokens are 42 for each projection weight at width 64, and 10 at 128; four times as many are 10 at 256.
MAX_STEPS: Mapping[int, int] = {64: 1000, 128: 1000, 256: 2000}
BATCH_SIZE: Mapping[int, int] = {64: 32, 128: 32, 256: 64}
HEADER = (
    "row",
    "rate, embedding's",
    "FLOPs",
    "held-out loss",
    "95% interval",
    "seeds",
    "gain over dense (95%)",
    "dense FLOPs for this loss",
)


@dataclass(frozen=True, order=True)
class Rates:
    """The two learning rates of a run.

    Args:
        rate: of all parameters but the embedding.
        embedding_factor: how many times that rate the embedding has.
    """

    rate: float
    embedding_factor: float

    def neighbours(self) -> list[Rates]:
        """Twice and half of each."""
        by_rate = [Rates(self.rate * by, self.embedding_factor) for by in (2, 0.5)]
        return by_rate + [Rates(self.rate, self.embedding_factor * by) for by in (2, 0.5)]

    def __str__(self) -> str:
        return f"lr{self.rate:g}-emb{self.embedding_factor:g}"


@dataclass(frozen=True)
class Row:
    """A model that is compared.

    Args:
        name: safe as a folder's name.
        title: the table's first cell.
        start: where the search for rates begins.
        sparse: `SparseIFTConfig` as a mapping; None for a dense model.
        shape: width of the dense model -> fields of the model's config that this row changes.
        widths: those of the dense models that it can be compared with.
        tokens: how many times the other rows' training tokens it has.
    """

    name: str
    title: str
    start: Rates
    sparse: Mapping[str, Any] | None = None
    shape: Callable[[int], Mapping[str, Any]] = field(default=lambda width: {})
    widths: tuple[int, ...] = WIDTHS
    tokens: float = 1


def dense_shape(width: int) -> dict[str, Any]:
    """Fields of the dense model's config: heads of 32, and an FFN whose three matrices have about 8 width^2 weights."""
    return {
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": width // HEAD_DIM,
        "num_key_value_heads": width // HEAD_DIM,
        "head_dim": HEAD_DIM,
    }


def other_shape(width: int, hidden: float, heads: float, layers: int = NUM_LAYERS) -> dict[str, Any]:
    """A dense model of another shape with the FLOPs of the usual one, by the choice of its FFN's inner side.

    Args:
        width: hidden size of the usual one.
        hidden, heads: its hidden size, and the size of its heads together, as multiples of `width`.
        layers: its decoder layers.
    """
    usual = dense_shape(width)
    hidden_size, head_dim = int(width * hidden), int(HEAD_DIM * heads)
    attention = 8 * hidden_size * width * heads + 4 * SEQ_LEN * width * heads
    around = layers * attention + 2 * hidden_size * VOCAB
    left = forward_flops(usual) - around
    shape = {"hidden_size": hidden_size, "num_hidden_layers": layers, "head_dim": head_dim}
    return {**usual, **shape, "intermediate_size": round(left / layers / (6 * hidden_size))}


def forward_flops(shape: Mapping[str, Any]) -> float:
    """FLOPs of a token's forward pass in a dense model; attention is counted in full, as everywhere in this project."""
    hidden, attention = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
    weights = 4 * hidden * attention + 3 * hidden * shape["intermediate_size"]
    return shape["num_hidden_layers"] * (2 * weights + 4 * SEQ_LEN * attention) + 2 * hidden * VOCAB


def residual(k: int, **fields: Any) -> dict[str, Any]:
    """A residual stream k times as wide, with static masks."""
    return {"scope": "residual", "sparsity": 1 - 1 / k, "dst": {"algorithm": "static"}, **fields}


def tiles(size: int) -> dict[str, Any]:
    """Whole tiles instead of single weights."""
    return {"structure": "block", "block_size": size}


STATIC = {"dst": {"algorithm": "static"}}
WIDE_START, DENSE_START = Rates(4e-3, 4), Rates(8e-3, 4)
MODEL = {"scope": "model", "sparsity": 0.75, "accounting": "whole_model", "seq_len": SEQ_LEN, **STATIC}
WIDER = partial(other_shape, hidden=1.5, heads=0.5)
NARROWER = partial(other_shape, hidden=0.75, heads=1)
DEEPER = partial(other_shape, hidden=0.875, heads=0.75, layers=3)
ROWS = (
    Row("dense", "dense", DENSE_START),
    Row("dense-half", "dense, half the tokens", DENSE_START, tokens=0.5),
    Row("dense-double", "dense, twice the tokens", DENSE_START, tokens=2),
    Row("dense-wide", "dense, hidden side 1.5 times, half the heads' size", DENSE_START, shape=WIDER),
    Row("dense-narrow", "dense, hidden side 0.75 times", DENSE_START, shape=NARROWER),
    Row("dense-deep", "dense, hidden side 0.875 times, three layers", DENSE_START, shape=DEEPER),
    Row("residual2", "residual, 2 times, single weights", WIDE_START, residual(2)),
    Row("residual4", "residual, 4 times, single weights", WIDE_START, residual(4)),
    Row("residual2-tile8", "residual, 2 times, tiles of 8", WIDE_START, residual(2, **tiles(8))),
    Row("residual2-tile16", "residual, 2 times, tiles of 16", WIDE_START, residual(2, **tiles(16))),
    Row("residual2-tile32", "residual, 2 times, tiles of 32", WIDE_START, residual(2, **tiles(32)), widths=(128, 256)),
    Row("residual4-tile16", "residual, 4 times, tiles of 16", WIDE_START, residual(4, **tiles(16))),
    Row("residual4-tile32", "residual, 4 times, tiles of 32", WIDE_START, residual(4, **tiles(32)), widths=(128, 256)),
    Row("model", "scope model at whole-model FLOPs, 75%", WIDE_START, MODEL),
    Row("ffn", "scope ffn, 75%", DENSE_START, {"scope": "ffn", "sparsity": 0.75, **STATIC}),
)
BY_NAME = {row.name: row for row in ROWS}


@dataclass(frozen=True)
class Corpus:
    """Text to train on.

    Args:
        name: in the results.
        files: `train` and `held_out` -> a text file; empty for the corpus that comes with the package.
    """

    name: str
    files: Mapping[str, Path]

    @classmethod
    def from_word(cls, word: str) -> Corpus:
        """From `NAME=TRAIN,HELD_OUT` or `builtin`; argparse shows what is wrong with another word."""
        if word == BUILTIN:
            return cls(BUILTIN, {})
        name, _, files = word.partition("=")
        train, _, held_out = files.partition(",")
        if not (name.isidentifier() and name != BUILTIN and train and held_out):
            raise argparse.ArgumentTypeError(f"{word!r} must be {BUILTIN} or NAME=TRAIN,HELD_OUT")
        for path in (train, held_out):
            if not Path(path).is_file():
                raise argparse.ArgumentTypeError(f"{path} is no file")
        return cls(name, {"train": Path(train).resolve(), "held_out": Path(held_out).resolve()})

    def overrides(self) -> list[str]:
        """What it changes in the recipe, which has the built-in one."""
        options = {"train": "data.corpus", "held_out": "data.eval_corpus"}
        return [f"--{options[part]}={path}" for part, path in self.files.items()]

    def to_dict(self) -> dict[str, Any]:
        """What a result says of it: names and hashes of the files, so that somebody else can find the same text."""
        hashes = {
            part: {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for part, path in self.files.items()
        }
        return {"name": self.name, **hashes}


@dataclass(frozen=True)
class Search:
    """Runs of one row at one width and corpus, which are trained by the workers of `pool`."""

    row: Row
    width: int
    corpus: Corpus
    pool: Executor

    def run(self) -> None:
        """Find the best rates with the first seed, then train with the others at the best."""
        best = climb(self.row.start, lambda wanted: self.losses((rates, SEEDS[0]) for rates in wanted))
        self.losses((best, seed) for seed in SEEDS)

    def losses(self, wanted: Iterable[tuple[Rates, int]]) -> dict[Rates, float]:
        """Held-out loss by rates, of the last seed asked for; infinite if training diverged. Trains what is missing."""
        wanted = list(wanted)
        missing = [pair for pair in wanted if not self.result_path(*pair).is_file()]
        for training in [self.pool.submit(self._train, *pair) for pair in missing]:
            training.result()
        read = {rates: json.loads(self.result_path(rates, seed).read_text("utf-8")) for rates, seed in wanted}
        return {rates: loss_of(result) for rates, result in read.items()}

    def result_path(self, rates: Rates, seed: int) -> Path:
        """Where the result of a run is kept."""
        return RESULTS / self.corpus.name / f"width{self.width}" / self.row.name / f"{rates}-seed{seed}.json"

    def overrides(self, rates: Rates) -> list[str]:
        """What the row, the width and the corpus change in the recipe."""
        shape = {**dense_shape(self.width), **self.row.shape(self.width)}
        return [
            *(f"--model.config.{key}={value}" for key, value in shape.items()),
            f"--training.max_steps={round(MAX_STEPS[self.width] * self.row.tokens)}",
            f"--training.per_device_train_batch_size={BATCH_SIZE[self.width]}",
            *self.corpus.overrides(),
            f"--training.learning_rate={rates.rate:g}",
            f"--embedding_lr_factor={rates.embedding_factor:g}",
            *([f"--sparse_ift={json.dumps(self.row.sparse)}"] if self.row.sparse else []),
        ]

    def _train(self, rates: Rates, seed: int) -> None:
        """Train with one seed and keep the result.

        Raises:
            RuntimeError: the run failed other than by divergence; its log is named.
        """
        folder = RUNS / self.corpus.name / f"width{self.width}" / self.row.name / f"{rates}-seed{seed}"
        (outcome,) = run_sweep(plan_sweep(RECIPE, self.overrides(rates), output=folder, seeds=[seed]))
        if outcome.failure:
            raise RuntimeError(f"{outcome.run.name}: {outcome.failure} (see {outcome.run.log})")
        path = self.result_path(rates, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self._result(rates, seed, outcome.run))

    def _result(self, rates: Rates, seed: int, run: SweepRun) -> dict[str, Any]:
        summary = json.loads((run.folder / "summary.json").read_text("utf-8"))
        for section, key in (("data", "corpus"), ("data", "eval_corpus"), ("training", "output_dir")):
            del summary["config"][section][key]  # places on one machine; the corpus is named by its files' hashes
        del summary["command"]
        return {**dataclasses.asdict(rates), "seed": seed, "corpus": self.corpus.to_dict(), **summary}


def search_all(searches: Iterable[tuple[Row, int]], corpus: Corpus, jobs: int) -> None:
    """Bring the searches of rows and widths to their ends, with at most `jobs` runs at a time."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [Search(row, width, corpus, pool) for row, width in searches]
        with ThreadPoolExecutor(len(waiting)) as climbers:
            for climber in [climbers.submit(search.run) for search in waiting]:
                climber.result()


def climb(start: Rates, losses: Callable[[list[Rates]], Mapping[Rates, float]]) -> Rates:
    """The rates that have a lower loss than all of their neighbours, found from `start` downhill."""
    best = start
    while True:
        found = losses([best, *best.neighbours()])
        lowest = min(found, key=lambda rates: found[rates])
        if lowest == best:
            return best
        best = lowest


def loss_of(result: Mapping[str, Any]) -> float:
    """Held-out nats per token, infinite if there is none."""
    loss = result["eval_loss"]
    return loss if loss is not None and math.isfinite(loss) else math.inf


# ---- the table


@dataclass(frozen=True)
class Best:
    """A row at its best rates.

    Args:
        rates: the best ones.
        losses: seed -> held-out loss.
        is_inside: whether all neighbours of the best rates were tried.
        train_flops: of the whole training.
    """

    rates: Rates
    losses: Mapping[int, float]
    is_inside: bool
    train_flops: float

    @property
    def mean(self) -> float:
        """Held-out loss, over the seeds."""
        return statistics.mean(self.losses.values())


def best_of(folder: Path) -> Best | None:
    """What the results of one row in `folder` say; None without any."""
    results = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    losses: dict[Rates, dict[int, float]] = {}
    for result in results:
        losses.setdefault(Rates(result["rate"], result["embedding_factor"]), {})[result["seed"]] = loss_of(result)
    first = {rates: found[SEEDS[0]] for rates, found in losses.items() if SEEDS[0] in found}
    if not first:
        return None
    best = min(first, key=lambda rates: first[rates])
    return Best(
        best,
        losses[best],
        all(rates in first for rates in best.neighbours()),
        results[0]["train_flops"],
    )


def gain(row: Best, dense: Best) -> str:
    """How much lower the row's mean loss is, with the 95% interval of the difference (Welch's t)."""
    interval = difference_interval(list(dense.losses.values()), list(row.losses.values()))
    return f"{dense.mean - row.mean:+.3f}" + (f" ({interval[0]:+.3f} to {interval[1]:+.3f})" if interval else "")


def nats_per_e_fold(found: Mapping[str, Best]) -> float | None:
    """How much the dense model's loss falls when its training FLOPs grow e times: a line through its lengths.

    None if it was trained for one length only.
    """
    lengths = [found[name] for name in ("dense-half", "dense", "dense-double") if name in found]
    if len(lengths) < 2:
        return None
    fit = stats.linregress([math.log(length.train_flops) for length in lengths], [length.mean for length in lengths])
    return -float(fit.slope)


def equal_loss_flops(row: Best, dense: Best, slope: float) -> str:
    """How many times its training FLOPs the dense model would need for the row's loss, by `nats_per_e_fold`."""
    return f"{math.exp((dense.mean - row.mean) / slope):.2f}x"


def table(results: Path) -> str:
    """A Markdown table for every corpus and width: the rows at their best rates, and their gain over dense."""
    parts = []
    for folder in sorted(results.glob("*/width*"), key=lambda path: (path.parent.name, int(path.name[len("width") :]))):
        found = {row.name: best for row in ROWS if (best := best_of(folder / row.name)) is not None}
        dense, slope = found.get("dense"), nats_per_e_fold(found)
        lines = []
        for name, best in found.items():
            interval = t_interval(list(best.losses.values()))
            rates = f"{best.rates.rate:g}, {best.rates.embedding_factor:g}x"
            lines.append(
                [
                    BY_NAME[name].title,
                    rates if best.is_inside else f"{rates} (search not ended)",
                    f"{best.train_flops / dense.train_flops:.4f}" if dense else "",
                    f"{best.mean:.4f}",
                    f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "",
                    len(best.losses),
                    gain(best, dense) if dense and best is not dense else "",
                    equal_loss_flops(best, dense, slope) if dense and slope and best is not dense else "",
                ]
            )
        width = folder.name[len("width") :]
        parts.append(f"{folder.parent.name}, width {width}\n\n{markdown_table(HEADER, lines, 'llrrlrlr')}")
    return "\n\n".join(parts)


def main(words: list[str] | None = None) -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="search rates, then repeat with other seeds")
    run.add_argument("rows", nargs="+", choices=BY_NAME, metavar="ROW", help=", ".join(BY_NAME))
    run.add_argument("--corpus", type=Corpus.from_word, required=True, help="NAME=TRAIN,HELD_OUT or builtin")
    run.add_argument("--width", type=int, choices=WIDTHS, nargs="+", default=[128])
    run.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    commands.add_parser("table", help="what came out so far")
    choice = parser.parse_args(words)
    if choice.command == "table":
        print(table(RESULTS))
        return
    wanted = [(BY_NAME[name], width) for width in choice.width for name in choice.rows]
    for row, width in wanted:
        if width not in row.widths:
            parser.error(f"{row.name} needs another width: its tiles do not divide the FFN's inner side at {width}")
    search_all(wanted, choice.corpus, choice.jobs)


if __name__ == "__main__":
    main()
