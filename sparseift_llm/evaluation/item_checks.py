"""Whether a task can mean what it scores: every question, choice and gold answer, by the task's own functions.

lm-eval scores an item whose gold answer is not among its choices as wrong, whatever the model says, and goes on. So a
renamed or damaged label looks like a bad model. Here all items are looked at before a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask

from sparseift_llm.evaluation.answer_checks import (
    WrongLabel,
    answers_problem,
    blank,
    choices_problem,
    gold_problem,
    shown,
    shown_end,
)
from sparseift_llm.evaluation.own_answers import unmet_answers
from sparseift_llm.evaluation.source_rows import Source, first_failing, raw_index

# Gold answers of published data that are none of the choices; all models got these items wrong on the leaderboard, too.
PUBLISHED_WRONG = {
    "leaderboard_bbh_movie_recommendation": frozenset({"Monsters, Inc"}),
    "leaderboard_bbh_ruin_names": frozenset({"dearth, wind, & fire", "rita, sue and bob poo"}),
}
_MARK = "\ue0ff"  # stands in for a null; a private character that no text has
_IMPOSSIBLE = -1000.0  # log-likelihood of a choice that a model is sure to be wrong


@dataclass(frozen=True)
class Inspection:
    """What all items of a task are like.

    Args:
        faults: one message per split with faulty rows, and one if there are too few rows for the shots.
        chance: the accuracy of guessing, the mean of the items' shares of right choices; None where nothing is chosen
            among given answers.
        wrong_labels: how many items have a gold answer that is none of their choices, and are let pass all the same.
    """

    faults: list[str]
    chance: float | None
    wrong_labels: int = 0


@dataclass(frozen=True)
class _Rows:
    """The documents of one split, and how one of them is judged and found again."""

    split: str
    documents: Sequence[Any]
    raw: Any
    process_docs: Callable[[Any], Any] | None
    problem_of: Callable[[Any], str | None]
    are_scored: bool = False

    def place(self, index: int, source: Source) -> str:
        if self.process_docs is None or self.raw is None:
            return source.place(self.split, index)
        return source.place(self.split, raw_index(self.raw, self.process_docs, self.documents[index]))


def inspect(name: str, task: Any, source: Source, allow_wrong_labels: bool = False) -> Inspection:
    """Look at every item of a task, and at every row that its few-shot examples can be drawn from.

    Args:
        name: the task's name.
        task: lm-eval's task object, with its number of shots set.
        source: of its rows.
        allow_wrong_labels: count scored items whose gold answer is none of their choices, and let them pass. A few in
            published data always pass, see `PUBLISHED_WRONG`.
    """
    faults = []
    wrong_labels = 0
    for rows in _splits(task):
        problems = [(index, p) for index, doc in enumerate(rows.documents) if (p := rows.problem_of(doc)) is not None]
        if rows.are_scored:
            problems = sorted({**_unmet(task, rows.documents), **dict(problems)}.items())
            passed = [
                index
                for index, problem in problems
                if isinstance(problem, WrongLabel)
                and (allow_wrong_labels or _is_published(name, task, rows.documents[index]))
            ]
            problems = [(index, problem) for index, problem in problems if index not in passed]
            wrong_labels = len(passed)
        if problems:
            (index, problem), more = problems[0], len(problems) - 1
            others = f", and of {more:,} more of {len(rows.documents):,} rows" if more else ""
            faults.append(f"{rows.place(index, source)}: {problem} (task {name}{others})")
    too_few = _too_few_examples(task)
    if too_few is not None:
        faults.append(f"{source.name}: {too_few} (task {name})")
    return Inspection(faults, None if faults else _chance(task), wrong_labels)


def _unmet(task: Any, documents: Sequence[Any]) -> dict[int, str]:
    """The problem of items whose gold answer no text can meet, by their numbers."""
    examples = task.sampler.df if task.config.num_fewshot else ()
    unmet, other = unmet_answers(task, documents, examples)
    return {
        index: WrongLabel(
            f"its gold answer {shown(task.doc_to_target(documents[index]))} scores 0 even if a model gives it word "
            f"for word, because the task finds no answer in it; those of other rows end like {shown_end(other)}"
        )
        for index in unmet
    }


def _is_published(name: str, task: Any, doc: Any) -> bool:
    return task.doc_to_target(doc) in PUBLISHED_WRONG.get(name, ())


def explain_failure(name: str, task: Any, source: Source, error: Exception) -> str:
    """Why a task could not be built from its rows: the first row that its functions fail on.

    Args:
        name: the task's name.
        task: the task object as far as it was built: configuration and data are there.
        source: of its rows.
        error: what stopped it.
    """
    task.prompt = None  # set after the point where building stopped
    for split, process_docs in _named_splits(task):
        raw = task.dataset[split]
        if len(raw) == 0:
            return f"{source.name}: split {split!r} has no rows (task {name})"
        failing = first_failing(raw, process_docs) if process_docs is not None else None
        if failing is not None:
            index, cause = failing
            return f"{source.place(split, index)}: {_in_words(cause, raw[index])} (task {name})"
        documents = raw if process_docs is None else process_docs(raw)
        task.features = list(documents.features)
        task.multiple_input = task.multiple_target = 0
        for index, doc in enumerate(documents):
            try:
                _Item.of(task, doc)
            except Exception as cause:  # a task's functions raise whatever they like
                rows = _Rows(split, documents, raw, process_docs, lambda _: None)
                return f"{rows.place(index, source)}: {_in_words(cause, doc)} (task {name})"
    return f"{source.name}: task {name} cannot be built from its rows ({type(error).__name__}: {error})"


@dataclass(frozen=True)
class _Item:
    """An item as the task's functions give it: texts are what gets into a prompt or is scored."""

    question: Any
    choices: Any
    gold: Any
    others: tuple[Any, ...] = ()

    @classmethod
    def of(cls, task: Any, doc: Any) -> _Item:
        """An item that is scored.

        Raises:
            Exception: whatever the task's functions raise.
        """
        has_choices = task.config.doc_to_choice is not None
        others = (task.resolve_field(doc, task.config.description), task.doc_to_prefix(doc))
        return cls(
            task.doc_to_text(doc), task.doc_to_choice(doc) if has_choices else None, task.doc_to_target(doc), others
        )

    @classmethod
    def example_of(cls, task: Any, doc: Any) -> _Item:
        """A few-shot example, whose functions may be others than an item's.

        Raises:
            Exception: whatever the task's functions raise.
        """
        few = task.fewshot_cfg
        choices = task.doc_to_choice(doc, few.doc_to_choice) if few.doc_to_choice else None
        return cls(task.doc_to_text(doc, few.doc_to_text), choices, task.doc_to_target(doc, few.doc_to_target))

    def texts(self) -> list[str]:
        choices = self.choices if isinstance(self.choices, list) else [self.choices]
        return [str(value) for value in (self.question, *choices, self.gold, *self.others)]


