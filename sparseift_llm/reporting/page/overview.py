"""Tables that put runs side by side: headline numbers, configurations; and the notes below them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparseift_llm.evaluation.comparison import Arm, check_comparable
from sparseift_llm.record.model_record import transformation_values
from sparseift_llm.reporting.comparison import HEADLINES, MASKED_NOTE, NOTES, WITH_RATIO
from sparseift_llm.reporting.page.markup import NONE, Body, Table, formatted
from sparseift_llm.reporting.page.runs import Run
from sparseift_llm.reporting.page.words import flattened, text
from sparseift_llm.runs.reading import finite, mapping
from sparseift_llm.runs.same_data import differing_data
from sparseift_llm.utils.units import readable_bytes, readable_count

_RECORD = ("machine", "versions", "commit", "command", "device", "num_ranks", "data_fingerprint")
_CARDS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("Held-out loss", "eval_loss", "{:.4f}".format),
    ("Training FLOPs", "train_flops", readable_count),
    ("Tokens per second", "tokens_per_second", readable_count),
    ("Bytes of training", "train_state_bytes", readable_bytes),
)
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


@dataclass(frozen=True)
class Card:
    """One quantity of two runs at a glance.

    Args:
        title: what it is.
        ratio: the second run's over the first's, e.g. `0.955x`.
        values: both, in words.
    """

    title: str
    ratio: str
    values: str


def cards(runs: Sequence[Run]) -> list[Card]:
    """Loss, FLOPs, speed and bytes of two finished runs, as far as both have them; none for other numbers of runs."""
    if len(runs) != 2:
        return []
    found = []
    for title, key, words in _CARDS:
        first, second = (finite(run.summary.get(key)) for run in runs)
        if first and second is not None:
            found.append(Card(title, f"{second / first:.3f}x", f"{words(second)} instead of {words(first)}"))
    return found


def comparison_line(runs: Sequence[Run]) -> str:
    """One sentence on what the page puts side by side."""
    kinds = [_kind(run) for run in runs]
    if len(runs) == 1:
        return f"{runs[0].name}: {kinds[0]}."
    first, *others = (f"{run.name} ({kind})" for run, kind in zip(runs, kinds, strict=True))
    return f"{', '.join(others)}, compared with {first}."


def _kind(run: Run) -> str:
    """What kind of model a run trains, in a few words."""
    values = transformation_values(run.config.get("sparse_ift"))
    if not values:
        return "dense" if run.config else "a model that its folder does not describe"
    family = values.get("family", "wide")
    options = mapping(family)
    name = str(options.get("name", family if isinstance(family, str) else "wide"))
    scope = options.get("scope", values.get("scope"))
    parts = [name + (f", scope {scope}" if name == "wide" and scope else "")]
    sparsity = finite(values.get("sparsity"))
    parts += [] if sparsity is None else [f"{100 * sparsity:g}% sparse"]
    parts += [f"tiles of {values['block_size']}"] if values.get("block_size") else []
    structure = str(values.get("structure", ""))
    parts += [f"{structure} masks"] if ":" in structure else []
    parts += [str(mapping(values.get("dst")).get("algorithm", ""))] if mapping(values.get("dst")) else []
    return ", ".join(filter(None, parts))


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
        differing = differing_data(first, data) if data and first else []
        if differing:
            reasons = "; ".join(f"data.{key} is {text(mine)} and {text(theirs)}" for key, mine, theirs in differing)
            warnings.append(f"The losses of {runs[0].name} and {run.name} cannot be compared: {reasons}.")
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
