"""Whether sparsity gains anything at equal whole-model FLOPs, over a dense model whose rates are tuned as well.

    python benchmarks/equal_flops.py run dense residual2 --corpus english=train.txt,valid.txt --width 64 128 --jobs 2
    python benchmarks/equal_flops.py time --width 128  # step times, on a quiet machine
    python benchmarks/equal_flops.py table

`run` looks for the learning rate and the factor on the embedding's rate at which a row's held-out loss is lowest. It
starts at a guess, tries twice and half of each, moves to the best, and ends when no neighbour is better, so that the
best is never at an edge of what was tried. Then it repeats the best with two more seeds. The searches of all rows and
widths go on at once, and share the runs that train at a time. Runs that have a result are not repeated, so the command
can be stopped, and goes on where it was; who wants to train them again moves results/equal_flops away.

Every row of a width has the same forward FLOPs as the dense model, to 0.1%, and trains on the same tokens. Rows whose
names end in -quarter, -half or -double train on other tokens. The dense ones say what compute is worth to the dense
model, and so how much more of it would do what another row does. Beside their sparse twins they say how a gain moves
with tokens. `--layers 8` makes models deeper than the two layers of the others. `--architecture starcoder2` compares
models with GPT-2's LayerNorm, GELU and biases, instead of Llamas.

`--at RATE,FACTOR` trains at given rates instead of a search. That is for widths at which a search costs too much, such
as 1024, which is for a GPU: one pair there, of 26M weights in projections, is

    python benchmarks/equal_flops.py run dense --width 1024 --corpus english=train.txt,valid.txt --at 0.008,8 --seeds 0
    python benchmarks/equal_flops.py run residual2-tile128 --width 1024 --corpus ... --at 0.002,4 --seeds 0

On a corpus that is much smaller than what a run reads, models overfit: `run --tune_regularisation` looks for the weight
decay and the dropout of attention, too. `time` measures the step times of all rows in turns; with them, and with the
rows dense-half or dense-double, the table says what the dense model would have reached in the time that another row
takes. Results are in results/equal_flops, a file a run. The rows are in equal_flops_rows.py, `table` prints what is
made in equal_flops_table.py and, of gains over widths and tokens, in equal_flops_fit.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equal_flops_fit
from equal_flops_rows import (
    ARCHITECTURES,
    BATCH_SIZE,
    BY_NAME,
    IN_BFLOAT16,
    LAYERS,
    MAX_STEPS,
    ROWS,
    SEEDS,
    WIDTHS,
    Baseline,
    Rates,
    Row,
)
from equal_flops_table import loss_of, table, times_path
from recipe_steps import step_times

from sparseift_llm.runs.recipe import Recipe, load_recipe
from sparseift_llm.runs.sweep import run_sweep
from sparseift_llm.runs.sweep_plan import SweepRun, plan_sweep
from sparseift_llm.utils.files import write_json

HERE = Path(__file__).parent
RECIPE = HERE / "equal_flops.yaml"
RESULTS = HERE / "results" / "equal_flops"
RUNS = Path("runs") / "equal_flops"
BUILTIN = "builtin"
RATES_FORM = "RATE,FACTOR[,WEIGHT_DECAY,DROPOUT]"


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
    """Runs of one row over one baseline on one corpus, which are trained by the workers of `pool`."""

    row: Row
    baseline: Baseline
    corpus: Corpus
    pool: Executor
    regularises: bool = False

    def run(self) -> None:
        """Find the best rates with the first seed, then train with the others at the best."""

        def losses(wanted: list[Rates]) -> Mapping[Rates, float]:
            return self.losses((rates, SEEDS[0]) for rates in wanted)

        best = climb(self.row.start, losses, self.regularises)
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
        return RESULTS / self.corpus.name / str(self.baseline) / self.row.name / f"{rates}-seed{seed}.json"

    def overrides(self, rates: Rates) -> list[str]:
        """What the row, the baseline and the corpus change in the recipe."""
        architecture = self.baseline.architecture
        return [
            *([f"--model.name={HERE / architecture}.json"] if architecture != ARCHITECTURES[0] else []),
            *(f"--model.config.{key}={value}" for key, value in self.row.config(self.baseline).items()),
            f"--training.max_steps={round(MAX_STEPS[self.baseline.width] * self.row.tokens)}",
            f"--training.per_device_train_batch_size={BATCH_SIZE[self.baseline.width]}",
            *(["--training.bf16=true"] if self.baseline.width in IN_BFLOAT16 else []),
            *self.corpus.overrides(),
            f"--training.learning_rate={rates.rate:g}",
            f"--embedding_lr_factor={rates.embedding_factor:g}",
            f"--training.weight_decay={rates.weight_decay:g}",
            *([f"--model.config.attention_dropout={rates.attention_dropout:g}"] if rates.attention_dropout else []),
            *([f"--sparse_ift={json.dumps(self.row.sparse)}"] if self.row.sparse else []),
        ]

    def _train(self, rates: Rates, seed: int) -> None:
        """Train with one seed and keep the result.

        Raises:
            RuntimeError: the run failed other than by divergence; its log is named.
        """
        folder = RUNS / self.corpus.name / str(self.baseline) / self.row.name / f"{rates}-seed{seed}"
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
        model = summary["config"]["model"]
        model["name"] = Path(model["name"]).name
        command = {"command": self.command(rates, seed)}
        return {**dataclasses.asdict(rates), "seed": seed, "corpus": self.corpus.to_dict(), **summary, **command}

    def command(self, rates: Rates, seed: int) -> str:
        """What trains one run alone, started where the corpus lies."""
        corpus = ",".join(path.name for path in self.corpus.files.values())
        words = ["benchmarks/equal_flops.py", "run", self.row.name, "--width", str(self.baseline.width)]
        if self.baseline.layers != LAYERS[0]:
            words += ["--layers", str(self.baseline.layers)]
        if self.baseline.architecture != ARCHITECTURES[0]:
            words += ["--architecture", self.baseline.architecture]
        words += ["--corpus", f"{self.corpus.name}={corpus}" if corpus else BUILTIN]
        return shlex.join([*words, "--at", rates.word, "--seeds", str(seed)])


def run_all(wanted: Sequence[tuple[Row, Baseline]], choice: argparse.Namespace) -> None:
    """Bring the searches of rows over their baselines to their ends, with at most `choice.jobs` runs at a time."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(choice.jobs) as pool, ThreadPoolExecutor(len(wanted)) as climbers:
        ends = []
        for row, baseline in wanted:
            search = Search(row, baseline, choice.corpus, pool, choice.tune_regularisation)
            if choice.at:
                ends.append(climbers.submit(search.losses, [(choice.at, seed) for seed in choice.seeds or SEEDS]))
            else:
                ends.append(climbers.submit(search.run))
        for end in ends:
            end.result()