def _splits(task: Any) -> Iterator[_Rows]:
    """The rows that are scored, then those that examples are drawn from."""
    if not isinstance(task, ConfigurableTask):  # a class of its own, with functions of its own
        split = "test" if task.has_test_docs() else "validation"
        yield _Rows(split, list(task.eval_docs), None, None, lambda doc: _plain_problem(task, doc))
        return
    (split, process_docs), *examples = _named_splits(task)
    raw = task.dataset[split]
    yield _Rows(split, list(task.task_docs), raw, process_docs, lambda doc: _item_problem(task, doc), True)
    if not task.config.num_fewshot:
        return
    documents = list(task.sampler.df)
    if isinstance(task.sampler, FirstNSampler):  # the only ones it ever takes; one may be the item itself
        documents = documents[: task.config.num_fewshot + 1]
    split, process_docs = examples[0] if examples else ("few-shot samples of the task's own", None)
    raw = task.dataset[split] if examples else None
    yield _Rows(split, documents, raw, process_docs, lambda doc: _example_problem(task, doc))


def _named_splits(task: Any) -> list[tuple[str, Callable[[Any], Any] | None]]:
    """Name and preparing function of the split that is scored, and of the one that examples come from, if any."""
    config, few = task.config, task.fewshot_cfg
    found = [(config.test_split or config.validation_split, config.process_docs)]
    if few.split is not None:
        found.append((few.split, few.process_docs))
    elif few.samples is None:
        split = config.training_split or config.validation_split or config.test_split
        found.append((split, config.process_docs))
    return found


