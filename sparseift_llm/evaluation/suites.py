"""What a suite asks and how its scores become headlines: Open LLM Leaderboard v1 and v2, and the built-in suite.

Numbers and names only; lm-eval is in harness.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Score:
    """One metric of one lm-eval task.

    Args:
        task: name of the task.
        metric: name of its metric.
        filter: lm-eval's filter of the answers.
        chance: what guessing scores, in the metric's unit; None where it has no level to speak of.
    """

    task: str
    metric: str = "acc"
    filter: str = "none"
    chance: float | None = None

    @property
    def key(self) -> str:
        """How lm-eval's results name the metric."""
        return f"{self.metric},{self.filter}"


@dataclass(frozen=True)
class Headline:
    """One line of a suite's table.

    Args:
        name: as the leaderboard calls it, in lm-eval's spelling.
        scores: what it is the mean of.
        num_fewshot: examples in the prompt; None leaves the task's own number.
        pooled: the mean over all items of all tasks; otherwise the unweighted mean over `scores`.
        group: lm-eval group whose tasks take the place of the one score given, as a template.
        is_further: it shows a further metric of a task that has a line already, and is part of no average.
    """

    name: str
    scores: tuple[Score, ...]
    num_fewshot: int | None = None
    pooled: bool = False
    group: str | None = None
    is_further: bool = False

    def tasks(self) -> list[str]:
        """The tasks it is made of, in order."""
        return list(dict.fromkeys(score.task for score in self.scores))


@dataclass(frozen=True)
class Suite:
    """A named list of headlines.

    Args:
        name: `v1`, `v2`, `builtin`, or the tasks asked for.
        headlines: lines of the table.
        averages: name -> headlines whose mean it is; `average` is the suite's own.
        normalized: averages are over normalised headlines, 0 (guessing) to 100.
        folders: folders below lm-eval's tasks that hold the suite; None means all of them.
        is_named: it consists of tasks that the user named, whose metrics are found out from lm-eval.
    """

    name: str
    headlines: tuple[Headline, ...]
    averages: Mapping[str, tuple[str, ...]]
    normalized: bool = False
    folders: tuple[str, ...] | None = None
    is_named: bool = False

    def roots(self) -> list[str]:
        """The tasks and groups to ask lm-eval for, in order."""
        names = [
            name for line in self.headlines for name in ([line.group] if line.group else [s.task for s in line.scores])
        ]
        return list(dict.fromkeys(names))

    def tasks(self) -> list[str]:
        """Every task once, in order; groups must be expanded."""
        return list(dict.fromkeys(score.task for line in self.headlines for score in line.scores))


def expand(suite: Suite, members: Mapping[str, Sequence[str]]) -> Suite:
    """Replace each headline's group by its tasks, `members[group]`."""
    lines = []
    for line in suite.headlines:
        if line.group is not None:
            (template,) = line.scores
            scores = tuple(replace(template, task=task) for task in members[line.group])
            line = replace(line, scores=scores, group=None)
        lines.append(line)
    return replace(suite, headlines=tuple(lines))


def normalized_score(value: float, chance: float | None) -> float:
    """Rescale from [chance, 1] to [0, 100]; what is below chance becomes 0.

    Source: huggingface.co/docs/leaderboards/open_llm_leaderboard/normalization.
    """
    lowest = chance or 0.0
    scaled = 100 * np.maximum(0.0, value - lowest) / (1 - lowest)  # resampled values come as arrays
    return scaled if np.ndim(scaled) else float(scaled)


def headline_value(line: Headline, values: Mapping[Score, float], weights: Mapping[Score, float]) -> float:
    """The headline from its scores; `weights` are the numbers of items, used where the headline is pooled."""
    if line.pooled:
        return sum(values[s] * weights[s] for s in line.scores) / sum(weights[s] for s in line.scores)
    return sum(values[s] for s in line.scores) / len(line.scores)


def headline_normalized(line: Headline, values: Mapping[Score, float], weights: Mapping[Score, float]) -> float:
    """The leaderboard's normalised headline, 0 to 100: the mean of rescaled scores, or, pooled, the rescaled mean."""
    if line.pooled:
        return normalized_score(headline_value(line, values, weights), line.scores[0].chance)
    return sum(normalized_score(values[s], s.chance) for s in line.scores) / len(line.scores)


def is_ratio(metric: str) -> bool:
    """Whether a metric is something else than a share of items: then percent or a mean with others make no sense."""
    return "bits_per_byte" in metric or "perplexity" in metric


def headline_chance(line: Headline) -> float | None:
    """What guessing scores on the headline; None if one of its scores has no such level."""
    chances = [score.chance for score in line.scores]
    known = [chance for chance in chances if chance is not None]
    return sum(known) / len(known) if len(known) == len(chances) else None


def averages(suite: Suite, lines: Mapping[str, float]) -> dict[str, float]:
    """Each of the suite's averages, from its headlines' values."""
    return {name: sum(lines[line] for line in of) / len(of) for name, of in suite.averages.items()}


def _single(name: str, metric: str, num_fewshot: int, chance: float | None, filter: str = "none") -> Headline:
    return Headline(name, (Score(name, metric, filter, chance),), num_fewshot)