def recipes_of(baseline: Baseline) -> dict[str, Recipe]:
    """Row -> its recipe; rows that differ in the number of steps alone are left out."""
    rows = [row for row in ROWS if row.exists_at(baseline) and row.tokens == 1]
    corpus, pool = Corpus.from_word(BUILTIN), ThreadPoolExecutor(1)
    words = {row.name: Search(row, baseline, corpus, pool).overrides(row.start) for row in rows}
    return {name: load_recipe(RECIPE, [*overrides, "--output_dir=unused"]) for name, overrides in words.items()}


def rates_from_word(word: str) -> Rates:
    """The one whose `word` this is; argparse shows what is wrong with another word."""
    try:
        rate, factor, *regularisation = map(float, word.split(","))
        return Rates(rate, factor, *regularisation)
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{word!r} must be {RATES_FORM}, such as 0.008,4 or 0.008,4,0.3,0.1") from None


def climb(start: Rates, losses: Callable[[list[Rates]], Mapping[Rates, float]], regularises: bool = False) -> Rates:
    """The rates that have a lower loss than all of their neighbours, found from `start` downhill."""
    best = start
    while True:
        found = losses([best, *best.neighbours(regularises)])
        lowest = min(found, key=lambda rates: found[rates])
        if lowest == best:
            return best
        best = lowest


def main(words: list[str] | None = None) -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="search rates, then repeat with other seeds")
    run.add_argument("rows", nargs="+", choices=BY_NAME, metavar="ROW", help=", ".join(BY_NAME))
    run.add_argument("--corpus", type=Corpus.from_word, required=True, help="NAME=TRAIN,HELD_OUT or builtin")
    run.add_argument("--width", type=int, choices=WIDTHS, nargs="+", default=[128])
    run.add_argument("--jobs", type=int, default=1, help="runs at a time, one core each")
    run.add_argument("--tune_regularisation", action="store_true", help="look for it as for the rates")
    run.add_argument("--at", type=rates_from_word, metavar=RATES_FORM, help="train at these alone; no search")
    run.add_argument("--seeds", type=int, nargs="+", help=f"with --at; {' '.join(map(str, SEEDS))} if left out")
    time = commands.add_parser("time", help="step times of all rows, in float32 on one core")
    time.add_argument("--width", type=int, choices=sorted(set(WIDTHS) - set(IN_BFLOAT16)), default=128)
    for command in (run, time):
        command.add_argument("--layers", type=int, choices=LAYERS, default=LAYERS[0], help="decoder layers")
        command.add_argument("--architecture", choices=ARCHITECTURES, default=ARCHITECTURES[0], help="of all models")
    commands.add_parser("table", help="what came out so far")
    choice = parser.parse_args(words)
    if choice.command == "table":
        print(table(RESULTS), equal_flops_fit.report(RESULTS), sep="\n\n")
        return
    if choice.command == "time":
        baseline = Baseline(choice.width, choice.layers, choice.architecture)
        write_json(times_path(RESULTS, baseline), step_times(recipes_of(baseline)))
        return
    if choice.seeds and not choice.at:
        parser.error("--seeds goes with --at: a search takes its own")
    if choice.tune_regularisation and choice.at:
        parser.error(f"--tune_regularisation is for a search; give it with --at {RATES_FORM}")
    wanted = [
        (BY_NAME[name], Baseline(width, choice.layers, choice.architecture))
        for width in choice.width
        for name in choice.rows
    ]
    for row, baseline in wanted:
        if not row.exists_at(baseline):
            way_out = "choose another width, or two layers of llama"
            parser.error(f"{row.name} has no shape or tiles that fit {baseline.title}: {way_out}")
    run_all(wanted, choice)


if __name__ == "__main__":
    main()
