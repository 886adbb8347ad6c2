"""Gold answers that no generated text can meet: named with file and row, and nothing else is."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparseift_llm.evaluation.data_files import DataError
from sparseift_llm.evaluation.suites import V1, select
from sparseift_llm.evaluation.task_loading import LoadedSuite, load_suite, named_suite
from tests.helpers.evaluation import QUIZ, gsm8k_rows, write_dataset

BAD = 5
MEAN = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
NUMBER = [{"function": "regex", "regex_pattern": r"#### (\-?[0-9]+)"}, {"function": "take_first"}]
LAST_NUMBER = [
    {"function": "regex", "group_select": -1, "regex_pattern": r"(-?[0-9]+)"},
    {"function": "take_first"},
]
AFTER_WORDS = [{"function": "regex", "regex_pattern": r"the answer is (\w+)"}, {"function": "take_first"}]
TASKS: dict[str, dict[str, Any]] = {
    "one_filter": {"metric_list": [{**MEAN, "regexes_to_ignore": ["(?s).*#### "]}], "filters": [NUMBER]},
    "two_filters": {"metric_list": [{**MEAN, "regexes_to_ignore": ["(?s).*#### "]}], "filters": [NUMBER, LAST_NUMBER]},
    "several_samples": {
        "metric_list": [{**MEAN, "regexes_to_ignore": ["(?s).*#### "]}],
        "filters": [[NUMBER[0], {"function": "majority_vote"}, {"function": "take_first"}]],
        "repeats": 3,
    },
    "cut_by_a_template": {
        "metric_list": [MEAN],
        "filters": [LAST_NUMBER],
        "doc_to_target": "{{answer.split('####')[-1].strip()}}",
    },
}


def rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    return gsm8k_rows(random.Random(seed), number)


def loaded(
    folder: Path, task: str, examples: list[dict[str, Any]], items: list[dict[str, Any]], **changes: Any
) -> LoadedSuite:
    write_dataset(folder / "data" / QUIZ, {"default": {"train": examples, "test": items}})
    values = {
        "task": task,
        "dataset_path": QUIZ,
        "test_split": "test",
        "fewshot_split": "train",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"]},
        **TASKS.get(task, {}),
        **changes,
    }
    chains = values.pop("filters")
    values["filter_list"] = [{"name": f"filter-{number}", "filter": chain} for number, chain in enumerate(chains)]
    (folder / "tasks").mkdir()
    (folder / "tasks" / "task.yaml").write_text(yaml.safe_dump(values))
    return load_suite(replace(named_suite(task, 2), folders=()), folder / "data", folder / "tasks")


def without_mark(row: dict[str, Any]) -> None:
    row["answer"] = row["answer"].replace("#### ", "it is ")


def without_number(row: dict[str, Any]) -> None:
    row["answer"] = f"{row['answer'].partition('####')[0]}#### many"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("damage", [without_mark, without_number])
def test_an_answer_without_what_the_task_looks_for_is_named(
    task: str, damage: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    items = rows(12, 1)
    for index in (BAD, 8):
        damage(items[index])
    with pytest.raises(DataError, match=r"line 6: its gold answer .* finds no answer in it; .* like .*\d+'") as raised:
        loaded(tmp_path, task, rows(8), items)
    assert "and of 1 more of 12 rows" in str(raised.value)
    assert str(raised.value).count("\n") == 1, "one message for the split"


@pytest.mark.parametrize("task", TASKS)
def test_whole_data_is_accepted(task: str, tmp_path: Path) -> None:
    assert loaded(tmp_path, task, rows(8), rows(12, 1)).wrong_labels == {}


def test_all_items_are_damaged_and_the_examples_tell(tmp_path: Path) -> None:
    items = rows(12, 1)
    for row in items:
        without_mark(row)
    with pytest.raises(DataError, match=r"line 1: its gold answer .*and of 11 more of 12 rows"):
        loaded(tmp_path, "two_filters", rows(8), items)


def test_a_task_that_wants_words_around_its_answer_is_left_alone(tmp_path: Path) -> None:
    """No gold answer has these words, as in BBH with chains of thought: that is no fault of the data."""
    items = [{**row, "answer": "stone"} for row in rows(12, 1)]
    assert loaded(tmp_path, "words", items[:4], items, metric_list=[MEAN], filters=[AFTER_WORDS]).wrong_labels == {}


@pytest.mark.parametrize("metric", ["bleu", "f1"])
def test_metrics_that_are_no_score_per_item_are_left_alone(metric: str, tmp_path: Path) -> None:
    items = rows(12, 1)
    without_mark(items[BAD])
    changes = {"metric_list": [{"metric": metric, "higher_is_better": True}], "filters": [NUMBER]}
    assert loaded(tmp_path, "another_metric", rows(8), items, **changes).wrong_labels == {}


def test_lm_evals_own_gsm8k(tmp_path: Path) -> None:
    items = rows(12, 1)
    without_mark(items[BAD])
    folder, suite = tmp_path / "openai" / "gsm8k", select(V1, ["gsm8k"])
    write_dataset(folder, {"main": {"train": rows(30), "test": items}})
    with pytest.raises(DataError, match=r"main/test.jsonl, line 6: its gold answer .*\(task gsm8k\)"):
        load_suite(suite, tmp_path)
    assert load_suite(suite, tmp_path, allow_wrong_labels=True).wrong_labels == {"gsm8k": 1}
    write_dataset(folder, {"main": {"train": rows(30), "test": rows(12, 1)}})
    assert load_suite(suite, tmp_path).wrong_labels == {}
