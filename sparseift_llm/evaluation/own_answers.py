"""Whether the gold answers of a task that generates text can be met at all.

Such a task takes the answer out of what a model writes, and out of the gold answer, by patterns. GSM8K, for example,
takes what stands behind `####`. A gold answer without that is wrong whatever the model says, and lm-eval goes on. So
every gold answer is handed to the task as if a model had written it, word for word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.api.instance import Instance


def unmet_answers(task: Any, documents: Sequence[Any], examples: Iterable[Any] = ()) -> tuple[list[int], str | None]:
    """The items whose own gold answer scores nothing, although those of other items do.

    Where no gold answer scores, the task wants words around the answer that the data does not have, which says nothing
    about the data. A task with a scoring function of its own is not looked at.

    Args:
        task: lm-eval's task object.
        documents: its items.
        examples: other rows of the same kind, looked at only if no item's answer scores.

    Returns:
        The numbers of the items, counted from 0, and a gold answer that does score, if there is one.
    """
    if task.OUTPUT_TYPE != "generate_until" or callable(task.config.process_results):
        return [], None
    is_met = [_is_met(task, doc) for doc in documents]
    unmet = [index for index, met in enumerate(is_met) if not met]
    if not unmet:
        return [], None
    met = (doc for doc, met in zip(documents, is_met, strict=True) if met)
    other = next(met, None) or next((doc for doc in examples if _is_met(task, doc)), None)
    return ([], None) if other is None else (unmet, _answers(task, other)[0])


def _is_met(task: Any, doc: Any) -> bool:
    """Whether one of the gold answers scores in one of the task's filters; also where that cannot be told."""
    try:
        return any(_scores(task, doc, answer, chain) for answer in _answers(task, doc) for chain in task._filters)
    except Exception:  # a task's functions raise whatever they like; item_checks.py says so by itself
        return True


def _answers(task: Any, doc: Any) -> list[str]:
    gold = task.doc_to_target(doc)
    if task.config.doc_to_choice is not None:
        gold = task.doc_to_choice(doc)[gold]
    return [str(answer) for answer in (gold if isinstance(gold, list) else [gold])]


def _scores(task: Any, doc: Any, answer: str, chain: Any) -> bool:
    """Whether `answer`, given by a model, scores behind one chain of filters; true for metrics that are no score."""
    request = Instance("generate_until", doc, ("", {}), 0)
    request.resps = [answer] * (task.config.repeats or 1)
    chain.apply([request])
    metrics = task.process_results(doc, [request.filtered_resps[chain.name]])
    is_better = task.higher_is_better()
    scores = [value for name, value in metrics.items() if is_better.get(name, True)]
    if len(scores) < len(metrics) or not all(isinstance(value, int | float) for value in scores):
        return True
    return any(value > 0 for value in scores)
