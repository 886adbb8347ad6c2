"""Train the runs of a sweep, each in a process and a folder of its own, and go on after an interruption.

Its grid is made in sweep_plan.py. What the results say is in reporting/sweep.py.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sparseift_llm.runs.folder import read_folder
from sparseift_llm.runs.formats import RECIPE_NAME, SUMMARY_NAME
from sparseift_llm.runs.lenient_json import number
from sparseift_llm.runs.recipe import recorded_recipe
from sparseift_llm.runs.sweep_plan import Sweep, SweepRun
from sparseift_llm.utils.files import set_aside

try:
    import fcntl
except ImportError:  # Windows: two sweeps at once in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("sweep")

REPLACED_PREFIX = "replaced-"  # before the name of a folder that holds a run of another recipe
_ANYWHERE = (("training", "output_dir"), ("training", "resume_from_checkpoint"), ("data", "cache_dir"))
_LONGEST_REASON = 200  # letters of a log's last line, which the table repeats
_POLL_SECONDS = 0.2
_PROGRAM = "import sys; from sparseift_llm.cli import main; sys.exit(main())"


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