def _plain_problem(task: Any, doc: Any) -> str | None:
    try:
        question, gold = task.doc_to_text(doc), task.doc_to_target(doc)
    except Exception as error:  # a task's functions raise whatever they like
        return _in_words(error, doc)
    return blank("its question", question) or blank("its gold answer", gold)


def _item_problem(task: Any, doc: Any) -> str | None:
    """What is wrong with an item that is scored, None if nothing is."""
    try:
        item = _Item.of(task, doc)
        problem = _missing_column(task.config, item, doc) or _scored_problem(task, item)
        if problem is None and callable(task.config.process_results) and task.OUTPUT_TYPE == "multiple_choice":
            problem = _undecided(task, doc, item)
    except Exception as error:  # a task's functions raise whatever they like
        return _in_words(error, doc)
    return problem or _null_problem(doc, item, lambda marked: _Item.of(task, marked))


def _scored_problem(task: Any, item: _Item) -> str | None:
    if task.OUTPUT_TYPE == "multiple_choice":
        problem = choices_problem(item.choices)
        if problem is not None:
            return problem
        if task.multiple_input:  # the question is the number of the right choice, and the answer is what goes on
            return gold_problem(item.question, item.choices, False) or blank("its continuation", item.gold)
        problem = _question_problem(task, item.question)
        if problem is not None or callable(task.config.process_results):
            return problem  # such a function knows the gold answer by itself, see _undecided
        return gold_problem(item.gold, item.choices, task.multiple_target)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return blank("its text", item.gold)
    problem = _question_problem(task, item.question)
    if problem is None and task.OUTPUT_TYPE == "generate_until" and callable(task.config.process_results):
        return None  # what the function takes for the answer is its own affair
    if problem is None and item.choices is not None:
        return choices_problem(item.choices) or gold_problem(item.gold, item.choices, False)
    return problem or answers_problem(item.gold)


def _example_problem(task: Any, doc: Any) -> str | None:
    """What is wrong with a few-shot example, None if nothing is."""
    try:
        item = _Item.example_of(task, doc)
        missing = _missing_column(task.fewshot_cfg, item, doc)
        if missing is not None:
            return missing
    except Exception as error:  # a task's functions raise whatever they like
        return _in_words(error, doc)
    few, config = task.fewshot_cfg, task.config
    is_as_scored = (few.doc_to_target, few.doc_to_choice) == (config.doc_to_target, config.doc_to_choice)
    if task.OUTPUT_TYPE == "multiple_choice" and (is_as_scored or task.multiple_input):
        problem = _scored_problem(task, item)
    else:
        problem = _question_problem(task, item.question)
        if problem is None and isinstance(item.gold, int):
            problem = choices_problem(item.choices) or gold_problem(item.gold, item.choices, False)
        first = item.gold[0] if isinstance(item.gold, list) and item.gold else item.gold  # the one that lm-eval shows
        problem = problem or (None if isinstance(item.gold, int) else blank("its gold answer", first))
    return problem or _null_problem(doc, item, lambda marked: _Item.example_of(task, marked))


def _missing_column(config: Any, item: _Item, doc: Any) -> str | None:
    """Of a task that names a column which the data lacks: lm-eval then takes the name itself for the text."""
    for what, named, value in (
        ("question", config.doc_to_text, item.question),
        ("gold answer", config.doc_to_target, item.gold),
    ):
        if isinstance(named, str) and named.isidentifier() and value == named and named not in doc:
            return f"it has no column {named!r}, which the task takes the {what} from, only {sorted(map(str, doc))}"
    return None


