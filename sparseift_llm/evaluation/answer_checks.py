"""What is wrong with a gold answer, with choices or with a text, in words; checks of values alone, for any task."""

from __future__ import annotations

from typing import Any

_SHOWN = 60  # characters of a value in a message


class WrongLabel(str):
    """The problem that a gold answer is none of the choices, which lm-eval scores as wrong and goes on."""


def answers_problem(gold: Any) -> str | None:
    """Of an answer in words, or of several, one of which may be empty; lm-eval makes words of anything else."""
    if isinstance(gold, list):
        if any(answer is not None and str(answer).strip() for answer in gold):
            return None
        return f"its gold answers are {shown(gold)}, and none of them says anything"
    return blank("its gold answer", gold if gold is None else str(gold))


def blank(what: str, value: Any) -> str | None:
    """Of a text, called `what`, that has to say something."""
    if value is None:
        return f"{what} is null"
    if not isinstance(value, str):
        return f"{what} is {shown(value)}, not text"
    return None if value.strip() else f"{what} is empty"


def choices_problem(choices: Any) -> str | None:
    """Of what there is to choose among: at least two texts, none of them empty."""
    if not isinstance(choices, list):
        return f"its choices are {shown(choices)}, not a list"
    if len(choices) < 2:
        return f"it has {len(choices)} choices, {shown(choices)}, and a choice needs at least 2"
    problems = (blank(f"choice {number} of {len(choices)}", choice) for number, choice in enumerate(choices, start=1))
    return next((problem for problem in problems if problem is not None), None)


def gold_problem(gold: Any, choices: list[str], is_several: int | bool) -> str | None:
    """Of an answer by number or by the words of the choice.

    Args:
        gold: what the task gives as the answer.
        choices: what it chooses among.
        is_several: whether the first item of the task has a list of answers; lm-eval takes all others for lists then.
    """
    if isinstance(gold, list) != bool(is_several):
        kind = "a list, and the first item's is not" if isinstance(gold, list) else "no list, as the first item's is"
        return f"its gold answer {shown(gold)} is {kind}"  # lm-eval would fail, or compare a number with a list
    if isinstance(gold, list):
        if not gold:
            return "its list of gold answers is empty"
        return next((problem for one in gold if (problem := _number_problem(one, choices)) is not None), None)
    if isinstance(gold, str) and gold in choices:
        return None
    return _number_problem(gold, choices)


def _number_problem(gold: Any, choices: list[str]) -> str | None:
    allowed = f"0 to {len(choices) - 1}, the numbers of its choices"
    if gold is None:
        return f"its gold answer is null; allowed are {allowed}"
    words = f"its gold answer is {shown(gold)}; allowed are {allowed}"
    if isinstance(gold, int):
        return None if 0 <= gold < len(choices) else WrongLabel(words)
    words += f", or the words of one: {shown(choices)}"
    return WrongLabel(words) if isinstance(gold, str) else words  # lm-eval fails on numbers that are not whole


def shown(value: Any) -> str:
    """A value in a message: its beginning, if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def shown_end(value: Any) -> str:
    """A value in a message: its end, if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"...{text[-_SHOWN:]}"
