"""`sparseift analyze`: spectral quantities of several runs, and how they go with the final loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparseift_llm.analysis.checkpoints import analyze_run, make_settings
from sparseift_llm.analysis.correlation import Correlation, correlate
from sparseift_llm.analysis.matrices import check_every_nth_layer
from sparseift_llm.analysis.results import ANALYSIS_NAME, LOSS, TABLE_NAME, Analysis, RunAnalysis
from sparseift_llm.analysis.spectral import QUANTITIES
from sparseift_llm.analysis.tables import write_table
from sparseift_llm.runs.formats import SUMMARY_NAME
from sparseift_llm.runs.same_data import check_same_data
from sparseift_llm.utils.files import write_json
from sparseift_llm.utils.outputs import user_path


def analyze(runs: Sequence[str | Path], output: str | Path, every_nth_layer: int = 1) -> Analysis:
    """Analyse runs, and write `spectral.json` into each, `analysis.json` and `analysis.csv` into `output`.

    Args:
        runs: output folders of recipes/pretrain.py or of a Trainer; checkpoints and the final model are taken.
        output: a folder, made if it is not there.
        every_nth_layer: see `spectral_report`.

    Raises:
        ValueError: a run is not a folder or is given twice, no run has anything to analyse, or `every_nth_layer` is
            below 1.
        OSError: a file cannot be written.
    """
    check_every_nth_layer(every_nth_layer)
    folders, output = [user_path(run) for run in runs], user_path(output)
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give output folders of runs")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a run is given twice, which would count it twice in correlations")
    settings = make_settings(every_nth_layer)
    output.mkdir(parents=True, exist_ok=True)
    found = tuple(analyze_run(folder, settings) for folder in folders)
    if not any(run.checkpoints for run in found):
        reasons = [f"{run.run} ({where}): {reason}" for run in found for where, reason in run.excluded.items()]
        raise ValueError("nothing to analyse: " + "; ".join(reasons))
    result = Analysis(settings, found, tuple(correlations(found)))
    write_json(output / ANALYSIS_NAME, result.to_dict())
    write_table(output / TABLE_NAME, found)
    return result


def correlations(runs: Sequence[RunAnalysis]) -> Iterator[Correlation]:
    """All pairs of the four quantities of each run's last model, and its final loss."""
    rows = [{**run.checkpoints[-1]["model"], LOSS: run.eval_loss} for run in runs if run.checkpoints]
    different = _different_data(runs)
    for first, second in itertools.combinations((*QUANTITIES, LOSS), 2):
        pairs = [(row[first], row[second]) for row in rows if row[first] is not None and row[second] is not None]
        if second == LOSS and different is not None:
            yield Correlation(first, second, len(pairs), excluded=different)
        else:
            yield correlate(first, second, pairs)


def _different_data(runs: Sequence[RunAnalysis]) -> str | None:
    finished = [(run.run, run.summary) for run in runs if run.summary is not None]
    try:
        check_same_data([run for run, _ in finished], [summary for _, summary in finished])
    except ValueError as error:
        return f"losses are not of the same data: {error}"
    except (KeyError, TypeError, AttributeError):
        return f"losses may not be of the same data: a {SUMMARY_NAME} does not say"
    return None
