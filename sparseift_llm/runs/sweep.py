"""Sweeps: a recipe trained over a grid of settings and seeds, each run in a process and a folder of its own.

The grid and its names, running what is missing, and going on after an interruption. What the results say is in
reporting/sweep.py.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sparseift_llm.config.yaml_files import parse_yaml
from sparseift_llm.runs.folder import read_folder
from sparseift_llm.runs.formats import DATA_NAME, RECIPE_NAME, SUMMARY_NAME
from sparseift_llm.runs.lenient_json import number
from sparseift_llm.runs.recipe import Recipe, load_recipe, option_path, recorded_recipe, split_overrides
from sparseift_llm.utils.files import set_aside
from sparseift_llm.utils.outputs import user_path

try:
    import fcntl
except ImportError:  # Windows: two sweeps at once in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("sweep")

DENSE, SPARSE = "dense", "sparse"
DEFAULT_SEED = 42  # of transformers
REPLACED_PREFIX = "replaced-"  # before the name of a folder that holds a run of another recipe
_SET_BY_SWEEP = {
    "training.output_dir": "every run has a folder of its own below --output",
    "training.seed": "give the seeds as --seeds 0,1,2",
    "training.resume_from_checkpoint": "a sweep that is started again goes on where it was",
}
_ANYWHERE = (("training", "output_dir"), ("training", "resume_from_checkpoint"), ("data", "cache_dir"))
_LONGEST_VALUE = 40
_LONGEST_REASON = 200  # letters of a log's last line, which the table repeats
_POLL_SECONDS = 0.2
_PROGRAM = "import sys; from sparseift_llm.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Axis:
    """One recipe option that varies.

    Args:
        path: its dotted path, e.g. `training.learning_rate`.
        name: the last part of the path, or the whole path where two axes share that part.
        values: at least two, in the order given.
    """

    path: str
    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Args:
        name: of its folder.
        arm: `dense` or `sparse`.
        settings: name of an axis -> value.
        seed: of weights and data.
        folder: what the run writes to.
        log: what its process prints.
        words: the recipe file and its overrides, as for `sparseift pretrain`.
        recipe: what they ask for.
    """

    name: str
    arm: str
    settings: Mapping[str, Any]
    seed: int
    folder: Path
    log: Path
    words: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """A grid of runs.

    Args:
        words: the recipe file and all overrides, as given.
        output: the folder of the sweep.
        axes: arm -> what varies in it; the dense arm has no axis of `sparse_ift`.
        seeds: those of every setting.
        runs: the first seed of every setting first.
    """

    words: tuple[str, ...]
    output: Path
    axes: Mapping[str, tuple[Axis, ...]]
    seeds: tuple[int, ...]
    runs: tuple[SweepRun, ...]


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        run: which.
        eval_loss: held-out loss in nats per token, not finite if training diverged; None if the run failed.
        failure: why there is no loss, in words; None if there is one.
    """

    run: SweepRun
    eval_loss: float | None
    failure: str | None = None

    @property
    def is_finite(self) -> bool:
        """Whether there is a loss to compare."""
        return self.eval_loss is not None and math.isfinite(self.eval_loss)


# ---- the grid


def plan_sweep(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    output: str | Path,
    seeds: Sequence[int] | None = None,
    dense_twin: bool = False,
) -> Sweep:
    """The runs of a sweep, all of them checked as recipes; nothing is written or started.

    Args:
        recipe: the YAML file.
        overrides: as for `load_recipe`. One whose value is several YAML values with commas between them is an axis,
            e.g. `--learning_rate 4e-3,8e-3`; the others hold for all runs.
        output: the folder of the sweep.
        seeds: by default the one that the recipe has.
        dense_twin: train every setting for the dense model as well, with `sparse_ift: null`.

    Raises:
        ValueError: a setting that the recipe refuses, an option or a value that stands twice, an option that the
            sweep sets by itself, or a dense twin of a dense recipe.
        FileNotFoundError: no such recipe.
    """
    output = user_path(output)
    axes, fixed = _split_axes(overrides)
    words = (str(recipe), *fixed)
    if seeds is None:
        first = (f"--{axis.path}={_as_yaml(axis.values[0])}" for axis in axes)
        seeds = [load_recipe(recipe, [*fixed, *first, "--training.output_dir=x"]).training.get("seed", DEFAULT_SEED)]
    if len(set(seeds)) < len(seeds) or not seeds:
        raise ValueError(f"seeds must be different numbers, at least one, got {', '.join(map(str, seeds))}")
    own = _runs(words, axes, seeds, output, arm=None)
    arms = {own[0].arm: axes}
    runs = own
    if dense_twin:
        dense = next((run for run in own if run.recipe.sparse_ift is None), None)
        if dense is not None:
            raise ValueError(
                f"--dense-twin trains the dense model beside the recipe's sparse one, but {dense.name} is dense "
                "already (sparse_ift: null); leave --dense-twin out, or give the recipe a sparse_ift section"
            )
        dense_axes = tuple(axis for axis in axes if axis.path.split(".")[0] != "sparse_ift")
        runs = [*_runs((*words, "--sparse_ift=null"), dense_axes, seeds, output, arm=DENSE), *own]
        arms = {DENSE: dense_axes, **arms}
    runs.sort(key=lambda run: list(seeds).index(run.seed))
    return Sweep((str(recipe), *overrides), output, arms, tuple(seeds), tuple(runs))


def _split_axes(overrides: Sequence[str]) -> tuple[tuple[Axis, ...], list[str]]:
    """The axes among the overrides, and the words of the others."""
    found: list[tuple[str, list[Any]]] = []
    fixed, paths = [], []
    for key, text in split_overrides(overrides):
        path = option_path(key)
        if path in _SET_BY_SWEEP:
            raise ValueError(f"--{key} is set by the sweep: {_SET_BY_SWEEP[path]}")
        paths.append(path)
        values = _several(text)
        if values is None:
            fixed.append(f"--{path}={text}")
        else:
            found.append((path, values))
    for path, values in found:
        if paths.count(path) > 1:
            raise ValueError(f"--{path} is given twice; put all its values into one list, e.g. --{path} 1,2,3")
        names = Counter(map(value_name, values))
        doubled = next((name for name, count in names.items() if count > 1), None)
        if doubled is not None:
            raise ValueError(f"--{path}: the value {doubled} stands twice among {', '.join(map(str, values))}")
    last = Counter(path.rpartition(".")[2] for path, _ in found)
    return tuple(
        Axis(path, path if last[path.rpartition(".")[2]] > 1 else path.rpartition(".")[2], tuple(values))
        for path, values in found
    ), fixed


def _several(text: str) -> list[Any] | None:
    """The values of a comma list, each of them YAML; None if it is one value."""
    try:
        values = parse_yaml(f"[{text}]", "")
    except ValueError:  # not a list; the recipe says what is wrong with it, if anything
        return None
    return values if isinstance(values, list) and len(values) > 1 else None


def _runs(
    words: Sequence[str], axes: Sequence[Axis], seeds: Iterable[int], output: Path, arm: str | None
) -> list[SweepRun]:
    """The runs of one arm; without a name for it, it is `dense` if all of its recipes are, else `sparse`."""
    grid = [
        (dict(zip([axis.name for axis in axes], values, strict=True)), values, seed)
        for seed in seeds
        for values in itertools.product(*(axis.values for axis in axes))
    ]
    set_words = [
        (
            *(f"--{axis.path}={_as_yaml(value)}" for axis, value in zip(axes, values, strict=True)),
            f"--training.seed={_as_yaml(seed)}",
        )
        for _, values, seed in grid
    ]
    if arm is None:
        recipes = [load_recipe(words[0], [*words[1:], *own, "--training.output_dir=x"]) for own in set_words]
        arm = DENSE if all(recipe.sparse_ift is None for recipe in recipes) else SPARSE
    runs = []
    for (settings, _, seed), own in zip(grid, set_words, strict=True):
        name = "_".join([arm, *(f"{key}-{value_name(value)}" for key, value in settings.items()), f"seed-{seed}"])
        folder = output / name
        all_words = (
            *words,
            *own,
            f"--training.output_dir={_as_yaml(str(folder))}",
            "--training.resume_from_checkpoint=true",
        )
        recipe = load_recipe(all_words[0], all_words[1:])
        if recipe.data.cache_dir is None:  # the runs of a sweep share their tokens
            all_words = (*all_words, f"--data.cache_dir={_as_yaml(str(output / DATA_NAME))}")
            recipe = load_recipe(all_words[0], all_words[1:])
        runs.append(SweepRun(name, arm, settings, seed, folder, output / f"{name}.log", all_words, recipe))
    return runs


def value_name(value: Any) -> str:
    """How a value stands in the name of a folder: letters, digits and `_.+-`, with a hash where that loses anything."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    text = value if isinstance(value, str) else json.dumps(value)
    safe = re.sub(r"[^A-Za-z0-9_.+-]", "_", text)
    if safe == text and 0 < len(text) <= _LONGEST_VALUE:
        return text
    return f"{safe[:_LONGEST_VALUE]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _as_yaml(value: Any) -> str:
    """JSON, which YAML reads as the same value."""
    return json.dumps(value, ensure_ascii=False)