def _question_problem(task: Any, question: Any) -> str | None:
    if isinstance(question, int):
        return f"its question is the number {question}, which lm-eval takes for the number of a choice"
    if isinstance(question, str) and not question.strip() and not str(task.config.doc_to_text).strip():
        return None  # the task has no question
    return blank("its question", question)


def _undecided(task: Any, doc: Any, item: _Item) -> str | None:
    """Of an item that a function of the task scores: a model that is sure of a choice must be better off with some.

    Raises:
        Exception: whatever the function raises.
    """
    number = len(item.choices)
    found = []
    for sure in range(number):
        answers = [(0.0, True) if choice == sure else (_IMPOSSIBLE, False) for choice in range(number)]
        metrics = task.process_results(doc, answers)
        found.append({key: float(value) for key, value in metrics.items() if isinstance(value, int | float)})
    if not all(found):
        return None  # the metrics are not numbers per item
    if any(math.isnan(value) for metrics in found for value in metrics.values()):
        return "its score is not a number, whichever choice a model takes"
    if any(len({metrics[key] for metrics in found}) > 1 for key in found[0]):
        return None
    return f"every choice scores {found[0]}, so none of them is the gold answer, or all are"


def _null_problem(doc: Any, item: _Item, again: Callable[[Any], _Item]) -> str | None:
    """Of a null that gets into a text as the word None.

    Each null is replaced by a mark: if the mark gets into a text that has the word None, then so does the null.
    """
    if not isinstance(doc, Mapping):
        return None
    before = item.texts()
    for column, value in doc.items():
        if not _holds_null(value):
            continue
        try:
            after = again({**doc, column: _marked(value)}).texts()
        except Exception:  # the functions take no text there, so the null gets into none either
            continue
        if any("None" in old and _MARK in new for old, new in zip(before, after, strict=False)):
            return f"column {column!r} is null, and the prompt would say None"
    return None


def _holds_null(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_null(one) for one in value.values())
    return any(_holds_null(one) for one in value) if isinstance(value, list) else value is None


def _marked(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _marked(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_marked(one) for one in value]
    return _MARK if value is None else value


def _too_few_examples(task: Any) -> str | None:
    """lm-eval draws one example more than it needs where the item itself might be among them."""
    shots = getattr(task.config, "num_fewshot", None) or 0
    if not shots or not isinstance(task, ConfigurableTask):
        return None
    splits = _named_splits(task)
    is_drawn_from_items = task.fewshot_cfg.split == task.config.test_split
    is_own_split = len(splits) > 1 and splits[0][0] == splits[1][0]
    needs = shots + (is_own_split if isinstance(task.sampler, FirstNSampler) else is_drawn_from_items)
    has = len(task.sampler.df)
    if has >= needs:
        return None
    where = f"split {splits[1][0]!r}" if len(splits) > 1 else "the task's own few-shot samples"
    return f"{shots} examples per prompt need {needs} rows, and {where} has {has}; give a smaller --num-fewshot"


def _chance(task: Any) -> float | None:
    """The mean share of right choices; None for a task that does not choose, or scores in its own way."""
    if not isinstance(task, ConfigurableTask) or task.OUTPUT_TYPE != "multiple_choice":
        return None
    if callable(task.config.process_results):
        return None
    shares = []
    for doc in task.task_docs:
        gold = task.doc_to_target(doc)
        num_right = len(set(gold)) if isinstance(gold, list) else 1
        shares.append(num_right / len(task.doc_to_choice(doc)))
    return math.fsum(shares) / len(shares)


def _in_words(error: Exception, doc: Any) -> str:
    columns = f"; its columns are {sorted(map(str, doc))}" if isinstance(doc, Mapping) else ""
    return f"the task cannot use it ({type(error).__name__}: {error}){columns}"