_V1_LINES = (
    _single("arc_challenge", "acc_norm", 25, 0.25),
    _single("hellaswag", "acc_norm", 10, 0.25),
    _single("truthfulqa_mc2", "acc", 0, None),
    Headline("mmlu", (Score("mmlu", "acc", chance=0.25),), 5, group="mmlu"),
    _single("winogrande", "acc", 5, 0.5),
    _single("gsm8k", "exact_match", 5, 0.0, "strict-match"),
)
V1 = Suite(
    "v1",
    _V1_LINES,
    {
        "average": tuple(line.name for line in _V1_LINES),
        # the five tasks that the Sparse-IFT paper averages: all but GSM8K
        "average_5": tuple(line.name for line in _V1_LINES if line.name != "gsm8k"),
    },
    folders=("arc", "hellaswag", "truthfulqa", "mmlu/default", "winogrande", "gsm8k"),
)

# Answers to choose from; guessing scores one over them.
BBH_CHOICES = {
    "boolean_expressions": 2, "causal_judgement": 2, "date_understanding": 6, "disambiguation_qa": 3,
    "formal_fallacies": 2, "geometric_shapes": 11, "hyperbaton": 2, "logical_deduction_five_objects": 5,
    "logical_deduction_seven_objects": 7, "logical_deduction_three_objects": 3, "movie_recommendation": 6,
    "navigate": 2, "object_counting": 19, "penguins_in_a_table": 5, "reasoning_about_colored_objects": 18,
    "ruin_names": 6, "salient_translation_error_detection": 6, "snarks": 2, "sports_understanding": 2,
    "temporal_sequences": 4, "tracking_shuffled_objects_five_objects": 5,
    "tracking_shuffled_objects_seven_objects": 7, "tracking_shuffled_objects_three_objects": 3, "web_of_lies": 2,
}  # fmt: skip
MUSR_CHOICES = {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}
_MATH = ("algebra", "counting_and_prob", "geometry", "intermediate_algebra", "num_theory", "prealgebra", "precalculus")


def _choices(prefix: str, metric: str, num_choices: Mapping[str, int]) -> tuple[Score, ...]:
    return tuple(Score(f"{prefix}_{name}", metric, chance=1 / count) for name, count in num_choices.items())


_V2_LINES = (
    Headline(
        "leaderboard_ifeval",
        tuple(Score("leaderboard_ifeval", f"{level}_level_strict_acc", chance=0.0) for level in ("prompt", "inst")),
    ),
    Headline("leaderboard_bbh", _choices("leaderboard_bbh", "acc_norm", BBH_CHOICES)),
    Headline(
        "leaderboard_math_hard",
        tuple(Score(f"leaderboard_math_{name}_hard", "exact_match", chance=0.0) for name in _MATH),
        pooled=True,
    ),
    Headline(
        "leaderboard_gpqa",
        tuple(Score(f"leaderboard_gpqa_{name}", "acc_norm", chance=0.25) for name in ("diamond", "extended", "main")),
        pooled=True,
    ),
    Headline("leaderboard_musr", _choices("leaderboard_musr", "acc_norm", MUSR_CHOICES)),
    Headline("leaderboard_mmlu_pro", (Score("leaderboard_mmlu_pro", "acc", chance=0.1),)),
)
V2 = Suite(
    "v2",
    _V2_LINES,
    {"average": tuple(line.name for line in _V2_LINES)},
    normalized=True,
    folders=("leaderboard",),
)

BUILTIN = Suite(
    "builtin",
    (
        Headline("builtin_continuation", (Score("builtin_continuation", "acc_mutual_info", chance=0.25),)),
        Headline("builtin_identifier", (Score("builtin_identifier", "acc", chance=0.0),)),
        Headline("builtin_bits_per_byte", (Score("builtin_bits_per_byte", "bits_per_byte"),)),
    ),
    {"average": ("builtin_continuation", "builtin_identifier")},
    folders=(),
)
SUITES = {suite.name: suite for suite in (V1, V2, BUILTIN)}


def select(suite: Suite, names: Iterable[str]) -> Suite:
    """Only the named headlines of `suite`; averages that lack one of theirs are left out.

    Raises:
        ValueError: no such headline.
    """
    wanted = list(names)
    unknown = sorted(set(wanted) - {line.name for line in suite.headlines})
    if unknown:
        known = ", ".join(line.name for line in suite.headlines)
        raise ValueError(f"suite {suite.name} has no task {unknown[0]!r}; it has {known}")
    return _kept(suite, tuple(line for line in suite.headlines if line.name in wanted))


def without(suite: Suite, tasks: Iterable[str]) -> tuple[Suite, list[str]]:
    """The suite without headlines that any of `tasks` is part of, and without averages that need one of those.

    Returns:
        The smaller suite, and the names of the headlines left out, further metrics not counted.
    """
    unwanted = set(tasks)
    lines = tuple(line for line in suite.headlines if not unwanted & set(line.tasks()))
    dropped = [line.name for line in suite.headlines if line not in lines and not line.is_further]
    return _kept(suite, lines), dropped


def _kept(suite: Suite, lines: tuple[Headline, ...]) -> Suite:
    names = {line.name for line in lines}
    if suite.is_named:  # whose average is over whatever is there
        averages = {name: tuple(one for one in of if one in names) for name, of in suite.averages.items()}
        averages = {name: of for name, of in averages.items() if of}
    else:
        averages = {name: of for name, of in suite.averages.items() if set(of) <= names}
    return replace(suite, headlines=lines, averages=averages)
