"""A comparison as a table in markdown, with notes on what its intervals do and do not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scipy import stats

from sparseift_llm.evaluation.suites import is_ratio
from sparseift_llm.utils.tables import markdown_table

ENOUGH_SEEDS = 3  # with fewer, intervals over seeds are so wide that they tell next to nothing
_FACTS = (
    ("linear sparsity", "linear_sparsity", "{:.4f}"),
    ("active linear parameters", "linear_active_params", "{:,}"),
    ("whole-model FLOPs/token (forward)", "forward_flops_per_token", "{:,}"),
    ("training FLOPs, whole model", "train_flops", "{:.4g}"),
    ("training tokens", "train_tokens", "{:,}"),
)


def markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison as a table: scores, differences to the first arm with intervals, and what the models cost."""
    names = [arm["name"] for arm in comparison["arms"]]
    percent = f"{100 * comparison['confidence']:g}%"
    heads = [heading for name in names[1:] for heading in (f"{name} - {names[0]}", f"{percent} interval")]
    header = ["task", "metric", *names, *heads]
    lines = []
    for row in comparison["rows"]:
        cells = [_shown(row, value) for value in row["values"]]
        for entry in row["differences"]:
            clear = " *" if entry["is_clear"] else ""
            cells += [
                _shown(row, entry["difference"], "+"),
                f"{_shown(row, entry['low'])} to {_shown(row, entry['high'])}{clear}",
            ]
        lines.append([row["task"], row["metric"], *cells])
    for title, key, form in (("training seeds", "num_seeds", "{:,}"), *_FACTS):
        values = [arm[key] for arm in comparison["arms"]]
        if any(value is not None for value in values):
            shown_values = ["-" if value is None else form.format(value) for value in values]
            lines.append([title, "", *shown_values, *[""] * len(heads)])
    text = markdown_table(header, lines, "ll" + "r" * (len(header) - 2))
    return "\n\n".join([text, *notes(comparison)]) + "\n"


def notes(comparison: Mapping[str, Any]) -> list[str]:
    """What to know about the intervals of a comparison, one fact each."""
    percent = f"{100 * comparison['confidence']:g}%"
    found = [
        f"Intervals ({percent}) are over {comparison['over']}: items are resampled {comparison['num_samples']:,} "
        "times, the same ones for all models. Accuracies are in percent; of bits per byte, less is better.",
        *_seed_notes(comparison, percent),
        _joint_note(comparison, percent),
    ]
    if comparison["not_compared"]:
        found.append(f"Not compared, as they are not means over items: {', '.join(comparison['not_compared'])}.")
    if comparison["versions_differ"]:
        named = ", ".join(comparison["versions_differ"])
        found.append(f"The files were made with different versions of {named}, which can change scores by roundings.")
    return found


def _seed_notes(comparison: Mapping[str, Any], percent: str) -> list[str]:
    first, *others = comparison["arms"]
    several = [arm for arm in (first, *others) if arm["num_seeds"] > 1]
    single = [arm["name"] for arm in others if arm["num_seeds"] == 1]
    if not several:
        return ["One training run each: how much the training seed changes is not in the intervals."]
    found = ["The spread between training seeds is in the intervals by the t distribution."]
    paired = [arm["name"] for arm in others if arm["is_paired"]]
    if paired:
        named = ", ".join(paired)
        found.append(f"Differences of {named} are taken seed by seed, as {first['name']} has the same seeds.")
    if first["num_seeds"] == 1:
        named = ", ".join(arm["name"] for arm in several)
        found.append(f"{first['name']} has one training run; its seeds are taken to spread as those of {named}.")
        if single:
            named = ", ".join(single)
            found.append(f"Intervals of {named} are over items only: what the training seed changes is not in them.")
    elif single:
        named = ", ".join(single)
        found.append(f"Of {named} there is one training run; seeds are taken to spread as those of {first['name']}.")
    fewest = min(arm["num_seeds"] for arm in several)
    if fewest < ENOUGH_SEEDS:
        tail = (1 + comparison["confidence"]) / 2
        errors = {number: f"{float(stats.t.ppf(tail, number - 1)):.1f}" for number in (fewest, ENOUGH_SEEDS, 5)}
        found.append(
            f"{fewest} training seeds are too few to tell much: a {percent} interval over paired seeds reaches "
            f"{errors[fewest]} standard errors to either side, against {errors[ENOUGH_SEEDS]} with {ENOUGH_SEEDS} "
            f"seeds and {errors[5]} with 5; train more."
        )
    return found


def _joint_note(comparison: Mapping[str, Any], percent: str) -> str:
    entries = [entry for row in comparison["rows"] for entry in row["differences"]]
    clear = sum(entry["is_clear"] for entry in entries)
    if not clear:
        return (
            f"Looked at together, none of the {len(entries)} differences is clear of 0 at {percent} (Bonferroni), "
            "whatever single intervals seem to say."
        )
    return (
        f"* marks the {clear} of {len(entries)} differences that are clear of 0 even when all are looked at together "
        f"(Bonferroni, {percent})."
    )


def _shown(row: Mapping[str, Any], value: float, sign: str = "") -> str:
    if row["metric"] == "normalised":
        return f"{value:{sign}.2f}"
    return f"{value:{sign}.4f}" if is_ratio(row["metric"]) else f"{100 * value:{sign}.2f}"
