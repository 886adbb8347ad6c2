"""Tables that put runs side by side: headline numbers, configurations; and the notes below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sparseift_llm.evaluation.comparison import Arm, check_comparable
from sparseift_llm.reporting.comparison import HEADLINES, MASKED_NOTE, NOTES, WITH_RATIO
from sparseift_llm.reporting.page.markup import NONE, Body, Table, formatted
from sparseift_llm.reporting.page.runs import Run
from sparseift_llm.reporting.page.words import flattened, text
from sparseift_llm.runs.reading import finite, mapping
from sparseift_llm.runs.same_data import differing_data

_RECORD = ("machine", "versions", "commit", "command", "device", "num_ranks", "data_fingerprint")
_FROM_LOG = ("eval_loss", "train_flops", "train_tokens", "tokens_per_second")  # what a log line has, too


def headline_table(runs: Sequence[Run]) -> Table:
    """The headline numbers of every run; of an unfinished one, what its log has last. With two, their ratios."""
    rows = []
    for title, key, form in (("optimizer steps", "step", "{:,}"), *HEADLINES):
        rows.append([title, *(_headline(run, key, form) for run in runs)])
        if len(runs) == 2:
            first, second = (finite(run.summary.get(key)) for run in runs)
            rows[-1].append(f"{second / first:.3f}" if key in WITH_RATIO and first and second is not None else "")
    ratio = [f"{runs[1].name} / {runs[0].name}"] if len(runs) == 2 else []
    return Table("Headline numbers", ["", *(run.name for run in runs), *ratio], [Body(rows)])


def _headline(run: Run, key: str, form: str) -> str:
    if key in run.summary:
        return formatted(run.summary[key], form)
    if key == "step":
        return formatted(run.last_step, form)
    lines = [line for line in run.metrics if key in line] if key in _FROM_LOG and not run.summary else []
    return f"{formatted(lines[-1][key], form)} at step {lines[-1]['step']:,}" if lines else NONE


def difference_table(runs: Sequence[Run]) -> Table | None:
    """Settings, versions and machines that are not the same in all runs; None for a single run or if all agree."""
    values = [settings(run) for run in runs]
    keys = dict.fromkeys(key for found in values for key in found)
    sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    rows = [
        [key, *(_setting(found, key) for found in values)]
        for key in sorted(keys, key=lambda key: sections.index(key.partition(".")[0]))
        if len({found.get(key) for found in values}) > 1
    ]
    header = ["setting", *(run.name for run in runs)]
    return Table("Settings that differ", header, [Body(rows)], is_words=True) if rows else None


def _setting(found: Mapping[str, str], key: str) -> str:
    if key in found:
        return found[key]
    return "options below" if any(name.startswith(f"{key}.") for name in found) else NONE


def setting_tables(runs: Sequence[Run]) -> list[tuple[str, Table]]:
    """Every run's whole configuration."""
    tables = []
    for run in runs:
        rows = [list(pair) for pair in settings(run).items()]
        if rows:
            table = Table(f"Configuration of {run.name}", ["setting", "value"], [Body(rows)], is_words=True)
            tables.append((run.name, table))
    return tables


def settings(run: Run) -> dict[str, str]:
    """A run's configuration with dotted keys, and what it ran on."""
    record = {key: source[key] for source in (run.recipe, run.summary) for key in _RECORD if key in source}
    return dict(flattened({**run.config, **record}))


def comparison_warnings(runs: Sequence[Run]) -> list[str]:
    """Why numbers of these runs do not belong side by side."""
    warnings = []
    for run in runs[1:]:
        data, first = (mapping(one.config.get("data")) for one in (run, runs[0]))
        for key, mine, theirs in differing_data(first, data) if data and first else ():
            warnings.append(
                f"The losses of {runs[0].name} and {run.name} cannot be compared: data.{key} is {text(mine)} and "
                f"{text(theirs)}."
            )
    for name in dict.fromkeys(name for run in runs for name in run.evaluations):
        having = [run for run in runs if name in run.evaluations]
        arms = [Arm(run.name, (Path(f"{run.name}/{name}"),), (run.evaluations[name],)) for run in having]
        try:
            check_comparable(arms)
        except ValueError as error:
            warnings.append(f"{error}.")
        except (KeyError, TypeError, AttributeError) as error:
            warnings.append(
                f"{name}: whether the same questions were asked is not known, a file is damaged ({error!r})."
            )
    return warnings


def notes(runs: Sequence[Run]) -> list[str]:
    """What to keep in mind when reading the numbers."""
    found = list(NOTES)
    sparse = [mapping(run.config.get("sparse_ift")) for run in runs]
    if any(values and values.get("structure") != "block" for values in sparse):
        found.append(MASKED_NOTE)
    return found