# ---- running it


def run_sweep(sweep: Sweep, jobs: int = 1) -> list[Outcome]:
    """Train what is missing of a sweep, at most `jobs` runs at once, and return the outcomes in the order of its runs.

    A run that has finished with the same recipe is not run again, and one that was interrupted is resumed. A folder
    that holds a run of another recipe is renamed first. Each run is a process of its own, so that the others go on
    if one of them crashes. A process that an earlier, killed sweep left running is waited for.

    Raises:
        ValueError: `jobs` is below 1.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    stop = threading.Event()
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_outcome_of, run, environment, stop) for run in sweep.runs]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                outcome = future.result()
                said = outcome.failure or f"held-out loss {outcome.eval_loss:.4f}"
                logger.info("%d of %d runs: %s: %s", count, len(futures), outcome.run.name, said)
        except BaseException:  # also Ctrl-C: no process is left behind
            stop.set()
            for future in futures:
                future.cancel()
            raise
    return [future.result() for future in futures]


def _outcome_of(run: SweepRun, environment: Mapping[str, str], stop: threading.Event) -> Outcome:
    """Bring one run to its end, unless it is there already."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        _lock(log, stop)
        if stop.is_set():
            return Outcome(run, None, "the sweep was interrupted")
        try:
            if not is_finished(run):
                _put_aside_another(run)
                status = train_in_process(run, log, environment, stop)
                if status != 0:
                    return Outcome(run, None, f"exit status {status}: {_last_line(run.log)}")
        except (ValueError, OSError) as error:
            return Outcome(run, None, str(error))
    loss = number(read_folder(run.folder).summary.values.get("eval_loss")) if run.folder.is_dir() else None
    return Outcome(run, loss, None if loss is not None else f"it ended without a loss in {SUMMARY_NAME}")


