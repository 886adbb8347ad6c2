"""What the page says of runs at a glance: headline numbers, cards, notices and notes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparseift_llm.evaluation.comparison import Arm, check_comparable
from sparseift_llm.record.model_record import transformation_values
from sparseift_llm.reporting.comparison import HEADLINES, MASKED_NOTE, NOTES, WITH_RATIO
from sparseift_llm.reporting.page.markup import NONE, Body, Table, formatted
from sparseift_llm.reporting.page.runs import Run
from sparseift_llm.reporting.page.words import text
from sparseift_llm.runs.lenient_json import finite, mapping
from sparseift_llm.runs.same_data import differing_data
from sparseift_llm.utils.units import readable_bytes, readable_count, readable_flops

_CARDS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("Held-out loss", "eval_loss", "{:.4f}".format),
    ("Training FLOPs", "train_flops", readable_flops),
    ("Tokens per second", "tokens_per_second", readable_count),
    ("Weights, gradients, optimizer state", "train_state_bytes", readable_bytes),
)
_FROM_LOG = ("eval_loss", "train_flops", "train_tokens", "tokens_per_second")  # what a log line has, too


def headline_table(runs: Sequence[Run]) -> tuple[Table, str]:
    """The headline numbers of every run; of an unfinished one, what its log has last.

    Returns:
        The table, with the ratios of two runs as its first column, which a narrow screen shows without scrolling; and
        one sentence with what is the same in all of several runs, which has no row then.
    """
    rows, same = [], []
    for title, key, form in (("optimizer steps", "step", "{:,}".format), *HEADLINES):
        values = [_headline(run, key, form) for run in runs]
        if len(runs) > 1 and len(set(values)) == 1:
            same += [] if values[0] == NONE else [f"{title} {values[0]}"]
        else:
            rows.append([title, *([_ratio(runs, key)] if len(runs) == 2 else []), *values])
    names = [run.name for run in runs]
    if len(runs) == 2:
        table = Table(f"Ratio: {names[1]} / {names[0]}", ["", "ratio", *names], [Body(rows)])
    else:
        table = Table("Headline numbers", ["", *names], [Body(rows)])
    return table, f"The same in {'both' if len(runs) == 2 else 'all'}: {'; '.join(same)}." if same else ""


def _ratio(runs: Sequence[Run], key: str) -> str:
    """The second run's headline number over the first's, where that says something."""
    first, second = (finite(run.summary.get(key)) for run in runs)
    return f"{second / first:.3f}" if key in WITH_RATIO and first and second is not None else ""


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


def _headline(run: Run, key: str, form: Callable[[float], str]) -> str:
    if key in run.summary:
        return formatted(run.summary[key], form)
    if key == "step":
        return formatted(run.last_step, form)
    lines = [line for line in run.metrics if key in line] if key in _FROM_LOG and not run.summary else []
    return f"{formatted(lines[-1][key], form)} at step {lines[-1]['step']:,}" if lines else NONE


def comparison_warnings(runs: Sequence[Run]) -> list[str]:
    """One sentence for every run that does not belong beside the first: whose numbers cannot be compared, and why."""
    warnings = []
    for place, run in enumerate(runs[1:], start=1):
        reasons = [*_differing_data(runs[0], run), *_differing_evaluations(runs[:place], run)]
        if reasons:
            warnings.append(f"{run.name} cannot be compared with {runs[0].name}: {'; '.join(reasons)}.")
    return warnings


def _differing_data(first: Run, run: Run) -> list[str]:
    """Why two runs' losses are those of other text."""
    ours, theirs = mapping(first.config.get("data")), mapping(run.config.get("data"))
    differing = differing_data(ours, theirs) if ours and theirs else []
    return [f"data.{key} is {text(value)} and {text(other)}" for key, value, other in differing]


def _differing_evaluations(before: Sequence[Run], run: Run) -> list[str]:
    """Why scores of a run are not those of the first run that was evaluated on the same suite."""
    reasons = []
    for name, result in run.evaluations.items():
        having = [one for one in before if name in one.evaluations]
        if not having:
            continue
        first = having[0]
        pairs = ((first.name, first.evaluations[name]), (run.name, result))
        try:
            check_comparable([Arm(label, (Path(name),), (values,)) for label, values in pairs])
        except ValueError as error:
            reasons.append(str(error))
        except (KeyError, TypeError, AttributeError) as error:
            reasons.append(f"{name}: whether the same questions were asked is not known, a file is damaged ({error!r})")
    return reasons


def notes(runs: Sequence[Run]) -> list[str]:
    """What to keep in mind when reading the numbers."""
    found = list(NOTES)
    sparse = [mapping(run.config.get("sparse_ift")) for run in runs]
    if any(values and values.get("structure") != "block" for values in sparse):
        found.append(MASKED_NOTE)
    return found