def is_finished(run: SweepRun) -> bool:
    """Whether the run's folder holds its result, of the same recipe.

    Raises:
        ValueError: the recipe in the folder is damaged.
    """
    if not run.folder.is_dir():
        return False
    found = read_folder(run.folder)
    has_result = number(found.summary.values.get("eval_loss")) is not None and not found.open_ends
    return has_result and found.recipe.is_there and not _differences(run)


def train_in_process(run: SweepRun, log: IO[bytes], environment: Mapping[str, str], stop: threading.Event) -> int:
    """Run `sparseift pretrain` to its end, or until `stop` is set; return its exit status."""
    log.write(f"$ sparseift pretrain {shlex.join(run.words)}\n".encode())
    log.flush()
    command = [sys.executable, "-c", _PROGRAM, "pretrain", *run.words]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment) as process:
        while process.poll() is None:
            if stop.wait(_POLL_SECONDS):
                process.terminate()
                return process.wait()
    return process.returncode


def _put_aside_another(run: SweepRun) -> None:
    """Rename the run's folder if it holds a run of another recipe, which would neither count nor could be resumed."""
    if not (run.folder / RECIPE_NAME).is_file():
        return
    differences = _differences(run)
    if differences:
        kept = set_aside(run.folder, REPLACED_PREFIX)
        logger.info("%s was made with another recipe (%s); it is now %s", run.name, "; ".join(differences), kept.name)


def _differences(run: SweepRun) -> list[str]:
    """In words, the options that the recipe in the run's folder has otherwise."""
    before, now = recorded_recipe(run.folder / RECIPE_NAME), json.loads(json.dumps(run.recipe.to_dict()))
    for section, key in _ANYWHERE:
        for recipe in (before, now):
            recipe[section].pop(key, None)
    return list(_changed(before, now, tuple(now)))


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str], prefix: str = "") -> Iterable[str]:
    for key in keys:
        was, wanted = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(wanted, dict):
            yield from _changed(was, wanted, dict.fromkeys((*was, *wanted)), f"{prefix}{key}.")
        elif was != wanted:
            yield f"{prefix}{key} was {was!r}, now {wanted!r}"


def _lock(log: IO[bytes], stop: threading.Event) -> None:
    """Wait until no process writes to this log. The lock is the run's process's, too, and ends with it."""
    is_said = False
    while fcntl is not None and not stop.is_set():
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not is_said:
                logger.info("%s: another process is at this run; waiting for its end", Path(log.name).stem)
            is_said = True
            stop.wait(_POLL_SECONDS)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return textwrap.shorten(last, _LONGEST_REASON, placeholder=" ...")
